"""The whole way of a person with pairs of their own: a table in, the wrong rows found, their table
back without them, a model trained on the rest, in the formats of others."""

import csv
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import COLOURS, PLACES, TEMPLATES, draw
from PIL import Image

import clip
import export_hf
import find_noise
import interpolate
import main_CLIP
from clip.weights import CONFIGS
from dataset import prepare_pairs
from utils.reading.layout import read_lines

N, BROKEN = 300, {7: b"no image", 70: None, 200: b""}


def table(place):
    """A Parquet file of N drawings as bytes, a fifth of the captions exchanged, some rows broken,
    two more columns; its path and which rows are wrong."""
    rng = np.random.default_rng(0)
    images, captions = [], []
    for i in range(N):
        colour, side = list(COLOURS)[i % 6], PLACES[i // 6 % 4]
        draw(place / "x.png", colour, side, 60 + i % 90)
        images.append({"bytes": (place / "x.png").read_bytes(), "path": None})
        captions.append(TEMPLATES[i % 5].format(c=colour, p=side) + f", number {i}")
    chosen = rng.permutation(N)[: N // 5]
    right = list(captions)
    for i, j in zip(chosen, np.roll(chosen, 1), strict=True):
        captions[i] = right[j]
    for row, value in BROKEN.items():
        images[row] = None if value is None else {"bytes": value, "path": None}
    columns = {"picture": images, "text": captions, "sku": [f"A{i}" for i in range(N)],
               "price": np.arange(N) / 4}
    pq.write_table(pa.table(columns), place / "shop.parquet")
    return place / "shop.parquet", {int(i) for i in chosen}


def test_from_a_parquet_file_to_models_that_others_load(tmp_path, capsys):
    source, wrong = table(tmp_path)
    root, out = tmp_path / "mine", tmp_path / "noise"
    prepare_pairs.main(["--pairs", str(source), "--image_column", "picture", "--caption_column",
                        "text", "--root", str(root), "--dev", "40", "--test", "40"])
    split = root / "annotations" / "scan_split"
    with open(split / "unusable_rows.csv", newline="") as f:
        assert {int(row["row"]) for row in csv.DictReader(f)} == set(BROKEN)
    rows = [int(line.split()[0]) for part in ("train", "dev", "test")
            for line in read_lines(split / f"{part}_rows.txt")]

    # Judged by a GELU model, which has not learned anything: a person's labels decide
    torch.manual_seed(0)
    model = clip.CLIP(**CONFIGS["tiny"] | {"activation": "gelu"})
    torch.save(model.state_dict(), tmp_path / "gelu.pt")
    common = ["--dataset_root", str(root), "--device", "cpu", "--num_workers", "0"]
    initial = ["--vision_model", str(tmp_path / "gelu.pt"), "--activation", "gelu"]
    judge = [*common, *initial, "--out", str(out), "--judge_rounds", "0"]
    find_noise.main(judge)
    with open(out / "suspicious_pairs.csv", newline="", encoding="utf-8") as f:
        suspicious = list(csv.DictReader(f))
    assert [rows[int(line["pair"])] for line in suspicious] == [int(r["row"]) for r in suspicious]
    assert all(line["best_caption"] for line in suspicious)
    for line in suspicious:
        line["decision"] = "wrong" if int(line["row"]) in wrong else "right"
    with open(tmp_path / "decisions.csv", "w", newline="", encoding="utf-8") as f:
        labels = csv.DictWriter(f, suspicious[0])
        labels.writeheader()
        labels.writerows(suspicious)
    capsys.readouterr()
    find_noise.main([*judge, "--labels", str(tmp_path / "decisions.csv"), "--write_clean",
                     str(tmp_path / "cleaned")])
    share = np.mean([row in wrong for row in rows])
    said = capsys.readouterr().out
    assert "noise share" in said.lower() and 0.1 < share < 0.3

    # Their own table again, all columns, without the wrong rows
    cleaned = pq.read_table(tmp_path / "cleaned" / "cleaned.parquet")
    assert cleaned.schema == pq.read_schema(source)
    expected = sorted({row for row in rows if row not in wrong})
    assert cleaned["sku"].to_pylist() == [f"A{row}" for row in expected]
    picture = cleaned["picture"][0].as_py()["bytes"]
    assert Image.open(io.BytesIO(picture)).size == (40, 36)

    # A model trained on the rest, averaged with the initial one, for others to load
    clean = ["--dataset_root", str(tmp_path / "cleaned"), *common[2:]]
    main_CLIP.main([*clean, *initial, "--epochs", "1", "--batch_size", "32", "--lr", "1e-4",
                    "--warmup", "1", "--checkpoint_path", str(tmp_path), "--experiments", "run"])
    interpolate.main([*clean, "--resume", str(tmp_path / "run" / "best.pt"), "--initial",
                      str(tmp_path / "gelu.pt"), "--activation", "gelu"])
    path = tmp_path / "run" / "interpolated.pt"
    ours, _ = clip.load(path, device="cpu")
    assert ours.config["activation"] == "gelu"
    images, tokens = torch.randn(2, 3, 32, 32), clip.tokenize(["a red bar", "grey"])
    with torch.no_grad():
        own = [torch.nn.functional.normalize(x, dim=1) for x in
               (ours.encode_image(images), ours.encode_text(tokens))]
        transformers = pytest.importorskip("transformers")
        export_hf.main(["--resume", str(path), "--out", str(tmp_path / "hf")])
        theirs = transformers.CLIPModel.from_pretrained(tmp_path / "hf")(
            pixel_values=images, input_ids=tokens.long())
        for a, b in zip((theirs.image_embeds, theirs.text_embeds), own, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
