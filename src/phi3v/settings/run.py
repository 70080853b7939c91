"""A run: its configuration file, and the assignment of its rows to the machines that it has.

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
    check_choice,
    fields_with,
    number_of,
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
"""Field to (value in the table, value in this run)."""


class Pool(Strict):
    """Machines of one kind that the run can use."""

    device: str
    """Entry of the hardware file."""
    per_node: int = Field(ge=1)
    """Devices per machine. For CPUs, processes per machine."""
    nodes: int = Field(1, ge=1)
    """Number of machines."""
    rows: list[str] = ["*"]
    """Rows that may run here, by id or shell pattern."""
    slurm_partition: str = ""
    """SLURM partition of these machines. Empty: the site file's partition, or the cluster's default."""
    stand_in: bool = False
    """Use these machines in place of any published hardware. Speed rows run here with `per_node` processes, and the
    report labels them."""
    price_per_hour: float | None = Field(None, gt=0)
    """Price of one device per hour, in your currency. Empty: the plan contains no price."""


class Files(Strict):
    """Tables of a run. Later files add to earlier ones."""

    models: list[str] = Field(min_length=1)
    """YAML files of checkpoints."""
    datasets: list[str] = Field(min_length=1)
    """YAML files of datasets."""
    hardware: list[str] = Field(min_length=1)
    """YAML files of devices."""
    accuracy: list[str] = []
    """Tables of accuracy rows."""
    speed: list[str] = []
    """Tables of speed rows."""


class Selection(Strict):
    """Rows by id or shell pattern. A row given by its exact id must be able to run. A pattern skips rows that
    cannot."""

    accuracy: list[str] = ["*"]
    """Accuracy rows to run."""
    speed: list[str] = ["*"]
    """Speed rows to run."""

    def names(self, row: str) -> bool:
        """Whether the selection contains the exact id of a row, or of the table line whose grid the row belongs to."""
        return not {row, table_line(row)}.isdisjoint((*self.accuracy, *self.speed))


class Evaluation(Strict):
    """Evaluation of checkpoints."""

    batch_size_per_gpu: int = Field(8, ge=1)
    """Prompts per generation batch of one process."""
    max_new_tokens: int = Field(64, ge=1)
    """Maximum number of tokens in an answer (64 in the recipe)."""
    control: bool = True
    """Also evaluate the trained model with the pictures swapped among the examples."""


class Prediction(Strict):
    """Pictures without labels that a trained row answers (target `predictions`)."""

    row: str
    """Accuracy row whose trained model answers."""
    table: str = ""
    """Table of pictures and questions to answer: csv, tsv, json, jsonl or parquet."""
    columns: dict[str, str] = {}
    """Role of each table column: `{image: photo, question: prompt, id: number}`."""
    images_dir: str = ""
    """Folder that the table's picture paths are relative to. Empty: the table's folder."""
    folder: str = ""
    """Folder whose pictures are answered, subfolders included."""
    question: str = ""
    """Question about each picture of the folder, or each row of a table without a question column."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Maximum number of tokens in an answer. Empty: the same as in the row's evaluation."""

    @model_validator(mode="after")
    def _one_source(self) -> Prediction:
        if bool(self.table) == bool(self.folder):
            raise ValueError("got both table and folder, or neither; expected exactly one of them")
        return self

    @property
    def files(self) -> list[str]:
        """The table, or all files of the folder."""
        if self.table:
            return [self.table]
        return [str(path) for path in sorted(Path(self.folder).rglob("*")) if path.is_file()]


class SpeedMeasurement(Strict):
    """Timing of a speed row."""

    warmup_steps: int = Field(10, ge=10)
    """Untimed optimizer steps before the first timed window."""
    timed_steps: int = Field(20, ge=1)
    """Optimizer steps in one timed window."""
    repeats: int = Field(3, ge=3)
    """Number of timed windows."""


