"""The dispatch mode: CUDA tensors are FakeTensors without data, CPU tensors stay real.

Values of small integer and bool CUDA tensors (and of floating tensors of a few elements) are kept beside them, so that
code which asks for values takes the way it takes on a GPU.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from . import guard
from .ledger import Ledger, Memory, Operation, tensor_bytes
from .sources import Source, current, remember_node

aten = torch.ops.aten
MOST_VALUES = 4_000_000
"""Elements of an integer or bool tensor whose values are kept."""
MOST_FLOATS = 64
_FACTORIES = (aten.arange, aten.ones, aten.zeros, aten.full, aten.scalar_tensor, aten.eye)
_UNINITIALISED = (
    aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided, aten.detach,
    aten._unsafe_view, aten.set_, aten.resize_, aten.alias, aten.lift_fresh,
)  # fmt: skip
"""Operators that move no bytes though PyTorch does not call them views."""
_WRITE_ONLY = (aten.copy_, aten.fill_, aten.zero_, aten.normal_, aten.uniform_)
_GATHERS = (aten.embedding, aten.index, aten.index_select, aten.gather)
"""Operators that read as much of their first input as they write."""
_SIZE_FROM_VALUES = (
    aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.unique_dim, aten.unique_consecutive,
    aten.masked_scatter_backward, aten.bincount,
)  # fmt: skip
"""Operators for which the host waits: it needs the result's size or the result."""
_INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
_OVERFLOW_WORDS = ("overflow", "~torch.isfinite", "found_inf", "isnan", "inf_or_nan")
"""Words in a line that asks whether gradients overflowed; unknown values are finite."""


@dataclass(frozen=True)
class Call:
    """An operator that concerns the device."""

    operator: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[torch.Tensor]
    source: Source

    @property
    def name(self) -> str:
        """With its namespace: "aten::mm"."""
        return str(self.operator._schema.name)

    @property
    def packet(self) -> Any:
        """The operator without its overload, which has no public type."""
        return self.operator.overloadpacket

    @cached_property
    def fakes(self) -> list[FakeTensor]:
        """The inputs on the device."""
        return [tensor for tensor in self.tensors if isinstance(tensor, FakeTensor)]


