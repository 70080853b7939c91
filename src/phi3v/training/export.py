"""Exports weights: the final folder (official layout or PEFT adapter), a merged model, and files from ZeRO's shards.

Each folder is written under another name and then renamed, so it is complete or does not exist.
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
    """Writes FOLDER from the trained model. Collective, because ZeRO 3 gathers shards for it."""
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
    """Merges the adapter in OUTPUT/final into its base and writes OUTPUT/merged. Returns merge's report. For the first
    process.

    Raises CheckpointError if the merged model computes other results than base model and adapter.
    """
    with written_aside(output / "merged") as temporary:
        try:
            return merge(output / "final", temporary)
        except ValueError as error:
            raise CheckpointError(
                f"{output / 'merged'}: {error} The adapter itself is complete, in {output / 'final'}"
            ) from error


@contextlib.contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Yields the path of a temporary folder. Syncs it and replaces `folder` with it if the block raises no error."""
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    for path in [temporary, *temporary.rglob("*")]:
        force_to_disk(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def export_zero_checkpoint(checkpoint: Path, base: Path, out: Path, dtype: str = "bf16") -> Path:
    """Converts a ZeRO checkpoint to safetensors in the official layout, from its float32 master weights. Needs no GPU.

    checkpoint: a checkpoint-N folder. base: the folder that training started from (configuration, processor). The
    result includes `num_crops` of the training's settings.json.
    Raises ValueError if a rank's shard or a weight is missing, or if OUT already contains files.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: not empty; expected a new folder for the exported checkpoint")
    if not (checkpoint / "latest").is_file():
        raise ValueError(f"{checkpoint}: contains no file `latest`; expected a checkpoint-N folder of a ZeRO job")
    prepare_deepspeed(cuda=False)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line per shard
        try:
            state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
        except (FileNotFoundError, AssertionError, ValueError, RuntimeError, KeyError, IndexError) as error:
            raise ValueError(
                f"{checkpoint}: incomplete or damaged shards ({error}); choose another checkpoint"
            ) from error
    model = Phi3VForCausalLM.from_pretrained(base)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"{checkpoint}: got {len(missing)} missing and {len(unexpected)} unknown weights "
            f"({[*missing, *unexpected][:3]}); "
            f"expected the weights of {base}"
        )
    model.to(TORCH_DTYPE[dtype]).save_pretrained(out)
    settings = checkpoint.resolve().parents[1] / "settings.json"
    num_crops = read_json(settings)["num_crops"] if settings.is_file() else None
    Phi3VProcessor.from_pretrained(base, num_crops=num_crops).save_pretrained(out)
    return out