class DemoBase(Strict):
    """Initial training of the demo's tiny base model."""

    processes: int = Field(2, ge=1)
    """Number of training processes."""
    learning_rate: float = Field(gt=0, lt=1)
    """Peak learning rate."""
    epochs: float = Field(gt=0)
    """Number of passes over the mixture."""
    batch_size: int = Field(64, ge=1)
    """Examples per optimizer step, over all processes."""
    micro_batch_size: int = Field(32, ge=1)
    """Examples per forward pass of one process."""
    num_crops: int = Field(4, ge=1)
    """Largest number of tiles per picture."""


class Demo(Strict):
    """Synthetic source files and the tiny base model of the demo."""

    folder: str
    """Folder for them. The demo's dataset and model URLs point to it."""
    seed: int = 0
    """Seed of the synthetic sources and of the base model."""
    sizes: dict[str, int]
    """Rows per source file."""
    datasets: list[str] = []
    """Datasets files with the entries of `texts` and `mixture`, in the folder of this file. A run does not have to list
    them again."""
    texts: list[str] = Field(min_length=1)
    """Datasets whose training texts train the tokenizer."""
    geometry: dict[str, int]
    """Shape of the tiny model: arguments of phi3v.demo.tiny.build_tiny."""
    mixture: str
    """Dataset that the base model is trained on."""
    base: DemoBase
    """Initial training of the base model."""


class Run(Strict):
    """A run's configuration file."""

    name: Name
    """Name of the run. Results go to results/NAME."""
    title: str
    """Heading of the report."""
    notice: str = ""
    """Text above every table, for runs whose numbers must not be compared."""
    comparable: bool = True
    """false: numbers of this run must not be compared with published ones (demo)."""
    seed: Seed = 42
    """Seed of the data order, initial adapter weights and controls. A row's `seeds` add more seeds."""
    files: Files
    """Tables of the run."""
    hardware: list[Pool] = Field(min_length=1)
    """Machines that this run can use. A row runs on the first pool that supports it."""
    rows: Selection = Selection()
    """Rows to run."""
    overrides: dict[str, dict[str, Any]] = {}
    """Row pattern to fields: all of this run's departures from the tables. The report lists them."""
    evaluation: Evaluation = Evaluation()
    """Evaluation of checkpoints."""
    predictions: dict[Name, Prediction] = {}
    """Answers for new pictures, by name. The target `predictions` writes them to results/NAME/predictions/."""
    speed: SpeedMeasurement = SpeedMeasurement()
    """Timing of speed rows."""
    num_workers: WorkersOrAuto = "auto"
    """Data loading processes per training process. auto: on a GPU, its share of CPUs minus one, at most 8; on a CPU,
    none."""
    save_minutes: float = Field(30, ge=0)
    """Save a checkpoint of each training job every N minutes. A crash repeats at most this much work. 0: off."""
    demo: str | None = None
    """File that describes the synthetic sources and the tiny base model, for runs whose URLs point to them."""


class Job(BaseModel):
    """A row assigned to a pool, with one seed."""

    model_config = ConfigDict(frozen=True)

    row: AnyRow
    """`row.row` is the id of the job: the table row's id, or ROW-seedN."""
    table: str
    """File of the row's table."""
    table_row: str
    """Id of the line in the table. The jobs of all seeds of a row share it."""
    seed: int
    """Seed of training. Evaluation uses the run's seed, so that all training seeds answer the same questions."""
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
        """Name of the evaluation before training. Rows with the same model and inputs share it."""
        row = self.row
        return f"{row.model}-{row.dataset}-{row.dtype}{'-flash' if row.flash_attention else ''}-crops{self.num_crops}"


# Names of the fields that are set. If each of 10,000 jobs and rows kept a set of its own, they would take 30 MB more.
FIELDS: dict[type[BaseModel], set[str]] = {model: set(model.model_fields) for model in (Job, AccuracyRow, SpeedRow)}


