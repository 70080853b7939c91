#!/usr/bin/env python3
"""Write the generated reference pages of docs/ and the JSON schemas for editors (`make docs`).

python scripts/settings_docs.py          # write them
python scripts/settings_docs.py --check  # exit 1 if a file differs from what would be written
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path

from pydantic import BaseModel

from phi3v.cluster.site import Partition, Site
from phi3v.settings import Hardware, entries, read_entries, rows, run
from phi3v.settings.command_line import type_text

ROOT = Path(__file__).resolve().parent.parent
SECTIONS: list[tuple[str, str, list[type[BaseModel]]]] = [
    (
        "A run: config.yaml, demo.yaml, or your own",
        "Start with a copy of `config.yaml`; pass it as `snakemake --configfile my.yaml`. Editors check it against"
        " `workflow/schemas/run.schema.json`.",
        [
            run.Run, run.Files, run.Pool, run.Selection, run.Evaluation, run.Prediction, run.SpeedMeasurement, run.Demo,
            run.DemoBase,
        ],
    ),
    (
        "Models and datasets: models.yaml, datasets.yaml",
        "Each entry is `name: {fields}`. Your own entries go into your own file, named in `files` of your run.",
        [
            entries.Model, entries.Geometry, entries.VisionGeometry, entries.Dataset, entries.Split, entries.Options, entries.Division,
            entries.Workload,
        ],
    ),
    (
        "Hardware: hardware.yaml",
        "Facts of one device, each with its source. [The devices](hardware.md) that the file holds.",
        [entries.Hardware, entries.Peak],
    ),
    (
        "Rows: accuracy.tsv, speed.tsv",
        "Each line is a job. A missing column or an empty cell means the default, which is the recipe's constant. A cell "
        "with"
        " `|` is a grid: `1e-5|4e-5` under learning_rate makes the rows `ROW@learning_rate=1e-5` and"
        " `ROW@learning_rate=4e-5`, and several such cells make every combination ([how to](../how-to/grid.md)). The "
        "field"
        " `finetune`, only in `overrides`, takes further flags of [finetune.py](commands.md#finetunepy), without the "
        "dashes.",
        [rows.AccuracyRow, rows.SpeedRow],
    ),
    (
        "A cluster: site.yaml",
        "Start with a copy of `site.example.yaml`, or `python scripts/cluster.py site`; `scripts/cluster.py check`"
        " compares it with the cluster.",
        [Site, Partition],
    ),
]  # fmt: skip
SCHEMAS: dict[str, type[BaseModel]] = {
    "run": run.Run,
    "model": entries.Model,
    "dataset": entries.Dataset,
    "hardware": entries.Hardware,
    "site": Site,
}
CONFIGURATION = """# Configuration

`make docs` writes this page from `phi3v.settings`. Wrong values are refused before any job starts, with file, row,
field, value and what was expected. Flags of the scripts: [command lines](commands.md).
"""
COMMANDS = """# Command lines

`make docs` writes this page from the scripts' `--help`. The workflow runs the same commands; `snakemake -n -p` prints
them. Run them in the repository's root, in the environment of `make venv`.
"""
HARDWARE = """# Hardware

