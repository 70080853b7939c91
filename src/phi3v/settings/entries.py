"""Models, datasets and hardware that a run can name, and the shared folders of downloads and conversions."""

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
"""Names of phi3v.evaluation.metrics. `numeric` accepts a tolerance, as in numeric@0.5."""


def _metric(name: str) -> str:
    if name in METRICS or re.fullmatch(r"numeric@\d+(\.\d+)?%?|[\w./-]+\.py:[A-Za-z_]\w*", name):
        return name
    raise ValueError(f"expected one of {', '.join(METRICS)}, numeric@0.5, numeric@2%, or FILE.py:FUNCTION")


Metric = Annotated[str, AfterValidator(_metric)]

CONVERTER_VERSION = 2
"""Version of the converters' output. Raise it whenever the output changes for the same source, so that old and new data
use different folders."""

CONVERSION_THREADS = 4
"""Threads (UCF-101: processes) that decode pictures during a conversion."""


def without_password(url: str) -> str:
    """Returns the URL. Raises ValueError if it contains a user and password, because logs and reports print URLs."""
    if re.match(r"[a-z]+://[^/@]+@", url, re.IGNORECASE):
        raise ValueError("expected a URL without user and password, because logs, lock files and the report contain it")
    return url


Url = Annotated[str, AfterValidator(without_password)]


class _Layers(Strict):
    """Sizes of a stack of transformer layers."""

    hidden_size: int = Field(ge=1)
    """Width of a token, or of a patch in the vision tower."""
    intermediate_size: int = Field(ge=1)
    """Width of the feed-forward layer. The decoder's is gated."""
    num_hidden_layers: int = Field(ge=1)
    """Number of layers in the checkpoint."""
    num_attention_heads: int = Field(ge=1)
    """Query heads per layer."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads
            raise ValueError(
                f"hidden_size: got {self.hidden_size}; expected a multiple of num_attention_heads ({heads})"
            )
        return self


class VisionGeometry(_Layers):
    """Shape of the vision tower. The names are those of CLIPVisionConfig."""

    num_hidden_layers: int = Field(ge=2)
    """Number of layers in the checkpoint. The model never runs the last one."""
    image_size: int = Field(ge=1)
    """Side of a tile, in pixels."""
    patch_size: int = Field(ge=1)
    """Side of a patch, in pixels."""

    @model_validator(mode="after")
    def _patches_divide(self) -> Self:
        if self.image_size % (2 * self.patch_size):
            raise ValueError(
                f"image_size: got {self.image_size}; expected a multiple of twice the patch_size ({self.patch_size}), "
                "because patches are merged two by two"
            )
        return self


class Geometry(_Layers):
    """Layer sizes of a model, sufficient to plan it without its weights. The names are those of the published
    config.json."""

    vocab_size: int = Field(ge=1)
    """Rows of the embedding and of the language model head."""
    num_key_value_heads: int = Field(ge=1)
    """Key and value heads per layer."""
    vision: VisionGeometry
    """Shape of the vision tower."""

    @model_validator(mode="after")
    def _key_value_heads_divide(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: got {self.num_attention_heads}; expected a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        return self


class Model(Strict):
    """A checkpoint folder in the official layout."""

    title: str
    """Name in the report."""
    url: Url
    """hf://OWNER/REPO, file:FOLDER, or the path of a folder."""
    revision: str | None = None
    """Commit on the hub. Empty: the first download pins the commit in the lock file beside it."""
    licence: str = ""
    """Licence of the weights, printed when they are downloaded."""
    geometry: Geometry | None = None
    """Layer sizes for the planner. Empty: read from config.json if the URL is an existing folder."""

    @functools.cached_property
    def digest(self) -> str:
        """Changes with what the download depends on."""
        return _digest([self.url, self.revision])


def _delimiter(mark: object) -> object:
    """Accepts one character, or the two characters `\\t` from a shell as a tab."""
    mark = "\t" if mark == r"\t" else mark
    if isinstance(mark, str) and (len(mark) > 1 or mark in ('"', "\n", "\r")):
        raise ValueError("expected one character between cells, such as ; or | or \\t")
    return mark


