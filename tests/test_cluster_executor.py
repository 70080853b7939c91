"""What stands between Snakemake's executor and SLURM, against commands whose answers the test writes."""

from __future__ import annotations

import contextlib
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
        if not self.log.exists():
            return []
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


def submit(tmp_path: Path, *flags: str, name: str = "mine") -> int:
    line = ["--parsable", "--job-name", name, "--comment", COMMENT, *flags, "-D", str(tmp_path)]
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


@pytest.mark.parametrize("earlier", ["same", "other", None])
def test_a_job_for_other_settings_is_neither_taken_over_nor_doubled(slurm, reports, waits, tmp_path, capfd, earlier):
    slurm.answer("sbatch", (0, "7\n", ""))
    if earlier:
        submit(tmp_path, f"--phi3v-work={earlier}", name="earlier")
    slurm.answer("squeue", (0, f"7|earlier|{COMMENT}|{tmp_path}\n", ""))
    capfd.readouterr()
    code = submit(tmp_path, "--phi3v-work=same")
    shown = capfd.readouterr()
    assert (code, shown.out) == ((0, "7\n") if earlier == "same" else (1, ""))
    assert ("with other settings; nothing was submitted beside it" in shown.err) == (earlier != "same")
    assert not any("phi3v-work" in flag for call in slurm.calls("sbatch") for flag in call)
    assert len(slurm.calls("sbatch")) == (1 if earlier else 0)


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


def query(slurm, capfd, queue: str, *states: str) -> dict[str, str]:
    """What the executor learns of its jobs, when squeue lists these."""
    slurm.answer(queue, (0, "".join(f"{state}\n" for state in states), ""))
    assert executor.main(queue, ["--format=%i|%T", "--states=all", "--noheader", "--name", "mine"]) == 0
    return dict(line.split("|") for line in capfd.readouterr().out.splitlines())


@pytest.fixture
def submitted(slurm, reports, tmp_path, capfd) -> None:
    """Jobs 1 to 4."""
    slurm.answer("sbatch", *[(0, f"{job}\n", "") for job in (1, 2, 3, 4)])
    for _ in range(4):
        assert submit(tmp_path) == 0
    capfd.readouterr()


def test_a_job_that_squeue_forgot_is_looked_up(slurm, submitted, reports, capfd):
    running = [f"{job}|RUNNING|None" for job in (1, 2, 3, 4)]
    assert set(query(slurm, capfd, "squeue", *running).values()) == {"RUNNING"}
    slurm.answer("sacct", (0, "2|CANCELLED by 1000\n3|COMPLETED\n4|PREEMPTED\n", ""))
    found = query(slurm, capfd, "squeue", "1|RUNNING|None", "99|PENDING|Priority")
    # PREEMPTED: the executor would wait for SLURM to restart it.
    assert found == {"1": "RUNNING", "2": "CANCELLED", "3": "COMPLETED", "4": "FAILED", "99": "PENDING"}
    assert slurm.calls("sacct")[0][-2] == "--jobs=2,3,4"
    # And not again in each later query.
    assert query(slurm, capfd, "squeue", "1|FAILED|NonZeroExitCode") == {
        "1": "FAILED",
        "2": "CANCELLED",
        "3": "COMPLETED",
        "4": "FAILED",
    }
    assert query(slurm, capfd, "squeue")["1"] == "FAILED"
    assert len(slurm.calls("sacct")) == 1
    assert reports == []


@pytest.mark.parametrize(
    "answer", [(1, "", "Slurm accounting storage is disabled\n"), (0, "1|RUNNING\n2|RUNNING\n", ""), (0, "", "")]
)
def test_outputs_decide_where_accounting_does_not_know(slurm, submitted, reports, capfd, answer):
    """COMPLETED: Snakemake looks for the outputs, and a job without them has failed."""
    slurm.answer("sacct", answer)
    found = query(slurm, capfd, "squeue", "3|RUNNING|None", "4|COMPLETING|None")
    assert found == {"1": "COMPLETED", "2": "COMPLETED", "3": "RUNNING", "4": "COMPLETING"}
    assert reports == [f"{COMMENT}: SLURM no longer knows how job {job} ended, so its outputs decide" for job in (1, 2)]


def test_jobs_are_not_forgotten_while_the_controller_is_away(slurm, submitted, reports, capfd):
    """To the executor, a job without a state has not ended; after failed queries it would wait for ever."""
    slurm.answer("squeue", (1, "", AWAY))
    assert executor.main("squeue", ["--name", "mine"]) == 0
    assert capfd.readouterr().out == ""
    assert reports == [f"SLURM does not answer ({AWAY}); submitted jobs continue, and Snakemake asks again"]


