"""Models of transformers and open_clip: saved by their own code with random weights, they give the
same features here, and ours do there, exported by export_hf.py, too. Settings that are not honoured
are refused by name."""

import copy
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity, normalize

import clip
import export_hf
import main_CLIP
from clip.model import complete_config
from clip.preprocess import MEAN
from clip.weights import CONFIGS
from utils.method.passes import encoders

SMALL = {"embed_dim": 24, "image_resolution": 16, "vision_layers": 2, "vision_width": 128,
         "vision_patch_size": 8, "transformer_width": 64, "transformer_layers": 2}
MODELS = {
    "like OpenAI's": {},
    "like LAION's": {"activation": "gelu"},
    "like ViT-H": {"activation": "gelu", "vision_width": 320, "vision_heads": 4},  # 80 wide
    "like ViT-g": {"activation": "gelu", "vision_width": 264, "vision_heads": 3,
                   "vision_mlp_width": int(264 * 4.3637), "transformer_mlp_width": 100},
    "like DFN's": {"image_resolution": 24, "image_mean": (0.5, 0.4, 0.3), "image_std": (0.2,) * 3,
                   "image_resize": "squash", "transformer_heads": 2},
}
RESNET = {"activation": "gelu", "image_resolution": 64, "vision_layers": (1, 2, 1, 1),
          "vision_width": 8, "vision_patch_size": None}
CAPTIONS = ["a cat", "Two DOGS,\tplaying  in the snow!", "", "café à la crème", "it's 1999's best",
            "東京タワーの夜景", "🐕 at #the_beach 🏖️", "a " * 100 + "dog", "\"quoted\" — dashes",
            "3½ kg\nof Äpfel"]
SCALE = "logit_scale"


def configured(name="like OpenAI's"):
    return complete_config(**SMALL | (RESNET if name == "ResNet" else MODELS[name]))


def randomise(model):
    """Every parameter and statistic random, so that none can be left out."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
        for buffer in model.buffers():  # running statistics
            if buffer.is_floating_point() and buffer.ndim == 1:
                buffer.uniform_(0.5, 1.5)
    return model.eval()


def build(name="like OpenAI's", **more):
    return randomise(clip.CLIP(**configured(name) | more))


def batch(config):
    torch.manual_seed(1)
    images = torch.randn(3, 3, config["image_resolution"], config["image_resolution"])
    tokens = torch.randint(1, 48, (3, config["context_length"]))
    tokens[:, 6] = 49407
    return images, tokens


def assert_same_features(ours, theirs):
    """theirs: an open_clip model, or one of transformers."""
    ours, theirs = copy.deepcopy(ours).double(), copy.deepcopy(theirs).double()
    images, tokens = batch(ours.config)
    images = images.double()
    with torch.no_grad():
        own = ours.encode_image(images), ours.encode_text(tokens)
        if hasattr(theirs, "encode_image"):
            others = theirs.encode_image(images), theirs.encode_text(tokens)
        else:
            out = theirs(input_ids=tokens, pixel_values=images)
            own = [normalize(x, dim=1) for x in own]
            others = out.image_embeds, out.text_embeds
    for x, y in zip(own, others, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ours.logit_scale, theirs.logit_scale)


def refused(path, match):
    """The error of loading `path` is one line with its name."""
    with pytest.raises(clip.CheckpointError, match=match) as caught:
        clip.load(path, device="cpu")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def change(path, *keys, value):
    """Set an entry of a JSON file."""
    content = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))


def pictures():
    """Two images of 60 x 40, in colour and grey: no side of a resized one is odd."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, shape, np.uint8)).resize((60, 40))
            for shape in ((8, 9, 3), (8, 9))]


# ---------------------------------------------------------------- transformers


