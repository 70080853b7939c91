"""Whole evaluations with a tiny model: batched against one by one, over processes, killed and resumed, the control."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

WORDS = ["red", "green", "blue", "what", "colour", "is", "this", "and", "that", "?", "yes", "no", "Yes", "No"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    from phi3v.demo.tiny import build_tiny

    return build_tiny(tmp_path_factory.mktemp("model") / "tiny", [" ".join(WORDS)] * 3, seed=1)


def write_data(folder: Path, count: int, images: int = 1, metric: str = "accuracy", shared: bool = False) -> Path:
    """A data folder whose pictures differ in size, so that prompts differ in length."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(count):
        names = []
        for k in range(images):
            name = f"{0 if shared else i}-{k}.png"
            picture = Image.new("RGB", (40 + 25 * (i % 5), 40 + 10 * (i % 3)), (i * 37 % 255, i * 91 % 255, k * 80))
            ImageDraw.Draw(picture).text((2, 2), f"{i}{k}", fill="white")
            picture.save(folder / "images" / name)
            names.append(name)
        turn = {
            "images": names,
            "user": "what colour is this ?" + " and that" * (i % 4),
            "assistant": "yes" if i % 2 else "no",
        }
        lines.append(json.dumps({"id": f"val-{i:04d}", "source": "test", "conversations": [turn]}))
    (folder / "val.jsonl").write_text("\n".join(lines) + "\n")
    index = {
        "name": "colours",
        "metric": metric,
        "num_crops": 2,
        "splits": {"val": {"file": "val.jsonl", "examples": count}},
    }
    (folder / "dataset.json").write_text(json.dumps(index))
    return folder


def run_script(root: Path, *flags: object, processes: int = 0, script: str = "evaluate", **options) -> subprocess.Popen:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, str(root / "scripts" / f"{script}.py"), *map(str, flags)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    return output


def evaluate_here(checkpoint: Path, data: Path, output: Path, **fields):
    from phi3v.evaluation.run import evaluate
    from phi3v.settings import EvaluateSettings

    settings = EvaluateSettings(
        model_name_or_path=str(checkpoint),
        data_dir=str(data),
        output_dir=str(output),
        **{"fp32": True, "max_new_tokens": 12, **fields},
    )
    return evaluate(settings)


def test_batched_answers_equal_answers_one_by_one(checkpoint, tmp_path):
    data = write_data(tmp_path / "data", 11, images=2)
    evaluate_here(checkpoint, data, tmp_path / "batched", batch_size_per_gpu=4, num_workers=1)
    evaluate_here(checkpoint, data, tmp_path / "single", batch_size_per_gpu=1)
    batched = (tmp_path / "batched/after/predictions.jsonl").read_bytes()
    assert batched == (tmp_path / "single/after/predictions.jsonl").read_bytes()
    records = [json.loads(line) for line in batched.splitlines()]
    assert [record["id"] for record in records] == [f"val-{i:04d}" for i in range(11)]
    assert any(record["prediction"] for record in records)


