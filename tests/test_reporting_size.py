"""A large run: 200 rows and 1,000,000 predictions in at most 60 s, 1.5 GiB, and a page of at most 15 MB."""

import csv
import json
import resource
import subprocess
import sys
import time

import pytest
import yaml
from reporting_examples import write_data, write_row

from phi3v.settings import load_run

HEADER = [
    "row",
    "model",
    "dataset",
    "method",
    "dtype",
    "flash_attention",
    "learning_rate",
    "epochs",
    "published",
    "origin",
    "source",
]


@pytest.mark.verify
def test_200_rows_and_a_million_predictions(root, tmp_path):
    with (tmp_path / "many.tsv").open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(HEADER)
        for i in range(200):
            table.writerow(
                [
                    f"row-{i:03d}",
                    "phi35-vision",
                    "nlvr2" if i % 2 else "docvqa",
                    "full",
                    "bf16",
                    "yes",
                    "1e-5",
                    "3",
                    "89.4",
                    "published",
                    "a test",
                ]
            )
    config = load_run(root / "config/demo.yaml", root).settings.model_dump(mode="json", exclude={"demo", "overrides"})
    config["files"] = {**config["files"], "accuracy": [str(tmp_path / "many.tsv")], "speed": []}
    config["rows"] = {"accuracy": ["*"], "speed": []}
    path = tmp_path / "many.yaml"
    path.write_text(yaml.safe_dump(config))
    run = load_run(path, root)
    results = tmp_path / "results" / run.settings.name
    images = write_data(run, tmp_path / "results" / "data", pictures=40)
    # One row of each dataset is written out, the others get the same files under their own names.
    for job in run.accuracy[:2]:
        write_row(results, job, images[job.row.dataset], run.datasets[job.row.dataset].metric, n=2500, steps=2000)
    for i, job in enumerate(run.accuracy[2:]):
        first = run.accuracy[i % 2].row.row
        for kind in ("train", "evaluate"):
            for source in (results / kind / first).rglob("*"):
                if source.is_file():
                    target = results / kind / job.row.row / source.relative_to(results / kind / first)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if source.suffix == ".jsonl":
                        target.hardlink_to(source)
                    else:
                        target.write_text(source.read_text().replace(f'"{first}"', f'"{job.row.row}"'))
    started = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(root / "scripts/report.py"), "--config", str(path), "--results", str(results)]
    subprocess.run(command, check=True, cwd=root, env={"PYTHONPATH": str(root / "src"), "PATH": "/usr/bin:/bin"})
    wall = time.monotonic() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    size = (results / "report/index.html").stat().st_size
    print(f"{wall:.1f} s wall, {cpu:.1f} s CPU, {used.ru_maxrss / 2**20:.2f} GiB, page {size / 1e6:.1f} MB")
    done = json.loads((results / "report/report.json").read_text())["accuracy"]
    assert [row["status"] for row in done] == ["done"] * 200
    assert cpu <= 60 and used.ru_maxrss <= 1.5 * 2**20 and size <= 15e6
