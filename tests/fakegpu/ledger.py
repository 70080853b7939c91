"""What a fake GPU records: host waits, copies to the device, operators, bytes moved, and memory."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from .sources import Source

Kind = Literal["products", "attention", "elementwise", "reduction", "communication"]
KINDS: tuple[Kind, ...] = ("products", "attention", "elementwise", "reduction", "communication")
_PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "convolution_backward", "gemm_4bit",
    "gemv_4bit",
}  # fmt: skip
_ATTENTION = ("scaled_dot_product", "flash_attention", "flash_attn", "efficient_attention", "varlen_attn")
BLOCK = 512
"""The CUDA allocator rounds sizes up to this many bytes (c10/cuda/CUDACachingAllocator.h, kMinBlockSize)."""


class Operation(NamedTuple):
    """An operator (or a reason to wait) in a phase of the step, with the line that caused it."""

    phase: str
    name: str
    source: Source


class Copy(NamedTuple):
    """A copy from the host to the device."""

    phase: str
    shape: tuple[int, ...]
    dtype: str
    """Of the tensor on the host."""
    blocking: bool
    why: str
    """What makes it block: "" if it does not."""
    source: Source

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize


def kind_of(operation: Operation) -> Kind:
    """The class of an operator's traffic, by its name with namespace ("aten::mm").

    `reduction` is what DeepSpeed copies, joins and divides around a collective; `communication` is the collective.
    """
    space, _, name = operation.name.partition("::")
    if space == "c10d":
        return "communication"
    if is_reduction(operation):
        return "reduction"
    if name.rstrip("_") in _PRODUCTS:
        return "products"
    return "attention" if any(part in name for part in _ATTENTION) else "elementwise"


def is_reduction(operation: Operation) -> bool:
    """Whether DeepSpeed itself runs it, outside the model's forward and backward."""
    return operation.source.library is not None and "/deepspeed/" in operation.source.library[0]


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements that a tensor names; expanded dimensions count once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count


@dataclass
class Memory:
    """Live bytes of the device and their peak, as torch.cuda.memory_allocated counts them.

    Raises torch.OutOfMemoryError where `limit` bytes do not suffice.
    """

    limit: int | None = None
    live: int = 0
    peak: int = 0
    peak_phase: str = ""
    _sizes: dict[int, tuple[int, Operation]] = field(default_factory=dict)
    _holders: Counter[Operation] = field(default_factory=Counter)
    _at_peak: Counter[Operation] | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def born(self, storage: torch.UntypedStorage, operation: Operation) -> None:
        """Count a storage for as long as it lives."""
        key = storage._cdata
        with self._lock:
            if key in self._sizes:
                return
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            if self.limit is not None and self.live + size > self.limit:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU 0 has a total capacity of "
                    f"{self.limit / 2**30:.2f} GiB of which {(self.limit - self.live) / 2**30:.2f} GiB is free."
                )
            self._sizes[key] = (size, operation)
            self._holders[operation] += size
            self.live += size
            if self.live > self.peak:
                self.peak, self.peak_phase, self._at_peak = self.live, operation.phase, None
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        with self._lock:
            if self._at_peak is None and self.live == self.peak:
                self._at_peak = self._holders.copy()
            size, operation = self._sizes.pop(key)
            self._holders[operation] -= size
            if not self._holders[operation]:
                del self._holders[operation]
            self.live -= size

    def reset_peak(self) -> None:
        """Start a new peak at what is live now."""
        with self._lock:
            self.peak, self.peak_phase, self._at_peak = self.live, "", None

    def at_peak(self) -> Counter[Operation]:
        """Bytes at the last peak, by the operation that allocated them."""
        return (self._holders if self._at_peak is None else self._at_peak).copy()


@dataclass
class Ledger:
    """Counters of everything that ran, in the phase that was current."""

    phase: str = "start"
    waits: Counter[Operation] = field(default_factory=Counter)
    copies: Counter[Copy] = field(default_factory=Counter)
    calls: Counter[Operation] = field(default_factory=Counter)
    traffic: Counter[Operation] = field(default_factory=Counter)
    """Bytes read and written."""
    kernels: Counter[str] = field(default_factory=Counter)
    """Attention kernels chosen by SDPA."""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def wait(self, reason: str, source: Source) -> None:
        """Note that the host waits for the device."""
        with self.lock:
            self.waits[Operation(self.phase, reason, source)] += 1

    def copy(self, tensor: torch.Tensor, why: str, source: Source) -> None:
        """Note a copy to the device; `why` it blocks, or ""."""
        entry = Copy(self.phase, tuple(tensor.shape), str(tensor.dtype)[6:], bool(why), why, source)
        with self.lock:
            self.copies[entry] += 1

    def ran(self, operation: Operation, moved: int) -> None:
        """Note an operator and the bytes it read and wrote."""
        with self.lock:
            self.calls[operation] += 1
            if moved:
                self.traffic[operation] += moved

    def clear(self) -> None:
        """Forget everything recorded so far; the phase stays."""
        for counter in (self.waits, self.copies, self.calls, self.traffic, self.kernels):
            counter.clear()