def test_two_processes_answer_each_example_once_and_alike(root, checkpoint, tmp_path):
    data = write_data(tmp_path / "data", 9)
    summary = evaluate_here(checkpoint, data, tmp_path / "one", passes=["after", "control"], batch_size_per_gpu=2)
    output = finish(
        run_script(
            root, "--model_name_or_path", checkpoint, "--data_dir", data, "--output_dir", tmp_path / "two", "--fp32",
            "--max_new_tokens", 12, "--passes", "after", "control", "--batch_size_per_gpu", 2, "--no-tqdm", processes=2,
        )
    )  # fmt: skip
    assert "n = 9" in output
    for name in ("after", "control"):
        for file in ("predictions.jsonl", "metrics.json"):
            assert (tmp_path / "one" / name / file).read_bytes() == (tmp_path / "two" / name / file).read_bytes()
    assert summary["after"]["n"] == 9
    assert "auroc" in summary["after"]["more"]
    manifest = json.loads((tmp_path / "two/manifest.json").read_text())
    assert manifest["kind"] == "evaluate"
    timing = json.loads((tmp_path / "two/after/timing.json").read_text())
    assert timing["processes"] == 2
    assert timing["observed"]["activation_dtype"] == "float32"


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_file(root, checkpoint, tmp_path):
    data = write_data(tmp_path / "data", 16)
    fields = {"max_new_tokens": 48, "batch_size_per_gpu": 1}
    evaluate_here(checkpoint, data, tmp_path / "whole", **fields)
    flags = ["--model_name_or_path", checkpoint, "--data_dir", data, "--output_dir", tmp_path / "killed", "--fp32"]
    flags += [word for name, value in fields.items() for word in (f"--{name}", value)]
    process = run_script(root, *flags, "--no-tqdm")
    partial = tmp_path / "killed/after/partial"
    deadline = time.monotonic() + 300
    while not any(path.stat().st_size > 300 for path in partial.glob("*.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed/manifest.json").exists()
    part = next(partial.glob("*.jsonl"))
    part.write_bytes(part.read_bytes() + b'{"id": "val-0015", "predic')
    evaluate_here(checkpoint, data, tmp_path / "killed", **fields)
    timing = json.loads((tmp_path / "killed/after/timing.json").read_text())
    assert 0 < timing["observed"]["resumed_examples"] < 16
    for file in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / "killed/after" / file).read_bytes() == (tmp_path / "whole/after" / file).read_bytes()


def test_parts_of_other_settings_are_not_taken_over(checkpoint, tmp_path):
    from phi3v.evaluation.questions import Answer, Partial, read_questions

    data = write_data(tmp_path / "data", 3)
    stale = Partial(tmp_path / "out/after", "0123456789abcdef-after", 0)
    stale.append((question, Answer("stale", 1, 1.0)) for question in read_questions(data, "val"))
    assert stale.read()["val-0002"].prediction == "stale"
    evaluate_here(checkpoint, data, tmp_path / "out")
    assert "stale" not in (tmp_path / "out/after/predictions.jsonl").read_text()


def test_a_finished_pass_is_not_repeated_but_a_changed_setting_is(checkpoint, tmp_path):
    data = write_data(tmp_path / "data", 3)
    evaluate_here(checkpoint, data, tmp_path / "out")
    first = (tmp_path / "out/after/timing.json").stat().st_mtime_ns
    evaluate_here(checkpoint, data, tmp_path / "out")
    assert (tmp_path / "out/after/timing.json").stat().st_mtime_ns == first
    assert (tmp_path / "out/manifest.json").is_file()
    evaluate_here(checkpoint, data, tmp_path / "out", max_new_tokens=3)
    assert (tmp_path / "out/after/timing.json").stat().st_mtime_ns != first


def test_touched_and_copied_inputs_keep_the_answers_and_a_changed_picture_does_not(checkpoint, tmp_path, monkeypatch):
    data = write_data(tmp_path / "data", 3)
    evaluate_here(checkpoint, data, tmp_path / "out")
    first = (tmp_path / "out/after/timing.json").stat().st_mtime_ns
    for folder, copied in ((checkpoint, tmp_path / "model"), (data, tmp_path / "again")):
        shutil.copytree(folder, copied, copy_function=shutil.copyfile)
    monkeypatch.setattr("phi3v.provenance.manifest.commit", lambda: {"commit": "another", "dirty": None})
    evaluate_here(tmp_path / "model", tmp_path / "again", tmp_path / "out")
    assert (tmp_path / "out/after/timing.json").stat().st_mtime_ns == first
    one, other = sorted((tmp_path / "again/images").rglob("*.png"))[:2]
    one.write_bytes(other.read_bytes())
    evaluate_here(tmp_path / "model", tmp_path / "again", tmp_path / "out")
    assert (tmp_path / "out/after/timing.json").stat().st_mtime_ns != first


