"""lmms-eval on a trained checkpoint: the same ANLS and accuracy as this package's own evaluation, on its own code's terms."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path

import pytest
from training_fixtures import COLOURS, train_here, write_data, write_model

from clients.pages import BENCHMARKS, example
from phi3v.settings import EvaluateSettings, validate

pytestmark = pytest.mark.verify
# The tasks of lmms-eval with local files in place of the hub's: its own metric, its own scoring functions.
UTILS = """
from lmms_eval.tasks.pope.utils import pope_aggregate_accuracy, pope_process_results

def visual(doc):
    return [doc["image"].convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""
TASK = """
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
generation_kwargs: {{max_new_tokens: 12, do_sample: false}}
"""
ENDS = {
    "pages": "doc_to_target: answers\nmetric_list: [{metric: anls, aggregation: mean, higher_is_better: true}]\n",
    "yesno": "doc_to_target: answer\nprocess_results: !function utils.pope_process_results\nmetric_list:\n"
    "  - {metric: pope_accuracy, aggregation: !function utils.pope_aggregate_accuracy, higher_is_better: true}\n",
}
METRICS = {"pages": "anls", "yesno": "accuracy"}


def questions(count: int) -> dict[str, list[dict[str, str]]]:
    """Of each task: a coloured square, a question and its answer."""
    rng, names = random.Random(0), list(COLOURS)
    found: dict[str, list[dict[str, str]]] = {"pages": [], "yesno": []}
    for number in range(count):
        name, other = names[number % len(names)], rng.choice(names)
        found["pages"].append(
            {"image": f"{name}.png", "question": "Which colour is the square ?", "answer": f"{name} square"}
        )
        answer = "yes" if name == other else "no"
        found["yesno"].append({"image": f"{name}.png", "question": f"Is the square {other} ?", "answer": answer})
    return found


def write_split(path: Path, rows: list[dict[str, str]]) -> None:
    turns = [{"images": [row["image"]], "user": row["question"], "assistant": row["answer"]} for row in rows]
    lines = [{"id": str(number), "source": "test", "conversations": [turn]} for number, turn in enumerate(turns)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_task(folder: Path, name: str, rows: list[dict[str, str]], images: Path) -> None:
    from datasets import Dataset, Features, Image, List, Value

    docs = [
        {"question_id": str(number), "question": row["question"], "answer": row["answer"], "answers": [row["answer"]],
         "image": {"bytes": (images / row["image"]).read_bytes(), "path": row["image"]}}
        for number, row in enumerate(rows)
    ]  # fmt: skip
    text = Value("string")
    features = Features(question_id=text, question=text, answer=text, answers=List(text), image=Image())
    Dataset.from_list(docs, features=features).to_parquet(folder / f"{name}.parquet")
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=folder / f"{name}.parquet") + ENDS[name])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, dict[str, float]]:
    """A folder with a trained model and tasks/ for lmms-eval, the model's folder, and this package's scores by task."""
    from phi3v.evaluation.run import evaluate

    root = tmp_path_factory.mktemp("lmms")
    write_data(root / "data")
    write_model(root / "model")
    asked, tasks = questions(40), root / "tasks"
    tasks.mkdir()
    (tasks / "utils.py").write_text(UTILS)
    write_split(root / "data" / "train.jsonl", [*asked["pages"], *asked["yesno"]])
    out = train_here(
        root, root / "run", fp32=True, batch_size=8, batch_size_per_gpu=8, epochs=8, learning_rate=2e-3, warmup_steps=2,
        zero_stage=0,
    )  # fmt: skip
    # Some answers that the model did not learn: right ones alone would hide a difference.
    for number in range(0, 40, 4):
        asked["pages"][number]["answer"] += "s" if number % 8 else "s or circles"
        asked["yesno"][number]["answer"] = "yes"
    scores = {}
    for name, rows in asked.items():
        write_task(tasks, name, rows, root / "data" / "images")
        write_split(root / "data" / "val.jsonl", rows)
        settings = {
            "model_name_or_path": str(out / "final"), "data_dir": str(root / "data"), "fp32": True,
            "output_dir": str(root / name), "metrics": [METRICS[name]], "max_new_tokens": 12,
        }  # fmt: skip
        scores[name] = evaluate(validate(EvaluateSettings, settings, "test"))["after"]["score"] / 100
    return root, out / "final", scores


# Each example of the page, and the Python module that its program is.
@pytest.mark.parametrize(
    ("part", "start"),
    [("python -m lmms_eval", ("python", "")), ("accelerate launch", ("accelerate launch", "-m accelerate.commands.launch --cpu"))],
    ids=["one process", "two processes"],
)  # fmt: skip
def test_scores_are_equal(client, trained, part, start, tmp_path):
    root, model, ours = trained
    changes = {
        "docvqa_val,pope": "pages,yesno", "results/my/train/my-lora/final,dtype=bf16": f"{model},dtype=fp32",
        "--output_path logs": f"--output_path {tmp_path} --include_path {root / 'tasks'}", "\\\n": "",
    }  # fmt: skip
    command = example(BENCHMARKS, part, changes).replace(*start, 1).replace("--num_processes 4", "--num_processes 2")
    done = client("lmms-eval", *shlex.split(command), HF_DATASETS_CACHE=str(root / "cache"))
    print(done.stdout[-1200:])
    (file,) = tmp_path.rglob("*_results.json")
    theirs = json.loads(file.read_text(encoding="utf-8"))["results"]
    for name, score in ours.items():
        key = next(key for key in theirs[name] if key.startswith(("anls,", "pope_accuracy,")))
        assert 0.05 < score < 0.999
        assert theirs[name][key] == pytest.approx(score, abs=1e-6)
