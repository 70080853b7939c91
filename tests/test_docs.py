"""The commands of the documentation run, and no command slips in untested.

A fenced block of a page is tested if a marker stands on the line before it:

    <!-- test: NAME -->                 a `bash` or `python` block: it runs, after the other blocks of NAME on this page
    <!-- test: NAME, verify -->         the same, in `make verify-docs` only, because it takes longer
    <!-- test: NAME, file: PATH -->     any other block: it is written to PATH first
    <!-- test: NAME, output -->         its lines are in the output of the block before it

The blocks of one NAME share a fresh copy of the repository, whose demo is small; NAME is a function of SETUPS, which
adds what the page assumes. A block of commands without a marker is listed in NOT_RUN with the reason.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import small_run
from docs_setups import NOT_RUN, SETUPS

from phi3v.cluster.site import load_site

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ("docs/reference/configuration.md", "docs/reference/commands.md", "docs/reference/hardware.md")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/**/*.md"))]
COMMANDS = (
    "python ",
    "snakemake",
    "make ",
    "torchrun",
    "pip ",
    "vllm ",
    "apptainer ",
    "docker ",
    "git ",
    "sbatch ",
    "ssh ",
    "pytest",
)
FENCE = re.compile(
    r"^(?:<!-- test: (?P<marker>[^>]+?) -->\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. name: the test that it belongs to; empty without a marker."""

    page: str
    line: int
    language: str
    text: str
    name: str
    verify: bool
    output: bool
    file: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> bool:
        return self.language in ("bash", "python")


def blocks_of(page: Path) -> list[Block]:
    found = []
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        name, *options = [part.strip() for part in (match["marker"] or "").split(",")]
        files = [option.removeprefix("file:").strip() for option in options if option.startswith("file:")]
        line = text.count("\n", 0, match.start("language")) + 1
        page_name = page.relative_to(ROOT).as_posix()
        found.append(
            Block(
                page_name,
                line,
                match["language"],
                match["text"],
                name,
                "verify" in options,
                "output" in options,
                "".join(files),
            )
        )
    return found


BLOCKS = [block for page in PAGES if page.relative_to(ROOT).as_posix() not in GENERATED for block in blocks_of(page)]
TESTS = sorted({(block.page, block.name) for block in BLOCKS if block.name})


def marked(test: tuple[str, str]) -> list[Block]:
    return [block for block in BLOCKS if (block.page, block.name) == test]


LONG = [test for test in TESTS if any(block.verify for block in marked(test))]
SHORT = [test for test in TESTS if any(block.commands and not block.verify for block in marked(test))]


def test_every_block_names_its_language():
    assert [block.place for block in BLOCKS if not block.language] == []


def test_commands_stand_in_bash_blocks():
    """In a block of another language, no test would see them."""
    found = [
        f"{block.place}: {line}"
        for block in BLOCKS
        if block.language != "bash"
        for line in block.text.splitlines()
        if line.startswith(COMMANDS)
    ]
    assert found == []


def test_a_block_of_commands_is_run_or_says_why_not():
    """NOT_RUN: (page, start of the block) to the reason; an entry of a block that is gone fails too."""
    unmarked = [block for block in BLOCKS if block.commands and not block.name]
    untested = [
        block.place
        for block in unmarked
        if not any(block.page == page and block.text.startswith(start) for page, start in NOT_RUN)
    ]
    assert untested == []
    gone = [
        (page, start)
        for page, start in NOT_RUN
        if not any(block.page == page and block.text.startswith(start) for block in unmarked)
    ]
    assert gone == []


def test_a_marker_names_a_setup_and_a_block_of_its_kind():
    for block in BLOCKS:
        assert not block.name or block.name in SETUPS, f"{block.place}: no setup {block.name}"
        assert not block.name or block.commands + block.output + bool(block.file) == 1, block.place


def test_links_of_pages_outside_the_site_lead_somewhere():
    """`make check` follows those of docs/."""
    broken = []
    for page in [*ROOT.glob("*.md"), *ROOT.glob("config/*.md"), *ROOT.glob("tests/**/*.md")]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path = target.partition("#")[0]
            if path and "://" not in path and not (page.parent / path).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_the_site_file_of_its_page_is_valid(tmp_path):
    (block,) = [b for b in BLOCKS if b.page == "docs/how-to/slurm-site.md" and b.language == "yaml"]
    (tmp_path / "site.yaml").write_text(block.text)
    assert load_site(str(tmp_path / "site.yaml")).partitions.keys() == {"cpu", "a100-80gb", "v100-32gb"}


def test_a_message_of_troubleshooting_is_in_the_code():
    """Headings quote messages; what stands between two `…` is in one line of the code."""
    folders = ("src", "scripts", "workflow")
    code = "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py"))
    code = re.sub(r'"\s*(\+ \()?\s*f?"', "", code)  # texts that follow each other are one text
    headings = re.findall(r"^### `(.+)`$", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.M)
    parts = [part.strip(" :;,") for heading in headings for part in heading.split("…")]
    assert len(headings) > 10
    assert [part for part in parts if part not in code] == []


def run_blocks(blocks: list[Block], folder: Path, request: pytest.FixtureRequest) -> None:
    small_run.make(ROOT, folder)
    request.getfixturevalue("monkeypatch").chdir(folder)
    SETUPS[blocks[0].name](request)
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder / "src"),
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0", "PHI3V_DOWNLOAD_ATTEMPTS": "1",
    }  # fmt: skip
    output = ""
    for block in blocks:
        if block.output:
            missing = [line for line in block.text.splitlines() if line not in output]
            assert missing == [], f"{block.place}: not printed: {missing}\n{output[-4000:]}"
            continue
        if block.file:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.text, encoding="utf-8")
            continue
        # This Python's packages are the environment that make would install first.
        script = f'set -euo pipefail\nmake() {{ command make -o .venv/installed "$@"; }}\n{block.text}'
        command = ["bash", "-c", script] if block.language == "bash" else [sys.executable, "-c", block.text]
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1500, check=False,
        )  # fmt: skip
        output = done.stdout
        assert done.returncode == 0, f"{block.place}:\n{block.text}\n{output[-4000:]}"


@pytest.mark.parametrize("test", SHORT, ids=":".join)
def test_the_commands_of_a_page_run(test, tmp_path, request):
    run_blocks([block for block in marked(test) if not block.verify], tmp_path, request)


@pytest.mark.verify
@pytest.mark.parametrize("test", LONG, ids=":".join)
def test_the_longer_commands_of_a_page_run(test, tmp_path, request):
    run_blocks(marked(test), tmp_path, request)
