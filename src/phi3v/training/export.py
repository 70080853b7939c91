"""The final weights: a checkpoint in the official layout, or a PEFT adapter folder; whole or not there at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from phi3v.model.adapters import merge, save_adapter
from phi3v.settings import FinetuneSettings
from phi3v.training.checkpoints import CheckpointError


def export_final(trainer: Any, processor: Any, settings: FinetuneSettings, folder: Path) -> None:
    """Write FOLDER from the trainer's model; a collective call, as ZeRO 3 gathers shards for it."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_deepspeed_enabled else None
    if trainer.args.process_index == 0:
        temporary = folder.with_name(f".{folder.name}.writing")
        shutil.rmtree(temporary, ignore_errors=True)
        model = trainer.accelerator.unwrap_model(trainer.model)
        if settings.method in ("lora", "qlora"):
            save_adapter(model, temporary)
        else:
            model.save_pretrained(temporary, state_dict=state)
        processor.save_pretrained(temporary)
        sync_folder(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    trainer.accelerator.wait_for_everyone()


def export_merged(output: Path) -> dict[str, float]:
    """Fold OUTPUT/final, an adapter, into its base and write OUTPUT/merged; for the first process. Returns merge's report.

    Raises CheckpointError where the merged model does not compute what base and adapter do.
    """
    temporary, folder = output / ".merged.writing", output / "merged"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        report = merge(output / "final", temporary)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error} The adapter is whole: {output / 'final'}") from error
    sync_folder(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return report


def sync_folder(folder: Path) -> None:
    """fsync every file of a folder and the folders themselves."""
    for path in [folder, *folder.rglob("*")]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
