"""The tokenizer that the platform trains, and BEiT, which predicts its tokens."""

import copy
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import BEIT as BEIT_ENCODER
from helpers import (
    MAE,
    PLAIN_SGD,
    RESNET,
    VIT,
    experiment,
    positions,
    prepared,
    start,
    tiny,
    tokenizer_run,
    train_for,
    weights,
)
from selfray.experiment import IMAGENET_MEAN, IMAGENET_STD
from selfray.methods.beit import BEiTConfig
from selfray.methods.vqvae import VQVAEConfig
from selfray.models.decoder import patchify
from selfray.models.quantizer import IDLE, Quantizer
from selfray.report import run_pictures
from selfray.runs import checkpoint
from selfray.runs.checkpoint import Checkpoint
from selfray.storage import Location
from selfray.tokenizer import TokenizerFile

VQVAE, BEIT = tiny(VQVAEConfig), tiny(BEiTConfig)
NORMALIZATION = (IMAGENET_MEAN, IMAGENET_STD)


# The codebook


def unit(count: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator), dim=-1)


def test_a_token_is_the_nearest_code():
    quantizer = Quantizer(4, codes=6, code_width=3)
    embedded = unit(20, 3)
    tokens = quantizer.tokens(embedded.view(4, 5, 3))
    for feature, token in zip(embedded, tokens.flatten(), strict=True):
        distances = (quantizer.get_buffer("codes") - feature).norm(dim=-1)
        assert int(token) == int(distances.argmin())
    assert torch.equal(quantizer.lookup(tokens)[1, 2], quantizer.get_buffer("codes")[tokens[1, 2]])


def test_codes_follow_the_features_that_are_assigned_to_them():
    quantizer = Quantizer(4, codes=3, code_width=2)
    codes, usage = quantizer.get_buffer("codes"), quantizer.get_buffer("usage")
    codes.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    usage.fill_(1 / 3)
    quantizer.get_buffer("activity").fill_(1 / 3)
    up_left, down_left = [-0.8, 0.6], [-0.8, -0.6]
    quantizer.follow(torch.tensor([[0.6, 0.8], up_left, down_left, down_left]), 0.9, seed=0)
    mean = torch.tensor([-0.8, (0.6 - 2 * 0.6) / 3])
    expected = torch.stack(
        [
            torch.tensor([1.0, 0.0]),  # nothing came to it
            F.normalize(0.9 * torch.tensor([0.0, 1.0]) + 0.1 * torch.tensor([0.6, 0.8]), dim=0),
            F.normalize(0.9 * torch.tensor([-1.0, 0.0]) + 0.1 * F.normalize(mean, dim=0), dim=0),
        ]
    )
    torch.testing.assert_close(codes, expected)
    torch.testing.assert_close(usage, 0.9 / 3 + 0.1 * torch.tensor([0, 0.25, 0.75]))


def test_a_code_that_nothing_comes_to_is_moved_onto_a_feature():
    quantizer = Quantizer(4, codes=5, code_width=3)
    codes, activity = quantizer.get_buffer("codes"), quantizer.get_buffer("activity")
    activity.fill_(0.2)
    features = torch.tensor([[1.0, 0.0, 0.0]]).repeat(8, 1)
    codes.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0], [0, -1, 0]]))
    steps = 0
    while torch.equal(codes[1], torch.tensor([0.0, 1.0, 0.0])):
        quantizer.follow(features, 0.9, seed=steps)
        steps += 1
    assert 0.9**steps < IDLE <= 0.9 ** (steps - 1)
    assert torch.equal(codes[1], features[0])
    assert float(activity[1]) == pytest.approx(0.2)
    assert float(quantizer.get_buffer("usage")[1]) == 0, "it is not in use for being moved"


def test_a_collapse_shows_in_the_codebooks_health_although_codes_are_moved():
    quantizer = Quantizer(4, codes=32, code_width=3)
    alike = torch.tensor([[1.0, 0.0, 0.0]]).repeat(64, 1)
    for step in range(200):
        quantizer.follow(alike, 0.9, seed=step)
        health = quantizer.health()
        assert float(health["codebook_use"]) <= 2 / 32, "the old nearest code and the new one"
        assert float(health["codebook_perplexity"]) <= 2.0001