def test_an_adapter_is_evaluated_on_its_base(checkpoint, tmp_path):
    import torch

    from phi3v.model.adapters import add_lora
    from phi3v.model.modeling import Phi3VForCausalLM

    model = add_lora(
        Phi3VForCausalLM.from_pretrained(checkpoint), rank=4, alpha=8, dropout=0.0, freeze_vision=False, seed=0
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    data = write_data(tmp_path / "data", 4)
    evaluate_here(checkpoint, data, tmp_path / "base")
    evaluate_here(tmp_path / "adapter", data, tmp_path / "trained")
    read = [(tmp_path / name / "after/predictions.jsonl").read_bytes() for name in ("base", "trained")]
    assert read[0] != read[1]


def test_bad_data_are_named(checkpoint, tmp_path):
    from phi3v.data.conversations import DataError

    data = write_data(tmp_path / "data", 3)
    with pytest.raises(DataError, match="split 'test'"):
        evaluate_here(checkpoint, data, tmp_path / "out", split="test")
    lines = (data / "val.jsonl").read_text().splitlines()
    (data / "val.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")
    with pytest.raises(DataError, match=r"val.jsonl:4: field `id`: got 'val-0000', already on line 1"):
        evaluate_here(checkpoint, data, tmp_path / "out")
    (data / "val.jsonl").write_text("\n".join(lines) + "\n")
    (data / "images/2-0.png").unlink()
    with pytest.raises(
        DataError, match=r"val.jsonl:3: field `images`: image '2-0.png': cannot be read: .*No such file"
    ):
        evaluate_here(checkpoint, data, tmp_path / "out")


def test_the_control_of_one_picture_is_not_applicable_and_the_rest_is_evaluated(checkpoint, tmp_path):
    data = write_data(tmp_path / "data", 2, shared=True)
    assert list(evaluate_here(checkpoint, data, tmp_path / "out", passes=["after", "control"])) == ["after"]
    found = json.loads((tmp_path / "out/control/metrics.json").read_text())
    assert found == {"not_applicable": "no two examples have different pictures, so none can be swapped"}
    assert (tmp_path / "out/manifest.json").is_file()


def test_cut_answers_are_marked_and_counted(checkpoint, tmp_path):
    data = write_data(tmp_path / "data", 6)
    cut = evaluate_here(checkpoint, data, tmp_path / "one", max_new_tokens=1)["after"]["cut"]
    records = [json.loads(line) for line in (tmp_path / "one/after/predictions.jsonl").read_text().splitlines()]
    assert cut == sum(record.get("cut", False) for record in records) > 0
    # An answer is cut if a longer limit would have let it go on.
    evaluate_here(checkpoint, data, tmp_path / "long", max_new_tokens=40)
    longer = [json.loads(line) for line in (tmp_path / "long/after/predictions.jsonl").read_text().splitlines()]
    for short, long in zip(records, longer, strict=True):
        if long["prediction"] != short["prediction"]:
            assert short["cut"]
            assert long["prediction"].startswith(short["prediction"])


def test_other_metrics_score_the_same_answers_without_generating(checkpoint, tmp_path):
    data = write_data(tmp_path / "data", 4)
    evaluate_here(checkpoint, data, tmp_path / "out")
    timing = (tmp_path / "out/after/timing.json").stat().st_mtime_ns
    (tmp_path / "out/after/predictions.jsonl").unlink()
    summary = evaluate_here(checkpoint, data, tmp_path / "out", metrics=["edit_similarity", "cer"])["after"]
    assert summary["metric"] == "edit_similarity" and {"cer", "character_error_rate"} <= set(summary["more"])
    assert (tmp_path / "out/after/timing.json").stat().st_mtime_ns == timing
    first = json.loads((tmp_path / "out/after/predictions.jsonl").read_text().splitlines()[0])
    assert list(first["scores"]) == ["cer"]


def test_pictures_that_were_trained_on_are_counted(checkpoint, tmp_path):
    data = write_data(tmp_path / "data", 4)
    index = json.loads((data / "dataset.json").read_text())
    index["splits"]["train"] = {"file": "train.jsonl", "examples": 2}
    (data / "dataset.json").write_text(json.dumps(index))
    (data / "images/copy.png").write_bytes((data / "images/2-0.png").read_bytes())
    lines = [json.loads(line) for line in (data / "val.jsonl").read_text().splitlines()[:2]]
    for line, name in zip(lines, ("copy.png", "1-0.png"), strict=True):
        line["conversations"][0]["images"] = [name]
    (data / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluate_here(checkpoint, data, tmp_path / "out")["after"]["leaked"] == 2


def test_predict_answers_about_ones_own_pictures(checkpoint, tmp_path):
    from phi3v.data.conversations import DataError
    from phi3v.evaluation.predict import predict
    from phi3v.settings import PredictSettings

    data = write_data(tmp_path / "data", 2, images=2)
    evaluate_here(checkpoint, data, tmp_path / "out", num_crops=2)
    record = json.loads((tmp_path / "out/after/predictions.jsonl").read_text().splitlines()[1])
    ask = {
        "model_name_or_path": str(checkpoint),
        "question": record["prompt"],
        "fp32": True,
        "num_crops": 2,
        "max_new_tokens": 12,
    }
    pictures = [str(data / "images" / path) for path in record["images"]]
    assert predict(PredictSettings(image=pictures, **ask)) == record["prediction"]
    with pytest.raises(DataError, match=r"--image nowhere.png: no such file"):
        predict(PredictSettings(image=["nowhere.png"], **ask))
    with pytest.raises(DataError, match="no control token"):
        predict(PredictSettings(**{**ask, "question": "<|image_1|> hm"}))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        predict(PredictSettings(**{**ask, "model_name_or_path": "./nowhere"}))
    with pytest.raises(FileNotFoundError, match=r"neither config.json nor adapter_config.json; .*final/"):
        predict(PredictSettings(**{**ask, "model_name_or_path": str(data)}))
    first, second = (Image.open(path).convert("RGB") for path in pictures)
    first.save(tmp_path / "both.tiff", save_all=True, append_images=[second])
    assert predict(PredictSettings(image=[str(tmp_path / "both.tiff")], **ask)) == record["prediction"]


def test_a_model_that_would_say_the_picture_token_goes_on(checkpoint):
    import torch

    from phi3v.evaluation.generate import Predictor
    from phi3v.settings import Compute

    predictor = Predictor.load(checkpoint, Compute(fp32=True), torch.device("cpu"), max_new_tokens=4)
    token = predictor.model.config.image_token_id
    predictor.model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([token]), 1e4)
    )
    (found,) = predictor.answer(predictor.prepare(["<|user|>\nwhat<|end|>\n<|assistant|>\n"], [[]]))
    assert found.tokens >= 1
    assert "<|image|>" not in found.prediction


