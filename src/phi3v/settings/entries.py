"""What a run can name: models, datasets, hardware; and the folders that downloads and conversions are shared under."""

from __future__ import annotations

import difflib
import functools
import glob
import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from phi3v.settings.base import Strict, explain

Turns = Literal["all", "draw", "first"]
METRICS = (
    "accuracy", "anls", "contained", "numeric", "relaxed_accuracy", "cer", "wer", "edit_similarity", "json_fields",
    "multiple_choice",
)  # fmt: skip
"""Names of phi3v.evaluation.metrics; `numeric` may have a tolerance."""


def _metric(name: str) -> str:
    if name in METRICS or re.fullmatch(r"numeric@\d+(\.\d+)?%?|[\w./-]+\.py:[A-Za-z_]\w*", name):
        return name
    raise ValueError(f"expected one of {', '.join(METRICS)}, numeric@0.5, numeric@2%, or FILE.py:FUNCTION")


Metric = Annotated[str, AfterValidator(_metric)]

# Raised whenever a converter's output changes for the same source, so that old and new data never share a folder.
CONVERTER_VERSION = 2

CONVERSION_THREADS = 4
"""Threads (of UCF-101: processes) that decode in a conversion of the workflow: every picture is decoded."""


def without_password(url: str) -> str:
    """The URL; one with a user and password in it is refused, since URLs stand in logs, lock files and reports."""
    if re.match(r"[a-z]+://[^/@]+@", url, re.IGNORECASE):
        raise ValueError("expected a URL without user and password: it is shown in logs, lock files and the report")
    return url


Url = Annotated[str, AfterValidator(without_password)]


class _Layers(Strict):
    """Sizes of a stack of transformer layers."""

    hidden_size: int = Field(ge=1)
    """Width of a token, or of a patch in the tower."""
    intermediate_size: int = Field(ge=1)
    """Width of the feed-forward layer, gated in the decoder."""
    num_hidden_layers: int = Field(ge=1)
    """Layers in the checkpoint."""
    num_attention_heads: int = Field(ge=1)
    """Query heads of a layer."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads
            raise ValueError(f"hidden_size: {self.hidden_size}, expected a multiple of its {heads} heads")
        return self


class VisionGeometry(_Layers):
    """Shape of the vision tower; names are those of CLIPVisionConfig."""

    num_hidden_layers: int = Field(ge=2)
    """Layers in the checkpoint; the last one never runs."""
    image_size: int = Field(ge=1)
    """Side of a tile in pixels."""
    patch_size: int = Field(ge=1)
    """Side of a patch in pixels."""

    @model_validator(mode="after")
    def _patches_divide(self) -> Self:
        if self.image_size % (2 * self.patch_size):
            raise ValueError(
                f"image_size: {self.image_size}, expected a multiple of twice the patch_size {self.patch_size}"
                " (patches are merged two by two)"
            )
        return self


class Geometry(_Layers):
    """Layer sizes of a model, enough to plan it without its weights; names are those of the published config.json."""

    vocab_size: int = Field(ge=1)
    """Rows of the embedding and of the head."""
    num_key_value_heads: int = Field(ge=1)
    """Key and value heads of a layer."""
    vision: VisionGeometry
    """The vision tower."""

    @model_validator(mode="after")
    def _key_value_heads_divide(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads}, expected a multiple of num_key_value_heads"
                f" {self.num_key_value_heads}"
            )
        return self


class Model(Strict):
    """A checkpoint folder in the official layout."""

    title: str
    """Name shown in the report."""
    url: Url
    """hf://OWNER/REPO, file:FOLDER, or a folder's path."""
    revision: str | None = None
    """Hub commit; empty until first used for real, then pinned by the lock file beside the download."""
    licence: str = ""
    """Shown where the weights are downloaded."""
    geometry: Geometry | None = None
    """Layer sizes for the planner; empty: read from config.json where the url is a folder that exists."""

    @functools.cached_property
    def digest(self) -> str:
        """Changes with what the download depends on."""
        return _digest([self.url, self.revision])


def _delimiter(mark: object) -> object:
    """One character; `\\t`, as a shell passes it on, is a tab."""
    mark = "\t" if mark == r"\t" else mark
    if isinstance(mark, str) and (len(mark) > 1 or mark in ('"', "\n", "\r")):
        raise ValueError("expected one character that separates cells, such as ; or | or \\t")
    return mark


def _rows(rows: object) -> object:
    if isinstance(rows, str) and not re.fullmatch(r"\d*:\d*", rows):
        raise ValueError("expected FIRST:END, rows counted from 0, such as `500:`, `:100` or `100:200`")
    return rows


