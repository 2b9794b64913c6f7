"""Measures of weights against known noise, and what TensorBoard is given of them."""

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from utils.method.pairs import Pairs
from utils.scoring.diagnostics import noise_measures, pictures, show_weights


def make_pairs(wrong):
    images = [torch.full((3, 8, 8), 8 * k, dtype=torch.uint8) for k in range(len(wrong))]
    index = np.arange(len(wrong))
    return Pairs(images, list(index), index, [f"caption ${i}$" for i in index], index, None, None,
                 wrong)


def test_measures_count_pairs_in_the_wrong_order():
    wrong = np.array([True, False, True, False, False])
    suspicion = np.array([5.0, 4.0, 3.0, 2.0, 1.0])  # 5 of 6 (wrong, right) pairs are in order
    measures = noise_measures(suspicion, wrong)
    assert measures["auc"] == pytest.approx(5 / 6)
    assert measures["average_precision"] == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert measures["mean_noise_rank"] == pytest.approx((5 + 3) / 2)
    assert measures["optimum"] == pytest.approx((5 + 4) / 2)
    assert measures["chance"] == 3


def test_equal_suspicion_is_chance():
    measures = noise_measures(np.zeros(6), np.arange(6) < 2)
    assert measures["auc"] == 0.5
    assert measures["mean_noise_rank"] == measures["chance"] == 3.5


@pytest.mark.parametrize("wrong", [np.zeros(3, bool), np.ones(3, bool)])
def test_one_kind_of_pairs_has_no_measure(wrong):
    assert noise_measures(np.arange(3.0), wrong) is None


def test_tensorboard_gets_histograms_auc_and_the_lowest_pairs(tmp_path):
    wrong = np.arange(30) % 3 == 0
    w = np.where(wrong, 0.2, 0.9) + np.arange(30) / 1000
    w[5] = np.nan  # a pair that was not drawn
    writer = SummaryWriter(tmp_path)
    show_weights(writer, 1, w, make_pairs(wrong))
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    assert set(tags["histograms"]) == {"w/all", "w/truly_clean", "w/truly_noisy"}
    assert tags["images"] == ["w/lowest"]
    assert events.Scalars("noise/auc_of_w")[0].value == 1
    assert events.Histograms("w/all")[0].histogram_value.num == 29
    assert events.Histograms("w/truly_noisy")[0].histogram_value.num == 10


def test_pictures_stand_in_rows_and_marked_words_are_red():
    images = [torch.full((3, 8, 8), 8 * k, dtype=torch.uint8) for k in range(6)]
    figure = pictures(images, [f"$x^{k}$" for k in range(6)], np.arange(6) == 1)
    for k, axis in enumerate(figure.axes):
        assert (axis.images[0].get_array() == 8 * k).all()
        assert axis.get_title() == f"$x^{k}$" and not axis.title.get_parse_math()
        assert axis.title.get_color() == ("firebrick" if k == 1 else "black")
        spec = axis.get_subplotspec()
        assert (spec.rowspan.start, spec.colspan.start) == divmod(k, 5)