def test_a_hub_id_comes_through_the_lock_and_never_again(root, checkpoint, tmp_path, monkeypatch):
    from data_examples import COMMIT, HubServer

    from phi3v.data.fetch import LOCK, PINS
    from phi3v.evaluation.generate import weights_folder

    data = write_data(tmp_path / "data", 3)
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    flags = ["--data_dir", data, "--fp32", "--max_new_tokens", 12, "--no-tqdm", "--batch_size_per_gpu", 8]
    with HubServer({"owner/tiny": {**files, "modeling_phi3_v.py": b"raise SystemExit"}}) as hub:
        settings = {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        asked = run_script(
            root, *flags, "--model_name_or_path", "owner/tiny", "--output_dir", "out", processes=2, cwd=tmp_path
        )
        finish(asked)
        assert hub.gets("model.safetensors") == 1  # by one of the two processes
        missing = run_script(root, *flags, "--model_name_or_path", "owner/none", "--output_dir", "none", cwd=tmp_path)
        output, _ = missing.communicate(timeout=600)
        assert missing.returncode == 2 and "hf://owner/none: no such repository" in output and "Traceback" not in output
    (folder,) = (tmp_path / "results/models").glob("owner--tiny-*")
    lock = json.loads((folder / LOCK).read_text())["sources"]
    assert [source["resolved"] for source in lock] == [COMMIT] and (folder / PINS).is_file()
    assert not (folder / "modeling_phi3_v.py").exists()
    evaluate_here(checkpoint, data, tmp_path / "local")
    there, here = (tmp_path / name / "after/predictions.jsonl" for name in ("out", "local"))
    assert there.read_bytes() == here.read_bytes()
    # The server is gone: what is there is used, and a file that was touched is refused.
    monkeypatch.chdir(tmp_path)
    assert weights_folder("owner/tiny").samefile(folder)
    (folder / "config.json").write_text("{}")
    from phi3v.data.conversations import DataError

    with pytest.raises(DataError, match=r"config\.json: got 2 bytes; expected"):
        weights_folder("owner/tiny")


def test_a_hub_id_that_the_models_file_names_is_the_workflows_download(root):
    from phi3v.evaluation.generate import hub_folder, is_hub_id
    from phi3v.settings import Model, model_key, read_entries

    entry = read_entries(["config/models.yaml"], Model, root)["phi35-vision"]
    folder, model = hub_folder("microsoft/Phi-3.5-vision-instruct", root)
    assert folder == root / "results/models" / model_key("phi35-vision", entry) and model == entry
    folder, model = hub_folder("microsoft/Phi-3.5-vision-instruct@v1", root)
    assert model.revision == "v1" and folder.name.startswith("microsoft--Phi-3.5-vision-instruct-")
    assert is_hub_id("a/b") and not is_hub_id("./a/b") and not is_hub_id("a/b/c") and not is_hub_id("/a/b")


def test_a_mistyped_folder_beside_others_is_no_hub_id(tmp_path, monkeypatch):
    from phi3v.evaluation.generate import weights_folder

    monkeypatch.chdir(tmp_path)
    (tmp_path / "trained/final").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="trained/finale: no such folder; expected a checkpoint"):
        weights_folder("trained/finale")


