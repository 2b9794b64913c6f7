"""Defaults that depend on how many pairs there are, on the precision or the script."""

import pytest
from conftest import make_dataset, write_lines

from dataset.prepare_pairs import draw_split
from params import parse_args


@pytest.mark.parametrize("pairs, size", [(60, 8), (720, 45), (4095, 255), (30_000, 256)])
def test_an_epoch_has_sixteen_steps(tmp_path, pairs, size):
    data = make_dataset(tmp_path / "data", "cc")
    write_lines(data.split_folder / "train_caps.txt", ["a"] * pairs)
    for command in ("npc", "clip", "memorybank", "find_noise"):
        assert parse_args(command, data.options).batch_size == size
    assert parse_args("npc", [*data.options, "--batch_size", "31"]).batch_size == 31
    (data.split_folder / "train_caps.txt").unlink()
    assert parse_args("npc", data.options).batch_size == 256


@pytest.mark.parametrize("command, precision, lr", [
    ("npc", "fp32", 1e-5), ("clip", "amp_bf16", 1e-5), ("npc", "fp16", 2e-7),
    ("clip", "fp16", 5e-7)])
def test_half_weights_take_the_authors_rates(command, precision, lr):
    assert parse_args(command, ["--precision", precision, "--device", "cpu"]).lr == lr


@pytest.mark.parametrize("images, held_out", [(10, 1), (240, 24), (30_000, 3000), (500_000, 5000)])
def test_a_tenth_of_the_images_is_held_out_up_to_mscoco_s_number(images, held_out):
    assert {split: len(own) for split, own in draw_split(images, None, None, 0).items()} == {
        "dev": held_out, "test": held_out, "train": images - 2 * held_out}
