#!/usr/bin/env python3
"""Write config/README.md and the JSON schemas for editors from the settings (`make docs`).

python scripts/settings_docs.py          # write them
python scripts/settings_docs.py --check  # exit 1 when a file differs from what would be written
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import BaseModel

from phi3v.cluster.site import Partition, Site
from phi3v.settings import commands, entries, rows, run
from phi3v.settings.command_line import type_text

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
    ("Hardware: hardware.yaml", "Facts of one device, each with its source.", [entries.Hardware, entries.Peak]),
    (
        "Rows: accuracy.tsv, speed.tsv",
        "A line is a job; a column left out, or an empty cell, is the default, which is the recipe's constant. A cell with"
        " `|` is a grid: `1e-5|4e-5` under learning_rate makes the rows `ROW@learning_rate=1e-5` and"
        " `ROW@learning_rate=4e-5`, and several such cells make every combination (docs/how-to/grid.md).",
        [rows.AccuracyRow, rows.SpeedRow],
    ),
    (
        "A cluster: site.yaml",
        "Start with a copy of `site.example.yaml`, or `python scripts/cluster.py site`; `scripts/cluster.py check`"
        " compares it with the cluster.",
        [Site, Partition],
    ),
    (
        "Command lines: scripts/finetune.py, speed.py, evaluate.py, score.py, predict.py, report.py",
        "The workflow runs these commands, and you can type them yourself; `speed.py` takes all flags of `finetune.py` besides its own.",
        [
            commands.FinetuneSettings, commands.SpeedSettings, commands.EvaluateSettings, commands.ScoreSettings,
            commands.PredictSettings, commands.ReportSettings, commands.ServeSettings,
        ],
    ),
]  # fmt: skip
SCHEMAS: dict[str, type[BaseModel]] = {
    "run": run.Run,
    "model": entries.Model,
    "dataset": entries.Dataset,
    "hardware": entries.Hardware,
    "site": Site,
}
HEADER = """# Configuration

Made from `phi3v.settings` by `make docs`; a test fails when it is out of date. Wrong values are refused before any job
starts, with file, row, field, value and what was expected.
"""


def table(model: type[BaseModel], listed: set[str]) -> str:
    """A model's fields in Markdown, those in `listed` left out."""
    schema = model.model_json_schema()
    required = set(schema.get("required", ()))
    lines = [f"### {model.__name__}", "", (model.__doc__ or "").strip().replace("\n", " "), ""]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        default = f"`{json.dumps(field['default'])}`" if "default" in field else "empty"
        meaning = " ".join(str(field.get("description", "")).split()).replace("|", "\\|")
        if name not in listed:
            lines.append(
                f"| `{name}` | {type_text(field)} | {'required' if name in required else default} | {meaning} |"
            )
    return "\n".join([*lines, ""])


def pages() -> dict[str, str]:
    """Path from the repository's root to content, of every generated file."""
    parts = [HEADER]
    for title, text, models in SECTIONS:
        parts += [f"## {title}", "", text, ""]
        for model in models:
            earlier = [base for base in models if base is not model and issubclass(model, base)]
            parts.append(table(model, {name for base in earlier for name in base.model_fields}))
    schemas = {
        f"workflow/schemas/{name}.schema.json": json.dumps(model.model_json_schema(), indent=1) + "\n"
        for name, model in SCHEMAS.items()
    }
    return {"config/README.md": "\n".join(parts), **schemas}


def main() -> int:
    """Write the files, or with --check say which differ."""
    checks, root = "--check" in sys.argv[1:], Path(__file__).resolve().parent.parent
    contents = {root / path: content for path, content in pages().items()}
    differ = [file for file, content in contents.items() if not file.is_file() or file.read_text("utf-8") != content]
    for file in differ:
        print(f"{file}: {'differs from the settings; run make docs' if checks else 'written'}")
        if not checks:
            file.write_text(contents[file], encoding="utf-8")
    return 1 if differ and checks else 0


if __name__ == "__main__":
    sys.exit(main())
