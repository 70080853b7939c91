"""The publisher's own code under transformers 4.43, which it was written for, on a checkpoint that this package wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clients.reference import NEW_TOKENS, compare, table, write_job

pytestmark = pytest.mark.verify
SCRIPT = Path(__file__).with_name("publisher.py")


def test_the_publishers_code(client, served, questions, ours, tmp_path):
    """Every weight is found, no file is replaced, and the answers are the same."""
    some = [case for case in questions if case["name"] in ("text", "long", "square", "page", "two")]
    job = write_job(tmp_path / "job.json", served, some)
    client("publisher", SCRIPT, job, tmp_path / "result.json", HF_MODULES_CACHE=str(tmp_path / "modules"))
    theirs = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert theirs.pop("loading") == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    rows = {name: compare(ours[name], result) for name, result in theirs.items()}
    print(f"\nthe publisher's code\n{table(rows)}")
    for name, row in rows.items():
        assert theirs[name]["prompt_length"] == len(ours[name]["prompt_ids"]), name
        assert row["equal_tokens"] == NEW_TOKENS, name
        assert row["logprob_distance"] < 1e-3, name
