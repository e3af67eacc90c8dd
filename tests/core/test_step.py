"""What a step is made of: batches that arrive ahead, cached gradients, compiled and recomputed
blocks, and what is said when memory is too small."""

import logging
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.layers import Attention
from torch import nn

from helpers import (
    BEIT,
    MAE,
    PLAIN_SGD,
    RESNET,
    SIMCLR,
    VIT,
    all_methods,
    batches,
    differing,
    experiment,
    first_move,
    positions,
    prepared,
    start,
    tiny,
    train_for,
    weights,
)
from selfray.method import ComparingMethod, hidden_places
from selfray.methods.beit import BEiTConfig
from selfray.methods.dino import DINOConfig
from selfray.methods.dinov2 import DINOv2Config
from selfray.models.encoder import EncoderConfig
from selfray.optim import load_optimizer
from selfray.step import compiled, devices, memory
from selfray.train import TrainState

CPU = torch.device("cpu")
SMALL_SGD = replace(PLAIN_SGD, base_learning_rate=0.01)


# Batches


def test_a_reader_ahead_gives_every_item_in_order_and_is_two_ahead_at_most():
    read, taken = [], []

    def items():
        for number in range(20):
            read.append(number)
            yield number

    for item in devices.read_ahead(items(), lambda number: number * 10):
        # What has been prepared, what waits to be put, and what was given.
        assert len(read) <= len(taken) + devices.AHEAD + 2
        taken.append(item)
    assert taken == list(range(0, 200, 10))


def test_what_a_reader_raises_comes_after_the_items_before_it():
    def items():
        yield 1
        raise ValueError("the third shard is gone")

    ahead = devices.read_ahead(items(), lambda number: number)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="the third shard is gone"):
        next(ahead)


def test_a_closed_reader_ends_its_thread():
    def endless():
        while True:
            yield 0

    ahead = devices.read_ahead(endless(), lambda number: number)
    next(ahead)
    (thread,) = [t for t in threading.enumerate() if t.name == "read-ahead"]
    ahead.close()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_the_places_of_hidden_patches_are_those_of_the_mask():
    wanted = experiment(tiny(DINOv2Config), VIT)
    batch = positions(0, 4, wanted)
    counted = devices.with_hidden_places(batch)["global_hidden"]
    assert torch.equal(counted, batch["global_mask"].flatten().nonzero()[:, 0])
    assert torch.equal(hidden_places(batch, "global"), counted)
    state = start(wanted)
    ready = prepared(batch, wanted)
    fewer = ready | {"global_hidden": counted[: len(counted) // 2]}
    first, second = (state.method(values, state.progress)[0] for values in (ready, fewer))
    assert float(first.detach()) != float(second.detach())


# Cached gradients


def test_the_methods_that_compare_images_are_those_that_say_so():
    for method in all_methods():
        built = start(experiment(method)).method
        assert isinstance(built, ComparingMethod) == method.compares, method.name


def test_dropped_paths_are_the_same_in_both_passes():
    wanted = experiment(
        SIMCLR, replace(VIT, drop_path=0.5, depth=4), accumulate=2, optimizer=SMALL_SGD
    )
    state = start(wanted)
    seen: list[torch.Tensor] = []
    method: Any = state.method
    own = method.embed

    def spied(batch, progress):
        found = own(batch, progress)
        seen.append(found["cls"].detach().clone())
        return found

    method.embed = spied
    train_for(state, wanted, 1)
    first, second = seen[:2], seen[2:]
    assert len(first) == len(second) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_ghost_norms_take_each_micro_batch_into_their_statistics_once():
    encoder = replace(RESNET, norm="ghost")
    wanted = experiment(SIMCLR, encoder, accumulate=2, optimizer=SMALL_SGD)
    state, plain = start(wanted), start(wanted)
    train_for(state, wanted, 1)
    data = batches(wanted)
    with torch.no_grad():
        for batch in (next(data), next(data)):
            images = prepared(batch, wanted)["global"].flatten(0, 1)
            plain.method.encoder.train()(images)
    ours, theirs = state.method.encoder.state_dict(), plain.method.encoder.state_dict()
    for name in theirs:
        if "running" in name:
            torch.testing.assert_close(ours[name], theirs[name])


def test_group_norms_give_a_resnet_the_gradients_of_the_whole_batch():
    encoder = replace(RESNET, norm="group", channels=(32, 32, 32, 32))
    moves = []
    for accumulate in (1, 4):
        moves.append(
            first_move(experiment(SIMCLR, encoder, accumulate=accumulate, optimizer=SMALL_SGD))
        )
    for name, expected in moves[0].items():
        torch.testing.assert_close(moves[1][name], expected, rtol=1e-3, atol=1e-6, msg=name)


# Recomputed and compiled blocks


@pytest.mark.parametrize("encoder", [VIT, BEIT], ids=["vit", "beit"])
def test_recomputed_blocks_end_in_the_same_weights_bit_for_bit(encoder):
    method = replace(tiny(DINOv2Config), local_crops=0)
    kept = experiment(method, replace(encoder, drop_path=0.3))
    again = replace(kept, encoder=replace(kept.encoder, recompute=True))
    first, second = start(kept), start(again)
    train_for(first, kept, 2)
    train_for(second, again, 2)
    assert differing(weights(first), weights(second)) == []


def test_recomputed_blocks_keep_less_for_the_backward_pass():
    assert kept_bytes(replace(VIT, depth=6, recompute=True)) < 0.3 * kept_bytes(
        replace(VIT, depth=6)
    )


def kept_bytes(encoder: EncoderConfig) -> int:
    """How much memory an encoder's forward leaves for its backward pass."""
    sizes: dict[int, int] = {}

    def keep(values: torch.Tensor) -> torch.Tensor:
        sizes[values.data_ptr()] = values.nbytes
        return values

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda values: values):
        out = encoder.build().train()(torch.randn(16, 3, 16, 16))
    assert out.cls.requires_grad
    return sum(sizes.values())


def test_compiling_changes_no_name_of_a_weight_and_skips_paths_as_before():
    wanted = experiment(tiny(DINOConfig), replace(VIT, depth=5, drop_path=0.3))
    state = start(wanted)
    names = list(state.method.state_dict())
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled.in_place(state.method, CPU, backend="eager")
    train_for(state, wanted, 2)
    assert list(state.method.state_dict()) == names
    # One for a probe, and one for a block with and without skipped paths, of the student at both
    # sizes and of the teacher: not one for each of ten blocks.
    assert counters["stats"]["unique_graphs"] <= 7
    torch._dynamo.reset()


def test_skipped_paths_keep_their_share_and_their_mean():
    torch.manual_seed(0)
    path = compiled.SkippedPath(0.25, CPU).train()
    out = path(torch.ones(10_000, 2))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert float(out.mean()) == pytest.approx(1, abs=0.03)
    assert torch.equal(out[:, 0], out[:, 1])
    assert torch.equal(path.eval()(out), out)


def test_a_machine_without_a_compiler_is_told_in_one_line_and_trains(caplog, monkeypatch):
    monkeypatch.setattr(torch, "compile", _no_compiler)
    wanted = experiment(MAE, compile=True)
    with caplog.at_level(logging.WARNING):
        steps = train_for(start(wanted), wanted, 2)
    (record,) = caplog.records
    assert record.getMessage() == (
        "compile: impossible on this machine, the run continues uncompiled: no compiler found"
    )
    assert len(steps) == 2


def _no_compiler(function, **_):
    def call(*_, **__):
        raise RuntimeError("no compiler found\nin any folder")

    return call


def test_a_part_that_cannot_be_compiled_is_told_and_runs_as_it_is(caplog):
    def broken(graph, inputs):
        raise ValueError("no kernel for this")

    module = nn.Sequential(nn.Linear(2, 2))
    module._compiled_call_impl = compiled._or_plain(module, broken)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, logger=compiled.__name__):
        out = module(torch.ones(1, 2))
        module(torch.ones(1, 2))
    assert out.shape == (1, 2)
    messages = [r.getMessage() for r in caplog.records if r.name == compiled.__name__]
    assert len(messages) == 1
    assert "Sequential cannot be compiled and runs uncompiled" in messages[0]


