#!/usr/bin/env python
"""Look the locked versions up among published vulnerabilities (pip-audit); says so where the network does not answer.

    python scripts/audit.py          # requirements.txt and envs/train-cuda.txt, which hold every package of the project

Exit code 1 where a package has a known vulnerability. Packages that could not be looked up are counted, never passed over in silence.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("requirements.txt", "envs/train-cuda.txt")


def audit(lock: Path) -> list[dict]:
    """pip-audit's entry of each package of a lock. Raises RuntimeError where it did not run to its end."""
    command = [
        sys.executable, "-m", "pip_audit", "-r", str(lock), "--no-deps", "--disable-pip", "--format", "json",
        "--progress-spinner", "off", "--timeout", "5",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    try:
        return json.loads(done.stdout)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise RuntimeError(f"pip-audit: {said[-1]}") from None


def judge(entries: list[dict]) -> tuple[list[str], str]:
    """(a line for each known vulnerability, a line that sums up) of pip-audit's entries."""
    known = [
        f"{entry['name']} {entry['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'no version yet'}"
        for entry in entries
        for found in entry.get("vulns", [])
    ]
    unknown = sum("skip_reason" in entry for entry in entries)
    text = f"{len(entries) - unknown} of {len(entries)} packages looked up, {len(known)} vulnerabilities"
    return known, text + (f"; {unknown} NOT looked up: the advisory service did not answer" if unknown else "")


def main() -> int:
    """Look up every lock; the exit code says whether a vulnerability is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    code = 0
    for lock in LOCKS:
        try:
            known, text = judge(audit(ROOT / lock))
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"{lock}: not looked up: {error}")
            continue
        print(f"{lock}: {text}", *known, sep="\n  ")
        code |= bool(known)
    return code


if __name__ == "__main__":
    sys.exit(main())
