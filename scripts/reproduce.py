#!/usr/bin/env python
"""Run the demo from scratch in a new folder, and compare its digests with the stored ones or with another run's.

    python scripts/reproduce.py                                     # make reproduce: the demo, against config/demo/digests.json
    python scripts/reproduce.py --rows phi35-digits-full-bf16       # some rows only
    python scripts/reproduce.py --twice --store                     # two runs; if they are equal, store their digests
    python scripts/reproduce.py --results results/demo              # a finished run against the stored digests
    python scripts/reproduce.py --results results/demo --against ../other/results/demo

Digests are stored per kind of processor and build of torch. Exit codes: 1: a difference, which is printed; 3: no
digests are stored for this kind of machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TypedDict

import yaml

from phi3v.provenance.digests import digests, explain, first_difference, machine
from phi3v.provenance.manifest import commit, write_json
from phi3v.settings import SettingsError, load_run, run_script

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "config/demo/digests.json"


class Stored(TypedDict):
    """Stored digests of one kind of machine."""

    commit: str
    files: dict[str, str]


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", nargs="+", default=[], metavar="ROW", help="accuracy rows to run (default: all of the demo)"
    )
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--twice", action="store_true", help="compare with a second run instead of the stored digests")
    other.add_argument("--against", type=Path, metavar="FOLDER", help="compare with the folder of another finished run")
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help="folder of a finished run to use instead of a new run"
    )
    parser.add_argument("--store", action="store_true", help="store the digests for this kind of machine")
    return parser.parse_args()


def run_demo(folder: Path, rows: list[str]) -> Path:
    """Runs the demo in a fresh copy of the checkout. Returns the results folder. Raises CalledProcessError."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/demo", "--quiet"]
    if rows:
        command += ["--config", f"rows={{accuracy: [{', '.join(rows)}], speed: []}}"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(folder / "src")}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        print(done.stdout[-4000:], file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, command)
    return folder / "results/demo"


def digests_of(results: Path) -> dict[str, str]:
    """Digests of a run's folder results/NAME. Raises SettingsError if it contains no run."""
    results = results.resolve()
    found = digests(results.parent, results.name)
    if not any(name.startswith(f"{results.name}/") for name in found):
        raise SettingsError(
            f"{results}: contains no file to compare; expected the folder of a finished run, results/NAME"
        )
    return found


def check_rows(rows: list[str]) -> None:
    """Raises SettingsError for a row that the demo cannot run."""
    demo = yaml.safe_load((ROOT / "config/demo.yaml").read_text())
    load_run({**demo, "rows": {"accuracy": rows, "speed": []}}, ROOT)


def made_by(results: Path) -> str:
    """Commit in the manifests of a finished run."""
    named = {json.loads(path.read_text()).get("commit") for path in sorted(results.glob("*/*/manifest.json"))}
    return ", ".join(sorted(name or "unknown" for name in named))


def compare(found: dict[str, str], wanted: dict[str, str], results: Path, other: Path | None) -> int:
    """Compares digests and returns the exit code. A missing file is a difference. other: the folder of `wanted`, if it
    exists."""
    if not found:
        print(f"{results}: no digest is stored for any of its files; expected rows of the stored run", file=sys.stderr)
        return 2
    different = first_difference(found, wanted)
    if different is None:
        print(f"identical: {len(found)} files (data, weights, predictions, metrics, accuracy.tsv)")
        return 0
    print(f"first difference: {different}", file=sys.stderr)
    if other is not None:
        print(explain(results.parent / different, other.parent / different), file=sys.stderr)
    else:
        got, expected = (digests.get(different, "no such file") for digests in (found, wanted))
        print(f"got {got}, expected {expected}", file=sys.stderr)
    return 1


def compare_with_stored(found: dict[str, str], stored: Stored, results: Path, part: bool) -> int:
    """Compares with the stored digests and returns the exit code. part: the run has only some rows, so missing files
    and accuracy.tsv are no difference."""
    files = stored["files"]
    shared = {name for name in files if name in found and not name.endswith("accuracy.tsv")}
    print(f"{len(found)} files, {len(shared)} of them among the {len(files)} stored at {stored['commit'][:12]}")
    names = shared if part else set(files)
    return compare(
        {n: found[n] for n in found if n in names}, {n: files[n] for n in files if n in names}, results, None
    )


def reproduce(given: argparse.Namespace, folder: Path) -> int:
    """Runs in `folder`, compares and stores. Returns the exit code. Raises SettingsError before anything runs."""
    kind, part = machine(), bool(given.rows or given.results)
    stored: dict[str, Stored] = json.loads(STORED.read_text()) if STORED.is_file() else {}
    check_rows(given.rows)
    for finished in filter(None, (given.against, given.results)):
        digests_of(finished)
    results = given.results or run_demo(folder / "one", given.rows)
    found = digests_of(results)
    if other := given.against or (run_demo(folder / "two", given.rows) if given.twice else None):
        code = compare(found, digests_of(other), results, other)
    elif kind in stored:
        code = compare_with_stored(found, stored[kind], results, part)
    else:
        code = 0 if given.store else 3
        print(f"{STORED.name} has no digests for {kind!r}, only for {', '.join(stored) or 'none'}", file=sys.stderr)
    if code == 0 and given.store:
        files = {name: value for name, value in found.items() if not (part and name.endswith("accuracy.tsv"))}
        made_at = made_by(results) if given.results else commit(ROOT)["commit"]
        write_json(STORED, {**stored, kind: {"commit": made_at, "files": files}})
        print(f"{STORED}: {len(files)} digests stored for {kind}")
    return code


def main() -> int:
    """Parses the command line, runs and compares. Returns the exit code."""
    given = arguments()
    try:
        with tempfile.TemporaryDirectory(prefix="phi3v-") as folder:
            return reproduce(given, Path(folder))
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    run_script(main)
