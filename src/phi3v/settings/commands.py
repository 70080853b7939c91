"""The settings of the scripts, one model for each, and how a table's row becomes those of its commands.

Names and defaults are those of the recipe's scripts where they have them; the rest are ours and say so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, AliasGenerator, BeforeValidator, Field, model_validator

from phi3v.settings.base import Bare, Role, SettingsError, Strict, accepted_names, read_entries, validate
from phi3v.settings.entries import Dataset, Metric, dataset_key
from phi3v.settings.rows import (
    Dtype,
    Recipe,
    Seed,
    Training,
    WorkersOrAuto,
)


def _number_word(value: Any) -> Any:
    """A command line's digits as a number, which a Literal does not make of them."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


RECIPE_NAMES = {
    "epochs": "num_train_epochs",
    "flash_attention": "use_flash_attention",
    "metrics": "metric",
    "micro_batch_size": "batch_size_per_gpu",
    "weight_decay": "wd",
}
"""Our name of a setting, as in the tables, to the flag of the recipe's scripts, which works as well."""


def _names(name: str) -> str | AliasChoices:
    return AliasChoices(name, RECIPE_NAMES[name]) if name in RECIPE_NAMES else name


class Command(Strict, alias_generator=AliasGenerator(validation_alias=_names)):
    """Settings of a script: a flag for each field."""


class Compute(Command):
    """Where and in what a job computes. Without --bf16 in float16 mixed precision, as the recipe's flags choose it."""

    bf16: Annotated[bool, Role.NUMERICS] = False
    """Compute in bfloat16."""
    fp16: Annotated[bool, Role.NUMERICS] = False
    """Compute in float16 over float32 weights; what the recipe does without --bf16."""
    fp32: Annotated[bool, Role.NUMERICS] = False
    """Compute in float32 (ours)."""
    flash_attention: Annotated[bool, Role.NUMERICS] = False
    """Flash attention in both towers: the flash-attn package if it is installed, else PyTorch's own kernel. GPUs older
    than Ampere, and float32, run PyTorch's memory-efficient kernel instead."""
    expect_device: Annotated[Literal["cuda", "cpu"] | None, Role.RUNTIME] = None
    """cuda: refuse to start without a GPU that PyTorch can use. cpu: compute on the CPU even if the machine has GPUs. Left
    out: the GPU if there is one (ours)."""

    @model_validator(mode="after")
    def _one_dtype(self) -> Compute:
        chosen = [name for name in ("bf16", "fp16", "fp32") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"{', '.join(chosen)}: expected one of bf16, fp16, fp32")
        return self

    @property
    def dtype(self) -> Dtype:
        return "bf16" if self.bf16 else "fp32" if self.fp32 else "fp16"


class RowOptions(Compute):
    """Settings of scripts/finetune.py that a table's row, the run or the rule decides."""

    model_name_or_path: Annotated[str, Role.IDENTITY]
    """Checkpoint folder in the official layout."""
    output_dir: Annotated[str, Role.IDENTITY]
    """The row's folder."""
    data_dir: Annotated[str, Role.IDENTITY] = ""
    """Folder with images/ and the conversations jsonl of each split; left out: the dataset's folder in results/data."""
    dataset: Annotated[str, Role.IDENTITY] = ""
    """Entry of config/datasets.yaml, or any name where data_dir is given; left out: docvqa_mini."""
    full_train: Annotated[bool, Role.IDENTITY] = False
    """Train on the full DocVQA set: the dataset docvqa instead of docvqa_mini."""
    row: Annotated[str, Role.IDENTITY] = ""
    """Name of the table row, for the manifest."""
    use_lora: bool = False
    """Train low-rank adapters instead of the weights."""
    use_qlora: bool = False
    """The same over 4-bit (nf4) weights; implies --use_lora."""
    lora_rank: int = Field(64, ge=1)
    """Rank of the adapters."""
    lora_alpha_ratio: float = Field(2.0, gt=0)
    """Scale of the adapters over their rank."""
    # The recipe's flag is bare.
    freeze_vision_model: Annotated[Literal["no", "tower", "vision", "legacy"], Bare("vision")] = "no"
    """vision (also as a bare flag): freeze CLIP, projector and separators. legacy: the text embedding too, as the
    recipe's scripts did. tower: CLIP alone; projector and separators train (ours)."""
    seed: Annotated[Seed, Role.EQUIVALENT] = 42
    """Data order and initial adapters."""
    num_workers: Annotated[WorkersOrAuto, Role.RUNTIME] = "auto"
    """Data loading processes of each training process; auto: one less than its CPUs on a GPU, at most 8, none on a CPU."""
    tqdm: Annotated[bool, Role.RUNTIME] = True
    """Progress bar; --no-tqdm for sparse lines."""


