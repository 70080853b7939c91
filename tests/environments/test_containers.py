"""Container definitions: they parse, follow one base and one lock, equal the Dockerfile, and do what they say as far as a chroot shows."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small_run

sys.path.insert(0, str(Path(__file__).parent))
import rootfs

NAMES = ("workflow", "train", "report")
BASE = r"[a-z0-9./-]+:[\w.-]+(@sha256:[0-9a-f]{64})?"
STAND_INS = Path(__file__).parent / "stand_ins"


def definition(root, name):
    return root / f"containers/{name}.def"


def stage(root, name):
    """A stage of the Dockerfile, with those that it starts from, as definition sections."""
    text = (root / "containers/Dockerfile").read_text().replace(" \\\n", " ")
    stages = re.findall(r"^FROM (\S+) AS (\w+)\n(.*?)(?=^FROM |\Z)", text, re.M | re.S)
    blocks, body = {own: (parent, lines) for parent, own, lines in stages}, ""
    while name in blocks:
        name, lines = blocks[name]
        body = lines + body
    assert name == "${base}"
    runs = re.findall(r"^RUN set -e;(.*)", body, re.M)
    return {
        "arguments": dict(re.findall(r"^ARG (\w+)=(\S+)", text.split("FROM")[0] + body, re.M)),
        "files": re.findall(r"^COPY (\S+ \S+)$", body, re.M),
        "post": [command.strip() for command in ";".join(runs).split(";")],
        "environment": dict(re.findall(r"^ENV (\w+)=(\S+)", body, re.M)),
        "labels": dict(re.findall(r"([\w.]+)=(\S+)", " ".join(re.findall(r"^LABEL (.*)", body, re.M)))),
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_definition_and_its_docker_stage_are_equal(root, name):
    parts = rootfs.sections(definition(root, name), lock="${lock}", commit="${commit}")
    docker = stage(root, name)
    assert docker["arguments"] == dict(line.split("=", 1) for line in parts["arguments"].split())
    assert sorted(docker["files"]) == sorted(parts["files"].splitlines())
    assert docker["post"] == parts["post"].splitlines()
    assert docker["environment"] == dict(re.findall(r"export (\w+)=(\S+)", parts["environment"]))
    assert docker["labels"] == dict(line.split(" ", 1) for line in parts["labels"].splitlines())


def test_every_image_starts_from_the_one_base(root, project_version):
    base = re.search(r"^base=(.*)$", (root / "containers/base.txt").read_text(), re.M)[1]
    assert re.fullmatch(BASE, base)
    for name in NAMES:
        parts = rootfs.sections(definition(root, name))
        assert f"From: {base}" in parts["header"]
        assert f"base={base}" in parts["arguments"]
        assert f"org.opencontainers.image.version {project_version}\n" in parts["labels"]
    assert re.findall(r"^ARG base=(.*)$", (root / "containers/Dockerfile").read_text(), re.M) == [base]


@pytest.fixture
def project_version(root):
    return re.search(r'^version = "(.*)"', (root / "pyproject.toml").read_text(), re.M)[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_definition_parses_and_is_complete(root, name):
    from spython.main.parse.parsers import get_parser

    recipe = get_parser("singularity")(str(definition(root, name))).parse()
    recipe = next(iter(recipe.values())) if isinstance(recipe, dict) else recipe
    assert recipe.install
    assert recipe.test
    assert recipe.labels
    parts = rootfs.sections(definition(root, name))
    assert set(parts) == {"header", "arguments", "files", "post", "environment", "test", "labels", "help"}
    for section in ("post", "environment", "test"):
        done = subprocess.run(["sh", "-n"], input=parts[section], text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    for line in parts["files"].splitlines():
        source, target = line.split()
        assert (root / source).exists()
        assert target == f"/opt/phi3v/{source}"


@pytest.mark.parametrize("name", NAMES)
def test_a_definition_follows_the_linters_rules(root, name):
    """Those of hadolint that fit: small layers, no unpinned package, nothing piped into a shell, no `latest`."""
    parts = rootfs.sections(definition(root, name))
    post = parts["post"]
    assert re.search(r"apt-get install -y --no-install-recommends", post)
    assert "rm -rf /var/lib/apt/lists/*" in post
    lock = re.search(r"^lock=(.*)$", parts["arguments"], re.M)[1]
    assert re.findall(r"pip install (.*)", post) == [f"--no-cache-dir -r /opt/phi3v/envs/{lock}.txt"]
    assert not re.search(r"sudo|curl|wget|\|\s*(ba)?sh|apt-get (dist-)?upgrade", post)
    assert ":latest" not in parts["header"]


def test_an_argument_that_nothing_defines_is_an_error(root, tmp_path):
    text = definition(root, "report").read_text().replace("{{ commit }}", "{{ comit }}")
    (tmp_path / "wrong.def").write_text(text)
    with pytest.raises(KeyError, match="comit"):
        rootfs.sections(tmp_path / "wrong.def")


@pytest.mark.parametrize("name", NAMES)
def test_a_definitions_test_passes_in_this_environment(root, name, tmp_path):
    """%test, in a copy of %files with this Python in place of the image's."""
    parts = rootfs.sections(definition(root, name))
    for line in parts["files"].splitlines():
        source = root / line.split()[0]
        (tmp_path / line.split()[0]).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, tmp_path / line.split()[0])
    script = "set -e\n" + (parts["environment"] + parts["test"]).replace("/opt/phi3v", str(tmp_path))
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, check=False, env={"PATH": path, "HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.verify
def test_images_are_built_and_jobs_run_in_them(root, tmp_path, capsys):
    """%post and %test of each definition in fresh Debian; then a small run with `--sdm apptainer`, each job inside its image."""
    assert not rootfs.is_possible(), rootfs.is_possible()
    figures = rootfs.Stopwatch(capsys)
    base = tmp_path / "base"
    with figures("debootstrap", base):
        rootfs.bootstrap(base)
        rootfs.like_the_base_image(base)
    for name in NAMES:
        arguments = {"lock": "train-cpu"} if name == "train" else {}
        with figures(f"{name}: %post", tmp_path / name):
            done = rootfs.build(definition(root, name), root, base, tmp_path / name, **arguments)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        with figures(f"{name}: %test"):
            done = rootfs.test(definition(root, name), tmp_path / name, **arguments)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    copy = small_run.make(root, tmp_path / "run")
    for name in ("train", "report"):
        (copy / f"containers/{name}.sif").write_text(f"{tmp_path / name}\n")
    with figures("the small run, each job inside its image"):
        code, output, _ = small_run.snakemake(copy, "--sdm", "apptainer", path=[STAND_INS], timeout=3000)
    assert code == 0, output[-6000:]
    assert "Activating singularity image" in output
    assert small_run.accuracies(copy).keys() == set(small_run.ROWS["accuracy"])