def test_a_reason_that_does_not_end_by_itself_is_reported_once(slurm, submitted, reports, capfd):
    waiting = [
        "1|PENDING|QOSMaxWallDurationPerJobLimit", "2|PENDING|Priority", "3|PENDING|AssocGrpGRES", "4|PENDING|AssocGrpGRES",
        "99|PENDING|BadConstraints",
    ]  # fmt: skip
    for _ in range(3):
        query(slurm, capfd, "squeue", *waiting)
    first, second = reports
    assert first.startswith(f"{COMMENT}: job 1 waits because of QOSMaxWallDurationPerJobLimit: lower `max_runtime`")
    assert second.startswith(f"{COMMENT}: job 3 (and 1 more) waits because of AssocGrpGRES: change `hardware`")
    unavailable = "2|PENDING|ReqNodeNotAvail,_UnavailableNodes:node"
    for nodes in ("1", "[1-2]"):
        query(slurm, capfd, "squeue", waiting[0], unavailable + nodes, *waiting[2:])
    assert len(reports) == 3


@pytest.mark.parametrize(
    ("reason", "field"),
    [
        ("PartitionTimeLimit", "max_runtime"), ("AssocMaxWallDurationPerJobLimit", "max_runtime"),
        ("AssocGrpCPUMinutesLimit", "account"), ("AssocMaxJobsLimit", "jobs"), ("QOSMaxJobsPerUserLimit", "jobs"),
        ("QOSMaxGRESPerUser", "hardware"), ("MaxGRESPerAccount", "hardware"), ("BadConstraints", "constraint"),
        ("PartitionNodeLimit", "nodes"), ("ReqNodeNotAvail,_Reserved_for_maintenance", "max_runtime"),
        ("InvalidAccount", "account"), ("InvalidQOS", "qos"), ("JobHeldAdmin", "scontrol release"),
        ("Nodes_required_for_job_are_DOWN,_DRAINED_or_reserved", "sinfo -R"),
    ],
)  # fmt: skip
def test_a_reason_names_what_to_change(slurm, submitted, reports, capfd, reason, field):
    query(slurm, capfd, "squeue", f"1|PENDING|{reason}", "2|RUNNING|None", "3|RUNNING|None", "4|RUNNING|None")
    (line,) = reports
    assert field in line


def test_other_queries_pass_through(slurm, reports, capfd):
    slurm.answer("squeue", (0, "7|x\n", ""))
    assert executor.main("squeue", ["--me", "-o", "%i|%j"]) == 0
    assert capfd.readouterr().out == "7|x\n"


@pytest.fixture
def connected(slurm, root, monkeypatch) -> Iterator[Reports]:
    """This process as Snakemake's."""
    monkeypatch.setenv("PATH", f"{slurm.folder}:/usr/bin:/bin")
    for name in (executor.PYTHON, executor.CHANNEL):
        monkeypatch.setenv(name, "")
    shown = Reports()
    executor.connect(root / "workflow/slurm", shown)
    yield shown
    signal.set_wakeup_fd(-1)


def test_the_command_on_path_leaves_no_trace_in_the_jobs_environment(slurm, connected, tmp_path):
    slurm.answer("sbatch", (0, "12\n", ""))
    line = f"sbatch --parsable --job-name mine --comment {COMMENT} -D {tmp_path}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, input="", timeout=20)
    # The command prints the names of our variables that it sees.
    assert (done.returncode, done.stdout, done.stderr) == (0, "12\n", "")
    (call,) = slurm.calls("sbatch")
    assert call == [*line.split()[1:], f"PATH={slurm.folder}:/usr/bin:/bin"]


def raised(number: signal.Signals) -> None:
    """What Snakemake's handlers do: stop at Ctrl-C, and on SIGTERM end when its jobs have ended."""
    before = signal.signal(signal.SIGTERM, lambda *arguments: None)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(number)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_wait_and_nothing_more_is_submitted(slurm, connected, tmp_path, number):
    slurm.answer("sbatch", (1, "", TIMED_OUT))
    line = ["sbatch", "--job-name", "mine", "--comment", COMMENT, "-D", str(tmp_path)]
    pipe = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, **pipe) as waiting:
        try:
            until(lambda: connected.lines)
            raised(number)
            _, error = waiting.communicate(timeout=20)
        finally:
            waiting.kill()
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
