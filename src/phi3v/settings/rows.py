"""Rows of the two tables, config/accuracy.tsv and config/speed.tsv.

Defaults are the constants of Microsoft's recipe (PhiCookBook, FineTuning_Vision.md, and its scripts).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from phi3v.settings.base import Bare, Role, SettingsError, Strict, fields_with, validate

Method = Literal["full", "frozen", "lora", "qlora"]
Dtype = Literal["bf16", "fp16", "fp32"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adamw_offload"]


def _table_bool(value: Any) -> Any:
    return {"yes": True, "no": False}.get(value, value) if isinstance(value, str) else value


def _table_list(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


def _count_or_auto(least: int) -> BeforeValidator:
    def check(value: Any) -> Any:
        count = int(value) if isinstance(value, str) and value.isdecimal() else value
        if count == "auto" or (isinstance(count, int) and not isinstance(count, bool) and count >= least):
            return count
        raise ValueError(f"expected an integer >= {least}, or auto")

    return BeforeValidator(check)


YesNo = Annotated[bool, BeforeValidator(_table_bool)]
YesNoOrAuto = Annotated[bool | Literal["auto"], BeforeValidator(_table_bool)]
CountOrAuto = Annotated[int | Literal["auto"], _count_or_auto(1)]
WorkersOrAuto = Annotated[int | Literal["auto"], _count_or_auto(0)]
# numpy, which accelerate's set_seed also seeds, takes 32 bits.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
# A name. A row of a grid adds the value of each grid field: NAME@learning_rate=1e-5@epochs=3.
RowId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*(@[a-z0-9_]+=[A-Za-z0-9_.+-]+)*$")]


RULES = frozenset(
    [
        "accuracy",
        "all",
        "convert",
        "data",
        "data_statistics",
        "demo_base",
        "demo_model",
        "demo_sources",
        "digits",
        "download_data",
        "download_model",
        "evaluate",
        "evaluate_base",
        "evaluate_official",
        "finetune",
        "plan",
        "plan_run",
        "predict",
        "predictions",
        "report",
        "run_settings",
        "score",
        "speed",
        "speed_row",
    ]
)
"""Names of the workflow's rules. They are targets too, so no row can have one of these names."""


def _no_rule(value: str) -> str:
    if value in RULES:
        raise ValueError("this is the name of a workflow rule; choose another name for the row")
    return value


