#!/usr/bin/env python
"""Write an environment's software bill of materials: every locked package, with its hashes, as CycloneDX 1.6 JSON.

    python scripts/sbom.py train-cuda containers/train.cdx.json

`make containers` writes one beside each image. Debian's packages in an image come from its base and are not in the lock.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import uuid
from pathlib import Path
from typing import Any

from phi3v import __version__
from phi3v.provenance.manifest import digest_file, write_atomically

ROOT = Path(__file__).resolve().parent.parent


def components(lock: str) -> list[dict[str, Any]]:
    """CycloneDX components of a lock file's text."""
    found = []
    for line in lock.replace(" \\\n", " ").splitlines():
        pin = re.match(r"([A-Za-z0-9._-]+)==(\S+)", line)
        if pin is None:
            continue
        # Package URL, https://github.com/package-url/purl-spec: the type pypi has names in lower case with dashes.
        purl = f"pkg:pypi/{re.sub(r'[._-]+', '-', pin[1]).lower()}@{pin[2]}"
        component: dict[str, Any] = {
            "type": "library",
            "bom-ref": purl,
            "name": pin[1],
            "version": pin[2],
            "purl": purl,
        }
        hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})", line)
        if hashes:
            # One version has many files; CycloneDX's `hashes` is of one, so each file is a reference of its own.
            component["externalReferences"] = [
                {"type": "distribution", "url": f"{purl}#{number}", "hashes": [{"alg": "SHA-256", "content": digest}]}
                for number, digest in enumerate(hashes, 1)
            ]
        found.append(component)
    return found


def bill(environment: str) -> dict[str, Any]:
    """The bill of envs/ENVIRONMENT.txt. Its serial number follows from the lock, so that equal locks have equal bills."""
    lock = ROOT / f"envs/{environment}.txt"
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, digest_file(lock))}",
        "version": 1,
        "metadata": {"component": {"type": "application", "name": f"phi3v-{environment}", "version": __version__}},
        "components": components(lock.read_text()),
    }


def main() -> int:
    """Parse the command line and write the bill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", choices=sorted(path.stem for path in (ROOT / "envs").glob("*.txt")))
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    values = bill(given.environment)
    write_atomically(given.output, json.dumps(values, indent=1) + "\n")
    print(f"{given.output}: {len(values['components'])} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
