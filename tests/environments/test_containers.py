"""The images' one recipe: base, locks, contents, each image's own test; builds and runs with real engines."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import pytest
import small_run

sys.path.insert(0, str(Path(__file__).parent))
import rootfs

IMAGES = {"workflow": "workflow", "report": "report", "train": "train-cuda"}
BASE = r"[a-z0-9./-]+:[\w.-]+(@sha256:[0-9a-f]{64})?"
# What the CPU build of an image may import beside its lock: what every environment has.
ALWAYS = {"pip", "setuptools", "wheel", "phi3v"}


@pytest.fixture(scope="module")
def dockerfile(root):
    return (root / "containers/Dockerfile").read_text()


def stage(dockerfile, name):
    return re.search(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", dockerfile, re.M | re.S)[1]


def test_every_image_starts_from_the_one_base(root, dockerfile):
    base = re.search(r"^base=(.*)$", (root / "containers/base.txt").read_text(), re.M)[1]
    assert re.fullmatch(BASE, base)
    assert re.findall(r"^ARG base=(.*)$", dockerfile, re.M) == [base]
    stages = {own: parent for parent, own in re.findall(r"^FROM (\S+) AS (\w+)$", dockerfile, re.M)}
    for name in IMAGES:
        while name in stages:
            name = stages[name]
        assert name == "${base}"


@pytest.mark.parametrize(("name", "lock"), IMAGES.items())
def test_a_stage_installs_its_lock_and_tests_itself(root, dockerfile, name, lock):
    text = stage(dockerfile, name)
    assert f"ARG lock={lock}\n" in text
    assert (root / f"envs/{lock}.txt").is_file()
    assert re.findall(r"pip install (.*?)(?: &&|;)", text) == ["--no-cache-dir -r /opt/phi3v/envs/${lock}.txt"]
    assert f"RUN /opt/phi3v/containers/smoke.sh {name}\n" in text
    assert f"org.opencontainers.image.title=phi3v-{name} " in text


def test_the_recipe_follows_the_linters_rules(root, dockerfile):
    """Those of hadolint that fit: small layers, nothing piped into a shell, no `latest`; and the project's version."""
    for run in re.findall(r"apt-get install.*", dockerfile):
        assert run.startswith("apt-get install -y --no-install-recommends ")
    assert dockerfile.count("apt-get update") == dockerfile.count("rm -rf /var/lib/apt/lists/*")
    assert not re.search(r"sudo|curl|wget|\|\s*(ba)?sh|apt-get (dist-)?upgrade|:latest", dockerfile)
    version = re.search(r'^version = "(.*)"', (root / "pyproject.toml").read_text(), re.M)[1]
    assert f"org.opencontainers.image.version={version} " in dockerfile


def context(root, folder):
    """Copy what .dockerignore lets into an image; returns `folder`."""
    for name in re.findall(r"^!(.*)$", (root / ".dockerignore").read_text(), re.M):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (root / name).is_dir():
            shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy2(root / name, folder / name)
    return folder


def locked(root, lock):
    return set(re.findall(r"^([\w.-]+)==", (root / f"envs/{lock}.txt").read_text(), re.M)) | ALWAYS


