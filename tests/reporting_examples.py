"""Small result folders of a run, as the jobs write them: what the report's tests read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw

from phi3v.settings import Job, ResolvedRun, dataset_key, load_run

WORDS = [
    "invoice",
    "total",
    "signed",
    "letter",
    "Chicago",
    "1996",
    "$4,350.00",
    "R.",
    "J.",
    "Reynolds",
    "yes",
    "no",
    "Archery",
    "Basketball",
]


def write(path: Path, value: Any) -> None:
    """A JSON file, NaN allowed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def manifest(folder: Path, kind: str, settings: dict[str, Any], seconds: float, **changes: Any) -> None:
    """A manifest like phi3v.provenance.manifest writes."""
    values = {
        "kind": kind, "settings": settings, "command": f"scripts/{kind}.py --row {settings.get('row', '')} --bf16", "commit": "0" * 40,
        "dirty": None, "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"}, "device": "2 CPU process(es)",
        "seed": 42, "inputs": {"data": {"path": "results/data/x", "of": "dataset.json", "sha256": "ab" * 32}},
        "finished": "2026-01-02T03:04:05+00:00", "seconds": seconds, "user": "someone", "host": "laptop", "slurm_job": None,
    }  # fmt: skip
    write(folder / "manifest.json", {**values, **changes})


def write_pass(
    folder: Path, scores: list[float], metric: str, images: list[list[str]], text: str | None = None
) -> None:
    """predictions.jsonl, metrics.json, timing.json of one pass; wrong answers say `text`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, score in enumerate(scores):
        answer = WORDS[i % len(WORDS)]
        said = answer if score == 1 else answer[:-1] + "?" if score > 0 else text or "I do not know"
        record = {"id": f"val-{i:05d}", "prompt": f"What does document {i} say about the {WORDS[(i * 5) % len(WORDS)]}?\nAnswer briefly.",
                  "images": images[i % len(images)] if images else [], "answers": [answer], "prediction": said, "score": score}  # fmt: skip
        lines.append(json.dumps(record))
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    mean = 100 * sum(scores) / len(scores)
    half = 196 * math.sqrt(max(mean * (100 - mean), 1) / 1e4 / len(scores))
    write(
        folder / "metrics.json",
        {
            "metric": metric,
            "score": round(mean, 4),
            "n": len(scores),
            "interval": [max(0, mean - half), min(100, mean + half)],
            "more": {},
            "left_out": 0,
        },
    )
    write(folder / "timing.json", {"fingerprint": "x", "seconds": 12.5, "examples_per_second": len(scores) / 12.5})


def scores(rng: Random, share: float, n: int, graded: bool) -> list[float]:
    """0-1 scores with about this mean."""
    out = [1.0 if rng.random() < share else 0.0 for _ in range(n)]
    return [0.75 if graded and score == 0 and rng.random() < 0.2 else score for score in out]


def write_data(run: ResolvedRun, data: Path, pictures: int = 6) -> dict[str, list[list[str]]]:
    """dataset.json and a few drawn pictures for every dataset; returns each example's picture paths."""
    found: dict[str, list[list[str]]] = {}
    for name, entry in run.datasets.items():
        folder = data / dataset_key(name, entry)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        each = 2 if name == "nlvr2" else 8 if name == "ucf101" else 1
        found[name] = []
        for i in range(pictures):
            paths = []
            for k in range(each):
                tall = name.startswith("docvqa")
                image = Image.new(
                    "RGB",
                    (380, 500) if tall else (320, 240),
                    "white" if tall else ((i * 47) % 200 + 30, (k * 83) % 200 + 30, 120),
                )
                draw = ImageDraw.Draw(image)
                for line in range(14):
                    draw.text(
                        (20, 16 + line * 32),
                        " ".join(WORDS[(line * 3 + j + i) % len(WORDS)] for j in range(5)),
                        fill="black",
                    )
                path = f"val/{i}-{k}.jpg"
                (folder / "images/val").mkdir(exist_ok=True)
                image.save(folder / "images" / path, quality=80)
                paths.append(path)
            found[name].append(paths)
        splits = {
            s: {"file": f"{s}.jsonl", "examples": 1000 if s == "train" else 100, "images": 1000, "sha256": "cd" * 32}
            for s in ("train", "val")
        }
        write(
            folder / "dataset.json",
            {"name": name, "metric": entry.metric, "num_crops": 4, "splits": splits, "rejected": 3},
        )
    return found