class NotRun(BaseModel):
    """A selected row that the run's hardware cannot run."""

    row: AnyRow
    reason: str


class ResolvedRun(BaseModel):
    """A run with its tables read and its selected rows assigned to machines."""

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
        """The job with an id. Raises KeyError."""
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
        """Name of each evaluation before training to the first job that uses it."""
        return {job.baseline: job for job in reversed(self.accuracy)}

    @functools.cached_property
    def digest(self) -> str:
        """Changes if any content of the run's files changes."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def evaluated(self, name: str) -> str:
        """The dataset of an evaluation. name: ROW, base/KEY or official/ROW. Raises KeyError."""
        kind, _, name = name.rpartition("/")
        job = self.baselines[name] if kind == "base" else self.job(name)
        return self.datasets[job.row.dataset].official if kind == "official" else job.row.dataset

    def manifests(self, job: Job) -> list[str]:
        """Manifests of a row's last steps: its timing, or its evaluations before and after training, and on the
        authors' own split if its files exist. For evaluations with the user's own metrics, these are the manifests of
        their scores."""
        row = job.row.row
        if isinstance(job.row, SpeedRow):
            return [f"{self.results}/speed/{row}/manifest.json"]
        names = [row, f"base/{job.baseline}", *([f"official/{row}"] if self.official(job) else [])]
        scored = [self.datasets[self.evaluated(name)].own_metrics for name in names]
        kinds = ["score" if own else "evaluate" for own in scored]
        return [f"{self.results}/{kind}/{name}/manifest.json" for kind, name in zip(kinds, names, strict=True)]

    def official(self, job: Job, root: Path = Path()) -> str | None:
        """Entry of the authors' own split for a row's dataset, or None if there is none or its files do not exist."""
        name = self.datasets[job.row.dataset].official
        return name if name and self.datasets[name].missing_source(root) is None else None

    def targets(self) -> dict[str, list[Job]]:
        """Name of each target to its jobs: a row's id to the jobs of its seeds and grid, a seed's id to its own job."""
        found: dict[str, list[Job]] = {}
        for job in (*self.accuracy, *self.speed):
            for name in dict.fromkeys((job.row.row, job.table_row, table_line(job.table_row))):
                found.setdefault(name, []).append(job)
        return found


# Loading ---------------------------------------------------------------------------------------------------------------


def load_run(config: str | Path | dict[str, Any], root: str | Path = ".") -> ResolvedRun:
    """Reads and checks a run configuration and its tables, and assigns the selected rows to the run's hardware.

    config: path of a YAML file, or its values as Snakemake passes them. root: folder that file names are relative to.
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
            # The default pattern may match nothing, because a run can have tables of only one kind.
            nothing_needed = pattern == "*" and any(tables.values())
            if not nothing_needed and not any(_matches(row.row, pattern) for _, row, _ in rows):
                raise SettingsError(
                    f"{where}: field `rows.{kind}`: got {pattern!r}: matches no row; expected a row id or pattern from "
                    f"{', '.join(getattr(settings.files, kind)) or 'a table (none is named in files)'}"
                )
        for path, row, departures in rows:
            if any(_matches(row.row, pattern) for pattern in selected):
                getattr(run, kind).extend(_jobs(where, run, path, row, departures, row_files))
    for name, prediction in settings.predictions.items():
        check_choice(where, f"predictions.{name}.row", prediction.row, [job.row.row for job in run.accuracy])
    if unused:
        raise SettingsError(
            f"{where}: field `overrides`: got pattern {sorted(unused)[0]!r}: matches no row of the tables; correct it "
            "or "
            "remove it"
        )
    return run


