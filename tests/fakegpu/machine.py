"""A pretended machine with GPUs: everything that must be in place before a line of phi3v runs on it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from .cuda import A100, Machine, cuda_of
from .device import FakeGpu
from .kernels import kernels_of
from .processes import rank_0_of


@contextmanager
def on_machine(machine: Machine = A100, world: int = 0, limited: bool = False) -> Iterator[FakeGpu]:
    """This process on `machine`, as rank 0 of `world` processes (0: started without torchrun).

    limited: the GPU runs out of memory where the real one would, leaving fragmentation aside.
    """
    gpu = FakeGpu(machine.bytes_for_tensors if limited else None)
    with (
        gpu,
        cuda_of(gpu, machine),
        kernels_of(gpu, machine.capability),
        rank_0_of(world),
        _files_of(gpu),
    ):
        yield gpu


@contextmanager
def _files_of(gpu: FakeGpu) -> Iterator[None]:
    """torch.save writes zeros for CUDA tensors; files are read to the CPU and moved from there."""
    import safetensors.torch as safetensors
    from transformers import modeling_utils

    save, load, load_file = torch.save, torch.load, safetensors.load_file
    # PEFT and transformers hold load_file under names of their own.
    holders = [
        (module, name)
        for module in list(sys.modules.values())
        for name in ("load_file", "safe_load_file")
        if vars(module).get(name) is load_file
    ]

    def to(device: Any) -> Callable[[Any], Any]:
        return lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf

    def torch_load(file: Any, map_location: Any = None, **options: Any) -> Any:
        loaded = load(file, map_location="cpu", **options)
        is_cuda = isinstance(map_location, str | torch.device) and torch.device(map_location).type == "cuda"
        return tree_map(to(map_location), loaded) if is_cuda else loaded

    def recorded_load_file(filename: Any, device: Any = "cpu", **options: Any) -> dict[str, torch.Tensor]:
        gpu.loads.append(str(device))
        return dict(tree_map(to(device), load_file(filename, device="cpu", **options)))

    def storage_of(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
        storage = tensor.untyped_storage()  # fake storages all have the address 0
        return tensor.device, storage._cdata if isinstance(tensor, FakeTensor) else storage.data_ptr(), storage.nbytes()

    with (
        mock.patch.object(modeling_utils, "id_tensor_storage", storage_of),
        mock.patch.object(torch, "save", lambda obj, *args, **more: save(gpu.to_host(obj), *args, **more)),
        mock.patch.object(torch, "load", torch_load),
        ExitStack() as stack,
    ):
        for module, name in holders:
            stack.enter_context(mock.patch.object(module, name, recorded_load_file))
        yield