@pytest.mark.parametrize(("name", "lock"), [("workflow", "workflow"), ("report", "report"), ("train", "train-cpu")])
def test_an_image_needs_nothing_but_its_lock(root, name, lock, tmp_path):
    """The image's own test, from the files that it copies, where no package outside of its lock can be imported."""
    folder = context(root, tmp_path / "image")
    allowed = {re.sub(r"[-_.]+", "-", package).lower() for package in locked(root, lock)}
    refused = sorted(
        module
        for module, packages in metadata.packages_distributions().items()
        if not any(re.sub(r"[-_.]+", "-", package).lower() in allowed for package in packages)
    )
    assert "pytest" in refused
    (folder / "src/sitecustomize.py").write_text(
        "import sys\nfrom importlib.machinery import PathFinder\n\n\nclass Lock(PathFinder):\n    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] not in {set(refused)}:\n            return super().find_spec(name, path, target)\n"
        "\n\nsys.meta_path = [Lock if finder is PathFinder else finder for finder in sys.meta_path]\n"
    )
    done = subprocess.run(
        [folder / "containers/smoke.sh", name], capture_output=True, text=True, check=False,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{name}: passed" in done.stdout


def test_an_image_that_does_not_exist_is_named(root):
    done = subprocess.run([root / "containers/build.sh", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "trian: no such image; expected workflow, report or train" in done.stderr


# The rest builds and runs images: `make verify-containers`.
TOOLS = ("buildah", "umoci", "ch-run", "apptainer", "debootstrap")
NOBODY = 65534


class Engine:
    """Buildah with a storage of its own, where the base image is made from Debian in place of the registry's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program = folder / "bin/buildah"
        self.program.parent.mkdir(parents=True)
        real = shutil.which("buildah")
        places = f"--root {folder}/storage --runroot {folder}/run"
        # chroot: no namespaces are needed inside another container.
        written = f"""test "$1" != build || printf '%s\\0' "$@" > {folder}/asked"""
        self.program.write_text(f'#!/bin/sh\nexport BUILDAH_ISOLATION=chroot\n{written}\nexec {real} {places} "$@"\n')
        self.program.chmod(0o755)

    def __call__(self, *words, folder: Path | None = None) -> str:
        command = [self.program, *map(str, words)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout.strip()

    def build_again(self, folder: Path) -> None:
        """Repeat the last build in `folder` without its cache."""
        verb, *words = (self.folder / "asked").read_text().split("\0")[:-1]
        self(verb, "--no-cache", *words, folder=folder)

    def make_base(self, debian: Path, image: str) -> None:
        """Commit Debian with Python and pip at /usr/local/bin, as in the image that the recipe starts from."""
        container = self("from", "scratch")
        self("add", "--quiet", container, debian, "/")
        self("run", container, "--", "python3", "-m", "venv", "/usr/local")
        path = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
        self("config", "--env", f"PATH={path}", "--cmd", "python3", container)
        self("commit", "--quiet", "--rm", container, image)

    def pip_options(self) -> list[str]:
        """Volumes with pip's configuration here and the folders that it names: seen in the build, not part of the image."""
        variables, paths = rootfs.pip_settings()
        written = self.folder / "pip.conf"
        lines = [
            f"{name.removeprefix('PIP_').lower().replace('_', '-')} = {value}" for name, value in variables.items()
        ]
        written.write_text("[global]\n" + "\n".join(lines) + "\n")
        return [f"--volume={path}:{path}:ro" for path in paths] + [f"--volume={written}:/etc/pip.conf:ro"]

    def layers(self, name: str) -> list[str]:
        return json.loads(self("inspect", "--type", "image", f"localhost/phi3v-{name}"))["OCIv1"]["rootfs"]["diff_ids"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    assert not missing, f"not on this machine: {', '.join(missing)}"
    assert os.geteuid() == 0, "needs root, for debootstrap"
    folder = tmp_path_factory.mktemp("engine")
    engine = Engine(folder)
    rootfs.bootstrap(folder / "debian")
    engine.make_base(folder / "debian", "localhost/python:3.11-slim-bookworm")
    shutil.rmtree(folder / "debian")
    return engine


@pytest.fixture(scope="module")
def clone(root, tmp_path_factory):
    """A clone whose commit the images name."""
    copy = small_run.copy(root, tmp_path_factory.mktemp("clone"))
    git = ["git", "-C", str(copy), "-c", "user.name=test", "-c", "user.email=test@invalid"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    return copy


@pytest.fixture
def images():
    """The folder that the builds write images to, and that the runs read."""
    return Path(os.environ.get("PHI3V_IMAGES") or pytest.fail("PHI3V_IMAGES: expected a folder of images"))


def build(engine, copy, name):
    """`containers/build.sh NAME`, CPU lock for the CUDA one."""
    lock = ["--build-arg", "lock=train-cpu"] if name == "train" else []
    command = [copy / "containers/build.sh", name, "--build-arg", "base=localhost/python:3.11-slim-bookworm", *lock]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*command, *engine.pip_options()], capture_output=True, text=True, check=False,
        env={**os.environ, "ENGINE": str(engine.program), "PATH": path, "PYTHONPATH": str(copy / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.verify
@pytest.mark.parametrize("name", ["report", "workflow", "train"])
def test_an_image_is_built_and_built_again(engine, clone, images, capsys, name):
    """The image passes its own test within the build; a second build without any cache has the same layers."""
    figures = rootfs.Stopwatch(capsys)
    with figures(f"{name}: image, archive, SIF"):
        build(engine, clone, name)
    layers, archive = engine.layers(name), clone / f"containers/{name}.tar"
    digest = (clone / f"containers/{name}.sif.sha256").read_text().split()[0]
    with capsys.disabled():
        sif = clone / f"containers/{name}.sif"
        print(f"; {len(layers)} layers, archive {archive.stat().st_size >> 20} MiB, SIF {sif.stat().st_size >> 20} MiB")
    assert re.fullmatch("[0-9a-f]{64}", digest)
    program = ["apptainer", "exec", "--containall", clone / f"containers/{name}.sif", "cat", "/etc/pip.conf"]
    assert subprocess.run(program, capture_output=True, text=True, check=False).stdout == ""
    for path in (sif, archive, sif.with_suffix(".sif.sha256")):
        shutil.copy2(path, images)
    with figures(f"{name}: again, without cache"):
        engine.build_again(clone)
    again = engine.layers(name)
    different = [number for number, (one, two) in enumerate(zip(layers, again, strict=True), 1) if one != two]
    assert not different, f"layers {different} of {len(layers)} differ"


@pytest.mark.verify
def test_an_archive_runs_unprivileged_in_charliecloud(images, capsys):
    """As on a cluster without Apptainer: unpacked and run by a user without any privilege."""
    figures = rootfs.Stopwatch(capsys)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        (folder / "layout").mkdir()
        subprocess.run(["tar", "-xf", images / "train.tar", "-C", folder / "layout"], check=True)
        subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", folder], check=True)

        def unprivileged(*words) -> str:
            done = subprocess.run(
                [*map(str, words)], user=NOBODY, group=NOBODY, extra_groups=[], cwd=folder, capture_output=True, text=True,
                check=False, env={"PATH": "/usr/local/bin:/usr/bin:/bin", "USER": "nobody", "HOME": name},
            )  # fmt: skip
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            return done.stdout

        with figures("Charliecloud: unpacked", folder):
            unprivileged("umoci", "raw", "unpack", "--rootless", "--image", "layout:phi3v-train", "image")
        with figures("Charliecloud: the image's test"):
            assert "train: passed" in unprivileged("ch-run", "image", "--", "/opt/phi3v/containers/smoke.sh", "train")


@pytest.mark.verify
def test_each_job_of_a_small_run_is_inside_its_image(root, images, tmp_path, capsys):
    figures = rootfs.Stopwatch(capsys)
    copy = small_run.make(root, tmp_path / "run")
    for path in images.glob("*.sif"):
        (copy / "containers" / path.name).symlink_to(path)
        shutil.copy2(path.with_suffix(".sif.sha256"), copy / "containers")
    with figures("the small run, each job inside its image"):
        code, output, _ = small_run.snakemake(copy, "--sdm", "apptainer", timeout=3000)
    assert code == 0, output[-6000:]
    assert small_run.accuracies(copy).keys() == set(small_run.ROWS["accuracy"])
    manifest = copy / f"results/demo/train/{small_run.ROWS['accuracy'][0]}/manifest.json"
    container = json.loads(manifest.read_text())["environment"]["container"]
    assert Path(container["image"]).resolve() == (images / "train.sif").resolve()
    assert container["sha256"] == (images / "train.sif.sha256").read_text().split()[0]
