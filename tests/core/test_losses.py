import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from selfray import contrast
from selfray.losses import (
    batch_contrast,
    koleo,
    masked_distillation,
    masked_pixel_error,
    nt_xent,
    queue_contrast,
    regression_to_target,
    self_distillation,
    sinkhorn,
)


def slow_nt_xent(embeddings: np.ndarray, temperature: float) -> list[list[float]]:
    """Eq. 1 of arXiv:2002.05709, written out: the loss of each anchor [image][view]."""
    images = len(embeddings)

    def similarity(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b)))

    losses = []
    for i in range(images):
        of_image = []
        for v in range(2):
            anchor = embeddings[i, v]
            numerator = math.exp(similarity(anchor, embeddings[i, 1 - v]) / temperature)
            denominator = 0.0
            for k in range(images):
                for u in range(2):
                    if (k, u) != (i, v):
                        denominator += math.exp(similarity(anchor, embeddings[k, u]) / temperature)
            of_image.append(-math.log(numerator / denominator))
        losses.append(of_image)
    return losses


def embeddings(images: int = 6, width: int = 5) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(images, 2, width)) * 3)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_nt_xent_is_its_formula(temperature):
    z = embeddings()
    expected = np.mean(slow_nt_xent(z.numpy(), temperature))
    assert float(nt_xent(z, z, 0, temperature)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_mean_of_the_ranks_losses_is_the_loss_of_one_process(ranks):
    z = embeddings()
    slow = slow_nt_xent(z.numpy(), 0.2)
    share = len(z) // ranks
    losses = []
    for rank in range(ranks):
        first = rank * share
        local = z[first : first + share]
        losses.append(float(nt_xent(local, z, first, 0.2)))
        assert losses[-1] == pytest.approx(np.mean(slow[first : first + share]), rel=1e-5)
    assert np.mean(losses) == pytest.approx(float(nt_xent(z, z, 0, 0.2)), rel=1e-6)


def test_the_length_of_an_embedding_does_not_matter():
    z = embeddings()
    longer = z * torch.rand(6, 2, 1, dtype=z.dtype).add(0.5)
    torch.testing.assert_close(nt_xent(z, z, 0, 0.2), nt_xent(longer, longer, 0, 0.2))


def test_an_anchor_is_not_its_own_negative():
    # Two images that are orthogonal, whose views agree: positives e^(1/t), two negatives of e^0.
    z = torch.eye(2).unsqueeze(1).repeat(1, 2, 1)
    expected = -math.log(math.exp(2.0) / (math.exp(2.0) + 2))
    assert float(nt_xent(z, z, 0, 0.5)) == pytest.approx(expected, rel=1e-6)


def test_agreeing_views_have_a_lower_loss_at_a_lower_temperature():
    z = torch.eye(4).unsqueeze(1).repeat(1, 2, 1)
    losses = [float(nt_xent(z, z, 0, temperature)) for temperature in (1.0, 0.5, 0.1)]
    assert losses == sorted(losses, reverse=True)


def test_embeddings_that_collapsed_have_the_loss_of_a_blind_guess():
    z = torch.ones(8, 2, 4)
    assert float(nt_xent(z, z, 0, 0.1)) == pytest.approx(math.log(15), rel=1e-5)


def plain_nt_xent(z: torch.Tensor, temperature: float) -> torch.Tensor:
    flat = F.normalize(z.flatten(0, 1), dim=-1)
    logits = flat @ flat.T / temperature
    places = torch.arange(len(flat))
    logits = logits.masked_fill(F.one_hot(places, len(flat)).bool(), float("-inf"))
    return F.cross_entropy(logits, places ^ 1)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_nt_xent_in_blocks_has_the_loss_and_gradients_of_all_pairs_at_once(monkeypatch):
    monkeypatch.setattr(contrast, "BLOCK_BYTES", 5 * 4 * 128)  # 5 of 128 rows at a time
    z = torch.from_numpy(np.random.default_rng(1).normal(size=(64, 2, 8))).float()
    blocked, plain = z.clone().requires_grad_(), z.clone().requires_grad_()
    with Largest() as largest:
        loss = nt_xent(blocked, blocked, 0, 0.1)
        (3 * loss).backward()
    expected = plain_nt_xent(plain, 0.1)
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(blocked.grad, plain.grad, rtol=1e-4, atol=1e-7)
    assert largest.elements == 64 * 2 * 8  # never 128 x 128


def test_blocks_of_rows_differ_from_one_another_in_nothing_but_their_rows(monkeypatch):
    z = embeddings(9).float()
    whole = nt_xent(z, z, 0, 0.5)
    for rows in (1, 2, 7, 18, 100):
        monkeypatch.setattr(contrast, "BLOCK_BYTES", rows * 4 * 18)
        torch.testing.assert_close(nt_xent(z, z, 0, 0.5), whole)


def test_nt_xent_is_computed_in_float32_from_bfloat16_embeddings():
    z = embeddings().bfloat16()
    loss = nt_xent(z, z, 0, 0.01)
    assert loss.dtype == torch.float32
    expected = np.mean(slow_nt_xent(z.double().numpy(), 0.01))
    assert float(loss) == pytest.approx(expected, rel=1e-4)


# Masked pixels


def slow_pixel_error(
    predicted: np.ndarray, target: np.ndarray, mask: np.ndarray, normalize: bool
) -> float:
    """arXiv:2111.06377, section 3, in loops; the variance is the unbiased one."""
    errors = []
    for image in range(target.shape[0]):
        for patch in range(target.shape[1]):
            if not mask[image, patch]:
                continue
            pixels = [float(x) for x in target[image, patch]]
            if normalize:
                mean = sum(pixels) / len(pixels)
                variance = sum((x - mean) ** 2 for x in pixels) / (len(pixels) - 1)
                pixels = [(x - mean) / math.sqrt(variance + 1e-6) for x in pixels]
            squares = [
                (float(p) - x) ** 2 for p, x in zip(predicted[image, patch], pixels, strict=True)
            ]
            errors.append(sum(squares) / len(squares))
    return sum(errors) / len(errors)


def patches() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(1)
    predicted, target = (torch.from_numpy(rng.normal(size=(3, 5, 12)) * 2 + 1) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [1, 0, 1, 1, 0]]).bool()
    return predicted, target, mask


