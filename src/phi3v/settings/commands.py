"""Settings of the scripts, one model per script, and the conversion of a table row to these settings.

Names and defaults follow the recipe's scripts. Settings that the recipe does not have are marked in their help text.
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
    """Converts digits from a command line to a number. A Literal does not do that itself."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


RECIPE_NAMES = {
    "epochs": "num_train_epochs",
    "flash_attention": "use_flash_attention",
    "metrics": "metric",
    "micro_batch_size": "batch_size_per_gpu",
    "weight_decay": "wd",
}
"""Name of a setting in our tables to the flag of the recipe's scripts, which is accepted too."""


def _names(name: str) -> str | AliasChoices:
    return AliasChoices(name, RECIPE_NAMES[name]) if name in RECIPE_NAMES else name


class Command(Strict, alias_generator=AliasGenerator(validation_alias=_names)):
    """Settings of a script, one flag per field."""


class Compute(Command):
    """Device and dtype of a job. Without --bf16 or --fp32, a job computes in float16 mixed precision, as in the
    recipe."""

    bf16: Annotated[bool, Role.NUMERICS] = False
    """Compute in bfloat16."""
    fp16: Annotated[bool, Role.NUMERICS] = False
    """Compute in float16 mixed precision with float32 weights. This is the default, as in the recipe."""
    fp32: Annotated[bool, Role.NUMERICS] = False
    """Compute in float32 (not in the recipe)."""
    flash_attention: Annotated[bool, Role.NUMERICS] = False
    """Use flash attention in the vision tower and the decoder: the flash-attn package if installed, else PyTorch's
    kernel. GPUs older than Ampere, and float32, use PyTorch's memory-efficient kernel instead."""
    expect_device: Annotated[Literal["cuda", "cpu"] | None, Role.RUNTIME] = None
    """cuda: refuse to start without a GPU that PyTorch can use. cpu: compute on the CPU even if the machine has GPUs.
    Default: use a GPU if there is one (not in the recipe)."""

    @model_validator(mode="after")
    def _one_dtype(self) -> Compute:
        chosen = [name for name in ("bf16", "fp16", "fp32") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"{', '.join(chosen)}: mutually exclusive; expected only one of bf16, fp16, fp32")
        return self

    @property
    def dtype(self) -> Dtype:
        return "bf16" if self.bf16 else "fp32" if self.fp32 else "fp16"


class RowOptions(Compute):
    """Settings of scripts/finetune.py that come from the table row, the run, or the workflow rule."""

    model_name_or_path: Annotated[str, Role.IDENTITY]
    """Checkpoint folder in the official layout."""
    output_dir: Annotated[str, Role.IDENTITY]
    """Output folder."""
    data_dir: Annotated[str, Role.IDENTITY] = ""
    """Folder with images/ and one JSONL file of conversations per split. Default: the dataset's folder in
    results/data."""
    dataset: Annotated[str, Role.IDENTITY] = ""
    """Entry of config/datasets.yaml, or any name if data_dir is set. Default: docvqa_mini."""
    full_train: Annotated[bool, Role.IDENTITY] = False
    """Train on the full DocVQA training set (dataset docvqa instead of docvqa_mini)."""
    row: Annotated[str, Role.IDENTITY] = ""
    """Name of the table row, written to the manifest."""
    use_lora: bool = False
    """Train low-rank adapters instead of the full weights."""
    use_qlora: bool = False
    """Train low-rank adapters on 4-bit (nf4) weights. Implies --use_lora."""
    lora_rank: int = Field(64, ge=1)
    """Rank of the adapters."""
    lora_alpha_ratio: float = Field(2.0, gt=0)
    """lora_alpha divided by lora_rank."""
    # The recipe's flag is bare.
    freeze_vision_model: Annotated[Literal["no", "tower", "vision", "legacy"], Bare("vision")] = "no"
    """vision (also the flag without a value): freeze CLIP, the projector and the separators. legacy: also freeze the
    text embedding, as the recipe's scripts did. tower: freeze only CLIP (not in the recipe)."""
    seed: Annotated[Seed, Role.EQUIVALENT] = 42
    """Seed of the data order and of the initial adapter weights."""
    num_workers: Annotated[WorkersOrAuto, Role.RUNTIME] = "auto"
    """Data loading processes per training process. auto: on a GPU, its share of CPUs minus one, at most 8; on a CPU,
    none."""
    tqdm: Annotated[bool, Role.RUNTIME] = True
    """Show a progress bar. --no-tqdm prints a line now and then instead."""


