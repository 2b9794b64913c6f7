"""search.py against the cosines of features that are computed one by one."""

import numpy as np
import pytest
import torch
from conftest import write_lines
from PIL import Image

import clip
import search


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A file with the weights of a small random model; and the model with its preprocessing."""
    torch.manual_seed(3)
    model, preprocess = clip.load("tiny", device="cpu")
    path = tmp_path_factory.mktemp("model") / "tiny.pt"
    torch.save(model.state_dict(), path)
    return path, model.eval(), preprocess


@pytest.fixture
def find(checkpoint, tmp_path, capsys):
    """Run search.py on a data set; returns [(cosine, file, caption)] and the figure."""

    def run(data, *more):
        search.main([*data.options, "--resume", str(checkpoint[0]), "--device", "cpu",
                     "--num_workers", "0", "--out", str(tmp_path / "found.png"), *map(str, more)])
        lines = capsys.readouterr().out.splitlines()
        found = [line.split(maxsplit=3) for line in lines if line[:3].strip().isdigit()]
        assert [int(line[0]) for line in found] == list(range(1, len(found) + 1))
        with Image.open(tmp_path / "found.png") as figure:
            assert figure.format == "PNG"
            pixels = np.asarray(figure.convert("RGB"))
        return [(float(score), file, caption) for _, score, file, caption in found], pixels

    return run


@torch.no_grad()
def cosines(checkpoint, files, captions):
    """(files, captions) cosines, each image and caption encoded by itself."""
    _, model, preprocess = checkpoint
    images = [model.encode_image(preprocess(Image.open(file))[None])[0] for file in files]
    texts = [model.encode_text(clip.tokenize([caption]))[0] for caption in captions]
    return np.array([[float(torch.cosine_similarity(image, text, dim=0)) for text in texts]
                     for image in images])


def place(pixels, colour):
    """(row, column) of the picture of one colour in the figure, 0 to 1 from its top left corner."""
    same = (np.abs(pixels.astype(int) - colour) <= 2).all(axis=2)
    assert same.sum() > 1000
    return np.argwhere(same).mean(axis=0) / same.shape


def test_images_for_a_text(dataset, find, checkpoint):
    data = dataset()
    files = list(dict.fromkeys(data.name(i) for i in data.ids["test"]))
    paths = [data.root / "images" / file for file in files]
    for k, path in enumerate(paths):  # each a colour of its own
        Image.new("RGB", (60, 40), (40 * k, 90, 250 - 40 * k)).save(path, "PNG")
    found, pixels = find(data, "a red bar, café", "--top", 4)
    expected = cosines(checkpoint, paths, ["a red bar, café"])[:, 0]
    order = np.argsort(-expected)[:4]
    assert [file for _, file, _ in found] == [files[k] for k in order]
    assert [score for score, _, _ in found] == pytest.approx(expected[order], abs=1e-4)
    for n, k in enumerate(order):
        row, column = place(pixels, [40 * k, 90, 250 - 40 * k])
        assert int(5 * column) == n and row > 0.5  # one row, below the words
        assert found[n][2] in data.lines("test_caps.txt")[5 * k : 5 * k + 5]


def test_captions_for_an_image(dataset, find, checkpoint, tmp_path):
    data = dataset()
    captions = [f"caption number {k} of the split" for k in range(30)]
    write_lines(data.split_folder / "test_caps.txt", captions)
    Image.new("CMYK", (70, 50), (0, 255, 255, 0)).save(tmp_path / "my photo.jpg")
    found, pixels = find(data, tmp_path / "my photo.jpg", "--top", 7)
    expected = cosines(checkpoint, [tmp_path / "my photo.jpg"], captions)[0]
    order = np.argsort(-expected)[:7]
    assert [caption for *_, caption in found] == [captions[k] for k in order]
    assert [score for score, *_ in found] == pytest.approx(expected[order], abs=1e-4)
    assert [file for _, file, _ in found] == [data.name(data.ids["test"][k // 5]) for k in order]
    assert (place(pixels, [255, 0, 0]) < [0.5, 0.2]).all()  # the query comes first
    second_row = pixels[pixels.shape[0] // 2 :]
    assert second_row[:, :600].min() < 250 and second_row[:, 660:].min() == 255  # 8 pictures


def test_splits_and_fewer_than_top(dataset, find):
    """Pairs of one's own, which image_name.txt tells, are searched in all splits."""
    data = dataset()
    assert len(find(data, "a dog", "--split", "dev", "--top", 100)[0]) == 4
    found, _ = find(data, "a dog", "--split", "train", "--noise_ratio", 0.4, "--top", 100)
    assert {file for _, file, _ in found} == {data.name(i) for i in data.ids["train"]}
    assert {c for *_, c in found} <= set(data.lines("0.4_noise_train_caps.txt"))
    expected, _ = find(data, "a dog")
    data.options = data.options[2:]  # without --dataset
    assert find(data, "a dog", "--split", "test")[0] == expected
    found, _ = find(data, "a dog", "--top", 100)
    assert {file for _, file, _ in found} == {
        data.name(i) for ids in data.ids.values() for i in ids}


@pytest.mark.parametrize("query, said", [
    ("", "empty"), (" \t", "empty"), ("no/such/photo.JPG", "there is none"),
    ("broken.png", "broken.png is not an image"),
])
def test_errors(dataset, find, capsys, tmp_path, monkeypatch, query, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(SystemExit) as stop:
        find(dataset(), query)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1
    assert not (tmp_path / "found.png").exists()


def test_a_text_of_any_length_or_script_has_a_picture_of_its_own(dataset, checkpoint, tmp_path,
                                                                capsys, monkeypatch):
    data = dataset()
    monkeypatch.chdir(tmp_path)
    argv = [*data.options, "--resume", str(checkpoint[0]), "--device", "cpu", "--num_workers", "0"]
    for number, query in enumerate(("a dog " * 200, "二匹の犬 🐕", "100 $ for a dog_$x^2$"), 1):
        search.main([*argv, query])
        assert f"wrote logs/search/{number}.png" in capsys.readouterr().out
    assert len(list((tmp_path / "logs/search").iterdir())) == 3
