"""Two and four real processes that talk gloo, against one that sees the whole global batch.

Run as a script, this file is what the processes do: all cases in one start, since importing
torch is what takes the time.
"""

import math
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from helpers import (
    BEIT,
    MAE,
    PLAIN_SGD,
    RESNET,
    SIMCLR,
    VIT,
    batches,
    differing,
    experiment,
    start,
    tiny,
    train_for,
)
from selfray import distributed
from selfray.distributed import GlobalBatchNorm, with_global_batchnorm
from selfray.experiment import Experiment
from selfray.methods.beit import BEiTConfig
from selfray.methods.byol import BYOLConfig
from selfray.methods.dino import DINOConfig
from selfray.methods.dinov2 import DINOv2Config
from selfray.methods.moco import MoCoConfig
from selfray.methods.mocov3 import MoCoV3Config
from selfray.methods.vqvae import VQVAEConfig
from selfray.optim import OptimizerConfig

WORLDS = (2, 4)
STEPS = 3
SMALL_STEPS = replace(PLAIN_SGD, base_learning_rate=0.05, momentum=0.9)
SMALLER_STEPS = replace(SMALL_STEPS, base_learning_rate=0.01)
"""Batch norms of two-dimensional batches make rounding grow from step to step."""
ADAMW = OptimizerConfig("adamw", base_learning_rate=1e-3, scaling="none")

RUNS: dict[str, Experiment] = {
    "simclr": experiment(replace(SIMCLR, temperature=0.5), RESNET, optimizer=SMALL_STEPS),
    "simclr with a vit": experiment(SIMCLR, VIT, optimizer=SMALL_STEPS),
    "mae": experiment(MAE, optimizer=SMALL_STEPS),
    "mae in micro-batches": experiment(MAE, optimizer=SMALL_STEPS, accumulate=2),
    "mae clipped": experiment(MAE, optimizer=replace(SMALL_STEPS, clip_norm=0.05)),
    "mae by adamw": experiment(MAE, optimizer=ADAMW),
    "byol": experiment(tiny(BYOLConfig), RESNET, optimizer=SMALLER_STEPS),
    # With a ResNet, MoCo's batch norms are each rank's own by definition: nothing would be equal.
    "moco": experiment(tiny(MoCoConfig), VIT, optimizer=SMALL_STEPS),
    "mocov3 with a vit": experiment(tiny(MoCoV3Config), VIT, optimizer=SMALLER_STEPS),
    "mocov3 with a resnet": experiment(tiny(MoCoV3Config), RESNET, optimizer=SMALLER_STEPS),
    "dino": experiment(tiny(DINOConfig), VIT, optimizer=SMALL_STEPS),
    "dino with a resnet": experiment(tiny(DINOConfig), RESNET, optimizer=SMALLER_STEPS),
    "dinov2": experiment(tiny(DINOv2Config), VIT, optimizer=SMALL_STEPS),
    "dinov2 by sinkhorn with two heads": experiment(
        replace(tiny(DINOv2Config), centering="sinkhorn", separate_heads=True),
        VIT,
        optimizer=SMALL_STEPS,
    ),
    "beit": experiment(tiny(BEiTConfig), BEIT, optimizer=SMALL_STEPS),
    "beit in micro-batches": experiment(
        tiny(BEiTConfig), BEIT, optimizer=SMALL_STEPS, accumulate=2
    ),
    "vqvae": experiment(tiny(VQVAEConfig), VIT, optimizer=SMALL_STEPS),
    "vqvae in micro-batches": experiment(
        tiny(VQVAEConfig), VIT, optimizer=SMALL_STEPS, accumulate=2
    ),
    "dino in micro-batches": experiment(tiny(DINOConfig), VIT, optimizer=SMALL_STEPS, accumulate=2),
    # By cached gradients: the whole batch is compared.
    "simclr with a vit in micro-batches": experiment(
        SIMCLR, VIT, optimizer=SMALL_STEPS, accumulate=2
    ),
    "byol with a vit in micro-batches": experiment(
        tiny(BYOLConfig), VIT, optimizer=SMALLER_STEPS, accumulate=2
    ),
    "mocov3 with a vit in micro-batches": experiment(
        tiny(MoCoV3Config), VIT, optimizer=SMALLER_STEPS, accumulate=2
    ),
    "dinov2 in micro-batches, blocks recomputed": experiment(
        tiny(DINOv2Config), replace(VIT, recompute=True), optimizer=SMALL_STEPS, accumulate=2
    ),
    "mae sharded, by adamw and clipped": experiment(
        MAE, optimizer=replace(ADAMW, clip_norm=0.05), workers=2, shard="fsdp"
    ),
    "dinov2 by sinkhorn, sharded, in micro-batches, blocks recomputed": experiment(
        replace(tiny(DINOv2Config), centering="sinkhorn"),
        replace(VIT, recompute=True),
        optimizer=SMALL_STEPS,
        accumulate=2,
        workers=2,
        shard="fsdp",
    ),
}

