import json
import math
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from helpers import RESNET, VIT
from selfray.health import effective_rank, feature_health
from selfray.metrics import PROBES, Metric
from selfray.models.encoder import Encoder, Features, encode_uint8
from selfray.probes.features import LabelledFeatures, ProbeResult, embed, pixels, probe
from selfray.probes.knn import KNN, nearest
from selfray.probes.labelfree import LabelFree
from selfray.probes.linear import Linear
from selfray.probes.protocol import Protocol

FAST = Linear(steps=150, batch_size=32)


def clusters(count: int, seed: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three clouds in 6 dimensions, around the first three axes; labels at random."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    noise = torch.randn(count, 6, generator=generator) * spread
    return torch.eye(6)[labels] * 4 + noise, labels


# kNN


def slow_knn(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, k: int, temperature: float
) -> list[int]:
    predicted = []
    for x in test:
        similarities = [
            float(x @ t) / (math.sqrt(float(x @ x)) * math.sqrt(float(t @ t))) for t in train
        ]
        near = sorted(range(len(train)), key=lambda i: -similarities[i])[:k]
        votes = dict.fromkeys(range(labels.max() + 1), 0.0)
        for i in near:
            votes[int(labels[i])] += math.exp(similarities[i] / temperature)
        predicted.append(max(votes, key=lambda c: votes[c]))
    return predicted


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0)])
def test_knn_is_its_formula(k, temperature):
    (train, labels), (test, wanted) = clusters(60, 0, 4.0), clusters(40, 1, 4.0)
    knn = KNN(k, temperature)
    expected = slow_knn(
        train.double().numpy(), labels.numpy(), test.double().numpy(), k, temperature
    )
    assert knn.predict(train, labels, test).tolist() == expected
    accuracy = np.mean([a == b for a, b in zip(expected, wanted.tolist(), strict=True)])
    assert knn.accuracy(train, labels, test, wanted) == pytest.approx(accuracy)


def test_knn_finds_each_train_image_itself():
    train, labels = clusters(30, 0, 5.0)
    assert KNN(k=1).accuracy(train, labels, train, labels) == 1.0


def test_knn_takes_all_neighbours_where_there_are_fewer_than_k():
    train, labels = clusters(5, 0)
    assert KNN(k=20).predict(train, labels, train).shape == (5,)


def test_the_length_of_a_feature_does_not_matter_to_knn():
    (train, labels), (test, _) = clusters(60, 0, 4.0), clusters(40, 1, 4.0)
    longer = train * torch.rand(60, 1).add(0.1)
    assert torch.equal(KNN().predict(train, labels, test), KNN().predict(longer, labels, test * 9))


def test_nearest_are_the_most_similar_first():
    train = torch.tensor([[1.0, 0.0], [0.0, 5.0], [1.0, 1.0]])
    assert nearest(train, torch.tensor([[3.0, 0.1], [0.1, 1.0]]), 2).tolist() == [[0, 2], [1, 2]]
    assert nearest(train, train, 10).shape == (3, 3)


# Linear


def test_a_linear_probe_separates_what_is_separable():
    train, labels = clusters(200, 0, 0.3)
    test, wanted = clusters(100, 1, 0.3)
    assert FAST.accuracy(train, labels, test, wanted) == 1.0


def test_a_linear_probe_of_noise_is_a_guess():
    train, labels = clusters(300, 0)
    test, wanted = clusters(300, 1)
    noise = torch.Generator().manual_seed(0)
    accuracy = FAST.accuracy(
        torch.randn(300, 6, generator=noise), labels, torch.randn(300, 6, generator=noise), wanted
    )
    assert 0.2 < accuracy < 0.47
    assert FAST.accuracy(train, labels, test, wanted) > 0.9


def test_a_linear_probe_gives_the_same_number_twice():
    data = (*clusters(200, 0, 3.0), *clusters(100, 1, 3.0))
    torch.manual_seed(1)
    first = FAST.evaluate(*data)
    torch.manual_seed(2)
    assert FAST.evaluate(*data) == first


def test_the_probes_seed_chooses_what_is_held_out():
    data = (*clusters(200, 0, 3.0), *clusters(100, 1, 3.0))
    held_out = {replace(FAST, seed=seed).evaluate(*data).held_out_accuracy for seed in range(5)}
    assert len(held_out) > 1


