"""Weights in files: every format gives the same model; damaged and hostile files are refused."""

import hashlib
import os
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch
from test_clip_formats import batch, build, configured, refused

import clip
from clip import weights
from clip.formats import state_dict_of

MODELS = ("like OpenAI's", "ResNet")


def assert_same(model, state_dict):
    own = model.state_dict()
    assert own.keys() == state_dict.keys()
    for key, value in own.items():
        assert torch.equal(value, state_dict[key].to(value.dtype)), key


def read_state_dict(path):
    return state_dict_of(clip.read_checkpoint(path), path)


def rezip(source, target, change, compression=zipfile.ZIP_STORED):
    """Write the zip file `target`: the entries of `source`, changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)))


# ---------------------------------------------------------------- names and downloads


def test_names(tmp_path):
    assert clip.available_models() == [
        *("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"),
        *("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"),
    ]
    assert all(len(digest) == 64 for digest in weights.SHA256.values())
    assert clip.describe(weights.CONFIGS["RN50"]) == "RN50"
    assert "vision_layers (1, 2, 1, 1)" in clip.describe(configured("ResNet"))
    refused("ViT-B/33", "no such file.*ViT-B/32.*hf-hub:ORG/NAME")
    refused(tmp_path / "model.pt", "no such file")
    model, preprocess = clip.load("tiny", device="cpu")
    assert preprocess.resolution == model.visual.input_resolution == 32
    assert model.vocab_size == 49408 and model.context_length == 77
    assert not model.training and model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) < 4e6


@pytest.fixture
def published(tmp_path, monkeypatch):
    """ViT-B/32 is a small file that "the network" (a folder) has; returns (folders, that file)."""
    folders = {name: tmp_path / name for name in ("repository", "cache", "network")}
    folders["network"].mkdir()
    file = folders["network"] / "ViT-B-32.pt"
    torch.save(build().state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(weights.SHA256, "ViT-B/32", digest)
    monkeypatch.setitem(weights.CONFIGS, "ViT-B/32", build().config)
    monkeypatch.setattr(weights, "URL", folders["network"].as_uri() + "/{file}")
    monkeypatch.setattr(weights, "PRETRAINED", folders["repository"])
    monkeypatch.setattr(weights, "CACHE", folders["cache"])
    return folders, file


@pytest.mark.parametrize("found", ["nowhere", "in the repository", "damaged"])
def test_download(published, found, capsys):
    """Unless the file is there. The second time it is taken from the disk."""
    (folders, file), said = published, []
    folder = folders["repository" if found == "in the repository" else "cache"]
    folder.mkdir()
    if found == "in the repository":
        file.rename(folder / file.name)
    elif found == "damaged":
        (folder / file.name).write_bytes(file.read_bytes()[:-1])
    for _ in range(2):
        model, _ = clip.load("ViT-B/32", device="cpu", log=said.append)
        assert_same(model, build().state_dict())
        assert os.listdir(folder) == ["ViT-B-32.pt"] and not said
        file.unlink(missing_ok=True)
    assert ("SHA-256" in capsys.readouterr().out) == (found == "damaged")


@pytest.mark.parametrize("content, match", [(b"x", "invalid hash"), (None, "put that file at")])
def test_download_that_fails(published, content, match):
    """Another file, and no network."""
    folders, file = published
    file.write_bytes(content) if content else file.unlink()
    with pytest.raises(clip.CheckpointError, match=match) as caught:
        clip.load("ViT-B/32", device="cpu")
    assert str(folders["cache"] / "ViT-B-32.pt") in str(caught.value)
    assert "\n" not in str(caught.value) and os.listdir(folders["cache"]) == []


# ---------------------------------------------------------------- files of torch


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_and_training_checkpoint(name, tmp_path):
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=np.float64(1e-4))
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    expected = model.state_dict()
    content = {"state_dict": {"module." + key: value for key, value in expected.items()},
               "epoch": 3, "name": "run", "best": np.float32(41.5), "step": np.int64(7),
               "optimizer": optimizer.state_dict()}
    torch.save(expected, tmp_path / "plain.pt")
    torch.save(content, tmp_path / "training.pt")
    torch.save(content, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    allowed, state = {*torch.serialization.get_safe_globals()}, torch.get_rng_state()
    for file in ("plain", "training", "legacy"):
        loaded, preprocess = clip.load(str(tmp_path / f"{file}.pt"), device="cpu")
        assert_same(loaded, expected)
        assert loaded.dtype == torch.float32 and not loaded.training
        assert loaded.config == configured(name) | {"activation": "quick_gelu"}
        assert all(parameter.requires_grad for parameter in loaded.parameters())
        assert preprocess.resolution == loaded.config["image_resolution"]
    assert torch.equal(torch.get_rng_state(), state)  # loading draws no random numbers
    assert {*torch.serialization.get_safe_globals()} == allowed
    whole = clip.read_checkpoint(tmp_path / "training.pt")
    assert whole.keys() == content.keys()
    assert (whole["epoch"], whole["best"], whole["step"]) == (3, 41.5, 7)
    assert isinstance(whole["best"], np.float32)
    assert whole["optimizer"]["param_groups"][0]["lr"] == 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_real_type(dtype, tmp_path):
    good = {k: v.to(dtype) for k, v in build().state_dict().items()}
    torch.save(good, tmp_path / "x.pt")
    assert read_state_dict(tmp_path / "x.pt")["ln_final.bias"].dtype == dtype
    assert_same(clip.load(tmp_path / "x.pt", "cpu")[0], good)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_scalars_of_either_numpy(module, tmp_path):
    """The same file as numpy 1 and numpy 2 would write it."""
    model, own = build(), np.float64(0).__reduce__()[0].__module__
    torch.save({"state_dict": model.state_dict(), "lr": np.float64(0.25)}, tmp_path / "a.pt")
    rezip(tmp_path / "a.pt", tmp_path / "b.pt",
          lambda data: data.replace(f"c{own}\n".encode(), f"c{module}\n".encode()))
    assert f"c{module}\n".encode() in (tmp_path / "b.pt").read_bytes()
    assert clip.read_checkpoint(tmp_path / "b.pt")["lr"] == 0.25
    assert_same(model, read_state_dict(tmp_path / "b.pt"))


def test_damaged_files(tmp_path):
    good = tmp_path / "good.pt"
    torch.save(build().state_dict(), good)
    for name, data, match in (
        ("empty.pt", b"", "it is empty"),
        ("text.pt", b"version https://git-lfs.github.com\n", "it begins with b'version https"),
        ("html.pt", b"<!DOCTYPE html><html></html>", "it begins with b'<!DOCTYPE html>"),
        ("cut.pt", good.read_bytes()[:5000], "it begins with b'PK"),
        ("tail.pt", good.read_bytes()[5000:], "Unsupported operand"),
        ("pickle.pt", pickle.dumps({"a": 1}, protocol=4), "Unsupported operand"),
        ("cut.safetensors", b"\x10\x00", ".*header too small"),
    ):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, rf"damaged or no checkpoint \({match}")


def test_archive_that_unpacks_to_far_more(tmp_path):
    torch.save(build().state_dict(), tmp_path / "good.pt")
    rezip(tmp_path / "good.pt", tmp_path / "bomb.pt", lambda data: data + bytes(2**22),
          zipfile.ZIP_DEFLATED)
    refused(tmp_path / "bomb.pt", "unpacks to far more")


GOOD = build().state_dict()
NONE, ODD = "no CLIP model", "not an ordinary tensor"
BAD = {  # content of a file: the reason of its refusal
    "a tensor": (torch.zeros(3), "holds a Tensor"),
    "a list": ([GOOD], "holds a list"),
    "nothing": ({}, f"{NONE} .*, but nothing"),
    "no state dict": ({"epoch": 3, "args": {"a": 1}}, f"{NONE} .*, but epoch, args"),
    "empty": ({"state_dict": {}}, NONE),
    "numbers": ({"state_dict": [1, 2]}, NONE),
    "of something else": ({"conv.weight": torch.zeros(3, 3)}, f"{NONE} .*, but conv.weight"),
    "of transformers": ({"text_model.encoder.layers.0.self_attn.q_proj.bias": torch.zeros(3),
                         "logit_scale": torch.zeros(())}, "not CLIP as transformers saves it"),
    "two models": ({f"{x}.logit_scale": torch.zeros(()) for x in "ab"}, "models, below a., b."),
    "too little": ({k: v for k, v in GOOD.items() if "ln_final" not in k}, "Missing.*ln_final.bi"),
    "a block too many": (GOOD | {"transformer.resblocks.99.ln_1.bias": torch.zeros(64)}, "not fit"),
    "numbered": (dict(enumerate(GOOD.values())), f"{NONE} .*, but 0, 1"),
    "integers": ({k: (100 * v).long() for k, v in GOOD.items()}, ODD),
    "complex": ({k: v.to(torch.complex64) for k, v in GOOD.items()}, ODD),
    "a string": (GOOD | {"visual.proj": "x"}, "not the weights of a CLIP model"),
    "one number": (GOOD | {"visual.proj": torch.tensor(1.0)}, "does not fit"),
    "three dimensions": (GOOD | {"text_projection": torch.zeros(2, 2, 2)}, "does not fit"),
    "no numbers": (GOOD | {"visual.conv1.weight": torch.zeros(0, 3, 0, 0)}, ODD),
    "sparse": (GOOD | {"visual.proj": GOOD["visual.proj"].to_sparse()}, ODD),
    "on no device": (GOOD | {"visual.proj": torch.zeros(64, 16, device="meta")}, ODD),
    # 1.6 TB, of which the file has one row; and 5 MB, but attention of this width has 4.9 TB
    "a view": (GOOD | {"token_embedding.weight": torch.zeros(1, 64).expand(64 * 10**8, 64)}, ODD),
    "wide": (GOOD | {"token_embedding.weight": torch.zeros(2, 64 * 10**4)}, "size mismatch"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.filterwarnings("ignore")
def test_files_that_hold_something_else(what, tmp_path):
    content, match = BAD[what]
    torch.save(content, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", match)


# ---------------------------------------------------------------- hostile files


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickled_code_is_refused(tmp_path):
    mark = tmp_path / "mark"
    torch.save({"state_dict": GOOD, "x": Hostile(mark)}, tmp_path / "zip.pt")
    torch.save({"x": Hostile(mark)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile(mark), protocol=2))
    for name in ("zip.pt", "old.pt", "plain.pt"):
        refused(tmp_path / name, "refused: it would run code.*system")
    assert not mark.exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert mark.exists()  # the file is hostile indeed


def false_torchscript(path, pickled):
    """Write what looks like a TorchScript archive."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/version", "3")


