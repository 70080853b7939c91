"""Batches against one example at a time: at least three times as many examples a second, with the same answers."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.verify
@pytest.mark.parametrize(("size", "examples", "batch"), [("tiny", 72, 24), ("mid", 16, 16)])
def test_batches_are_three_times_as_fast_with_the_same_answers(root, size, examples, batch):
    command = [
        sys.executable,
        str(root / "benchmarks/bench_evaluation.py"),
        "--size",
        size,
        "--examples",
        str(examples),
    ]
    command += ["--batch", str(batch)]
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True, env=environment)
    found = json.loads(done.stdout[done.stdout.index("{\n") :])
    print(json.dumps(found, indent=1))
    assert found["different_answers"] == 0
    assert found["ratio"] >= 3
