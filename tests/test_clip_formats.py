"""Models of Hugging Face and open_clip: built by their own code at random weights, they give the
same features here, and ours do there; what is not CLIP is refused by its name."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import clip
from clip.model import complete_config
from clip.preprocess import MEAN, STD
from clip.weights import CONFIGS

SMALL = {"embed_dim": 24, "image_resolution": 16, "vision_layers": 2, "vision_width": 128,
         "vision_patch_size": 8, "context_length": 12, "vocab_size": 50, "transformer_width": 64,
         "transformer_layers": 2}
MODELS = {
    "like OpenAI's": {},
    "like LAION's": {"activation": "gelu"},
    "like ViT-H": {"activation": "gelu", "vision_width": 320, "vision_heads": 4},  # 80 wide
    "like ViT-g": {"activation": "gelu", "vision_width": 264, "vision_heads": 3,
                   "vision_mlp_width": int(264 * 4.3637), "transformer_mlp_width": 100},
    "whose MLP ratio is hard to write": {"vision_width": 70, "vision_heads": 5,
                                         "vision_mlp_width": 94},
    "like DFN's": {"image_resolution": 24, "image_mean": (0.5, 0.4, 0.3), "image_std": (0.2,) * 3,
                   "image_resize": "squash", "transformer_heads": 2},
}
RESNET = {"activation": "gelu", "image_resolution": 64, "vision_layers": (1, 2, 1, 1),
          "vision_width": 8, "vision_patch_size": None}


def configured(name):
    return complete_config(**SMALL | (RESNET if name == "ResNet" else MODELS[name]))


def randomise(model):
    """Every parameter random, so that none can be left out."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval()


def build(name):
    return randomise(clip.CLIP(**configured(name)))


def batch(config):
    torch.manual_seed(1)
    images = torch.randn(3, 3, config["image_resolution"], config["image_resolution"])
    tokens = torch.randint(1, 48, (3, config["context_length"]))
    tokens[:, 6] = config["vocab_size"] - 1
    return images, tokens


def assert_same_features(ours, theirs):
    """theirs: an open_clip model, or one of transformers."""
    images, tokens = batch(ours.config)
    with torch.no_grad():
        own = ours.encode_image(images), ours.encode_text(tokens)
        if hasattr(theirs, "encode_image"):
            others = theirs.encode_image(images), theirs.encode_text(tokens)
        else:
            out = theirs(input_ids=tokens, pixel_values=images)
            own = [torch.nn.functional.normalize(x, dim=1) for x in own]
            others = out.image_embeds, out.text_embeds
    for x, y in zip(own, others, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.logit_scale, theirs.logit_scale)


def refused(path, match):
    """The error of loading `path`: one line with its name."""
    with pytest.raises(clip.CheckpointError, match=match) as caught:
        clip.load(path, device="cpu")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def change(path, *keys, value):
    """Set an entry of a JSON file."""
    content = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))


# ---------------------------------------------------------------- Hugging Face


def hf_model(config):
    """A model of transformers with random weights."""
    from transformers import CLIPConfig, CLIPModel

    def tower(name):
        return {"hidden_size": config[f"{name}_width"], "hidden_act": config["activation"],
                "intermediate_size": config[f"{name}_mlp_width"],
                "num_attention_heads": config[f"{name}_heads"],
                "num_hidden_layers": config[f"{name}_layers"]}

    end = config["vocab_size"] - 1
    return randomise(CLIPModel(CLIPConfig(
        projection_dim=config["embed_dim"],
        text_config=tower("transformer") | {
            "vocab_size": config["vocab_size"], "max_position_embeddings": config["context_length"],
            "bos_token_id": end - 1, "eos_token_id": end},
        vision_config=tower("vision") | {
            "image_size": config["image_resolution"], "patch_size": config["vision_patch_size"]})))


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    config, folder = configured(name), tmp_path / "theirs"
    theirs = hf_model(config)
    theirs.save_pretrained(folder)
    square = {"height": config["image_resolution"], "width": config["image_resolution"]}
    size = square if config["image_resize"] == "squash" else {"shortest_edge": square["width"]}
    transformers.CLIPImageProcessor(
        size=size, crop_size=square, image_mean=config["image_mean"], image_std=config["image_std"]
    ).save_pretrained(folder)
    said = []
    ours, preprocess = clip.load(folder, device="cpu", log=said.append)
    assert ours.config == config and not said
    assert preprocess.resize == config["image_resize"] and preprocess.mean == config["image_mean"]
    assert_same_features(ours, theirs)

    clip.save_hf(ours, tmp_path / "ours")  # and back
    again = transformers.CLIPModel.from_pretrained(tmp_path / "ours").eval()
    assert_same_features(ours, again)
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "ours")
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == (
        config["image_mean"], config["image_std"])