def test_tokens_are_the_same_under_autocast_and_whatever_the_part(monkeypatch):
    quantizer = Quantizer(8, codes=512, code_width=8)
    around = unit(1, 8, seed=1)
    embedded = F.normalize(unit(400, 8) * 0.1 + around, dim=-1)
    quantizer.get_buffer("codes").copy_(F.normalize(unit(512, 8, seed=2) * 0.1 + around, dim=-1))
    expected = quantizer.tokens(embedded)
    assert len(expected.unique()) > 10
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.tokens(embedded), expected)
    monkeypatch.setattr("selfray.models.quantizer.ROWS_AT_A_TIME", 7)
    assert torch.equal(quantizer.tokens(embedded.view(4, 100, 8)), expected.view(4, 100))


def test_a_new_codebook_is_laid_onto_the_first_batch():
    quantizer = Quantizer(4, codes=6, code_width=3)
    features = unit(50, 3)
    quantizer.follow(features, 0.99, seed=0)
    for code in quantizer.get_buffer("codes"):
        assert (features == code).all(-1).any()


@pytest.mark.parametrize(
    ("usage", "use", "perplexity"),
    [([0.25] * 4, 1.0, 4.0), ([1.0, 0, 0, 0], 0.25, 1.0), ([0.5, 0.5, 0, 0], 0.5, 2.0)],
)
def test_codebook_use_and_perplexity_are_their_formulas(usage, use, perplexity):
    quantizer = Quantizer(4, codes=4, code_width=3)
    quantizer.get_buffer("usage").copy_(torch.tensor(usage))
    health = quantizer.health()
    assert float(health["codebook_use"]) == pytest.approx(use)
    assert float(health["codebook_perplexity"]) == pytest.approx(perplexity)


# VQ-VAE


def test_the_encoder_gets_the_gradient_of_the_codes_and_the_codes_none():
    wanted = experiment(replace(VQVAE, commitment=0.0), VIT)
    method: Any = start(wanted).method
    images = prepared(positions(0, 8, wanted), wanted)["global"][:, 0]
    embedded = method.quantizer.embed(method.encoder(images).patches)
    embedded.retain_grad()
    codes = method.quantizer.lookup(method.quantizer.tokens(embedded)).requires_grad_()
    straight = embedded + (codes - embedded).detach()
    F.mse_loss(method._decode(straight), patchify(images, 4)).backward()
    assert codes.grad is None
    assert embedded.grad is not None
    at_codes = codes.detach().clone().requires_grad_()
    F.mse_loss(method._decode(at_codes), patchify(images, 4)).backward()
    torch.testing.assert_close(embedded.grad, at_codes.grad)


def test_the_loss_is_the_pixels_error_and_the_distance_to_the_codes():
    wanted = experiment(VQVAE, VIT)
    method: Any = start(wanted).method
    batch = prepared(positions(0, 8, wanted), wanted)
    images = batch["global"][:, 0]
    with torch.no_grad():
        loss, metrics = method(batch, start(wanted).progress)
        tokens, rebuilt = method.reconstruct(images)
        embedded = method.quantizer.embed(method.encoder(images).patches)
        codes = method.quantizer.lookup(tokens)
    error = (rebuilt - patchify(images, 4)).square().mean()
    distance = (embedded - codes).square().sum(-1).mean()
    torch.testing.assert_close(metrics["pixel_error"], error)
    torch.testing.assert_close(loss, error + 0.25 * distance)


def test_a_tokenizer_learns_to_rebuild_images_and_uses_its_codes():
    quick = replace(PLAIN_SGD, name="adamw", base_learning_rate=3e-3)
    wanted = experiment(replace(VQVAE, code_momentum=0.9), VIT, optimizer=quick)
    state = start(wanted)
    steps = train_for(state, wanted, 60)
    errors = [float(step.metrics["pixel_error"]) for step in steps]
    assert np.mean(errors[-5:]) < 0.7 * np.mean(errors[:5])
    assert float(steps[-1].metrics["codebook_use"]) > 0.8
    assert float(steps[-1].metrics["codebook_perplexity"]) > 6


