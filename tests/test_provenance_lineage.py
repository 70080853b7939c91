"""The chain behind a number, and the run as an RO-Crate that the validator accepts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from phi3v.provenance import lineage
from phi3v.provenance.manifest import ResultError, write_json, write_manifest

ROW, OTHER = "phi35-docvqa-lora-bf16", "phi35-nlvr2-full-bf16"
REVISION = "3f7d1c9e"
CONTEXT = "https://w3id.org/ro/crate/1.1/context"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run of two rows in the working folder: downloads, datasets, trainings, evaluations, report."""
    monkeypatch.chdir(tmp_path)
    kept = {"settings": {}, "seed": 1, "seconds": 2.0, "device": "a CPU"}

    def lock(folder, url, **more):
        files = [{"path": "a.parquet", "size": 3, "sha256": "cd" * 32}]
        source = {"url": url, "revision": "main", "resolved": REVISION, "folder": ".", "files": files, **more}
        write_json(tmp_path / folder / "sources.lock.json", {"sources": [source]})

    lock("results/models/phi35", "hf://microsoft/Phi-3.5-vision-instruct")
    inputs = {"config": "results/mine/config.json"}
    write_json(tmp_path / "results/mine/config.json", {"name": "mine"})
    for row, name in ((ROW, "docvqa"), (OTHER, "nlvr2")):
        lock(f"results/data/{name}/source", f"hf://datasets/example/{name}")
        splits = {"train": {"examples": 5, "sha256": "ef" * 32}}
        write_json(tmp_path / f"results/data/{name}/dataset.json", {"name": name, "converter": "x", "splits": splits})
        given = {"data": f"results/data/{name}", "model": "results/models/phi35"}
        trained = f"results/mine/train/{row}"
        (tmp_path / trained / "final").mkdir(parents=True)
        write_manifest(trained, kind="train", inputs=given, **kept)
        base = f"results/mine/evaluate/base/phi35-{name}"
        write_manifest(base, kind="evaluate", inputs=given, **kept)
        evaluated = f"results/mine/evaluate/{row}"
        write_manifest(evaluated, kind="evaluate", inputs={**given, "model": f"{trained}/final"}, **kept)
        write_json(tmp_path / evaluated / "after/metrics.json", {"score": 61.0})
        inputs |= {f"train/{row}": trained, f"evaluate/base/{name}": base, f"evaluate/{row}": evaluated}
    report = tmp_path / "results/mine/report"
    report.mkdir()
    (report / "accuracy.tsv").write_text("row\tafter\n")
    write_manifest(report, kind="report", inputs=inputs, **kept)
    return tmp_path


