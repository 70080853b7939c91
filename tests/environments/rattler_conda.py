"""`conda` as far as Snakemake calls it, over rattler, whose solver, linker and activation do the work.

Runs in an environment of its own with py-rattler. CONDA_CHANNEL_ALIAS: where channels are, as conda's `channel_alias`.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from rattler import Channel, ChannelConfig, Platform, VirtualPackage, install, solve
from rattler.shell import ActivationVariables, Shell, activate


def create(file: Path, prefix: Path) -> None:
    """`conda env create`: solve and link what the channels serve; then the environment's own pip installs its part."""
    wanted = yaml.safe_load(file.read_text())
    config = ChannelConfig(os.environ["CONDA_CHANNEL_ALIAS"])
    channels = [Channel(name, config) for name in wanted["channels"] if name != "nodefaults"]
    specs = [part for part in wanted["dependencies"] if isinstance(part, str)]

    async def link() -> None:
        records = await solve(
            channels, specs, platforms=[Platform.current(), "noarch"],
            virtual_packages=[package.into_generic() for package in VirtualPackage.detect()],
        )  # fmt: skip
        await install(records, prefix, cache_dir=Path(os.environ["CONDA_PKGS_DIRS"]), show_progress=False)

    asyncio.run(link())
    pins = [pin for part in wanted["dependencies"] if isinstance(part, dict) for pin in part["pip"]]
    if pins:
        requirements = prefix / "requirements.txt"
        requirements.write_text("\n".join(pins) + "\n")
        subprocess.run([prefix / "bin/python", "-m", "pip", "install", "--quiet", "-r", requirements], check=True)


def main() -> int:
    words = sys.argv[1:]
    if words == ["info", "--json"]:
        print(json.dumps({"conda_prefix": os.environ["CONDA_ROOT"], "platform": str(Platform.current())}))
    elif words == ["--version"]:
        print("conda 24.7.1")
    elif words == ["config", "--get", "channel_priority", "--json"]:
        print(json.dumps({"get": {"channel_priority": "strict"}}))
    elif words == ["clean", "-y", "--tarballs"]:
        for path in Path(os.environ["CONDA_PKGS_DIRS"]).glob("*.conda"):
            path.unlink()
    elif words[:1] == ["activate"]:
        print(activate(Path(words[1]), ActivationVariables(), Shell.bash).script)
    elif words[:2] == ["env", "create"]:
        create(Path(words[words.index("--file") + 1]), Path(words[words.index("--prefix") + 1]))
    else:
        print(
            f"conda over rattler: got {words}; expected info, env create, config --get, clean, activate or --version",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
