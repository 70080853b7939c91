"""torch.cuda as it answers on a machine with GPUs."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from .device import FakeGpu
from .sources import current

CONTEXT_BYTES = int(0.6 * 2**30)
"""What CUDA's context and libraries take of a device before the first tensor (A100, CUDA 12 and 13: 0.45-0.6 GiB)."""
# Architectures of PyTorch's CUDA 13 wheels; those of CUDA 12.6 have sm_70 as well.
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


@dataclass(frozen=True)
class Machine:
    """The GPUs of the pretended machine."""

    name: str = "NVIDIA A100-SXM4-80GB"
    capability: tuple[int, int] = (8, 0)
    memory_gib: float = 80.0
    """Of one GPU."""
    gpus: int = 8
    architectures: tuple[str, ...] = ARCHITECTURES

    @property
    def bytes_for_tensors(self) -> int:
        """Memory of one GPU without CUDA's context."""
        return int(self.memory_gib * 2**30) - CONTEXT_BYTES


A100 = Machine()
T4 = Machine("Tesla T4", (7, 5), 15.0)
V100 = Machine("Tesla V100-SXM2-32GB", (7, 0), 32.0, architectures=("sm_70", *ARCHITECTURES))
MACHINES = {"A100": A100, "T4": T4, "V100": V100}


class _Stream:
    """The one stream; everything on it is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cuda", 0)
        self.cuda_stream = 0

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)


class _Event:
    """An event that has happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 1.0


def _answers(gpu: FakeGpu, machine: Machine) -> dict[str, Any]:
    """Function of torch.cuda to what it does here."""
    device = 0
    capacity = int(machine.memory_gib * 2**30)
    properties = types.SimpleNamespace(
        name=machine.name, total_memory=capacity, major=machine.capability[0], minor=machine.capability[1],
        multi_processor_count=108, uuid="0",
    )  # fmt: skip

    def set_device(wanted: Any) -> None:
        nonlocal device
        index = wanted if isinstance(wanted, int) else torch.device(wanted).index
        if index is not None and index >= machine.gpus:
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        device = device if index is None or index < 0 else index

    def synchronize(_: Any = None) -> None:
        gpu.ledger.wait("torch.cuda.synchronize", current())

    @contextlib.contextmanager
    def stream(_: Any) -> Iterator[None]:
        yield

    def nothing(*_: Any, **__: Any) -> None: ...

    def live(_: Any = None) -> int:
        return gpu.memory.live

    def peak(_: Any = None) -> int:
        return gpu.memory.peak

    def state(*_: Any) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    default = _Stream()
    return {
        "is_available": lambda: True, "device_count": lambda: machine.gpus, "current_device": lambda: device,
        "set_device": set_device, "get_device_name": lambda _=None: machine.name,
        "get_device_capability": lambda _=None: machine.capability, "get_device_properties": lambda _=None: properties,
        "get_arch_list": lambda: list(machine.architectures), "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": synchronize, "Stream": _Stream, "Event": _Event, "stream": stream,
        "current_stream": lambda _=None: default, "default_stream": lambda _=None: default, "empty_cache": nothing,
        "memory_allocated": live, "max_memory_allocated": peak, "memory_reserved": live, "max_memory_reserved": peak,
        "mem_get_info": lambda _=None: (machine.bytes_for_tensors - gpu.memory.live, capacity),
        "reset_peak_memory_stats": lambda _=None: gpu.memory.reset_peak(), "is_initialized": lambda: True,
        "manual_seed": nothing, "manual_seed_all": nothing, "get_rng_state": state, "set_rng_state": nothing,
        "get_rng_state_all": lambda: [state()] * machine.gpus, "set_rng_state_all": nothing, "init": nothing,
        "_lazy_init": nothing, "ipc_collect": nothing, "memory_stats": lambda _=None: {}, "_is_compiled": lambda: True,
    }  # fmt: skip


@contextmanager
def cuda_of(gpu: FakeGpu, machine: Machine) -> Iterator[None]:
    """torch.cuda of `machine`, whose memory is `gpu`'s."""
    import torch.cuda.nvtx

    def pinned(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
        return tensor if gpu.is_pinned(tensor) else gpu.pin(tensor.clone())

    patches: list[tuple[Any, str, Any]] = [
        (torch.version, "cuda", "13.0"),
        (torch.Tensor, "record_stream", lambda tensor, stream: None),
        (torch.Tensor, "pin_memory", pinned),
        (torch.Tensor, "is_pinned", lambda tensor, device=None: gpu.is_pinned(tensor)),
        (torch.nn.Module, "_apply", _replace_parameters),
    ]
    patches += [(torch.cuda.nvtx, name, lambda *_: None) for name in ("range_push", "range_pop", "mark")]
    for name, answer in _answers(gpu, machine).items():
        places = (torch.cuda, torch.cuda.memory, torch.cuda.random)
        patches += [(place, name, answer) for place in places if hasattr(place, name)]
    with ExitStack() as stack:
        for place, name, answer in patches:
            stack.enter_context(mock.patch.object(place, name, answer))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", create=True, return_value=0))
        yield


def _replace_parameters(
    module: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> torch.nn.Module:
    """Module._apply with new Parameter objects: data of a CPU parameter cannot become that of a fake CUDA tensor."""
    if recurse:
        for child in module.children():
            child._apply(function)
    for name, parameter in list(module._parameters.items()):
        if parameter is None:
            continue
        with torch.no_grad():
            changed = function(parameter)
        if changed.device == parameter.device and changed.dtype == parameter.dtype:
            continue
        made = torch.nn.Parameter(changed, requires_grad=parameter.requires_grad)
        made.__dict__.update(parameter.__dict__)
        module._parameters[name] = made
    for name, buffer in list(module._buffers.items()):
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module
