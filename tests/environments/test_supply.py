"""What is shipped: bills of materials, and the bundle for clusters without internet."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_run


@pytest.fixture(scope="module")
def scripts(root):
    sys.path.insert(0, str(root / "scripts"))
    yield
    sys.path.remove(str(root / "scripts"))


@pytest.mark.parametrize("name", ["train-cuda", "report"])
def test_a_bill_of_materials_is_cyclonedx_and_lists_the_lock(root, scripts, name):
    import sbom
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = sbom.bill(name)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    values, again = json.loads(text), json.loads(sbom.bill(name))
    lock = (root / f"envs/{name}.txt").read_text()
    assert len(values["components"]) == lock.count("==")
    del values["metadata"]["timestamp"], again["metadata"]["timestamp"]
    assert values == again
    hashes = [reference for component in values["components"] for reference in component.get("externalReferences", [])]
    assert len(hashes) == lock.count("--hash")


def test_make_containers_builds_with_the_commit_and_writes_a_bill(root, tmp_path):
    """What the engine and Apptainer are asked, by programs that write it down (the verify test has real ones)."""
    copy = small_run.make(root, tmp_path / "copy")
    git = ["git", "-C", str(copy), "-c", "user.name=test", "-c", "user.email=test@invalid"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    engine = """echo "$@" >> engine.txt
test $1 != inspect || echo '"phi3v.lock": "report"'
for last; do :; done
case $last in oci-archive:*) archive=${last#oci-archive:}; echo archive > ${archive%:*} ;; esac"""
    for name, script in {"buildah": engine, "apptainer": 'echo "$@" >> apptainer.txt; echo image > "$3"'}.items():
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    path = f"{tool.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["make", "-o", ".venv/installed", "containers", "ARGS=report --build-arg lock=report"], cwd=copy,
        capture_output=True, text=True, check=False, env={**os.environ, "PATH": path, "PYTHONPATH": str(copy / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    base = (root / "containers/base.txt").read_text().split("base=")[1].strip()
    asked = (copy / "engine.txt").read_text().splitlines()[0]
    assert asked.endswith("--build-arg lock=report .")
    assert f"--target report --tag localhost/phi3v-report --build-arg base={base} --build-arg commit={commit} " in asked
    assert (
        copy / "apptainer.txt"
    ).read_text() == "build --force containers/report.sif oci-archive:containers/report.tar\n"
    assert (copy / "containers/report.sif.sha256").read_text().split()[0] == hashlib.sha256(b"image\n").hexdigest()
    values = json.loads((copy / "containers/report.cdx.json").read_text())
    assert values["metadata"]["component"]["name"] == "phi3v-report"


def test_a_bundle_installs_and_plans_without_an_index(root, tmp_path):
    """As its README says, with no package index: unpack, install from the wheels, plan the published run."""
    bundle = tmp_path / "bundle"
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    command = [root / "scripts/bundle.sh", bundle, "report"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    again = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "expected a new folder" in again.stderr
    steps = (bundle / "README").read_text().split("\n\n")[1]
    kept = [line.strip() for line in steps.splitlines() if "snakemake" not in line]
    script = "set -e\n" + "\n".join(kept) + "\npip --version >/dev/null\n"
    script += "PYTHONPATH=src python scripts/plan.py --gpu h100 --count 1 --dataset docvqa\n"
    alone = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(["sh", "-c", script], cwd=bundle, capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "H100" in done.stdout
