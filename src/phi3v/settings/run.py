"""A run: its configuration file, and its selected rows placed on the machines it has.

run = load_run("config/demo.yaml")          # raises SettingsError
for job in run.accuracy:
    print(job.row.row, job.processes, job.departures)
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from phi3v.settings.base import (
    Role,
    SettingsError,
    Strict,
    check_known,
    fields_with,
    read_entries,
    read_yaml,
    validate,
)
from phi3v.settings.commands import own_settings
from phi3v.settings.entries import Dataset, Hardware, Model, dataset_key, model_key
from phi3v.settings.rows import (
    AccuracyRow,
    Name,
    Seed,
    SpeedRow,
    Training,
    WorkersOrAuto,
    grid,
    read_tables,
    table_line,
)

AnyRow = AccuracyRow | SpeedRow
Departures = dict[str, tuple[Any, Any]]
"""Field to (table's value, this run's value)."""


class Pool(Strict):
    """Machines of one kind that the run has."""

    device: str
    """Entry of the hardware file."""
    per_node: int = Field(ge=1)
    """Devices (CPU: processes) of one machine."""
    nodes: int = Field(1, ge=1)
    """Machines."""
    rows: list[str] = ["*"]
    """Rows that may run here, by name or shell pattern."""
    slurm_partition: str = ""
    """Partition of these machines; empty: the site file's, or the cluster's default."""
    stand_in: bool = False
    """Stands for any published hardware: speed rows run here with these processes, and are labelled so."""
    price_per_hour: float | None = Field(None, gt=0)
    """What one device costs you for an hour, in your currency; empty: the plan shows no price."""


class Files(Strict):
    """The tables of a run; later files add to earlier ones."""

    models: list[str] = Field(min_length=1)
    """Files of models."""
    datasets: list[str] = Field(min_length=1)
    """Files of datasets."""
    hardware: list[str] = Field(min_length=1)
    """Files of devices."""
    accuracy: list[str] = []
    """Tables of accuracy rows."""
    speed: list[str] = []
    """Tables of speed rows."""


class Selection(Strict):
    """Rows by name or shell pattern. A row with its exact name must be able to run; a pattern takes the rows that can."""

    accuracy: list[str] = ["*"]
    """Accuracy rows of this run."""
    speed: list[str] = ["*"]
    """Speed rows of this run."""

    def names(self, row: str) -> bool:
        """Whether a row is asked for by its exact id, or by that of the table's line whose grid it is of."""
        return not {row, table_line(row)}.isdisjoint((*self.accuracy, *self.speed))


class Evaluation(Strict):
    """How checkpoints are evaluated."""

    batch_size_per_gpu: int = Field(8, ge=1)
    """Prompts generated together by one process."""
    max_new_tokens: int = Field(64, ge=1)
    """The recipe's limit of an answer."""
    control: bool = True
    """Evaluate the trained model also with the pictures swapped among the examples."""


class Prediction(Strict):
    """Pictures without labels that a trained row answers (the target `predictions`)."""

    row: str
    """Accuracy row whose trained model answers."""
    table: str = ""
    """Rows to answer, each with a picture and a question: csv, tsv, json, jsonl or parquet."""
    columns: dict[str, str] = {}
    """What the table's columns are: `{image: photo, question: prompt, id: number}`."""
    images_dir: str = ""
    """Where the table's picture paths start; empty: beside the table."""
    folder: str = ""
    """Folder whose pictures are answered, with its subfolders."""
    question: str = ""
    """What is asked about each picture of the folder, or of a table without a question column."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest answer in tokens; empty: that of the row's evaluation."""

    @model_validator(mode="after")
    def _one_source(self) -> Prediction:
        if bool(self.table) == bool(self.folder):
            raise ValueError("expected a table or a folder")
        return self

    @property
    def files(self) -> list[str]:
        """The table, or every file of the folder."""
        if self.table:
            return [self.table]
        return [str(path) for path in sorted(Path(self.folder).rglob("*")) if path.is_file()]


class SpeedMeasurement(Strict):
    """How a speed row is timed."""

    warmup_steps: int = Field(10, ge=10)
    """Optimizer steps before the clock starts."""
    timed_steps: int = Field(20, ge=1)
    """Optimizer steps of one repeat."""
    repeats: int = Field(3, ge=3)
    """Timed windows."""