AMONG_FOUR = (
    "simclr",  # gathers embeddings; batch norms over all ranks
    "mae in micro-batches",  # gradients alone are averaged
    "moco",  # keys are shuffled, a queue is kept equal
    "dino",  # a centre is averaged
    "dinov2 by sinkhorn with two heads",  # Sinkhorn-Knopp and KoLeo over all ranks
    "vqvae",  # a codebook is averaged
    "mocov3 with a vit in micro-batches",  # gradients are cached, then averaged
    "dinov2 by sinkhorn, sharded, in micro-batches, blocks recomputed",  # weights are shared out
)
"""One run for each kind of communication: what holds between two ranks is shown among four."""


def runs_of(world: int) -> tuple[str, ...]:
    return AMONG_FOUR if world == 4 else tuple(RUNS)


def trained(wanted: Experiment, rank: int, ranks: int) -> dict[str, Any]:
    """A few steps of one rank: its losses, the gradients of the first step, and its last state."""
    state = start(wanted)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        # timm begins with a zero at the end of each residual branch: nothing would flow there.
        for parameter in state.method.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.add_(distributed.shared_out(noise, parameter))
    gradients: dict[str, Tensor] = {}
    own_before_step = state.method.before_step

    def look(progress):
        if not gradients:
            for name, parameter in state.method.named_parameters():
                if not parameter.requires_grad:
                    continue
                assert parameter.grad is not None
                gradients[name] = distributed.whole(parameter.grad).clone()
        own_before_step(progress)

    state.method.before_step = look
    data = batches(wanted, rank=rank, ranks=ranks)
    steps = train_for(state, wanted, STEPS, data)
    return {
        "losses": torch.stack([step.loss for step in steps]),
        "norms": torch.stack([step.gradient_norm for step in steps]),
        "gradients": gradients,
        "weights": state.state_dict()["method"],
    }


HANDED_OVER = experiment(tiny(DINOv2Config), VIT, optimizer=SMALL_STEPS, workers=2)


def handed_over(rank: int, ranks: int) -> dict[str, Any]:
    """Three steps: the first sharded, the second not, the third sharded; each goes on from the
    state that the one before has saved."""
    saved: dict[str, Any] | None = None
    for step, kind in enumerate(("fsdp", "none", "fsdp")):
        wanted = replace(HANDED_OVER, shard=kind)  # type: ignore[arg-type]
        state = start(wanted if saved is None else replace(wanted, seed=9))
        if saved is not None:
            state.load_state_dict(saved)
        train_for(state, wanted, 1, batches(wanted, step, rank, ranks))
        saved = state.state_dict()
    assert saved is not None
    return {"weights": saved["method"], "optimizer": saved["optimizer"]["state"]}


SHAPES = {"vectors": (8, 5), "maps": (8, 3, 4, 4), "maps, with timm's activation": (8, 3, 4, 4)}


