#!/usr/bin/env python
"""Write an environment's software bill of materials: every locked package and its hashes, as CycloneDX 1.6 JSON.

    python scripts/sbom.py train-cuda containers/train.cdx.json

`make containers` writes one for each image. The lock does not list Debian's packages, which come from the base image.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import uuid
from pathlib import Path

from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from pip_requirements_parser import RequirementsFile

from phi3v import __version__

ROOT = Path(__file__).resolve().parent.parent


def component(name: str, version: str, hashes: list[str]) -> Component:
    """A locked package. hashes: `sha256:…`. A version has many files, so each hash becomes a separate distribution
    reference."""
    purl = PackageURL("pypi", None, name, version)
    files = [
        ExternalReference(
            type=ExternalReferenceType.DISTRIBUTION,
            url=XsUri(f"{purl}#{number}"),
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest.removeprefix("sha256:"))],
        )
        for number, digest in enumerate(hashes, 1)
    ]
    return Component(name=name, version=version, purl=purl, bom_ref=str(purl), external_references=files)


def bill(environment: str) -> str:
    """The bill of envs/ENVIRONMENT.txt. The serial number depends on the lock, so equal locks differ only in their
    time."""
    lock = ROOT / f"envs/{environment}.txt"
    name = f"phi3v-{environment}"
    root = Component(type=ComponentType.APPLICATION, name=name, version=__version__, bom_ref=name)
    pins = RequirementsFile.from_file(str(lock)).requirements
    bom = Bom(
        components=[component(pin.name, pin.get_pinned_version, pin.hash_options) for pin in pins],
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, hashlib.sha256(lock.read_bytes()).hexdigest()),
        metadata=BomMetaData(component=root),
    )
    bom.register_dependency(root, bom.components)
    return JsonV1Dot6(bom).output_as_string(indent=1)


def main() -> int:
    """Parses the command line and writes the bill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "environment",
        choices=sorted(path.stem for path in (ROOT / "envs").glob("*.txt")),
        help="lock, envs/ENVIRONMENT.txt",
    )
    parser.add_argument("output", type=Path, help="JSON file to write")
    given = parser.parse_args()
    given.output.write_text(bill(given.environment) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