LoraTarget = Literal[
    "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head",
    "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "img_projection",
]  # fmt: skip


class FurtherOptions(Command):
    """Settings of scripts/finetune.py without a table column. Set them in a row's `finetune` field."""

    use_dora: bool = False
    """Train weight-decomposed adapters (DoRA). Requires --use_lora (not in the recipe)."""
    use_rslora: bool = False
    """Scale adapters by alpha / sqrt(rank) instead of alpha / rank (rsLoRA, Kalajdzievski 2023). Requires --use_lora
    (not in the recipe)."""
    lora_targets: list[LoraTarget] = []
    """Linear layers that get adapters, by the last part of their names. img_projection is the projector. Default: all
    of them, as in the recipe (choice not in the recipe)."""
    freeze_decoder: bool = False
    """Freeze the text embedding, the decoder and the head. With --freeze_vision_model tower, only the projector and the
    separators train (not in the recipe)."""
    vision_learning_rate: float | None = Field(None, gt=0, lt=1)
    """Peak learning rate of CLIP or its adapters. Default: learning_rate (not in the recipe)."""
    projector_learning_rate: float | None = Field(None, gt=0, lt=1)
    """Peak learning rate of the projector and separators or their adapters. Default: learning_rate (not in the
    recipe)."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Learning rate after warm-up: linear or cosine decay to 0, or constant. `constant` has no warm-up. The names are
    those of transformers (not in the recipe)."""
    max_tokens_per_micro_batch: Annotated[int | None, Role.EQUIVALENT] = Field(None, ge=1)
    """Split micro-batches that contain more tokens than this, padding included. A longer example forms its own
    micro-batch. The gradient is the same. Default: no limit (not in the recipe)."""
    memory_limit_gb: Annotated[float | None, Role.RUNTIME] = Field(None, gt=0)
    """Memory per device that `auto` settings may use, in GB (10^9 bytes). Default: the free memory (not in the
    recipe)."""
    max_steps: int = Field(-1, ge=-1)
    """Number of optimizer steps, instead of epochs. -1: off (not in the recipe)."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's decay rate of the mean of the gradients."""
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW's decay rate of the mean of the squared gradients."""
    adam_epsilon: float = Field(1e-7, gt=0)
    """AdamW's epsilon, which is added to the denominator."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Clip gradients to this norm."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_number_word), Role.EQUIVALENT] = 2
    """DeepSpeed ZeRO stage of full fine-tuning; LoRA and QLoRA use no ZeRO. 0: plain data parallel. 1: each GPU keeps
    all gradients and reduces them once per step instead of after every micro-batch (0 and 1 are not in the recipe).
    Optimizers other than adamw determine the stage."""
    batching: Annotated[Literal["fixed", "length", "packed"], Role.EQUIVALENT] = "fixed"
    """How examples form micro-batches. fixed: in order. length: by similar length. packed: joined up to tokens_per_pack
    tokens. The gradient is the same (not in the recipe)."""
    tokens_per_pack: Annotated[int, Role.EQUIVALENT] = Field(4096, ge=1)
    """Maximum number of tokens in one packed forward pass. A longer example gets its own pass (not in the recipe)."""
    max_length: int | None = Field(None, ge=1)
    """Skip and count training examples with more tokens. Default: no limit (not in the recipe)."""
    save_steps: Annotated[int, Role.RUNTIME] = Field(0, ge=0)
    """Save a checkpoint every N optimizer steps. 0: off (not in the recipe)."""
    save_minutes: Annotated[float, Role.RUNTIME] = Field(0, ge=0)
    """Save a checkpoint every N minutes. 0: off (not in the recipe)."""
    keep_checkpoints: Annotated[int, Role.RUNTIME] = Field(2, ge=1)
    """Number of newest checkpoints to keep during training. The final export deletes all of them (not in the
    recipe)."""
    eval_steps: int = Field(0, ge=0)
    """Compute the validation loss every N optimizer steps. 0: never (not in the recipe)."""
    eval_examples: int = Field(0, ge=0)
    """Number of validation examples for the validation loss. 0: all (not in the recipe)."""
    keep_best: bool = False
    """Export the weights with the lowest validation loss, not the last ones. Requires eval_steps (not in the
    recipe)."""
    early_stopping_patience: int = Field(0, ge=0)
    """Stop after N validations in a row without a lower loss. 0: off. Requires eval_steps (not in the recipe)."""
    merge: Annotated[bool, Role.RUNTIME] = False
    """Also write OUTPUT_DIR/merged, the base model with the adapter merged into it (not in the recipe)."""
    max_nan_steps: Annotated[int, Role.RUNTIME] = Field(3, ge=1)
    """Stop after N optimizer steps in a row whose loss is NaN or infinite (not in the recipe)."""
    deterministic: Annotated[bool, Role.EQUIVALENT] = False
    """Use only deterministic kernels. Two runs on a CPU then give equal weights (not in the recipe)."""
    report_to: Annotated[list[str], Role.RUNTIME] = []
    """Trackers besides metrics.jsonl and TensorBoard, by accelerate's names: wandb, mlflow, trackio … (not in the
    recipe)."""
    lock_wait_minutes: Annotated[float, Role.RUNTIME] = Field(0, ge=0)
    """Minutes to wait for a running job that uses the same output_dir. 0: fail at once (not in the recipe)."""


_ZERO_OF_OPTIMIZER: dict[str, tuple[Literal[0, 3], str]] = {
    "adamw_8bit": (
        0,
        _8_BIT
        := "because bitsandbytes supports tensors below 2^31 elements and ZeRO joins all weights into one tensor",
    ),
    "paged_adamw_8bit": (0, _8_BIT),
    "adamw_offload": (3, "which sums the gradients of micro-batches in float32"),
}
"""Optimizer to the ZeRO stage that full fine-tuning requires with it, and the reason."""


_VISION = ("clip", "projector", "separators")


class FinetuneSettings(FurtherOptions, Recipe, RowOptions):
    """scripts/finetune.py"""

    batch_size: int = Field(16, ge=1)
    """Examples of one optimizer step over all processes."""

    @model_validator(mode="after")
    def _follows(self) -> FinetuneSettings:
        """Sets fields that follow from others. Works in place, because the caller of the constructor keeps this
        object."""
        if self.use_qlora:
            object.__setattr__(self, "use_lora", True)
        stage, why = _ZERO_OF_OPTIMIZER.get(self.optimizer, (self.zero_stage, ""))
        if self.optimizer == "adamw_offload" and self.use_lora:
            raise ValueError(
                "optimizer: adamw_offload, but adapters have small optimizer states that need no offloading; expected "
                "adamw"
            )
        if "zero_stage" in self.model_fields_set and self.zero_stage != stage and not self.use_lora:
            raise ValueError(
                f"zero_stage: {self.zero_stage}, but the optimizer is {self.optimizer}; expected {stage}, {why}"
            )
        object.__setattr__(self, "zero_stage", stage)
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> FinetuneSettings:
        if self.use_lora and self.freeze_vision_model == "legacy":
            raise ValueError("freeze_vision_model: legacy, but --use_lora or --use_qlora is set; expected no or vision")
        if self.full_train and self.dataset not in ("", "docvqa"):
            raise ValueError(
                f"full_train: selects the dataset docvqa, but --dataset {self.dataset} is set; remove one of the two"
            )
        for name in ("use_dora", "use_rslora", "lora_targets"):
            if getattr(self, name) and not self.use_lora:
                raise ValueError(f"{name}: set, but adapters are off; add --use_lora or --use_qlora")
        if self.freeze_decoder and self.freeze_vision_model not in ("no", "tower"):
            raise ValueError(
                f"freeze_decoder: set, but freeze_vision_model {self.freeze_vision_model} would leave nothing to "
                "train; "
                "expected freeze_vision_model no or tower"
            )
        for part, group in (("vision", "clip"), ("projector", "projector")):
            if getattr(self, f"{part}_learning_rate") is not None and group in self.frozen_groups:
                raise ValueError(
                    f"{part}_learning_rate: set, but freeze_vision_model {self.freeze_vision_model} freezes that part; "
                    "remove one of the two"
                )
        if self.max_tokens_per_micro_batch is not None and self.batching == "packed":
            raise ValueError("max_tokens_per_micro_batch: set, but batching is packed; use --tokens_per_pack instead")
        if self.merge and not self.use_lora:
            raise ValueError(
                "merge: set, but adapters are off; full fine-tuning already writes a complete checkpoint, so remove "
                "--merge"
            )
        for name, expected in (
            ("micro_batch_size", "a number"),
            ("gradient_checkpointing", "--gradient_checkpointing or --no-gradient_checkpointing"),
        ):
            if getattr(self, name) == "auto" and self.batching == "packed":
                raise ValueError(
                    f"{name}: auto, but batching is packed, where --tokens_per_pack sets the size; expected {expected}"
                )
            if getattr(self, name) == "auto" and self.zero_stage == 3 and not self.use_lora:
                why = "which splits the weights over the GPUs before a trial step can run"
                raise ValueError(f"{name}: auto, but zero_stage is 3, {why}; expected {expected}")
        if self.recompute_every > 1 and self.gradient_checkpointing is not True:
            raise ValueError(
                "recompute_every: set, but gradient_checkpointing is not on; set gradient_checkpointing to yes"
            )
        if self.memory_limit_gb is not None and not self.is_probed:
            raise ValueError(
                "memory_limit_gb: set, but neither micro_batch_size nor gradient_checkpointing is auto; remove it or "
                "set "
                "one of them to auto"
            )
        for name in ("keep_best", "early_stopping_patience"):
            if getattr(self, name) and not self.eval_steps:
                raise ValueError(f"{name}: set, but eval_steps is 0; expected --eval_steps N")
        return self

    @property
    def is_probed(self) -> bool:
        """Whether trial steps before training choose the micro-batch size or the recomputation."""
        return "auto" in (self.micro_batch_size, self.gradient_checkpointing)

    @property
    def method(self) -> Literal["full", "frozen", "lora", "qlora"]:
        """Name of the method in the tables."""
        if self.use_lora:
            return "qlora" if self.use_qlora else "lora"
        return "full" if self.freeze_vision_model in ("no", "tower") else "frozen"

    @property
    def frozen_groups(self) -> frozenset[str]:
        """Groups of weights (phi3v.model.modeling.GROUPS) that neither train nor get adapters."""
        frozen = {"no": (), "tower": ("clip",), "vision": _VISION, "legacy": (*_VISION, "embedding")}
        decoder = ("embedding", "decoder", "head") if self.freeze_decoder else ()
        return frozenset((*frozen[self.freeze_vision_model], *decoder))

    def data_folder(self, root: Path | None = None) -> Path:
        """data_dir, or the folder that `snakemake -c2 data` writes for the dataset. Raises SettingsError if it is
        missing.

        root: repository root, which contains config/ and results/. Default: the working directory.
        """
        if self.data_dir:
            folder = Path(self.data_dir)
            if not folder.is_dir():
                raise SettingsError(
                    f"command line: field `data_dir`: got {self.data_dir!r}: no such folder; expected a folder with "
                    "images/ and one JSONL file per split"
                )
            return folder
        root = root or Path()
        name = self.dataset or ("docvqa" if self.full_train else "docvqa_mini")
        entries = read_entries(["config/datasets.yaml"], Dataset, root)
        if name not in entries:
            raise SettingsError(
                f"command line: field `dataset`: got {name!r}: not in config/datasets.yaml; expected one of "
                f"{', '.join(sorted(entries))}, or --data_dir FOLDER for data of your own"
            )
        folder = root / "results" / "data" / dataset_key(name, entries[name])
        if not folder.is_dir():
            raise SettingsError(
                f"command line: field `dataset`: got {name!r}: folder {folder} is missing; run `snakemake -c2 data`, "
                "or set "
                "--data_dir FOLDER"
            )
        return folder


class SpeedSettings(FinetuneSettings):
    """scripts/speed.py"""

    speed_warmup_steps: Annotated[int, Role.RUNTIME] = Field(10, ge=10)
    """Untimed optimizer steps before the first timed window."""
    timed_steps: Annotated[int, Role.RUNTIME] = Field(20, ge=1)
    """Optimizer steps in one timed window."""
    repeats: Annotated[int, Role.RUNTIME] = Field(3, ge=3)
    """Number of timed windows."""
    expect_processes: Annotated[int, Role.RUNTIME] = Field(0, ge=0)
    """Number of processes of the published row. A different number is an error unless --stand_in. 0: any number."""
    expect_hardware: Annotated[str, Role.RUNTIME] = ""
    """Hardware entry of the published row. Other devices are an error unless --stand_in. Empty: any device."""
    hardware: Annotated[list[str], Role.RUNTIME] = ["config/hardware.yaml"]
    """Hardware files with device names and the peak FLOP/s for MFU and HFU."""
    stand_in: Annotated[bool, Role.RUNTIME] = False
    """Run on other hardware than the published row, with any number of processes. The report labels the result."""
    profile: Annotated[bool, Role.RUNTIME] = False
    """Profile three more steps: write a torch profiler trace and the 20 longest operators to OUTPUT_DIR/profile."""

    @property
    def timed_until(self) -> int:
        """Optimizer steps until the end of the last window."""
        return self.speed_warmup_steps + self.repeats * self.timed_steps


class Answering(Compute):
    """Settings for answering questions in batches."""

    model_name_or_path: Annotated[str, Role.IDENTITY]
    """Checkpoint folder, adapter folder (it names its base model), or hub id OWNER/NAME or OWNER/NAME@REVISION."""
    num_crops: int | None = Field(None, ge=1, le=64)
    """Largest number of tiles per picture. Default: the data folder's value, else 16; in predict.py, the
    checkpoint's."""
    batch_size_per_gpu: Annotated[int, Role.EQUIVALENT] = Field(8, ge=1)
    """Prompts per generation batch of one process."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Maximum number of tokens in an answer. Default: the data folder's value, else 64."""
    num_workers: Annotated[WorkersOrAuto, Role.RUNTIME] = "auto"
    """Threads per process that decode the next pictures. auto: as in training."""
    tqdm: Annotated[bool, Role.RUNTIME] = True
    """Show a progress bar. --no-tqdm prints a line now and then instead."""