def save_transformers(config, folder):
    """Write a folder as transformers saves it, of a model with random weights. Returns the model.
    """
    transformers = pytest.importorskip("transformers")

    def tower(name):
        return {"hidden_size": config[f"{name}_width"], "hidden_act": config["activation"],
                "intermediate_size": config[f"{name}_mlp_width"],
                "num_attention_heads": config[f"{name}_heads"],
                "num_hidden_layers": config[f"{name}_layers"]}

    side = config["image_resolution"]
    model = randomise(transformers.CLIPModel(transformers.CLIPConfig(
        projection_dim=config["embed_dim"],
        text_config=tower("transformer") | {"max_position_embeddings": config["context_length"]},
        vision_config=tower("vision") | {
            "image_size": side, "patch_size": config["vision_patch_size"]})))
    model.save_pretrained(folder)
    square, squash = {"height": side, "width": side}, config["image_resize"] == "squash"
    transformers.CLIPImageProcessor(
        size=square if squash else {"shortest_edge": side}, crop_size=square,
        image_mean=config["image_mean"], image_std=config["image_std"]).save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name, tmp_path):
    config, said = configured(name), []
    theirs = save_transformers(config, tmp_path / "theirs")
    ours, _ = clip.load(tmp_path / "theirs", device="cpu", log=said.append)
    assert ours.config == config and not said
    assert_same_features(ours, theirs)

    clip.save_hf(ours, tmp_path / "ours")  # and back
    again = type(theirs).from_pretrained(tmp_path / "ours").eval()
    assert_same_features(ours, again)
    assert clip.load(tmp_path / "ours", device="cpu")[0].config == config


PREPROCESSING = {  # settings of CLIPImageProcessor: the mean here
    "usual": ({}, MEAN),
    "mean": ({"image_mean": [0.2, 0.5, 0.9], "image_std": [0.5, 0.1, 0.2]}, (0.2, 0.5, 0.9)),
    "one mean": ({"image_mean": 0.5, "image_std": 0.25}, (0.5, 0.5, 0.5)),
    "squash": ({"size": {"height": 16, "width": 16}, "do_center_crop": False,
                "crop_size": 9}, MEAN),
}


@pytest.mark.parametrize("name", PREPROCESSING)
@pytest.mark.parametrize("nested", [True, False])
def test_preprocessing_of_transformers(tmp_path, name, nested):
    """Pictures and captions have the features that transformers' own processor gives them, read
    from processor_config.json as transformers 5 writes it, or from an older preprocessor_config."""
    transformers = pytest.importorskip("transformers")
    settings, mean = PREPROCESSING[name]
    clip.save_hf(build(), tmp_path)  # has the tokenizer
    theirs = save_transformers(configured(), tmp_path)
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(
            **{"size": {"shortest_edge": 16}, "crop_size": 16} | settings),
        transformers.CLIPTokenizer.from_pretrained(tmp_path))
    if nested:
        processor.save_pretrained(tmp_path)  # then an older preprocessor_config.json does not count
        assert "image_processor" in json.loads((tmp_path / "processor_config.json").read_text())
    else:
        processor.image_processor.save_pretrained(tmp_path)
        (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path)

    said = []
    ours, preprocess = clip.load(tmp_path, device="cpu", log=said.append)
    assert not said and preprocess.mean == mean
    tokens, _ = clip.tokenize_with_lengths(CAPTIONS)
    inputs = processor(text=CAPTIONS, images=pictures(), padding=True, truncation=True,
                       return_tensors="pt")
    with torch.no_grad():
        out = theirs(**inputs)
        images = ours.encode_image(torch.stack([*map(preprocess, pictures())]))
        usual = ours.encode_image(torch.stack([*map(clip.Preprocess(16), pictures())]))
        assert cosine_similarity(images, out.image_embeds).min() > 0.9999
        assert cosine_similarity(ours.encode_text(tokens), out.text_embeds).min() > 0.9999
        if name != "usual":  # the setting matters
            assert cosine_similarity(usual, out.image_embeds).min() < 0.999


def test_settings_as_older_folders_write_them(tmp_path):
    """An end token of 2, settings in text_config_dict, sizes as single numbers."""
    transformers = pytest.importorskip("transformers")
    config = configured()
    save_transformers(config, tmp_path)
    change(tmp_path / "config.json", "text_config", "eos_token_id", value=2)
    old = json.loads((tmp_path / "config.json").read_text())["text_config"]
    change(tmp_path / "config.json", "text_config_dict", value=old | {"num_attention_heads": 4})
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({
        "feature_extractor_type": "CLIPFeatureExtractor", "size": 16, "crop_size": 16}))
    theirs = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    ours, _ = clip.load(tmp_path, device="cpu")
    assert ours.config == config | {"transformer_heads": 4}
    assert_same_features(ours, theirs)