@pytest.mark.parametrize("normalize", [True, False])
def test_masked_pixel_error_is_its_formula(normalize):
    predicted, target, mask = patches()
    expected = slow_pixel_error(predicted.numpy(), target.numpy(), mask.numpy(), normalize)
    found = masked_pixel_error(predicted, target, mask, normalize)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_visible_patches_have_no_part_in_the_error():
    predicted, target, mask = patches()
    expected = masked_pixel_error(predicted, target, mask, True)
    predicted[~mask], target[~mask] = 1e6, -1e6
    torch.testing.assert_close(masked_pixel_error(predicted, target, mask, True), expected)


def test_a_perfect_prediction_has_no_error():
    _, target, mask = patches()
    assert float(masked_pixel_error(target, target, mask, False)) == 0.0
    deviation = (target.float().var(-1, keepdim=True) + 1e-6).sqrt()
    normalized = (target.float() - target.float().mean(-1, keepdim=True)) / deviation
    assert float(masked_pixel_error(normalized, target, mask, True)) < 1e-12


def test_normalized_pixels_do_not_depend_on_a_patchs_brightness_and_contrast():
    predicted, target, mask = patches()
    expected = masked_pixel_error(predicted, target, mask, True)
    other = masked_pixel_error(predicted, target * 7 + 30, mask, True)
    torch.testing.assert_close(other, expected, rtol=1e-4, atol=0)


def test_a_patch_of_one_colour_stays_finite():
    predicted, target, mask = patches()
    predicted.requires_grad_()
    loss = masked_pixel_error(predicted, torch.full_like(target, 3.0), mask, True)
    loss.backward()
    assert predicted.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(predicted.grad).all()
    expected = F.mse_loss(predicted[mask], torch.zeros_like(predicted[mask]))
    torch.testing.assert_close(loss, expected.float())


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b)))


