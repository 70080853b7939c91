"""What a finished job of the workflow found, in a few words for the terminal, from the files that it left."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phi3v.settings import ResolvedRun, SettingsError, load_run

METRIC_NAMES = {"anls": "ANLS", "cer": "CER", "wer": "WER"}


def outcome(rule: str, output: Sequence[str]) -> str:
    """`ROW: ANLS 4.9 → 91.5` and the like; empty for a job without a result, and for files that cannot be read.

    rule: the workflow's rule, with a prefix if another workflow uses it as a module. output: what the job wrote, its
    manifest first.
    """
    describe = next((function for name, function in DESCRIPTIONS.items() if rule.endswith(name)), None)
    try:
        return describe(Path(output[0]).parent) if describe else ""
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return ""


def trained(folder: Path) -> str:
    """Steps and examples of training, and the loss."""
    observed = _read(folder / "observed.json")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [point["loss"] for line in lines if "loss" in (point := json.loads(line))]
    loss = f", loss {losses[0]:.2f} → {losses[-1]:.2f}" if losses else ""
    return f"{folder.name}: trained {observed['steps']} steps on {observed['examples']} examples{loss}"


def evaluated(folder: Path) -> str:
    """The score of a row, after the one of the model that it started from if that is there."""
    after = _read(folder / "after" / "metrics.json")
    before = ""
    if (baseline := _baseline(folder)) and (file := baseline / "before" / "metrics.json").is_file():
        before = f"{_read(file)['score']:.1f} → "
    control = folder / "control" / "metrics.json"
    swapped = _read(control).get("score") if control.is_file() else None
    beside = "" if swapped is None else f" ({swapped:.1f} with swapped pictures)"
    return f"{folder.name}: {_metric(after)} {before}{after['score']:.1f}{beside}"


def base_evaluated(folder: Path) -> str:
    """The score of a model before training."""
    found = _read(folder / "before" / "metrics.json")
    return f"{folder.name}: {_metric(found)} {found['score']:.1f} before training"


def officially_evaluated(folder: Path) -> str:
    """The score of a row on the authors' own split."""
    found = _read(folder / "after" / "metrics.json")
    return f"{folder.name}: {_metric(found)} {found['score']:.1f} on the official split"


def timed(folder: Path) -> str:
    """The speed of a row."""
    found = _read(folder / "speed.json")
    return f"{folder.name}: {found['images_per_second']:.4g} images/s, spread {100 * found['spread']:.1f} %"


DESCRIPTIONS = {
    "finetune": trained,
    "evaluate": evaluated,
    "evaluate_base": base_evaluated,
    "evaluate_official": officially_evaluated,
    "speed_row": timed,
}


def _metric(found: dict[str, Any]) -> str:
    return METRIC_NAMES.get(found["metric"], str(found["metric"]))


def _read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def _baseline(folder: Path) -> Path | None:
    """RUN/evaluate/ROW to RUN/evaluate/base/BASELINE."""
    config = folder.parent.parent / "config.json"
    if not config.is_file():
        return None
    try:
        return folder.parent / "base" / _run(config, config.stat().st_mtime_ns).job(folder.name).baseline
    except SettingsError:
        return None


@functools.lru_cache(1)
def _run(config: Path, changed: int) -> ResolvedRun:
    """The run of a folder; changed: when its settings were written."""
    return load_run(_read(config))