def test_a_tokenizer_needs_a_vit():
    with pytest.raises(ValueError, match="a token for each patch, so it needs a ViT, not encoder"):
        experiment(VQVAE, RESNET)


def test_a_tokenizers_picture_shows_images_tokens_and_reconstructions():
    wanted = experiment(VQVAE, VIT)
    images = positions(0, 8, wanted)["global"][:, 0].numpy()
    method = start(wanted).method.eval()
    made = method.pictures(images, wanted.views, (wanted.data.mean, wanted.data.std))
    assert list(made) == ["tokens"]
    assert made["tokens"].width > 300


# BEiT


def _beit() -> tuple[Any, dict[str, torch.Tensor]]:
    wanted = experiment(BEIT, VIT)
    return start(wanted).method.eval(), prepared(positions(0, 8, wanted), wanted)


def test_beits_loss_is_the_cross_entropy_of_the_hidden_patches_tokens():
    method, batch = _beit()
    images, mask = batch["global"][:, 0], batch["global_mask"][:, 0]
    with torch.no_grad():
        loss, metrics = method(batch, start(experiment(BEIT, VIT)).progress)
        features = method.encoder(images, mask=mask, mask_token=method.mask_token)
        scores = method.head(features.patches).log_softmax(-1)  # [8, 16, K]
        tokens = method.tokenizer(images)
    terms, right = [], []
    for image in range(8):
        for patch in range(16):
            if mask[image, patch]:
                terms.append(-scores[image, patch, tokens[image, patch]])
                right.append(scores[image, patch].argmax() == tokens[image, patch])
    assert len(terms) == 8 * round(0.4 * 16)
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    assert float(metrics["token_accuracy"]) == pytest.approx(np.mean(right))


