"""Evaluates a checkpoint or adapter on a split: the passes `before`, `after` and `control`, on one or more processes.

One process answers each example. Batches do not depend on the number of processes, so neither do the predictions.
Answers are stored in PASS/partial/. A killed run resumes after them, and the same command with other metrics scores
them again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from phi3v.data.conversations import DataError
from phi3v.data.folder import Pictures, check_unchanged, describe, split_file
from phi3v.data.processes import loader_workers, read_ahead
from phi3v.evaluation.generate import Predictor, choice_of, is_hub_id, weights_folder
from phi3v.evaluation.metrics import normalise
from phi3v.evaluation.questions import (
    Answer,
    Partial,
    Question,
    Record,
    json_lines,
    leaked,
    plan_batches,
    prompt_lengths,
    read_questions,
    swap_pictures,
)
from phi3v.evaluation.scoring import Summary, set_scores, summarise
from phi3v.model.runtime import attention_note, compute_device
from phi3v.provenance.manifest import digest_file, digest_weights, write_atomically, write_json, write_manifest
from phi3v.settings import Compute, Dataset, EvaluateSettings, Role, fields_with
from phi3v.settings.commands import Answering

DEFAULT_CROPS = Dataset.model_fields["num_crops"].default
DEFAULT_NEW_TOKENS = 64
"""The recipe's limit of new tokens in an answer."""
SECONDS_BETWEEN_LINES = 30
NO_CONTROL = "no two examples have different pictures, so none can be swapped"
_DEVICE_MEMORY = (torch.cuda.OutOfMemoryError,)

Timing = dict[str, object]
"""timing.json of a pass. Only this file differs between identical runs."""


@dataclass(frozen=True)
class Processes:
    """This process among the `world` processes of the evaluation."""

    rank: int
    world: int
    device: torch.device

    def wait(self) -> None:
        """Returns after every process has called it."""
        if self.world > 1:
            torch.distributed.barrier()

    def from_first(self, make: Callable[[], str]) -> str:
        """Calls a function in process 0 and returns its result in every process."""
        made = [make() if self.rank == 0 else ""]
        if self.world > 1:
            torch.distributed.broadcast_object_list(made)
        return made[0]

    def leave(self) -> None:
        """Closes the process group."""
        if self.world > 1:
            torch.distributed.destroy_process_group()

    @property
    def title(self) -> str:
        """Description of the device, for manifests."""
        if self.device.type == "cuda":
            return f"{self.world} x {torch.cuda.get_device_name(self.device)}"
        return f"{self.world} CPU process(es), {torch.get_num_threads()} thread(s) each"


def join(settings: Compute) -> Processes:
    """Joins the processes that torchrun started, or returns a single one.

    Raises SettingsError if this process's device cannot do the job (phi3v.model.runtime.compute_device).
    """
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        # Some libraries count the machine's cores at import, independent of this setting.
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = compute_device(settings)
    if world > 1:
        # The processes only share files and barriers, so gloo works for every device. Waiting for long answers can take
        # hours.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=2))
    if rank == 0 and (note := attention_note(settings, device)):
        print(note)
    return Processes(rank, world, device)


def shared_weights(name: str, processes: Processes) -> Path:
    """The model's folder. The first process downloads a hub id while the others wait."""
    if not is_hub_id(name):
        return weights_folder(name)
    if processes.rank == 0:
        weights_folder(name)
    processes.wait()
    return weights_folder(name, may_fetch=False)


@dataclass(frozen=True)
class Pass:
    """Questions for one model, and the folder for the answers."""

    name: str
    folder: Path
    questions: list[Question]
    pictures: Pictures
    fingerprint: str
    """Digest of everything that the answers depend on."""
    left_out: int = 0
    """Number of examples that the control cannot use."""