class FakeGpu(TorchDispatchMode):
    """`with FakeGpu(limit) as gpu:` code on the device "cuda" runs, and `gpu.ledger` and `gpu.memory` record it.

    limit: bytes of the device, None for no limit. Raises RuntimeError for a CPU tensor among CUDA tensors, as a GPU
    does, and torch.OutOfMemoryError.
    """

    active: FakeGpu | None = None
    """The one that is entered."""

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        if not guard.is_loaded():
            raise RuntimeError("call fakegpu.guard.load() before torch is imported")
        self.ledger, self.memory = Ledger(), Memory(limit)
        self.loads: list[str] = []
        """Devices that safetensors' load_file was asked for."""
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._known = WeakIdKeyDictionary()
        self._pinned: set[int] = set()
        self._special: dict[Any, Callable[[Call], Any]] = {
            aten._local_scalar_dense: self._item,
            aten._to_copy: self._to_copy,
            aten.copy_: self._copy_,
            aten.repeat_interleave: self._repeat_interleave,
            **dict.fromkeys(_SIZE_FROM_VALUES, self._size_from_values),
            **dict.fromkeys(_INDEXING, self._index),
        }

    def __enter__(self) -> FakeGpu:
        # torch.tensor(…, device="cuda") then makes a CPU tensor and copies it through this mode.
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        FakeGpu.active = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        FakeGpu.active = None
        super().__exit__(*error)

    # Values and pinned memory -----------------------------------------------------------------------------------

    def values(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The values of a CUDA tensor as a CPU tensor, if they are known."""
        return self._known.get(tensor)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mark a CPU tensor's storage as pinned memory."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._pinned:
            self._pinned.add(key)
            weakref.finalize(storage, self._pinned.discard, key)
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a CPU tensor lies in memory marked as pinned."""
        return not isinstance(tensor, FakeTensor) and tensor.untyped_storage()._cdata in self._pinned

    def to_host(self, tree: Any) -> Any:
        """Any nest of containers with CUDA tensors replaced by CPU tensors: known values, else zeros."""

        def plain(leaf: Any) -> Any:
            if not isinstance(leaf, FakeTensor):
                return leaf
            known = self.values(leaf)
            with _disable_current_modes():
                return torch.zeros(leaf.shape, dtype=leaf.dtype) if known is None else known.clone()

        return tree_map(plain, tree)

    # Dispatch ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "prim":  # asks for the device or the layout of a fake tensor
            with self.fake:
                return func(*args, **kwargs)
        tensors = _tensors((args, kwargs))
        device = kwargs.get("device")
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors) and (
            device is None or torch.device(device).type != "cuda"
        ):
            return self._on_host(func, args, kwargs)
        if torch.is_inference_mode_enabled() and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ):  # autograd decomposes these operators; inference mode leaves that to the mode
            with self:
                done = func.decompose(*args, **kwargs)
            if done is not NotImplemented:
                return done
        if self.ledger.phase == "forward" and torch._C._current_graph_task_id() != -1:
            self.ledger.phase = "backward"
        call = Call(func, args, kwargs, tensors, current())
        remember_node(call.name, call.source)
        special = self._special.get(func.overloadpacket, self._run)
        return special(call)

    def _on_host(self, func: OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
        """CPU operators as they are, but for pinned memory, which needs a GPU."""
        if func.overloadpacket in (aten._pin_memory, aten.pin_memory):
            return self.pin(args[0].clone())
        if func.overloadpacket is aten.is_pinned:
            return self.is_pinned(args[0])
        if kwargs.pop("pin_memory", False):
            return self.pin(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _run(self, call: Call, known: torch.Tensor | None = None) -> Any:
        """An ordinary operator: on fakes for the shapes, on known values for the values."""
        self._refuse_host_tensors(call)
        known = self._on_values(call) if known is None else known
        operator = call.operator
        if call.fakes and known is not None and not operator.is_view and not operator._schema.is_mutable:
            # Some operators would ask for values inside, so the result's shape comes from its values.
            out = tree_map(lambda x: self._fake_like(x, call) if isinstance(x, torch.Tensor) else x, known)
        else:
            args, kwargs = call.args, call.kwargs
            if len(call.fakes) < len(call.tensors):
                args, kwargs = tree_map(self._as_fake, (args, kwargs))
            with self.fake:
                out = operator(*args, **kwargs)
            self._note_values(call, out, known)
        self._account(call, out)
        return out

    def _refuse_host_tensors(self, call: Call) -> None:
        if not call.fakes:
            return
        for tensor in call.tensors:
            if isinstance(tensor, FakeTensor) or tensor.dim() == 0:
                continue
            if call.packet in _INDEXING:  # CPU indices are allowed, and copied
                self.ledger.copy(tensor, self._why_blocking(tensor, False), call.source)
                continue
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {call.name} got a CPU tensor {tuple(tensor.shape)} "
                f"beside CUDA tensors at {call.source}"
            )

    def _as_fake(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor):
            with self.fake:
                return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
        return leaf

    def _fake_like(self, known: torch.Tensor, call: Call) -> torch.Tensor:
        device = call.fakes[0].device if call.fakes else torch.device(call.kwargs["device"])
        with self.fake:
            fake = torch.empty_strided(known.shape, known.stride(), dtype=known.dtype, device=device)
        self._remember(fake, known)
        return fake

    # What is known of values ------------------------------------------------------------------------------------

    def _remember(self, fake: torch.Tensor, known: torch.Tensor) -> None:
        if _is_small(known):
            self._known[fake] = known

    def _on_values(self, call: Call) -> Any:
        """The operator's result on the known values, or None."""
        finite = self._finite(call)
        if finite is not None:
            return finite
        if not call.tensors and call.packet not in _FACTORIES:
            return None
        for tensor in call.tensors:
            if (self.values(tensor) is None) if isinstance(tensor, FakeTensor) else not _is_small(tensor):
                return None
        args, kwargs = tree_map(lambda x: self.values(x) if isinstance(x, FakeTensor) else x, (call.args, call.kwargs))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        try:
            return call.operator(*args, **kwargs)
        except (RuntimeError, NotImplementedError, ValueError):  # no such kernel on a CPU: values unknown
            return None

    def _finite(self, call: Call) -> torch.Tensor | None:
        """x == x, x == inf and the like for unknown x: unknown values are finite numbers."""
        if call.packet not in (aten.eq, aten.ne) or not call.fakes or self.values(call.fakes[0]) is not None:
            return None
        left, right = call.args
        same = left is right
        infinite = isinstance(right, float) and math.isinf(right)
        if not (same or infinite) or left.numel() > MOST_VALUES:
            return None
        return torch.full(left.shape, same == (call.packet is aten.eq))

    def _note_values(self, call: Call, out: Any, known: Any) -> None:
        if known is not None:
            for fake, value in zip(tree_leaves(out), tree_leaves(known), strict=True):
                if isinstance(fake, FakeTensor) and isinstance(value, torch.Tensor):
                    self._remember(fake, value)
        elif call.operator._schema.is_mutable and call.operator.namespace != "c10d" and "_amp_" not in call.name:
            for tensor in _written(call):
                self._known.pop(tensor, None)

    # Accounts ---------------------------------------------------------------------------------------------------

    def _account(self, call: Call, out: Any) -> None:
        """Count the operator, its bytes and the memory of its results."""
        operation = Operation(self.ledger.phase, call.name, call.source)
        self.ledger.ran(operation, self._moved(call, out))
        for leaf in _tensors(out):
            if not isinstance(leaf, FakeTensor):
                continue
            if leaf.fake_device.type == "cpu":
                raise RuntimeError(f"{call.name} returned a CPU tensor without data at {call.source}")
            if leaf.fake_device.type == "cuda":
                self.memory.born(leaf.untyped_storage(), operation)

    def _moved(self, call: Call, out: Any) -> int:
        """Bytes that the operator reads and writes."""
        if call.operator.is_view or call.packet in _UNINITIALISED:
            return 0
        made = [leaf for leaf in _tensors(out) if isinstance(leaf, FakeTensor)]
        read = list({id(tensor): tensor for tensor in call.fakes}.values())
        if call.packet in _WRITE_ONLY:
            read = [tensor for tensor in read if tensor is not call.args[0]]
        written = _written(call) if call.operator._schema.is_mutable else made
        moved = sum(map(tensor_bytes, [*read, *written]))
        if call.packet in _GATHERS and made and isinstance(call.args[0], FakeTensor):
            moved += tensor_bytes(made[0]) - tensor_bytes(call.args[0])
        return moved

    def as_one_operator(self, name: str, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a function of CUDA tensors as one fused elementwise kernel: its inputs are read and its outputs written
        once, and nothing in between takes memory."""
        operation = Operation(self.ledger.phase, name, current())
        inputs = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)}
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs.values()):
            raise NotImplementedError(
                f"{name}: compiled functions are called without autograd; got a tensor that needs it"
            )
        with _disable_current_modes(), self.fake:
            out = function(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, FakeTensor)]
        self.ledger.ran(operation, sum(map(tensor_bytes, [*inputs.values(), *made])))
        for tensor in made:
            self.memory.born(tensor.untyped_storage(), operation)
        return out

    # Operators that wait or copy --------------------------------------------------------------------------------

    def _item(self, call: Call) -> bool | int | float:
        self.ledger.wait("item", call.source)
        tensor = call.args[0]
        known = self.values(tensor)
        if known is not None:
            return known.item()
        overflow = any(word in str(call.source) for word in _OVERFLOW_WORDS)
        value = 0.0 if overflow else 1.0
        return value if tensor.dtype.is_floating_point else bool(value) if tensor.dtype == torch.bool else int(value)

    def _why_blocking(self, tensor: torch.Tensor, non_blocking: bool, dtype: torch.dtype | None = None) -> str:
        """Why a copy of a CPU tensor to the device blocks, or "" (ATen/native/cuda/Copy.cu)."""
        if not self.is_pinned(tensor):
            return "not pinned"
        if dtype is not None and dtype != tensor.dtype:
            return f"converted to {str(dtype)[6:]} on the CPU"
        return "" if non_blocking else "non_blocking=False"

    def _to_copy(self, call: Call) -> Any:
        source, dtype = call.args[0], call.kwargs.get("dtype") or call.args[0].dtype
        device = torch.device(call.kwargs.get("device") or source.device)
        if isinstance(source, FakeTensor) and device.type == "cpu":
            if not call.kwargs.get("non_blocking"):
                self.ledger.wait("copy to host", call.source)
            known = self.values(source)
            return torch.zeros(source.shape, dtype=dtype) if known is None else known.to(dtype).clone()
        if isinstance(source, FakeTensor):
            return self._run(call)
        why = self._why_blocking(source, bool(call.kwargs.get("non_blocking")), dtype)
        self.ledger.copy(source, why, call.source)
        with self.fake:
            out = torch.empty(source.shape, dtype=dtype, device=device)
        if _is_small(source):
            self._remember(out, source.to(dtype).clone())
        self._account(call, out)
        return out

    def _copy_(self, call: Call) -> Any:
        target, source = call.args[0], call.args[1]
        non_blocking = bool(call.args[2] if len(call.args) > 2 else call.kwargs.get("non_blocking"))
        if not isinstance(target, FakeTensor):
            if not (non_blocking and self.is_pinned(target)):
                self.ledger.wait("copy to host", call.source)
            known = self.values(source)
            return target.zero_() if known is None else target.copy_(known)
        if isinstance(source, FakeTensor):
            return self._run(call)
        self.ledger.copy(source, self._why_blocking(source, non_blocking, target.dtype), call.source)
        before = self.values(target)
        if before is not None and _is_small(source):
            before.copy_(source)
        elif _is_small(source) and _is_small(target) and target._base is None:
            self._known[target] = source.to(target.dtype).expand(target.shape).clone()
        else:
            self._known.pop(target, None)
        self._account(call, target)
        return target

    def _size_from_values(self, call: Call) -> Any:
        self.ledger.wait(call.name, call.source)
        if call.packet is aten.masked_scatter_backward:  # its size is an argument
            return self._run(call)
        if call.packet is aten.masked_select:
            return self._masked_select(call)
        known = self._on_values(call)
        if call.packet is aten.equal:
            return True if known is None else bool(known)
        if known is None:
            raise RuntimeError(f"{call.name}: the values of its input are not known at {call.source}")
        return self._run(call, known)

    def _masked_select(self, call: Call) -> torch.Tensor:
        tensor, mask = call.args
        chosen = self.values(mask)
        if chosen is None:
            raise RuntimeError(f"{call.name}: the values of its mask are not known at {call.source}")
        count = int(chosen.expand(torch.broadcast_shapes(chosen.shape, tensor.shape)).sum())
        with self.fake:
            out = torch.empty(count, dtype=tensor.dtype, device=tensor.device)
        self._account(call, out)
        return out

    def _repeat_interleave(self, call: Call) -> Any:
        if call.operator is aten.repeat_interleave.Tensor and call.kwargs.get("output_size") is None:
            return self._size_from_values(call)
        return self._run(call)

    def _index(self, call: Call) -> Any:
        """Indexing; a bool mask becomes integer indices first, and the host waits for their number."""
        indices = call.args[1]
        masks = [i for i in indices if isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)]
        if not masks:
            return self._run(call)
        self.ledger.wait(f"{call.name} with a bool mask", call.source)
        numbers: list[torch.Tensor | None] = []
        for index in indices:
            if not any(index is mask for mask in masks):
                numbers.append(index)
                continue
            known = self.values(index) if isinstance(index, FakeTensor) else index
            if known is None:
                raise RuntimeError(f"{call.name}: the values of its mask are not known at {call.source}")
            numbers += [self._fake_like(column, call) for column in known.nonzero().unbind(1)]
        args = (call.args[0], numbers, *call.args[2:])
        return self._run(Call(call.operator, args, call.kwargs, _tensors((args, call.kwargs)), call.source))


def _is_small(tensor: torch.Tensor) -> bool:
    return tensor.numel() <= (MOST_FLOATS if tensor.dtype.is_floating_point else MOST_VALUES)


def _written(call: Call) -> list[torch.Tensor]:
    """The inputs that the operator changes."""
    arguments = call.operator._schema.arguments
    changed = [
        call.kwargs.get(argument.name, call.args[place] if place < len(call.args) else None)
        for place, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return _tensors(changed)


def _tensors(nest: Any) -> list[torch.Tensor]:
    """The tensors in lists, tuples and dictionaries; much faster than pytree's leaves."""
    if isinstance(nest, torch.Tensor):
        return [nest]
    if isinstance(nest, dict):
        nest = nest.values()
    elif not isinstance(nest, list | tuple):
        return []
    return [tensor for item in nest for tensor in _tensors(item)]