class DemoBase(Strict):
    """How the demo's tiny base model is first trained a little."""

    processes: int = Field(2, ge=1)
    """Training processes."""
    learning_rate: float = Field(gt=0, lt=1)
    """Peak learning rate."""
    epochs: float = Field(gt=0)
    """Passes over the mixture."""
    batch_size: int = Field(64, ge=1)
    """Examples of one optimizer step over all processes."""
    micro_batch_size: int = Field(32, ge=1)
    """Examples of one forward pass."""
    num_crops: int = Field(4, ge=1)
    """Largest number of tiles of an image."""


class Demo(Strict):
    """Synthetic source files and the tiny base model that the demo starts from."""

    folder: str
    """Where they are written; the demo's dataset and model URLs point there."""
    seed: int = 0
    """Seed of the synthetic sources and of the random weights."""
    sizes: dict[str, int]
    """Rows of each source file."""
    datasets: list[str] = []
    """Datasets files with `texts` and `mixture`, beside this file; a run need not name them again."""
    texts: list[str] = Field(min_length=1)
    """Datasets whose training texts the tokenizer learns."""
    geometry: dict[str, int]
    """Shape of the tiny model: arguments of phi3v.demo.tiny.build_tiny."""
    mixture: str
    """Dataset that the tiny base model is first trained on."""
    base: DemoBase
    """How the tiny base model is trained."""


class Run(Strict):
    """A run configuration file."""

    name: Name
    """Results go to results/NAME."""
    title: str
    """Heading of the report."""
    notice: str = ""
    """Shown above every table, for runs whose numbers must not be compared."""
    comparable: bool = True
    """False: no number of this run may be compared with a published one (demo)."""
    seed: Seed = 42
    """Data order, initial adapters, controls; a row's `seeds` ask for more of them."""
    files: Files
    """Files that this run reads."""
    hardware: list[Pool] = Field(min_length=1)
    """Machines that this run has; a row goes to the first pool that can do it."""
    rows: Selection = Selection()
    """Which rows of the tables run."""
    overrides: dict[str, dict[str, Any]] = {}
    """Row pattern to fields: every departure of this run from the tables, shown in the report."""
    evaluation: Evaluation = Evaluation()
    """How checkpoints are evaluated."""
    predictions: dict[Name, Prediction] = {}
    """Answers for new pictures, by name; the target `predictions` writes them to results/NAME/predictions/."""
    speed: SpeedMeasurement = SpeedMeasurement()
    """How speed rows are timed."""
    num_workers: WorkersOrAuto = "auto"
    """Data loading processes of each training process; auto: one less than its CPUs on a GPU, at most 8, none on a CPU."""
    save_minutes: float = Field(30, ge=0)
    """Checkpoint of each training job after so many minutes: what a machine that fails may cost; 0: none."""
    demo: str | None = None
    """File that describes how synthetic sources and a tiny base model are made, for runs whose URLs point there."""


class Job(BaseModel):
    """A row placed on a pool, with one seed."""

    model_config = ConfigDict(frozen=True)

    row: AnyRow
    """`row.row` is the job's id: the table row's, or ROW-seedN."""
    table: str
    """File of the table that the row stands in."""
    table_row: str
    """Id of the line in the table; the jobs of a row's seeds share it."""
    seed: int
    """Of training; evaluation's controls follow the run's seed, so that all seeds answer the same questions."""
    pool: Pool
    nodes: int
    processes_per_node: int
    num_crops: int
    departures: Departures = {}

    @property
    def processes(self) -> int:
        return self.nodes * self.processes_per_node

    @property
    def baseline(self) -> str:
        """Name of the evaluation before training; rows that start from the same model and inputs share it."""
        row = self.row
        return f"{row.model}-{row.dataset}-{row.dtype}{'-flash' if row.flash_attention else ''}-crops{self.num_crops}"


class NotRun(BaseModel):
    """A selected row that this run's hardware cannot do."""

    row: AnyRow
    reason: str


