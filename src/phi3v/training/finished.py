"""Keeps a finished row where Snakemake does not delete it, so that the same command ends at once instead of training.

Snakemake deletes the outputs of a job before it starts and after a failure. It counts a finished job as failed if the
job's files appear late on a network file system, or if Snakemake itself is killed while the job finishes.

.finished/    checkpoint.json      the seal, as in a checkpoint: settings, and the digest of every file
              final/               hard links to the files of final/, which use no additional space
              manifest.json
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from phi3v.training.checkpoints import digest_and_sync, files_of, seal, why_not
from phi3v.training.export import written_aside

KEPT = ".finished"
MANIFEST = "manifest.json"


def keep(output: Path, step: int, settings: dict[str, object]) -> str:
    """Keeps OUTPUT/final and its manifest. Returns the reason of a failure, or "". settings:
    checkpoints.fingerprint."""
    aside = output / f"{KEPT}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _link(output / "final", aside / "final")
        os.link(output / MANIFEST, aside / MANIFEST)
    except OSError as error:
        # A file system without hard links.
        shutil.rmtree(aside, ignore_errors=True)
        return str(error)
    files = digest_and_sync(aside, [str(path.relative_to(aside)) for path in files_of(aside)])
    seal(aside, output / KEPT, files, step, 1, settings)
    return ""


def restore(output: Path, settings: dict[str, object], merged: bool) -> bool:
    """Restores OUTPUT/final and its manifest. Returns False if nothing was kept, or with other settings.

    merged: OUTPUT/merged must exist too. It is not kept here.
    """
    kept = output / KEPT
    if not kept.is_dir() or (merged and not (output / "merged").is_dir()):
        return False
    if why_not(kept, settings, processes=1, sharded=False):
        shutil.rmtree(kept)
        return False
    with written_aside(output / "final") as temporary:
        _link(kept / "final", temporary)
    # A copy, because an output must not be older than the inputs.
    shutil.copyfile(kept / MANIFEST, output / MANIFEST)
    return True


def _link(folder: Path, target: Path) -> None:
    """Copies a folder with hard links to its files, without Snakemake's timestamp."""
    shutil.copytree(folder, target, copy_function=os.link, ignore=shutil.ignore_patterns(".snakemake_timestamp"))
