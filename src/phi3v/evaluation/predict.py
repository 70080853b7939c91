"""Answers questions about pictures without labels: one on standard output, or a table or folder.

A table or folder is first converted to OUTPUT/data, like any dataset. Rows and files that cannot be converted are
listed in OUTPUT/data/rejected.jsonl. The questions are then answered as in an evaluation: in batches, by all processes,
and a killed run resumes. The answers go to answers.jsonl and answers.csv.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shutil
import time
from pathlib import Path
from typing import NotRequired, TypedDict

from phi3v.data.conversations import DataError, Turn, prompt_text, text_problem
from phi3v.data.convert import convert_files
from phi3v.data.folder import Pictures, split_file
from phi3v.data.pictures import open_rgb, read_pictures
from phi3v.data.rows import is_junk
from phi3v.evaluation.generate import Predictor, weights_folder
from phi3v.evaluation.metrics import json_object
from phi3v.evaluation.questions import Answer, Question, json_lines, read_questions
from phi3v.evaluation.run import DEFAULT_NEW_TOKENS, Pass, answer_passes, answers_fingerprint, join, shared_weights
from phi3v.model.runtime import compute_device
from phi3v.provenance.manifest import digest_file, write_atomically, write_manifest
from phi3v.settings import CONVERTER_VERSION, OptionValue, PredictSettings, number_of

SPLIT = "predict"


class Answered(TypedDict):
    """A line of answers.jsonl."""

    id: str
    images: list[str]
    """Paths as in the table or folder."""
    question: str
    answer: str
    fields: dict[str, object] | None
    """The JSON object in the answer, or None."""
    tokens: int
    cut: bool
    """Whether the answer reached max_new_tokens."""
    probability: float
    """Geometric mean of the token probabilities. 1 means that each token was certain, regardless of the length."""
    meta: NotRequired[dict[str, str]]


def predict(settings: PredictSettings) -> str:
    """The answer of a checkpoint or adapter to one question.

    Raises DataError for a missing or unreadable picture, and for control tokens in the question. Raises SettingsError
    if the device cannot run the model (phi3v.model.runtime.compute_device).
    """
    if problem := text_problem(settings.question):
        raise DataError(f"--question: got {settings.question!r}; expected {problem}")
    for name in settings.image:
        if not Path(name).is_file():
            raise DataError(f"--image {name}: no such file; expected a picture")
    pages = [page for name in settings.image for page in read_pictures(Path(name), name)]
    pictures = [open_rgb(page.data, "--image") for page in pages]
    device = compute_device(settings)
    folder = weights_folder(settings.model_name_or_path)
    predictor = Predictor.load(
        folder, settings, device, settings.max_new_tokens or DEFAULT_NEW_TOKENS, settings.num_crops
    )
    # The picture marks come before the question, as in training.
    prompt = prompt_text(Turn(tuple(page.suffix for page in pages), settings.question, ""))
    (answer,) = predictor.answer(predictor.prepare([prompt], [pictures]))
    return answer.prediction


def predict_all(settings: PredictSettings) -> str:
    """Answers a table or folder into output_dir. Returns a line about it (in other processes than the first, "").

    Raises DataError if the table or folder does not exist or contains nothing to answer. Raises SettingsError as
    `predict`.
    """
    started, output = time.perf_counter(), Path(settings.output_dir)
    source = Path(settings.table or settings.folder)
    if not (source.is_dir() if settings.folder else source.is_file()):
        flag, kind = ("folder", "folder") if settings.folder else ("table", "file")
        raise DataError(f"--{flag} {source}: no such {kind}; expected an existing {kind}")
    processes = join(settings)
    if processes.rank == 0:
        _convert(settings, output)
    processes.wait()
    data = output / "data"
    questions, pictures = read_questions(data, SPLIT, unlabelled=True), Pictures(data)
    model = shared_weights(settings.model_name_or_path, processes)
    digests = pictures.digests(image for question in questions for image in question.images)
    facts = [digest_file(split_file(data, SPLIT)), *digests.values()]
    fingerprint = processes.from_first(lambda: answers_fingerprint(settings, model, facts))
    each = Pass("predict", output, questions, pictures, fingerprint)
    line = ""
    for _, answers, _ in answer_passes([each], model, settings, processes):
        root = Path(settings.folder or settings.images_dir or source.parent)
        cut = _write(output, root, questions, answers)
        write_manifest(
            output,
            kind="predict",
            settings=settings,
            inputs={"model": str(model), "questions": str(split_file(data, SPLIT))},
            seed=None,
            seconds=time.perf_counter() - started,
            device=processes.title,
        )
        rejected = data / "rejected.jsonl"
        left_out = rejected.read_bytes().count(b"\n") if rejected.is_file() else 0
        line = f"{output}/answers.csv: {number_of(len(questions), 'answer')}, {cut} incomplete (max_new_tokens), "
        line += f"{left_out} not answered"
        line += f", with reasons in {rejected}\n" if left_out else "\n"
    processes.leave()
    return line


def _convert(settings: PredictSettings, output: Path) -> None:
    """Converts the table or folder to OUTPUT/data, unless that exists already.

    A picture counts as changed if its content changed. If a table had rejected rows, everything is converted again.
    """
    output.mkdir(parents=True, exist_ok=True)
    columns = dict(column.split("=", 1) for column in settings.columns)
    root = Path(settings.images_dir) if settings.images_dir else None
    if settings.folder:
        root, table = Path(settings.folder), output / "files.jsonl"
        paths = [path for path in sorted(root.rglob("*")) if path.is_file() and output not in path.parents]
        files = [path.relative_to(root) for path in paths]
        rows = [
            {"id": str(name), "image": [str(name)], "question": settings.question}
            for name in files
            if not is_junk(name)
        ]
        if not rows:
            raise DataError(f"--folder {root}: contains no file; expected pictures")
        write_atomically(table, json_lines(rows))
        facts = [(root / str(row["id"])).stat().st_size for row in rows]
    else:
        table, facts = Path(settings.table), []
        if settings.question:
            columns["question"] = settings.question
    mark, data = output / "data.sha256", output / "data"

    def made_of() -> str:
        """Digest of the inputs of OUTPUT/data, including the current contents of the pictures."""
        pictures = _originals(data, root or table.parent)
        made = [CONVERTER_VERSION, digest_file(table), facts, columns, str(root), pictures]
        return hashlib.sha256(json.dumps(made).encode()).hexdigest()

    complete = settings.folder or not (data / "rejected.jsonl").exists()
    if complete and mark.is_file() and mark.read_text() == made_of():
        return
    mark.unlink(missing_ok=True)
    shutil.rmtree(data, ignore_errors=True)
    options: dict[str, OptionValue] = {"unlabelled": True, "columns": {**columns}}
    convert_files("table", table, data, SPLIT, root, name=table.stem, options=options, on_error="skip")
    write_atomically(mark, made_of())


def _originals(data: Path, root: Path) -> dict[str, str]:
    """sha256 of the files under root that the pictures of OUTPUT/data come from."""
    questions = read_questions(data, SPLIT, unlabelled=True)
    names = sorted({_source(path, root) for question in questions for path in question.images})
    return {name: digest_file(root / name) for name in names if (root / name).is_file()}


def _source(path: str, root: Path) -> str:
    """A picture's path in the table or folder. The conversion may add a page number and the suffix of its format."""
    name = path.removeprefix(f"{SPLIT}/")
    without = name.rpartition(".")[0]
    candidates = (name, without, re.sub(r"\.\d+$", "", without))
    return next((each for each in candidates if each and (root / each).exists()), name)