class ResolvedRun(BaseModel):
    """A run with its tables read, its rows selected and placed."""

    settings: Run
    models: dict[str, Model]
    datasets: dict[str, Dataset]
    hardware: dict[str, Hardware]
    accuracy: list[Job]
    speed: list[Job]
    not_run: list[NotRun]
    demo: Demo | None

    @functools.cached_property
    def _by_id(self) -> dict[str, Job]:
        return {job.row.row: job for job in (*self.accuracy, *self.speed)}

    @property
    def results(self) -> str:
        """Folder of the run's results."""
        return f"results/{self.settings.name}"

    def data_folder(self, dataset: str) -> str:
        """Folder of a converted dataset, which all runs share."""
        return f"results/data/{dataset_key(dataset, self.datasets[dataset])}"

    def model_folder(self, model: str) -> str:
        """Folder of a downloaded checkpoint, which all runs share."""
        return f"results/models/{model_key(model, self.models[model])}"

    def job(self, row: str) -> Job:
        """The job of an id; raises KeyError."""
        return self._by_id[row]

    @functools.cached_property
    def datasets_by_key(self) -> dict[str, str]:
        """Last part of each data folder to the name of its entry."""
        return {dataset_key(name, entry): name for name, entry in self.datasets.items()}

    def dataset_of(self, key: str) -> Dataset:
        """The entry of a data folder. Raises KeyError."""
        return self.datasets[self.datasets_by_key[key]]

    @functools.cached_property
    def models_by_key(self) -> dict[str, str]:
        """Last part of each model's folder to the name of its entry."""
        return {model_key(name, entry): name for name, entry in self.models.items()}

    @functools.cached_property
    def baselines(self) -> dict[str, Job]:
        """Name of each evaluation before training to the first job that starts from it."""
        return {job.baseline: job for job in reversed(self.accuracy)}

    @functools.cached_property
    def digest(self) -> str:
        """Changes if anything that the run's files state does."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def evaluated(self, name: str) -> str:
        """The dataset of an evaluation: ROW, base/KEY or official/ROW. Raises KeyError."""
        kind, _, name = name.rpartition("/")
        job = self.baselines[name] if kind == "base" else self.job(name)
        return self.datasets[job.row.dataset].official if kind == "official" else job.row.dataset

    def manifests(self, job: Job) -> list[str]:
        """What a row ends with: its evaluations before and after, that on the authors' own split where its files are
        there, or its timing. An evaluation that functions of the user's score ends with their scores."""
        row = job.row.row
        if isinstance(job.row, SpeedRow):
            return [f"{self.results}/speed/{row}/manifest.json"]
        names = [row, f"base/{job.baseline}", *([f"official/{row}"] if self.official(job) else [])]
        scored = [self.datasets[self.evaluated(name)].own_metrics for name in names]
        kinds = ["score" if own else "evaluate" for own in scored]
        return [f"{self.results}/{kind}/{name}/manifest.json" for kind, name in zip(kinds, names, strict=True)]

    def official(self, job: Job, root: Path = Path()) -> str | None:
        """Entry of the authors' own split for a row's dataset, where its files are there."""
        name = self.datasets[job.row.dataset].official
        return name if name and self.datasets[name].missing_source(root) is None else None

    def targets(self) -> dict[str, list[Job]]:
        """Name of each target to its jobs: a row's id to those of all its seeds and of its grid, a seed's id to its own."""
        found: dict[str, list[Job]] = {}
        for job in (*self.accuracy, *self.speed):
            for name in dict.fromkeys((job.row.row, job.table_row, table_line(job.table_row))):
                found.setdefault(name, []).append(job)
        return found


# Loading ---------------------------------------------------------------------------------------------------------------


def load_run(config: str | Path | dict[str, Any], root: str | Path = ".") -> ResolvedRun:
    """Read a run configuration and its tables, check them, and place the selected rows on the run's hardware.

    config: path of a YAML file, or its values (what Snakemake hands over). root: folder that file names start from.
    Raises SettingsError.
    """
    root = Path(root)
    where = "configuration" if isinstance(config, dict) else str(config)
    settings = validate(Run, config if isinstance(config, dict) else read_yaml(config), where)
    demo = validate(Demo, read_yaml(root / settings.demo), settings.demo) if settings.demo else None
    if settings.demo and demo:
        beside = [os.path.normpath(Path(settings.demo).parent / name) for name in demo.datasets]
        named = {(root / name).resolve() for name in settings.files.datasets}
        datasets = [*settings.files.datasets, *(name for name in beside if (root / name).resolve() not in named)]
        files = settings.files.model_copy(update={"datasets": datasets})
        settings = settings.model_copy(update={"files": files})
    run = ResolvedRun(
        settings=settings,
        models=read_entries(settings.files.models, Model, root),
        datasets=read_entries(settings.files.datasets, Dataset, root),
        hardware=read_entries(settings.files.hardware, Hardware, root),
        demo=demo,
        accuracy=[],
        speed=[],
        not_run=[],
    )
    tables: dict[str, list[tuple[str, AnyRow]]] = {
        "accuracy": [*read_tables(settings.files.accuracy, AccuracyRow, root)],
        "speed": [*read_tables(settings.files.speed, SpeedRow, root)],
    }
    _check_names(where, run)
    row_files = _check_tables(run, [*tables["accuracy"], *tables["speed"]])
    unused = set(settings.overrides)
    for kind, table in tables.items():
        selected = getattr(settings.rows, kind)
        rows = [
            (path, row, departures)
            for path, table_row in table
            for row, departures in _overridden(where, table_row, settings.overrides, unused, row_files)
        ]
        for pattern in selected:
            # The default takes every row; a run may have tables of one kind only.
            nothing_needed = pattern == "*" and any(tables.values())
            if not nothing_needed and not any(_matches(row.row, pattern) for _, row, _ in rows):
                raise SettingsError(
                    f"{where}: field `rows.{kind}`: got {pattern!r}: matches no row; expected a row id or a pattern of "
                    f"{', '.join(getattr(settings.files, kind)) or 'a table (none is named in files)'}"
                )
        for path, row, departures in rows:
            if any(_matches(row.row, pattern) for pattern in selected):
                getattr(run, kind).extend(_jobs(where, run, path, row, departures, row_files))
    for name, prediction in settings.predictions.items():
        check_known(where, f"predictions.{name}.row", prediction.row, [job.row.row for job in run.accuracy])
    if unused:
        raise SettingsError(f"{where}: field `overrides`: pattern {sorted(unused)[0]!r} matches no row of the tables")
    return run