def evaluate(settings: EvaluateSettings) -> dict[str, Summary]:
    """Runs the passes and writes output_dir/PASS/ and output_dir/manifest.json. Returns metrics.json of each pass.

    Only process 0 returns the metrics. Raises DataError for unusable data, FileNotFoundError if the model or the data
    folder is missing.
    """
    started = time.perf_counter()
    data_dir, output = Path(settings.data_dir), Path(settings.output_dir)
    if not data_dir.is_dir():
        raise FileNotFoundError(
            f"--data_dir {data_dir}: no such folder; expected a folder with images/ and one JSONL file per split"
        )
    settings = _with_data_defaults(settings)
    questions, pictures = read_questions(data_dir, settings.split), Pictures(data_dir)
    processes = join(settings)
    model = shared_weights(settings.model_name_or_path, processes)
    inputs: dict[str, Path] = {"model": model, "data": data_dir, "split": split_file(data_dir, settings.split)}
    digests = pictures.digests(image for question in questions for image in question.images)
    check_unchanged(data_dir, settings.split, digests)
    data = [digest_file(inputs["split"]), *digests.values()]
    fingerprint = processes.from_first(lambda: answers_fingerprint(settings, model, data))
    if processes.rank == 0:
        (output / "manifest.json").unlink(missing_ok=True)
    summaries: dict[str, Summary] = {}
    passes = []
    for name in settings.passes:
        each = Pass(name, output / name, questions, pictures, f"{fingerprint}-{name}")
        if name == "control":
            swapped, left_out = swap_pictures(questions, digests, settings.seed)
            if not swapped:
                if processes.rank == 0:
                    (output / name / "predictions.jsonl").unlink(missing_ok=True)
                    write_json(output / name / "metrics.json", {"not_applicable": NO_CONTROL})
                    print(f"{settings.row or settings.dataset} control: not applicable: {NO_CONTROL}")
                continue
            each = replace(each, questions=swapped, left_out=len(left_out))
        passes.append(each)
    yes_no = {normalise(answer) for question in questions for answer in question.answers} == {"yes", "no"}
    for each, answers, timing in answer_passes(
        passes, model, settings, processes, yes_no, settings.row or settings.dataset
    ):
        summaries[each.name] = _score(each, answers, timing, settings)
    if processes.rank == 0:
        write_manifest(
            output,
            kind="evaluate",
            settings=settings,
            inputs={name: str(path) for name, path in inputs.items()},
            seed=settings.seed,
            seconds=time.perf_counter() - started,
            device=processes.title,
        )
    processes.leave()
    return summaries


def _with_data_defaults(settings: EvaluateSettings) -> EvaluateSettings:
    """The settings, with the data folder's values for those that are not set."""
    index = describe(settings.data_dir)
    metrics = settings.metrics or index.get("metrics") or ([index["metric"]] if "metric" in index else [])
    if not metrics:
        raise DataError(
            f"{settings.data_dir}: got no metric from dataset.json or --metrics; set --metrics, such as --metrics "
            "accuracy"
        )
    own = {
        "metrics": [name for name in metrics if ":" not in name] or ["accuracy"],
        "group_by": settings.group_by or index.get("group_by", ""),
        "num_crops": settings.num_crops or index.get("num_crops") or DEFAULT_CROPS,
        "max_new_tokens": settings.max_new_tokens or index.get("max_new_tokens") or DEFAULT_NEW_TOKENS,
    }
    return settings.model_copy(update=own)