def test_the_official_splits_have_their_authors_metrics(checkpoint, tmp_path):
    from phi3v.data.convert import convert_files

    pictures = write_data(tmp_path / "pictures", 4) / "images"
    for pair in (0, 1):
        for k in (0, 1):
            name = f"dev-3-{pair}-img{k}.png"
            (pictures / name).write_bytes((pictures / f"{2 * pair + k}-0.png").read_bytes())
    lines = [
        {"identifier": f"dev-3-{pair}-{sentence}", "sentence": "what colour", "label": ["True", "False"][sentence]}
        for sentence in (0, 1)
        for pair in (0, 1)
    ]
    (pictures / "dev.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (pictures / "dev_seen.jsonl").write_text(
        "".join(json.dumps({"id": i, "img": f"{i}-0.png", "label": i % 2, "text": ""}) + "\n" for i in range(4))
    )
    pages = [
        {"questionId": i, "question": "what ?", "image": f"{i}-0.png", "answers": ["red", "RED "]} for i in range(3)
    ]
    (pictures / "val_v1.0.json").write_text(json.dumps({"data": pages}))
    train = write_data(tmp_path / "train", 2)
    (train / "dataset.json").unlink()
    (train / "val.jsonl").rename(train / "train.jsonl")
    found = {}
    for name, source, metric in (
        ("nlvr2_official", "dev.json", "accuracy"),
        ("hateful_memes_official", "dev_seen.jsonl", "accuracy"),
        ("docvqa_official", "val_v1.0.json", "anls"),
    ):
        folder = tmp_path / name
        convert_files(name, pictures / source, folder, "val", metric=metric, num_crops=2)
        found[name] = evaluate_here(checkpoint, folder, tmp_path / f"{name}-out", train_dir=str(train))["after"]
    nlvr2 = found["nlvr2_official"]
    records = [
        json.loads(line) for line in (tmp_path / "nlvr2_official-out/after/predictions.jsonl").read_text().splitlines()
    ]
    right = {name: all(r["score"] == 1 for r in records if r["id"].endswith(f"-{name}")) for name in (0, 1)}
    assert nlvr2["n"] == 4 and nlvr2["more"]["consistency"]["score"] == 100 * sum(right.values()) / 2
    assert nlvr2["more"]["consistency"]["interval"] is not None
    assert 0 <= found["hateful_memes_official"]["more"]["auroc"]["score"] <= 100
    assert found["docvqa_official"]["more"]["official_anls"]["score"] >= found["docvqa_official"]["score"]
    # Pictures 0 and 1 are trained on, in another folder and under other names.
    assert [found[name]["leaked"] for name in found] == [2, 2, 2]


