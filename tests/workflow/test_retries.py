"""Whether workflow/rules/retries.smk is still needed."""

import subprocess
import sys


def test_snakemake_takes_no_function_as_retries(tmp_path):
    """When this fails, give the rules `retries: FUNCTION` instead of replacing Job.restart_times."""
    (tmp_path / "Snakefile").write_text(
        "rule fails:\n    output: 'never'\n    retries: lambda wildcards, attempt: 1\n    shell: 'exit 1'\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "1"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "Retries values have to be integers" in done.stdout + done.stderr