def _check_names(where: str, run: ResolvedRun) -> None:
    """Raises SettingsError if a dataset entry, a pool or the demo names an unknown entry."""
    for name, entry in run.datasets.items():
        if entry.official:
            check_choice(f"dataset `{name}`", "official", entry.official, run.datasets)
    for pool in run.settings.hardware:
        check_choice(where, "hardware.device", pool.device, run.hardware)
    if run.demo:
        for field, name in [*(("texts", name) for name in run.demo.texts), ("mixture", run.demo.mixture)]:
            check_choice(str(run.settings.demo), field, name, run.datasets)


def _check_tables(run: ResolvedRun, tables: list[tuple[str, AnyRow]]) -> dict[str, str]:
    """Id of each row to its file. Raises SettingsError for a repeated id, or the name of an unknown entry."""
    files: dict[str, str] = {}
    published = [row.row for _, row in tables if isinstance(row, SpeedRow) and not row.accompanies]
    for path, row in tables:
        where = f"{path}: row `{row.row}`"
        if row.row in files:
            raise SettingsError(
                f"{where}: field `row`: already used in {files[row.row]}; choose another id for one of them"
            )
        files[row.row] = path
        check_choice(where, "model", row.model, run.models)
        check_choice(where, "dataset", row.dataset, run.datasets)
        if "train" not in run.datasets[row.dataset].splits:
            raise SettingsError(
                f"{where}: field `dataset`: got {row.dataset!r}: has no split `train`; expected a dataset with one"
            )
        if isinstance(row, SpeedRow):
            check_choice(where, "hardware", row.hardware, run.hardware)
            if row.accompanies and row.accompanies not in published:
                raise SettingsError(
                    f"{where}: field `accompanies`: got {row.accompanies!r}: expected a published row of the speed "
                    "table"
                )
    for pool in run.settings.hardware:
        for pattern in pool.rows:
            if pattern != "*" and not any(_matches(row, pattern) for row in files):
                raise SettingsError(
                    f"hardware pool {pool.device}: field `rows`: got {pattern!r}: matches no row; expected a row id or "
                    "a "
                    "pattern of the tables"
                )
    return files


