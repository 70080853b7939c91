"""A process of a job from its start to its end: environment, process group, signals, and failures in plain words."""

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

# A process may wait so long for the others. At resume one process reads and hashes whole checkpoints (58 GB each in
# full fine-tuning) and merging is its work too, which takes longer than PyTorch's default of 10 minutes.
LONGEST_WAIT = timedelta(hours=2)
REQUEUE_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again later. Schedulers requeue on it; no Python error ends with it."""
# What gloo, TCPStore and NCCL report of a peer that is gone (PyTorch has no class of its own for it).
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
# What PyTorch reports of an operator that --deterministic refuses.
NOT_DETERMINISTIC = "does not have a deterministic implementation"


class LostProcessError(RuntimeError):
    """Another process of the job is gone."""


T = TypeVar("T")


# The processes of the job ----------------------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this is the job's first process, which alone writes and reports."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """Processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def say(text: str) -> None:
    """A line for the log, from the first process only."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def of_first(compute: Callable[[], T]) -> T:
    """What `compute` returns or raises in the first process, in all of them; a collective call."""
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
    """The values of all processes as one, exact for whole numbers to 2^53; a collective call."""
    if not dist.is_initialized():
        return values
    total = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
    dist.all_reduce(total, op=getattr(dist.ReduceOp, how))
    return total.tolist()


def of_all(value: float, how: Literal["MIN", "MAX", "SUM"], device: torch.device) -> float:
    """One value of `over_processes`."""
    return over_processes([value], how, device)[0]


# Start ----------------------------------------------------------------------------------------------------------------


def prepare_process(settings: FinetuneSettings, device: torch.device) -> None:
    """Environment of a process before the heavy imports: quiet libraries, rendezvous for a lone process."""
    # PyTorch takes MKL_NUM_THREADS over OMP_NUM_THREADS, and Snakemake exports the former as the whole rule's threads:
    # every process would then have as many as all together.
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if uses_zero(settings) and "RANK" not in os.environ:
        # DeepSpeed needs a process group even for one process started without torchrun.
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
    """Turn off the messages that libraries print for their own developers."""
    for name in ("bitsandbytes", "accelerate", "torch.distributed", "DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def deterministic_kernels(device: torch.device) -> None:
    """Only operators that repeat bit by bit; must run before the first kernel on a GPU.

    There an operator without such a kernel raises. With a warning instead, PyTorch would keep the atomics of its flash
    and memory-efficient attention (ATen, attention_backward.cu); the flash-attn package reads transformers' variable.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cuda")


def join_processes(device: torch.device) -> None:
    """Join the process group if torchrun started this process; accelerate remembers the device in any case."""
    from accelerate import PartialState
    from accelerate.utils import InitProcessGroupKwargs

    cuda = device.type == "cuda"
    group = InitProcessGroupKwargs(backend="nccl" if cuda else "gloo", timeout=LONGEST_WAIT)
    PartialState(cpu=not cuda, **(group.to_kwargs() if "RANK" in os.environ else {}))


# Signals --------------------------------------------------------------------------------------------------------------


class StopRequest:
    """Whether SIGTERM or SIGUSR1 asked this process to save and leave; listens inside a `with` block."""

    def __init__(self) -> None:
        self.asked = False
        self.signal = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may handle signals; elsewhere (a notebook's worker) nobody asks.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # After an error the signals stay without effect: torchrun sends SIGTERM as soon as another process is gone, and
        # this one still has to report what it saw.
        if error is None:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked, self.signal = True, signal.Signals(number).name


def ignore_sigterm(worker: int) -> None:
    """For a data loading process: a signal to the whole job must not take away the data of the step under way.

    PyTorch would let it die of SIGTERM, and the step with it. It ends when its parent asks or is gone.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def seconds_to_save(command: Sequence[str], environment: Mapping[str, str]) -> float | None:
    """How long torchrun lets its workers live after SIGTERM; None if no torchrun started this process.

    command: the parent's command line. environment: this process's. Torch 2.13: launcher/api.py, 30 s by default.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    for at, word in enumerate(command):
        name, _, value = word.partition("=")
        if name.replace("_", "-") == "--shutdown-timeout":
            return float(value or command[at + 1])
    return float(environment.get("PET_SHUTDOWN_TIMEOUT") or environment.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT") or 30)


def parents_command() -> list[str]:
    """The command line of the parent process; empty if it cannot be read."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")
    except (OSError, UnicodeDecodeError):
        return []


# End ------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def explain_failure(output: Path) -> Iterator[None]:
    """Report a full disk, a lost process and an operator that does not repeat in one sentence each."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(output).free / 1e9
        raise CheckpointError(
            f"{error.filename or output}: the disk is full ({error.strerror}; {free:.2f} GB are free). {RESUMES}"
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
    """Close the process group, so that no process is still communicating when another ends."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return code