class Options(Strict):
    """What `options` of a split may hold; each format takes the ones that name it."""

    columns: dict[str, str | list[str]] = {}
    """What each column is (table, messages, imagefolder): `{image: img_id, question: "What is it?", answer: "{a} {b}"}`.
    A value is a column, a text with columns in braces, a constant text, or a list of columns (image, meta)."""
    prompt_suffix: str = ""
    """Text added to every question (table, imagefolder)."""
    prompt: str = ""
    """The question of every picture (imagefolder: `{classes}`; nlvr2_official: `{sentence}`; hateful_memes_official)."""
    frames: int = Field(8, ge=1, le=512)
    """Frames of a clip (table, messages, ucf101)."""
    pixel_range: Literal["full", "real"] = "full"
    """What becomes white of deep grey pixels: 16 bits, or each picture's largest value (table, messages, imagefolder)."""
    max_pixels: int | None = Field(None, ge=1)
    """Larger pictures are scaled down to so many pixels; empty: refused above 89 million (as `pixel_range`)."""
    dpi: int = Field(150, ge=10, le=1200)
    """Resolution of PDF pages (as `pixel_range`)."""
    fetch_gb: float = Field(100, gt=0)
    """Most GB of pictures that are fetched from URLs in rows (as `columns`)."""
    unlabelled: bool = False
    """Rows may be without an answer: they can be answered, and cannot train (as `columns`)."""
    file: str = ""
    """Which of several files, or a pattern of them (all but cauldron, docvqa_mini, ucf101, imagefolder)."""
    images_dir: str = "."
    """Folder inside the source where picture paths start (as `file`)."""
    field: str = ""
    """JSON field that holds the list of rows (table, messages)."""
    encoding: str = ""
    """Of a table; empty: UTF-8 or UTF-16, else cp1252 (table)."""
    delimiter: Annotated[str, BeforeValidator(_delimiter)] = ""
    """Of a table; empty: the one of comma, tab and semicolon that splits the header into most columns (table)."""
    config: str = ""
    """Configuration of a hub dataset (table, messages)."""
    split: str = ""
    """Name of the split inside the source; empty: as the split is called here (every format)."""
    turns: Literal["", "all", "draw", "first"] = ""
    """`first` keeps the first question of a row only; empty: the dataset's `turns` (every format)."""


_FILES = ("file", "images_dir", "split", "turns")
_PICTURES = ("fetch_gb", "pixel_range", "max_pixels", "dpi", "frames")
_ROWS = (*_FILES, *_PICTURES, "columns", "field", "config", "unlabelled")
_FOLDER = (*_PICTURES, "columns", "prompt", "prompt_suffix", "split", "turns", "unlabelled")
FORMAT_OPTIONS: dict[str, tuple[str, ...]] = {
    "table": (*_ROWS, "prompt_suffix", "encoding", "delimiter"),
    **dict.fromkeys(("messages", "sharegpt", "llava"), _ROWS),
    **dict.fromkeys(("imagefolder", "image_folder"), _FOLDER),
    "conversations": _FILES,
    **dict.fromkeys(("cauldron", "docvqa_mini"), ("split", "turns")),
    "ucf101": ("frames", "split", "turns"),
    "docvqa_official": _FILES,
    **dict.fromkeys(("nlvr2_official", "hateful_memes_official"), (*_FILES, "prompt")),
}
"""The options that each format takes."""


OptionValue = str | int | float | bool | dict[str, str | list[str]]


class Split(Strict):
    """Where one split of a dataset comes from."""

    url: Url
    """hf://datasets/OWNER/REPO/PATH (globs allowed), https://…, file:PATH, or a path."""
    revision: str | None = None
    """Hub commit; empty until first used for real, then pinned by the lock file beside the download."""
    format: Literal[
        "table", "messages", "sharegpt", "llava", "imagefolder", "image_folder", "conversations", "cauldron",
        "docvqa_mini", "ucf101", "nlvr2_official", "hateful_memes_official", "docvqa_official",
    ]  # fmt: skip
    """What the files are (docs/how-to/convert-*.md describe them)."""
    rows: Annotated[str, Field(pattern=r"^\d*:\d*$"), BeforeValidator(_rows)] = ":"
    """Rows taken, as a Python slice: `500:` is all but the first 500."""
    options: dict[str, OptionValue] = {}
    """Further facts about the files: see Options."""

    @model_validator(mode="after")
    def _options_are_the_formats(self) -> Split:
        known = FORMAT_OPTIONS[self.format]
        for name in self.options:
            if name not in known:
                like = difflib.get_close_matches(name, known, 1)
                raise ValueError(
                    f"options: got {name!r}; expected, for format {self.format}, one of {', '.join(sorted(known))}"
                    + (f"; did you mean `{like[0]}`?" if like else "")
                )
        try:
            self.parsed_options()
        except ValidationError as error:
            raise ValueError(str(explain(error, "options"))) from None
        return self

    def parsed_options(self) -> Options:
        """The options with their defaults."""
        return Options.model_validate(self.options)