def test_hidden_patches_reach_beits_tokens_and_not_its_prediction():
    method, batch = _beit()
    images, mask = batch["global"][:, 0], batch["global_mask"][:, 0]
    pixels = images.clone()
    hidden = mask.view(8, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    pixels[hidden.expand_as(pixels)] = 5.0
    with torch.no_grad():
        seen = [
            method.encoder(i, mask=mask, mask_token=method.mask_token) for i in (images, pixels)
        ]
        tokens = [method.tokenizer(i) for i in (images, pixels)]
    torch.testing.assert_close(seen[0], seen[1])
    assert not torch.equal(tokens[0], tokens[1])


def test_the_tokens_are_those_of_the_trained_tokenizer():
    method, batch = _beit()
    images = batch["global"][:, 0]
    trained: Any = run_pictures.method_of(Checkpoint.open(tokenizer_run())).method.eval()
    with torch.no_grad():
        expected, _ = trained.reconstruct(images)
    assert torch.equal(method.train().tokenizer(images), expected)


def test_the_tokenizer_stays_as_it_is_and_is_in_no_checkpoint():
    wanted = experiment(BEIT, VIT)
    state = start(wanted)
    tokenizer: Any = state.method.get_submodule("tokenizer")
    before = copy.deepcopy(dict(tokenizer.named_buffers()))
    train_for(state, wanted, 2)
    for name, value in tokenizer.named_buffers():
        assert torch.equal(value, before[name]), name
    assert not [name for name in weights(state) if name.startswith("tokenizer.")]


def test_images_of_another_size_are_shown_to_the_tokenizer_in_its_own():
    larger = replace(VIT, image_size=32, patch_size=8)
    wanted = experiment(BEIT, larger)
    (step,) = train_for(start(wanted), wanted, 1)
    assert torch.isfinite(step.loss)


# Which tokenizer


def other_tokenizer(folder: Any) -> str:
    wanted = experiment(VQVAE, VIT)
    state = start(replace(wanted, seed=1))
    train_for(state, wanted, 1)
    checkpoint.save(state, wanted, Location.of(folder), loss=1.0)
    return str(folder)


def test_a_run_says_which_tokenizer_it_uses():
    tags = BEIT.provenance(VIT, NORMALIZATION)
    found = Checkpoint.open(tokenizer_run())
    assert tags["tokenizer"] == found.location.uri
    assert tags["tokenizer.sha256"] == found.manifest["files"]["state.safetensors"]["sha256"]
    assert tags["tokenizer.run"] == found.experiment().run_name


def test_a_checkpoint_is_continued_with_its_own_tokenizer_alone(tmp_path):
    wanted = experiment(BEIT, VIT)
    saved = start(wanted).state_dict()
    start(wanted).load_state_dict(saved)
    other = replace(BEIT, tokenizer=other_tokenizer(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"is not the tokenizer of the checkpoint: its sha256 is"):
        start(experiment(other, VIT)).load_state_dict(saved)


def test_a_new_run_may_begin_with_anothers_weights_and_a_tokenizer_for_larger_images(tmp_path):
    first = start(experiment(BEIT, BEIT_ENCODER))
    larger = replace(VIT, image_size=32)
    tokenizer = experiment(VQVAE, larger)
    checkpoint.save(start(tokenizer), tokenizer, Location.of(tmp_path), loss=1.0)
    wanted = experiment(
        replace(BEIT, tokenizer=str(tmp_path)), replace(BEIT_ENCODER, image_size=32)
    )
    second = start(wanted)
    second.load_weights(first.state_dict())
    head = "head.weight"
    assert torch.equal(weights(second)[head], weights(first)[head])
    assert all(torch.isfinite(step.loss) for step in train_for(second, wanted, 2))


def test_paths_are_made_absolute_for_workers(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert replace(BEIT, tokenizer="runs/one").located().tokenizer == str(tmp_path / "runs/one")
    assert replace(BEIT, tokenizer="").located().tokenizer == ""


def test_an_encoder_with_a_pooling_of_its_own_gives_every_parameter_a_gradient():
    pooled = replace(VIT, name="vit_base_patch16_reg4_gap_256", position="learned")
    for method in (VQVAE, BEIT):
        wanted = experiment(method, pooled)
        state = start(wanted)
        batch = prepared(positions(0, 8, wanted), wanted)
        loss, _ = state.method(batch, state.progress)
        loss.backward()
        assert [n for n, p in state.method.named_parameters() if p.grad is None] == []


def test_a_missing_tokenizer_is_told_with_the_way_to_train_one(tmp_path):
    for path, message in (
        ("", "method.tokenizer names no tokenizer: train one with experiments/train_tok"),
        (str(tmp_path / "gone"), "there is nothing at .*gone: train one with"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            replace(BEIT, tokenizer=path).provenance(VIT, NORMALIZATION)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            start(experiment(replace(BEIT, tokenizer=path), VIT))


def test_a_checkpoint_of_another_method_is_no_tokenizer(tmp_path):
    wanted = experiment(MAE)
    checkpoint.save(start(wanted), wanted, Location.of(tmp_path), loss=1.0)
    with pytest.raises(ValueError, match="is a checkpoint of mae, not of a tokenizer: train one"):
        replace(BEIT, tokenizer=str(tmp_path)).provenance(VIT, NORMALIZATION)


def test_a_damaged_tokenizer_is_told(tmp_path):
    shutil.copytree(tokenizer_run(), tmp_path / "copy")
    (file,) = (tmp_path / "copy").rglob("state.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"state.safetensors is damaged"):
        TokenizerFile.open(str(file.parent), VIT).load()


def test_a_tokenizer_of_another_grid_or_normalisation_is_refused():
    finer = replace(VIT, patch_size=2)
    with pytest.raises(ValueError, match=r"into 4 x 4 tokens and encoder.name .* into 8 x 8 patch"):
        BEIT.provenance(finer, NORMALIZATION)
    with pytest.raises(ValueError, match=r"give its --data.mean and --data.std"):
        BEIT.provenance(VIT, (IMAGENET_MEAN, (1.0, 1.0, 1.0)))


def test_beit_refuses_a_resnet_and_other_methods_name_no_tokenizer():
    with pytest.raises(ValueError, match=r"BEiT hides patches, so it needs a ViT, not enc"):
        experiment(BEIT, RESNET)
    assert MAE.provenance(VIT, NORMALIZATION) == {}
