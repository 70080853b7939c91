"""Writes checkpoints while training continues: a snapshot in host memory, then files and digests in a thread."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from phi3v.training.checkpoints import (
    RESUMES,
    WRITING,
    CheckpointError,
    FileFacts,
    digest_and_sync,
    files_of,
    rotate,
    seal,
    share_of,
)
from phi3v.training.memory import free_ram

Own = TypeVar("Own")


class CheckpointWriter:
    """Writes checkpoints while training continues, one at a time. Each process has a writer.

    `begin` and `write` copy the state to host memory at the end of a step. A thread of each process then writes its
    part, syncs it and computes its digests. After the parts of all processes are written, `seal` lets the first process
    rename the checkpoint, also in its thread. All collective calls run on the training thread, between two steps.
    DeepSpeed writes its shards on the training thread; only syncing and digesting them happens in the thread.
    """

    def __init__(self, folder: Path, keep: int, process: int, processes: int) -> None:
        self.folder, self.keep, self.process, self.processes = folder, keep, process, processes
        self.settings: dict[str, object] = {}
        """Fingerprint of settings, data and base weights. Only set in the first process."""
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._part: Future[dict[str, FileFacts]] | None = None
        self._sealing: Future[None] | None = None
        self._host: Any = None
        """The last copy of the state, which the next one overwrites."""
        self._step = 0
        self._best: Path | None = None

    def begin(self, step: int) -> Path:
        """Finishes the previous checkpoint, and returns the empty folder of the next one. A collective call."""
        self.finish()
        self._step = step
        writing = self.folder / WRITING
        with self.explained():
            if self.process == 0:
                shutil.rmtree(writing, ignore_errors=True)
                (writing / self._name).mkdir(parents=True)
        self._barrier()
        return writing / self._name

    def write(self, parts: dict[str, object], best_step: int) -> None:
        """Writes this process's `parts`, {file name: object for torch.save}, during training. A collective call.

        best_step: step of a checkpoint to keep, or 0. If host memory cannot hold a copy, training waits for the files.
        """
        folder = self.folder / WRITING / self._name
        self._best = self.folder / f"checkpoint-{best_step}" if best_step else None
        names = [path.relative_to(folder).as_posix() for path in files_of(folder)]
        share = share_of(self._gathered(names), self.process, self.processes)
        fits = self._host is not None or 2 * tensor_bytes(parts) < free_ram()
        if fits:
            # Reuses the memory of the previous copy, because allocating new pages takes several times as long as
            # copying.
            parts = self._host = host_copy(parts, self._host)
        self._part = self._threads.submit(_write_part, folder, parts, share)
        if not fits:
            with self.explained():
                self._part.result()

    @property
    def part_written(self) -> bool:
        """Whether this process's part is on disk and waits for `seal`. Raises CheckpointError if writing failed."""
        with self.explained():
            if self._sealing is not None and self._sealing.done():
                self._sealing.result()
            if self._part is not None and self._part.done():
                self._part.result()
                return True
        return False

    def seal(self) -> None:
        """Renames the checkpoint after all its parts are written. A collective call."""
        assert self._part is not None
        with self.explained():
            digests = self._part.result()
        self._part = None
        files = {name: facts for part in self._gathered(digests) for name, facts in part.items()}
        if self.process == 0:
            self._sealing = self._threads.submit(self._seal, self._step, files)

    def finish(self) -> None:
        """Waits until the current checkpoint is complete. A collective call. Raises CheckpointError."""
        if self._part is not None:
            self.seal()
        with self.explained():
            if self._sealing is not None:
                self._sealing.result()
        self._sealing = None
        self._barrier()

    def _seal(self, step: int, files: dict[str, FileFacts]) -> None:
        name = f"checkpoint-{step}"
        seal(self.folder / WRITING / name, self.folder / name, files, step, self.processes, self.settings)
        rotate(self.folder, self.keep, self._best)

    @property
    def _name(self) -> str:
        return f"checkpoint-{self._step}"

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Converts an error of writing to a CheckpointError."""
        try:
            yield
        except Exception as error:
            self._part = self._sealing = None
            free = shutil.disk_usage(self.folder).free / 1e9
            raise CheckpointError(
                f"step {self._step}: {self.folder / self._name} could not be written ({error}); {free:.2f} GB free "
                f"there. {RESUMES}"
            ) from error

    def _gathered(self, own: Own) -> list[Own]:
        """The values of all processes, by rank. A collective call."""
        if self.processes == 1:
            return [own]
        found: list[Any] = [None] * self.processes
        dist.all_gather_object(found, own)
        return found

    def _barrier(self) -> None:
        if self.processes > 1:
            dist.barrier()


def _write_part(folder: Path, parts: dict[str, object], share: list[str]) -> dict[str, FileFacts]:
    """Writes `parts`. Returns sizes and digests of them and of DeepSpeed's files `share`."""
    for name, value in parts.items():
        torch.save(value, folder / name)
    return digest_and_sync(folder, [*parts, *share])


def tensor_bytes(value: object) -> int:
    """Size in bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def host_copy(value: Any, into: Any = None) -> Any:
    """Copies nested dicts, lists and tuples, with their tensors in host memory. into: an earlier copy to
    overwrite."""
    if isinstance(value, torch.Tensor):
        same = isinstance(into, torch.Tensor) and (into.shape, into.dtype) == (value.shape, value.dtype)
        return into.copy_(value.detach()) if same else value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        before = into if isinstance(into, dict) else {}
        return {name: host_copy(item, before.get(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        olds = into if isinstance(into, list | tuple) and len(into) == len(value) else [None] * len(value)
        return type(value)(host_copy(item, old) for item, old in zip(value, olds, strict=True))
    return value