def norm_case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A batch norm that is not at its start, the global batch, and what the loss weighs it by."""
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(len(shape))
    kinds = {"vectors": nn.BatchNorm1d, "maps": nn.BatchNorm2d}
    norm = kinds.get(name, BatchNormAct2d)(shape[1])
    with torch.no_grad():
        for tensor in norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    scale = torch.arange(8).view(8, *[1] * (len(shape) - 1)).float()  # ranks see other statistics
    values = torch.randn(shape, generator=generator) * (1 + scale) + scale
    return norm, values, torch.randn(shape, generator=generator)


def normalized(norm: nn.Module, values: Tensor, loss_weights: Tensor) -> dict[str, Tensor]:
    """Two forwards in training, the gradients of the first, and one in evaluation."""
    values = values.clone().requires_grad_()
    output = norm.train()(values)
    (output * loss_weights).sum().backward()
    norm(values.detach() * 2)
    found = {"output": output.detach(), "input gradient": values.grad}
    found |= {f"{name} gradient": p.grad for name, p in norm.named_parameters()}
    found |= {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    return found | {"evaluated": norm.eval()(values).detach()}


def gathered(rank: int) -> dict[str, Any]:
    local = (torch.arange(6.0).view(3, 2) + 100 * rank).requires_grad_()
    everyone = distributed.gather(local)
    # Each rank's loss weighs what it gathered in its own way.
    (everyone * (torch.arange(1.0 * everyone.numel()).view(-1, 2) * (rank + 1))).sum().backward()
    return {"everyone": everyone.detach(), "gradient": local.grad}


def dealt(rank: int) -> dict[str, Tensor]:
    rows = torch.arange(4.0).view(4, 1) + 100 * rank
    mine, order = distributed.shuffled(rows, seed=5)
    return {"mine": mine, "order": order, "back": distributed.unshuffled(mine, order)}


def what_a_rank_does(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    found: dict[str, Any] = {
        "place": (distributed.rank(), distributed.world_size(), distributed.is_distributed()),
        "gathered": gathered(rank),
        "shuffled": dealt(rank),
    }
    found["handed over"] = handed_over(rank, world)
    for name in SHAPES:
        norm, values, loss_weights = norm_case(name)
        ours = with_global_batchnorm(nn.Sequential(norm))[0]
        assert isinstance(ours, GlobalBatchNorm)
        share = 8 // world
        part = slice(rank * share, rank * share + share)
        found[name] = normalized(ours, values[part], loss_weights[part])
    for name in runs_of(world):
        found[name] = trained(RUNS[name], rank, world)
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    import torch.distributed.fsdp  # once, and not in each process

    context = multiprocessing.get_context("fork")  # from here nothing has used a thread yet
    for world in WORLDS:
        folder = Path(sys.argv[1], str(world))
        folder.mkdir()
        processes = [
            context.Process(target=what_a_rank_does, args=(rank, world, str(folder)))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(f"a process of {world} failed")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    """What each of the processes found, by their number."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return {
        world: [
            torch.load(folder / str(world) / f"rank{rank}.pt", weights_only=True)
            for rank in range(world)
        ]
        for world in WORLDS
    }


@pytest.fixture(scope="module")
def ranks(worlds) -> list[dict[str, Any]]:
    """What each of two processes found."""
    return worlds[2]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """What one process finds on the global batch, without micro-batches."""
    plain: dict[str, Any] = {"accumulate": 1, "shard": "none", "workers": 1}
    return {
        name: trained(replace(run, **plain, encoder=replace(run.encoder, recompute=False)), 0, 1)
        for name, run in RUNS.items()
    }


every_run = pytest.mark.parametrize(
    ("name", "world"), [(name, world) for world in WORLDS for name in runs_of(world)]
)


def test_each_process_knows_its_rank_and_the_world(ranks):
    assert [found["place"] for found in ranks] == [(0, 2, True), (1, 2, True)]


def test_gather_puts_all_ranks_rows_in_rank_order_on_every_rank(ranks):
    expected = torch.cat([torch.arange(6.0).view(3, 2), torch.arange(6.0).view(3, 2) + 100])
    for found in ranks:
        assert torch.equal(found["gathered"]["everyone"], expected)


