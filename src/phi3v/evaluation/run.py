"""Evaluate a checkpoint or adapter on a split: the passes `before`, `after` and `control`, over one or many processes.

Each example is answered once, by one process. Batches are the same for any number of processes, so the predictions are too. Finished
batches are kept: a run that was killed continues after them (phi3v.evaluation.predictions).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from phi3v.data.conversations import DataError
from phi3v.data.folder import Pictures, describe, split_file
from phi3v.data.processes import loader_workers
from phi3v.evaluation.generate import Answer, Predictor, choice_of, is_hub_id, weights_folder
from phi3v.evaluation.metrics import normalise
from phi3v.evaluation.predictions import Draft, Partial, Summary, finished, merge, summarise, write_pass
from phi3v.evaluation.questions import (
    Question,
    content_digests,
    leaked,
    plan_batches,
    prompt_lengths,
    read_questions,
    swap_pictures,
)
from phi3v.model.runtime import attention_note, compute_device
from phi3v.provenance.manifest import commit, digest_file, write_manifest
from phi3v.settings import Compute, Dataset, EvaluateSettings, Role, fields_with

DEFAULT_CROPS = Dataset.model_fields["num_crops"].default
SECONDS_BETWEEN_LINES = 30
_DEVICE_MEMORY = (torch.cuda.OutOfMemoryError,)


@dataclass(frozen=True)
class Processes:
    """This process among the `world` that evaluate together."""

    rank: int
    world: int
    device: torch.device

    def wait(self) -> None:
        """Return once every process has called it."""
        if self.world > 1:
            torch.distributed.barrier()

    def leave(self) -> None:
        """Close the group."""
        if self.world > 1:
            torch.distributed.destroy_process_group()

    @property
    def title(self) -> str:
        """The device in words, for manifests."""
        if self.device.type == "cuda":
            return f"{self.world} x {torch.cuda.get_device_name(self.device)}"
        return f"{self.world} CPU process(es), {torch.get_num_threads()} thread(s) each"


def join(settings: Compute) -> Processes:
    """Join the processes that torchrun started; alone without it.

    Raises SettingsError if this process's device cannot do the job (phi3v.model.runtime.compute_device).
    """
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        # Some libraries count the machine's cores for themselves once they are imported.
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = compute_device(settings)
    if world > 1:
        # The processes share files and barriers only, so gloo serves every device. One may wait long for the longest answers.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=2))
    return Processes(rank, world, device)


@dataclass(frozen=True)
class Pass:
    """The questions of one pass, and the files of its answers."""

    name: str
    folder: Path
    questions: list[Question]
    left_out: int
    """Examples that the control cannot use."""
    part: Partial


def evaluate(settings: EvaluateSettings) -> dict[str, Summary]:
    """Run the passes and write output_dir/PASS/ and output_dir/manifest.json; returns metrics.json of each pass (process 0's view).

    Raises DataError on data that cannot be evaluated, FileNotFoundError if the model or the data folder is missing.
    """
    started = time.perf_counter()
    data_dir, output = Path(settings.data_dir), Path(settings.output_dir)
    if not data_dir.is_dir():
        raise FileNotFoundError(f"--data_dir {data_dir}: no such folder; expected images/ and a jsonl for each split")
    metric, num_crops = _metric_and_crops(settings)
    pictures, questions = Pictures(data_dir), read_questions(data_dir, settings.split)
    processes = join(settings)
    if processes.rank == 0 and (note := attention_note(settings, processes.device)):
        print(note)
    model = _weights(settings.model_name_or_path, processes)
    fingerprint = _fingerprint(settings, model, num_crops)
    if processes.rank == 0:
        (output / "manifest.json").unlink(missing_ok=True)
    passes = [
        _pass(name, output / name, questions, pictures, f"{fingerprint}-{name}", settings.seed, processes.rank)
        for name in settings.passes
    ]
    open_passes = [each for each in passes if not finished(each.folder, each.part.fingerprint)]
    if open_passes:
        predictor = Predictor.load(model, settings, processes.device, settings.max_new_tokens, num_crops)
        if {normalise(answer) for question in questions for answer in question.answers} == {"yes", "no"}:
            predictor = replace(predictor, choice=choice_of(predictor.processor.tokenizer))
    load_seconds = round(time.perf_counter() - started, 3)
    for each in open_passes:
        timing = _run_pass(each, pictures, predictor, settings, processes)
        processes.wait()
        if processes.rank == 0:
            _finish_pass(each, pictures, metric, settings, {"load_seconds": load_seconds, **timing})
        processes.wait()
    summaries: dict[str, Summary] = {}
    if processes.rank == 0:
        summaries = {
            each.name: json.loads((each.folder / "metrics.json").read_text(encoding="utf-8")) for each in passes
        }
        inputs = {"model": model, "data": data_dir, "split": split_file(data_dir, settings.split)}
        write_manifest(
            output,
            kind="evaluate",
            settings=settings,
            inputs={name: str(path) for name, path in inputs.items()},
            seed=settings.seed,
            seconds=time.perf_counter() - started,
            device=processes.title,
            extra={"load_seconds": load_seconds},
        )
    processes.leave()
    return summaries


def _metric_and_crops(settings: EvaluateSettings) -> tuple[str, int]:
    """Metric and num_crops: the settings', else the data folder's."""
    index = describe(settings.data_dir)
    metric = settings.metric or index.get("metric")
    if metric is None:
        raise DataError(
            f"{settings.data_dir}: no dataset.json that names a metric, and no --metric; expected accuracy or anls"
        )
    return metric, settings.num_crops or index.get("num_crops") or DEFAULT_CROPS


def _weights(name: str, processes: Processes) -> Path:
    """The model's folder; the first process fetches a hub id while the others wait."""
    if not is_hub_id(name):
        return weights_folder(name)
    if processes.rank == 0:
        weights_folder(name)
    processes.wait()
    return weights_folder(name, may_fetch=False)


def _fingerprint(settings: EvaluateSettings, model: Path, num_crops: int) -> str:
    """Digest of everything the answers depend on: model files, split, settings, code."""
    files = sorted(path for path in model.glob("*") if path.is_file())
    facts = {
        "model": [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files],
        "split": digest_file(split_file(settings.data_dir, settings.split)),
        "settings": settings.model_dump(
            include={*fields_with(EvaluateSettings, Role.RECIPE, Role.NUMERICS, Role.EQUIVALENT)}
        ),
        "num_crops": num_crops,
        "code": commit(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _pass(
    name: str, folder: Path, questions: list[Question], pictures: Pictures, fingerprint: str, seed: int, rank: int
) -> Pass:
    part = Partial(folder, fingerprint, rank)
    if name != "control":
        return Pass(name, folder, questions, 0, part)
    swapped, left_out = swap_pictures(questions, content_digests(pictures, questions), seed)
    if not swapped:
        raise DataError(
            f"{pictures.data_dir}: no two examples whose pictures differ; expected some, for the control with swapped pictures"
        )
    return Pass(name, folder, swapped, len(left_out), part)


def _run_pass(
    each: Pass, pictures: Pictures, predictor: Predictor, settings: EvaluateSettings, processes: Processes
) -> dict[str, object]:
    """Answer this process' share of the batches; returns timing.json without what needs all answers."""
    lengths = prompt_lengths(pictures, each.questions, predictor.processor.image_processor, predictor.num_crops)
    batches = [[each.questions[i] for i in batch] for batch in plan_batches(lengths, settings.batch_size_per_gpu)]
    each.part.trim()
    done = each.part.read()
    processes.wait()
    if processes.rank == 0:
        each.part.drop_others()
    open_batches = [batch for batch in batches if any(question.id not in done for question in batch)]
    mine = open_batches[processes.rank :: processes.world]
    started = time.perf_counter()
    dtypes: set[str] = set()
    hook = _first_decoder_layer(predictor.model).register_forward_hook(
        lambda _module, _inputs, output: dtypes.add(_dtype(output[0] if isinstance(output, tuple) else output))
    )
    workers = loader_workers(settings.num_workers, processes.device.type == "cuda")
    title = f"{settings.row or settings.dataset or 'evaluate'} {each.name}"
    with _progress(title, sum(map(len, mine)), settings.tqdm, silent=processes.rank != 0) as progress:
        for batch, inputs in _prefetched(mine, pictures, predictor, workers):
            answers = _answer_within_memory(batch, inputs, pictures, predictor)
            each.part.append(_draft(question, answer) for question, answer in zip(batch, answers, strict=True))
            progress.update(len(batch))
    hook.remove()
    seconds = time.perf_counter() - started
    resumed = len(each.questions) - sum(map(len, open_batches))
    return {
        "fingerprint": each.part.fingerprint,
        "seconds": round(seconds, 3),
        "examples_per_second": round((len(each.questions) - resumed) / seconds, 3),
        "processes": processes.world,
        "batch_size_per_gpu": settings.batch_size_per_gpu,
        "device": processes.title,
        "threads": torch.get_num_threads(),
        "observed": {
            "activation_dtype": ", ".join(sorted(dtypes)),
            "parameter_dtype": _dtype(predictor.model),
            "attention": getattr(predictor.model.config, "_attn_implementation", None),
            "resumed_examples": resumed,
        },
    }


def _dtype(computed: torch.Tensor | PreTrainedModel) -> str:
    return str(computed.dtype).removeprefix("torch.")


def _first_decoder_layer(model: nn.Module) -> nn.Module:
    layers = [module for name, module in model.named_modules() if name.endswith("layers.0")]
    return layers[-1] if layers else model


def _progress(title: str, total: int, bar: bool, silent: bool) -> tqdm:
    """A bar on a terminal; in a log a line every 30 s, about this process' share."""
    if bar and sys.stderr.isatty():
        return tqdm(total=total, desc=title, unit=" examples", dynamic_ncols=True, disable=silent)
    line = "{desc}: {n_fmt} of {total_fmt} (this process), {rate_fmt}, {remaining} left\n"
    every = SECONDS_BETWEEN_LINES
    return tqdm(
        total=total, desc=title, unit=" examples", bar_format=line, mininterval=every, maxinterval=every, disable=silent
    )


def _inputs(batch: list[Question], pictures: Pictures, predictor: Predictor) -> dict[str, torch.Tensor]:
    """Model inputs of a batch, on the CPU."""
    where = pictures.data_dir
    images = [[pictures.open(path, f"{where}: {question.id}") for path in question.images] for question in batch]
    return predictor.prepare([question.prompt for question in batch], images)


def _prefetched(
    batches: list[list[Question]], pictures: Pictures, predictor: Predictor, workers: int
) -> Iterator[tuple[list[Question], dict[str, torch.Tensor]]]:
    """Each batch with its inputs; `workers` threads decode and resize the next ones meanwhile."""
    if workers == 0:
        for batch in batches:
            yield batch, _inputs(batch, pictures, predictor)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[tuple[list[Question], Future[dict[str, torch.Tensor]]]] = []
        for batch in batches:
            waiting.append((batch, pool.submit(_inputs, batch, pictures, predictor)))
            if len(waiting) > workers:
                ready, future = waiting.pop(0)
                yield ready, future.result()
        for ready, future in waiting:
            yield ready, future.result()


def _answer_within_memory(
    batch: list[Question], inputs: dict[str, torch.Tensor], pictures: Pictures, predictor: Predictor
) -> list[Answer]:
    """Answers of a batch; a batch that does not fit the device's memory is halved."""
    try:
        return predictor.answer(inputs)
    except _DEVICE_MEMORY:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()
    middle = len(batch) // 2
    return [
        answer
        for half in (batch[:middle], batch[middle:])
        for answer in _answer_within_memory(half, _inputs(half, pictures, predictor), pictures, predictor)
    ]


def _draft(question: Question, answer: Answer) -> Draft:
    choice = None if answer.choice is None else round(answer.choice, 6)
    return {"id": question.id, "prediction": answer.text, "tokens": answer.tokens, "choice": choice}


def _finish_pass(
    each: Pass,
    pictures: Pictures,
    metric: str,
    settings: EvaluateSettings,
    timing: dict[str, object],
) -> None:
    """Merge, score and write a pass that all processes have finished."""
    drafts = each.part.read()
    records = merge(each.questions, drafts, metric)
    summary = summarise(records, metric, settings.seed)
    summary["left_out"] = each.left_out
    if each.name != "control" and settings.split != "train":
        summary["leaked"] = leaked(pictures, each.questions, settings.train_dir or settings.data_dir)
    tokens = sum(drafts[question.id]["tokens"] for question in each.questions)
    write_pass(each.folder, records, summary, {**timing, "generated_tokens": tokens})
    each.part.remove()
    low, high = summary["interval"]
    print(
        f"{settings.row or settings.dataset} {each.name}: {metric} {summary['score']:.2f} [{low:.1f}, {high:.1f}], n = {summary['n']}"
    )
