"""The settings as a reader sees them: config/README.md and the JSON schemas for editors, made from the models.

python -m phi3v.settings.docs          # write them
python -m phi3v.settings.docs --check  # exit 1 when a file differs from what would be written
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import BaseModel

from phi3v.settings.command_line import type_text
from phi3v.settings.commands import EvaluateSettings, FinetuneSettings, PredictSettings, ReportSettings, SpeedSettings
from phi3v.settings.entries import Dataset, Geometry, Hardware, Model, Peak, Split, VisionGeometry, Workload
from phi3v.settings.rows import AccuracyRow, SpeedRow
from phi3v.settings.run import Demo, DemoBase, Evaluation, Files, Pool, Run, Selection, SpeedMeasurement
from phi3v.settings.site import Partition, Site

SECTIONS: list[tuple[str, str, list[type[BaseModel]]]] = [
    (
        "A run: config.yaml, demo.yaml, or your own",
        "Start with a copy of `config.yaml`; pass it as `snakemake --configfile my.yaml`. Editors check it against"
        " `workflow/schemas/run.schema.json`.",
        [Run, Files, Pool, Selection, Evaluation, SpeedMeasurement, Demo, DemoBase],
    ),
    (
        "Models and datasets: models.yaml, datasets.yaml",
        "Each entry is `name: {fields}`. Your own entries go into your own file, named in `files` of your run.",
        [Model, Geometry, VisionGeometry, Dataset, Split, Workload],
    ),
    ("Hardware: hardware.yaml", "Facts of one device, each with its source.", [Hardware, Peak]),
    (
        "Rows: accuracy.tsv, speed.tsv",
        "A line is a job; a column left out, or an empty cell, is the default, which is the recipe's constant.",
        [AccuracyRow, SpeedRow],
    ),
    (
        "A cluster: site.yaml",
        "Start with a copy of `site.example.yaml`, or `python scripts/cluster.py site`; `scripts/cluster.py check` looks"
        " whether the cluster agrees.",
        [Site, Partition],
    ),
    (
        "Command lines: scripts/finetune.py, speed.py, evaluate.py, predict.py, report.py",
        "What the workflow types is what a person types; `speed.py` takes all flags of `finetune.py` besides its own.",
        [FinetuneSettings, SpeedSettings, EvaluateSettings, PredictSettings, ReportSettings],
    ),
]
HEADER = """# Configuration

Made from `phi3v.settings` by `make docs`; a test fails when it is out of date. Wrong values are refused before any job
starts, with file, row, field, value and what was expected.
"""


def _table(model: type[BaseModel], shown: set[str]) -> list[str]:
    schema = model.model_json_schema()
    required = set(schema.get("required", ()))
    lines = [f"### {model.__name__}", "", (model.__doc__ or "").strip().replace("\n", " "), ""]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        if name in shown:
            continue
        default = (
            "required" if name in required else f"`{json.dumps(field['default'])}`" if "default" in field else "empty"
        )
        meaning = " ".join(str(field.get("description", "")).split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {type_text(field)} | {default} | {meaning} |")
    return [*lines, ""]


def pages() -> dict[str, str]:
    """Path from the repository's root to content, of every generated file."""
    lines = [HEADER]
    for title, text, models in SECTIONS:
        lines += [f"## {title}", "", text, ""]
        for model in models:
            # A model's table leaves out what the section's earlier model already told.
            earlier = [base for base in models if base is not model and issubclass(model, base)]
            shown = {name for base in earlier for name in base.model_fields}
            lines += _table(model, shown)
    schemas: dict[str, type[BaseModel]] = {
        "run": Run,
        "model": Model,
        "dataset": Dataset,
        "hardware": Hardware,
        "site": Site,
    }
    made = {
        f"workflow/schemas/{name}.schema.json": json.dumps(model.model_json_schema(), indent=1) + "\n"
        for name, model in schemas.items()
    }
    return {"config/README.md": "\n".join(lines), **made}


def main(arguments: list[str]) -> int:
    """Write the files, or with --check say which differ."""
    differ = []
    for path, content in pages().items():
        file = Path(path)
        if file.is_file() and file.read_text(encoding="utf-8") == content:
            continue
        differ.append(path)
        if "--check" not in arguments:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
    for path in differ:
        print(f"{path}: {'differs from the settings; run make docs' if '--check' in arguments else 'written'}")
    return 1 if differ and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