class EvaluateSettings(Answering):
    """scripts/evaluate.py"""

    data_dir: Annotated[str, Role.IDENTITY]
    """Folder with images/ and one JSONL file of conversations per split."""
    output_dir: Annotated[str, Role.IDENTITY]
    """Folder for predictions and metrics, with one subfolder per pass."""
    train_dir: str = ""
    """Data folder whose training split is searched for the same pictures. Default: data_dir."""
    split: str = "val"
    """Split to evaluate."""
    dataset: Annotated[str, Role.IDENTITY] = ""
    """Name of the data in messages and the manifest."""
    row: Annotated[str, Role.IDENTITY] = ""
    """Name of the table row, written to the manifest."""
    metrics: list[Metric] = []
    """Metrics, the main one first (docs/reference/metrics.md lists them). Default: the data folder's."""
    group_by: str = ""
    """Field of each example's `meta`. The main metric is also reported per value of it. Default: the data folder's."""
    passes: Annotated[list[Literal["before", "after", "control"]], Role.RUNTIME] = ["after"]
    """Evaluation passes: before or after training, or control, which swaps the pictures among the examples."""
    seed: Annotated[Seed, Role.EQUIVALENT] = 42
    """Seed of the control's swap."""


class ScoreSettings(Command):
    """scripts/score.py"""

    input_dir: Annotated[str, Role.IDENTITY]
    """Result folder of scripts/evaluate.py."""
    output_dir: Annotated[str, Role.IDENTITY] = ""
    """Folder for the scored predictions. Default: input_dir."""
    metrics: list[Metric] = Field(min_length=1)
    """Metrics, the main one first. FILE.py:FUNCTION names a function of your own (docs/reference/metrics.md)."""
    group_by: str = ""
    """Field of each example's `meta`. The main metric is also reported per value of it."""
    compare: Annotated[str, Role.RUNTIME] = ""
    """Folder of another pass on the same examples. Prints the difference of each metric with its confidence
    interval."""
    seed: Annotated[Seed, Role.EQUIVALENT] = 42
    """Seed of the bootstrap intervals."""