def _write(output: Path, root: Path, questions: list[Question], answers: dict[str, Answer]) -> int:
    """Writes answers.jsonl and answers.csv in the order of the source. Returns the number of incomplete answers."""
    records: list[Answered] = []
    names: dict[str, None] = {}
    for question in questions:
        answer = answers[question.id]
        record: Answered = {
            "id": question.id,
            "images": list(dict.fromkeys(_source(path, root) for path in question.images)),
            "question": question.user,
            "answer": answer.prediction,
            "fields": json_object(answer.prediction),
            "tokens": answer.tokens,
            "cut": answer.cut,
            "probability": answer.probability,
        }
        if question.meta:
            record["meta"] = question.meta
        records.append(record)
        names.update(dict.fromkeys(record["fields"] or ()))
    write_atomically(output / "answers.jsonl", json_lines(records))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    judged = ("tokens", "cut", "probability")
    table.writerow(["id", "image", "question", "answer", *(f"answer.{name}" for name in names), *judged])
    for record in records:
        values = [(record["fields"] or {}).get(name, "") for name in names]
        table.writerow(
            [record["id"], ";".join(record["images"]), record["question"], record["answer"]]
            + [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
            + [record["tokens"], json.dumps(record["cut"]), record["probability"]]
        )
    write_atomically(output / "answers.csv", text.getvalue())
    return sum(record["cut"] for record in records)
