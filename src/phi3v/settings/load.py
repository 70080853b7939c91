"""Loading a run: its tables are read and checked, and its selected rows are placed on the machines it has."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from phi3v.settings.base import Role, SettingsError, check_known, fields_with, read_entries, read_yaml, validate
from phi3v.settings.commands import own_settings
from phi3v.settings.entries import Dataset, Hardware, Model
from phi3v.settings.rows import AccuracyRow, SpeedRow, Training, read_tables
from phi3v.settings.run import Demo, Job, NotRun, Pool, ResolvedRun, Run

AnyRow = AccuracyRow | SpeedRow
Departures = dict[str, tuple[Any, Any]]
"""Field to (table's value, this run's value)."""


def _apply_overrides(
    where: str, row: AnyRow, overrides: dict[str, dict[str, Any]], unused: set[str]
) -> tuple[AnyRow, Departures]:
    """The row with the run's overrides, and what they changed; their patterns are taken out of `unused`."""
    values: dict[str, Any] = {}
    for pattern, fields in overrides.items():
        if fnmatch.fnmatchcase(row.row, pattern):
            unused.discard(pattern)
            values.update(fields)
    fixed = [name for name in values if name in fields_with(type(row), Role.IDENTITY, Role.PUBLISHED)]
    if fixed:
        raise SettingsError(f"{where}: overrides of row `{row.row}`: field `{fixed[0]}` cannot be overridden")
    changed = validate(type(row), {**row.model_dump(), **values}, f"{where}: overrides of row `{row.row}`")
    own_settings(changed, f"{where}: overrides of row `{row.row}`")
    before, after = row.model_dump(), changed.model_dump()
    return changed, {field: (before[field], after[field]) for field in values if before[field] != after[field]}


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
        reason = _cannot(row, hardware[pool.device])
        if reason is None:
            placed = place_accuracy(row.gpus, pool) if isinstance(row, AccuracyRow) else _place_speed(row, pool)
            if isinstance(placed, str):
                reason = placed
            else:
                processes = placed[0] * placed[1]
                step = processes * row.known_micro_batch
                if row.batch_size % step == 0:
                    return pool, *placed
                wrong_batch = (
                    f"{where}: row `{row.row}`: field `batch_size`: got {row.batch_size}: expected a multiple of "
                    f"{processes} processes x micro_batch_size {row.micro_batch_size} = {step}"
                )
                continue
        reasons.append(reason)
    if wrong_batch:
        raise SettingsError(wrong_batch)
    return "; ".join(dict.fromkeys(reasons))


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
    return files


def _check_selection(where: str, run: Run, kind: str, names: list[str]) -> None:
    """Raises SettingsError if a pattern of `rows` matches no row of its table."""
    for pattern in getattr(run.rows, kind):
        if not fnmatch.filter(names, pattern):
            raise SettingsError(
                f"{where}: field `rows.{kind}`: got {pattern!r}: matches no row; expected a row id or a pattern of "
                f"{', '.join(getattr(run.files, kind)) or 'a table (none is named in files)'}"
            )


def _jobs(
    where: str, run: ResolvedRun, path: str, row: AnyRow, departures: Departures, files: dict[str, str]
) -> list[Job]:
    """The jobs of a selected row, one for each of its seeds; none if no pool can do it, which `run.not_run` tells."""
    placed = _place(path, row, run.settings.hardware, run.hardware)
    if isinstance(placed, str):
        if row.row in (*run.settings.rows.accuracy, *run.settings.rows.speed):
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


def _read_demo(run: Run, root: Path, datasets: dict[str, Dataset]) -> Demo | None:
    if run.demo is None:
        return None
    demo = validate(Demo, read_yaml(root / run.demo), run.demo)
    for name in demo.texts:
        check_known(run.demo, "texts", name, datasets)
    check_known(run.demo, "mixture", demo.mixture, datasets)
    return demo


def load_run(config: str | Path | dict[str, Any], root: str | Path = ".") -> ResolvedRun:
    """Read a run configuration and its tables, check them, and place the selected rows on the run's hardware.

    config: path of a YAML file, or its values (what Snakemake hands over). root: folder that file names start from.
    Raises SettingsError.
    """
    root = Path(root)
    where = "configuration" if isinstance(config, dict) else str(config)
    settings = validate(Run, config if isinstance(config, dict) else read_yaml(config), where)
    models = read_entries(settings.files.models, Model, root)
    datasets = read_entries(settings.files.datasets, Dataset, root)
    hardware = read_entries(settings.files.hardware, Hardware, root)
    for name, entry in datasets.items():
        if entry.official:
            check_known(f"dataset `{name}`", "official", entry.official, datasets)
    for pool in settings.hardware:
        check_known(where, "hardware.device", pool.device, hardware)
    run = ResolvedRun(
        settings=settings,
        models=models,
        datasets=datasets,
        hardware=hardware,
        demo=_read_demo(settings, root, datasets),
        accuracy=[],
        speed=[],
        not_run=[],
    )
    tables: dict[str, list[tuple[str, AnyRow]]] = {
        "accuracy": [*read_tables(settings.files.accuracy, AccuracyRow, root)],
        "speed": [*read_tables(settings.files.speed, SpeedRow, root)],
    }
    files = _check_tables(run, [*tables["accuracy"], *tables["speed"]])
    unused = set(settings.overrides)
    for kind, table in tables.items():
        _check_selection(where, settings, kind, [row.row for _, row in table])
        for path, table_row in table:
            row, departures = _apply_overrides(where, table_row, settings.overrides, unused)
            if any(fnmatch.fnmatchcase(row.row, pattern) for pattern in getattr(settings.rows, kind)):
                getattr(run, kind).extend(_jobs(where, run, path, row, departures, files))
    if unused:
        raise SettingsError(f"{where}: field `overrides`: pattern {sorted(unused)[0]!r} matches no row of the tables")
    return run
