"""Evaluation in batches against vLLM's server on a CPU: generated tokens a second, the same checkpoint, questions and type.

    make clients
    PHI3V_PUBLISHER_CODE=FOLDER python benchmarks/bench_clients.py --clients .clients --dtype bf16

Drawn pages of two tiles, answers of ten tokens. The checkpoint is that of tests/clients, with `--tower_layers` of the
published tower's 23. Both answer one part of the questions after the other, in turns, the first to begin changing with
each part. Prints JSON: seconds, processor seconds of all processes of a side, and load of the machine for each part.
Left out are the server's start, and the reading of the checkpoint here.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
NEW_TOKENS = 10
CONCURRENT = 64
"""Requests that are open at once; the server fills its batches from them."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def build_pair(root: Path, code: Path, tower_layers: int) -> tuple[Path, Path]:
    """The checkpoint, and a folder for vLLM: it builds the published tower up to `layer_idx`, this package one layer more."""
    from clients.checkpoint import build, with_code
    from golden.helpers import official_files

    tower = {"num_hidden_layers": tower_layers + 1}
    ours = build(root / "model", official_files(), num_crops=1, vision_config=tower)
    theirs = with_code(ours, root / "served", code)
    config = json.loads((ours / "config.json").read_text())
    config.pop("vision_config", None)
    config["img_processor"]["layer_idx"] = tower_layers - 1
    (theirs / "config.json").unlink()
    (theirs / "config.json").write_text(json.dumps(config))
    return ours, theirs


def write_parts(folder: Path, examples: int, parts: int) -> list[str]:
    """Pages and questions in `folder`; returns the names of the splits."""
    from bench_evaluation import write_pages

    lines = (write_pages(folder, examples) / "val.jsonl").read_text().splitlines(keepends=True)
    for part in range(parts):
        (folder / f"part{part}.jsonl").write_text("".join(lines[part::parts]))
    return [f"part{part}" for part in range(parts)]


def processor_seconds(pid: int) -> float:
    """User and system time of a process and those it started."""
    import psutil

    root = psutil.Process(pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(spent.user + spent.system for spent in times)


def here(model: Path, data: Path, output: Path, dtype: str, batch: int) -> Callable[[str], dict[str, Any]]:
    """A function that answers a split with this package."""
    import torch

    from phi3v.evaluation.generate import Predictor
    from phi3v.evaluation.run import evaluate
    from phi3v.settings import EvaluateSettings

    def settings(split: str) -> EvaluateSettings:
        return EvaluateSettings(
            model_name_or_path=str(model), data_dir=str(data), output_dir=str(output / split), split=split, num_crops=1,
            metrics=["anls"], batch_size_per_gpu=batch, max_new_tokens=NEW_TOKENS, use_flash_attention=True, tqdm=False,
            **{dtype: True},
        )  # fmt: skip

    started = time.process_time()
    Predictor.load(model, settings("load"), torch.device("cpu"), NEW_TOKENS)
    loading = time.process_time() - started

    def answer(split: str) -> dict[str, Any]:
        before = time.process_time()
        with contextlib.redirect_stdout(sys.stderr):
            evaluate(settings(split))
        spent = time.process_time() - before - loading
        folder = output / split / "after"
        timing = json.loads((folder / "timing.json").read_text())
        records = map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())
        answers = {record["id"]: record["prediction"] for record in records}
        return {
            "seconds": timing["seconds"], "processor_seconds": spent, "tokens": timing["generated_tokens"], "answers": answers,
        }  # fmt: skip

    return answer


def served(model: Path, data: Path, url: str, pid: int) -> Callable[[str], dict[str, Any]]:
    """A function that lets the server answer a split."""
    from clients.server import ask

    from phi3v.evaluation.questions import read_questions
    from phi3v.model.processing import load_tokenizer

    tokenizer = load_tokenizer(model)

    def answer(split: str) -> dict[str, Any]:
        cases = [
            {"name": one.id, "content": one.user, "images": [data / "images" / name for name in one.images]}
            for one in read_questions(data, split)
        ]
        before, started = processor_seconds(pid), time.perf_counter()
        with ThreadPoolExecutor(CONCURRENT) as pool:
            found = list(pool.map(lambda case: ask(url, case, NEW_TOKENS)["ids"], cases))
        seconds, spent = time.perf_counter() - started, processor_seconds(pid) - before
        texts = tokenizer.batch_decode(found, skip_special_tokens=True)
        answers = {case["name"]: text for case, text in zip(cases, texts, strict=True)}
        return {
            "seconds": seconds, "processor_seconds": spent, "tokens": sum(map(len, found)), "answers": answers,
        }  # fmt: skip

    return answer


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of all parts: tokens a second and processor seconds per answer of both, their ratios, and equal answers."""
    answers = {name: {key: text for run in own for key, text in run["answers"].items()} for name, own in runs.items()}
    total = {
        name: {key: sum(run[key] for run in own) for key in ("seconds", "processor_seconds", "tokens")}
        for name, own in runs.items()
    }
    rate = {name: own["tokens"] / own["seconds"] for name, own in total.items()}
    spent = {name: own["processor_seconds"] / len(answers[name]) for name, own in total.items()}
    of_parts = [
        ours["tokens"] / ours["seconds"] / (theirs["tokens"] / theirs["seconds"])
        for ours, theirs in zip(runs["here"], runs["vllm"], strict=True)
    ]
    return {
        "tokens_per_second": rate,
        "ratio": rate["here"] / rate["vllm"],
        "median_ratio_of_parts": statistics.median(of_parts),
        "processor_seconds_per_answer": spent,
        "processor_ratio": spent["vllm"] / spent["here"],
        "answers": len(answers["here"]),
        "equal_answers": sum(text == answers["vllm"][key] for key, text in answers["here"].items()),
    }


def main() -> None:
    """Parse the command line, measure in turns and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=Path, default=Path(".clients"), help="folder of `make clients`")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="of this package; the server chooses its own")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile, which starts in a minute")
    parser.add_argument("--tower_layers", type=int, default=23)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)

    from clients.server import serve

    runs: dict[str, list[dict[str, Any]]] = {"here": [], "vllm": []}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model, linked = build_pair(root, Path(os.environ["PHI3V_PUBLISHER_CODE"]), given.tower_layers)
        parts = write_parts(root / "data", given.examples, given.parts)
        write_parts(root / "warm", 4, 1)
        options = ["--dtype", DTYPES[given.dtype], "--skip-mm-profiling", *(["--enforce-eager"] if given.eager else [])]
        vllm = given.clients.resolve() / "vllm"
        with serve(vllm, linked, root / "log", *options, threads=given.threads) as (url, pid):
            here(model, root / "warm", root / "warm-out", given.dtype, given.batch)("part0")
            served(model, root / "warm", url, pid)("part0")
            answer = {
                "here": here(model, root / "data", root / "out", given.dtype, given.batch),
                "vllm": served(model, root / "data", url, pid),
            }
            for number, part in enumerate(parts):
                for name in ("here", "vllm") if number % 2 == 0 else ("vllm", "here"):
                    load = os.getloadavg()[0]
                    runs[name].append({"load": load, **answer[name](part)})
                print(json.dumps(summary(runs)), file=sys.stderr, flush=True)
    found = summary(runs)
    parts_of = {
        name: [{key: value for key, value in run.items() if key != "answers"} for run in own]
        for name, own in runs.items()
    }
    print(json.dumps({**vars(given), "clients": str(given.clients), "parts": parts_of, **found}, indent=1))


if __name__ == "__main__":
    main()
