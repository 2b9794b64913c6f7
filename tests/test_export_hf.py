"""From a GELU model's weights through training and export_hf.py: transformers, open_clip and this
project load the same model."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import export_hf
import main_CLIP
from clip.weights import CONFIGS
from utils.method.passes import encoders

GELU = CONFIGS["tiny"] | {"activation": "gelu", "image_mean": (0.5, 0.4, 0.3),
                          "image_std": (0.3, 0.25, 0.2)}


@pytest.fixture(scope="module")
def trained(datasets, tmp_path_factory):
    """The checkpoint of a run that began from the weights of a GELU model alone, and the run's
    model."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    weights = clip.CLIP(**GELU).state_dict()
    torch.save({"state_dict": weights, "config": {
        name: GELU[name] for name in ("image_mean", "image_std")}}, folder / "x.pt")
    options = [*datasets["cc"].options, "--device", "cpu", "--num_workers", "0", "--batch_size",
               "6", "--lr", "1e-3", "--warmup", "1", "--checkpoint_path", str(folder)]
    main_CLIP.main([*options, "--vision_model", str(folder / "x.pt"), "--activation", "gelu",
                    "--epochs", "1"])
    model = clip.CLIP(**GELU).eval()
    model.load_state_dict(torch.load(folder / "ex0" / "epoch1.pt")["state_dict"])
    return folder / "ex0" / "epoch1.pt", model, options


def export(path, out):
    export_hf.main(["--resume", str(path), "--out", str(out)])


CAPTIONS = ["a cat", "Two DOGS,\tplaying  in the snow!", "", "café à la crème", "it's 1999's best",
            "東京タワーの夜景", "🐕 at #the_beach 🏖️", "a " * 100 + "dog", "\"quoted\" — dashes",
            "3½ kg\nof Äpfel"]


@pytest.fixture
def pictures():
    """Two PIL images, in colour and grey."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8)).resize((60, 41))
            for shape in ((8, 9, 3), (8, 9))]


@torch.no_grad()
def ours(model, pictures):
    """Features of the pictures and of CAPTIONS, as training has them."""
    crops = torch.stack([clip.Preprocess.of(model.config)(picture) for picture in pictures])
    tokens, _ = clip.tokenize_with_lengths(CAPTIONS)
    return [torch.nn.functional.normalize(x, dim=1)
            for x in (model.encode_image(crops), model.encode_text(tokens))]


def test_the_activation_travels_with_the_checkpoint(trained, pictures, capsys):
    path, model, options = trained
    capsys.readouterr()
    loaded, preprocess = clip.load(path, device="cpu")
    assert loaded.config == GELU
    torch.testing.assert_close(ours(loaded, pictures), ours(model, pictures), rtol=0, atol=0)
    main_CLIP.main([*options, "--epochs", "2", "--resume", "auto"])
    said = capsys.readouterr().out
    assert "is assumed" not in said and "--activation" not in said
    assert clip.load(path.with_name("epoch2.pt"), device="cpu")[0].config == GELU
    with torch.no_grad():  # the passes normalise with the model's mean, too
        crops = torch.stack([torch.from_numpy(preprocess.crop(x)) for x in pictures])
        passed = torch.nn.functional.normalize(encoders(model)[0](crops), dim=1)
    torch.testing.assert_close(passed, ours(model, pictures)[0], rtol=1e-6, atol=1e-6)


def test_exported_for_transformers(trained, tmp_path, pictures, capsys):
    """The processor of transformers gives pictures and captions our features."""
    path, model, _ = trained
    export(path, tmp_path / "x")
    assert "activation gelu" in capsys.readouterr().out
    assert clip.load(str(tmp_path / "x"), device="cpu")[0].config == GELU
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "x")
    inputs = processor(text=CAPTIONS, images=pictures, padding=True, truncation=True,
                       return_tensors="pt")
    with torch.no_grad():
        out = transformers.CLIPModel.from_pretrained(tmp_path / "x").eval()(**inputs)
    for a, b in zip((out.image_embeds, out.text_embeds), ours(model, pictures), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert len({tuple(row.tolist()) for row in out.text_embeds}) == len(CAPTIONS)


def test_where_the_crop_of_transformers_differs():
    """By one pixel if the margin is 3, 7, ... pixels, as export_hf.py says."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    for margin in range(12):
        image = Image.fromarray(pixels[:, :32 + margin])
        theirs = processor(image, return_tensors="pt").pixel_values[0]
        left = margin // 2
        for start, crop in ((left, theirs), (left + (margin % 4 == 3), clip.Preprocess(32)(image))):
            expected = clip.normalize(torch.tensor(pixels[:, start:start + 32]).permute(2, 0, 1))
            torch.testing.assert_close(crop, expected, rtol=0, atol=1e-5)


def test_open_clip_loads_the_checkpoint_as_it_is(trained, tmp_path, pictures):
    open_clip = pytest.importorskip("open_clip")
    path, model, _ = trained
    (tmp_path / "ours.json").write_text(json.dumps({
        "embed_dim": 64, "vision_cfg": {"image_size": 32, "layers": 2, "width": 128,
                                        "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1,
                     "layers": 2}}))
    open_clip.add_model_config(tmp_path / "ours.json")
    theirs, _, preprocess = open_clip.create_model_and_transforms(
        "ours", pretrained=str(path), image_mean=GELU["image_mean"], image_std=GELU["image_std"])
    theirs.eval()
    with torch.no_grad():
        found = (theirs.encode_image(torch.stack([*map(preprocess, pictures)]), True),
                 theirs.encode_text(open_clip.get_tokenizer("ours")(CAPTIONS), True))
    for a, b in zip(found, ours(model, pictures), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_what_is_written_may_be_read_by_others(trained, tmp_path):
    before = os.umask(0o022)
    export(trained[0], tmp_path / "x")
    os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "x").iterdir()} == {0o644}


@pytest.mark.parametrize("problem, words", [
    ("resnet", "open_clip loads the checkpoint"), ("occupied", "--out"),
    ("absent", "no such file")])
def test_bad_input_is_one_line(trained, tmp_path, capsys, problem, words):
    path, out = trained[0], tmp_path / "hf"
    if problem == "resnet":
        path = tmp_path / "resnet.pt"
        resnet = clip.CLIP(**CONFIGS["tiny"] | {
            "vision_layers": (1, 1, 1, 1), "vision_width": 8, "vision_patch_size": None,
            "vision_mlp_width": None, "vision_heads": None})
        torch.save({"state_dict": resnet.state_dict(), "config": resnet.config}, path)
    elif problem == "occupied":
        out.mkdir()
        (out / "mine.txt").write_text("x")
    else:
        path = tmp_path / "nothing.pt"
    with pytest.raises(SystemExit) as caught:
        export(path, out)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said
    assert not (out / "model.safetensors").exists()
