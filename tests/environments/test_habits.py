"""The files that people who join look for: they parse, agree with the project, and name no one."""

import re
import tomllib

import yaml


def read(root, name):
    return yaml.safe_load((root / name).read_text())


def test_the_version_is_the_same_everywhere(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    citation = read(root, "CITATION.cff")
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"] == "MIT"
    assert citation["authors"] == [{"name": "phi3v developers"}]
    (newest, *_) = re.findall(r"^## \[(\d.*)\] - \d{4}-\d\d-\d\d$", (root / "CHANGELOG.md").read_text(), re.M)
    assert newest == project["version"]
    assert f'__version__ = "{project["version"]}"' in (root / "src/phi3v/__init__.py").read_text()


def test_the_hosted_checks_are_the_ones_of_ci(root):
    steps = read(root, ".github/workflows/ci.yml")["jobs"]["ci"]["steps"]
    assert ".ci/run" in steps[-1]["run"]
    assert "make check\nmake test\n" in (root / ".ci/run").read_text()


def test_the_hooks_are_the_tools_of_make_check(root):
    make = (root / "Makefile").read_text()
    hooks = {hook["id"]: hook for hook in read(root, ".pre-commit-config.yaml")["repos"][0]["hooks"]}
    for hook in hooks.values():
        tool, *words = hook["entry"].removeprefix(".venv/bin/").split()
        assert (root / words[0]).is_file() if tool == "python" else tool in make
    assert hooks["secrets"]["args"][1] == re.search(r"--exclude-files '(.*)'", make)[1].replace("$$", "$")


def test_issue_forms_parse(root):
    forms = [read(root, f".github/ISSUE_TEMPLATE/{name}.yml") for name in ("bug", "idea")]
    assert all(form["name"] and form["description"] and form["body"] for form in forms)


def test_every_make_target_is_listed_and_phony(root):
    text = (root / "Makefile").read_text().replace("\\\n", " ")
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split())
    targets = set(re.findall(r"^([a-z][a-z-]*):", text, re.M))
    assert targets == phony
    assert targets == set(re.findall(r"^([a-z][a-z-]*):.*## ", text, re.M))


def test_a_documented_target_is_one_that_snakemake_takes(root):
    """It starts nothing here where neither the command nor a profile names cores, and takes a word after --configfile for a file."""
    rules = "".join(path.read_text() for path in [root / "Snakefile", *(root / "workflow/rules").glob("*.smk")])
    targets = set(re.findall(r"^rule (\w+):", rules, re.M))
    files = [
        root / "README.md",
        *(root / "docs").rglob("*.md"),
        *(root / "src").rglob("*.py"),
        *(root / "scripts").glob("*.py"),
    ]
    seen = 0
    for path in files:
        for command in re.findall(r"(?:`|^ *)snakemake ([^`#\n]+)", path.read_text(), re.M):
            words = command.split()
            assert not re.search(r"--configfile +\S+ +[^- ]", command), f"{path.relative_to(root)}: snakemake {command}"
            if not words[0].startswith("-") or targets & set(words):
                seen += 1
                enough = any(re.match(r"(-n|-c\d+|--cores|--profile)$", word) for word in words)
                assert enough, f"{path.relative_to(root)}: snakemake {command}: cores are missing"
    assert seen > 5