def provenance(root, folder, *arguments):
    done = subprocess.run(
        [sys.executable, root / "scripts/provenance.py", *arguments],
        cwd=folder, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(root / "src"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_from_a_number_of_the_report_back_to_the_revisions(root, run):
    code, said, problems = provenance(root, run, "results/mine/report/accuracy.tsv", "--row", ROW)
    assert (code, problems) == (0, "")
    lines = said.splitlines()
    for expected in (
        "result: results/mine/report  [report]", f"    evaluate/{ROW}: results/mine/evaluate/{ROW}  [evaluate]",
        "                from: hf://datasets/example/docvqa  [source]", "    evaluate/base/docvqa: results/mine/evaluate/base/phi35-docvqa",
        f"        model: results/mine/train/{ROW}/final  [train]",
    ):  # fmt: skip
        assert any(line.startswith(expected) for line in lines), f"{expected}\nin\n{said}"
    assert f"revision {REVISION}" in said
    assert "hf://microsoft/Phi-3.5-vision-instruct" in said
    assert OTHER not in said
    assert "nlvr2" not in said


def test_what_changed_since_is_named(root, run):
    write_json(run / "results/data/docvqa/dataset.json", {"name": "docvqa", "splits": {}})
    code, said, problems = provenance(root, run, f"results/mine/evaluate/{ROW}")
    assert code == 1
    assert "! dataset.json changed since: was" in said
    assert "results/data/docvqa: dataset.json changed since" in problems
    code, _, _ = provenance(root, run, f"results/mine/evaluate/{OTHER}")
    assert code == 0
    # Training and two evaluations share the dataset: it is named once.
    assert len(lineage.problems(lineage.chain(run / "results/mine/report", run))) == 1


def test_a_parent_that_is_gone_is_named(run):
    (run / "results/data/docvqa/dataset.json").unlink()
    found = lineage.chain(run / f"results/mine/train/{ROW}", run)
    assert "no longer exists" in " ".join(lineage.problems(found))


def test_errors_say_what_was_expected(root, run, tmp_path):
    code, _, said = provenance(root, run, "results/mine/report", "--row", "phi9")
    assert code == 2
    assert f"row 'phi9': this report has no result of it; expected one of {ROW}, {OTHER}" in said
    said = "error: nope: no such file or folder; expected the folder of a result, or a file in it\n"
    assert provenance(root, run, "nope") == (2, "", said)
    code, _, said = provenance(root, run, "results/mine/report", "--row", ROW, "--crate", "crate")
    assert code == 2
    assert "argument --crate: not allowed with argument --row" in said
    assert not (run / "crate").exists()
    (tmp_path / "empty/inner").mkdir(parents=True)
    with pytest.raises(ResultError, match=r"no manifest\.json"):
        lineage.chain(tmp_path / "empty/inner")
    with pytest.raises(ResultError, match="expected a report's folder"):
        lineage.export_crate(run / f"results/mine/train/{ROW}", tmp_path / "crate", run)


def test_a_shared_result_is_opened_once(run):
    text = list(lineage.lines(lineage.chain(run / "results/mine/report", run)))
    opened = [line for line in text if "results/models/phi35  [download]" in line]
    assert len([line for line in opened if not line.endswith("(above)")]) == 1


@pytest.fixture
def offline(monkeypatch):
    """The validator fetches RO-Crate's JSON-LD context from its address: it gets the one that the rocrate package carries."""
    import requests
    import rocrate
    from rocrate_validator.utils.http import HttpRequester

    context = (Path(rocrate.__file__).parent / "data/ro-crate.jsonld").read_text()
    # The package carries context 1.3, which moved Bioschemas' terms; in 1.1 they stand where the profile looks for them.
    context = context.replace("https://bioschemas.org/terms/", "https://bioschemas.org/").encode()

    def get(self, url, *arguments, **options):
        answer = requests.Response()
        answer.status_code, answer.url = (200 if url == CONTEXT else 504), url
        answer.headers["Content-Type"] = "application/ld+json"
        answer._content = context if url == CONTEXT else b""
        return answer

    monkeypatch.setattr(HttpRequester, "get", get, raising=False)


def test_the_validator_accepts_the_crate(run, offline):
    from rocrate_validator import models, services

    path = lineage.export_crate(run / "results/mine/report", run / "crate", run)
    graph = {entity["@id"]: entity for entity in json.loads(path.read_text())["@graph"]}
    assert len([entity for entity in graph.values() if entity["@type"] == "CreateAction"]) == 8
    assert f"results/mine/evaluate/{ROW}/after/metrics.json" in graph
    for name, entity in graph.items():
        if entity["@type"] == "File":
            assert (run / "crate" / name).is_file()
    settings = {"rocrate_uri": str(run / "crate"), "profile_identifier": "workflow-run-crate", "offline": True}
    result = services.validate(services.ValidationSettings(**settings, requirement_severity=models.Severity.REQUIRED))
    assert not result.has_issues(), "\n".join(str(issue.message) for issue in result.get_issues())
    # The same check refuses a crate whose workflow is not named: it looks.
    values = json.loads(path.read_text())
    next(entity for entity in values["@graph"] if entity["@id"] == "./").pop("mainEntity")
    path.write_text(json.dumps(values))
    assert services.validate(services.ValidationSettings(**settings)).has_issues()


def test_files_of_one_name_from_two_other_folders_are_both_in_the_crate(run, tmp_path_factory):
    folders = [tmp_path_factory.mktemp("elsewhere") for _ in range(2)]
    for number, folder in enumerate(folders):
        write_json(folder / "dataset.json", {"name": f"own {number}", "splits": {}})
    inputs = {f"data{number}": str(folder) for number, folder in enumerate(folders)}
    write_manifest(
        run / "results/mine/report", kind="report", settings={}, inputs=inputs, seed=1, seconds=1, device="x"
    )
    lineage.export_crate(run / "results/mine/report", run / "crate", run)
    copies = (run / "crate/outside").rglob("dataset.json")
    assert {json.loads(path.read_text())["name"] for path in copies} == {"own 0", "own 1"}


def test_a_folder_of_somebody_is_not_overwritten(root, run):
    (run / "mine").mkdir()
    (run / "mine/notes.txt").write_text("keep")
    code, _, said = provenance(root, run, "results/mine/report", "--crate", "mine")
    assert (code, said) == (2, "error: mine: exists and is not a crate; choose a new folder\n")
    assert (run / "mine/notes.txt").read_text() == "keep"