class Division(Strict):
    """How a source without splits is divided: by seed, alike on every machine."""

    val: float = Field(gt=0, lt=1)
    """Share of the rows that evaluate."""
    test: float = Field(0, ge=0, lt=1)
    """Share of the rows of split test."""
    seed: int = 0
    """Another seed draws other rows."""
    group: str = ""
    """Column whose equal values stay together (a patient, a document)."""
    stratify: str = ""
    """Column whose values each split has in the same shares (a class)."""


class Workload(Strict):
    """How much work a dataset is: what the planner counts with before a file is downloaded."""

    train: int = Field(ge=0)
    """Training examples; 0: only evaluated."""
    evaluation: int = Field(ge=1)
    """Examples of the evaluation split."""
    pictures: int = Field(1, ge=0)
    """Pictures of an example."""
    shapes: list[tuple[int, int, float]] = Field(min_length=1)
    """[width, height, share] of the pictures; the shares add up to 1."""
    text: int = Field(ge=1)
    """Text tokens of an example, template and answers included."""
    labels: int = Field(ge=1)
    """Answer tokens of an example, end marks included."""
    picture_bytes: float = Field(gt=0)
    """Size of a stored picture."""
    source: str
    """Where these figures come from, or that they are estimates."""

    @model_validator(mode="after")
    def _shares_add_up(self) -> Workload:
        if any(min(width, height) < 1 for width, height, _ in self.shapes):
            raise ValueError(f"shapes: {self.shapes}, expected widths and heights >= 1")
        if abs(sum(share for *_, share in self.shapes) - 1) > 1e-6:
            raise ValueError(f"shapes: {self.shapes}, expected shares that add up to 1")
        return self


class Dataset(Strict):
    """A dataset: its splits, how its turns train, and how answers are scored."""

    title: str
    """Name shown in the report."""
    splits: dict[str, Split] = Field(min_length=1)
    """`train` and `val` are what a row uses; one that is only evaluated needs no `train`."""
    turns: Turns = "all"
    """all: every turn trains; draw: one turn an epoch, drawn by seed; first: only the first turn is kept."""
    metric: Metric = ""
    """Score of an answer; left out: the first of `metrics`."""
    metrics: list[Metric] = []
    """Several scores of an answer, the main one first; docs/reference/metrics.md lists them."""
    group_by: str = ""
    """Field of the examples' `meta`: the main metric is also given for each of its values."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest answer in tokens; empty: the run's."""
    num_crops: int = Field(16, ge=1, le=64)
    """Largest number of tiles of an image (recipe: 16, UCF-101: 4)."""
    licence: str = ""
    """Shown where the data are downloaded."""
    split: Division | None = None
    """Makes val (and test) of rows of `train`, for a source without splits; empty: the splits are as given."""
    on_error: Literal["stop", "skip"] = "stop"
    """Source rows that cannot be converted: stop at the first, or skip them (rejected.jsonl names them, the report counts)."""
    workload: Workload | None = None
    """For the planner; empty: counted from the converted folder, pictures taken for the largest grid."""
    official: str = ""
    """Entry with the authors' own validation split, which is evaluated too if its files are there (second protocol)."""

    @model_validator(mode="before")
    @classmethod
    def _main_metric_first(cls, values: Any) -> Any:
        several = values.get("metrics") or [] if isinstance(values, dict) else []
        main = values.get("metric") or next(iter(several), "") if isinstance(values, dict) else ""
        if not main or not isinstance(several, list):
            return values
        return {**values, "metric": main, "metrics": [main, *(name for name in several if name != main)]}

    @model_validator(mode="after")
    def _has_metric_and_val(self) -> Dataset:
        if not self.metric:
            raise ValueError(f"metric: missing; expected one of {', '.join(METRICS)}")
        if self.split:
            if list(self.splits) != ["train"]:
                raise ValueError(f"split: divides split train alone, got splits {sorted(self.splits)}")
        elif "val" not in self.splits:
            raise ValueError(
                f"splits: expected at least val (and train, where rows train on it), got {sorted(self.splits)}; a source "
                "without splits takes `split: {val: 0.1}`"
            )
        return self

    @functools.cached_property
    def digest(self) -> str:
        """Changes with what the converted folder depends on."""
        splits = {split: source.model_dump() for split, source in self.splits.items()}
        # 0 keeps the names of folders that exist.
        made: list[object] = [self.turns, self.on_error, 0, CONVERTER_VERSION]
        return _digest([splits, *made, *([self.split.model_dump()] if self.split else [])])

    @property
    def own_metrics(self) -> list[str]:
        """Files of the metrics that are functions of the user's."""
        return [name.rpartition(":")[0] for name in self.metrics if ":" in name]

    @property
    def urls(self) -> list[str]:
        """Where its splits come from, each once."""
        return sorted({split.url for split in self.splits.values()})

    @property
    def users_urls(self) -> list[str]:
        """Local files that no rule makes; those of a rule lie under results/."""
        return [url for url in self.urls if not (local_source(url) or "results/").startswith("results/")]

    @property
    def source_files(self) -> dict[str, bool]:
        """Path of each local source that is one file or folder, to whether it is the user's own."""
        return {path: url in self.users_urls for url in self.urls for path in source_file(url)}

    @property
    def conversion_entry(self) -> str:
        """What its conversion depends on, as JSON: another metric must not convert, and so train, again.

        What evaluation is told (dataset.json keeps a copy for use by hand) is left out.
        """
        told = {"metric", "metrics", "max_new_tokens", "num_crops"}
        return self.model_dump_json(exclude={"title", "licence", "workload", "official", *told})

    def missing_source(self, root: Path = Path()) -> str | None:
        """The first local source that is not there, or None; what comes from the network counts as there."""
        for split in self.splits.values():
            path = local_source(split.url)
            if path is not None and not (root / path).exists() and not glob.glob(str(root / path)):
                return path
        return None