def _rows(rows: object) -> object:
    if isinstance(rows, str) and not re.fullmatch(r"\d*:\d*", rows):
        raise ValueError("expected FIRST:END with rows counted from 0, such as `500:`, `:100` or `100:200`")
    return rows


class Options(Strict):
    """Contents of a split's `options`. Each description names the formats that accept the option."""

    columns: dict[str, str | list[str]] = {}
    """Meaning of each column (table, messages, imagefolder): `{image: img_id, question: "What is it?", answer: "{a}
    {b}"}`. A value is a column, text with columns in braces, constant text, or a list of columns (for image and
    meta)."""
    prompt_suffix: str = ""
    """Text appended to every question (table, imagefolder)."""
    prompt: str = ""
    """Question about every picture (imagefolder: `{classes}`; nlvr2_official: `{sentence}`; hateful_memes_official)."""
    frames: int = Field(8, ge=1, le=512)
    """Frames per video clip (table, messages, ucf101)."""
    pixel_range: Literal["full", "real"] = "full"
    """Range of a 16-bit grey picture that becomes 0 to 255: full: 0 to 65535; real: the picture's darkest to its
    brightest pixel (table, messages, imagefolder)."""
    max_pixels: int | None = Field(None, ge=1)
    """Scale larger pictures down to this many pixels. Empty: reject those above 89 million (same formats as
    `pixel_range`)."""
    dpi: int = Field(150, ge=10, le=1200)
    """Resolution of PDF pages (same formats as `pixel_range`)."""
    fetch_gb: float = Field(100, gt=0)
    """Largest total download of pictures from URLs in the rows, in GB (same formats as `columns`)."""
    unlabelled: bool = False
    """Accept rows without an answer. The model can answer them but not train on them (same formats as `columns`)."""
    file: str = ""
    """Name or glob pattern of the files to read (all formats except cauldron, docvqa_mini, ucf101, imagefolder)."""
    images_dir: str = "."
    """Folder inside the source that picture paths are relative to (same formats as `file`)."""
    field: str = ""
    """JSON field that contains the list of rows (table, messages)."""
    encoding: str = ""
    """Character encoding of a table. Empty: UTF-8 or UTF-16, else cp1252 (table)."""
    delimiter: Annotated[str, BeforeValidator(_delimiter)] = ""
    """Character between a table's cells. Empty: comma, tab or semicolon, whichever splits the header into most columns
    (table)."""
    config: str = ""
    """Configuration name of a dataset on the hub (table, messages)."""
    split: str = ""
    """Name of the split inside the source. Empty: the same name as here (every format)."""
    turns: Literal["", "all", "draw", "first"] = ""
    """first: keep only the first question of a row. Empty: the dataset's `turns` (every format)."""


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
"""Options that each format accepts."""


OptionValue = str | int | float | bool | dict[str, str | list[str]]


class Split(Strict):
    """Source of one split of a dataset."""

    url: Url
    """hf://datasets/OWNER/REPO/PATH (globs are allowed), https://…, file:PATH, or a path."""
    revision: str | None = None
    """Commit on the hub. Empty: the first download pins the commit in the lock file beside it."""
    format: Literal[
        "table", "messages", "sharegpt", "llava", "imagefolder", "image_folder", "conversations", "cauldron",
        "docvqa_mini", "ucf101", "nlvr2_official", "hateful_memes_official", "docvqa_official",
    ]  # fmt: skip
    """Format of the files (docs/how-to/convert-*.md describe them)."""
    rows: Annotated[str, Field(pattern=r"^\d*:\d*$"), BeforeValidator(_rows)] = ":"
    """Rows to use, as a Python slice. `500:` means all but the first 500."""
    options: dict[str, OptionValue] = {}
    """Format-specific options, described under Options."""

    @model_validator(mode="after")
    def _options_are_the_formats(self) -> Split:
        accepted = FORMAT_OPTIONS[self.format]
        for name in self.options:
            if name not in accepted:
                like = difflib.get_close_matches(name, accepted, 1)
                raise ValueError(
                    f"options: got {name!r}; format {self.format} accepts {', '.join(sorted(accepted))}"
                    + (f"; did you mean `{like[0]}`?" if like else "")
                )
        try:
            self.parsed_options()
        except ValidationError as error:
            raise ValueError(str(explain(error, "options"))) from None
        return self

    def parsed_options(self) -> Options:
        """Returns the options with their defaults."""
        return Options.model_validate(self.options)


