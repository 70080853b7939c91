"""A finished row, kept where Snakemake removes nothing: the same command then ends at once instead of training again.

Snakemake removes the outputs of a job before it starts, and after a failure. It counts a job as failed if a file system
shows a finished job's files late, or if it was killed itself while the job ran to its end.

.finished/    checkpoint.json      the seal, as that of a checkpoint: settings, and the digest of every file
              final/               hard links to the files of final/, which take no room
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
    """Keep OUTPUT/final and its manifest; returns why it could not be done, or "". settings: checkpoints.fingerprint."""
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
    """Write OUTPUT/final and its manifest from what was kept; False if there is nothing, or if it belongs to other settings.

    merged: OUTPUT/merged, which is not kept, must be there too.
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
    """A copy of a folder whose files are hard links. Snakemake's own timestamp in it is left out."""
    shutil.copytree(folder, target, copy_function=os.link, ignore=shutil.ignore_patterns(".snakemake_timestamp"))
