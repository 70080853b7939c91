"""Which line of code an operator comes from: the innermost line of phi3v, and the innermost line of a library."""

from __future__ import annotations

import linecache
import sys
from dataclasses import dataclass
from types import CodeType, FrameType

import torch

_LIBRARIES = tuple(
    f"/site-packages/{name}/"
    for name in ("accelerate", "bitsandbytes", "deepspeed", "peft", "transformers", "torch/optim", "torch/amp")
)
_kinds: dict[CodeType, str] = {}
_lines_of_nodes: dict[tuple[int, str], Source] = {}


@dataclass(frozen=True)
class Source:
    """Up to two (file, line) pairs: of phi3v, and of the library that phi3v called."""

    own: tuple[str, int] | None = None
    library: tuple[str, int] | None = None
    node: str = ""
    """Autograd node, for an operator of the backward pass."""

    def __str__(self) -> str:
        lines = [_text(place) for place in (self.own, self.library) if place]
        text = " <- ".join(lines) or "(no line of phi3v or its libraries)"
        return f"{text} [{self.node}]" if self.node else text


def _text(place: tuple[str, int]) -> str:
    file, number = place
    short = file.split("/src/")[-1].split("/site-packages/")[-1]
    return f"{short}:{number} {linecache.getline(file, number).strip()}"


def _kind(code: CodeType) -> str:
    if code not in _kinds:
        name = code.co_filename
        own = "/src/phi3v/" in name
        _kinds[code] = "own" if own else "library" if any(x in name for x in _LIBRARIES) else ""
    return _kinds[code]


def current() -> Source:
    """The source of the operator that is being dispatched.

    In the backward pass most operators have no Python caller: they take the line whose forward operator made the
    autograd node, found by the node's sequence number.
    """
    own = library = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        kind = _kind(frame.f_code)
        if kind == "own":
            own = (frame.f_code.co_filename, frame.f_lineno)
            break
        if kind == "library" and library is None:
            library = (frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    if own is None and library is None and torch._C._current_graph_task_id() != -1:
        node = torch._C._current_autograd_node()
        if node is not None:
            name = node.name()
            found = _lines_of_nodes.get((node._sequence_nr(), name), Source())
            return Source(found.own, found.library, name)
    return Source(own, library)


def remember_node(operator: str, source: Source) -> None:
    """Note the line of a forward operator for its autograd node, which is made just before the operator runs."""
    if torch.is_grad_enabled():
        name = "".join(part.capitalize() for part in operator.split("::")[-1].split("_"))
        for version in "01":
            _lines_of_nodes[(torch._C._autograd._get_sequence_nr() - 1, f"{name}Backward{version}")] = source
