"""Fine-tuning for real, one process, tiny model: losses, census, precision, what is written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import write_data, write_model

from phi3v.settings import FinetuneSettings, SettingsError, validate

DECODER = ("model.layers.", "model.norm.", "lm_head.")
VISION = ("img_processor", "img_projection", "glb_GN", "sub_GN")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("training")
    return write_model(base / "model"), write_data(base / "data", examples=20, text_only_every=7)


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps its precision and devices for the life of a process; a script has one job, a test has many."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)


def train(folders: tuple[Path, Path], out: Path, **values) -> Path:
    from phi3v.training.finetune import run

    model, data = folders
    defaults = {
        "model_name_or_path": str(model), "data_dir": str(data), "output_dir": str(out), "batch_size": 8,
        "batch_size_per_gpu": 8, "max_steps": 4, "warmup_steps": 1, "learning_rate": 2e-3, "zero_stage": 0, "tqdm": False, "lora_rank": 4,
    }  # fmt: skip
    assert run(validate(FinetuneSettings, defaults | values, "test")) == 0
    return out


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def test_the_loss_curve_does_not_depend_on_grouping(folders, tmp_path):
    """20 float32 steps over text-only and picture examples, last partial step of each epoch included."""
    ways = {
        "one by one": {"batch_size_per_gpu": 1},
        "in fours": {"batch_size_per_gpu": 4},
        "like lengths": {"batch_size_per_gpu": 4, "batching": "length"},
        "packed": {"batch_size_per_gpu": 1, "batching": "packed", "tokens_per_pack": 300},
    }
    curves = {
        way: losses(train(folders, tmp_path / way, fp32=True, max_steps=20, gradient_checkpointing=False, **values))
        for way, values in ways.items()
    }
    reference = torch.tensor(curves["one by one"])
    assert reference[-1] < 0.9 * reference[0]
    for way, curve in curves.items():
        assert torch.allclose(torch.tensor(curve), reference, rtol=1e-5, atol=0), way


def test_the_step_loss_is_the_mean_of_the_examples_means(folders, tmp_path):
    """Against the definition, computed example by example with the untrained model."""
    from phi3v.data.dataset import ConversationDataset
    from phi3v.model import Phi3VForCausalLM, Phi3VProcessor
    from phi3v.training.batches import BatchPlan

    model_dir, data = folders
    out = train(folders, tmp_path / "out", fp32=True, max_steps=1, warmup_steps=0)
    model = Phi3VForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    dataset = ConversationDataset(data, "train", Phi3VProcessor.from_pretrained(model_dir), seed=42)
    means = []
    for index in BatchPlan(len(dataset), 8, 8, 1, 42).order(0)[:8]:
        example = dataset[index]
        pictures = {key: example[key] for key in ("pixel_values", "image_sizes") if len(example["image_sizes"])}
        with torch.no_grad():
            logits = model(input_ids=example["input_ids"][None], **pictures).logits[0]
        means.append(torch.nn.functional.cross_entropy(logits[:-1], example["labels"][1:]))
    assert losses(out)[0] == pytest.approx(float(torch.stack(means).mean()), rel=1e-5)


METHODS = {
    "full": ({}, {"clip", "projector", "separators", "embedding", "decoder", "head"}),
    "frozen": ({"freeze_vision_model": "vision"}, {"embedding", "decoder", "head"}),
    "legacy": ({"freeze_vision_model": "legacy"}, {"decoder", "head"}),
    "lora": ({"use_lora": True}, {f"adapters ({g})" for g in ("clip", "projector", "decoder", "head")}),
    "lora frozen": ({"use_lora": True, "freeze_vision_model": "vision"}, {"adapters (decoder)", "adapters (head)"}),
    "dora": (
        {"use_lora": True, "use_dora": True},
        {f"adapters ({g})" for g in ("clip", "projector", "decoder", "head")},
    ),
    "qlora": ({"use_qlora": True}, {f"adapters ({g})" for g in ("clip", "projector", "decoder", "head")}),
}


@pytest.mark.parametrize("method", METHODS)
def test_census_says_what_trains(folders, tmp_path, method):
    values, expected = METHODS[method]
    out = train(folders, tmp_path, bf16=True, max_steps=2, **values)
    groups = read(out / "census.json")["groups"]
    assert {name for name, group in groups.items() if group["expected"]} == expected
    assert {name for name, group in groups.items() if group["with_gradient"]} == expected
    if "adapters (clip)" not in expected:
        for name in expected:
            if not name.startswith("adapters"):
                assert groups[name]["with_gradient"] == groups[name]["trainable"], name
    assert ("legacy" in read(out / "census.json")["label"]) == (method == "legacy")
    assert ("DoRA" in read(out / "census.json")["label"]) == (method == "dora")
    assert (out / "final" / ("adapter_config.json" if "adapters (head)" in expected else "config.json")).is_file()


def test_frozen_vision_stays_bitwise_and_embedding_and_decoder_move(folders, tmp_path):
    before = tensors(folders[0])
    after = tensors(train(folders, tmp_path, fp32=True, freeze_vision_model="vision") / "final")
    assert before.keys() == after.keys()
    for name, value in before.items():
        moved = not torch.equal(value, after[name])
        assert moved == (not any(mark in name for mark in VISION)), name


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_what_ran_is_what_was_asked(folders, tmp_path, dtype, flash, method):
    out = train(folders, tmp_path, **{dtype: True}, use_flash_attention=flash, max_steps=2, use_qlora=method == "qlora")
    observed = read(out / "observed.json")
    assert observed["asked"] == {"dtype": dtype, "attention": "flash" if flash else "eager"}
    assert observed["activation_dtype"] == dtype
    kernel = "sdpa flash (CPU)" if flash else "eager"
    assert (observed["attention_decoder"], observed["attention_vision"]) == (kernel, kernel)
    assert (observed["linear4bit_layers"] > 0) == (method == "qlora") == (observed["linear4bit_bytes"] > 0)
    assert observed["steps"] == 2
    assert observed["examples"] == 16
    if method == "full":  # master weights are float32 whatever the compute type
        assert {value.dtype for value in tensors(out / "final").values()} == {torch.float32}


def test_what_a_finished_row_holds(folders, tmp_path):
    out = train(folders, tmp_path, fp32=True, eval_steps=2, save_steps=1, deterministic=True, batch_size_per_gpu=1)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(line["images_per_second"] > 0 and line["tokens_per_second"] > 0 for line in steps)
    assert all(line["padding_share"] == 0 for line in steps)  # one example a micro-batch
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    assert steps[1]["learning_rate"] == pytest.approx(2e-3)
    assert list((out / "tensorboard").glob("events.out.tfevents.*"))
    assert read(out / "manifest.json")["kind"] == "train"
    assert not (out / "checkpoints").exists()
    assert not (out / ".lock.json").exists()
    from phi3v.model import Phi3VForCausalLM, Phi3VProcessor

    Phi3VForCausalLM.from_pretrained(out / "final")
    Phi3VProcessor.from_pretrained(out / "final")


def test_a_finished_row_is_not_trained_again(folders, tmp_path, capfd):
    """Its outputs come back if they were removed; with other settings it is trained."""
    out = train(folders, tmp_path, fp32=True)
    weights, manifest, log = tensors(out / "final"), read(out / "manifest.json"), (out / "metrics.jsonl").read_bytes()
    shutil.rmtree(out / "final")
    train(folders, tmp_path, fp32=True)
    assert "already finished" in capfd.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == log
    assert read(out / "manifest.json") == manifest
    again = tensors(out / "final")
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)
    train(folders, tmp_path, fp32=True, learning_rate=1e-3)
    assert any(not torch.equal(weights[name], value) for name, value in tensors(out / "final").items())


def test_checkpoints_come_by_steps_and_by_the_clock(folders, tmp_path, monkeypatch):
    """Each as asked for, none after the last step, which the export follows; all go in the end."""
    from phi3v.training import writer

    written: list[int] = []
    seal = writer.seal
    monkeypatch.setattr(writer, "seal", lambda *given: (written.append(given[3]), seal(*given)))
    for number, (how, expected) in enumerate(
        [({"save_steps": 2}, [2]), ({"save_minutes": 1e-5}, [1, 2, 3]), ({}, []), ({"save_minutes": 60.0}, [])]
    ):
        written.clear()
        out = train(folders, tmp_path / str(number), fp32=True, **how)
        assert written == expected, how
        assert not (out / "checkpoints").exists()


@pytest.mark.parametrize("how", [{}, {"freeze_vision_model": "vision"}, {"use_lora": True}, {"use_qlora": True}])
def test_the_space_asked_for_is_what_a_checkpoint_takes(folders, tmp_path, monkeypatch, how):
    from phi3v.training import checkpoints, writer

    asked: list[tuple[int, int]] = []
    written: list[int] = []
    seal = writer.seal

    def measured(folder, *given):
        written.append(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
        seal(folder, *given)

    monkeypatch.setattr(writer, "seal", measured)
    monkeypatch.setattr(checkpoints, "check_space", lambda folder, needed, count: asked.append((needed, count)))
    best = {"eval_steps": 1, "keep_best": True} if not how else {}
    train(folders, tmp_path, fp32=True, save_steps=2, keep_checkpoints=3, **best, **how)
    ((needed, count),) = asked
    # Beside weights and optimizer there are a few small files.
    assert needed < written[0] < needed + 100_000
    assert count == 3 + 1 + bool(best)


def test_a_merged_model_beside_the_adapter(folders, tmp_path, capfd):
    from phi3v.model import Phi3VForCausalLM

    out = train(folders, tmp_path, fp32=True, use_lora=True, merge=True)
    assert (out / "final" / "adapter_config.json").is_file()
    assert "largest difference of logits" in capfd.readouterr().err
    moved = tensors(out / "merged")
    assert any(not torch.equal(value, moved[name]) for name, value in tensors(folders[0]).items())
    Phi3VForCausalLM.from_pretrained(out / "merged")
    assert (out / "merged" / "README.md").is_file()


@pytest.mark.parametrize("how", [{}, {"use_lora": True, "merge": True}, {"use_qlora": True}])
def test_what_is_saved_beside_the_weights(folders, tmp_path, how):
    """Files of the base that training does not change, its number of crops, and readable by whom the umask lets read."""
    before = os.umask(0o027)
    try:
        out = train(folders, tmp_path, fp32=True, num_crops=6, recompute_every=1, **how)
    finally:
        os.umask(before)
    for folder in [out / "final", *out.glob("merged")]:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "processor_config.json"):
            assert (folder / name).read_bytes() == (folders[0] / name).read_bytes(), name
        source = read(folders[0] / "preprocessor_config.json")
        assert source["num_crops"] == 2
        assert read(folder / "preprocessor_config.json") == source | {"num_crops": 6}
        if not (folder / "adapter_config.json").is_file():
            for name in ("config.json", "generation_config.json"):
                assert read(folder / name) == read(folders[0] / name), name
    modes = {path: path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o640}, modes


@pytest.mark.parametrize("lora", [True, False])
def test_a_checkpoint_of_a_running_job_answers_like_its_export(folders, tmp_path, monkeypatch, lora):
    import shutil

    from phi3v.data.conversations import DataError
    from phi3v.evaluation.generate import Predictor
    from phi3v.model.adapters import load_for_inference
    from phi3v.settings import Compute
    from phi3v.training.loop import Loop

    original = Loop.save

    def save(self):
        original(self)
        self.writer.finish()
        name = f"checkpoint-{self.state.step}"
        shutil.copytree(tmp_path / "checkpoints" / name, tmp_path / "kept" / name)
        self.module.save_pretrained(tmp_path / "exported")

    monkeypatch.setattr(Loop, "save", save)
    train(folders, tmp_path, fp32=True, use_lora=lora, save_steps=2)
    exported = dict(load_for_inference(tmp_path / "exported", torch.float32).named_parameters())
    (checkpoint,) = (tmp_path / "kept").iterdir()
    loaded = Predictor.load(checkpoint, Compute(fp32=True), torch.device("cpu"), 4)
    found = dict(loaded.model.named_parameters())
    assert found.keys() == exported.keys() and all(torch.equal(found[name], exported[name]) for name in found)
    base = dict(load_for_inference(folders[0], torch.float32).named_parameters())
    assert any(not torch.equal(found[name], base[name]) for name in found)
    assert loaded.processor.image_processor.num_crops == loaded.num_crops == 16  # the data's, not the base's
    (tmp_path / "settings.json").unlink()
    with pytest.raises(DataError, match=r"checkpoint-2: .*settings.json is missing; export"):
        Predictor.load(checkpoint, Compute(fp32=True), torch.device("cpu"), 4)


def test_a_merge_that_fails_costs_the_steps_since_the_last_checkpoint(folders, tmp_path, monkeypatch, capfd):
    from phi3v.training import checkpoints, export

    def refuse(*arguments):
        raise ValueError("the merged model differs.")

    merge = {"fp32": True, "use_lora": True, "save_steps": 2, "merge": True}
    with monkeypatch.context() as patch:
        patch.setattr(export, "merge", refuse)
        with pytest.raises(
            checkpoints.CheckpointError, match=r"merged: the merged model differs\. The adapter itself is complete"
        ):
            train(folders, tmp_path, **merge)
    assert not (tmp_path / "manifest.json").exists()
    assert (tmp_path / "final" / "adapter_config.json").is_file()
    train(folders, tmp_path, **merge)
    assert "checkpoint-2: resuming from here" in capfd.readouterr().err
    assert {"manifest.json", "merged"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "checkpoints").exists()


def test_no_adapter_is_read_through_the_first_gpu(folders, tmp_path, monkeypatch, capfd):
    """Merge and evaluation read it on the CPU, on a machine where PEFT would choose CUDA."""
    from peft import peft_model
    from peft.utils import save_and_load

    from phi3v.model.adapters import load_for_inference
    from phi3v.training import export

    devices: list[str] = []

    def recorded(file: str, device: str = "cpu") -> dict[str, torch.Tensor]:
        devices.append(device)
        return load_file(file)

    monkeypatch.setattr(save_and_load, "safe_load_file", recorded)
    for module in (save_and_load, peft_model):
        monkeypatch.setattr(module, "infer_device", lambda: "cuda")
    values = {"fp32": True, "use_lora": True, "save_steps": 2, "eval_steps": 2, "merge": True}
    with monkeypatch.context() as patch:
        patch.setattr(export, "merge", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(folders, tmp_path, keep_best=True, **values)
    assert not devices  # checkpoints hold weights, not an adapter folder
    train(folders, tmp_path, keep_best=True, **values)
    assert "checkpoint-4: resuming from here" in capfd.readouterr().err
    load_for_inference(tmp_path / "final", torch.float32)
    assert devices == ["cpu"] * len(devices)
    assert len(devices) >= 2


def test_the_best_weights_are_exported_and_training_stops_early(folders, tmp_path, capfd):
    """At an absurd learning rate the loss soon rises: the exported weights are those of the lowest validation loss."""
    out = train(
        folders, tmp_path, fp32=True, learning_rate=0.3, max_steps=12, eval_steps=1, keep_best=True,
        early_stopping_patience=3,
    )  # fmt: skip
    evals = [line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "eval_loss" in line]
    best = min(evals, key=lambda line: line["eval_loss"])
    assert len(evals) == best["step"] + 3 < 12
    assert "stopping early" in capfd.readouterr().err
    again = train(
        (out / "final", folders[1]),
        tmp_path / "again",
        fp32=True,
        max_steps=1,
        warmup_steps=0,
        eval_steps=1,
        learning_rate=1e-9,
    )
    value = json.loads((again / "metrics.jsonl").read_text().splitlines()[-1])["eval_loss"]
    assert value == pytest.approx(best["eval_loss"], rel=1e-5)


def test_a_job_that_stopped_early_makes_no_further_step_when_it_resumes(folders, tmp_path, monkeypatch):
    from phi3v.training import finetune

    def fail(*arguments):
        raise RuntimeError("killed while exporting")

    values = {
        "fp32": True, "learning_rate": 0.3, "max_steps": 12, "eval_steps": 1, "early_stopping_patience": 1,
        "save_steps": 1,
    }  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(finetune, "export_final", fail)
        with pytest.raises(RuntimeError, match="killed"):
            train(folders, tmp_path, **values)
    before = (tmp_path / "metrics.jsonl").read_text()
    assert 1 < json.loads(before.splitlines()[-1])["step"] < 12
    train(folders, tmp_path, **values)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_two_deterministic_runs_are_bitwise_equal(folders, tmp_path):
    first, second = (train(folders, tmp_path / n, bf16=True, use_lora=True, deterministic=True) for n in "ab")
    other = train(folders, tmp_path / "c", bf16=True, use_lora=True, deterministic=True, seed=7)
    a, b, c = (tensors(out / "final") for out in (first, second, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_a_loss_that_is_no_number_stops_with_the_examples(folders, tmp_path):
    from phi3v.training.census import NotANumberError

    model = write_model(tmp_path / "model")
    path = model / "model.safetensors"
    state = load_file(path)
    state["lm_head.weight"][:] = float("nan")
    from safetensors.torch import save_file

    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(NotANumberError, match=r"2 steps in a row; .*bad_examples"):
        train((model, folders[1]), tmp_path / "out", fp32=True, max_nan_steps=2)
    saved = read(tmp_path / "out" / "bad_examples.rank0.json")
    assert [len(ids) for ids in saved["ids"]] == [8, 8]
    assert saved["ids"][0][0].startswith("train-")
    assert not (tmp_path / "out" / "final").exists()


def test_a_collapsed_loss_scale_is_named_once(tmp_path, capfd):
    """Below 1 no scale helps: gradients overflow in float16 as they are."""
    from phi3v.training.census import LossGuard

    scale = iter([65536.0, 0.5, 0.25])
    guard = LossGuard(tmp_path, 0, 3, lambda: next(scale))
    for step in (1, 2, 3):
        guard.check(step, 1.0, [])
    said = capfd.readouterr().err
    assert said.count("the float16 loss scale has dropped to 0.5") == said.count("dropped") == 1
    assert said.startswith("step 2: ")


def test_out_of_memory_is_one_message_with_three_settings():
    from phi3v.training.memory import OutOfMemoryError, explain_memory

    chosen = {"model_name_or_path": "m", "output_dir": "o", "batch_size_per_gpu": 4, "gradient_checkpointing": False}
    with (
        pytest.raises(OutOfMemoryError) as error,
        explain_memory(validate(FinetuneSettings, chosen, "test"), torch.device("cpu")),
    ):
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB. More words")
    said = str(error.value)
    assert said.startswith("out of memory on CPU")
    assert "tried to allocate 20.00 GiB. Try first: --batch_size_per_gpu 1 (now 4; " in said
    assert said.endswith("--gradient_checkpointing (now off); --use_flash_attention (now off)")


def test_out_of_memory_while_the_job_is_built_is_explained_too(folders, tmp_path, monkeypatch):
    """DeepSpeed's float32 copies and optimizer states are allocated before the first step."""
    from phi3v.training import job
    from phi3v.training.memory import OutOfMemoryError

    def too_large(*arguments):
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    monkeypatch.setattr(job, "make_loop", too_large)
    with pytest.raises(OutOfMemoryError, match=r"out of memory on CPU.*Try first: "):
        train(folders, tmp_path, fp32=True)