def _check_names(where: str, run: ResolvedRun) -> None:
    """Raises SettingsError if an entry, a pool or the demo names something unknown."""
    for name, entry in run.datasets.items():
        if entry.official:
            check_known(f"dataset `{name}`", "official", entry.official, run.datasets)
    for pool in run.settings.hardware:
        check_known(where, "hardware.device", pool.device, run.hardware)
    if run.demo:
        for field, name in [*(("texts", name) for name in run.demo.texts), ("mixture", run.demo.mixture)]:
            check_known(str(run.settings.demo), field, name, run.datasets)


def _check_tables(run: ResolvedRun, tables: list[tuple[str, AnyRow]]) -> dict[str, str]:
    """Id of each row to its file. Raises SettingsError for an id used twice, or the name of something unknown."""
    files: dict[str, str] = {}
    published = [row.row for _, row in tables if isinstance(row, SpeedRow) and not row.accompanies]
    for path, row in tables:
        where = f"{path}: row `{row.row}`"
        if row.row in files:
            raise SettingsError(f"{where}: field `row`: already used in {files[row.row]}; expected unique")
        files[row.row] = path
        check_known(where, "model", row.model, run.models)
        check_known(where, "dataset", row.dataset, run.datasets)
        if "train" not in run.datasets[row.dataset].splits:
            raise SettingsError(
                f"{where}: field `dataset`: got {row.dataset!r}: it has no split `train`; expected one to train on"
            )
        if isinstance(row, SpeedRow):
            check_known(where, "hardware", row.hardware, run.hardware)
            if row.accompanies and row.accompanies not in published:
                raise SettingsError(
                    f"{where}: field `accompanies`: got {row.accompanies!r}: expected a published row of the speed table"
                )
    for pool in run.settings.hardware:
        for pattern in pool.rows:
            if pattern != "*" and not any(_matches(row, pattern) for row in files):
                raise SettingsError(
                    f"hardware pool {pool.device}: field `rows`: got {pattern!r}: matches no row; expected a row id or a "
                    "pattern of the tables"
                )
    return files