def test_regression_to_target_is_its_formula_and_spares_the_target():
    z = embeddings().requires_grad_()
    predicted, target = z[:, 0], z[:, 1]
    values = z.detach().numpy()
    expected = np.mean(
        [2 - 2 * cosine(a, b) for a, b in zip(values[:, 0], values[:, 1], strict=True)]
    )
    loss = regression_to_target(predicted, target)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert z.grad is not None
    assert z.grad[:, 0].abs().min() > 0
    assert z.grad[:, 1].abs().max() == 0


def test_queue_contrast_is_its_formula_and_spares_the_keys():
    z = embeddings().requires_grad_()
    queue = F.normalize(torch.from_numpy(np.random.default_rng(1).normal(size=(7, 5))), dim=-1)
    values = z.detach().numpy()
    losses = []
    for query, key in values:
        positive = math.exp(cosine(query, key) / 0.2)
        negatives = sum(math.exp(cosine(query, old) / 0.2) for old in queue.numpy())
        losses.append(-math.log(positive / (positive + negatives)))
    loss = queue_contrast(z[:, 0], z[:, 1], queue.float(), 0.2)
    assert float(loss.detach()) == pytest.approx(np.mean(losses), rel=1e-5)
    loss.backward()
    assert z.grad is not None
    assert z.grad[:, 1].abs().max() == 0


def test_batch_contrast_is_its_formula_at_any_place_in_the_global_batch():
    values = embeddings().numpy()
    queries, keys = values[:, 0], values[:, 1]
    losses = []
    for i, query in enumerate(queries):
        weights = [math.exp(cosine(query, key) / 0.5) for key in keys]
        losses.append(-math.log(weights[i] / sum(weights)))
    q, k = torch.from_numpy(queries), torch.from_numpy(keys)
    assert float(batch_contrast(q, k, 0, 0.5)) == pytest.approx(2 * 0.5 * np.mean(losses), rel=1e-5)
    last = batch_contrast(q[4:], k, 4, 0.5)
    assert float(last) == pytest.approx(2 * 0.5 * np.mean(losses[4:]), rel=1e-5)


def test_self_distillation_is_its_formula_over_all_pairs_of_different_crops():
    rng = np.random.default_rng(2)
    student, teacher = rng.normal(size=(3, 5, 4)), rng.dirichlet(np.ones(4), size=(3, 2))
    losses = []
    for image in range(3):
        for t in range(2):
            for s in range(5):
                if s != t:
                    exponents = np.exp(student[image, s] / 0.1)
                    log_p = np.log(exponents / exponents.sum())
                    losses.append(-(teacher[image, t] * log_p).sum())
    found = self_distillation(torch.from_numpy(student), torch.from_numpy(teacher), 0.1)
    assert float(found) == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b: nt_xent(a.view(8, 2, 6), a.view(8, 2, 6), 0, 0.1),
        lambda a, b: regression_to_target(a, b),
        lambda a, b: queue_contrast(a, b, F.normalize(b, dim=-1), 0.1),
        lambda a, b: batch_contrast(a, b, 0, 0.1),
        lambda a, b: self_distillation(a.view(4, 4, 6), b.view(4, 4, 6)[:, :2].softmax(-1), 0.1),
        lambda a, b: masked_distillation(a, b.softmax(-1), torch.ones(16), 4, 0.1),
        lambda a, b: koleo(a, a, 0),
        lambda a, b: sinkhorn(a, 0.1).square().sum(),
        lambda a, b: masked_pixel_error(a[None], b[None], torch.ones(1, 16).bool(), True),
    ],
)
def test_every_loss_is_float32_and_the_same_under_autocast(loss):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(16, 6, generator=generator) for _ in range(2))
    first = first * 0.05 + 1  # alike, as features are at first: bf16 could not tell them apart
    expected = loss(first, second)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(first, second)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


# DINOv2