def test_test_labels_change_nothing_but_the_score():
    train, labels = clusters(200, 0, 3.0)
    test, wanted = clusters(100, 1, 3.0)
    found = FAST.evaluate(train, labels, test, wanted)
    for shuffled in (wanted[torch.randperm(100)], (wanted + 1) % 3, torch.full_like(wanted, 7)):
        other = FAST.evaluate(train, labels, test, shuffled)
        assert other.learning_rate == found.learning_rate
        assert other.held_out_accuracy == found.held_out_accuracy
    assert FAST.evaluate(train, labels, test, torch.full_like(wanted, 7)).accuracy == 0.0


def test_a_class_that_only_the_test_has_changes_nothing_for_the_others():
    train, labels = clusters(200, 0, 3.0)
    test, wanted = clusters(2000, 1, 3.0)
    found = FAST.evaluate(train, labels, test, wanted)
    stranger = torch.cat([test, torch.zeros(1, 6)]), torch.cat([wanted, torch.tensor([40])])
    other = FAST.evaluate(train, labels, *stranger)
    assert other.held_out_accuracy == found.held_out_accuracy
    assert round(other.accuracy * 2001) == round(found.accuracy * 2000)


def test_a_linear_probe_of_two_train_images_does_not_turn_into_nan():
    train, labels = torch.tensor([[1.0, 2.0], [1.5, 2.5]]), torch.tensor([1, 1])
    assert FAST.accuracy(train, labels, train, labels) == 1.0


def test_the_learning_rate_is_the_best_one_on_held_out_train_images():
    data = (*clusters(200, 0, 3.0), *clusters(100, 1, 3.0))
    rates = (1e-9, 0.1, 30.0)
    several = replace(FAST, learning_rates=rates).evaluate(*data)
    alone = [replace(FAST, learning_rates=(rate,)).evaluate(*data) for rate in rates]
    best = max(alone, key=lambda result: result.held_out_accuracy)
    assert several.learning_rate == best.learning_rate
    assert several.accuracy == pytest.approx(best.accuracy)
    assert several.held_out_accuracy == pytest.approx(best.held_out_accuracy)


def test_the_scale_of_features_does_not_matter_to_a_linear_probe():
    train, labels = clusters(200, 0, 2.0)
    test, wanted = clusters(100, 1, 2.0)
    scale, shift = torch.tensor([1e-3, 1.0, 1e3, 10.0, 0.1, 5.0]), 100.0
    found = FAST.accuracy(train, labels, test, wanted)
    other = FAST.accuracy(train * scale + shift, labels, test * scale + shift, wanted)
    assert other == pytest.approx(found, abs=0.02)


def test_a_feature_that_never_changes_does_no_harm():
    train, labels = clusters(200, 0, 0.3)
    test, wanted = clusters(100, 1, 0.3)
    train[:, 5], test[:, 5] = 3.0, 3.0
    assert FAST.accuracy(train, labels, test, wanted) == 1.0


# Protocols


def test_a_protocol_is_told_by_its_name_version_and_settings():
    assert KNN().id == "knn-v1"
    assert str(KNN(k=10)) == "knn-v1 (k 10, temperature 0.07)"
    assert Linear().id == "linear-v1"
    assert str(Linear()) == (
        "linear-v1 (learning_rates (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), steps 2000, batch_size 256, "
        "held_out 0.1, seed 0)"
    )


def test_another_version_is_another_id():
    @dataclass(frozen=True)
    class Newer(Protocol):
        name: ClassVar[str] = "knn"
        version: ClassVar[int] = 2

    assert Newer().id == "knn-v2"


def test_a_probe_of_features_gives_both_numbers_and_leaves_out_images_without_labels():
    (train, labels), (test, wanted) = clusters(80, 0, 0.3), clusters(40, 1, 0.3)
    labels[:10], wanted[:5] = -1, -1
    train[:10], test[:5] = torch.nan, torch.nan
    result = probe(LabelledFeatures(train, labels), LabelledFeatures(test, wanted))
    assert (result.knn, result.linear) == (1.0, 1.0)
    assert (result.train_images, result.test_images) == (70, 35)
    assert result.protocols == {
        "knn": str(KNN()),
        "linear": str(Linear()),
        "labelfree": str(LabelFree()),
    }
    assert result.rankme is not None
    assert result.alignment is None, "no crops were given"


