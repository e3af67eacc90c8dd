"""The Ray Train trainer of a run: its controller runs in this process, and torch connects ranks."""

import os
import uuid
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch import TorchConfig, TorchTrainer

from selfray.cluster import local_ray, ray_internals


class Trainer(TorchTrainer):
    """A TorchTrainer that starts no process besides its workers.

    It does not install Ray Train's handler of Ctrl-C, which would end the driver by sys.exit.
    """

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, torch_config=Ranks(), **more)

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        is_alone = local_ray.is_running()
        if is_alone and not self.scaling_config.elasticity_enabled:
            settings["scaling_policy"] = ray_internals.fixed_policy(self.scaling_config)
        return ray_internals.train_here(self, settings, is_alone)


@dataclass
class Ranks(TorchConfig):
    """The config that makes ranks connect by JoinRanks."""

    @property
    def backend_cls(self) -> Any:
        return JoinRanks


class JoinRanks(ray_internals.torch_backend()):
    """Connects the ranks. A single rank needs no connection. Ranks of a local Ray rendezvous by a
    file and communicate over loopback, because torch's own rendezvous opens a port to all machines;
    ranks of a cluster use torch's."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        size = len(worker_group)
        if size == 1:
            return
        if not local_ray.is_running():
            super().on_start(worker_group, backend_config)
            return
        has_gpu = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        meeting = os.path.join(ray_internals.session_folder(), f"ranks-{uuid.uuid4().hex}")
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, join, "nccl" if has_gpu else "gloo", rank, size, meeting
                )
                for rank in range(size)
            ]
        )

    def on_training_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        if len(worker_group) > 1 and not local_ray.is_running():
            super().on_training_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        if len(worker_group) > 1:
            super().on_shutdown(worker_group, backend_config)


def join(backend: str, rank: int, size: int, meeting: str) -> None:
    """Connect this rank to the others on this machine, only over loopback."""
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=size)