def test_files_of_transformers(tmp_path):
    """Weights alone, pickled ones, with position ids as older versions saved them, and shards. A
    folder without preprocessing says what is assumed."""
    model, folder, said = build(), tmp_path / "hf", []
    clip.save_hf(model, folder)
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text("{}")
    for path in (folder, folder / "model.safetensors"):
        loaded, _ = clip.load(path, device="cpu", log=said.append)
        assert loaded.config == model.config
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert said[0] == f"{folder} does not say its preprocessing (OpenAI's is assumed)"
    weights = load_file(folder / "model.safetensors")
    assert not weights.keys() & (model.state_dict().keys() - {SCALE})
    (folder / "model.safetensors").unlink()
    refused(folder, "config.json and model.safetensors or pytorch_model.bin")
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(weights, folder / "pytorch_model.bin")
    assert_same_features(clip.load(folder, device="cpu")[0], model)

    for i in range(2):
        save_file(dict(list(weights.items())[i::2]), folder / f"model-0000{i}-of-2.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")  # safetensors come first
    assert_same_features(clip.load(folder, device="cpu")[0], model)


# ---------------------------------------------------------------- open_clip


def open_clip_config(config):
    """open_clip_config.json of a model, as open_clip writes it, without settings at their
    defaults."""
    width, vit = config["vision_width"], config["vision_patch_size"] is not None
    vision = {"image_size": config["image_resolution"], "layers": config["vision_layers"],
              "width": width, "patch_size": config["vision_patch_size"]}
    if vit and config["vision_heads"] != width // 64:
        vision["head_width"] = width // config["vision_heads"]
    text = {"context_length": config["context_length"], "vocab_size": config["vocab_size"],
            "width": config["transformer_width"], "heads": config["transformer_heads"],
            "layers": config["transformer_layers"]}
    for tower, name in ((vision, "vision"), (text, "transformer")):
        if config[f"{name}_mlp_width"] not in (None, 4 * tower["width"]):  # open_clip rounds down
            tower["mlp_ratio"] = (config[f"{name}_mlp_width"] + 0.5) / tower["width"]
    model = {"quick_gelu": True} if config["activation"] == "quick_gelu" else {}
    model |= {"embed_dim": config["embed_dim"], "vision_cfg": vision, "text_cfg": text}
    return {"model_cfg": model, "preprocess_cfg": {
        "mean": config["image_mean"], "std": config["image_std"], "interpolation": "bicubic",
        "resize_mode": config["image_resize"]}}


def save_open_clip(config, folder, **images):
    """Write a folder as open_clip saves it, preprocess_cfg changed by `images`. Returns its model
    and transform."""
    open_clip = pytest.importorskip("open_clip")
    folder.mkdir(parents=True, exist_ok=True)
    described = open_clip_config(config)
    described["preprocess_cfg"] |= images
    theirs = randomise(open_clip.CLIP(**described["model_cfg"]))
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    torch.save(theirs.state_dict(), folder / "open_clip_pytorch_model.bin")
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return theirs.eval(), transform


@pytest.mark.parametrize("name, images", [
    *((name, {}) for name in [*MODELS, "ResNet"]),
    *(("like DFN's", images) for images in (
        {"mean": None, "std": None, "resize_mode": None, "interpolation": None},
        {"mean": 0.5, "std": 0.25}, {"interpolation": "random", "mode": "RGB", "fill_color": 9},
        {"size": [99, 99]}))])
