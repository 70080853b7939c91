"""Texts in mistral.rs, which shares no code with this package: another language, its own kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clients.reference import answer, compare, table, write_job
from phi3v.model.processing import load_tokenizer

pytest.importorskip("mistralrs", reason="mistral.rs has no wheel for this machine")
SCRIPT = Path(__file__).with_name("mistral.py")


def texts(checkpoint: Path, questions: list[dict], folder: Path) -> dict[str, dict]:
    """Comparison by case. mistral.rs gives text and log-probabilities, not ids."""
    job = write_job(folder / "job.json", checkpoint, questions)
    # Its cache of keys and values is float16 on a CPU otherwise.
    environment = {**os.environ, "MISTRALRS_CPU_KV_F32": "1", "RAYON_NUM_THREADS": "2"}
    subprocess.run([sys.executable, SCRIPT, job, folder / "result.json"], env=environment, check=True)
    theirs = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    tokenizer, found = load_tokenizer(checkpoint), {}
    for name, ours in answer(checkpoint, questions).items():
        assert theirs[name]["text"] == tokenizer.decode(ours["ids"]), name
        found[name] = compare(ours, {"ids": ours["ids"], "logprobs": theirs[name]["logprobs"]})
    return found


def test_mistral_rs_writes_the_same_texts(checkpoint, questions, tmp_path):
    for name, row in texts(checkpoint, questions[:2], tmp_path).items():
        assert row["logprob_distance"] < 1e-4, name


@pytest.mark.verify
def test_mistral_rs_writes_the_same_long_text(checkpoint, questions, tmp_path):
    """Beyond 4,096 tokens the long RoPE factors apply."""
    rows = texts(checkpoint, questions[:3], tmp_path)
    print(f"\nmistral.rs\n{table(rows)}")
    assert all(row["logprob_distance"] < 1e-3 for row in rows.values())
