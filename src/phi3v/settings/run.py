"""A run: its configuration file, and its selected rows placed on the machines it has.

run = load_run("config/demo.yaml")          # raises SettingsError
for job in run.accuracy:
    print(job.row.row, job.processes, job.departures)
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from phi3v.settings.base import SettingsError, Strict
from phi3v.settings.entries import Dataset, Hardware, Model, dataset_key, model_key
from phi3v.settings.rows import AccuracyRow, Name, Seed, SpeedRow, WorkersOrAuto


class Pool(Strict):
    """Machines of one kind that the run has."""

    device: str
    """Entry of the hardware file."""
    per_node: int = Field(ge=1)
    """Devices (CPU: processes) of one machine."""
    nodes: int = Field(1, ge=1)
    """Machines."""
    slurm_partition: str = ""
    """Partition of these machines; empty: the profile's or the cluster's default."""
    stand_in: bool = False
    """Stands for any published hardware: speed rows run here with these processes, and are labelled so."""
    price_per_hour: float | None = Field(None, gt=0)
    """What one device costs you for an hour, in your currency; empty: the plan shows no price."""


class Files(Strict):
    """The tables of a run; later files add to earlier ones."""

    models: list[str] = Field(min_length=1)
    datasets: list[str] = Field(min_length=1)
    hardware: list[str] = Field(min_length=1)
    accuracy: list[str] = []
    speed: list[str] = []


class Selection(Strict):
    """Rows by name or shell pattern. A row asked for by its exact name must be possible; a pattern takes what is."""

    accuracy: list[str] = ["*"]
    speed: list[str] = ["*"]


class Evaluation(Strict):
    """How checkpoints are evaluated."""

    batch_size_per_gpu: int = Field(8, ge=1)
    """Prompts generated together by one process."""
    max_new_tokens: int = Field(64, ge=1)
    """The recipe's limit of an answer."""
    control: bool = True
    """Evaluate the trained model also with the pictures swapped among the examples."""


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
    learning_rate: float = Field(gt=0, lt=1)
    epochs: float = Field(gt=0)
    batch_size: int = Field(64, ge=1)
    micro_batch_size: int = Field(32, ge=1)
    num_crops: int = Field(4, ge=1)


class Demo(Strict):
    """Synthetic source files and the tiny base model that the demo starts from."""

    folder: str
    """Where they are written; the demo's dataset and model URLs point there."""
    seed: int = 0
    sizes: dict[str, int]
    """Rows of each source file."""
    texts: list[str] = Field(min_length=1)
    """Datasets whose training texts the tokenizer learns."""
    geometry: dict[str, int]
    """Shape of the tiny model: arguments of phi3v.demo.tiny.build_tiny."""
    mixture: str
    """Dataset that the tiny base model is first trained on."""
    base: DemoBase


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
    hardware: list[Pool] = Field(min_length=1)
    """Machines that this run has; a row goes to the first pool that can do it."""
    rows: Selection = Selection()
    overrides: dict[str, dict[str, Any]] = {}
    """Row pattern to fields: every departure of this run from the tables, shown in the report."""
    evaluation: Evaluation = Evaluation()
    speed: SpeedMeasurement = SpeedMeasurement()
    num_workers: WorkersOrAuto = "auto"
    """Data loading processes of each training process; auto: one less than its CPUs on a GPU, at most 8, none on a CPU."""
    save_minutes: float = Field(30, ge=0)
    """Checkpoint of each training job after so many minutes: what a machine that fails may cost; 0: none."""
    demo: str | None = None
    """File that says how synthetic sources and a tiny base model are made, for runs whose URLs point there."""


class Job(BaseModel):
    """A row placed on a pool, with one seed."""

    model_config = ConfigDict(frozen=True)

    row: AccuracyRow | SpeedRow
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
    departures: dict[str, tuple[Any, Any]] = {}
    """Field to (table's value, this run's value)."""

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

    row: AccuracyRow | SpeedRow
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

    def official(self, job: Job, root: Path = Path()) -> str | None:
        """Entry of the authors' own split for a row's dataset, where its files are there."""
        name = self.datasets[job.row.dataset].official
        return name if name and self.datasets[name].missing_source(root) is None else None

    def by_table_row(self) -> dict[str, list[Job]]:
        """Id of each line of the tables to its jobs: one, or one for each of its seeds, in their order."""
        grouped: dict[str, list[Job]] = {}
        for job in (*self.accuracy, *self.speed):
            grouped.setdefault(job.table_row, []).append(job)
        return grouped

    def targets(self, rules: Iterable[str]) -> dict[str, list[Job]]:
        """Name of each target to its jobs: a row's id to those of all its seeds, a seed's id to its own.

        rules: names that the workflow's rules have already. Raises SettingsError for a row of such a name.
        """
        found = {**{name: [job] for name, job in self._by_id.items()}, **self.by_table_row()}
        taken = sorted(found.keys() & set(rules))
        if taken:
            job = found[taken[0]][0]
            raise SettingsError(
                f"{job.table}: row `{job.table_row}`: field `row`: got {taken[0]!r}: the workflow has a rule of this name; "
                "expected a name that no rule has"
            )
        return found