class PredictSettings(Answering):
    """scripts/predict.py"""

    question: str = ""
    """Question about --image, each picture of --folder, or each row of a table without a question column."""
    image: list[str] = []
    """Picture files of one question, in order. The answer goes to standard output."""
    table: Annotated[str, Role.IDENTITY] = ""
    """Table of pictures and questions to answer: csv, tsv, json, jsonl or parquet."""
    columns: list[str] = []
    """Columns of the table, as ROLE=COLUMN: image=photo question=prompt id=number."""
    images_dir: Annotated[str, Role.IDENTITY] = ""
    """Folder that the table's picture paths are relative to. Default: the table's folder."""
    folder: Annotated[str, Role.IDENTITY] = ""
    """Folder whose pictures are answered, subfolders included."""
    output_dir: Annotated[str, Role.IDENTITY] = ""
    """Folder for answers.jsonl and answers.csv of a table or folder."""

    @model_validator(mode="after")
    def _one_source(self) -> PredictSettings:
        given = [name for name in ("image", "table", "folder") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: mutually exclusive; expected only one of image, table and folder")
        if not self.question and not self.table:
            raise ValueError("question: missing; expected --question TEXT about the pictures, or --table FILE")
        if given in (["table"], ["folder"]) and not self.output_dir:
            raise ValueError("output_dir: missing; expected --output_dir FOLDER for the answers")
        if wrong := [column for column in self.columns if not re.fullmatch(r"\w+=.+", column, re.DOTALL)]:
            raise ValueError(f"columns: got {wrong[0]!r}; expected ROLE=COLUMN, such as image=photo")
        return self


class ServeSettings(Compute):
    """scripts/serve.py"""

    model_name_or_path: Annotated[str, Role.IDENTITY]
    """Checkpoint folder, adapter folder, a running job's checkpoints/checkpoint-N, or hub id OWNER/NAME."""
    base: str = ""
    """Second model whose answers appear beside the first one's, such as the base model. Default: none."""
    num_crops: int | None = Field(None, ge=1, le=64)
    """Largest number of tiles per picture. Default: each model's own."""
    max_new_tokens: int = Field(256, ge=1)
    """Maximum number of tokens in an answer."""
    host: Annotated[str, Role.RUNTIME] = "127.0.0.1"
    """Address that the page listens on. Anyone who can connect to it can query the model. The default accepts only
    connections from this machine."""
    port: Annotated[int, Role.RUNTIME] = Field(8501, ge=1, le=65535)
    """Port of the page."""


class ReportSettings(Command):
    """scripts/report.py"""

    config: str
    """Configuration file of the run."""
    results: str | None = None
    """Results folder of the run. Default: results/NAME."""
    output_dir: str | None = None
    """Folder for the report. Default: RESULTS/report."""
    partial: bool = False
    """The run ended before all rows finished. The page states this."""


def row_values(row: Training) -> dict[str, Any]:
    """The values that a row sets in scripts/finetune.py's settings. Columns with other names are converted here."""
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
    """A row's settings of scripts/finetune.py, including its `finetune` field.

    decided: values from the run and the workflow rule. Raises SettingsError if `finetune` names an unknown setting, a
    setting that the row or run already has, or a wrong value.
    """
    for name in row.finetune:
        if name not in FurtherOptions.model_fields:
            kind = (
                "is a field of the row or the run; set it there"
                if name in accepted_names(FinetuneSettings)
                else "unknown"
            )
            expected = ", ".join(sorted(FurtherOptions.model_fields))
            raise SettingsError(f"{where}: field `finetune.{name}`: {kind}; expected one of {expected}")
    folders = {"model_name_or_path": row.model, "output_dir": row.row}
    return validate(FinetuneSettings, {**folders, **row_values(row), **decided, **row.finetune}, where)