def test_advice_on_memory_does_not_contradict_auto():
    from phi3v.training.memory import _what_helps

    def advice(**values):
        return " ".join(
            _what_helps(validate(FinetuneSettings, {"model_name_or_path": "m", "output_dir": "o"} | values, "test"))
        )

    for asked in ({"batch_size_per_gpu": "auto"}, {"gradient_checkpointing": "auto"}):
        assert "--optimizer adamw_8bit" in advice(**asked)
        assert "zero_stage" not in advice(**asked) and "offload" not in advice(**asked)
    assert "--zero_stage 3" in advice() and "--optimizer adamw_offload" in advice()
    assert "zero_stage" not in advice(optimizer="adamw_8bit")
    assert "--optimizer" not in advice(use_lora=True)


def test_a_layer_that_should_train_and_does_not_stops_the_job(folders, tmp_path, monkeypatch):
    """Gradients that stop on their way down, as in the published frozen rows: last norm and head still train."""
    from phi3v.training import job
    from phi3v.training.census import CensusError

    def cut(settings, device):
        model = load_model(settings, device)
        model.model.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(),))
        return model

    load_model = job.load_model
    monkeypatch.setattr(job, "load_model", cut)
    with pytest.raises(CensusError, match=r"group decoder, embedding: should train.*model\.layers\.0\."):
        train(folders, tmp_path, fp32=True, freeze_vision_model="vision")
    assert not (tmp_path / "final").exists()