LoraTarget = Literal[
    "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head",
    "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "img_projection",
]  # fmt: skip


class FurtherOptions(Command):
    """Settings of scripts/finetune.py that no column of a table has; a row's `finetune` may set them."""

    use_dora: bool = False
    """Weight-decomposed adapters (DoRA); needs --use_lora (ours)."""
    use_rslora: bool = False
    """Scale adapters by alpha / sqrt(rank) instead of alpha / rank (rsLoRA, Kalajdzievski 2023); needs --use_lora
    (ours)."""
    lora_targets: list[LoraTarget] = []
    """Linear layers with adapters, by the last part of their names; img_projection is the projector. Left out: all of
    them, as in the recipe (ours)."""
    freeze_decoder: bool = False
    """Freeze the text embedding, the decoder and the head. With --freeze_vision_model tower the projector and the
    separators alone train (ours)."""
    vision_learning_rate: float | None = Field(None, gt=0, lt=1)
    """Peak learning rate of CLIP, or of its adapters; left out: learning_rate (ours)."""
    projector_learning_rate: float | None = Field(None, gt=0, lt=1)
    """Peak learning rate of projector and separators, or of their adapters; left out: learning_rate (ours)."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """After the warm-up the learning rate falls to 0 in a line or half a cosine, or stays. constant has no warm-up. The
    names are transformers' (ours)."""
    max_tokens_per_micro_batch: Annotated[int | None, Role.EQUIVALENT] = Field(None, ge=1)
    """Micro-batches that would hold more tokens, padding included, are split; a longer example goes alone. The gradient
    is the same. Left out: no limit (ours)."""
    memory_limit_gb: Annotated[float | None, Role.RUNTIME] = Field(None, gt=0)
    """What auto may take of a device's memory, GB of 10^9 bytes; left out: what is free (ours)."""
    max_steps: int = Field(-1, ge=-1)
    """Optimizer steps, instead of epochs; -1: off (ours)."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's decay of the mean gradient."""
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW's decay of the mean squared gradient."""
    adam_epsilon: float = Field(1e-7, gt=0)
    """AdamW's term against division by zero."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_number_word), Role.EQUIVALENT] = 2
    """DeepSpeed ZeRO stage of full fine-tuning; LoRA and QLoRA use none. 0: plain data parallel; 1: whole gradients on
    each GPU, reduced once per step instead of after every micro-batch (both ours). The optimizer decides it unless it
    is adamw."""
    batching: Annotated[Literal["fixed", "length", "packed"], Role.EQUIVALENT] = "fixed"
    """Micro-batches in order, of like lengths, or packed to tokens_per_pack; the gradient is the same (ours)."""
    tokens_per_pack: Annotated[int, Role.EQUIVALENT] = Field(4096, ge=1)
    """Tokens of one packed forward pass at most; a longer example goes alone (ours)."""
    max_length: int | None = Field(None, ge=1)
    """Longer training examples are skipped and counted; empty: no limit (ours)."""
    save_steps: Annotated[int, Role.RUNTIME] = Field(0, ge=0)
    """Checkpoint every so many optimizer steps; 0: none between (ours)."""
    save_minutes: Annotated[float, Role.RUNTIME] = Field(0, ge=0)
    """Checkpoint after so many minutes; 0: off (ours)."""
    keep_checkpoints: Annotated[int, Role.RUNTIME] = Field(2, ge=1)
    """Newest checkpoints kept while training; all go after the final export (ours)."""
    eval_steps: int = Field(0, ge=0)
    """Validation loss every so many optimizer steps; 0: never (ours)."""
    eval_examples: int = Field(0, ge=0)
    """Examples of the validation split used for it; 0: all (ours)."""
    keep_best: bool = False
    """Export the weights with the lowest validation loss instead of the last ones; needs eval_steps (ours)."""
    early_stopping_patience: int = Field(0, ge=0)
    """Stop after so many validations without a lower loss; 0: off; needs eval_steps (ours)."""
    merge: Annotated[bool, Role.RUNTIME] = False
    """Also write OUTPUT_DIR/merged, the adapter merged into its base (ours)."""
    nan_patience: Annotated[int, Role.RUNTIME] = Field(3, ge=1)
    """Stop after so many optimizer steps in a row whose loss is not a number (ours)."""
    deterministic: Annotated[bool, Role.EQUIVALENT] = False
    """Only kernels that repeat bit by bit; two runs on a CPU then give equal weights (ours)."""
    report_to: Annotated[list[str], Role.RUNTIME] = []
    """Trackers beside metrics.jsonl and TensorBoard, by accelerate's names: wandb, mlflow, trackio … (ours)."""
    lock_wait_minutes: Annotated[float, Role.RUNTIME] = Field(0, ge=0)
    """How long to wait for another job that is alive and owns output_dir; 0: refuse at once (ours)."""


