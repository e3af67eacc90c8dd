"""The contract of a method, for every file in methods/; then what is MAE's and SimCLR's own."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from helpers import (
    BEIT,
    MAE,
    RESNET,
    SIMCLR,
    VIT,
    all_methods,
    batches,
    differing,
    experiment,
    positions,
    prepared,
    relative_error,
    start,
    tiny,
    train_for,
    weights,
)
from selfray import config
from selfray.contract import CHECKS, Check
from selfray.method import MethodConfig
from selfray.methods import mae as mae_file
from selfray.methods.byol import BYOLConfig
from selfray.methods.dino import DINOConfig
from selfray.methods.dinov2 import DINOv2Config
from selfray.methods.mae import MAEConfig
from selfray.methods.moco import MoCoConfig
from selfray.methods.mocov3 import MoCoV3Config
from selfray.methods.simclr import SimCLRConfig
from selfray.models.decoder import patchify, unpatchify
from selfray.models.encoder import EncoderConfig
from selfray.schedules import Constant
from selfray.views import View

every_method = pytest.mark.parametrize("method", all_methods(), ids=lambda method: method.name)


@every_method
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_method_keeps_the_contract(check: Check, method: MethodConfig):
    check(method)


def test_a_resnet_s_batch_norms_forbid_micro_batches_whatever_the_method():
    with pytest.raises(ValueError, match="loss of dino: the batch norms of resnet18 would see mic"):
        experiment(tiny(DINOConfig), RESNET, accumulate=2)


def test_batch_norms_of_other_encoders_forbid_them_too():
    wanted = experiment(tiny(DINOConfig), EncoderConfig("regnety_002", 32), accumulate=2)
    with pytest.raises(ValueError, match="accumulate 2: the batch norms of regnety_002 would see"):
        start(wanted)


# MAE


def test_mae_s_encoder_sees_exactly_a_quarter_of_the_patches():
    wanted = experiment(MAE)
    state = start(wanted)
    seen = []
    backbone: Any = state.method.encoder.backbone
    backbone.blocks[0].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape)
    )
    train_for(state, wanted, 1)
    assert seen == [(8, 16 // 4 + 1, 32)], "4 of 16 patches and the class token"


@pytest.mark.parametrize(("ratio", "visible"), [(0.75, 4), (0.5, 8), (0.9, 1), (0.1, 14)])
def test_the_mask_ratio_sets_how_many_patches_are_seen(ratio, visible):
    wanted = experiment(replace(MAE, mask_ratio=ratio))
    mask = positions(0, 8, wanted)["global_mask"]
    assert (~mask).sum(-1).flatten().tolist() == [visible] * 8


def _mae() -> tuple[mae_file.MAE, torch.Tensor, torch.Tensor]:
    wanted = experiment(MAE)
    method = start(wanted).method.eval()
    assert isinstance(method, mae_file.MAE)
    batch = prepared(positions(0, 8, wanted), wanted)
    return method, batch["global"][:, 0], batch["global_mask"][:, 0]


def test_masked_patches_do_not_reach_mae_s_prediction():
    method, images, mask = _mae()
    changed = patchify(images, 4)
    changed[mask] = 1e3
    with torch.no_grad():
        expected = method.reconstruct(images, mask)
        assert torch.equal(method.reconstruct(unpatchify(changed, 4), mask), expected)
        changed[~mask] += 1.0
        assert not torch.equal(method.reconstruct(unpatchify(changed, 4), mask), expected)


def test_mae_s_decoder_puts_each_visible_patch_back_in_its_place():
    # The same picture under two masks: where decoder and encoder are blind to all but a patch's
    # own place, a mixed-up order would show as another error.
    method, images, _ = _mae()
    masks = torch.ones(2, 16, dtype=torch.bool)
    masks[0, [0, 6, 9, 15]] = False
    masks[1, [1, 6, 8, 12]] = False
    seen = []
    method.decoder.blocks.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        method.reconstruct(images[:2], masks)
        positions_ = method.get_buffer("decoder.positions")
        tokens = seen[0][:, 1:] - positions_  # [2, N, W]: what stood at each place
        for image in range(2):
            visible = (~masks[image]).nonzero().flatten()
            features = method.encoder(images[image : image + 1], visible[None]).patches[0]
            torch.testing.assert_close(
                tokens[image, visible], method.decoder.embed(features), rtol=1e-4, atol=1e-5
            )
            hidden = tokens[image, masks[image]]
            torch.testing.assert_close(
                hidden, method.mask_token[0].expand_as(hidden), rtol=1e-4, atol=1e-5
            )


def test_mae_s_loss_is_that_of_its_prediction_on_hidden_patches():
    method, images, mask = _mae()
    with torch.no_grad():
        batch = {"global": images[:, None], "global_mask": mask[:, None]}
        loss, _ = method(batch, start(experiment(MAE)).progress)
        predicted, target = method.reconstruct(images, mask), patchify(images, 4)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    assert float(loss) == pytest.approx(float((predicted - target)[mask].square().mean()), rel=1e-5)


def test_patches_are_cut_in_row_major_order_and_put_together_again():
    images = torch.randn(2, 3, 12, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 9, 48)
    for number in range(9):
        row, column = divmod(number, 3)
        cell = images[:, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
        assert torch.equal(patches[:, number], cell.permute(0, 2, 3, 1).reshape(2, 48))
    assert torch.equal(unpatchify(patches, 4), images)


def test_mae_asks_for_one_view_with_a_mask_over_the_encoders_patches():
    (view,) = MAE.views(VIT)["global"]
    assert (view.size, view.grid) == (16, 4)
    assert view.mask is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 1.2}, r"mask_ratio must lie in \(0, 1\), got 1.2"),
        ({"mask_ratio": 0.0}, r"mask_ratio must lie in \(0, 1\), got 0.0"),
        (
            {"decoder_width": 30, "decoder_heads": 4},
            "decoder_heads 4 does not divide decoder_width 30",
        ),
        ({"decoder_width": 6, "decoder_heads": 2}, "decoder_width must be a multiple of 4, got 6"),
    ],
)
def test_mae_refuses_settings_outside_their_range(settings, message):
    with pytest.raises(ValueError, match=message):
        MAEConfig(**settings)


def test_mae_refuses_relative_positions_and_views_of_another_size():
    with pytest.raises(ValueError, match="relative positions of beit_base_patch16_224 need all"):
        experiment(MAE, BEIT)
    with pytest.raises(ValueError, match=r"method.view.size 8 is not encoder.image_size 16: leave"):
        experiment(replace(MAE, view=replace(MAE.view, size=8)))


def test_views_that_are_no_whole_patches_or_differ_in_size_are_refused():
    odd = replace(tiny(DINOConfig), first_view=View(size=18), second_view=View(size=18))
    with pytest.raises(ValueError, match="a view's size 18 is not a multiple of the enc"):
        experiment(odd, VIT)
    unlike = replace(tiny(DINOConfig), first_view=View(size=8))
    with pytest.raises(ValueError, match="the global views have 8 and 16 pixels: give them one si"):
        experiment(unlike, VIT)


def test_mae_refuses_a_resnet_and_says_what_to_give():
    with pytest.raises(ValueError, match=r"needs a ViT, not encoder.name resnet18: give --encoder"):
        experiment(MAE, RESNET)


# SimCLR


def test_simclr_asks_for_two_views_drawn_alike():
    first, second = SIMCLR.views(RESNET)["global"]
    assert first == second
    assert first.size == 16


def test_simclr_works_with_a_vit():
    wanted = experiment(SIMCLR, VIT)
    (step,) = train_for(start(wanted), wanted, 1)
    assert torch.isfinite(step.loss)


def test_a_lower_temperature_is_another_loss():
    losses = []
    for temperature in (0.1, 0.5):
        wanted = experiment(replace(SIMCLR, temperature=temperature))
        losses.append(float(train_for(start(wanted), wanted, 1)[0].loss))
    assert losses[0] != losses[1]


def test_simclr_does_not_care_which_view_comes_first_nor_which_image():
    wanted = experiment(SIMCLR)
    batch = prepared(next(batches(wanted)), wanted)["global"]
    order = torch.randperm(8)
    losses = []
    for views in (batch, batch.flip(1), batch[order]):
        state = start(wanted)
        loss, _ = state.method({"global": views}, state.progress)
        losses.append(loss.detach())
    assert relative_error(losses[1], losses[0]) < 1e-4
    assert relative_error(losses[2], losses[0]) < 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"projector_layers": 4}, r"projector_layers must be 2 \(v1\) or 3 \(v2\), got 4"),
        ({"projector_width": 0}, "projector_width must be positive, got 0"),
    ],
)
def test_simclr_refuses_settings_outside_their_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SimCLRConfig(**settings)


# Teachers


@pytest.mark.parametrize("method", [tiny(BYOLConfig), tiny(MoCoConfig), tiny(DINOConfig)])
def test_a_teacher_is_the_running_mean_of_its_student(method: MethodConfig):
    wanted = experiment(config.override(method, momentum=Constant(0.75)))
    state = start(wanted)
    pairs = {
        "byol": ("encoder", "target_encoder"),
        "moco": ("encoder", "key_encoder"),
        "dino": ("student", "encoder"),
    }
    student, teacher = (state.method.get_submodule(name) for name in pairs[method.name])
    before = [parameter.clone() for parameter in teacher.parameters()]
    train_for(state, wanted, 1)
    for old, new, followed in zip(before, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * followed)


def test_teachers_get_no_gradient_and_no_place_in_the_optimizer():
    state = start(experiment(tiny(DINOConfig)))
    optimized = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    for part in ("encoder", "teacher_head"):
        for parameter in state.method.get_submodule(part).parameters():
            assert not parameter.requires_grad
            assert id(parameter) not in optimized


def test_a_teacher_skips_no_block():
    deep = replace(VIT, drop_path=0.5)
    teacher, student = (
        start(experiment(tiny(DINOConfig), deep)).method.train().get_submodule(name)
        for name in ("encoder", "student")
    )
    images = torch.randn(4, 3, 16, 16)
    torch.manual_seed(0)
    assert torch.equal(teacher(images).cls, teacher(images).cls)
    assert not torch.equal(student(images).cls, student(images).cls)


# BYOL


def test_byol_s_target_normalises_by_the_batch_as_the_paper_s_does():
    wanted = experiment(tiny(BYOLConfig))
    state = start(wanted)
    statistics = state.method.get_submodule("target_encoder.backbone.bn1").get_buffer(
        "running_mean"
    )
    before = statistics.clone()
    train_for(state, wanted, 1)
    assert not torch.equal(statistics, before), "the target ran in eval mode"


def test_byol_s_loss_does_not_care_which_view_comes_first():
    wanted = experiment(tiny(BYOLConfig))
    batch = prepared(next(batches(wanted)), wanted)["global"]
    losses = [
        start(wanted).method({"global": views}, start(wanted).progress)[0]
        for views in (batch, batch.flip(1))
    ]
    assert relative_error(losses[1], losses[0]) < 1e-5


# MoCo


def test_mocos_queue_takes_the_keys_in_order_and_wraps_around():
    wanted = experiment(replace(tiny(MoCoConfig), queue_size=20), VIT)  # 20 = 2.5 batches
    state = start(wanted)
    seen = []
    for step in range(4):
        before = state.method.get_buffer("queue").clone()
        train_for(state, wanted, 1)
        queue = state.method.get_buffer("queue")
        changed = (queue != before).any(1).nonzero().flatten().tolist()
        seen.append(changed)
        assert int(state.method.get_buffer("pointer")) == 8 * (step + 1) % 20
        torch.testing.assert_close(queue.norm(dim=1), torch.ones(20))
    assert seen[:2] == [list(range(8)), list(range(8, 16))]
    assert seen[2] == [0, 1, 2, 3, 16, 17, 18, 19]
    assert seen[3] == list(range(4, 12))


def test_a_batch_that_does_not_fit_into_mocos_queue_is_refused_at_the_door():
    with pytest.raises(ValueError, match="batch_size 8 is larger than the queue: give --method"):
        experiment(replace(tiny(MoCoConfig), queue_size=7))


def test_moco_v1_has_a_linear_head_and_v2_a_hidden_layer_without_batch_norm():
    heads = {
        kind: [
            type(module).__name__
            for module in start(experiment(replace(tiny(MoCoConfig), head=kind)))
            .method.get_submodule("head")
            .children()
        ]
        for kind in ("linear", "mlp")
    }
    assert heads == {"linear": ["Linear"], "mlp": ["Linear", "ReLU", "Linear"]}


# MoCo v3


def test_moco_v3_keeps_a_vits_patch_embedding_and_trains_it_where_asked():
    moved = {}
    for freeze in (True, False):
        wanted = experiment(replace(tiny(MoCoV3Config), freeze_patches=freeze), VIT)
        state = start(wanted)
        before = weights(state)
        train_for(state, wanted, 2)
        moved[freeze] = "encoder.backbone.patch_embed.proj.weight" in differing(
            before, weights(state)
        )
    assert moved == {True: False, False: True}


def test_moco_v3_ends_its_heads_with_a_batch_norm_without_weights():
    method = start(experiment(tiny(MoCoV3Config), VIT)).method
    for name, layers in (("projector", 3), ("predictor", 2)):
        head = list(method.get_submodule(name).children())
        assert sum(isinstance(module, nn.Linear) for module in head) == layers
        assert list(head[-1].parameters()) == []


# DINO


def _remember_shape(shapes: list[torch.Size], module: nn.Module, inputs: Any) -> None:
    shapes.append(inputs[0].shape)


def test_dino_s_teacher_sees_global_crops_alone_and_its_student_all():
    wanted = experiment(tiny(DINOConfig), VIT)
    state = start(wanted)
    seen: dict[str, list[torch.Size]] = {"student": [], "encoder": []}
    for name, sizes in seen.items():
        state.method.get_submodule(name).register_forward_pre_hook(partial(_remember_shape, sizes))
    batch = prepared(positions(0, 8, wanted), wanted)
    state.method(batch, state.progress)
    assert seen == {
        "student": [(8 * 2, 3, 16, 16), (8 * 2, 3, 8, 8)],
        "encoder": [(8 * 2, 3, 16, 16)],
    }


def test_dino_s_centre_is_the_running_mean_of_the_teachers_logits():
    wanted = experiment(replace(tiny(DINOConfig), center_momentum=0.9), VIT)
    state = start(wanted)
    batch = positions(0, 8, wanted)
    method: Any = state.method
    with torch.no_grad():
        images = prepared(batch, wanted)["global"].flatten(0, 1)
        logits = method.teacher_head(method.encoder(images).cls)
    train_for(state, wanted, 1, iter([batch]))
    torch.testing.assert_close(method.centering.center, 0.1 * logits.mean(0), rtol=1e-4, atol=1e-6)


def test_dino_s_prototypes_and_their_lengths_stand_still_at_first():
    wanted = experiment(replace(tiny(DINOConfig), freeze_prototypes=0.02, free_norms=True), VIT)
    state = start(wanted)  # 100 steps, of which the first 2 are 2 %
    head = state.method.get_submodule("student_head")
    last_layer = [head.get_parameter("prototypes.weight"), head.get_parameter("norms")]
    before = [tensor.clone() for tensor in last_layer]
    train_for(state, wanted, 2)
    assert all(map(torch.equal, last_layer, before))
    train_for(state, wanted, 1)
    assert not any(map(torch.equal, last_layer, before))


def test_dino_s_loss_is_the_teachers_entropy_and_the_divergence_from_it():
    wanted = experiment(tiny(DINOConfig), VIT)
    state = start(wanted)
    method: Any = state.method
    batch = positions(0, 8, wanted)
    with torch.no_grad():
        images = prepared(batch, wanted)["global"].flatten(0, 1)
        teacher = (method.teacher_head(method.encoder(images).cls) / 0.04).softmax(-1)
    (step,) = train_for(state, wanted, 1, iter([batch]))
    entropy = -(teacher * teacher.log()).sum(-1).mean()
    torch.testing.assert_close(step.metrics["teacher_entropy"], entropy, rtol=1e-4, atol=1e-5)
    parts = step.metrics["teacher_entropy"] + step.metrics["divergence"]
    torch.testing.assert_close(parts, step.loss)


def test_dino_s_local_crops_must_be_whole_patches():
    local = replace(tiny(DINOConfig).local_view, size=10)
    with pytest.raises(ValueError, match=r"local_view.size 10 is not a multiple of the enc"):
        experiment(config.override(tiny(DINOConfig), local_view=local), VIT)


def test_dino_runs_without_local_crops():
    wanted = experiment(config.override(tiny(DINOConfig), local_crops=0), VIT)
    (step,) = train_for(start(wanted), wanted, 1)
    assert torch.isfinite(step.loss)
    assert set(wanted.views) == {"global"}


# DINOv2


def _dinov2(**changes: Any) -> tuple[Any, dict[str, torch.Tensor], Any]:
    wanted = experiment(replace(tiny(DINOv2Config), **changes), VIT)
    state = start(wanted)
    return state.method, prepared(positions(0, 8, wanted), wanted), state.progress


def test_dinov2s_loss_is_the_weighted_sum_of_its_three():
    method, batch, progress = _dinov2(patch_weight=0.5, koleo_weight=0.2)
    loss, parts = method(batch, progress)
    expected = parts["image_loss"] + 0.5 * parts["patch_loss"] + 0.2 * parts["koleo"]
    torch.testing.assert_close(loss.detach(), expected)
    assert all(float(parts[name]) != 0 for name in ("image_loss", "patch_loss", "koleo"))


def test_dinov2s_teacher_sees_whole_images_and_its_student_masked_ones():
    method, batch, progress = _dinov2()
    seen: dict[str, list[Any]] = {"student": [], "encoder": []}
    for name, calls in seen.items():
        method.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, named, calls=calls: calls.append((inputs[0].shape, set(named))),
            with_kwargs=True,
        )
    method(batch, progress)
    assert seen == {
        "encoder": [((16, 3, 16, 16), set())],
        "student": [((16, 3, 16, 16), {"mask", "mask_token"}), ((16, 3, 8, 8), set())],
    }


def test_dinov2_sees_hidden_patches_by_the_teacher_alone():
    method, batch, _ = _dinov2(patch_weight=0.0, koleo_weight=0.0, local_crops=0)
    method.eval()
    mask = batch["global_mask"].clone()
    mask[:] = False
    mask[:, :, 5] = True
    batch["global_mask"] = mask
    images = batch["global"].clone()
    images[..., 4:8, 4:8] = 3.0  # patch 5
    with torch.no_grad():
        first = method.student(
            batch["global"].flatten(0, 1), mask=mask.flatten(0, 1), mask_token=method.mask_token
        )
        second = method.student(
            images.flatten(0, 1), mask=mask.flatten(0, 1), mask_token=method.mask_token
        )
        teachers = [method.encoder(i.flatten(0, 1)).patches for i in (batch["global"], images)]
    torch.testing.assert_close(first, second)
    assert not torch.allclose(teachers[0][:, 5], teachers[1][:, 5])


def test_dinov2s_patches_have_a_head_of_their_own_where_asked():
    shared, _, _ = _dinov2()
    separate, batch, progress = _dinov2(separate_heads=True, patch_prototypes=10)
    assert shared.student_patch_head is None
    assert separate.student_patch_head.prototypes.weight.shape == (10, 16)
    loss, _ = separate(batch, progress)
    loss.backward()
    assert separate.student_patch_head.prototypes.weight.grad.norm() > 0
    assert sum(p.numel() for p in separate.parameters() if p.requires_grad) > sum(
        p.numel() for p in shared.parameters() if p.requires_grad
    )


def test_dinov2s_crops_that_hide_nothing_have_no_part_in_the_patches_loss():
    method, batch, progress = _dinov2()
    batch["global_mask"] = torch.zeros_like(batch["global_mask"])
    loss, parts = method(batch, progress)
    loss.backward()
    assert float(parts["patch_loss"]) == 0
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_dinov2s_patch_centre_is_the_mean_over_hidden_patches():
    wanted = experiment(tiny(DINOv2Config), VIT)
    state = start(wanted)
    method: Any = state.method
    batch = positions(0, 8, wanted)
    with torch.no_grad():
        ready = prepared(batch, wanted)
        patches = method.encoder(ready["global"].flatten(0, 1)).patches
        logits = method.teacher_head(patches[ready["global_mask"].flatten(0, 1)])
    train_for(state, wanted, 1, iter([batch]))
    torch.testing.assert_close(
        method.patch_centering.center, 0.1 * logits.mean(0), rtol=1e-4, atol=1e-6
    )


def test_dinov2_balances_by_sinkhorn_where_asked():
    method, batch, progress = _dinov2(centering="sinkhorn", prototypes=4)
    probabilities, _ = method._teacher_targets(method.targets(batch, progress), progress)
    used = probabilities.flatten(0, 1).sum(0)  # of 16 crops
    torch.testing.assert_close(used, torch.full((4,), 4.0), rtol=0.2, atol=0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masked_share": 0.0}, r"masked_share must lie in \(0, 1\], got 0.0"),
        ({"mask_ratio": (0.5, 0.1)}, "mask_ratio must be shares"),
        ({"koleo_weight": -1.0}, "koleo_weight must be at least 0, got -1.0"),
        ({"centering": "mean"}, "centering must be one of softmax, sinkhorn, got 'mean'"),
    ],
)
def test_dinov2_refuses_settings_outside_their_range(settings, message):
    with pytest.raises(ValueError, match=message):
        DINOv2Config(**settings)


def test_dinov2_refuses_a_resnet_and_relative_positions_with_local_crops():
    with pytest.raises(ValueError, match="DINOv2 hides patches, so it needs a ViT, not encoder"):
        experiment(tiny(DINOv2Config), RESNET)
    with pytest.raises(ValueError, match=r"local_view.size 8 is not encoder.image_size 16, but"):
        experiment(tiny(DINOv2Config), BEIT)
    experiment(replace(tiny(DINOv2Config), local_crops=0), BEIT)