@pytest.mark.parametrize("name", [b"os\nsystem", b"builtins\neval", b"torch\nload"])
def test_torchscript_archive_with_other_names_is_refused(name, tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "x.pt"
    false_torchscript(path, pickle.dumps(Hostile(mark), 2).replace(b"posix\nsystem", name))
    refused(path, f"refused: it would run code.*{name.split()[1].decode()}")
    assert not mark.exists()
    false_torchscript(path, pickle.dumps([1, 2, 3], 2))
    refused(path, "holds a list")


# ---------------------------------------------------------------- TorchScript


def torchscript(model, path):
    """Save `model` as OpenAI does: traced, with numbers among the buffers; and, in each text block,
    a mask that is not part of the state dict, as other CLIP code has it."""
    for name in ("context_length", "vocab_size"):
        delattr(model, name)
    for name in ("context_length", "vocab_size", "image_resolution"):
        key = name.replace("image", "input")
        model.register_buffer(key, torch.tensor(model.config[name]))
    for block in model.transformer.resblocks:
        block.register_buffer("attn_mask", torch.zeros(12, 12), persistent=False)
    model.forward = model.visual.forward
    images = batch(model.config)[0].to(model.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and so are the files
        torch.jit.save(torch.jit.trace(model, images, check_trace=False), path)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("half", [False, True])
def test_torchscript_archive(name, half, tmp_path, monkeypatch):
    model, path = build(name), tmp_path / "x.pt"
    if half:
        clip.convert_weights_to_fp16(model)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    torchscript(model, path)
    names = set(clip.read_checkpoint(path))
    assert {"input_resolution", "transformer.resblocks.0.attn_mask"} <= names
    monkeypatch.setattr(torch.jit, "load", None)  # these two would compile the archive's code
    monkeypatch.setattr(torch._C, "import_ir_module", None)
    read = read_state_dict(path)
    assert read.keys() == expected.keys()
    for key, value in read.items():
        assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key
    loaded, _ = clip.load(path, device="cpu")
    assert loaded.config == configured(name) | {"activation": "quick_gelu"}
    assert loaded.dtype == torch.float32
    assert_same(loaded, {key: value.float() for key, value in expected.items()})


def test_cut_torchscript_archive(tmp_path):
    path = tmp_path / "x.pt"
    torchscript(build(), path)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])
    refused(path, "damaged")
    data[len(data) // 2] ^= 1  # a flipped bit, in a tensor
    path.write_bytes(data)
    refused(path, "damaged")