_ZERO_OF_OPTIMIZER: dict[str, tuple[Literal[0, 3], str]] = {
    "adamw_8bit": (
        0,
        _8_BIT := "because bitsandbytes updates tensors below 2^31 elements and ZeRO joins all weights into one",
    ),
    "paged_adamw_8bit": (0, _8_BIT),
    "adamw_offload": (3, "which sums the gradients of micro-batches in float32"),
}
"""Optimizer to the ZeRO stage that full fine-tuning needs with it, and why."""


_VISION = ("clip", "projector", "separators")


class FinetuneSettings(FurtherOptions, Recipe, RowOptions):
    """scripts/finetune.py"""

    batch_size: int = Field(16, ge=1)
    """Examples of one optimizer step over all processes."""

    @model_validator(mode="after")
    def _follows(self) -> FinetuneSettings:
        """What other settings decide. In place: a copy would be lost where the constructor is called."""
        if self.use_qlora:
            object.__setattr__(self, "use_lora", True)
        stage, why = _ZERO_OF_OPTIMIZER.get(self.optimizer, (self.zero_stage, ""))
        if self.optimizer == "adamw_offload" and self.use_lora:
            raise ValueError("optimizer: adamw_offload, with adapters, whose states are small; expected adamw")
        if "zero_stage" in self.model_fields_set and self.zero_stage != stage and not self.use_lora:
            raise ValueError(f"zero_stage: {self.zero_stage}, with optimizer {self.optimizer}; expected {stage}, {why}")
        object.__setattr__(self, "zero_stage", stage)
        return self

    @model_validator(mode="after")
    def _belong_together(self) -> FinetuneSettings:
        if self.use_lora and self.freeze_vision_model == "legacy":
            raise ValueError("freeze_vision_model: legacy, with adapters: expected no or vision")
        if self.full_train and self.dataset not in ("", "docvqa"):
            raise ValueError(
                f"full_train: selects the dataset docvqa, got --dataset {self.dataset}; give one of the two"
            )
        for name in ("use_dora", "use_rslora", "lora_targets"):
            if getattr(self, name) and not self.use_lora:
                raise ValueError(f"{name}: without adapters; expected --use_lora or --use_qlora beside it")
        if self.freeze_decoder and self.freeze_vision_model not in ("no", "tower"):
            raise ValueError(
                f"freeze_decoder: with freeze_vision_model {self.freeze_vision_model} nothing would train; expected no "
                "or tower"
            )
        for part, group in (("vision", "clip"), ("projector", "projector")):
            if getattr(self, f"{part}_learning_rate") is not None and group in self.frozen_groups:
                raise ValueError(
                    f"{part}_learning_rate: set, but freeze_vision_model {self.freeze_vision_model} freezes that part"
                )
        if self.max_tokens_per_micro_batch is not None and self.batching == "packed":
            raise ValueError("max_tokens_per_micro_batch: with packed batches; expected --tokens_per_pack instead")
        if self.merge and not self.use_lora:
            raise ValueError("merge: without adapters; full fine-tuning writes a whole checkpoint in any case")
        for name, expected in (
            ("micro_batch_size", "a number"),
            ("gradient_checkpointing", "--gradient_checkpointing or --no-gradient_checkpointing"),
        ):
            if getattr(self, name) == "auto" and self.batching == "packed":
                raise ValueError(
                    f"{name}: auto, with packed batches, which --tokens_per_pack limits; expected {expected}"
                )
            if getattr(self, name) == "auto" and self.zero_stage == 3 and not self.use_lora:
                why = "whose weights are in shards before anything can be probed"
                raise ValueError(f"{name}: auto, with zero_stage 3, {why}; expected {expected}")
        if self.recompute_every > 1 and self.gradient_checkpointing is not True:
            raise ValueError("recompute_every: set, but gradient_checkpointing is not on")
        if self.memory_limit_gb is not None and not self.is_probed:
            raise ValueError("memory_limit_gb: set, but neither micro_batch_size nor gradient_checkpointing is auto")
        for name in ("keep_best", "early_stopping_patience"):
            if getattr(self, name) and not self.eval_steps:
                raise ValueError(f"{name}: set, but eval_steps is 0; expected --eval_steps N")
        return self

    @property
    def is_probed(self) -> bool:
        """Whether something is found before training by running real passes."""
        return "auto" in (self.micro_batch_size, self.gradient_checkpointing)

    @property
    def method(self) -> Literal["full", "frozen", "lora", "qlora"]:
        """The method's name in the tables."""
        if self.use_lora:
            return "qlora" if self.use_qlora else "lora"
        return "full" if self.freeze_vision_model in ("no", "tower") else "frozen"

    @property
    def frozen_groups(self) -> frozenset[str]:
        """The groups of weights (phi3v.model.modeling.GROUPS) that neither train nor get adapters."""
        frozen = {"no": (), "tower": ("clip",), "vision": _VISION, "legacy": (*_VISION, "embedding")}
        decoder = ("embedding", "decoder", "head") if self.freeze_decoder else ()
        return frozenset((*frozen[self.freeze_vision_model], *decoder))

    def data_folder(self, root: Path | None = None) -> Path:
        """data_dir, or the folder that `snakemake -c2 data` makes for the dataset; raises SettingsError when missing.

        root: repository root, where config/ and results/ are; left out: the working directory.
        """
        if self.data_dir:
            folder = Path(self.data_dir)
            if not folder.is_dir():
                raise SettingsError(f"command line: field `data_dir`: got {self.data_dir!r}: no such folder")
            return folder
        root = root or Path()
        name = self.dataset or ("docvqa" if self.full_train else "docvqa_mini")
        entries = read_entries(["config/datasets.yaml"], Dataset, root)
        if name not in entries:
            raise SettingsError(
                f"command line: field `dataset`: got {name!r}: not in config/datasets.yaml; expected one of "
                f"{', '.join(sorted(entries))}, or --data_dir FOLDER"
            )
        folder = root / "results" / "data" / dataset_key(name, entries[name])
        if not folder.is_dir():
            raise SettingsError(
                f"command line: dataset {name}: folder {folder} is missing; make it with `snakemake -c2 data`, or give "
                "--data_dir FOLDER"
            )
        return folder