def _matches(row: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(row, pattern) or fnmatch.fnmatchcase(table_line(row), pattern)


def _overridden(
    where: str, row: AnyRow, overrides: dict[str, dict[str, Any]], unused: set[str], files: dict[str, str]
) -> Iterator[tuple[AnyRow, Departures]]:
    """The row with the run's overrides, and the fields that they changed. Yields several rows if an override is a grid.

    Removes the patterns that match from `unused`.
    """
    values: dict[str, Any] = {}
    for pattern, fields in overrides.items():
        if _matches(row.row, pattern):
            unused.discard(pattern)
            values.update(fields)
    where = f"{where}: overrides of row `{row.row}`"
    fixed = [name for name in values if name in fields_with(type(row), Role.IDENTITY, Role.PUBLISHED)]
    if fixed:
        raise SettingsError(f"{where}: field `{fixed[0]}` cannot be overridden; change it in a table of your own")
    if not values:
        own_settings(row, where)
        yield row, {}
        return
    before = row.model_dump()
    for suffix, own in grid(type(row), values, where):
        changed = validate(type(row), {**before, **own, "row": row.row + suffix}, where)
        if suffix and changed.row in files:
            raise SettingsError(
                f"{where}: the grid creates the id {changed.row}, which {files[changed.row]} already contains; rename "
                "that row"
            )
        own_settings(changed, where)
        after = changed.model_dump()
        yield changed, {field: (before[field], after[field]) for field in own if before[field] != after[field]}


def _cannot(row: Training, device: Hardware) -> str | None:
    """Why the device cannot run the row, or None."""
    if row.dtype == "bf16" and not device.bf16:
        return f"dtype: bf16, which {device.title} does not support; expected fp16"
    if row.dtype == "fp16" and not device.fp16:
        return f"dtype: fp16, which {device.title} does not support; expected bf16"
    if row.method == "qlora" and not device.quantisation:
        return f"method: qlora, which needs 4-bit kernels that {device.title} lacks; expected full, frozen or lora"
    return None


def place_accuracy(gpus: int, pool: Pool) -> tuple[int, int]:
    """(nodes, processes per node) of an accuracy row that asks for `gpus` devices: that many, or all that the pool has.

    Uses several machines only if one has too few devices, and then all devices of each.
    """
    return max(1, min(pool.nodes, gpus // pool.per_node)), min(gpus, pool.per_node)


def _place_speed(row: SpeedRow, pool: Pool) -> tuple[int, int] | str:
    """(nodes, processes per node), or why the pool does not match the row."""
    if pool.stand_in:
        return 1, pool.per_node
    if pool.device == row.hardware and pool.nodes >= row.nodes and pool.per_node >= row.gpus_per_node:
        return row.nodes, row.gpus_per_node
    return f"hardware: needs {number_of(row.nodes, 'node')} with {row.gpus_per_node} {row.hardware}{'' if row.nodes == 1 else ' each'}"


def _place(where: str, row: AnyRow, pools: list[Pool], hardware: dict[str, Hardware]) -> tuple[Pool, int, int] | str:
    """(first pool that can run the row, nodes, processes per node), or why none can.

    Raises SettingsError if only the batch size prevents a pool from running the row.
    """
    reasons: list[str] = []
    wrong_batch = ""
    for pool in pools:
        if not any(_matches(row.row, pattern) for pattern in pool.rows):
            reasons.append(f"hardware.rows: no pattern of the {pool.device} pool matches")
            continue
        assigned = _cannot(row, hardware[pool.device]) or (
            place_accuracy(row.gpus, pool) if isinstance(row, AccuracyRow) else _place_speed(row, pool)
        )
        if isinstance(assigned, str):
            reasons.append(assigned)
            continue
        processes = assigned[0] * assigned[1]
        step = processes * row.micro_batch_size_or_one
        if row.batch_size % step == 0:
            return pool, *assigned
        wrong_batch = (
            f"{where}: row `{row.row}`: field `batch_size`: got {row.batch_size}: expected a multiple of "
            f"{number_of(processes, 'process', 'processes')} x micro_batch_size {row.micro_batch_size} = {step}"
        )
    if wrong_batch:
        raise SettingsError(wrong_batch)
    return "; ".join(dict.fromkeys(reasons))


def _jobs(
    where: str, run: ResolvedRun, path: str, row: AnyRow, departures: Departures, files: dict[str, str]
) -> list[Job]:
    """The jobs of a selected row, one per seed. If no pool can run it, adds it to `run.not_run` and returns no job."""
    assigned = _place(path, row, run.settings.hardware, run.hardware)
    if isinstance(assigned, str):
        if run.settings.rows.names(row.row):
            raise SettingsError(f"{path}: row `{row.row}`: selected by its id in `rows`, but field {assigned}")
        if {"dtype", "method"} & set(departures):
            raise SettingsError(f"{where}: overrides of row `{row.row}`: field {assigned}")
        run.not_run.append(NotRun(row=row, reason=assigned))
        return []
    pool, nodes, processes = assigned
    crops = row.num_crops or run.datasets[row.dataset].num_crops
    jobs = []
    for seed in (isinstance(row, AccuracyRow) and row.seeds) or [run.settings.seed]:
        name = row.row if seed == run.settings.seed else f"{row.row}-seed{seed}"
        if name != row.row and name in files:
            raise SettingsError(
                f"row `{row.row}`: field `seeds`: seed {seed} creates the id {name}, which {files[name]} already "
                "contains; rename that row"
            )
        own = type(row).model_construct(FIELDS[type(row)], **{**dict(row), "row": name})
        jobs.append(
            Job.model_construct(
                FIELDS[Job],
                row=own,
                table=path,
                table_row=row.row,
                seed=seed,
                pool=pool,
                nodes=nodes,
                processes_per_node=processes,
                num_crops=crops,
                departures=departures,
            )
        )
    return jobs
