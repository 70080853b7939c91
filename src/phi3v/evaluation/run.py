"""Evaluate a checkpoint or adapter on a split: the passes `before`, `after` and `control`, over one or many processes.

Each example is answered once, by one process. Batches are the same whatever the number of processes, so the predictions are too. What
is done is kept: a run that was killed goes on where it stopped (phi3v.evaluation.predictions).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phi3v.data.conversations import DataError
from phi3v.data.folder import describe, split_file
from phi3v.data.images import open_rgb
from phi3v.data.processes import loader_workers
from phi3v.evaluation import examples, predictions
from phi3v.evaluation.examples import Question
from phi3v.evaluation.generate import Answer, Choice, answer, choice_of, end_token_ids, prepare
from phi3v.evaluation.metrics import normalise
from phi3v.evaluation.processes import Processes, join
from phi3v.evaluation.progress import Progress
from phi3v.evaluation.weights import folder_of, is_hub_id
from phi3v.model.runtime import TORCH_DTYPE, attention_implementation, attention_note
from phi3v.provenance.manifest import commit, digest_file, write_manifest
from phi3v.settings import Dataset, EvaluateSettings, PredictSettings, Role, fields_with

DEFAULT_CROPS = Dataset.model_fields["num_crops"].default
_DEVICE_MEMORY = (torch.cuda.OutOfMemoryError,)


@dataclass(frozen=True)
class Loaded:
    """What every pass uses."""

    model: Any
    processor: Any
    num_crops: int
    end_tokens: list[int]
    choice: Choice | None


def evaluate(settings: EvaluateSettings) -> dict[str, dict[str, Any]]:
    """Run the passes and write output_dir/PASS/ and output_dir/manifest.json; returns metrics.json of each pass (process 0's view).

    Raises DataError on data that cannot be asked, FileNotFoundError where the model or the data folder is not there.
    """
    started = time.perf_counter()
    data_dir, output = Path(settings.data_dir), Path(settings.output_dir)
    if not data_dir.is_dir():
        raise FileNotFoundError(f"--data_dir {data_dir}: no such folder; expected images/ and a jsonl for each split")
    index = describe(data_dir)
    metric = settings.metric or index.get("metric")
    if metric is None:
        raise DataError(f"{data_dir}: no dataset.json that names a metric, and no --metric; expected accuracy or anls")
    num_crops = settings.num_crops or index.get("num_crops") or DEFAULT_CROPS
    questions = examples.read_questions(data_dir, settings.split)
    processes = join(settings)
    if processes.rank == 0 and (note := attention_note(settings, processes.device)):
        print(note)
    model = _weights(settings.model_name_or_path, processes)
    fingerprint = _fingerprint(settings, model, data_dir, num_crops)
    if processes.rank == 0:
        (output / "manifest.json").unlink(missing_ok=True)
    asked = {name: _questions_of(name, questions, data_dir, settings.seed) for name in settings.passes}
    todo = [name for name in settings.passes if not predictions.finished(output / name, f"{fingerprint}-{name}")]
    loaded = _load(model, settings, processes.device, num_crops, questions) if todo else None
    load_seconds = time.perf_counter() - started
    for name in todo:
        assert loaded is not None
        swapped, left_out = asked[name]
        folder = output / name
        part = predictions.Partial(folder, f"{fingerprint}-{name}", processes.rank)
        observed, seconds = _run_pass(part, swapped, data_dir, loaded, settings, processes, name)
        processes.wait()
        if processes.rank == 0:
            _finish_pass(part, folder, swapped, left_out, metric, settings, processes, observed, seconds, load_seconds)
        processes.wait()
    summaries: dict[str, dict[str, Any]] = {}
    if processes.rank == 0:
        summaries = {
            name: json.loads((output / name / "metrics.json").read_text(encoding="utf-8")) for name in settings.passes
        }
        write_manifest(
            output,
            kind="evaluate",
            settings=settings,
            inputs={
                "model": str(model),
                "data": str(data_dir),
                "split": str(split_file(data_dir, settings.split)),
            },
            seed=settings.seed,
            seconds=time.perf_counter() - started,
            device=processes.title,
            extra={"load_seconds": round(load_seconds, 3)},
        )
    processes.leave()
    return summaries


def _questions_of(name: str, questions: list[Question], data_dir: Path, seed: int) -> tuple[list[Question], list[str]]:
    if name != "control":
        return questions, []
    swapped, left_out = examples.swap_pictures(questions, examples.content_digests(data_dir, questions), seed)
    if not swapped:
        raise DataError(
            f"{data_dir}: no two examples whose pictures differ; expected some, for the control with swapped pictures"
        )
    return swapped, left_out


def _weights(name: str, processes: Processes) -> Path:
    """The model's folder; a hub id is fetched by the first process while the others wait."""
    if not is_hub_id(name):
        return folder_of(name)
    if processes.rank == 0:
        folder_of(name)
    processes.wait()
    return folder_of(name, may_fetch=False)


def _fingerprint(settings: EvaluateSettings, model: Path, data_dir: Path, num_crops: int) -> str:
    """Digest of everything the answers depend on: model files, split, settings, code."""
    files = sorted(path for path in model.glob("*") if path.is_file())
    facts = {
        "model": [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files],
        "split": digest_file(split_file(data_dir, settings.split)),
        "settings": settings.model_dump(
            include={*fields_with(EvaluateSettings, Role.RECIPE, Role.NUMERICS, Role.EQUIVALENT)}
        ),
        "num_crops": num_crops,
        "code": commit(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def load_model(folder: Path, settings: EvaluateSettings | PredictSettings, device: torch.device) -> tuple[Any, Any]:
    """Model in eval mode, and processor, of a checkpoint folder or an adapter folder on its base."""
    from transformers.utils.logging import disable_progress_bar

    from phi3v.model.adapters import base_of, is_adapter, load_for_inference
    from phi3v.model.processing import Phi3VProcessor

    disable_progress_bar()
    if device.type == "cpu" and settings.dtype == "fp16":
        from phi3v.model.half import use_float32_sums

        use_float32_sums()
    model = load_for_inference(folder, TORCH_DTYPE[settings.dtype], attention_implementation(settings, device), device)
    return model, Phi3VProcessor.from_pretrained(base_of(folder) if is_adapter(folder) else folder)


def _load(
    folder: Path, settings: EvaluateSettings, device: torch.device, num_crops: int, questions: list[Question]
) -> Loaded:
    model, processor = load_model(folder, settings, device)
    truths = {normalise(answer) for question in questions for answer in question.answers}
    choice = choice_of(processor.tokenizer) if truths == {"yes", "no"} else None
    return Loaded(model, processor, num_crops, end_token_ids(processor.tokenizer, model.generation_config), choice)


class _Observer:
    """What the first decoder layer really computed in."""

    def __init__(self, model: Any) -> None:
        self.dtype = ""
        layers = [module for name, module in model.named_modules() if name.endswith("layers.0")]
        decoder = layers[-1] if layers else model
        self._handle = decoder.register_forward_hook(self._see)

    def _see(self, module: Any, inputs: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        self.dtype = str(getattr(tensor, "dtype", "")).removeprefix("torch.")
        self._handle.remove()

    def close(self) -> None:
        self._handle.remove()


def _run_pass(
    part: predictions.Partial,
    questions: list[Question],
    data_dir: Path,
    loaded: Loaded,
    settings: EvaluateSettings,
    processes: Processes,
    name: str,
) -> tuple[dict[str, Any], float]:
    """Answer this process' share of the batches; returns what was observed and the seconds it took."""
    lengths = examples.prompt_lengths(data_dir, questions, loaded.processor, loaded.num_crops)
    batches = examples.plan_batches(lengths, settings.batch_size_per_gpu)
    part.mend()
    done = part.read()
    processes.wait()
    if processes.rank == 0:
        part.drop_others()
    open_batches = [batch for batch in batches if any(questions[i].id not in done for i in batch)]
    mine = open_batches[processes.rank :: processes.world]
    started = time.perf_counter()
    observer = _Observer(loaded.model)
    workers = loader_workers(settings.num_workers, processes.device.type == "cuda")
    title = f"{settings.row or settings.dataset or 'evaluate'} {name}"
    with Progress(title, sum(len(batch) for batch in mine), settings.tqdm, silent=processes.rank != 0) as progress:
        for batch, inputs in _prefetched(mine, questions, data_dir, loaded, workers):
            answers = _answer_within_memory(batch, inputs, questions, data_dir, loaded, settings.max_new_tokens)
            part.append(_records(questions, batch, answers))
            progress.advance(len(batch))
    observer.close()
    observed = {
        "activation_dtype": observer.dtype,
        "parameter_dtype": str(loaded.model.dtype).removeprefix("torch."),
        "attention": getattr(loaded.model.config, "_attn_implementation", None),
        "resumed_examples": len(questions) - sum(len(batch) for batch in open_batches),
    }
    return observed, time.perf_counter() - started


def _inputs(batch: list[int], questions: list[Question], data_dir: Path, loaded: Loaded) -> dict[str, torch.Tensor]:
    folder = data_dir / "images"
    pictures = [[open_rgb(folder / path, str(folder / path)) for path in questions[i].images] for i in batch]
    return prepare(loaded.processor, [questions[i].prompt for i in batch], pictures, loaded.num_crops)


def _prefetched(
    batches: list[list[int]], questions: list[Question], data_dir: Path, loaded: Loaded, workers: int
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Each batch with its inputs; `workers` threads decode and resize the next ones meanwhile."""
    if workers == 0:
        for batch in batches:
            yield batch, _inputs(batch, questions, data_dir, loaded)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting = []
        upcoming = iter(batches)
        for batch in upcoming:
            waiting.append((batch, pool.submit(_inputs, batch, questions, data_dir, loaded)))
            if len(waiting) > workers:
                ready, future = waiting.pop(0)
                yield ready, future.result()
        for ready, future in waiting:
            yield ready, future.result()


def _answer_within_memory(
    batch: list[int],
    inputs: dict[str, torch.Tensor],
    questions: list[Question],
    data_dir: Path,
    loaded: Loaded,
    max_new_tokens: int,
) -> list[Answer]:
    """Answers of a batch; one that does not fit the device's memory is halved."""
    try:
        return answer(
            loaded.model, loaded.processor.tokenizer, inputs,
            max_new_tokens=max_new_tokens, end_tokens=loaded.end_tokens, choice=loaded.choice,
        )  # fmt: skip
    except _DEVICE_MEMORY:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()
    middle = len(batch) // 2
    return [
        found
        for half in (batch[:middle], batch[middle:])
        for found in _answer_within_memory(
            half, _inputs(half, questions, data_dir, loaded), questions, data_dir, loaded, max_new_tokens
        )
    ]


def _records(questions: list[Question], batch: list[int], answers: list[Answer]) -> list[dict[str, Any]]:
    return [
        {
            "id": questions[i].id,
            "prediction": a.text,
            "tokens": a.tokens,
            "choice": None if a.choice is None else round(a.choice, 6),
        }
        for i, a in zip(batch, answers, strict=True)
    ]


def _finish_pass(
    part: predictions.Partial,
    folder: Path,
    questions: list[Question],
    left_out: list[str],
    metric: str,
    settings: EvaluateSettings,
    processes: Processes,
    observed: dict[str, Any],
    seconds: float,
    load_seconds: float,
) -> None:
    """Merge, score and write a pass that all processes are through with."""
    answers = part.read()
    records = predictions.merge(questions, answers, metric)
    summary = predictions.summarise(records, metric, settings.seed)
    summary["left_out"] = len(left_out)
    if folder.name != "control" and settings.split != "train":
        summary["leaked"] = examples.leaked(settings.data_dir, questions, settings.train_dir or settings.data_dir)
    tokens = sum(answers[question.id]["tokens"] for question in questions)
    timing = {
        "fingerprint": part.fingerprint,
        "seconds": round(seconds, 3),
        "load_seconds": round(load_seconds, 3),
        "examples_per_second": round((len(questions) - observed["resumed_examples"]) / seconds, 3) if seconds else None,
        "generated_tokens": tokens,
        "processes": processes.world,
        "batch_size_per_gpu": settings.batch_size_per_gpu,
        "device": processes.title,
        "threads": torch.get_num_threads(),
        "observed": observed,
    }
    predictions.write_pass(folder, records, summary, timing)
    part.remove()
    low, high = summary["interval"]
    print(
        f"{settings.row or settings.dataset} {folder.name}: {metric} {summary['score']:.2f} [{low:.1f}, {high:.1f}], n = {summary['n']}"
    )
