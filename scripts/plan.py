#!/usr/bin/env python3
"""What a run costs before it starts, or what one can do with the GPUs one has. Needs no torch and no GPU.

python scripts/plan.py                                                    # the published run
python scripts/plan.py --config config/demo.yaml --output_dir results/demo/plan
python scripts/plan.py --row phi35-nlvr2-full-bf16                        # everything about one row
python scripts/plan.py --gpu V100-32GB --count 8 --dataset hateful_memes  # what to run on 8 V100
python scripts/plan.py --published                                        # predictions beside the published tables
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from phi3v.planning.advice import advise
from phi3v.planning.calibration import compare, constants_table, plot, published_rows, table
from phi3v.planning.disk import check_disk
from phi3v.planning.geometry import model_geometry
from phi3v.planning.page import plan_html
from phi3v.planning.plan import plan_run
from phi3v.planning.setup import Constants
from phi3v.settings import Dataset, Hardware, Model, SettingsError, load_run, read_entries


def main(arguments: list[str] | None = None) -> int:
    """Parse, plan, print; exit 2 with the reason where a setting is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config/config.yaml", help="run configuration to plan")
    parser.add_argument("--row", help="show one row of the run part by part: parameters, memory, time, cluster jobs")
    parser.add_argument("--output_dir", help="also write plan.json, plan.txt and plan.html there")
    parser.add_argument(
        "--check_disk", metavar="FOLDER", help="fail where FOLDER has less free than the run still writes"
    )
    parser.add_argument("--gpu", help="device to advise on, instead of planning a run")
    parser.add_argument("--count", type=int, default=1, help="devices of one machine")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--dataset", default="docvqa", help="entry of the datasets files")
    parser.add_argument("--model", default="phi35-vision", help="entry of config/models.yaml")
    parser.add_argument("--hardware", action="append", default=[], help="further hardware file with your own entries")
    parser.add_argument("--datasets", action="append", default=[], help="further datasets file with your own entries")
    parser.add_argument("--published", action="store_true", help="predictions beside the published tables")
    given = parser.parse_args(arguments)
    if given.count < 1 or given.nodes < 1:
        parser.error(f"--count {given.count} --nodes {given.nodes}: expected both >= 1")
    try:
        if given.published:
            rows = published_rows()
            compared = compare(rows, Constants())
            text = f"{constants_table(rows)}\n\n{table(compared)}\n"
            if given.output_dir:
                _write(Path(given.output_dir), {"planner.txt": text, "planner.svg": plot(compared)})
            print(text, end="")
        elif given.gpu:
            print(_advice(given))
        else:
            plan = plan_run(load_run(given.config))
            shown = plan.detail(given.row) if given.row else plan.table()
            if given.output_dir:
                values = json.dumps(plan.as_dict(), indent=1) + "\n"
                files = {"plan.json": values, "plan.txt": plan.table() + "\n", "plan.html": plan_html(plan.as_dict())}
                _write(Path(given.output_dir), files)
            print(shown)
            if given.check_disk:
                check_disk(plan.disk_missing, Path(given.check_disk))
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")


def _advice(given: argparse.Namespace) -> str:
    root = Path()
    entries = read_entries(["config/hardware.yaml", *given.hardware], Hardware, root)
    models = read_entries(["config/models.yaml"], Model, root)
    datasets = read_entries(["config/datasets.yaml", *given.datasets], Dataset, root)
    for what, name, known in (("dataset", given.dataset, datasets), ("model", given.model, models)):
        if name not in known:
            raise SettingsError(
                f"command line: field `{what}`: got {name!r}: expected one of {', '.join(sorted(known))}"
            )
    geometry = model_geometry(given.model, models[given.model], root)
    return advise(
        given.gpu, given.count, given.dataset, entries, geometry, datasets[given.dataset], given.nodes, root
    ).text()


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` is no error
    sys.exit(main())
