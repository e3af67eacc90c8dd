"""Figures of features that need no label, against their formulas."""

import math

import numpy as np
import pytest
import torch

from selfray.probes.labelfree import LabelFree

JUDGE = LabelFree()


def test_rankme_is_the_number_of_directions_that_are_used_alike():
    assert JUDGE.rankme(torch.eye(8)) == pytest.approx(8, rel=1e-6)
    assert JUDGE.rankme(torch.ones(20, 8)) == pytest.approx(1, rel=1e-3)
    values = torch.diag(torch.tensor([3.0, 1.0, 0.0, 0.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert JUDGE.rankme(values) == pytest.approx(math.exp(entropy), rel=1e-4)


def test_uniformity_is_its_formula_over_all_pairs():
    torch.manual_seed(0)
    features = torch.randn(12, 5) * 4
    unit = features / features.norm(dim=1, keepdim=True)
    pairs = [
        math.exp(-2 * float((unit[i] - unit[j]).square().sum()))
        for i in range(12)
        for j in range(i)
    ]
    assert JUDGE.uniformity(features) == pytest.approx(math.log(np.mean(pairs)), rel=1e-5)
    assert JUDGE.uniformity(torch.ones(12, 5)) == pytest.approx(0, abs=1e-6)


def test_alignment_is_the_mean_squared_distance_of_unit_vectors():
    torch.manual_seed(0)
    first, second = torch.randn(6, 4), torch.randn(6, 4)
    expected = np.mean(
        [
            2 - 2 * float(torch.cosine_similarity(a, b, dim=0))
            for a, b in zip(first, second, strict=True)
        ]
    )
    assert JUDGE.alignment(first, second) == pytest.approx(expected, rel=1e-5)
    assert JUDGE.alignment(first, 3 * first) == pytest.approx(0, abs=1e-6)


def test_crops_are_a_part_of_each_view_and_always_the_same():
    rng = np.random.default_rng(0)
    views = rng.integers(0, 256, (4, 3, 16, 16), dtype=np.uint8)
    crops = JUDGE.crops(views)
    assert crops.shape == views.shape
    assert np.array_equal(crops, JUDGE.crops(views))
    assert not np.array_equal(crops, views)
    flat = np.full((2, 3, 16, 16), 77, np.uint8)
    assert np.array_equal(JUDGE.crops(flat), flat)