class SpeedSettings(FinetuneSettings):
    """scripts/speed.py"""

    speed_warmup_steps: Annotated[int, Role.RUNTIME] = Field(10, ge=10)
    """Optimizer steps before the clock starts."""
    timed_steps: Annotated[int, Role.RUNTIME] = Field(20, ge=1)
    """Optimizer steps of one timed window."""
    repeats: Annotated[int, Role.RUNTIME] = Field(3, ge=3)
    """Timed windows."""
    expect_processes: Annotated[int, Role.RUNTIME] = Field(0, ge=0)
    """Processes the published row ran; another number here is an error unless --stand_in. 0: as many as there are."""
    expect_hardware: Annotated[str, Role.RUNTIME] = ""
    """Hardware entry the published row ran on; other devices here are an error unless --stand_in. Empty: any."""
    hardware: Annotated[list[str], Role.RUNTIME] = ["config/hardware.yaml"]
    """Hardware files: peaks for MFU and HFU, and names of devices."""
    stand_in: Annotated[bool, Role.RUNTIME] = False
    """These processes stand for the published machines; the result is labelled so."""
    profile: Annotated[bool, Role.RUNTIME] = False
    """Then profile three more steps: a torch profiler trace and the 20 longest operators, in OUTPUT_DIR/profile."""

    @property
    def timed_until(self) -> int:
        """Optimizer steps until the last window ends."""
        return self.speed_warmup_steps + self.repeats * self.timed_steps


