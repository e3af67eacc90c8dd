"""Protocols and intervals of `selfray evaluate`, on features made of nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from selfray.probes.classifier import Gallery
from selfray.probes.examine import examine
from selfray.probes.intervals import (
    difference,
    interval,
    mean_overlap,
    overlap_difference,
    overlap_interval,
)
from selfray.probes.judgement import (
    Judgement,
    balanced_accuracy,
    classified,
    confusion,
    mean_ranks,
    of_predictions,
    verdicts,
)
from selfray.probes.knn import KNN, ChosenKNN
from selfray.probes.linear import Linear
from selfray.probes.logistic import Logistic
from selfray.probes.retrieval import Retrieval
from selfray.probes.subsets import balanced, folds, held_out, image_digest
from selfray.probes.suite import FewLabels, Suite, judge

FAST = Suite(
    knn=ChosenKNN(ks=(1, 5, 20)),
    linear=Linear(steps=100, batch_size=32),
    logistic=Logistic(l2=(1.0, 1e-2), iterations=30),
    shares=(0.1,),
    labels=(9,),
)


def gallery(count: int, seed: int, spread: float = 1.0, classes: int = 3) -> Gallery:
    """Clouds in 6 dimensions around the first axes; labels at random."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    noise = torch.randn(count, 6, generator=generator) * spread
    keys = np.random.default_rng(seed).integers(0, 2**63, count).astype(np.uint64)
    return Gallery(torch.eye(6)[labels] * 4 + noise, labels, keys, classes)


# No test label chooses anything


@pytest.mark.parametrize("key", list(FAST.tasks(("knn", "linear", "logistic", "low-shot"))))
def test_poisoned_test_labels_change_no_answer_and_no_choice(key):
    protocol = FAST.tasks(("knn", "linear", "logistic", "low-shot"))[key]
    train, test = gallery(120, 0, 3.0), gallery(60, 1, 3.0)
    found = judge(key, protocol, train, test)
    poisoned = replace(test, labels=(test.labels + 1) % 3)
    other = judge(key, protocol, train, poisoned)
    assert dict(other.chosen) == dict(found.chosen)
    both = found.scores + other.scores  # right by the labels, or by the poisoned ones: never both
    assert both.max() <= 1
    if found.predicted is not None:
        assert np.array_equal(found.predicted, other.predicted)  # type: ignore[arg-type]


# Protocols


@pytest.mark.parametrize("name", ["knn", "linear", "logistic"])
def test_every_classifier_finds_what_is_separable(name):
    protocol = getattr(FAST, name)
    assert classified(name, protocol, gallery(150, 0, 0.3), gallery(60, 1, 0.3)).interval.value == 1


def test_k_is_chosen_on_held_out_train_images():
    # One neighbour is often of another cloud, twenty outvote it.
    train, test = gallery(400, 0, 6.0), gallery(200, 1, 6.0)
    chosen = FAST.knn.classify(train, test.features).chosen["k"]
    assert chosen == 20
    alone = KNN(20).classify(train, test.features).predicted
    assert torch.equal(FAST.knn.classify(train, test.features).predicted, alone)


def test_nearest_neighbours_do_not_depend_on_how_train_is_read(monkeypatch):
    train, test = gallery(100, 0, 4.0), gallery(30, 1, 4.0)
    whole = FAST.knn.classify(train, test.features)
    monkeypatch.setattr("selfray.probes.classifier.CHUNK_ROWS", 7)
    assert torch.equal(FAST.knn.classify(train, test.features).predicted, whole.predicted)