class Peak(Strict):
    """Dense matrix products of one device in TFLOP/s (10^12), accumulated in float32, without structured sparsity."""

    bf16: float | None = Field(None, gt=0)
    """bfloat16; empty where the device has none."""
    fp16: float | None = Field(None, gt=0)
    """float16; empty where the device has none."""
    fp32: float | None = Field(None, gt=0)
    """float32, without TF32."""


class Hardware(Strict):
    """One kind of accelerator, or the CPU."""

    title: str
    """Name shown in the report."""
    kind: Literal["cuda", "rocm", "cpu"]
    """What PyTorch calls it."""
    memory_gb: float | None = Field(None, gt=0)
    """Memory of one device in GB (10^9 bytes); empty for a CPU."""
    bf16: bool
    """Computes in bfloat16 (NVIDIA: Ampere and newer)."""
    fp16: bool = True
    """Computes in float16."""
    flash_attention: bool
    """Has a flash attention kernel (NVIDIA: Ampere and newer; CPU: that of PyTorch's SDPA). Without one, a row that asks
    for it runs PyTorch's memory-efficient kernel."""
    quantisation: bool
    """bitsandbytes' 4-bit kernels run (NVIDIA: Turing and newer; Volta too in current releases is not relied on)."""
    generation: str = ""
    """Architecture, as the recipe's advice names it (Volta, Turing, Ampere …)."""
    peak_tflops: Peak = Peak()
    """Dense peaks by dtype; they divide MFU and HFU. CPU: of one process on one core, calibrated on a measured row."""
    flash_head_seconds: tuple[float, float] | None = None
    """Forward and backward time of the flash kernel for one sequence and head beside its operations, s; empty: none, as
    on devices that work on many at once."""
    bandwidth_gb_s: float | None = Field(None, gt=0)
    """Memory bandwidth of one device in GB/s (10^9 bytes)."""
    link_gb_s: float | None = Field(None, gt=0)
    """Device to device within a machine, GB/s in one direction, all links of a device together."""
    network_gb_s: float | None = Field(None, gt=0)
    """Machine to machine, GB/s in one direction, all ports of a machine together."""
    power_w: float | None = Field(None, gt=0)
    """Board power of one device in W."""
    source: str
    """Where these facts come from, the machine meant by link and network included."""


def local_source(url: str) -> str | None:
    """The path of a local URL (file:relative, file:///absolute, or a path); None for what comes from the network."""
    if re.match(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+:", url):
        return None
    return re.sub(r"^file:(//(localhost(?=/))?)?", "", url)


def source_file(url: str) -> list[str]:
    """The path of a local URL that names one file or folder; empty for a pattern, and for what comes from the network."""
    path = local_source(url)
    return [] if path is None or "*" in url else [path]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def dataset_key(name: str, dataset: Dataset) -> str:
    """Folder name under results/data: source, revision, conversion options and converter version decide it."""
    return f"{name}-{dataset.digest}"


def model_key(name: str, model: Model) -> str:
    """Folder name under results/models."""
    return f"{name}-{model.digest}"