`make docs` writes this page from `config/hardware.yaml`. Add your own device to a file of your own
([fields](configuration.md#hardware)).

Figures are per device. An empty cell means that it cannot do this, or that no source gives the figure.

- **bf16, fp16, fp32**: TFLOP/s of dense matrix products with sums in float32. A datasheet's figure with sparsity is
  twice as high.
- **memory, link, network**: GB/s. Link joins the devices of a machine, in one direction. Network is that of all ports of
  a machine together, in one direction.
- **flash**: has a flash attention kernel. **4-bit**: runs QLoRA.
"""
YES = {True: "yes", False: "no"}


def table(model: type[BaseModel], listed: set[str]) -> str:
    """A model's fields in Markdown, those in `listed` left out. Raises ValueError for a field without a description."""
    schema = model.model_json_schema()
    required = set(schema.get("required", ()))
    lines = [f"### {model.__name__}", "", (model.__doc__ or "").strip().replace("\n", " "), ""]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        default = f"`{json.dumps(field['default'])}`" if "default" in field else "empty"
        meaning = " ".join((model.model_fields[name].description or "").split()).replace("|", "\\|")
        if not meaning:
            raise ValueError(f"{model.__module__}.{model.__name__}: field `{name}`: expected a docstring below it")
        if name not in listed:
            lines.append(
                f"| `{name}` | {type_text(field)} | {'required' if name in required else default} | {meaning} |"
            )
    return "\n".join([*lines, ""])


def configuration() -> str:
    """The page of all fields."""
    parts = [CONFIGURATION]
    for title, text, models in SECTIONS:
        parts += [f"## {title}", "", text, ""]
        for model in models:
            earlier = [base for base in models if base is not model and issubclass(model, base)]
            parts.append(table(model, {name for base in earlier for name in base.model_fields}))
    return "\n".join(parts)


def help_text(script: Path) -> str:
    """What `script --help` prints, 100 columns wide. Raises ValueError if it prints nothing."""
    printed, arguments = io.StringIO(), sys.argv
    os.environ["COLUMNS"] = "100"
    sys.argv = [str(script), "--help"]
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = arguments
    if not printed.getvalue().strip():
        raise ValueError(f"{script}: --help printed nothing")
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


def commands() -> str:
    """The page of all scripts."""
    scripts = sorted((ROOT / "scripts").glob("*.py"))
    texts = {script.name: help_text(script) for script in scripts if script != Path(__file__).resolve()}
    lines = [COMMANDS, "| script | purpose |", "|---|---|"]
    for name, text in texts.items():
        purpose = text.split("\n\n")[1].replace("\n", " ")
        lines.append(f"| [{name}](#{name.replace('.', '')}) | {purpose} |")
    for name, text in texts.items():
        lines += ["", f"## {name}", "", "```text", text, "```"]
    return "\n".join([*lines, ""])


def hardware() -> str:
    """The page of all devices."""
    columns = [
        "entry", "GB", "bf16", "fp16", "fp32", "memory", "link", "network", "W", "flash", "4-bit"
    ]  # fmt: skip
    devices = read_entries([str(ROOT / "config/hardware.yaml")], Hardware, ROOT)
    lines = [HARDWARE, f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name, device in devices.items():
        peak = device.peak_tflops
        figures = [
            device.memory_gb, peak.bf16, peak.fp16, peak.fp32, device.bandwidth_gb_s, device.link_gb_s, device.network_gb_s, device.power_w
        ]  # fmt: skip
        cells = [f"`{name}`", *("" if figure is None else f"{figure:g}" for figure in figures)]
        cells += [YES[device.flash_attention], YES[device.quantisation]]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Sources", "", "| entry | device | source |", "|---|---|---|"]
    lines += [f"| `{name}` | {device.title} | {device.source} |" for name, device in devices.items()]
    return "\n".join([*lines, ""])


def pages() -> dict[str, str]:
    """Path from the repository's root to content, of every generated file."""
    schemas = {
        f"workflow/schemas/{name}.schema.json": json.dumps(model.model_json_schema(), indent=1) + "\n"
        for name, model in SCHEMAS.items()
    }
    reference = {"configuration": configuration(), "commands": commands(), "hardware": hardware()}
    return {f"docs/reference/{name}.md": text for name, text in reference.items()} | schemas


def main() -> int:
    """Write the files, or with --check name those that differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs")
    checks = parser.parse_args().check
    contents = {ROOT / path: content for path, content in pages().items()}
    differ = [file for file, content in contents.items() if not file.is_file() or file.read_text("utf-8") != content]
    for file in differ:
        print(f"{file}: {'differs from the settings; run make docs' if checks else 'written'}")
        if not checks:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(contents[file], encoding="utf-8")
    return 1 if differ and checks else 0


if __name__ == "__main__":
    sys.exit(main())
