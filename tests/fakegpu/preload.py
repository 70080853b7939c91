"""Import everything that a walk needs once, in a process that then forks for each walk."""

from __future__ import annotations

import os

from . import guard


def preload() -> None:
    """Load the guard, torch, and then the libraries as on a machine with GPUs.

    bitsandbytes comes first: it would look for its CUDA library. Autograd must not run here, for its threads do not
    survive a fork.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["DS_BUILD_OPS"] = "0"
    guard.load()
    import logging
    import warnings

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    import bitsandbytes  # noqa: F401
    import peft.tuners.lora.bnb  # noqa: F401

    from .machine import on_machine

    with on_machine():
        import deepspeed  # noqa: F401

        from phi3v.benchmark import speed  # noqa: F401
        from phi3v.model import adapters, modeling  # noqa: F401
        from phi3v.training import finetune, job  # noqa: F401