@pytest.mark.long
def test_a_compiled_run_has_the_losses_of_an_eager_one():
    wanted = experiment(MAE, optimizer=SMALL_SGD)
    eager = train_for(start(wanted), wanted, 3)
    other = replace(wanted, compile=True)
    fast = train_for(start(other), other, 3)
    for one, two in zip(eager, fast, strict=True):
        torch.testing.assert_close(two.loss, one.loss, rtol=1e-3, atol=0)
    torch._dynamo.reset()


def test_attention_is_fused():
    for method, encoder in ((MAE, VIT), (tiny(BEiTConfig), BEIT)):
        modules = start(experiment(method, encoder)).method.modules()
        attention = [m for m in modules if hasattr(m, "fused_attn") or isinstance(m, Attention)]
        assert attention
        assert all(module.fused_attn for module in attention)


# Memory, and states


def test_out_of_memory_names_the_batch_and_what_would_need_less():
    wanted = experiment(SIMCLR, VIT, batch_size=64, workers=2)
    with (
        pytest.raises(torch.OutOfMemoryError) as told,
        memory.explained(wanted, torch.device("cuda", 1)),
    ):
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB.\nMore of it.")
    message = str(told.value)
    assert "\n" not in message
    for part in (
        "out of memory on cuda:1: a micro-batch of 32 images of 16 pixels",
        "--encoder.recompute True",
        "--accumulate 2 (micro-batches of 16, the same loss)",
        "--batch-size 32",
        "--precision bf16",
        "Torch says: Tried to allocate 2 GiB.",
    ):
        assert part in message


def test_what_cannot_accumulate_is_not_told_to():
    wanted = experiment(SIMCLR, RESNET)
    assert "--accumulate" not in memory.advice(wanted, CPU, "")
    assert "--encoder.recompute" not in memory.advice(wanted, CPU, "")


def test_an_optimizer_keeps_how_it_computes_when_it_takes_over_a_state():
    wanted = experiment(MAE)
    theirs, ours = start(wanted), start(wanted)
    train_for(theirs, wanted, 1)
    saved = theirs.optimizer.state_dict()
    for group in saved["param_groups"]:
        group["fused"] = True
    load_optimizer(ours.optimizer, saved)
    assert {group["fused"] for group in ours.optimizer.param_groups} == {None}
    assert ours.optimizer.state_dict()["state"].keys() == saved["state"].keys()
    saved["param_groups"] = saved["param_groups"][:1]
    with pytest.raises(ValueError, match="it has 1 groups, not"):
        load_optimizer(ours.optimizer, saved)


def test_sharding_alone_is_refused():
    with pytest.raises(ValueError, match="shard fsdp needs several workers: give --workers 2"):
        TrainState.start(experiment(MAE, workers=2, shard="fsdp"), 100)
