"""Rank 0 of many: a process group without peers, and DistributedDataParallel without its C++ reducer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.nn.parallel import distributed


class FakeDDP(torch.nn.Module):
    """DDP's interface and the memory of its buckets; the real reducer follows raw pointers, which fakes do not have.

    The gradients of a backward pass are counted as communication by the last one of them.
    """

    def __init__(self, module: torch.nn.Module, device_ids: list[int] | None = None, **options: Any) -> None:
        super().__init__()
        devices = {parameter.device for parameter in module.parameters()}
        if len(devices) != 1 or device_ids != [next(iter(devices)).index]:
            raise RuntimeError(
                f"DDP: parameters on {devices}, device_ids {device_ids}; expected one and the same device"
            )
        self.module, self.options = module, options
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.buckets = [torch.empty_like(parameter) for parameter in self.trained]
        self.require_backward_grad_sync = True
        self._waiting = 0
        for parameter, bucket in zip(self.trained, self.buckets, strict=True):
            parameter.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._reduce(bucket))

    def _reduce(self, bucket: torch.Tensor) -> None:
        if self.require_backward_grad_sync and dist.get_world_size() > 1:
            dist.all_reduce(bucket)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """No reduction in this block."""
        before, self.require_backward_grad_sync = self.require_backward_grad_sync, False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before


@contextmanager
def rank_0_of(world: int, local: int | None = None) -> Iterator[None]:
    """The environment of torchrun's first process and a group whose collectives return at once; 0: no torchrun.

    local: processes of this machine, 8 at most unless given.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    start = dist.init_process_group

    def init_process_group(backend: str | None = None, *_: Any, **__: Any) -> None:
        start("fake", rank=0, world_size=max(1, world), store=FakeStore())

    local = local or min(max(1, world), 8)
    environment = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(local),
        "GROUP_WORLD_SIZE": str(-(-world // local)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555",
    }  # fmt: skip
    with (
        mock.patch.dict(os.environ, environment if world else {}),
        mock.patch.object(dist, "init_process_group", init_process_group),
        mock.patch.object(dist.distributed_c10d, "init_process_group", init_process_group),
        mock.patch.object(torch.nn.parallel, "DistributedDataParallel", FakeDDP),
        mock.patch.object(distributed, "DistributedDataParallel", FakeDDP),
    ):
        yield
