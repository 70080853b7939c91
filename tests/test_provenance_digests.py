"""Digests of a run, and the first place where two runs part."""

import json
import subprocess
import sys
from importlib import metadata

import pytest

from phi3v.provenance import digests


def safetensors(path, tensors):
    """tensors: name to bytes of U8."""
    header, data = {}, b""
    for name, content in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(content)], "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def run(tmp_path):
    """run(folder) → results/demo of a small finished run."""

    def make(folder, **weights):
        results = tmp_path / folder / "results"
        safetensors(results / "demo/train/row/final/model.safetensors", {"a": b"1234", "b": b"5678", **weights})
        for name, text in {
            "data/digits-1/train.jsonl": '{"id": 1}\n{"id": 2}\n',
            "demo/evaluate/row/after/predictions.jsonl": '{"answer": "7"}\n',
            "demo/report/accuracy.tsv": "row\tafter\nrow\t50.0\n",
        }.items():
            (results / name).parent.mkdir(parents=True, exist_ok=True)
            (results / name).write_text(text)
        return results / "demo"

    return make


def command(root, *arguments, path="/usr/bin:/bin"):
    done = subprocess.run(
        [sys.executable, root / "scripts/reproduce.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(root / "src"), "PATH": path},
    )
    return done.returncode, done.stdout + done.stderr


def test_equal_runs_are_equal(root, run):
    code, said = command(root, "--results", run("one"), "--against", run("two"))
    assert (code, said) == (0, "identical: 4 files (data, weights, predictions, metrics, accuracy.tsv)\n")


def test_the_first_difference_is_the_earliest_of_the_workflow(root, run):
    one, two = run("one"), run("two", b=b"5679")
    (two / "report/accuracy.tsv").write_text("row\tafter\nrow\t51.0\n")
    code, said = command(root, "--results", one, "--against", two)
    assert code == 1
    assert "first difference: demo/train/row/final/model.safetensors" in said
    assert "tensor 'b' U8 [4]" in said


def test_a_line_of_text_is_named(run):
    one, two = run("one").parent / "data/digits-1/train.jsonl", run("two").parent / "data/digits-1/train.jsonl"
    two.write_text('{"id": 1}\n{"id": 3}\n')
    assert digests.explain(one, two).startswith("line 2, byte 8: '{\"id\": 2}'")
    two.write_text('{"id": 1}\n')
    assert digests.explain(one, two).startswith("2 lines in")
    two.unlink()
    assert digests.explain(one, two).endswith("does not exist")


def test_a_missing_file_is_a_difference(root, run):
    one, two = run("one"), run("two")
    (two / "evaluate/row/after/predictions.jsonl").unlink()
    for pair in ((one, two), (two, one)):
        code, said = command(root, "--results", pair[0], "--against", pair[1])
        assert code == 1
        assert "demo/evaluate/row/after/predictions.jsonl" in said


def test_an_empty_folder_proves_nothing(root, tmp_path):
    (tmp_path / "demo").mkdir()
    assert command(root, "--results", tmp_path / "demo", "--against", tmp_path / "demo")[0] == 2


def test_what_was_asked_for_is_looked_at_before_anything_runs(root, run, tmp_path):
    """Without git on PATH a run would end before it starts."""
    for against in (tmp_path / "none", run("one").parent):
        code, said = command(root, "--against", against, path="")
        assert (code, said.count("\n")) == (2, 1)
        assert said.startswith(f"error: {against}: contains no file to compare")
    code, said = command(root, "--rows", "phi35-digits-full-bf16", "zzz", path="")
    assert (code, said.count("\n")) == (2, 1)
    assert "field `rows.accuracy`: got 'zzz': matches no row" in said
    code, said = command(root, "--twice", "--against", run("two"), path="")
    assert code == 2
    assert "not allowed with argument --twice" in said


def test_the_machine_is_its_maker_its_widest_instructions_and_torchs_build(tmp_path):
    build = metadata.version("torch")
    text = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: sse avx2 avx512f avx512_bf16\n\nprocessor\t: 1\n"
    (tmp_path / "cpuinfo").write_text(text)
    assert digests.machine(tmp_path / "cpuinfo") == f"GenuineIntel avx512_bf16, torch {build}"
    (tmp_path / "cpuinfo").write_text(text.replace(" avx512f avx512_bf16", ""))
    assert digests.machine(tmp_path / "cpuinfo") == f"GenuineIntel avx2, torch {build}"
    assert digests.machine(tmp_path / "none").endswith(f"torch {build}")