class Division(Strict):
    """Division of a source without splits. The seed decides it, with the same result on every machine."""

    val: float = Field(gt=0, lt=1)
    """Share of the rows in split val."""
    test: float = Field(0, ge=0, lt=1)
    """Share of the rows in split test."""
    seed: int = 0
    """Seed of the random division."""
    group: str = ""
    """Column whose equal values go to the same split (a patient, a document)."""
    stratify: str = ""
    """Column whose values occur in the same shares in each split (a class)."""


class Workload(Strict):
    """Amount of work in a dataset, which the planner uses before any file is downloaded."""

    train: int = Field(ge=0)
    """Training examples. 0: evaluation only."""
    evaluation: int = Field(ge=1)
    """Examples in the evaluation split."""
    pictures: int = Field(1, ge=0)
    """Pictures per example."""
    shapes: list[tuple[int, int, float]] = Field(min_length=1)
    """[width, height, share] of the pictures. The shares add up to 1."""
    text: int = Field(ge=1)
    """Text tokens per example, template and answers included."""
    labels: int = Field(ge=1)
    """Answer tokens per example, end marks included."""
    picture_bytes: float = Field(gt=0)
    """Size of a stored picture, in bytes."""
    source: str
    """Origin of these figures, or a note that they are estimates."""

    @model_validator(mode="after")
    def _shares_add_up(self) -> Workload:
        if any(min(width, height) < 1 for width, height, _ in self.shapes):
            raise ValueError(f"shapes: got {self.shapes}; expected widths and heights >= 1")
        if abs(sum(share for *_, share in self.shapes) - 1) > 1e-6:
            raise ValueError(f"shapes: got {self.shapes}; expected shares that add up to 1")
        return self


