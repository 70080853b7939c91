"""What stands between Snakemake's executor and SLURM, against commands whose answers the test writes."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from phi3v.cluster import executor

COMMENT = "rule_finetune_wildcards_phi3-docvqa"
TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation\n"
LIMIT = (
    "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates "
    "accounting/QOS policy (job submit limit, user's size and/or time limits)\n"
)
AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"


class Slurm:
    """Commands on PATH that give one prepared answer per call, the last one for ever, and log their calls."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "calls"
        self.answer("squeue", (0, "", ""))
        self.answer("scancel", (0, "", ""))

    def answer(self, command: str, *answers: tuple[int, str, str]) -> None:
        """(exit code, stdout, stderr) of each call."""
        program = self.folder / command
        program.write_text(
            f"#!{sys.executable} -IS\nimport os, sys\nanswers = {list(answers)!r}\n"
            f"with open({str(self.log)!r}, 'a+') as log:\n"
            "    log.seek(0)\n"
            f"    before = sum(line.split(chr(9))[0] == {command!r} for line in log)\n"
            f"    print({command!r}, *sys.argv[1:], f'PATH={{os.environ[\"PATH\"]}}', sep=chr(9), file=log)\n"
            "    ours = [name for name in os.environ if name.startswith('PHI3V_EXECUTOR')]\n"
            "code, out, err = answers[min(before, len(answers) - 1)]\n"
            "print(out, end='')\nprint(err, *ours, end='', file=sys.stderr)\nsys.exit(code)\n"
        )
        program.chmod(0o755)

    def calls(self, command: str) -> list[list[str]]:
        lines = [line.split("\t") for line in self.log.read_text().splitlines()]
        return [line[1:] for line in lines if line[0] == command]


class Reports:
    """What Snakemake's log shows."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def warning(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Slurm:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv(executor.PATH, f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return Slurm(tmp_path / "bin")


@pytest.fixture
def reports(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(executor, "stopped", lambda: False)
    monkeypatch.setattr(executor, "report", lines.append)
    return lines


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Seconds of each pause, which takes no time here."""
    seconds: list[float] = []

    monkeypatch.setattr(executor, "pause", seconds.append)
    return seconds


def submit(tmp_path: Path) -> int:
    line = ["--parsable", "--job-name", "mine", "--comment", COMMENT, "-D", str(tmp_path)]
    with mock.patch.object(sys, "stdin", io.StringIO()):
        return executor.main("sbatch", line)


def test_a_submission_that_times_out_is_repeated(slurm, reports, waits, tmp_path, capfd):
    slurm.answer("sbatch", (1, "", TIMED_OUT), (1, "", TIMED_OUT), (0, "12\n", ""))
    assert submit(tmp_path) == 0
    assert capfd.readouterr() == ("12\n", "")
    assert waits == [10, 20]
    assert reports == [
        f"{COMMENT}: no success yet (Batch job submission failed: Socket timed out on send/recv operation); "
        f"trying again in {seconds} s"
        for seconds in (10, 20)
    ]


@pytest.mark.parametrize(
    "error",
    [
        "Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "Batch job submission failed: Resource temporarily unavailable",
        "Batch job submission failed: Zero Bytes were transmitted or received",
        "Batch job submission failed: Required partition not available (inactive or drain)",
        "AssocMaxSubmitJobLimit",
        "QOSGrpSubmitJobsLimit",
    ],
)
def test_what_waiting_can_cure_is_waited_for_up_to_an_hour(slurm, reports, waits, tmp_path, capfd, error):
    slurm.answer("sbatch", (1, "", f"sbatch: error: {error}\n"))
    assert submit(tmp_path) == 1
    assert error in capfd.readouterr().err
    assert waits[:6] == [10, 20, 40, 80, 160, 300]
    assert 3600 <= sum(waits) < 3900


@pytest.mark.parametrize(
    "error",
    [
        "invalid partition specified: gpux",
        "Batch job submission failed: Invalid account or account/partition combination specified",
        "Batch job submission failed: Requested node configuration is not available",
        "Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
        "QOSMaxWallDurationPerJobLimit\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy "
        "(job submit limit, user's size and/or time limits)",
        "unrecognized option '--wrong'",
    ],
)
def test_what_waiting_cannot_cure_fails_at_once(slurm, reports, waits, tmp_path, capfd, error):
    slurm.answer("sbatch", (1, "", f"sbatch: error: {error}\n"))
    assert submit(tmp_path) == 1
    assert error in capfd.readouterr().err
    assert (waits, reports) == ([], [])