def test_logistic_regression_is_at_the_minimum_of_its_loss():
    train = gallery(80, 0, 2.0)
    protocol = Logistic(l2=(1.0, 0.1), iterations=200)
    from selfray.probes.classifier import Moments
    from selfray.probes.logistic import _fit

    moments = Moments.of(train.features)
    x = (train.features - train.features.mean(0)) / (train.features.std(0, correction=0) + 1e-6)
    weights = _fit(train, moments, 0.1, protocol.iterations, None).requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(x @ weights[:-1] + weights[-1], train.labels)
    loss = loss + 0.05 * weights[:-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient.abs().max() < 1e-4


def test_logistic_regression_of_one_image_for_each_class_takes_the_set_strength():
    train = Gallery(torch.eye(3) * 5, torch.arange(3), np.arange(3, dtype=np.uint64), 3)
    found = Logistic().classify(train, torch.eye(3) * 4)
    assert found.predicted.tolist() == [0, 1, 2]
    assert found.chosen == {"l2": Logistic().without_choice}


def test_retrieval_is_its_formula():
    train, test = gallery(30, 0, 4.0), gallery(10, 1, 4.0)
    found = Retrieval().rank(train, test.features, test.labels)
    for query in range(10):
        x = test.features[query]
        similar = [float(x @ t / (x.norm() * t.norm())) for t in train.features]
        order = sorted(range(30), key=lambda i: -similar[i])
        hits = [int(train.labels[i]) == int(test.labels[query]) for i in order]
        precisions = [sum(hits[: r + 1]) / (r + 1) for r in range(30) if hits[r]]
        assert float(found.average_precision[query]) == pytest.approx(
            sum(precisions) / len(precisions), abs=1e-5
        )
        for k in (1, 5, 10):
            assert float(found.found_at[k][query]) == float(any(hits[:k]))


# Subsets


def test_a_subset_is_a_function_of_the_seed_and_the_images_alone():
    train = gallery(200, 0)
    labels = train.labels.numpy()
    kept = set(train.keys[balanced(train.keys, labels, 30, seed=1)].tolist())
    order = np.random.default_rng(3).permutation(200)
    again = train.keys[order][balanced(train.keys[order], labels[order], 30, seed=1)]
    assert set(again.tolist()) == kept
    assert set(train.keys[balanced(train.keys, labels, 30, seed=2)].tolist()) != kept


def test_a_subset_has_as_many_images_of_each_class():
    labels = np.array([0] * 90 + [1] * 9 + [2])
    chosen = balanced(np.arange(100, dtype=np.uint64), labels, 15, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [5, 5, 1]
    assert len(balanced(np.arange(100, dtype=np.uint64), labels, 1, seed=0)) == 3, (
        "at least one of each"
    )


def test_smaller_subsets_lie_inside_larger_ones():
    train = gallery(200, 0)
    small, large = (set(balanced(train.keys, train.labels.numpy(), n, 0)) for n in (12, 60))
    assert small < large


def test_held_out_images_are_a_share_of_each_class_and_never_a_class_s_last():
    labels = np.array([0] * 50 + [1] * 20 + [2])
    out = held_out(np.arange(71, dtype=np.uint64), labels, 0.1, seed=0)
    assert np.bincount(labels[out], minlength=3).tolist() == [5, 2, 0]
    part = folds(np.arange(71, dtype=np.uint64), labels, 5, seed=0)
    assert np.bincount(part[labels == 0]).tolist() == [10] * 5


def test_equal_bytes_have_equal_keys():
    assert image_digest(b"a") == image_digest(b"a") != image_digest(b"b")


def test_few_labels_are_judged_by_several_subsets():
    protocol = FewLabels(labels=6, subsets=3, classifier=FAST.logistic)
    found = protocol.judge(gallery(100, 0, 1.0), gallery(50, 1, 1.0))
    assert found.key == "labels-6"
    assert found.scores.shape == (3, 50)
    assert found.more["labels"] == 6
    assert "subsets 3" in found.protocol


# Intervals


def test_an_interval_of_accuracies_is_the_binomial_one():
    scores = np.array([1.0] * 80 + [0.0] * 20)
    found = interval(scores)
    assert found.value == pytest.approx(0.8)
    deviation = (0.8 * 0.2 / 100) ** 0.5
    assert found.low == pytest.approx(0.8 - 1.96 * deviation, abs=0.02)
    assert found.high == pytest.approx(0.8 + 1.96 * deviation, abs=0.02)
    assert interval(scores) == found


def test_subsets_that_disagree_widen_the_interval():
    rng = np.random.default_rng(0)
    same = np.repeat((rng.random((1, 400)) < 0.6).astype(float), 3, axis=0)
    apart = np.stack([(rng.random(400) < p).astype(float) for p in (0.4, 0.6, 0.8)])
    width = [found.high - found.low for found in (interval(same), interval(apart))]
    assert width[1] > 1.5 * width[0]


def test_a_paired_difference_is_surer_than_two_intervals():
    rng = np.random.default_rng(0)
    theirs = (rng.random(500) < 0.7).astype(float)
    ours = theirs.copy()
    ours[np.flatnonzero(theirs == 0)[:15]] = 1.0
    gap = difference(ours[None], theirs[None])
    assert gap.value == pytest.approx(0.03)
    assert gap.excludes_zero
    assert interval(ours).low < interval(theirs).high
    assert not difference(ours[None], ours[None]).excludes_zero


def test_scores_of_other_images_are_not_compared():
    with pytest.raises(ValueError, match="not of the same images"):
        difference(np.ones((1, 3)), np.ones((1, 4)))


def test_the_interval_of_a_mean_overlap_holds_it():
    rng = np.random.default_rng(0)
    union = rng.integers(50, 100, (40, 3)).astype(float)
    inside = union * rng.uniform(0.3, 0.7, (40, 3))
    overlaps = np.stack([inside, union], axis=-1)
    found = overlap_interval(overlaps)
    assert found.value == pytest.approx((inside.sum(0) / union.sum(0)).mean())
    assert found.low < found.value < found.high
    better = overlaps.copy()
    better[..., 0] *= 1.2
    assert overlap_difference(better, overlaps).excludes_zero
    absent = np.array([[[0.0, 0.0], [1.0, 2.0]]])
    assert mean_overlap(absent).tolist() == [0.5], "a class that never occurs has no overlap"


# Sentences


def judged(accuracy: float, images: int = 400) -> Judgement:
    labels = np.zeros(images, np.int64)
    predicted = (np.arange(images) >= accuracy * images).astype(np.int64)
    return of_predictions("knn", "knn-v2", predicted, labels)


def test_the_sentence_names_what_is_more_than_chance_and_what_is_not():
    said = list(verdicts({"a": [judged(0.9)], "b": [judged(0.5)], "c": [judged(0.9)]}, 400))
    assert len(said) == 1
    assert said[0].startswith("knn: a is better than b by 40.0 points [")
    assert "400 images show no difference between a and c" in said[0]
    assert list(verdicts({"a": [judged(0.9)]}, 400)) == []


def test_uneven_classes_have_a_balanced_accuracy():
    labels = np.array([0] * 9 + [1])
    assert balanced_accuracy(np.zeros(10, np.int64), labels) == 0.5
    assert confusion(np.zeros(10, np.int64), labels, 2).tolist() == [[9, 0], [1, 0]]


def test_mean_ranks_share_equal_places():
    ranks = mean_ranks({"a": [0.9, 0.5], "b": [0.9, 0.7], "c": [0.1, 0.6]})
    assert ranks == {"a": (1.5 + 3) / 2, "b": (1.5 + 1) / 2, "c": (3 + 2) / 2}


def test_a_kept_judgement_reads_back_as_it_was():
    found = judged(0.7, 10)
    again = Judgement.from_json(found.to_json())
    assert again.interval == found.interval
    assert np.array_equal(again.predicted, found.predicted)  # type: ignore[arg-type]
    assert again.numbers() == found.numbers()


# Bad input


def examined(train, test, train_keys=None, test_keys=None, names=None):
    train, test = np.array(train), np.array(test)
    keys = np.arange(len(train)) if train_keys is None else np.array(train_keys)
    others = 1000 + np.arange(len(test)) if test_keys is None else np.array(test_keys)
    return examine("clinic", train, test, keys.astype(np.uint64), others.astype(np.uint64), names)


def test_labels_that_are_not_contiguous_are_numbered():
    found = examined([7, 3, 7, 3], [3, 7])
    assert (found.train.tolist(), found.test.tolist()) == ([1, 0, 1, 0], [0, 1])
    assert found.names == ("3", "7")
    assert examined([0, 1, 0, 1], [0], names=("cat", "dog")).names == ("cat", "dog")


def test_no_labels_and_one_class_are_refused():
    with pytest.raises(ValueError, match="clinic has 0 labelled train and 1 labelled test images"):
        examined([], [1])
    with pytest.raises(ValueError, match="clinic has only one class"):
        examined([1, 1], [1])


def test_what_spoils_a_number_is_said():
    found = examined([0, 0, 1], [0, 5], train_keys=[1, 2, 3], test_keys=[2, 9])
    assert found.notes[0].startswith("warning: 1 of 2 test images of clinic are also in train")
    assert "1 class with one train image (1)" in found.notes[1]
    assert found.notes[2].startswith("1 test images belong to classes without train images")
    assert found.test.tolist() == [0, 2]


# What is larger than the memory


@pytest.mark.parametrize("name", ["knn", "linear", "logistic", "retrieval"])
def test_large_features_are_read_in_parts_and_give_the_same_answers(name, monkeypatch):
    train, test = gallery(100, 0, 4.0), gallery(30, 1, 4.0)
    protocol = getattr(FAST, name)
    monkeypatch.setattr("selfray.probes.logistic.FEW", 0)  # a tenth is held out, as of many images
    whole = judge(name, protocol, train, test)
    for module in ("linear", "retrieval", "classifier"):
        monkeypatch.setattr(f"selfray.probes.{module}.CHUNK_ROWS", 7)
    for module in ("linear", "logistic", "retrieval", "classifier"):
        monkeypatch.setattr(f"selfray.probes.{module}.WHOLE", 10)
    parts = judge(name, protocol, train, test)
    assert np.allclose(parts.scores, whole.scores)
    assert dict(parts.chosen) == dict(whole.chosen)


# What a comparison shows of an evaluation


def test_numbers_of_an_evaluation_have_rows_of_their_own_and_their_intervals_none():
    from selfray.metrics import evaluation, is_end

    found = evaluation("eval/digits/low-shot-10pct-finetune")
    assert found is not None
    assert found.name == "digits: low-shot 10 %, finetune"
    assert (found.unit, found.sign) == ("%", 1)
    assert evaluation("eval/digits/linear-paper").name == "digits: linear-paper"  # type: ignore[union-attr]
    scratch = evaluation("eval/digits/labels-20-finetune-from-scratch")
    assert scratch is not None
    assert scratch.name == "digits: few labels 20, finetune, from scratch"
    for name in ("eval/digits/knn/low", "eval/digits/unknown", "probe/knn", "loss"):
        assert evaluation(name) is None
    assert [
        is_end(f"eval/digits/{name}") for name in ("knn/low", "knn/balanced", "x/low", "knn")
    ] == [
        True,
        False,
        False,
        False,
    ]


def test_the_comparison_page_has_a_column_for_each_protocol_of_any_run():
    from selfray.report.page import write_page
    from selfray.runs.ranking import ComparedRun

    ends = {"": 0.975, "/low": 0.9, "/high": 0.99, "-from-scratch": 0.6}
    curves = {f"eval/digits/finetune{end}": [(40, value)] for end, value in ends.items()}
    runs = [
        ComparedRun("judged", "", "finished", curves=curves),
        ComparedRun("other", "", "finished"),
    ]
    page = write_page(runs, "t")
    assert page.count(">digits: fine-tuned</button>") == 1
    assert "97.5%<small>[90.0, 99.0]</small>" in page
    assert page.count(">digits: fine-tuned, from scratch</button>") == 1
    assert "finetune/low" not in page.partition("<script")[0]
