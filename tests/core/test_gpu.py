"""The step on a real GPU. Skipped where there is none; needs neither ray nor mlflow:

pytest --noconftest tests/test_gpu.py
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers import (
    BEIT,
    MAE,
    PLAIN_SGD,
    RESNET,
    SIMCLR,
    VIT,
    all_methods,
    batches,
    experiment,
    positions,
    relative_error,
    tiny,
)
from selfray.distributed import shared_out, whole
from selfray.experiment import Experiment
from selfray.losses import nt_xent
from selfray.method import MethodConfig
from selfray.methods.dino import DINOConfig
from selfray.methods.dinov2 import DINOv2Config
from selfray.optim import OptimizerConfig
from selfray.step import devices
from selfray.train import Step, TrainState, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
every_method = pytest.mark.parametrize("method", all_methods(), ids=lambda method: method.name)


class Enough(Exception):  # noqa: N818 - it is no error
    """Leaves the loop."""


def trained(
    wanted: Experiment, device: str, steps: int, quiet_from: int | None = None
) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """(losses, the first step's gradients, the last weights), on the CPU. From the step
    `quiet_from` on, whatever waits for the GPU is an error."""
    state = TrainState.start(wanted, 100 * wanted.batch_size, device)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        # timm begins with a zero at the end of each residual branch: nothing would flow there.
        for parameter in state.method.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.add_(shared_out(noise.to(parameter.device), parameter))
    gradients: dict[str, Tensor] = {}
    own_before_step = state.method.before_step

    def look(progress: Any) -> None:
        if not gradients:
            for name, parameter in state.method.named_parameters():
                if parameter.grad is not None:
                    gradients[name] = parameter.grad.clone()
        own_before_step(progress)

    state.method.before_step = look
    told: list[Step] = []

    def on_step(step: Step) -> None:
        told.append(replace(step, images=step.images[:0]))
        if len(told) == steps:
            torch.cuda.set_sync_debug_mode("default")
            raise Enough
        if quiet_from is not None and len(told) >= quiet_from:
            torch.cuda.set_sync_debug_mode("error")

    try:
        with pytest.raises(Enough):
            train(state, batches(wanted), wanted, on_step, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    losses = [float(step.loss) for step in told]
    gradients = {name: whole(values).cpu() for name, values in gradients.items()}
    last = state.state_dict()["method"]
    return losses, gradients, {name: values.cpu() for name, values in last.items()}


def require_alike(first: Any, second: Any, within: float) -> None:
    """Losses, gradients and weights of two runs agree to a relative error."""
    assert first[0] == pytest.approx(second[0], rel=within)
    whole = torch.cat([g.flatten() for g in second[1].values()]).norm()
    for name, expected in second[1].items():
        # Gradients that cancel, such as that of an attention's key bias, are rounding alone.
        error = (first[1][name] - expected).norm()
        assert error < 10 * within * expected.norm() + 1e-2 * within * whole, name
    for name, expected in second[2].items():
        if expected.is_floating_point():
            assert relative_error(first[2][name], expected) < 10 * within, name


@every_method
def test_a_gpu_computes_what_a_cpu_does(method: MethodConfig):
    wanted = experiment(method, optimizer=replace(PLAIN_SGD, base_learning_rate=0.01))
    require_alike(trained(wanted, "cuda", 2), trained(wanted, "cpu", 2), within=1e-3)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_fused_updates_are_those_of_the_cpu(name):
    settings = OptimizerConfig(name, base_learning_rate=1e-3, scaling="none", clip_norm=1.0)
    wanted = experiment(MAE, optimizer=settings)
    one, two = trained(wanted, "cuda", 3), trained(wanted, "cpu", 3)
    assert one[0] == pytest.approx(two[0], rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@every_method
def test_a_step_never_waits_for_the_gpu(method: MethodConfig, precision):
    wanted = experiment(method, precision=precision)
    losses, _, _ = trained(wanted, "cuda", 5, quiet_from=2)
    assert all(torch.tensor(losses).isfinite())


def test_a_step_with_cached_gradients_never_waits_for_the_gpu():
    trained(experiment(SIMCLR, VIT, accumulate=2, precision="bf16"), "cuda", 5, quiet_from=2)


@pytest.mark.parametrize(
    ("method", "encoder"),
    [(MAE, VIT), (SIMCLR, RESNET), (tiny(DINOConfig), VIT)],
    ids=["mae", "simclr", "dino"],
)
def test_a_compiled_step_is_the_eager_one(method, encoder):
    wanted = experiment(method, encoder, optimizer=replace(PLAIN_SGD, base_learning_rate=0.01))
    compiled = trained(replace(wanted, compile=True), "cuda", 3)
    require_alike(compiled, trained(wanted, "cuda", 3), within=1e-3)


@pytest.mark.parametrize("encoder", [VIT, BEIT], ids=["vit", "beit"])
def test_recomputing_blocks_changes_nothing(encoder):
    # SGD: AdamW's first steps would turn the rounding of a gradient of zero into whole steps.
    wanted = experiment(
        replace(tiny(DINOv2Config), local_crops=0),
        replace(encoder, drop_path=0.3, depth=4),
        optimizer=replace(PLAIN_SGD, base_learning_rate=0.01),
    )
    kept = trained(wanted, "cuda", 2)
    recomputed = replace(wanted, encoder=replace(wanted.encoder, recompute=True))
    require_alike(trained(recomputed, "cuda", 2), kept, within=1e-4)


@pytest.mark.parametrize(
    "method", [m for m in all_methods() if m.compares], ids=lambda method: method.name
)
def test_cached_gradients_are_those_of_the_whole_batch(method):
    wanted = experiment(method, VIT, optimizer=replace(PLAIN_SGD, base_learning_rate=0.01))
    parts = trained(replace(wanted, accumulate=4), "cuda", 2)
    require_alike(parts, trained(wanted, "cuda", 2), within=1e-3)


def test_nt_xent_of_32768_images_takes_less_than_a_gibibyte():
    values = F.normalize(torch.randn(32_768, 2, 128, device="cuda"), dim=-1).requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = nt_xent(values, values, 0, 0.1)
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30
    # Against the formula, of the first 64 anchors in float64.
    flat = F.normalize(values.detach().double().flatten(0, 1), dim=-1)
    logits = flat[:64] @ flat.T / 0.1
    logits[torch.arange(64), torch.arange(64)] = float("-inf")
    expected = F.cross_entropy(logits, torch.arange(64, device="cuda") ^ 1, reduction="none")
    assert float(loss.detach()) == pytest.approx(float(expected.mean()), rel=0.05)


def test_views_of_the_host_arrive_whole_and_in_order():
    wanted = experiment(tiny(DINOv2Config), VIT)
    host = [positions(8 * n, 8, wanted) for n in range(6)]
    arrived = list(devices.on_device(iter(host), torch.device("cuda")))
    assert len(arrived) == len(host)
    for ours, theirs in zip(arrived, host, strict=True):
        assert all(values.is_cuda for values in ours.values())
        assert all(torch.equal(ours[name].cpu(), values) for name, values in theirs.items())


def test_attention_is_computed_by_a_flash_kernel():
    encoder = VIT.build().cuda().train()
    images = torch.randn(4, 3, 16, 16, device="cuda")
    with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        encoder(images).cls.sum().backward()


@pytest.fixture
def one_rank(tmp_path) -> Iterator[None]:
    dist.init_process_group("nccl", f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("method", [MAE, tiny(DINOv2Config)], ids=["mae", "dinov2"])
def test_sharded_weights_on_one_card_are_the_plain_ones(method, one_rank):
    settings = replace(PLAIN_SGD, base_learning_rate=0.01, momentum=0.9, clip_norm=1.0)
    wanted = experiment(method, VIT, optimizer=settings, workers=2)
    sharded = trained(replace(wanted, shard="fsdp"), "cuda", 3)
    plain = trained(wanted, "cuda", 3)
    assert sharded[0] == pytest.approx(plain[0], rel=1e-3)
    for name, expected in plain[2].items():
        assert relative_error(sharded[2][name], expected) < 1e-2, name