def test_models_of_open_clip(name, images, tmp_path):
    """With other settings of images, too."""
    config, said = configured(name), []
    theirs, transform = save_open_clip(config, tmp_path, **images)
    ours, preprocess = clip.load(tmp_path, device="cpu", log=said.append)
    assert images or ours.config == config and not said
    assert_same_features(ours, theirs)
    for picture in pictures():
        torch.testing.assert_close(preprocess(picture), transform(picture), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- what is refused


PROCESSOR, HF, OPEN_CLIP = "preprocessor_config.json", "config.json", "open_clip_config.json"


@pytest.mark.parametrize("file, key, value", [
    *((PROCESSOR, key, value) for key, value in (
        ("do_resize", False), ("size", {"shortest_edge": 18}),
        ("size", {"height": 16, "width": 20}),
        ("size", {"shortest_edge": 16, "longest_edge": 20}), ("size", None), ("resample", 2),
        ("do_center_crop", False), ("crop_size", {"height": 20, "width": 20}), ("do_pad", True),
        ("do_rescale", False), ("rescale_factor", 1), ("do_normalize", False),
        ("image_processor_type", "ViTImageProcessor"))),
    (HF, "model_type", "siglip"), (HF, "text_config/hidden_act", "gelu"),
    (HF, "vision_config/hidden_act", "gelu"), (HF, "vision_config/layer_norm_eps", 1e-6),
    (HF, "text_config/eos_token_id", 48), (HF, "text_config/vocab_size", 49410),
    (OPEN_CLIP, "model_cfg/vision_cfg/timm_model_name", "fastvit"),
    (OPEN_CLIP, "model_cfg/vision_cfg/pool_type", "avg"),
    (OPEN_CLIP, "model_cfg/vision_cfg/norm_kwargs", {"eps": 1e-6}),
    (OPEN_CLIP, "model_cfg/text_cfg/hf_tokenizer_name", "mt5"),
    (OPEN_CLIP, "model_cfg/text_cfg/no_causal_mask", True),
    (OPEN_CLIP, "preprocess_cfg/interpolation", "bilinear"),
    (OPEN_CLIP, "preprocess_cfg/mode", "L")])
def test_settings_that_are_not_clip_s_are_named(tmp_path, file, key, value):
    """Of a folder of transformers or open_clip. The error names a way out."""
    if file == OPEN_CLIP:
        save_open_clip(configured(), tmp_path)
    else:
        clip.save_hf(build(), tmp_path)
    keys = key.split("/")
    change(tmp_path / file, *keys, value=value)
    value = "quick_gelu" if key == "vision_config/hidden_act" else value  # the text tower's
    value = {"shortest_edge": 224} if value is None else value  # transformers' default
    refused(tmp_path, re.escape(f"has {keys[-1]} {value}, but supported is ") + ".*judge_features")


@pytest.mark.parametrize("file", ["vocab.json", "tokenizer.json"])
def test_another_tokenizer_is_refused(tmp_path, file):
    """Although it has as many tokens as CLIP's."""
    clip.save_hf(build(), tmp_path)
    words = json.loads((tmp_path / "vocab.json").read_text())
    words["cat</w>"], words["dog</w>"] = words["dog</w>"], words["cat</w>"]
    content = words if file == "vocab.json" else {"model": {"vocab": words}}
    (tmp_path / file).write_text(json.dumps(content))
    refused(tmp_path, f"{file} has other tokens than CLIP's; --judge_features")


@pytest.mark.parametrize("key, match", [
    ("logit_bias", "SigLIP"), ("text_decoder.ln_final.bias", "CoCa"),
    ("visual.trunk.head.bias", "timm"), ("text.ln_final.bias", "text tower of its own kind")])
def test_weights_that_are_not_clip(tmp_path, key, match):
    """Alone, and in a folder of open_clip."""
    folder = tmp_path / "folder"
    save_open_clip(configured(), folder)
    for path in (tmp_path / "x.pt", folder / "open_clip_pytorch_model.bin"):
        torch.save(build().state_dict() | {key: torch.zeros(1)}, path)
    for path in (tmp_path / "x.pt", folder):
        refused(path, f"{match}.*--judge_features")


def test_sizes_are_those_of_the_weights(tmp_path):
    """Whatever a crafted config says: a billion layers would fill the memory."""
    torch.save({"state_dict": build().state_dict(), "config": configured() | {
        "vision_layers": 10**9, "vision_width": 10**9, "vocab_size": 10**9}}, tmp_path / "x.pt")
    assert clip.load(tmp_path / "x.pt", device="cpu")[0].config == build().config


@pytest.mark.parametrize("key, value", [
    ("vision_heads", 3), ("vision_heads", -2), ("transformer_heads", "1"), ("image_resolution", 40),
    ("activation", "gelu_new"), ("activation", {}), ("image_resize", "longest"),
    ("image_mean", (0.5, 0.5)), ("image_mean", ("a",) * 3), ("image_std", (0.5, 0.5, 0.0))])
def test_settings_that_do_not_fit(tmp_path, key, value):
    said = {"state_dict": build().state_dict(), "config": configured() | {key: value}}
    torch.save(said, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", f"does not fit tiny with .*{key} " + re.escape(str(value)))


def test_folders_that_are_damaged(tmp_path):
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", "open_clip_config.json and .*, or config.json and ")
    clip.save_hf(build(), tmp_path / "config.json")
    save_open_clip(configured(), tmp_path / "open_clip_config.json")
    for name in ("config.json", "open_clip_config.json"):
        for damaged in ("{", "[]", "[" * 100_000, '{"model_type": "clip", "text_config": "x"}',
                        '{"model_cfg": {"vision_cfg": [], "text_cfg": {}}}', "\xff"):
            (tmp_path / name / name).write_text(damaged, encoding="latin-1")
            refused(tmp_path / name, f"{name} or a file that goes with it is damaged|model_type")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_pipes_are_not_opened(tmp_path, name):
    """Opening a pipe blocks until somebody writes to it."""
    clip.save_hf(build(), tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        refused(path, "not a regular file")


# ---------------------------------------------------------------- weights without settings


def test_activation_of_weights_alone(tmp_path):
    model, path, said = build("like LAION's"), tmp_path / "x.pt", []
    torch.save(model.state_dict(), path)
    wrong, _ = clip.load(path, device="cpu", log=said.append)
    assert wrong.config["activation"] == "quick_gelu"
    assert len(said) == 1 and str(path) in said[0] and "quick_gelu is assumed" in said[0]
    right, _ = clip.load(path, device="cpu", activation="gelu", log=said.append)
    assert_same_features(right, model)
    assert clip.architecture(path, "gelu") == model.config
    assert said[1:] == [f"{path} does not say its preprocessing (OpenAI's is assumed)"]
    with pytest.raises(AssertionError, match="not close"):
        assert_same_features(wrong, model)
    torch.save({"state_dict": model.state_dict(), "config": model.config}, path)
    assert clip.load(path, device="cpu", log=said.append)[0].config == model.config
    with pytest.raises(clip.CheckpointError, match="activation is gelu, not quick_gelu"):
        clip.load(path, device="cpu", activation="quick_gelu")
    assert len(said) == 2


def test_heads_of_weights_alone(tmp_path):
    """Those of ViT-H/14, ViT-g/14, ViT-bigG/14 and ViT-L/14; or they have to be said."""
    for width in (1280, 1408, 1664, 1024):
        with torch.device("meta"):
            weights = clip.CLIP(**SMALL | {"vision_width": width, "vision_layers": 1}).state_dict()
        assert clip.infer_config(weights, {})["vision_heads"] == 16
    torch.save(build(transformer_width=100, transformer_heads=5).state_dict(), tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "does not fit .*transformer_heads None")


# ---- checkpoints as trainers leave them ----------------------------------------------------------


@pytest.mark.parametrize("wrap", [
    lambda w: {f"module.{k}": v for k, v in w.items()},
    lambda w: {f"_orig_mod.{k}": v for k, v in w.items()},
    lambda w: {"state_dict": {f"module._orig_mod.{k}": v for k, v in w.items()}},
    lambda w: {k.replace("visual.", "visual._orig_mod."): v for k, v in w.items()},
    lambda w: {"state_dict": {f"model.clip.{k}": v for k, v in w.items()} | {"loss.a": w[SCALE]},
               "pytorch-lightning_version": "2"},
    lambda w: {"model_ema": {f"module.{k}": v for k, v in w.items()} | {"n_averaged": w[SCALE]},
               "epoch": 3},
    lambda w: {"model": w, "optimizer": {"state": {}}, "epoch": 3},
    lambda w: {**w, "epoch": 3, "note": "x"}])
def test_a_model_is_found_below_the_names_of_wrappers(tmp_path, wrap):
    model = build()
    torch.save(wrap(model.state_dict()), tmp_path / "c.pt")
    found, _ = clip.load(tmp_path / "c.pt", "cpu", log=lambda _: None)
    torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=0, atol=0)


# ---- trained and exported ------------------------------------------------------------------------

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


@torch.no_grad()
def ours(model):
    """Features of the pictures and of CAPTIONS, as training has them."""
    crops = torch.stack([clip.Preprocess.of(model.config)(picture) for picture in pictures()])
    tokens, _ = clip.tokenize_with_lengths(CAPTIONS)
    return [normalize(x, dim=1) for x in (model.encode_image(crops), model.encode_text(tokens))]


def test_the_activation_travels_with_the_checkpoint(trained, capsys):
    path, model, options = trained
    capsys.readouterr()
    loaded, preprocess = clip.load(path, device="cpu")
    assert loaded.config == GELU
    torch.testing.assert_close(ours(loaded), ours(model), rtol=0, atol=0)
    main_CLIP.main([*options, "--epochs", "2", "--resume", "auto"])
    said = capsys.readouterr().out
    assert "is assumed" not in said and "--activation" not in said
    assert clip.load(path.with_name("epoch2.pt"), device="cpu")[0].config == GELU
    with torch.no_grad():  # the passes normalise with the model's mean, too
        crops = torch.stack([torch.from_numpy(preprocess.crop(x)) for x in pictures()])
        passed = normalize(encoders(model)[0](crops), dim=1)
    torch.testing.assert_close(passed, ours(model)[0], rtol=1e-6, atol=1e-6)


def test_exported_for_transformers(trained, tmp_path, capsys):
    """The processor of transformers gives pictures and captions our features. Others may read the
    files."""
    path, model, _ = trained
    before = os.umask(0o022)
    export(path, tmp_path / "x")
    os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "x").iterdir()} == {0o644}
    assert "activation gelu" in capsys.readouterr().out
    assert clip.load(str(tmp_path / "x"), device="cpu")[0].config == GELU
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "x")
    inputs = processor(text=CAPTIONS, images=pictures(), padding=True, truncation=True,
                       return_tensors="pt")
    with torch.no_grad():
        out = transformers.CLIPModel.from_pretrained(tmp_path / "x").eval()(**inputs)
    torch.testing.assert_close([out.image_embeds, out.text_embeds], ours(model), rtol=0, atol=1e-4)
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


