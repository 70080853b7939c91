"""A process of a job from start to end: environment, process group, signals, and explained failures."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from phi3v.model.runtime import uses_zero
from phi3v.settings import FinetuneSettings, SettingsError
from phi3v.training.checkpoints import RESUMES, CheckpointError
from phi3v.training.compat import prepare_deepspeed

# Longest wait of a process for the others. At resume, one process reads and hashes whole checkpoints (58 GB each in
# full fine-tuning), and it also merges adapters. Both can take longer than PyTorch's default of 10 minutes.
LONGEST_WAIT = timedelta(hours=2)
REQUEUE_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again later. Schedulers requeue on it, and no Python error uses it."""
# Messages of gloo, TCPStore and NCCL about a lost peer (PyTorch has no exception class for it).
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
# Message of PyTorch about an operator that --deterministic rejects.
NOT_DETERMINISTIC = "does not have a deterministic implementation"


class LostProcessError(RuntimeError):
    """Another process of the job has ended."""


T = TypeVar("T")


# The processes of the job ----------------------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this is the job's first process. Only this process writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """Number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def say(text: str) -> None:
    """Prints a line to the log, from the first process only."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def of_first(compute: Callable[[], T]) -> T:
    """Calls `compute` in the first process, and returns or raises its result in all processes. A collective call."""
    shared: list[Any] = [None, None]
    if is_first():
        try:
            shared[0] = compute()
        except Exception as error:
            shared[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    if shared[1] is not None:
        raise shared[1]
    return shared[0]


def over_processes(values: list[float], how: Literal["MIN", "MAX", "SUM"], device: torch.device) -> list[float]:
    """Reduces the values over all processes. Exact for whole numbers up to 2^53. A collective call."""
    if not dist.is_initialized():
        return values
    total = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
    dist.all_reduce(total, op=getattr(dist.ReduceOp, how))
    return total.tolist()


def of_all(value: float, how: Literal["MIN", "MAX", "SUM"], device: torch.device) -> float:
    """Reduces one value with `over_processes`."""
    return over_processes([value], how, device)[0]


# Start ----------------------------------------------------------------------------------------------------------------


def prepare_process(settings: FinetuneSettings, device: torch.device) -> None:
    """Prepares a process before the heavy imports: quiet libraries, and a rendezvous for a single process."""
    # PyTorch prefers MKL_NUM_THREADS to OMP_NUM_THREADS. Snakemake sets it to the threads of the whole rule, which each
    # process would then use.
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if uses_zero(settings) and "RANK" not in os.environ:
        # DeepSpeed needs a process group even for one process without torchrun.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone | {"MASTER_PORT": str(port)})
    quiet_libraries()
    if settings.deterministic:
        deterministic_kernels(device)
    if uses_zero(settings):
        prepare_deepspeed(device.type == "cuda")


def quiet_libraries() -> None:
    """Turns off the messages that libraries print for their own developers."""
    for name in ("bitsandbytes", "accelerate", "torch.distributed", "DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def deterministic_kernels(device: torch.device) -> None:
    """Allows only operators that are deterministic bit by bit. Must run before the first kernel on a GPU.

    On a GPU, an operator without a deterministic kernel raises. With warnings instead, PyTorch would keep the atomics
    of its flash and memory-efficient attention (ATen, attention_backward.cu). flash-attn reads transformers' variable.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cuda")


def join_processes(device: torch.device) -> None:
    """Joins the process group if torchrun started this process. Sets accelerate's device in any case."""
    from accelerate import PartialState
    from accelerate.utils import InitProcessGroupKwargs

    cuda = device.type == "cuda"
    group = InitProcessGroupKwargs(backend="nccl" if cuda else "gloo", timeout=LONGEST_WAIT)
    PartialState(cpu=not cuda, **(group.to_kwargs() if "RANK" in os.environ else {}))


# Signals --------------------------------------------------------------------------------------------------------------


class StopRequest:
    """Records whether SIGTERM or SIGUSR1 asked this process to save and stop, inside a `with` block."""

    def __init__(self) -> None:
        self.asked = False
        self.signal = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread can handle signals. Other threads, such as a notebook's, receive no request.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # After an error, the signals stay blocked: torchrun sends SIGTERM as soon as another process ends, but this one
        # still has to report its error.
        if error is None:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked, self.signal = True, signal.Signals(number).name


def ignore_sigterm(worker: int) -> None:
    """Makes a data loading process ignore SIGTERM, so that the current step gets its data.

    PyTorch would let the process die, and the step would fail. The process ends when its parent requests it or ends.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def seconds_to_save(command: Sequence[str], environment: Mapping[str, str]) -> float | None:
    """Seconds until torchrun kills its workers after SIGTERM. None if torchrun did not start this process.

    command: the parent's command line. environment: this process's. Torch 2.13: launcher/api.py, default 30 s.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    for at, word in enumerate(command):
        name, _, value = word.partition("=")
        if name.replace("_", "-") == "--shutdown-timeout":
            return float(value or command[at + 1])
    return float(environment.get("PET_SHUTDOWN_TIMEOUT") or environment.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT") or 30)


def parents_command() -> list[str]:
    """The command line of the parent process. Empty if unreadable."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")
    except (OSError, UnicodeDecodeError):
        return []


# End ------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def explain_failure(output: Path) -> Iterator[None]:
    """Explains a full disk, a lost process and a non-deterministic operator in one sentence each."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(output).free / 1e9
        raise CheckpointError(
            f"{error.filename or output}: the disk is full ({error.strerror}; {free:.2f} GB free); free some space. "
            f"{RESUMES}"
        ) from error
    except RuntimeError as error:
        first_line = str(error).splitlines()[0] if str(error) else ""
        if NOT_DETERMINISTIC in str(error):
            raise SettingsError(
                f"command line: field `deterministic`: got true: {first_line.split(', but you set')[0]} on this "
                "device; expected --no-deterministic, or another method or attention kernel"
            ) from error
        if not any(text in str(error) for text in LOST):
            raise
        raise LostProcessError(
            f"Rank {os.environ.get('RANK', '0')} lost contact with another rank ({first_line[:200]}). See that rank's "
            f"traceback or torchrun's summary for the cause. {RESUMES}"
        ) from error


def leave(code: int) -> int:
    """Closes the process group after a barrier, so that no process ends while others still communicate."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return code
