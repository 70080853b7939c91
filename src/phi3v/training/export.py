"""Weights for use: the final folder (official layout or PEFT adapter), a merged model, and plain files from ZeRO's shards.

Each folder is written aside and renamed, so it is complete or does not exist.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi3v.model import Phi3VForCausalLM, Phi3VProcessor
from phi3v.model.adapters import merge, save_adapter
from phi3v.model.runtime import TORCH_DTYPE
from phi3v.provenance.manifest import read_json
from phi3v.training.checkpoints import CheckpointError, force_to_disk
from phi3v.training.compat import prepare_deepspeed
from phi3v.training.loop import Loop


def export_final(loop: Loop, folder: Path) -> None:
    """Write FOLDER from the trained model; a collective call, as ZeRO 3 gathers shards for it."""
    state = loop.accelerator.get_state_dict(loop.model) if loop.is_sharded else None
    if loop.is_main:
        with written_aside(folder) as temporary:
            model: Any = loop.accelerator.unwrap_model(loop.module)
            if loop.settings.method in ("lora", "qlora"):
                save_adapter(model, temporary)
            else:
                model.save_pretrained(temporary, state_dict=state)
            loop.training.examples.dataset.processor.save_pretrained(temporary)
    loop.accelerator.wait_for_everyone()


def export_merged(output: Path) -> dict[str, float]:
    """Fold OUTPUT/final, an adapter, into its base and write OUTPUT/merged; for the first process. Returns merge's report.

    Raises CheckpointError if the merged model does not compute what base and adapter do.
    """
    with written_aside(output / "merged") as temporary:
        try:
            return merge(output / "final", temporary)
        except ValueError as error:
            raise CheckpointError(
                f"{output / 'merged'}: {error} The adapter is complete: {output / 'final'}"
            ) from error


@contextlib.contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """The path of a folder that replaces `folder` when the block ends without an error, forced to disk."""
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    for path in [temporary, *temporary.rglob("*")]:
        force_to_disk(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def export_zero_checkpoint(checkpoint: Path, base: Path, out: Path, dtype: str = "bf16") -> Path:
    """A ZeRO checkpoint as plain safetensors in the official layout, from its float32 master weights; needs no GPU.

    checkpoint: a checkpoint-N folder. base: the folder that training started from (configuration, processor). The
    `num_crops` of the training's settings.json is saved with it.
    Raises ValueError if a rank's shard or a weight is missing, or OUT holds files already.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: not empty; expected a new folder for the exported checkpoint")
    if not (checkpoint / "latest").is_file():
        raise ValueError(f"{checkpoint}: no file `latest`; expected a checkpoint-N folder that ZeRO wrote")
    prepare_deepspeed(cuda=False)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does shard by shard
        try:
            state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
        except (FileNotFoundError, AssertionError, ValueError, RuntimeError, KeyError, IndexError) as error:
            raise ValueError(f"{checkpoint}: its shards are not complete ({error})") from error
    model = Phi3VForCausalLM.from_pretrained(base)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"{checkpoint}: {len(missing)} weights missing, {len(unexpected)} unknown ({[*missing, *unexpected][:3]}); "
            f"expected those of {base}"
        )
    model.to(TORCH_DTYPE[dtype]).save_pretrained(out)
    settings = checkpoint.resolve().parents[1] / "settings.json"
    num_crops = read_json(settings)["num_crops"] if settings.is_file() else None
    Phi3VProcessor.from_pretrained(base, num_crops=num_crops).save_pretrained(out)
    return out