def test_a_submit_limit_is_waited_for_while_own_jobs_are_there(slurm, reports, waits, tmp_path, capfd):
    """Two rows of a day each, and a limit of two: the third waits for longer than an hour."""
    slurm.answer("squeue", (0, "7|other|null|/\n", ""))
    slurm.answer("sbatch", *[(1, "", LIMIT)] * 40, (0, "12\n", ""))
    assert submit(tmp_path) == 0
    assert sum(waits) > 10_000
    assert reports[0].startswith(f"{COMMENT}: no success yet (QOSMaxSubmitJobPerUserLimit; Batch job")


def test_a_job_that_still_runs_is_taken_over(slurm, reports, waits, tmp_path, capfd):
    slurm.answer("squeue", (0, f"5|earlier|{COMMENT}2|{tmp_path}\n7|earlier|{COMMENT}|{tmp_path}\n", ""))
    slurm.answer("sbatch", (0, "12\n", ""))
    assert submit(tmp_path) == 0
    assert capfd.readouterr().out == "7\n"
    assert slurm.calls("sbatch") == []
    assert len(reports) == 1
    assert f"{COMMENT}: job 7 still runs or waits" in reports[0]


@pytest.mark.parametrize(("comment", "folder"), [("rule_evaluate_wildcards_x", ""), (COMMENT, "/elsewhere")])
def test_a_job_of_another_row_or_folder_is_not(slurm, reports, waits, tmp_path, capfd, comment, folder):
    slurm.answer("squeue", (0, f"7|earlier|{comment}|{folder or tmp_path}\n", ""))
    slurm.answer("sbatch", (0, "12\n", ""))
    assert submit(tmp_path) == 0
    assert capfd.readouterr().out == "12\n"


def test_a_submission_that_timed_out_but_arrived_is_found(slurm, reports, waits, tmp_path, capfd):
    """Submitting it again would train the row twice."""
    slurm.answer("squeue", (0, "", ""), (1, "", AWAY), (0, f"12|mine|{COMMENT}|{tmp_path}\n", ""))
    slurm.answer("sbatch", (1, "", TIMED_OUT), (0, "13\n", ""))
    assert submit(tmp_path) == 0
    assert capfd.readouterr().out == "12\n"
    assert len(slurm.calls("sbatch")) == 1
    assert waits == [10, 20]


def test_a_query_before_the_submission_waits_for_the_controller_too(slurm, reports, waits, capfd):
    """The executor looks for the default partition, and for the account's name."""
    slurm.answer("sinfo", (1, "", AWAY), (0, "cpu*\n", ""))
    assert executor.main("sinfo", ["-o", "%P"]) == 0
    assert capfd.readouterr().out == "cpu*\n"
    assert waits == [10]
    slurm.answer("sshare", (1, "", "This command only works with the multifactor plugin\n"))
    assert executor.main("sshare", ["-U"]) == 1
    assert waits == [10]


@pytest.fixture
def connected(slurm, root, monkeypatch) -> Iterator[Reports]:
    """This process as Snakemake's."""
    monkeypatch.setenv("PATH", f"{slurm.folder}:/usr/bin:/bin")
    for name in (executor.PYTHON, executor.CHANNEL):
        monkeypatch.setenv(name, "")
    shown = Reports()
    before = signal.getsignal(signal.SIGINT)
    executor.connect(root / "workflow/slurm", shown)
    yield shown
    signal.signal(signal.SIGINT, before)


def test_the_command_on_path_leaves_no_trace_in_the_jobs_environment(slurm, connected, tmp_path):
    slurm.answer("sbatch", (0, "12\n", ""))
    line = f"sbatch --parsable --job-name mine --comment {COMMENT} -D {tmp_path}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, input="", timeout=20)
    # The command prints the names of our variables that it sees.
    assert (done.returncode, done.stdout, done.stderr) == (0, "12\n", "")
    (call,) = slurm.calls("sbatch")
    assert call == [*line.split()[1:], f"PATH={slurm.folder}:/usr/bin:/bin"]


def test_ctrl_c_ends_a_wait_and_submits_nothing_more(slurm, connected, tmp_path):
    slurm.answer("sbatch", (1, "", TIMED_OUT))
    line = ["sbatch", "--job-name", "mine", "--comment", COMMENT, "-D", str(tmp_path)]
    pipe = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, **pipe) as waiting:
        until(lambda: connected.lines)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        _, error = waiting.communicate(timeout=5)
        assert waiting.returncode == 1
    assert "Snakemake was stopped" in error
    after = subprocess.run(line, capture_output=True, text=True, input="", timeout=5)
    assert (after.returncode, len(slurm.calls("sbatch"))) == (1, 1)
    assert connected.lines[0].startswith(f"{COMMENT}: no success yet")


def until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
