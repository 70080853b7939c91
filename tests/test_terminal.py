"""What a run prints: a line for each finished job with its result and time, a bar on a terminal alone, and why a job failed."""

import json
import os
import pty
import re
import subprocess
import sys
import time

import pytest

from phi3v.reporting.outcome import outcome
from snakemake_logger_plugin_phi3v import log_of_attempt

SNAKEFILE = """
rule all:
    input:
        expand("results/demo/evaluate/{row}/manifest.json", row=["one", "two"]),
        "broken.txt" if config.get("broken") else [],

rule evaluate:
    output:
        "results/demo/evaluate/{row}/manifest.json"
    message:
        "evaluate {wildcards.row}"
    shell:
        "touch {output}"

rule broken:
    output:
        "broken.txt"
    log:
        "logs/broken.log"
    message:
        "break something"
    shell:
        "for i in $(seq 99); do echo line $i; done > {log}; echo 'no such letter' >> {log}; exit 3"
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    passes(tmp_path / "results/demo/evaluate/one", after=91.46, control=11.0)
    return tmp_path


def passes(folder, **scores):
    for name, score in scores.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "metrics.json").write_text(json.dumps({"metric": "anls", "score": score}))


def command(*arguments):
    return [sys.executable, "-m", "snakemake", "--logger", "phi3v", "--cores", "1", "--keep-going", *arguments]


def run(folder, *arguments):
    return subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_finished_job_is_one_line_with_its_result_and_time(folder):
    done = run(folder)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if re.fullmatch(r"one: ANLS 91\.5 \(11\.0 with swapped pictures\), \d+ s", line)]
    # A job whose result cannot be read is named by its message.
    assert [line for line in lines if re.fullmatch(r"evaluate two, \d+ s", line)]
    assert "touch" not in done.stderr and "\x1b" not in done.stderr and "\r" not in done.stderr
    assert max(map(len, lines)) <= 120
    assert run(folder).stderr.count("Nothing to be done") == 1


def test_shell_commands_are_printed_if_asked_for(folder):
    assert "touch results/demo/evaluate/one/manifest.json" in run(folder, "-p").stderr


def test_a_dry_run_lists_the_jobs_as_snakemake_does(folder):
    done = run(folder, "-n")
    assert re.search(r"^evaluate +2$", done.stdout + done.stderr, re.M)


def test_a_failed_job_shows_its_log_and_the_end_of_it(folder):
    done = run(folder, "--config", "broken=1")
    assert done.returncode == 1
    lines = [line.strip() for line in done.stderr.splitlines()]
    assert any(re.fullmatch(r"FAILED: break something, after \d+ s", line) for line in lines)
    assert "logs/broken.log:" in lines
    assert "no such letter" in lines and "line 99" in lines and "line 50" not in lines
    # The other jobs went on.
    assert any(line.startswith("evaluate two, ") for line in lines)
    assert not any("seq 99" in line for line in lines)


def test_an_error_of_a_rules_own_python_is_printed(folder):
    with (folder / "Snakefile").open("a") as file:
        file.write('\nrule own:\n    output:\n        "own.txt"\n    run:\n        raise OSError("no space here")\n')
    done = run(folder, "own.txt")
    assert done.returncode == 1
    assert "no space here" in done.stderr


def test_a_log_that_got_the_number_of_its_attempt_is_found(tmp_path):
    log = tmp_path / "row.log"
    assert log_of_attempt(log) == log
    for number in (1, 2):
        (tmp_path / f"row.{number}.log").touch()
        os.utime(tmp_path / f"row.{number}.log", (number, number))
    assert log_of_attempt(log) == tmp_path / "row.2.log"
    log.touch()
    assert log_of_attempt(log) == log


def test_the_plugin_leaves_the_choice_of_the_checkout_to_the_snakefile():
    """Snakemake imports all plugins before it reads a Snakefile."""
    code = (
        "import sys, snakemake_logger_plugin_phi3v; print([name for name in sys.modules if name.startswith('phi3v')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def on_terminal(folder, *arguments, **variables):
    """What a run prints to a terminal."""
    ours, theirs = pty.openpty()
    unset = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    environment = unset | {"TERM": "xterm"} | variables
    done = subprocess.Popen(command(*arguments), cwd=folder, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    output = b""
    while True:
        try:
            output += os.read(ours, 4096)
        except OSError:  # the terminal's other end is closed
            break
    os.close(ours)
    assert done.wait() == 0
    return output.decode()


def test_a_terminal_gets_a_bar_over_all_jobs(folder):
    bars = re.findall(r"\[([#-]+)\] (\d+) of (\d+) jobs · ([^\r\x1b]*)", on_terminal(folder))
    assert {total for *_, total, _ in bars} == {"3"}
    assert [int(done) for _, done, *_ in bars] == sorted(int(done) for _, done, *_ in bars)
    assert any(title.startswith("evaluate ") for *_, title in bars)


@pytest.mark.parametrize(
    ("arguments", "variables"), [(["--nocolor"], {}), ([], {"NO_COLOR": "1"}), ([], {"TERM": "dumb"})]
)
def test_a_terminal_without_codes_gets_plain_lines(folder, arguments, variables):
    output = on_terminal(folder, *arguments, **variables)
    assert "one: ANLS 91.5" in output
    assert "jobs ·" not in output and "\x1b" not in output


def test_a_stopped_run_says_once_that_it_waits(folder):
    with (folder / "Snakefile").open("a") as file:
        file.write(
            '\nrule slow:\n    output:\n        "slow.txt"\n    shell:\n        "touch began; sleep 5; touch {output}"\n'
        )
    process = subprocess.Popen(command("slow.txt"), cwd=folder, stderr=subprocess.PIPE, text=True)
    while not (folder / "began").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    _, output = process.communicate(timeout=300)
    assert output.count("Will exit after finishing currently running jobs") == 1


def test_outcomes_of_training_and_timing(tmp_path):
    (tmp_path / "observed.json").write_text('{"steps": 94, "examples": 6000}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 6.464}\n{"step": 94, "loss": 0.318}\n')
    (tmp_path / "speed.json").write_text('{"images_per_second": 312.44, "spread": 0.031}')
    manifest = [str(tmp_path / "manifest.json")]
    name = tmp_path.name
    assert outcome("finetune", manifest) == f"{name}: trained 94 steps on 6000 examples, loss 6.46 → 0.32"
    assert outcome("speed_row", manifest) == f"{name}: 312.4 images/s, spread 3.1 %"
    assert outcome("evaluate", manifest) == ""
    assert outcome("phi3v_finetune", manifest) == outcome("finetune", manifest)
    assert outcome("convert", manifest) == ""


def test_the_score_before_training_stands_in_front(root, tmp_path):
    row = "phi3-docvqa-full-bf16"
    base = tmp_path / "evaluate/base/phi3-vision-docvqa-bf16-crops4"
    passes(base, before=4.94)
    passes(tmp_path / "evaluate" / row, after=91.5)
    assert outcome("evaluate_base", [str(base / "manifest.json")]) == f"{base.name}: ANLS 4.9 before training"
    (tmp_path / "config.json").write_text(json.dumps(config(root)))
    assert outcome("evaluate", [str(tmp_path / "evaluate" / row / "manifest.json")]) == f"{row}: ANLS 4.9 → 91.5"


def config(root):
    """The demo's configuration; its files by their whole paths, as tests run anywhere."""
    import yaml

    found = yaml.safe_load((root / "config/demo.yaml").read_text())
    found["files"] = {kind: [str(root / name) for name in names] for kind, names in found["files"].items()}
    return {**found, "demo": None}