def predict_flags(checkpoint: Path, *flags: object) -> list[object]:
    common = [
        "--model_name_or_path",
        checkpoint,
        "--fp32",
        "--max_new_tokens",
        48,
        "--batch_size_per_gpu",
        1,
        "--no-tqdm",
    ]
    return [*common, "--num_crops", 2, *flags]


def test_a_table_is_answered_and_a_killed_run_ends_with_the_same_files(root, checkpoint, tmp_path):
    data = write_data(tmp_path / "data", 24, images=2)
    rows = [
        {
            "file": f"{i}-0.png",
            "second": f"{i}-1.png",
            "q": "what colour is this ?",
            "number": f"n{i}",
            "shop": "a" if i % 2 else "b",
        }
        for i in range(24)
    ]
    rows[3]["file"] = "nowhere.png"
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ["image=file", "question=q", "id=number"]
    flags = predict_flags(
        checkpoint, "--table", tmp_path / "new.jsonl", "--images_dir", data / "images", "--columns", *columns
    )
    output = finish(run_script(root, *flags, "--output_dir", tmp_path / "whole", script="predict"))
    assert "23 answers" in output and "1 not answered" in output
    (rejected,) = (tmp_path / "whole/data/rejected.jsonl").read_text().splitlines()
    assert "nowhere.png" in json.loads(rejected)["reason"]
    process = run_script(root, *flags, "--output_dir", tmp_path / "killed", script="predict")
    deadline = time.monotonic() + 300
    while not any(path.stat().st_size > 300 for path in (tmp_path / "killed/partial").glob("*.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed/answers.csv").exists()
    finish(run_script(root, *flags, "--output_dir", tmp_path / "killed", script="predict", processes=2))
    for file in ("answers.jsonl", "answers.csv"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()
    records = [json.loads(line) for line in (tmp_path / "whole/answers.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == [f"n{i}" for i in range(24) if i != 3]
    assert records[0]["images"] == ["0-0.png"] and records[0]["question"] == "what colour is this ?"
    assert all(0 < record["probability"] <= 1 and record["tokens"] >= 1 for record in records)


def test_a_folder_is_answered_and_the_files_that_are_not_taken_are_named(checkpoint, tmp_path):
    from phi3v.evaluation.predict import predict, predict_all
    from phi3v.settings import PredictSettings

    data = write_data(tmp_path / "data", 3)
    scans = tmp_path / "scans"
    (data / "images").rename(scans)
    (scans / "sub").mkdir()
    (scans / "2-0.png").rename(scans / "sub/ünder; score.png")
    (scans / "notes.txt").write_text("no picture")
    (scans / "Thumbs.db").write_text("junk")
    ask = {
        "model_name_or_path": str(checkpoint),
        "fp32": True,
        "question": "what colour is this ?",
        "num_crops": 2,
        "max_new_tokens": 3,
    }
    settings = PredictSettings(folder=str(scans), output_dir=str(tmp_path / "out"), **ask)
    assert "3 answers" in predict_all(settings)
    with (tmp_path / "out/answers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["0-0.png", "1-0.png", "sub/ünder; score.png"]
    for row in rows:
        assert row["answer"] == predict(PredictSettings(image=[str(scans / row["image"])], **ask))
        assert row["cut"] == json.dumps(row["tokens"] == "3")
    (rejected,) = (tmp_path / "out/data/rejected.jsonl").read_text().splitlines()
    assert "notes.txt" in rejected
    # An answered folder is not converted again; a new picture makes it new.
    before = (tmp_path / "out/data/dataset.json").stat().st_mtime_ns
    predict_all(settings)
    assert (tmp_path / "out/data/dataset.json").stat().st_mtime_ns == before
    (scans / "9.png").write_bytes((scans / "0-0.png").read_bytes())
    assert "4 answers" in predict_all(settings)
    # Pictures that changed places are answered again.
    (scans / "0-0.png").rename(scans / "x")
    (scans / "1-0.png").rename(scans / "0-0.png")
    (scans / "x").rename(scans / "1-0.png")
    predict_all(settings)
    with (tmp_path / "out/answers.csv").open(newline="") as file:
        swapped = {row["image"]: row for row in csv.DictReader(file)}
    assert rows[1]["probability"] != rows[0]["probability"]
    assert float(swapped["0-0.png"]["probability"]) == pytest.approx(float(rows[1]["probability"]), rel=1e-3)


def test_pictures_of_a_table_that_changed_or_came_later_are_taken_again(tmp_path):
    from phi3v.evaluation.predict import _convert
    from phi3v.settings import PredictSettings

    table, out = tmp_path / "new.tsv", tmp_path / "out"
    settings = PredictSettings(model_name_or_path="x", fp32=True, table=str(table), output_dir=str(out))

    def converted() -> int:
        _convert(settings, out)
        return (out / "data/dataset.json").stat().st_mtime_ns

    table.write_text("image\tquestion\na.png\twhat?\nb.png\twhat?\n")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    converted()
    assert not (out / "data/images/predict/b.png").exists()
    Image.new("RGB", (8, 8), "lime").save(tmp_path / "b.png")
    first = converted()
    assert (out / "data/images/predict/b.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    os.utime(tmp_path / "a.png", (1, 1))
    assert converted() == first
    Image.new("RGB", (8, 8), "lime").save(tmp_path / "a.png")
    assert converted() > first
    assert (out / "data/images/predict/a.png").read_bytes() == (tmp_path / "a.png").read_bytes()


def test_fields_of_json_answers_are_columns(tmp_path):
    from phi3v.evaluation.predict import _write
    from phi3v.evaluation.questions import Answer, Question

    answers = ['{"total": 12.5, "shop": "Café, \\"A\\""}', "no JSON", '{"shop": null, "items": [1, {"a": "b"}]}']
    questions = [Question(f"q{i}", (f"predict/{i}.png",), "?", "?", ()) for i in range(3)]
    given = {f"q{i}": Answer(text, 5, 0.5, cut=i == 1) for i, text in enumerate(answers)}
    assert _write(tmp_path, tmp_path, questions, given) == 1
    with (tmp_path / "answers.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["id", "image", "question", "answer", "answer.total", "answer.shop", "answer.items", "tokens", "cut", "probability"],
        ["q0", "0.png", "?", answers[0], "12.5", 'Café, "A"', "", "5", "false", "0.5"],
        ["q1", "1.png", "?", "no JSON", "", "", "", "5", "true", "0.5"],
        ["q2", "2.png", "?", answers[2], "", "null", '[1, {"a": "b"}]', "5", "false", "0.5"],
    ]  # fmt: skip
    assert json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[0])["fields"]["total"] == 12.5


def test_the_probability_is_the_geometric_mean_of_the_tokens(checkpoint):
    import torch

    from phi3v.evaluation.generate import Predictor
    from phi3v.settings import Compute

    predictor = Predictor.load(checkpoint, Compute(fp32=True), torch.device("cpu"), max_new_tokens=6)
    prompt = "<|user|>\nwhat colour<|end|>\n<|assistant|>\n"
    (found,) = predictor.answer(predictor.prepare([prompt], [[]]))
    ids, logs = predictor.prepare([prompt], [[]])["input_ids"], []
    with torch.inference_mode():
        for _ in range(found.tokens):  # one token at a time, without a cache
            logits = predictor.model(input_ids=ids, use_cache=False).logits[0, -1].float()
            logits[predictor.model.config.image_token_id] = float("-inf")
            logs.append(logits.log_softmax(0).max().item())
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
    assert found.probability == pytest.approx(2.718281828459045 ** (sum(logs) / len(logs)), rel=1e-4)


def test_an_answer_about_pages_names_their_document(tmp_path):
    from phi3v.evaluation.predict import _source

    for name in ("scan.pdf", "a.b.png", "photo.heic"):
        (tmp_path / name).touch()
    stored = ("scan.pdf.2.png", "a.b.png", "photo.heic.png", "00000/00000003-0.png")
    assert [_source(f"predict/{name}", tmp_path) for name in stored] == [
        "scan.pdf", "a.b.png", "photo.heic", "00000/00000003-0.png",
    ]  # fmt: skip