def test_the_gradient_of_gather_is_the_sum_of_what_every_ranks_loss_says(ranks):
    total = torch.arange(12.0).view(6, 2) * (1 + 2)
    for rank, found in enumerate(ranks):
        assert torch.equal(found["gathered"]["gradient"], total[rank * 3 : rank * 3 + 3])


def test_shuffling_deals_every_ranks_rows_out_and_unshuffling_brings_them_home(ranks):
    dealt_out = torch.cat([found["shuffled"]["mine"] for found in ranks]).flatten()
    home = torch.cat([torch.arange(4.0), torch.arange(4.0) + 100])
    assert sorted(dealt_out.tolist()) == home.tolist()
    assert not torch.equal(dealt_out, home)
    for rank, found in enumerate(ranks):
        # Some of what a rank's batch norm sees for keys is another rank's.
        assert (found["shuffled"]["mine"] >= 100).unique().tolist() == [False, True]
        expected = torch.arange(4.0).view(4, 1) + 100 * rank
        assert torch.equal(found["shuffled"]["back"], expected)
        assert torch.equal(found["shuffled"]["order"], ranks[0]["shuffled"]["order"])


@pytest.mark.parametrize("name", SHAPES)
def test_global_batch_norm_is_the_batch_norm_of_the_global_batch(name, ranks):
    expected = normalized(*norm_case(name))
    for key in ("output", "input gradient", "evaluated"):
        found = torch.cat([rank[name][key] for rank in ranks])
        torch.testing.assert_close(found, expected[key], rtol=1e-4, atol=1e-5, msg=key)
    for key in ("weight gradient", "bias gradient"):
        found = ranks[0][name][key] + ranks[1][name][key]
        torch.testing.assert_close(found, expected[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", SHAPES)
def test_running_statistics_are_those_of_the_global_batch_on_every_rank(name, ranks):
    expected = normalized(*norm_case(name))
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(ranks[0][name][key], ranks[1][name][key])
        torch.testing.assert_close(ranks[0][name][key], expected[key], rtol=1e-5, atol=1e-6)


@every_run
def test_the_mean_of_the_ranks_losses_is_one_processs_loss(name, world, worlds, alone):
    losses = torch.stack([found[name]["losses"] for found in worlds[world]])  # [W, steps]
    assert not torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses.mean(0), alone[name]["losses"], rtol=1e-4, atol=0)


@every_run
def test_every_gradient_is_that_of_one_process(name, world, worlds, alone):
    for parameter, expected in alone[name]["gradients"].items():
        assert expected.norm() > 0, f"{parameter} proves nothing"
    whole = torch.cat([g.flatten() for g in alone[name]["gradients"].values()])
    for found in worlds[world]:
        got = found[name]["gradients"]
        assert got.keys() == alone[name]["gradients"].keys()
        for parameter, expected in alone[name]["gradients"].items():
            # Gradients that cancel, such as that of an attention's key bias, are rounding alone.
            noise = 1e-6 * whole.norm()
            error = (got[parameter] - expected).norm()
            assert error < 1e-3 * expected.norm() + noise, parameter


@every_run
def test_all_ranks_end_with_identical_weights(name, world, worlds):
    # Queues, centres and teachers among them.
    first, *others = [found[name]["weights"] for found in worlds[world]]
    for other in others:
        assert differing(first, other) == []


@every_run
def test_the_ranks_end_with_the_weights_of_one_process(name, world, worlds, alone):
    moved = worlds[world][0][name]["weights"]
    for key, expected in alone[name]["weights"].items():
        # Some running means are zero but for rounding.
        error = (moved[key].double() - expected.double()).norm()
        assert error < 1e-3 * expected.double().norm() + 1e-6, key


@every_run
def test_the_gradient_norm_that_is_told_is_the_global_one(name, world, worlds, alone):
    for found in worlds[world]:
        torch.testing.assert_close(found[name]["norms"], alone[name]["norms"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_a_run_goes_on_with_sharded_weights_and_without(world, worlds):
    state = start(HANDED_OVER)
    train_for(state, HANDED_OVER, 3)
    expected = state.state_dict()
    for found in worlds[world]:
        of_weights = found["handed over"]["weights"]
        for name, values in expected["method"].items():
            error = (of_weights[name].double() - values.double()).norm()
            assert error < 1e-3 * values.double().norm() + 1e-5, name
        for place, of_one in expected["optimizer"]["state"].items():
            for name, values in of_one.items():
                moment = found["handed over"]["optimizer"][place][name]
                assert moment.shape == values.shape
                torch.testing.assert_close(moment, values, rtol=2e-2, atol=1e-5)


# The certificate: the table that benchmarks/README.md shows


def certificate(worlds: dict[int, list[dict[str, Any]]], alone: dict[str, Any]) -> str:
    """A markdown table of the largest relative errors among several processes against one, each
    rounded up to a power of ten."""
    lines = ["| run | loss | every gradient | everything after 3 steps |", "|---|---|---|---|"]
    for name in RUNS:
        one, errors = alone[name], {"loss": 0.0, "gradient": 0.0, "state": 0.0}
        whole = torch.cat([g.flatten() for g in one["gradients"].values()]).norm()
        for world, ranks in worlds.items():
            if name not in runs_of(world):
                continue
            losses = torch.stack([found[name]["losses"] for found in ranks]).mean(0)
            loss_error = ((losses - one["losses"]).abs() / one["losses"].abs()).max()
            errors["loss"] = max(errors["loss"], float(loss_error))
            first = ranks[0][name]
            for key, expected in one["gradients"].items():
                # What is small beside the whole gradient is rounding alone.
                scale = expected.norm() + 1e-3 * whole
                error = (first["gradients"][key] - expected).norm() / scale
                errors["gradient"] = max(errors["gradient"], float(error))
            for key, value in one["weights"].items():
                error = (first["weights"][key].double() - value.double()).norm()
                scale = value.double().norm() + 1e-3
                errors["state"] = max(errors["state"], float(error / scale))
        cells = [f"1e{math.ceil(math.log10(max(error, 1e-9)))}" for error in errors.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_benchmarks_page_shows_the_certificate_that_is_proven_here(worlds, alone):
    table = certificate(worlds, alone)
    readme = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text()

    def exponents(text: str) -> dict[str, list[int]]:
        rows = (line.strip("| ").split(" | ") for line in text.splitlines() if " | 1e-" in line)
        return {name: [int(cell.removeprefix("1e")) for cell in cells] for name, *cells in rows}

    shown, found = exponents(readme), exponents(table)
    assert shown.keys() == found.keys(), f"benchmarks/README.md needs this table:\n{table}"
    for name, values in found.items():
        # Another processor rounds in another way: a power of ten more is no other result.
        beyond = [f > s + 1 for f, s in zip(values, shown[name], strict=True)]
        assert not any(beyond), f"benchmarks/README.md needs this table:\n{table}"


# One process


def test_in_one_process_there_is_nothing_to_share():
    values = torch.arange(6.0).view(3, 2)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert not distributed.is_distributed()
    assert distributed.gather(values) is values
    assert distributed.sum_over_ranks(values) is values


@pytest.mark.parametrize("name", SHAPES)
def test_in_one_process_global_batch_norm_is_the_plain_one(name):
    norm, values, loss_weights = norm_case(name)
    expected = normalized(norm, values, loss_weights)
    ours = with_global_batchnorm(nn.Sequential(norm_case(name)[0]))[0]
    found = normalized(ours, values, loss_weights)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_every_batch_norm_is_replaced_and_keeps_its_state():
    torch.manual_seed(0)
    encoder = RESNET.build()
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    norms = [name for name, m in encoder.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    shared = with_global_batchnorm(encoder)
    assert all(isinstance(shared.get_submodule(name), GlobalBatchNorm) for name in norms)
    assert shared.state_dict().keys() == state.keys()
    assert all(torch.equal(shared.state_dict()[name], tensor) for name, tensor in state.items())