def test_a_figure_that_is_new_needs_a_row_alone_and_survives_json(monkeypatch):
    monkeypatch.setitem(PROBES, "spread", Metric("spread", "spread of the features", sign=1))
    monkeypatch.setattr(LabelFree, "figures", lambda *_: {"rankme": 3.0, "spread": 0.5})
    result = probe(None, LabelledFeatures(*clusters(10, 0)))
    assert result.values["spread"] == 0.5
    assert result.described == "RankMe 3, spread 0.5"
    assert ProbeResult(**json.loads(json.dumps(asdict(result)))) == result
    assert ProbeResult.of(result.values, 0, 10, result.protocols, {}) == result


def test_a_probe_without_labels_is_refused_with_the_counts():
    features, labels = clusters(10, 0)
    nothing = LabelledFeatures(features, torch.full_like(labels, -1))
    with pytest.raises(ValueError, match="only 0 train and 10 test images have a label"):
        probe(nothing, LabelledFeatures(features, labels))
    with pytest.raises(ValueError, match="only 10 train and 0 test images have a label"):
        probe(LabelledFeatures(features, labels), nothing)


# Features


@pytest.mark.parametrize("config", [RESNET, VIT])
def test_embedding_does_not_depend_on_the_batch_and_keeps_the_order(config):
    torch.manual_seed(0)
    encoder = config.build().eval()
    views = np.random.default_rng(0).integers(0, 256, (7, 3, 16, 16), np.uint8)
    mean, std = (0.5,) * 3, (0.2,) * 3
    whole = embed(encoder, views, mean, std)
    parts = 2 if config.is_vit else 1  # a ViT's class token, then the mean of its patch tokens
    assert whole.shape == (7, parts * encoder.width)
    features = encode_uint8(encoder, torch.from_numpy(views), mean, std)
    np.testing.assert_allclose(whole[:, : encoder.width], features.cls, atol=1e-5)
    np.testing.assert_allclose(whole[:, -encoder.width :], features.patches.mean(1), atol=1e-5)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(embed(encoder, views, mean, std, batch_size=3), whole, atol=1e-5)
    np.testing.assert_allclose(
        embed(encoder, views[::-1].copy(), mean, std), whole[::-1], atol=1e-5
    )


def test_raw_pixels_are_a_baseline():
    views = np.random.default_rng(0).integers(0, 256, (4, 3, 2, 2), np.uint8)
    found = pixels(views)
    assert found.shape == (4, 12)
    np.testing.assert_allclose(found[1].reshape(3, 2, 2) * 255, views[1], rtol=1e-6)


# Health


@pytest.mark.parametrize(
    ("features", "rank"),
    [
        (torch.eye(8), 8.0),
        (torch.eye(8) * 1e-3, 8.0),
        (torch.ones(8, 1) @ torch.randn(1, 5), 1.0),
        (torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])), 2.0),
        (
            torch.diag(torch.tensor([3.0, 1.0])),
            math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)),
        ),
    ],
)
def test_the_effective_rank_of_a_known_matrix(features, rank):
    assert float(effective_rank(features)) == pytest.approx(rank, rel=1e-4)


def test_the_effective_rank_of_nothing_is_finite():
    assert math.isfinite(float(effective_rank(torch.zeros(4, 3))))


class Given(Encoder):
    """An encoder whose features are the images themselves."""

    def forward(self, images, visible=None):
        flat = images.flatten(1)
        return Features(flat, flat[:, None])


def test_features_that_fill_the_sphere_have_a_deviation_of_one():
    health = feature_health(Given(RESNET), torch.randn(256, 3, 4, 4))
    assert health["feature_std"] == pytest.approx(1.0, abs=0.03)
    assert 30 < health["effective_rank"] <= 48


def test_features_that_collapsed_have_no_deviation_and_rank_one():
    health = feature_health(Given(RESNET), torch.randn(1, 3, 4, 4).repeat(64, 1, 1, 1))
    assert health["feature_std"] == pytest.approx(0.0, abs=1e-5)
    assert health["effective_rank"] == pytest.approx(1.0, abs=1e-3)


def test_looking_at_the_health_changes_nothing_in_the_encoder():
    encoder = RESNET.build().train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    feature_health(encoder, torch.randn(4, 3, 16, 16))
    assert encoder.training
    assert all(torch.equal(before[name], t) for name, t in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())