class Dataset(Strict):
    """A dataset: its splits, which of its turns train, and how answers are scored."""

    title: str
    """Name in the report."""
    splits: dict[str, Split] = Field(min_length=1)
    """Sources of the splits. A row uses `train` and `val`. A dataset for evaluation only can omit `train`."""
    turns: Turns = "all"
    """all: every turn trains. draw: one random turn per epoch, drawn by seed. first: only the first turn is used."""
    metric: Metric = ""
    """Metric of an answer. Default: the first of `metrics`."""
    metrics: list[Metric] = []
    """Metrics, the main one first (docs/reference/metrics.md lists them)."""
    group_by: str = ""
    """Field of each example's `meta`. The main metric is also reported per value of it."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Maximum number of tokens in an answer. Empty: the run's value."""
    num_crops: int = Field(16, ge=1, le=64)
    """Largest number of tiles per image (recipe: 16, UCF-101: 4)."""
    licence: str = ""
    """Licence of the data, printed when they are downloaded."""
    split: Division | None = None
    """Divides `train` into train and val (and test), for a source without splits. Empty: use the splits as given."""
    on_error: Literal["stop", "skip"] = "stop"
    """Source rows that cannot be converted: stop at the first, or skip them. Skipped rows are listed in rejected.jsonl
    and counted in the report."""
    workload: Workload | None = None
    """Amount of work, for the planner. Empty: counted in the converted folder, assuming the largest tile grid."""
    official: str = ""
    """Entry with the authors' own validation split. It is evaluated too if its files exist (second protocol)."""

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
                raise ValueError(
                    f"split: got splits {sorted(self.splits)}; expected only `train`, which `split` divides"
                )
        elif "val" not in self.splits:
            raise ValueError(
                f"splits: got {sorted(self.splits)}; expected at least val (and train, if rows train on it); for a "
                "source "
                "without splits, add `split: {val: 0.1}`"
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
        """Files of the metrics that are the user's own functions."""
        return [name.rpartition(":")[0] for name in self.metrics if ":" in name]

    @property
    def urls(self) -> list[str]:
        """URLs of its splits, without duplicates."""
        return sorted({split.url for split in self.splits.values()})

    @property
    def users_urls(self) -> list[str]:
        """Local sources that no rule makes. The rules' own files are under results/."""
        return [url for url in self.urls if not (local_source(url) or "results/").startswith("results/")]

    @property
    def source_files(self) -> dict[str, bool]:
        """Path of each local source that is one file or folder, and whether it belongs to the user."""
        return {path: url in self.users_urls for url in self.urls for path in source_file(url)}

    @property
    def conversion_entry(self) -> str:
        """The fields that its conversion depends on, as JSON.

        Changing a field for evaluation or display, such as a metric, repeats neither the conversion nor the training.
        """
        evaluation = {"metric", "metrics", "max_new_tokens", "num_crops"}
        return self.model_dump_json(exclude={"title", "licence", "workload", "official", *evaluation})

    def missing_source(self, root: Path = Path()) -> str | None:
        """The first local source that does not exist, or None. Sources on the network count as existing."""
        for split in self.splits.values():
            path = local_source(split.url)
            if path is not None and not (root / path).exists() and not glob.glob(str(root / path)):
                return path
        return None


class Peak(Strict):
    """Peak rates of dense matrix products per device, in TFLOP/s (10^12), accumulated in float32, without sparsity."""

    bf16: float | None = Field(None, gt=0)
    """bfloat16. Empty if the device does not support it."""
    fp16: float | None = Field(None, gt=0)
    """float16. Empty if the device does not support it."""
    fp32: float | None = Field(None, gt=0)
    """float32 without TF32."""


class Hardware(Strict):
    """A type of accelerator, or the CPU."""

    title: str
    """Name in the report."""
    kind: Literal["cuda", "rocm", "cpu"]
    """cuda: NVIDIA GPU. rocm: AMD GPU. cpu: CPU."""
    memory_gb: float | None = Field(None, gt=0)
    """Memory per device in GB (10^9 bytes). Empty for a CPU."""
    bf16: bool
    """Supports bfloat16 (NVIDIA: Ampere and newer)."""
    fp16: bool = True
    """Supports float16."""
    flash_attention: bool
    """Has a flash attention kernel (NVIDIA: Ampere and newer; CPU: PyTorch's SDPA). Without one, rows with flash
    attention use PyTorch's memory-efficient kernel."""
    quantisation: bool
    """Supports bitsandbytes' 4-bit kernels (NVIDIA: Turing and newer; current releases also run on Volta, without
    support)."""
    generation: str = ""
    """Architecture name, as in the recipe's advice (Volta, Turing, Ampere …)."""
    peak_tflops: Peak = Peak()
    """Dense peaks by dtype, the denominators of MFU and HFU. CPU: one process on one core, calibrated on a measured
    row."""
    flash_head_seconds: tuple[float, float] | None = None
    """Constant forward and backward time of the flash kernel per sequence and head, in seconds. Empty: none, because
    the device processes many heads at once."""
    bandwidth_gb_s: float | None = Field(None, gt=0)
    """Memory bandwidth per device in GB/s (10^9 bytes)."""
    link_gb_s: float | None = Field(None, gt=0)
    """Bandwidth from device to device within a machine, in GB/s in one direction, summed over all links of a device."""
    network_gb_s: float | None = Field(None, gt=0)
    """Bandwidth from machine to machine, in GB/s in one direction, summed over all ports of a machine."""
    power_w: float | None = Field(None, gt=0)
    """Board power per device in W."""
    source: str
    """Origin of these figures, including which machine `link_gb_s` and `network_gb_s` describe."""


def local_source(url: str) -> str | None:
    """The path of a local URL (file:relative, file:///absolute, or a path), or None for a network URL."""
    if re.match(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+:", url):
        return None
    return re.sub(r"^file:(//(localhost(?=/))?)?", "", url)


def source_file(url: str) -> list[str]:
    """The path of a local URL that names one file or folder. Empty for a pattern and for a network URL."""
    path = local_source(url)
    return [] if path is None or "*" in url else [path]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def dataset_key(name: str, dataset: Dataset) -> str:
    """Folder name under results/data. It depends on the source, revision, conversion options and converter version."""
    return f"{name}-{dataset.digest}"


def model_key(name: str, model: Model) -> str:
    """Folder name under results/models."""
    return f"{name}-{model.digest}"
