"""Models by their hub names, from a server on 127.0.0.1 that speaks the hub's protocol."""

import hashlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from processes import BANK, CLIP, NPC, SMALL, VIT, Started
from test_clip_formats import save_open_clip, save_transformers

import clip
import interpolate
from clip.model import complete_config

pytest.importorskip("huggingface_hub")
CONFIG = complete_config(**SMALL | VIT | {"vocab_size": 49408, "image_mean": (0.5, 0.4, 0.3)})
COMMIT = "0123456789abcdef" * 2 + "01234567"


class Hub(BaseHTTPRequestHandler):
    """The two kinds of request that downloads make: a model's files, and one of them."""

    def do_GET(self):
        _, *parts = self.path.split("?")[0].split("/")
        if parts[:2] == ["api", "models"]:
            folder = self.server.root / "/".join(parts[2:4])
            names = sorted(os.listdir(folder)) if folder.is_dir() else []
            answer = {"id": "/".join(parts[2:4]), "sha": COMMIT,
                      "siblings": [{"rfilename": name} for name in names]}
            self.answer(json.dumps(answer).encode() if names else None, "RepoNotFound")
        else:
            file = self.server.root / "/".join((*parts[:2], parts[-1]))
            if self.command == "GET" and file.exists():
                self.server.sent.append(parts[-1])
            self.answer(file.read_bytes() if file.exists() else None, "EntryNotFound")

    do_HEAD = do_GET

    def answer(self, content, error):
        self.send_response(404 if content is None else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content or b"")))
        if content is None:
            self.send_header("X-Error-Code", error)
        else:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if content and self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        """Print nothing."""


@pytest.fixture
def hub(tmp_path):
    """A running server: `root` has a folder ORG/NAME for each model, `sent` lists what it sent."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.sent = tmp_path / "hub", []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def in_transformers(folder):
    """Save a model with transformers, and files that are not needed. Returns its state dict."""
    save_transformers(CONFIG, folder)
    for name in ("README.md", "tf_model.h5", "pytorch_model.bin"):
        (folder / name).write_text("not needed")
    return clip.load(folder, "cpu")[0].state_dict()


def command(function, argv, tmp_path, server, status=0, hook=None, **environment):
    """Run a command whose hub is `server`, to its end. Returns what it said."""
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                   "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", **environment}
    started = Started(function, argv, tmp_path / "out", environment, hook)
    assert started.wait() == status, started.text()
    said = started.text()
    (tmp_path / "out").unlink()
    return said


@pytest.fixture
def options(dataset, tmp_path):
    return [*dataset("cc").options, "--context_length", "12", "--num_workers", "0", "--device",
            "cpu", "--batch_size", "12"]


def test_training_and_interpolation_by_name(hub, options, tmp_path):
    """Downloads the files that are read, once; without a network the cache has them."""
    weights = in_transformers(hub.root / "org" / "clip-vit")
    train = [*options, "--epochs", "1", "--lr", "1e-3", "--checkpoint_path", str(tmp_path)]
    said = command(CLIP, [*train, "--vision_model", "org/clip-vit"], tmp_path, hub)
    assert "is assumed" not in said
    assert sorted(hub.sent) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    trained = clip.read_checkpoint(tmp_path / "ex0" / "epoch1.pt")
    assert trained["config"] == CONFIG

    path = str(tmp_path / "ex0" / "epoch1.pt")
    command(interpolate.main, [*options[:-2], "--resume", path, "--initial", "hf-hub:org/clip-vit",
                               "--out", str(tmp_path / "x.pt")],
            tmp_path, hub, HF_HUB_OFFLINE="1")
    assert len(hub.sent) == 3
    found = clip.read_checkpoint(tmp_path / "x.pt")
    alpha, name = found["alpha"], "ln_final.weight"
    expected = weights[name].lerp(trained["state_dict"][name], alpha)
    torch.testing.assert_close(found["state_dict"][name], expected)


def test_a_judge_and_an_architecture_by_name(hub, options, tmp_path):
    """open_clip's files, which are pickles here."""
    save_open_clip(CONFIG, hub.root / "laion" / "CLIP.small")
    judge = ["--vision_model", "tiny", "--judge", "hf-hub:laion/CLIP.small"]
    command(BANK, [*options, *judge], tmp_path, hub)
    assert sorted(hub.sent) == ["open_clip_config.json", "open_clip_pytorch_model.bin"]
    said = command(describe, ["laion/CLIP.small"], tmp_path, hub)
    assert clip.describe(CONFIG) in said and len(hub.sent) == 2


def describe(argv):
    print(clip.describe(clip.architecture(*argv)))


def without_the_package():
    """Hook: huggingface_hub cannot be imported."""
    sys.modules["huggingface_hub"] = None


NOT_HAD = "no such file or folder, and it cannot be downloaded from http://127.0.0.1"


@pytest.mark.parametrize("name, files, environment, words", [
    ("org/none", None, {}, f"org/none: {NOT_HAD}"),
    ("org/no..ne", None, {}, f"org/no..ne: {NOT_HAD}"),
    ("org/none", None, {"HF_HUB_OFFLINE": "1"}, f"org/none: {NOT_HAD}"),
    ("org/none", None, {"HF_ENDPOINT": "http://127.0.0.1:9"}, f"org/none: {NOT_HAD}"),  # is closed
    ("org/none", None, None, "pip install huggingface_hub"),
    ("org/none", ["README.md"], {}, "org/none holds no model: needed are"),
    ("org/none", ["config.json", "pytorch_model.bin"], {},
     "pytorch_model.bin was refused: it would run code on loading"),
    ("here/none", None, {}, "here/none: no such file, nor a model of that name")])
def test_what_cannot_be_had_is_one_line(hub, options, tmp_path, name, files, environment, words,
                                        monkeypatch):
    (tmp_path / "here").mkdir()  # a local folder, so that the name is a path
    monkeypatch.chdir(tmp_path)
    if files:
        in_transformers(tmp_path / "all")
        torch.save({"x": print}, tmp_path / "all" / "pytorch_model.bin")
        (hub.root / "org" / "none").mkdir(parents=True)
        for file in files:
            (tmp_path / "all" / file).rename(hub.root / "org" / "none" / file)
    said = command(NPC, [*options, "--vision_model", name, "--checkpoint_path", str(tmp_path)],
                   tmp_path, hub, 2, without_the_package if environment is None else None,
                   **environment or {})
    assert said.splitlines()[-1].startswith(f"error: {words}" if name in words else "error: ")
    assert words in said.splitlines()[-1] and "Traceback" not in said
