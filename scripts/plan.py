#!/usr/bin/env python3
"""Predict the memory, time and cost of a run before it starts, or recommend a method for your GPUs. Needs no torch, no
GPU.

python scripts/plan.py                                                    # the published run
python scripts/plan.py --config config/demo.yaml --output_dir results/demo/plan
python scripts/plan.py --row phi35-nlvr2-full-bf16                        # everything about one row
python scripts/plan.py --gpu V100-32GB --count 8 --dataset hateful_memes  # recommend a method for 8 V100
python scripts/plan.py --gpu A100-80GB --count 8 --nodes 4                # and for four machines with 8 A100 each
"""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path

from phi3v.planning.advice import Advice, advise
from phi3v.planning.geometry import model_geometry
from phi3v.planning.plan import plan_run
from phi3v.planning.resources import check_disk
from phi3v.settings import Dataset, Hardware, Model, check_choice, load_run, read_entries, run_script

# Flags that are only valid with --gpu.
ADVICE = ("count", "nodes", "dataset", "model", "hardware", "datasets")


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and prints the plan or the advice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", help="folder for plan.json, plan.txt and plan.html (with --gpu: advice.json and advice.txt)"
    )
    run = parser.add_argument_group("plan a run")
    run.add_argument("--config", help="run configuration to plan (default: config/config.yaml)")
    run.add_argument("--row", help="print one row of the run in detail: parameters, memory, time, cluster jobs")
    run.add_argument(
        "--check_disk", metavar="FOLDER", help="fail if FOLDER has less free space than the run will write"
    )
    gpus = parser.add_argument_group("recommend a method for some GPUs")
    gpus.add_argument("--gpu", help="device, such as A100-80GB (entries of config/hardware.yaml)")
    gpus.add_argument("--count", type=int, help="devices per machine (default: 1)")
    gpus.add_argument("--nodes", type=int, help="number of machines (default: 1)")
    gpus.add_argument("--dataset", help="entry of the datasets files (default: docvqa)")
    gpus.add_argument("--model", help="entry of config/models.yaml (default: phi35-vision)")
    gpus.add_argument("--hardware", action="append", help="additional hardware file with your own entries")
    gpus.add_argument("--datasets", action="append", help="additional datasets file with your own entries")
    given = parser.parse_args(arguments)
    _check(parser, given)
    if given.gpu is not None:
        advice = _advice(given)
        if given.output_dir:
            values = json.dumps(advice.values(), indent=1) + "\n"
            _write(Path(given.output_dir), {"advice.json": values, "advice.txt": advice.text() + "\n"})
        print(advice.text())
    else:
        plan = plan_run(load_run(given.config or "config/config.yaml"))
        text = plan.table() if given.row is None else plan.detail(given.row)
        if given.output_dir:
            values = json.dumps(plan.values(), indent=1) + "\n"
            files = {"plan.json": values, "plan.txt": plan.table() + "\n", "plan.html": plan.page()}
            _write(Path(given.output_dir), files)
        print(text)
        if given.check_disk is not None:
            check_disk(plan.disk_missing, Path(given.check_disk))
    return 0


def _check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Exits with the parser's error if a flag would have no effect."""
    advice = given.gpu is not None
    accepted = {"gpu", *ADVICE} if advice else {"config", "row", "check_disk"}
    unused = [
        flag for flag, value in vars(given).items() if value is not None and flag not in {*accepted, "output_dir"}
    ]
    if unused:
        flags = ", ".join(f"--{flag}" for flag in unused)
        parser.error(f"{flags}: no effect {'with' if advice else 'without'} --gpu; remove the flag")
    for flag in ("count", "nodes"):
        value = getattr(given, flag)
        if value is not None and value < 1:
            parser.error(f"--{flag} {value}: expected >= 1")


def _write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")


def _advice(given: argparse.Namespace) -> Advice:
    root = Path()
    dataset, model = given.dataset or "docvqa", given.model or "phi35-vision"
    entries = read_entries(["config/hardware.yaml", *(given.hardware or [])], Hardware, root)
    models = read_entries(["config/models.yaml"], Model, root)
    datasets = read_entries(["config/datasets.yaml", *(given.datasets or [])], Dataset, root)
    check_choice("command line", "dataset", dataset, datasets)
    check_choice("command line", "model", model, models)
    geometry = model_geometry(model, models[model], root)
    return advise(given.gpu, given.count or 1, dataset, entries, geometry, datasets[dataset], given.nodes or 1, root)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` is no error
    run_script(main)
