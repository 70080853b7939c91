"""What is shipped: bills of materials, the look-up of vulnerabilities, and the bundle for clusters without internet."""

import json
import os
import subprocess
import sys

import pytest


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

    values = sbom.bill(name)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(values)) is None
    lock = (root / f"envs/{name}.txt").read_text()
    assert len(values["components"]) == lock.count("==")
    assert values == sbom.bill(name)
    hashes = [reference for component in values["components"] for reference in component.get("externalReferences", [])]
    assert len(hashes) == lock.count("--hash")


def test_a_vulnerability_is_named_and_silence_is_counted(scripts):
    import audit

    entries = [
        {"name": "a", "version": "1", "vulns": []},
        {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}]},
        {"name": "c", "skip_reason": "not found"},
    ]
    known, text = audit.judge(entries)
    assert known == ["b 2: PYSEC-1, mended in 2.1"]
    assert text == "2 of 3 packages looked up, 1 vulnerabilities; 1 NOT looked up: the advisory service did not answer"


def test_a_bundle_installs_and_plans_without_an_index(root, tmp_path):
    """As its README says, with no package index: unpack, install from the wheels, plan the published run."""
    bundle = tmp_path / "bundle"
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    command = [sys.executable, root / "scripts/bundle.py", "--output_dir", bundle, "--environments", "report"]
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
