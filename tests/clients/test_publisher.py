"""The publisher's own code under transformers 4.43, which it was written for, on a checkpoint that this package wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clients.reference import check, write_job

pytestmark = pytest.mark.verify


def test_the_publishers_code(client, served, cases, ours, tmp_path):
    """Every weight is found, no file is replaced, and the answers are the same."""
    some = [cases[name] for name in ("text", "long", "square", "page", "two")]
    job, result = write_job(tmp_path / "job.json", served, some), tmp_path / "result.json"
    script = Path(__file__).with_name("publisher.py")
    client("publisher", script, job, result, HF_MODULES_CACHE=str(tmp_path / "modules"))
    theirs = json.loads(result.read_text(encoding="utf-8"))
    assert theirs.pop("loading") == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    check("The publisher's code", ours(some), theirs)
