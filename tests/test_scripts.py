"""What scripts do that every one of them should."""

import os
import subprocess
import sys

import pytest

from phi3v.cluster.ask import ClusterError
from phi3v.settings import SettingsError, run_script


@pytest.mark.parametrize("name", ["plan", "provenance", "cluster"])
def test_a_reader_that_has_seen_enough_is_no_error(root, name):
    """As `scripts/plan.py | head`; the help text goes the way of the tables and needs no result and no cluster."""
    process = subprocess.Popen(
        [sys.executable, str(root / f"scripts/{name}.py"), "--help"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PYTHONPATH": str(root / "src"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate()[1] == b""


@pytest.mark.parametrize("name", ["reproduce", "sbom"])
def test_help_is_the_scripts_first_page_and_does_no_work(root, name):
    done = subprocess.run(
        [sys.executable, str(root / f"scripts/{name}.py"), "--help"], capture_output=True, text=True, timeout=60, check=False,
        env={"PYTHONPATH": str(root / "src"), "PATH": "", "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {name}.py")
    assert f"python scripts/{name}.py" in done.stdout


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (SettingsError("field `a`: got 1"), 2, "error: field `a`: got 1\n"),
        (ClusterError("squeue failed"), 1, "error: squeue failed\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'\n"),
        (OSError(28, "No space left"), 1, "the disk is full: free some space"),
    ],
)
def test_an_error_with_a_message_for_the_user_is_one_line(capsys, error, code, said):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    printed = capsys.readouterr().err
    assert stop.value.code == code
    assert said in printed and printed.count("\n") == 1


def test_any_other_error_keeps_its_traceback():
    def main():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_script(main)


WRONG_IN_ONE_PROCESS = """
import os, sys
from phi3v.settings import SettingsError, run_script

def main():
    if os.environ["LOCAL_RANK"] in sys.argv[1:]:
        raise SettingsError("field `a`: got 1")

run_script(main)
"""


@pytest.mark.parametrize(("wrong", "reports"), [(["0", "1"], 1), (["1"], 1)])
def test_wrong_input_is_reported_once_whichever_process_finds_it(tmp_path, root, wrong, reports):
    (tmp_path / "script.py").write_text(WRONG_IN_ONE_PROCESS)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "script.py", *wrong],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root / "src")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("error: field `a`: got 1\n") == reports