def test_hf_names_round_trip():
    state_dict = build("like OpenAI's").state_dict()
    theirs = clip.to_hf(state_dict)
    assert not theirs.keys() & (state_dict.keys() - {"logit_scale"})
    theirs["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    back = clip.from_hf(theirs)
    assert back.keys() == state_dict.keys()
    assert all(torch.equal(back[key], value) for key, value in state_dict.items())
    with pytest.raises(ValueError, match="Vision Transformer"):
        clip.to_hf(build("ResNet").state_dict())


def test_hf_files(tmp_path):
    model, folder = build("like OpenAI's"), tmp_path / "hf"
    clip.save_hf(model, folder)
    (folder / "preprocessor_config.json").unlink()  # which not every folder has
    for path in (folder, folder / "model.safetensors"):
        loaded, _ = clip.load(path, device="cpu")
        assert loaded.config == model.config
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    (folder / "model.safetensors").unlink()
    refused(folder, "config.json and model.safetensors or pytorch_model.bin")
    torch.save(clip.to_hf(model.state_dict()), folder / "pytorch_model.bin")
    assert_same_features(clip.load(folder, device="cpu")[0], model)


# ---------------------------------------------------------------- open_clip


def open_clip_config(config):
    """open_clip_config.json of a model, as open_clip writes it; what is usual is left out."""
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
    model = {"embed_dim": config["embed_dim"], "vision_cfg": vision, "text_cfg": text}
    if config["activation"] == "quick_gelu":
        model["quick_gelu"] = True
    return {"model_cfg": model, "preprocess_cfg": {
        "mean": config["image_mean"], "std": config["image_std"], "interpolation": "bicubic",
        "resize_mode": config["image_resize"]}}


@pytest.mark.parametrize("name", [*MODELS, "ResNet"])
def test_models_of_open_clip(name, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    config = configured(name)
    described = open_clip_config(config)
    theirs = randomise(open_clip.CLIP(**described["model_cfg"]))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    said = []
    ours, preprocess = clip.load(tmp_path, device="cpu", log=said.append)
    assert ours.config == config and not said
    assert_same_features(ours, theirs)

    clip.save_open_clip(ours, tmp_path / "ours")  # and back
    again, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'ours'}")
    assert_same_features(ours, again.eval())
    picture = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    picture = Image.fromarray(picture)
    torch.testing.assert_close(preprocess(picture), transform(picture), rtol=1e-5, atol=1e-5)
    assert clip.load(tmp_path / "ours", device="cpu")[0].config == config


def test_checkpoints_of_ours_load_in_open_clip(tmp_path):
    """Where it knows the architecture by a name, it needs no more than the checkpoint."""
    open_clip = pytest.importorskip("open_clip")
    model = build("like LAION's")
    torch.save({"epoch": 1, "state_dict": model.state_dict(), "config": model.config,
                "optimizer": {}}, tmp_path / "epoch1.pt")
    (tmp_path / "ours.json").write_text(json.dumps(open_clip_config(model.config)["model_cfg"]))
    open_clip.add_model_config(tmp_path / "ours.json")
    theirs = open_clip.create_model("ours", pretrained=str(tmp_path / "epoch1.pt"))
    assert_same_features(model, theirs.eval())


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("key, value, match", [
    (("model_type",), "siglip", "type siglip"),
    (("text_config", "hidden_act"), "gelu", "hidden_act gelu"),
    (("vision_config", "layer_norm_eps"), 1e-6, "layer_norm_eps 1e-06"),
])
def test_models_of_transformers_that_are_not_clip(tmp_path, key, value, match):
    clip.save_hf(build("like OpenAI's"), tmp_path)
    change(tmp_path / "config.json", *key, value=value)
    refused(tmp_path, f"{match}.*--judge_features")


@pytest.mark.parametrize("key, value, match", [
    (("model_cfg", "vision_cfg", "timm_model_name"), "fastvit", "timm_model_name fastvit"),
    (("model_cfg", "vision_cfg", "pool_type"), "avg", "pool_type avg"),
    (("model_cfg", "text_cfg", "hf_tokenizer_name"), "mt5", "hf_tokenizer_name mt5"),
    (("model_cfg", "text_cfg", "no_causal_mask"), True, "no_causal_mask True"),
    (("preprocess_cfg", "interpolation"), "bilinear", "bilinear interpolation"),
])
def test_models_of_open_clip_that_are_not_clip(tmp_path, key, value, match):
    clip.save_open_clip(build("like OpenAI's"), tmp_path)
    change(tmp_path / "open_clip_config.json", *key, value=value)
    refused(tmp_path, f"{match}.*--judge_features")


@pytest.mark.parametrize("key, match", [
    ("logit_bias", "SigLIP"), ("text_decoder.ln_final.bias", "CoCa"),
    ("visual.trunk.head.bias", "timm"), ("text.ln_final.bias", "text tower of its own kind")])
def test_weights_that_are_not_clip(tmp_path, key, match):
    """Alone, and in a folder of open_clip."""
    model, folder = build("like OpenAI's"), tmp_path / "folder"
    clip.save_open_clip(model, folder)
    (folder / "open_clip_model.safetensors").unlink()
    for path in (tmp_path / "x.pt", folder / "open_clip_pytorch_model.bin"):
        torch.save(model.state_dict() | {key: torch.zeros(1)}, path)
    for path in (tmp_path / "x.pt", folder):
        refused(path, f"{match}.*--judge_features")


@pytest.mark.parametrize("key, value", [
    ("vision_heads", 3), ("vision_heads", 0), ("transformer_heads", "1"), ("image_resolution", 40),
    ("activation", "gelu_new"), ("activation", {}), ("image_resize", "longest")])
def test_settings_that_do_not_fit(tmp_path, key, value):
    model = build("like OpenAI's")
    config = model.config | {key: value}
    torch.save({"state_dict": model.state_dict(), "config": config}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", f"{key} .* is unknown here, or does not go with the weights")


def test_folders_that_are_damaged(tmp_path):
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", "open_clip_config.json and .*, or config.json and ")
    for save, name in ((clip.save_hf, "config.json"),
                       (clip.save_open_clip, "open_clip_config.json")):
        folder = tmp_path / name
        save(build("like OpenAI's"), folder)
        for damaged in ("{", "[]", "[" * 100_000, '{"model_type": "clip", "text_config": "x"}',
                        '{"model_cfg": {"vision_cfg": [], "text_cfg": {}}}', "\xff"):
            (folder / name).write_text(damaged, encoding="latin-1")
            refused(folder, f"{name} or a file that goes with it is damaged")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_are_not_opened(tmp_path):
    """Opening one waits for somebody who writes to it."""
    folder, pipe = tmp_path / "hf", tmp_path / "x.pt"
    clip.save_hf(build("like OpenAI's"), folder)
    os.mkfifo(pipe)
    refused(pipe, "not a regular file")
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        (folder / name).rename(tmp_path / name)
        os.mkfifo(folder / name)
        refused(folder, "not a regular file")
        (tmp_path / name).replace(folder / name)


# ---------------------------------------------------------------- the activation


def test_activation_of_weights_alone(tmp_path):
    model, path, said = build("like LAION's"), tmp_path / "x.pt", []
    torch.save(model.state_dict(), path)
    wrong, _ = clip.load(path, device="cpu", log=said.append)
    assert wrong.config["activation"] == "quick_gelu"
    assert len(said) == 1 and str(path) in said[0] and "quick_gelu is assumed" in said[0]
    right, _ = clip.load(path, device="cpu", activation="gelu", log=said.append)
    assert_same_features(right, model)
    assert clip.architecture(path, "gelu") == model.config and len(said) == 1
    with pytest.raises(AssertionError, match="not close"):
        assert_same_features(wrong, model)
    torch.save({"state_dict": model.state_dict(), "config": model.config}, path)
    assert clip.load(path, device="cpu", log=said.append)[0].config == model.config
    with pytest.raises(clip.CheckpointError, match="activation is gelu, not quick_gelu"):
        clip.load(path, device="cpu", activation="quick_gelu")
    assert len(said) == 1


@pytest.mark.parametrize("width, heads", [(1280, 16), (1408, 16), (1664, 16), (1024, 16)])
def test_heads_of_weights_alone(width, heads):
    """Those of ViT-H/14, ViT-g/14, ViT-bigG/14 and ViT-L/14."""
    size = SMALL | {"vision_width": width, "vision_layers": 1}
    with torch.device("meta"):
        weights = clip.CLIP(**size).state_dict()
    assert clip.infer_config(weights, {})["vision_heads"] == heads
    weights = clip.CLIP(**SMALL | {"transformer_width": 100, "transformer_heads": 5}).state_dict()
    with pytest.raises(ValueError, match="transformer_heads None"):
        clip.infer_config(weights, {})


def test_usual_values_are_openais():
    for config in CONFIGS.values():
        assert config["activation"] == "quick_gelu" and config["image_resize"] == "shortest"
        assert (config["image_mean"], config["image_std"]) == (MEAN, STD)


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
    torch.manual_seed(3)
    model = clip.load("tiny", "cpu")[0]
    torch.save(wrap(model.state_dict()), tmp_path / "c.pt")
    found, _ = clip.load(tmp_path / "c.pt", "cpu", log=lambda _: None)
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


SCALE = "logit_scale"


def test_what_is_found_instead_of_a_model_is_named(tmp_path):
    weights = clip.load("tiny", "cpu")[0].state_dict()
    for content, said in (({"epoch": 1, "args": {"a": 1}}, "holds no state dict, but epoch, args"),
                          ({"conv.weight": weights[SCALE]}, "first names in it are conv.weight"),
                          ({"a.logit_scale": weights[SCALE], "b.logit_scale": weights[SCALE]},
                           "several models, below a., b.")):
        torch.save(content, tmp_path / "c.pt")
        with pytest.raises(clip.CheckpointError, match=said):
            clip.load(tmp_path / "c.pt", "cpu")


def test_weights_in_several_files(tmp_path):
    from safetensors.torch import load_file, save_file
    model = clip.load("tiny", "cpu")[0]
    clip.save_hf(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    parts = {f"model-{i}.safetensors": dict(list(weights.items())[i::2]) for i in range(2)}
    for name, part in parts.items():
        save_file(part, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {k: n for n, part in parts.items() for k in part}}))
    found, _ = clip.load(tmp_path, "cpu")
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    index.write_text(json.dumps({"weight_map": {"a": "../model-0.safetensors"}}))
    with pytest.raises(clip.CheckpointError, match="outside its folder"):
        clip.load(tmp_path, "cpu")
