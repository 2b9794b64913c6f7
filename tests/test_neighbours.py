"""Lazy features and the search for the nearest ones: against brute force, and what they hold."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from utils.method import features
from utils.method.features import Features, nearest, normalised, random_rows


@pytest.fixture(params=[(4096, 4096), (7, 5), (1, 1), (4, 64)])
def blocks(request, monkeypatch):
    queries, keys = request.param
    monkeypatch.setattr(features, "QUERIES", queries)
    monkeypatch.setattr(features, "KEYS", keys)


# ---- the search ----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_nearest_are_those_of_a_full_sort_the_lowest_row_of_equals(blocks, k, itself, seed):
    rng = np.random.default_rng(seed)
    keys = torch.from_numpy(rng.integers(-1, 2, (33, 3))).double()  # exact scores, many ties
    queries = keys if itself else torch.from_numpy(rng.integers(-1, 2, (20, 3))).double()
    without = torch.arange(33) if itself else None
    similarity, found = nearest(queries, keys, k, without)
    scores = queries @ keys.T
    if itself:
        scores.fill_diagonal_(-torch.inf)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found, expected.indices[:, :k])
    assert torch.equal(similarity, expected.values[:, :k])


def test_a_query_misses_only_the_key_that_it_must_not_find(blocks):
    features = torch.eye(6)[[0, 0, 0, 1, 1, 2]]
    found = nearest(features, features, 2, torch.tensor([0, -1, 1, 4, -1, 5]))[1]
    assert found.tolist() == [[1, 2], [0, 1], [0, 2], [3, 0], [3, 4], [0, 1]]


def test_fewer_keys_than_wanted(blocks):
    keys = torch.eye(3)
    assert nearest(keys, keys, 10)[1].shape == (3, 3)
    assert nearest(keys, keys, 10, torch.arange(3))[1].tolist() == [[1, 2], [0, 2], [0, 1]]
    assert nearest(keys[:0], keys)[1].shape == (0, 1)


def test_random_rows():
    some = random_rows(1000, 50, 3)
    assert len(np.unique(some)) == 50 and (np.diff(some) > 0).all() and some[0] < 100 < some[-1]
    assert np.array_equal(some, random_rows(1000, 50, 3))
    assert not np.array_equal(some, random_rows(1000, 50, 4))
    for most in (None, 20, 21):
        assert random_rows(20, most, 3).tolist() == list(range(20))


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_those_of_the_whole(dtype):
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    values = features if dtype == torch.float64 else features.float()
    centre, chosen = values.mean(dim=0), torch.tensor([3, 3, 29, 0])
    whole = F.normalize(F.normalize(values, dim=1) - centre, dim=1)
    rows = Features(normalised(features), centre=centre, normalise=True)
    some = Features(rows, chosen=chosen)
    assert rows.dtype == some.dtype == values.dtype
    assert rows.shape == (30, 5) and some.shape == (4, 5) and len(some) == 4
    for index in (slice(4, 9), slice(None), chosen):
        assert torch.equal(rows[index], whole[index])
    assert torch.equal(some[1:3], whole[[3, 29]])
    assert torch.equal(some[torch.tensor([2])], whole[[29]])