class Answering(Compute):
    """How a model answers questions in batches."""

    model_name_or_path: Annotated[str, Role.IDENTITY]
    """Checkpoint folder, adapter folder (which names its base), or hub id OWNER/NAME, also OWNER/NAME@REVISION."""
    num_crops: int | None = Field(None, ge=1, le=64)
    """Largest number of tiles of an image; left out: the data folder's, else 16; predict.py: the checkpoint's."""
    batch_size_per_gpu: Annotated[int, Role.EQUIVALENT] = Field(8, ge=1)
    """Prompts generated together by one process."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest answer; left out: the data folder's, else 64."""
    num_workers: Annotated[WorkersOrAuto, Role.RUNTIME] = "auto"
    """Threads of each process that decode the next pictures; auto: as in training."""
    tqdm: Annotated[bool, Role.RUNTIME] = True
    """Progress bar; --no-tqdm for sparse lines."""


class EvaluateSettings(Answering):
    """scripts/evaluate.py"""

    data_dir: Annotated[str, Role.IDENTITY]
    """Folder with images/ and the conversations jsonl of each split."""
    output_dir: Annotated[str, Role.IDENTITY]
    """Where predictions and metrics go, one folder a pass."""
    train_dir: str = ""
    """Data folder whose training split is searched for the same pictures; left out: data_dir."""
    split: str = "val"
    """Split to evaluate."""
    dataset: Annotated[str, Role.IDENTITY] = ""
    """Name of the data, for messages and the manifest."""
    row: Annotated[str, Role.IDENTITY] = ""
    """Name of the table row, for the manifest."""
    metrics: list[Metric] = []
    """Scores of an answer, the main one first (docs/reference/metrics.md lists them); left out: the data folder's."""
    group_by: str = ""
    """Field of the examples' `meta`: the main metric is also given for each of its values; left out: the data folder's."""
    passes: Annotated[list[Literal["before", "after", "control"]], Role.RUNTIME] = ["after"]
    """control: with the pictures swapped among the examples."""
    seed: Annotated[Seed, Role.EQUIVALENT] = 42
    """Order of the control's swap."""


class ScoreSettings(Command):
    """scripts/score.py"""

    input_dir: Annotated[str, Role.IDENTITY]
    """Result of scripts/evaluate.py."""
    output_dir: Annotated[str, Role.IDENTITY] = ""
    """Where the scored predictions go; left out: input_dir."""
    metrics: list[Metric] = Field(min_length=1)
    """Scores of an answer, the main one first; FILE.py:FUNCTION is a function of yours (docs/reference/metrics.md)."""
    group_by: str = ""
    """Field of the examples' `meta`: the main metric is also given for each of its values."""
    compare: Annotated[str, Role.RUNTIME] = ""
    """Folder of another pass on the same examples: the difference of each metric is printed with its interval."""
    seed: Annotated[Seed, Role.EQUIVALENT] = 42
    """Seed of the bootstrap intervals."""