def _matches(row: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(row, pattern) or fnmatch.fnmatchcase(table_line(row), pattern)


def _overridden(
    where: str, row: AnyRow, overrides: dict[str, dict[str, Any]], unused: set[str], files: dict[str, str]
) -> Iterator[tuple[AnyRow, Departures]]:
    """The row with the run's overrides, and what they changed; several rows if an override is a grid.

    The patterns that match are taken out of `unused`.
    """
    values: dict[str, Any] = {}
    for pattern, fields in overrides.items():
        if _matches(row.row, pattern):
            unused.discard(pattern)
            values.update(fields)
    where = f"{where}: overrides of row `{row.row}`"
    fixed = [name for name in values if name in fields_with(type(row), Role.IDENTITY, Role.PUBLISHED)]
    if fixed:
        raise SettingsError(f"{where}: field `{fixed[0]}` cannot be overridden")
    before = row.model_dump()
    for suffix, own in grid(type(row), values, where):
        changed = validate(type(row), {**before, **own, "row": row.row + suffix}, where)
        if suffix and changed.row in files:
            raise SettingsError(f"{where}: the grid makes the id {changed.row}, which is a row of {files[changed.row]}")
        own_settings(changed, where)
        after = changed.model_dump()
        yield changed, {field: (before[field], after[field]) for field in own if before[field] != after[field]}


def _cannot(row: Training, device: Hardware) -> str | None:
    """Why the device cannot do the row, or None."""
    if row.dtype == "bf16" and not device.bf16:
        return f"dtype: bf16, {device.title} has none; expected fp16"
    if row.dtype == "fp16" and not device.fp16:
        return f"dtype: fp16, {device.title} has none; expected bf16"
    if row.method == "qlora" and not device.quantisation:
        return f"method: qlora, {device.title} has no 4-bit kernels; expected full, frozen or lora"
    return None


def place_accuracy(gpus: int, pool: Pool) -> tuple[int, int]:
    """(nodes, processes a node) of an accuracy row that asks for `gpus`: as many where the pool has them, else all.

    Several machines only where one has too few devices, and each gives all of its own.
    """
    return max(1, min(pool.nodes, gpus // pool.per_node)), min(gpus, pool.per_node)


def _place_speed(row: SpeedRow, pool: Pool) -> tuple[int, int] | str:
    """(nodes, processes a node), or why the pool is not the one of the row."""
    if pool.stand_in:
        return 1, pool.per_node
    if pool.device == row.hardware and pool.nodes >= row.nodes and pool.per_node >= row.gpus_per_node:
        return row.nodes, row.gpus_per_node
    return f"needs {row.nodes * row.gpus_per_node} {row.hardware} on {row.nodes} node(s)"


def _place(where: str, row: AnyRow, pools: list[Pool], hardware: dict[str, Hardware]) -> tuple[Pool, int, int] | str:
    """(first pool that can do the row, nodes, processes per node), or why none can.

    Raises SettingsError if the batch size is all that is wrong with a pool.
    """
    reasons: list[str] = []
    wrong_batch = ""
    for pool in pools:
        if not any(_matches(row.row, pattern) for pattern in pool.rows):
            reasons.append(f"hardware.rows: no pattern of the {pool.device} pool matches")
            continue
        placed = _cannot(row, hardware[pool.device]) or (
            place_accuracy(row.gpus, pool) if isinstance(row, AccuracyRow) else _place_speed(row, pool)
        )
        if isinstance(placed, str):
            reasons.append(placed)
            continue
        processes = placed[0] * placed[1]
        step = processes * row.known_micro_batch
        if row.batch_size % step == 0:
            return pool, *placed
        wrong_batch = (
            f"{where}: row `{row.row}`: field `batch_size`: got {row.batch_size}: expected a multiple of "
            f"{processes} processes x micro_batch_size {row.micro_batch_size} = {step}"
        )
    if wrong_batch:
        raise SettingsError(wrong_batch)
    return "; ".join(dict.fromkeys(reasons))


def _jobs(
    where: str, run: ResolvedRun, path: str, row: AnyRow, departures: Departures, files: dict[str, str]
) -> list[Job]:
    """The jobs of a selected row, one for each of its seeds; none if no pool can do it, which `run.not_run` tells."""
    placed = _place(path, row, run.settings.hardware, run.hardware)
    if isinstance(placed, str):
        if run.settings.rows.names(row.row):
            raise SettingsError(f"{path}: row `{row.row}`: named in `rows`, but field {placed}")
        if {"dtype", "method"} & set(departures):
            raise SettingsError(f"{where}: overrides of row `{row.row}`: field {placed}")
        run.not_run.append(NotRun(row=row, reason=placed))
        return []
    pool, nodes, processes = placed
    crops = row.num_crops or run.datasets[row.dataset].num_crops
    jobs = []
    for seed in (isinstance(row, AccuracyRow) and row.seeds) or [run.settings.seed]:
        own = row if seed == run.settings.seed else row.model_copy(update={"row": f"{row.row}-seed{seed}"})
        if own is not row and own.row in files:
            raise SettingsError(
                f"row `{row.row}`: field `seeds`: seed {seed} makes the id {own.row}, which is a row of "
                f"{files[own.row]}; expected another id there"
            )
        machines = {"pool": pool, "nodes": nodes, "processes_per_node": processes}
        jobs.append(
            Job(row=own, table=path, table_row=row.row, seed=seed, departures=departures, num_crops=crops, **machines)
        )
    return jobs
