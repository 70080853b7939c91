"""The processes that evaluate together: who this one is, where it computes, and waiting for the others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch

from phi3v.model.runtime import compute_device
from phi3v.settings import Compute


@dataclass(frozen=True)
class Processes:
    """This process among its `world`."""

    rank: int
    world: int
    device: torch.device

    def wait(self) -> None:
        """Return once every process has called it."""
        if self.world > 1:
            torch.distributed.barrier()

    def leave(self) -> None:
        """Close the group."""
        if self.world > 1:
            torch.distributed.destroy_process_group()

    @property
    def title(self) -> str:
        """The device in words, for manifests."""
        if self.device.type == "cuda":
            return f"{self.world} x {torch.cuda.get_device_name(self.device)}"
        return f"{self.world} CPU process(es), {torch.get_num_threads()} thread(s) each"


def join(settings: Compute) -> Processes:
    """Join the processes that torchrun started; alone without it.

    Raises SettingsError if this process's device cannot do the job (phi3v.model.runtime.compute_device).
    """
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        # Some libraries count the machine's cores for themselves once they are imported.
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = compute_device(settings)
    if world > 1:
        # Only files and barriers are shared, so gloo serves every device. A process may wait long for the one with the longest answers.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=2))
    return Processes(rank, world, device)
