"""What a manifest states, and what it never holds."""

import hashlib
import json
import os
import subprocess
import sys
from importlib import metadata

import pytest

from phi3v.provenance import manifest

FIELDS = {
    "kind", "settings", "command", "commit", "dirty", "versions", "environment", "device", "seed", "inputs", "finished", "seconds",
    "user", "host", "slurm_job",
}  # fmt: skip


def written(folder, **changes):
    values = {
        "kind": "train",
        "settings": {"a": 1},
        "inputs": {},
        "seed": 7,
        "seconds": 1.23456,
        "device": "a CPU",
    } | changes
    return json.loads(manifest.write_manifest(folder, **values).read_text())


def test_every_field_is_there(tmp_path):
    found = written(tmp_path)
    assert set(found) == FIELDS
    assert found["seconds"] == 1.235
    assert found["seed"] == 7
    assert found["versions"]["torch"] == metadata.version("torch")


def test_the_environment_is_its_locks_and_what_is_installed(tmp_path, root, monkeypatch):
    environment = written(tmp_path)["environment"]
    lock = root / "envs/train-cpu.txt"
    assert environment["locks"]["envs/train-cpu.txt"] == hashlib.sha256(lock.read_bytes()).hexdigest()
    assert "requirements.txt" in environment["locks"]
    assert environment["container"] is None
    again = manifest.environment()
    assert again["packages"] == environment["packages"]
    fewer = [found for found in metadata.distributions() if found.metadata["Name"] != "torch"]
    monkeypatch.setattr(metadata, "distributions", lambda: fewer)
    without = manifest.environment()
    assert without["packages"] != environment["packages"]
    assert without["packages_installed"] == environment["packages_installed"] - 1


def test_a_container_is_named_with_its_digest(tmp_path, monkeypatch):
    image = tmp_path / "train.sif"
    monkeypatch.setenv("APPTAINER_CONTAINER", str(image))
    assert manifest.container() == {"image": str(image), "sha256": None}
    (tmp_path / "train.sif.sha256").write_text(f"{'ab' * 32}  train.sif\n")
    assert manifest.container() == {"image": str(image), "sha256": "ab" * 32}
    # The link's target lies on a disk that the container does not see.
    monkeypatch.setenv("APPTAINER_CONTAINER", "/elsewhere/train.sif")
    monkeypatch.setattr(manifest, "SOURCE", tmp_path / "checkout")
    (tmp_path / "checkout/containers").mkdir(parents=True)
    (tmp_path / "train.sif.sha256").rename(tmp_path / "checkout/containers/train.sif.sha256")
    assert manifest.container() == {"image": "/elsewhere/train.sif", "sha256": "ab" * 32}


def test_the_commit_and_what_differs_from_it(tmp_path):
    assert manifest.commit(tmp_path) == {"commit": None, "dirty": None}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=test", "-c", "user.email=test@invalid"]
    (tmp_path / "code.py").write_text("a = 1\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    clean = manifest.commit(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is None
    digests = set()
    for text in ("a = 2\n", "a = 3\n"):
        (tmp_path / "code.py").write_text(text)
        digests.add(manifest.commit(tmp_path)["dirty"])
    assert len(digests - {None}) == 2


def test_a_new_module_is_a_change_before_git_knows_it(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=test", "-c", "user.email=test@invalid"]
    package = tmp_path / "src/package"
    package.mkdir(parents=True)
    (package / "old.py").write_text("")
    (tmp_path / ".gitignore").write_text("*.pyc\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    for name in ("results/row/manifest.json", "my.yaml", "src/package/old.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert manifest.commit(package)["dirty"] is None
    digests = set()
    for name, text in (("package/new.py", "a = 1"), ("package/new.py", "a = 2"), ("package/more ü.py", "a = 1")):
        (tmp_path / "src" / name).write_text(text)
        digests.add(manifest.commit(package)["dirty"])
    assert len(digests - {None}) == 3


def test_no_token_reaches_a_manifest(tmp_path, monkeypatch):
    secrets = ["hf_" + "NotARealToken1", "s3cretValue!", "plain-password-1"]
    monkeypatch.setenv("HF_TOKEN", secrets[1])
    monkeypatch.setattr(sys, "argv", ["train.py", "--token", secrets[0], "--url", f"https://me:{secrets[2]}@host/x"])
    monkeypatch.setenv("WANDB_API_KEY", "not-a-real-key")
    written(tmp_path, settings={"note": ["with " + secrets[1]], "key": "not-a-real-key"}, inputs={"data": secrets[0]})
    text = (tmp_path / "manifest.json").read_text()
    for secret in [*secrets, "not-a-real-key"]:
        assert secret not in text
    assert "train.py --token" in text


def test_inputs_are_the_digests_of_what_made_them(tmp_path):
    trained, data, lock = tmp_path / "train", tmp_path / "data", tmp_path / "model"
    (trained / "final").mkdir(parents=True)
    written(trained)
    for folder, name in ((data, "dataset.json"), (lock, "sources.lock.json")):
        folder.mkdir()
        (folder / name).write_text("{}")
    table = tmp_path / "table.tsv"
    table.write_text("x")
    inputs = {
        "own": trained,
        "final": trained / "final",
        "data": data,
        "lock": lock,
        "file": table,
        "none": tmp_path / "none",
    }
    found = written(tmp_path / "out", inputs={name: str(path) for name, path in inputs.items()})["inputs"]
    digest = manifest.digest_file(trained / "manifest.json")
    assert found["own"] == {"path": str(trained), "of": "manifest.json", "sha256": digest}
    assert found["final"] == {"path": str(trained / "final"), "of": "../manifest.json", "sha256": digest}
    assert found["data"]["of"] == "dataset.json"
    assert found["lock"]["of"] == "sources.lock.json"
    assert found["file"] == {"path": str(table), "sha256": hashlib.sha256(b"x").hexdigest()}
    assert found["none"] == {"value": str(tmp_path / "none")}


def test_a_manifest_is_whole_or_not_there(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        written(tmp_path, settings={"rate": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_kept_digests_serve_until_a_file_changes(tmp_path, monkeypatch):
    """An edit of the same size whose time is set back is seen; an unchanged model is not read again."""
    weights, read = tmp_path / "model.safetensors", []
    weights.write_bytes(b"a" * 100)
    (tmp_path / "sources.lock.json").write_text("{}")
    whole = manifest.digest_file
    monkeypatch.setattr(manifest, "digest_file", lambda path: read.append(path.name) or whole(path))
    first = manifest.digest_weights(tmp_path)
    assert manifest.digest_weights(tmp_path) == first and read.count("model.safetensors") == 1
    before = weights.stat()
    with weights.open("r+b") as file:
        file.write(b"b")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert manifest.digest_weights(tmp_path) != first
    assert manifest.digest_weights(tmp_path) == manifest.digest_files([weights, tmp_path / "sources.lock.json"])
    weights.write_bytes(b"a" * 100)
    os.utime(weights)
    assert manifest.digest_weights(tmp_path) == first