class PredictSettings(Answering):
    """scripts/predict.py"""

    question: str = ""
    """What is asked about --image or each picture of --folder, or of a table without a question column; pictures come first."""
    image: list[str] = []
    """Picture files of one question, in order; the answer goes to standard output."""
    table: Annotated[str, Role.IDENTITY] = ""
    """Rows to answer, each with a picture and a question: csv, tsv, json, jsonl or parquet."""
    columns: list[str] = []
    """What the table's columns are, ROLE=COLUMN each: image=photo question=prompt id=number."""
    images_dir: Annotated[str, Role.IDENTITY] = ""
    """Where the table's picture paths start; left out: beside the table."""
    folder: Annotated[str, Role.IDENTITY] = ""
    """Folder whose pictures are answered, with its subfolders."""
    output_dir: Annotated[str, Role.IDENTITY] = ""
    """Where answers.jsonl and answers.csv of a table or folder go."""

    @model_validator(mode="after")
    def _one_source(self) -> PredictSettings:
        given = [name for name in ("image", "table", "folder") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: expected one of image, table and folder")
        if not self.question and not self.table:
            raise ValueError("question: missing; expected what is asked about the pictures")
        if given in (["table"], ["folder"]) and not self.output_dir:
            raise ValueError("output_dir: missing; expected where the answers go")
        if wrong := [column for column in self.columns if not re.fullmatch(r"\w+=.+", column, re.DOTALL)]:
            raise ValueError(f"columns: got {wrong[0]!r}; expected ROLE=COLUMN, such as image=photo")
        return self


class ServeSettings(Compute):
    """scripts/serve.py"""

    model_name_or_path: Annotated[str, Role.IDENTITY]
    """Checkpoint folder, adapter folder, a running job's checkpoints/checkpoint-N, or hub id OWNER/NAME."""
    base: str = ""
    """Another model whose answers stand beside them, such as the one that training started from; left out: none."""
    num_crops: int | None = Field(None, ge=1, le=64)
    """Largest number of tiles of an image; left out: each model's own."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest answer."""
    host: Annotated[str, Role.RUNTIME] = "127.0.0.1"
    """Address that the page listens on. Anybody who reaches another address than this machine's own may ask the model."""
    port: Annotated[int, Role.RUNTIME] = Field(8501, ge=1, le=65535)
    """Port of the page."""


class ReportSettings(Command):
    """scripts/report.py"""

    config: str
    """The run's configuration file."""
    results: str | None = None
    """The run's results; left out: results/NAME."""
    output_dir: str | None = None
    """Where the report goes; left out: RESULTS/report."""
    partial: bool = False
    """The run ended before all of its rows were done: the page says so."""


def row_values(row: Training) -> dict[str, Any]:
    """What a row says of scripts/finetune.py's settings; the columns of other names are converted here, once."""
    columns = {
        name: getattr(row, name)
        for name, field in type(row).model_fields.items()
        if name in accepted_names(FinetuneSettings) and getattr(row, name) is not None
    }
    adapters = row.method in ("lora", "qlora")
    if row.lora_rank is not None and row.lora_alpha is not None:
        columns["lora_alpha_ratio"] = row.lora_alpha / row.lora_rank
    freezing: Literal["no", "vision", "legacy"] = "no"
    if row.method == "frozen":
        freezing = "legacy" if row.legacy_freezing else "vision"
    return columns | {
        row.dtype: True,
        "use_lora": adapters,
        "use_qlora": row.method == "qlora",
        "freeze_vision_model": freezing,
    }


def own_settings(row: Training, where: str, /, **decided: Any) -> FinetuneSettings:
    """A row's settings of scripts/finetune.py, with its `finetune`; `decided`: what the run and the rule say.

    Raises SettingsError where `finetune` names no setting, or one that is decided elsewhere, or has a wrong value.
    """
    for name in row.finetune:
        if name not in FurtherOptions.model_fields:
            kind = "has a field of the row or run" if name in accepted_names(FinetuneSettings) else "unknown"
            expected = ", ".join(sorted(FurtherOptions.model_fields))
            raise SettingsError(f"{where}: field `finetune.{name}`: {kind}; expected one of {expected}")
    folders = {"model_name_or_path": row.model, "output_dir": row.row}
    return validate(FinetuneSettings, {**folders, **row_values(row), **decided, **row.finetune}, where)