class Recipe(Strict):
    """Settings that are both a table column and a flag of scripts/finetune.py."""

    batch_size: int = Field(64, ge=1)
    """Examples per optimizer step, over all processes."""
    micro_batch_size: Annotated[CountOrAuto, Role.EQUIVALENT] = 1
    """Examples per forward pass of one process. auto: as many as fit, found before training (not in the recipe)."""
    learning_rate: float = Field(4e-5, gt=0, lt=1)
    """Peak learning rate."""
    epochs: float = Field(1, gt=0)
    """Number of passes over the training split."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability at the input of the adapters."""
    num_crops: int | None = Field(None, ge=1, le=64)
    """Largest number of tiles per image. Default: the dataset's value, else 16."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay of AdamW."""
    warmup_steps: int = Field(50, ge=0)
    """Optimizer steps of linear warm-up before the decay."""
    optimizer: Optimizer = "adamw"
    """adamw: AdamW with float32 states. adamw_8bit: 8-bit states (bitsandbytes), without ZeRO. paged_adamw_8bit: the
    same, in memory that pages to the host when the GPU is full. adamw_offload: float32 states and master weights in
    host memory (DeepSpeed ZeRO 3), only for full fine-tuning (all but adamw are not in the recipe)."""
    gradient_checkpointing: Annotated[YesNoOrAuto, Role.EQUIVALENT, Bare("yes", no="no")] = True
    """Recompute activations in the backward pass (non-reentrant). The flag works without a value and as
    --no-gradient_checkpointing. auto: recompute as few layers as the memory allows, found before training (not in the
    recipe)."""
    recompute_every: Annotated[int, Role.EQUIVALENT] = Field(1, ge=1)
    """With gradient_checkpointing, recompute only every n-th layer. 1: all layers (not in the recipe)."""

    @property
    def micro_batch_size_or_one(self) -> int:
        """micro_batch_size, or 1 if it is still auto."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size

    @property
    def recompute(self) -> float | None:
        """Share of the layers that are recomputed in the backward pass, or None if it is still auto."""
        return (
            None if self.gradient_checkpointing == "auto" else float(self.gradient_checkpointing) / self.recompute_every
        )


class _Named(Strict):
    row: Annotated[RowId, AfterValidator(_no_rule), Role.IDENTITY]
    """Unique id of the row. It names the model."""
    model: str
    """Entry of the models file."""
    dataset: str
    """Entry of the datasets file."""
    method: Method
    """full, frozen (full fine-tuning with the vision part frozen), lora or qlora."""
    dtype: Annotated[Dtype, Role.NUMERICS]
    """Compute dtype. fp16 is mixed precision with float32 weights."""
    flash_attention: Annotated[YesNo, Role.NUMERICS]
    """Use flash attention in the vision tower and the decoder. GPUs older than Ampere use PyTorch's memory-efficient
    kernel instead."""


class Training(Recipe, _Named):
    """Fields that accuracy and speed rows share: model, data, method and the recipe's constants."""

    lora_rank: int | None = Field(None, ge=1)
    """Rank of the adapters. Required for lora and qlora; empty for other methods."""
    lora_alpha: float | None = Field(None, gt=0)
    """Scale of the adapters. Required for lora and qlora; empty for other methods."""
    finetune: dict[str, Any] = {}
    """Only in overrides: further settings of scripts/finetune.py by name, such as {eval_steps: 100, keep_best: true}. A
    value can be a grid."""
    published_doubted: Annotated[YesNo, Role.PUBLISHED] = False
    """The published figure very likely belongs to another row. The note gives the reason, and the row gets no
    verdict."""
    legacy_freezing: YesNo = False
    """Only for frozen rows: freeze the text embedding too, as the recipe's scripts did."""

    @model_validator(mode="after")
    def _method_and_adapter_agree(self) -> Training:
        if self.method in ("lora", "qlora"):
            if self.lora_rank is None:
                raise ValueError(f"lora_rank: empty, but method is {self.method}; expected an integer >= 1")
            if self.lora_alpha is None:
                raise ValueError(f"lora_alpha: empty, but lora_rank is {self.lora_rank}; expected a number > 0")
        elif self.lora_rank is not None or self.lora_alpha is not None:
            raise ValueError(f"lora_rank/lora_alpha: set, but method is {self.method}; expected empty cells")
        if self.legacy_freezing and self.method != "frozen":
            raise ValueError(f"legacy_freezing: yes, but method is {self.method}; expected no, or method frozen")
        return self


class AccuracyRow(Training):
    """A line of config/accuracy.tsv."""

    gpus: Annotated[int, Role.EQUIVALENT] = Field(4, ge=1)
    """Number of processes on the published hardware. A run uses the devices that it has."""
    seeds: Annotated[list[Seed], BeforeValidator(_table_list), Role.EQUIVALENT] = []
    """Seeds to train and evaluate with, in a cell as 42,43,44. Empty: only the run's seed. The job of the run's seed
    keeps the row's id. The jobs and folders of other seeds are named ROW-seedN."""
    published: Annotated[float | None, Role.PUBLISHED] = Field(None, ge=0, le=100)
    """The recipe's figure, 0-100. Empty if the recipe gives none."""
    published_examples: Annotated[int | None, Role.PUBLISHED] = Field(None, ge=1)
    """Number of examples behind the recipe's figure. Its scripts use the first 500 rows, for DocVQA the 200 of the mini
    set."""
    origin: Annotated[Literal["published", "ours"], Role.PUBLISHED]
    """published: hyperparameters and figure are from the recipe. ours: the recipe gives no figure."""
    source: Annotated[str, Role.PUBLISHED] = ""
    """Table or file that the row comes from."""
    note: Annotated[str, Role.PUBLISHED] = ""
    """Text beside the row in the report."""

    @model_validator(mode="after")
    def _each_seed_once(self) -> AccuracyRow:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: got {self.seeds}; expected each seed once")
        return self

    @model_validator(mode="after")
    def _published_has_value(self) -> AccuracyRow:
        if self.origin == "published" and self.published is None:
            raise ValueError("published: empty, but origin is published; expected a figure 0-100")
        return self