def test_ibots_loss_weighs_the_patches_of_each_crop_alike():
    torch.manual_seed(0)
    hidden = [2, 0, 5, 1]  # patches hidden in each of four crops
    student, teacher = torch.randn(8, 6), torch.randn(8, 6).softmax(-1)
    weights = torch.cat([torch.full((count,), 1 / count) for count in hidden if count])
    crops, row = [], 0
    for count in hidden:
        terms = []
        for _ in range(count):
            log_student = (student[row] / 0.1) - torch.logsumexp(student[row] / 0.1, 0)
            terms.append(-(teacher[row] * log_student).sum())
            row += 1
        crops.append(sum(terms) / count if count else torch.tensor(0.0))
    expected = sum(crops) / 4
    found = masked_distillation(student, teacher, weights, crops=4, temperature=0.1)
    torch.testing.assert_close(found, torch.as_tensor(expected))


def test_ibots_loss_of_no_hidden_patch_is_zero_with_a_gradient():
    student = torch.zeros(0, 6, requires_grad=True)
    loss = masked_distillation(student, torch.zeros(0, 6), torch.zeros(0), 4, 0.1)
    loss.backward()
    assert float(loss.detach()) == 0
    assert student.grad is not None


def test_sinkhorn_uses_all_prototypes_alike():
    torch.manual_seed(0)
    logits = torch.randn(64, 8)
    logits[:, 0] += 3  # a plain softmax would choose it nearly everywhere
    few, many = sinkhorn(logits, 0.5, iterations=3), sinkhorn(logits, 0.5, iterations=200)
    torch.testing.assert_close(few.sum(1), torch.ones(64))
    torch.testing.assert_close(many.sum(1), torch.ones(64))
    torch.testing.assert_close(many.sum(0), torch.full((8,), 64 / 8), rtol=1e-4, atol=1e-4)
    assert (few.sum(0) - 8).abs().max() < 2.5 < ((logits / 0.5).softmax(1).sum(0) - 8).abs().max()


def test_sinkhorn_is_its_formula():
    torch.manual_seed(1)
    logits = torch.randn(6, 4, dtype=torch.float64)
    shares = (logits / 0.3).exp()
    for _ in range(3):
        for prototype in range(4):
            shares[:, prototype] /= shares[:, prototype].sum() * 4
        for row in range(6):
            shares[row] /= shares[row].sum() * 6
    torch.testing.assert_close(sinkhorn(logits, 0.3), (shares * 6).float())


def test_sinkhorn_survives_sharp_temperatures_and_an_empty_batch():
    torch.manual_seed(0)
    sharp = sinkhorn(torch.randn(16, 5) * 50, 0.01)
    torch.testing.assert_close(sharp.sum(1), torch.ones(16))
    assert sinkhorn(torch.zeros(0, 5), 0.1).shape == (0, 5)


def test_koleo_is_the_mean_log_distance_to_the_nearest_neighbour():
    torch.manual_seed(0)
    features = torch.randn(7, 5) * 3
    unit = features / features.norm(dim=1, keepdim=True)
    expected = 0.0
    for i in range(7):
        nearest = min(float((unit[i] - unit[j]).norm()) for j in range(7) if j != i)
        expected -= math.log(nearest) / 7
    assert float(koleo(features, features, 0)) == pytest.approx(expected, rel=1e-5)
    # A rank's part against all.
    part = koleo(features[2:5], features, first=2)
    others = koleo(features[:2], features, 0) * 2 + koleo(features[5:], features, 5) * 2
    assert float(part * 3 + others) / 7 == pytest.approx(expected, rel=1e-5)


def test_koleo_pushes_neighbours_apart():
    features = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0]], requires_grad=True)
    koleo(features, features, 0).backward()
    assert features.grad is not None
    assert features.grad[0, 1] < 0 < features.grad[1, 1]  # a step against it widens the gap


def test_koleo_of_a_single_image_is_zero():
    lone = torch.randn(1, 4, requires_grad=True)
    assert float(koleo(lone, lone, 0).detach()) == 0