def write_row(
    results: Path,
    job: Job,
    images: list[list[str]],
    metric: str,
    n: int = 100,
    shares=(0.2, 0.85, 0.3),
    steps: int = 60,
) -> None:
    """Everything a finished accuracy row leaves behind."""
    row, rng = job.row, Random(job.row.row)
    graded = metric == "anls"
    settings = {
        "row": row.row,
        "dataset": row.dataset,
        "learning_rate": row.learning_rate,
        "epochs": row.epochs,
        "batch_size": row.batch_size,
    }
    train = results / "train" / row.row
    write(train / "settings.json", settings)
    groups = {
        g: {
            "parameters": 1000 * (i + 1),
            "trainable": 1000 * (i + 1),
            "with_gradient": 1000 * (i + 1),
            "expected": True,
        }
        for i, g in enumerate(("clip", "projector", "decoder", "head"))
    }
    write(train / "census.json", {"label": row.method, "groups": groups})
    four_bit = row.method == "qlora"
    observed = {
        "asked": {"dtype": row.dtype, "attention": "flash" if row.flash_attention else "eager"}, "activation_dtype": row.dtype,
        "attention_decoder": "sdpa flash (CPU)" if row.flash_attention else "eager", "attention_vision": "eager", "linear4bit_layers": 30 if four_bit else 0,
        "linear4bit_bytes": 123456 if four_bit else 0, "zero_stage": 0 if row.method in ("lora", "qlora") else 2, "world_size": 2, "device": "CPU",
        "peak_memory_bytes": 1.4e9, "steps": steps, "examples": steps * 64, "train_seconds": 50.0,
    }  # fmt: skip
    write(train / "observed.json", observed)
    lines = [
        {"step": s, "epoch": s * row.epochs / steps, "loss": 2.5 * math.exp(-3 * s / steps) + 0.1 + 0.1 * rng.random(),
         "learning_rate": row.learning_rate * min(s / 10, 1 - s / steps), "grad_norm": 1.0, "seconds": 0.8, "images_per_second": 75 + 5 * rng.random(), "tokens_per_second": 9000}
        for s in range(1, steps + 1)
    ]  # fmt: skip
    (train / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest(train, "train", settings, 50 + 20 * rng.random())
    base = results / "evaluate" / "base" / job.baseline
    if not (base / "manifest.json").exists():
        write_pass(base / "before", scores(rng, shares[0], n, graded), metric, images)
        manifest(base, "evaluate", {"dataset": row.dataset, "row": ""}, 10)
    folder = results / "evaluate" / row.row
    write_pass(folder / "after", scores(rng, shares[1], n, graded), metric, images)
    write_pass(folder / "control", scores(rng, shares[2], n, graded), metric, images)
    manifest(folder, "evaluate", {"row": row.row, "dataset": row.dataset}, 20)


def write_speed(results: Path, job: Job, rate: float = 5.0) -> None:
    """Everything a finished speed row leaves behind."""
    row = job.row
    observed = {
        "activation_dtype": row.dtype,
        "attention_decoder": "sdpa flash (CPU)" if row.flash_attention else "eager",
        "attention_vision": "eager",
    }
    speed = {
        "row": row.row, "images_per_second": rate, "tokens_per_second": rate * 300, "step_seconds": 64 / rate, "spread": 0.05,
        "repeats": [{"images_per_second": rate * share} for share in (0.98, 1, 1.03)],
        "peak_memory_bytes": 1.1e9, "warmup_steps": 2, "timed_steps": 3, "world_size": 2, "nodes": 1, "device": "CPU", "stand_in": True, "observed": observed,
        "fingerprint": {"devices": {"CPU": 2}, "driver": None, "backend": "gloo", "versions": {"torch": "2.13.0"}},
    }  # fmt: skip
    write(results / "speed" / row.row / "speed.json", speed)
    manifest(results / "speed" / row.row, "speed", {"row": row.row, "dataset": row.dataset}, 33)


def write_run(
    root: Path, folder: Path, config: str | dict[str, Any] = "config/demo.yaml", n: int = 100
) -> tuple[ResolvedRun, Path]:
    """All rows of a run, finished; returns the run and results/NAME."""
    run = load_run(config if isinstance(config, dict) else root / config, root)
    results = folder / "results" / run.settings.name
    images = write_data(run, folder / "results" / "data")
    for number, job in enumerate(run.accuracy):
        metric = run.datasets[job.row.dataset].metric
        write_row(results, job, images[job.row.dataset], metric, n, (0.2, 0.7 + 0.02 * (number % 10), 0.3))
    for number, job in enumerate(run.speed):
        write_speed(results, job, 5 + number)
    return run, results