class SpeedRow(Training):
    """A line of config/speed.tsv."""

    hardware: Annotated[str, Role.PUBLISHED]
    """Entry of the hardware file that the figure was measured on."""
    nodes: Annotated[int, Role.PUBLISHED] = Field(ge=1)
    """Number of machines."""
    gpus_per_node: Annotated[int, Role.PUBLISHED] = Field(ge=1)
    """Devices, and processes, per machine."""
    published_images_per_second: Annotated[float | None, Role.PUBLISHED] = Field(None, gt=0)
    """The recipe's figure, summed over all GPUs."""
    published_speedup: Annotated[float | None, Role.PUBLISHED] = Field(None, gt=0)
    """The recipe's speed-up relative to the first row of the table."""
    published_memory_gb: Annotated[float | None, Role.PUBLISHED] = Field(None, gt=0)
    """The recipe's peak memory per GPU, in GB."""
    accompanies: Annotated[Name | None, Role.PUBLISHED] = None
    """Published row of the same method that the report pairs with this row. This row then uses a micro-batch and
    recomputation of our choice, and has no published figures. Empty: a published row."""
    source: Annotated[str, Role.PUBLISHED] = ""
    """Table that the row comes from."""
    note: Annotated[str, Role.PUBLISHED] = ""
    """Text beside the row in the report."""

    @model_validator(mode="after")
    def _our_row_has_no_published_figures(self) -> SpeedRow:
        figures = ("published_images_per_second", "published_speedup", "published_memory_gb")
        given = [name for name in figures if getattr(self, name) is not None]
        if self.accompanies and given:
            raise ValueError(
                f"{given[0]}: set, but accompanies is {self.accompanies}; expected an empty cell, because only "
                "published "
                "rows have published figures"
            )
        return self


RowT = TypeVar("RowT", bound=Training)


def table_line(row: str) -> str:
    """The id of the table line from the id of a row of its grid."""
    return row.partition("@")[0]


def grid(model: type[Training], values: Mapping[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(suffix of the id, values) of each row that the values describe: all combinations of alternatives as `1e-5|4e-5`.

    Values without alternatives yield one row with the suffix "". Names, published figures and notes take no
    alternatives. Raises SettingsError for alternatives that cannot be part of an id, or that repeat.
    """
    texts = fields_with(model, Role.IDENTITY, Role.PUBLISHED)
    own = {name: value for name, value in values.items() if name not in texts}
    axes: dict[str, list[str]] = {}
    for name, value in {**own, **(values.get("finetune") or {})}.items():
        if isinstance(value, str) and "|" in value:
            axes[name] = [part.strip() for part in value.split("|")]
            if len({*axes[name]}) < len(axes[name]) or not all(re.fullmatch(r"[\w.+-]+", part) for part in axes[name]):
                raise SettingsError(
                    f"{where}: field `{name}`: got {value!r}: expected different values between the |, each of "
                    "letters, digits "
                    "and . _ + - only, because the row ids contain them"
                )
    for parts in itertools.product(*axes.values()):
        chosen = dict(zip(axes, parts, strict=True))
        row = {name: chosen.get(name, value) for name, value in values.items()}
        if values.get("finetune"):
            further = {name: chosen.get(name, value) for name, value in values["finetune"].items()}
            row["finetune"] = {
                name: yaml.safe_load(value) if name in chosen else value for name, value in further.items()
            }
        yield "".join(f"@{name}={part}" for name, part in chosen.items()), row


def read_table(path: str, model: type[RowT], root: Path) -> list[RowT]:
    """Rows of a tab-separated table with a header. Lines that start with # are comments; empty cells mean the
    default."""
    try:
        text = (root / path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read ({error}); expected a tab-separated table") from None
    lines = [(n, line.split("\t")) for n, line in enumerate(text, 1) if line.strip() and not line.startswith("#")]
    if not lines:
        raise SettingsError(f"{path}: empty; expected a header line and rows")
    (first, header), *rest = lines
    columns = [name for name in model.model_fields if name != "finetune"]
    for column in header:
        if column not in columns:
            expected = ", ".join(columns)
            raise SettingsError(f"{path}: line {first}: column {column!r}: unknown; expected one of {expected}")
    if len(set(header)) != len(header):
        raise SettingsError(f"{path}: line {first}: got a column name twice; expected each once")
    rows = []
    for number, cells in rest:
        if len(cells) != len(header):
            raise SettingsError(
                f"{path}: line {number}: got {len(cells)} cells; expected {len(header)}, separated by tabs"
            )
        values = {column: cell for column, cell in zip(header, cells, strict=True) if cell}
        where = f"{path}: line {number}: row `{values.get('row', '')}`"
        for suffix, own in grid(model, values, where):
            rows.append(validate(model, own | {"row": own.get("row", "") + suffix} if suffix else own, where))
    if not rows:
        raise SettingsError(f"{path}: got a header without rows; add at least one row")
    return rows


def read_tables(paths: list[str], model: type[RowT], root: Path) -> list[tuple[str, RowT]]:
    """(file, row) for every row of several tables."""
    return [(path, row) for path in paths for row in read_table(path, model, root)]