def test_open_clip_loads_the_checkpoint_as_it_is(trained, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    path, model, _ = trained
    (tmp_path / "ours.json").write_text(json.dumps(open_clip_config(GELU)["model_cfg"]))
    open_clip.add_model_config(tmp_path / "ours.json")
    theirs, _, preprocess = open_clip.create_model_and_transforms(
        "ours", pretrained=str(path), image_mean=GELU["image_mean"], image_std=GELU["image_std"])
    theirs.eval()
    with torch.no_grad():
        found = [theirs.encode_image(torch.stack([*map(preprocess, pictures())]), True),
                 theirs.encode_text(open_clip.get_tokenizer("ours")(CAPTIONS), True)]
    torch.testing.assert_close(found, ours(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("problem, words", [
    ("resnet", "open_clip loads the checkpoint"), ("occupied", "--out"),
    ("absent", "no such file")])
def test_bad_input_is_one_line(trained, tmp_path, capsys, problem, words):
    path, out = trained[0], tmp_path / "hf"
    if problem == "occupied":
        out.mkdir()
        (out / "mine.txt").write_text("x")
    else:
        path = tmp_path / "resnet.pt"
    if problem == "resnet":
        torch.save(build("ResNet").state_dict(), path)
    with pytest.raises(SystemExit) as caught:
        export(path, out)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said
    assert not (out / "model.safetensors").exists()
