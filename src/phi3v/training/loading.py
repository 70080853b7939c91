"""Batches on their way to the trainer: loader processes, and the micro-batches of a step one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from phi3v.training.batching import PlannedBatches
from phi3v.training.meter import Meter
from phi3v.training.signals import ignore_sigterm

PREFETCH = 4
"""Batches that each loader process holds ready, at most 24 MB each for a full-size page."""


def batch_loader(
    dataset: Dataset[Any],
    batches: PlannedBatches,
    collate: Callable[[list[Any]], dict[str, Any]],
    workers: int,
    cuda: bool,
    persistent: bool = False,
) -> DataLoader[Any]:
    """A loader of planned micro-batches; persistent: its processes outlive an epoch.

    It has a random generator of its own. Otherwise each new iterator would draw from the global one, and a resumed job
    would see other dropout masks than one that ran through.
    """
    some = workers > 0
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=cuda,
        multiprocessing_context="fork" if some else None, worker_init_fn=ignore_sigterm if some else None,
        prefetch_factor=PREFETCH if some else None, persistent_workers=persistent and some,
        generator=torch.Generator(),
    )  # fmt: skip


class StepBatches:
    """The micro-batches of one optimizer step, each fetched when it is needed; the first at once.

    Fetching the first early leaves the state of the random generators to the training loop: it restores them after the
    first fetch of a resumed job.
    """

    def __init__(self, batches: Iterator[dict[str, Any]], count: int, meter: Meter) -> None:
        self.batches, self.count, self.meter = batches, count, meter
        self._first: dict[str, Any] | None = self._next()

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        assert self._first is not None, "the micro-batches of a step are fetched once"
        batch, self._first = self._first, None
        for following in range(self.count):
            yield batch if following == 0 else self._next()

    def _next(self) -> dict[str, Any]:
        with self.meter.loading():
            return next(self.batches)
