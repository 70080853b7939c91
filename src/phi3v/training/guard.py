"""Losses that are no numbers, and a float16 loss scale that has collapsed: reported with the examples, then stopped."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from phi3v.provenance.manifest import write_json
from phi3v.training.logging import say


class NotANumberError(RuntimeError):
    """The loss was NaN or infinite for several steps in a row."""


class LossGuard:
    """Watches the loss of one process. scale: the float16 loss scale now; None without one."""

    def __init__(self, folder: Path, process: int, nan_patience: int, scale: Callable[[], float | None]) -> None:
        self.folder, self.process, self.nan_patience, self.scale = folder, process, nan_patience, scale
        self._has_collapsed = False
        self._bad_ids: list[list[str]] = []

    def check(self, step: int, loss: float, ids: list[str]) -> None:
        """Look at a step's loss; ids: its examples. Raises NotANumberError after `nan_patience` bad steps in a row."""
        scale = self.scale()
        if scale is not None and scale < 1 and not self._has_collapsed:
            self._has_collapsed = True
            say(
                f"step {step}: the float16 loss scale has collapsed to {scale:g}. Gradients overflow at every scale: "
                "use --bf16"
            )
        if math.isfinite(loss):
            self._bad_ids = []
            return
        self._bad_ids.append(ids)
        bad = len(self._bad_ids)
        if bad < self.nan_patience:
            return
        path = self.folder / f"bad_examples.rank{self.process}.json"
        write_json(path, {"step": step, "ids": self._bad_ids})
        raise NotANumberError(
            f"step {step}: the loss was not a finite number in {bad} steps in a row; the examples of these steps are "
            f"in {path}. What usually helps: a lower --learning_rate, --bf16 instead of --fp16, or leaving these "
            "examples out."
        )
