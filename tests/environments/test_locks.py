"""The lock files follow from pyproject.toml, agree with each other, leave nothing out and carry nothing along."""

import re
import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LINUX = {"python_version": "3.11", "python_full_version": "3.11.9", "sys_platform": "linux", "platform_system": "Linux"}
LINUX |= {"os_name": "posix", "platform_machine": "x86_64", "implementation_name": "cpython", "extra": ""}
LINUX |= {"platform_python_implementation": "CPython"}


# Lock's name to extras of pyproject.toml, as the Makefile's target `lock` gives them.
EXTRAS = {name: (name,) for name in ("workflow", "data", "report")} | {
    "train-cpu": ("train",),
    "train-cuda": ("train",),
}


@pytest.fixture(scope="module")
def cuda_only(root):
    """Packages that torch needs on CUDA alone."""
    return set((root / "envs/cuda-only.in").read_text().split())


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def pins(text):
    """Name to version of a lock's lines."""
    return {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.M)}


def asked(project, extras):
    """Requirements of the package and of its extras, extras of extras opened."""
    found = [Requirement(text) for text in project["dependencies"]]
    for extra in extras:
        for text in project["optional-dependencies"][extra]:
            requirement = Requirement(text)
            own = requirement.name == project["name"]
            found += asked(project, requirement.extras) if own else [requirement]
    return found


@pytest.fixture(scope="module")
def locks(root):
    """Lock's name to (extras, pins)."""
    files = {name: (extras, f"envs/{name}.txt") for name, extras in EXTRAS.items()}
    files["requirements"] = (("workflow", "train", "report", "dev"), "requirements.txt")
    return {name: (extras, pins((root / path).read_text())) for name, (extras, path) in files.items()}


def test_what_the_project_asks_for_is_pinned_as_it_asks(locks, project):
    for name, (extras, found) in locks.items():
        for requirement in asked(project, extras):
            version = found.get(canonicalize_name(requirement.name))
            assert version, f"{name}: no {requirement.name}: run `make lock`"
            assert requirement.specifier.contains(version), f"{name}: {requirement.name}=={version}: run `make lock`"


def test_a_package_has_one_version_everywhere(locks):
    everywhere = {}
    for name, (_, found) in locks.items():
        for package, version in found.items():
            everywhere.setdefault(package, {}).setdefault(version, []).append(name)
    assert {package: versions for package, versions in everywhere.items() if len(versions) > 1} == {}


def test_a_lock_is_all_that_is_needed_and_no_more(locks, project, cuda_only):
    """Walks what each installed package says it needs. CUDA's own libraries are not installed here and end the walk."""
    for name, (extras, found) in locks.items():
        reached, waiting = set(), [(requirement, requirement.extras) for requirement in asked(project, extras)]
        while waiting:
            requirement, wanted = waiting.pop()
            package = canonicalize_name(requirement.name)
            if (package, *sorted(wanted)) in reached:
                continue
            reached.add((package, *sorted(wanted)))
            if package in cuda_only:
                continue
            assert package in found, f"{name}: {package} is needed and not pinned: run `make lock`"
            for text in metadata.requires(package) or []:
                needed = Requirement(text)
                if needed.marker is None or any(
                    needed.marker.evaluate({**LINUX, "extra": extra}) for extra in ["", *wanted]
                ):
                    waiting.append((needed, needed.extras))
        extra = set(found) - cuda_only - {entry[0] for entry in reached}
        # torch's CUDA build asks for setuptools under a marker that its CPU build's metadata may not have.
        assert extra <= {"setuptools"}, f"{name}: pinned and not needed: {sorted(extra)}: run `make lock`"


def test_the_environment_of_the_tests_is_the_locked_one(locks):
    for package, version in locks["requirements"][1].items():
        assert metadata.version(package).split("+")[0] == version, f"{package}: run `make venv`"


def test_conda_and_pip_install_the_same(root):
    for name in EXTRAS:
        text = (root / f"envs/{name}.txt").read_text()
        environment = yaml.safe_load((root / f"envs/{name}.yaml").read_text())
        lines = [line for line in text.replace(" \\\n", " ").splitlines() if not line.startswith("#")]
        # Triton and torch.compile call it for kernels on GPUs.
        assert ("gcc" in environment["dependencies"]) == (name == "train-cuda")
        assert environment["dependencies"][-1]["pip"] == [" ".join(line.split()) for line in lines]
        hashed = [bool(re.search(r"--hash=sha256:[0-9a-f]{64}", line)) for line in lines]
        assert hashed == [name == "train-cuda"] * len(lines)


def test_only_the_cuda_set_holds_cuda_libraries(locks, cuda_only):
    assert {name for name, (_, found) in locks.items() if cuda_only & set(found)} == {"train-cuda"}
    cuda, cpu = locks["train-cuda"][1], locks["train-cpu"][1]
    assert set(cuda) - set(cpu) == cuda_only
    assert set(cpu) <= set(cuda)