def test_longer_examples_are_left_out_and_counted(folders, tmp_path, capfd):
    from phi3v.data.dataset import ConversationDataset
    from phi3v.data.lengths import lengths
    from phi3v.model import Phi3VProcessor

    dataset = ConversationDataset(folders[1], "train", Phi3VProcessor.from_pretrained(folders[0]))
    limit = sorted(lengths(dataset))[-5]
    longer = sum(length > limit for length in lengths(dataset))
    assert longer
    train(folders, tmp_path, fp32=True, max_steps=1, warmup_steps=0, max_length=limit)
    assert f"{20 - longer} examples, {longer} longer than {limit} tokens skipped" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 9, "batch_size_per_gpu": 2}, "`batch_size`: got 9: expected a multiple of 2"),
        ({"data_dir": "/nowhere"}, "`data_dir`: got '/nowhere': no such folder"),
        ({"model_name_or_path": "/nowhere"}, "`model_name_or_path`: got '/nowhere': .*config.json"),
        ({"max_length": 1}, "split train: .* at most 1 tokens"),
        ({"report_to": ["wand"]}, "`report_to`: got 'wand': expected .*tracker .*tensorboard"),
    ],
)
def test_wrong_settings_are_refused_before_training(folders, tmp_path, values, message):
    with pytest.raises(SettingsError, match=message):
        train(folders, tmp_path, fp32=True, **values)


def test_the_kernel_of_packed_batches_on_cuda_is_named():
    """Torch's own operator for them, in the form in which a forward pass shows it."""
    from torch.nn.attention import varlen

    from phi3v.model.runtime import _Operators, attention_kernel

    heads, ends = torch.zeros(4, 1, 8, dtype=torch.bfloat16), torch.tensor([0, 4], dtype=torch.int32)
    with _Operators() as seen, pytest.raises((RuntimeError, NotImplementedError)):  # no CPU kernel
        varlen.varlen_attn(heads, heads, heads, ends, ends, 4, 4)
    assert attention_kernel(seen.names, "sdpa") == "sdpa flash (varlen)"
    assert attention_kernel({"_new_attention_kernel", "mm"}, "sdpa") == "_new_attention_kernel"
    assert attention_kernel({"_softmax", "bmm"}, "eager") == "eager"
