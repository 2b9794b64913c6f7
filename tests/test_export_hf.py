"""export_hf.py: what it writes, transformers and this project load alike."""

import pytest
import torch

import clip
import export_hf


def checkpoint(tmp_path, config="tiny"):
    torch.manual_seed(0)
    model = clip.CLIP(**clip.architecture("tiny")).eval()
    path = tmp_path / "epoch1.pt"
    torch.save({"epoch": 1, "name": "NPC", "state_dict": model.state_dict()}, path)
    return model, path


def test_exported_folder_loads_here(tmp_path, capsys):
    model, path = checkpoint(tmp_path)
    export_hf.main(["--resume", str(path), "--out", str(tmp_path / "hf")])
    assert "model.safetensors" in capsys.readouterr().out
    loaded, _ = clip.load(str(tmp_path / "hf"), device="cpu")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_exported_folder_loads_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, path = checkpoint(tmp_path)
    export_hf.main(["--resume", str(path), "--out", str(tmp_path / "hf")])
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    images, tokens = torch.randn(3, 3, 32, 32), clip.tokenize(["a cat", "two dogs", "x"])
    with torch.no_grad():
        expected, _ = model(images, tokens)
        got = theirs(pixel_values=images, input_ids=tokens.long(),
                     attention_mask=torch.ones_like(tokens).long())
    torch.testing.assert_close(got.logits_per_image, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("problem", ["resnet", "occupied", "absent"])
def test_bad_input_is_one_line(tmp_path, capsys, problem):
    _, path = checkpoint(tmp_path)
    out = tmp_path / "hf"
    if problem == "resnet":
        config = {**clip.architecture("tiny"), "vision_layers": (1, 1, 1, 1), "vision_width": 8,
                  "vision_patch_size": None}
        torch.save(clip.CLIP(**config).state_dict(), path)
    elif problem == "occupied":
        out.mkdir()
        (out / "mine.txt").write_text("x")
    else:
        path = tmp_path / "nothing.pt"
    with pytest.raises(SystemExit) as caught:
        export_hf.main(["--resume", str(path), "--out", str(out)])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (out / "model.safetensors").exists()