def answers_fingerprint(settings: Answering, model: Path, data: list[str]) -> str:
    """Digest of everything that the answers depend on: the model's files, the data, and settings.

    Excludes the code, so that a `git pull` keeps existing answers. The manifest names the commit of the last part.
    """
    roles = fields_with(type(settings), Role.RECIPE, Role.NUMERICS, Role.EQUIVALENT)
    facts = {
        "model": digest_weights(model),
        "data": data,
        "settings": settings.model_dump(include=set(roles) - {"metrics", "group_by", "train_dir"}),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def answer_passes(
    passes: list[Pass], model: Path, settings: Answering, processes: Processes, yes_no: bool = False, title: str = ""
) -> Iterator[tuple[Pass, dict[str, Answer], Timing]]:
    """Answers the open questions of each pass. In process 0, yields the pass with all its answers by id, and its
    timing.

    Loads the model once, and only if a question is open. The timing is empty if none was.
    """
    predictor = None
    for each in passes:
        part = Partial(each.folder, each.fingerprint, processes.rank)
        part.trim()
        done = part.read()
        processes.wait()
        if processes.rank == 0:
            part.drop_others()
        timing: Timing = {}
        if not done.keys() >= {question.id for question in each.questions}:
            started = time.perf_counter()
            if predictor is None:
                limit = settings.max_new_tokens or DEFAULT_NEW_TOKENS
                predictor = Predictor.load(model, settings, processes.device, limit, settings.num_crops)
                if yes_no:
                    predictor = replace(predictor, choice=choice_of(predictor.processor.tokenizer))
            load_seconds = round(time.perf_counter() - started, 3)
            timing = _answer(each, part, done, predictor, settings, processes, f"{title} {each.name}".strip())
            timing["load_seconds"] = load_seconds
            processes.wait()
        if processes.rank == 0:
            answers = part.read()
            if missing := [question.id for question in each.questions if question.id not in answers]:
                raise DataError(
                    f"{part.folder}: {len(missing)} of {len(each.questions)} questions without an answer, first {missing[0]!r}; "
                    "run the same command again"
                )
            yield each, answers, timing
        processes.wait()


def _answer(
    each: Pass,
    part: Partial,
    done: dict[str, Answer],
    predictor: Predictor,
    settings: Answering,
    processes: Processes,
    title: str,
) -> Timing:
    """Answers this process's share of the open batches."""
    lengths = prompt_lengths(each.pictures, each.questions, predictor.processor.image_processor, predictor.num_crops)
    batches = [[each.questions[i] for i in batch] for batch in plan_batches(lengths, settings.batch_size_per_gpu)]
    open_batches = [batch for batch in batches if any(question.id not in done for question in batch)]
    mine = open_batches[processes.rank :: processes.world]
    started = time.perf_counter()
    dtypes: set[str] = set()
    layers = [module for name, module in predictor.model.named_modules() if name.endswith("layers.0")]
    first_decoder_layer = layers[-1] if layers else predictor.model
    hook = first_decoder_layer.register_forward_hook(
        lambda _module, _inputs, output: dtypes.add(_dtype(output[0] if isinstance(output, tuple) else output))
    )
    workers = loader_workers(settings.num_workers, processes.device.type == "cuda")
    with _progress(title, sum(map(len, mine)), settings.tqdm, silent=processes.rank != 0) as progress:
        for batch, inputs in _prefetched(mine, each.pictures, predictor, workers):
            answers = _answer_within_memory(batch, inputs, each.pictures, predictor)
            part.append(zip(batch, answers, strict=True))
            progress.update(len(batch))
    hook.remove()
    seconds = time.perf_counter() - started
    answered = sum(map(len, open_batches))
    return {
        "seconds": round(seconds, 3),
        "examples_per_second": round(answered / seconds, 3),
        "processes": processes.world,
        "batch_size_per_gpu": settings.batch_size_per_gpu,
        "device": processes.title,
        "threads": torch.get_num_threads(),
        "observed": {
            "activation_dtype": ", ".join(sorted(dtypes)),
            "parameter_dtype": _dtype(predictor.model),
            "attention": getattr(predictor.model.config, "_attn_implementation", None),
            "resumed_examples": len(each.questions) - answered,
        },
    }


def _dtype(computed: torch.Tensor | PreTrainedModel) -> str:
    return str(computed.dtype).removeprefix("torch.")


def _progress(title: str, total: int, bar: bool, silent: bool) -> tqdm:
    """A progress bar on a terminal. In a log, a line every 30 s about this process's share."""
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
    """Yields each batch with its inputs, while `workers` threads decode and resize the pictures of the next ones."""
    if workers == 0:
        for batch in batches:
            yield batch, _inputs(batch, pictures, predictor)
        return
    with ThreadPoolExecutor(workers) as pool:
        for batch, inputs in read_ahead(
            pool, partial(_inputs, pictures=pictures, predictor=predictor), batches, workers
        ):
            yield batch, inputs.result()


def _answer_within_memory(
    batch: list[Question], inputs: dict[str, torch.Tensor], pictures: Pictures, predictor: Predictor
) -> list[Answer]:
    """Answers of a batch. Halves a batch that runs out of device memory."""
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


def _score(each: Pass, answers: dict[str, Answer], timing: Timing, settings: EvaluateSettings) -> Summary:
    """Writes predictions.jsonl in the dataset's order, metrics.json, and timing.json if any question was answered."""
    records = [_record(question, answers[question.id]) for question in each.questions]
    set_scores(records, settings.metrics)
    for record, question in zip(records, each.questions, strict=True):
        if question.meta:
            record["meta"] = question.meta
    summary = summarise(records, settings.metrics, settings.seed, settings.group_by)
    summary["left_out"] = each.left_out
    if each.name != "control" and settings.split != "train":
        summary["leaked"] = leaked(each.pictures, each.questions, settings.train_dir or settings.data_dir)
    write_atomically(each.folder / "predictions.jsonl", json_lines(records))
    write_json(each.folder / "metrics.json", summary)
    if timing:
        timing["generated_tokens"] = sum(answers[question.id].tokens for question in each.questions)
        write_json(each.folder / "timing.json", timing)
    low, high = summary["interval"]
    print(
        f"{settings.row or settings.dataset} {each.name}: {summary['metric']} {summary['score']:.2f} "
        f"[{low:.1f}, {high:.1f}], n = {summary['n']}"
    )
    return summary


def _record(question: Question, answer: Answer) -> Record:
    record: Record = {
        "id": question.id,
        "prompt": question.user,
        "images": list(question.images),
        "answers": list(question.answers),
        "prediction": answer.prediction,
        "score": 0.0,
    }
    if answer.choice is not None:
        record["p_yes"] = answer.choice
    if answer.cut:
        record["cut"] = True
    return record
