"""The commands of a job: how its row, its machines and the run set each script's settings.

flags(finetune(run, job))                            # the arguments after `torchrun … scripts/finetune.py`
command(run, job, "finetune", finetune(run, job))    # the complete command line, as the workflow runs it
"""

from __future__ import annotations

import shlex
from typing import Any, Literal

from phi3v.settings.base import Role
from phi3v.settings.command_line import flags
from phi3v.settings.commands import (
    Command,
    EvaluateSettings,
    FinetuneSettings,
    PredictSettings,
    ScoreSettings,
    SpeedSettings,
    own_settings,
    row_values,
)
from phi3v.settings.entries import Hardware
from phi3v.settings.rows import SpeedRow
from phi3v.settings.run import Job, ResolvedRun


def _device(hardware: Hardware) -> Literal["cpu", "cuda"]:
    """Keeps a job for GPUs off the CPU, and a job for CPUs off the GPU. PyTorch calls ROCm devices cuda."""
    return "cpu" if hardware.kind == "cpu" else "cuda"


def _common(run: ResolvedRun, job: Job, dataset: str, seed: int) -> dict[str, Any]:
    """Settings of every command of a job that come from its machines and the run."""
    return {
        "row": job.row.row,
        "dataset": dataset,
        "data_dir": run.data_folder(dataset),
        "num_crops": job.num_crops,
        "expect_device": _device(run.hardware[job.pool.device]),
        "seed": seed,
        "num_workers": run.settings.num_workers,
        "tqdm": False,
    }


def is_alone(run: ResolvedRun, job: Job) -> bool:
    """Whether a job is one process on a CPU, which needs no torchrun."""
    return job.processes == 1 and _device(run.hardware[job.pool.device]) == "cpu"


def command(run: ResolvedRun, job: Job, script: str, settings: Command, scripts: str = "scripts") -> str:
    """Command line that runs a script on the job's processes. scripts: the script's folder, quoted for a shell."""
    if is_alone(run, job):
        # torchrun would import PyTorch a second time, which takes as long as a small job.
        return " ".join(["python", f"{scripts}/{script}.py", shlex.join(flags(settings))])
    if job.nodes == 1:
        words = ["torchrun --standalone", f"--nproc_per_node={job.processes_per_node}"]
    else:
        words = [f"{scripts}/torchrun_nodes.sh", str(job.nodes), str(job.processes_per_node)]
    if script == "finetune":
        # By default, torchrun kills a job that takes more than 30 s to save after SIGTERM, and does not forward
        # SIGUSR1.
        words += ["--shutdown-timeout=900", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    return " ".join([*words, f"{scripts}/{script}.py", shlex.join(flags(settings))])


def result_flags(job: Job, settings: Command) -> str:
    """What a job's files depend on: flags, and for a timing also the machines.

    A finished job is repeated only if this changes.
    """
    if isinstance(settings, SpeedSettings):
        return f"{job.nodes} x {job.processes_per_node} {job.pool.device} {shlex.join(flags(settings))}"
    roles = [role for role in Role if role is not Role.RUNTIME]
    merged = ["--merge"] if isinstance(settings, FinetuneSettings) and settings.merge else []
    return shlex.join([*flags(settings, roles), *merged])


def finetune(run: ResolvedRun, job: Job) -> FinetuneSettings:
    """Settings for training a row. A row's own save_minutes or save_steps replaces the run's."""
    return own_settings(
        job.row,
        f"row `{job.row.row}`",
        **_common(run, job, job.row.dataset, job.seed),
        model_name_or_path=run.model_folder(job.row.model),
        output_dir=f"{run.results}/train/{job.row.row}",
        **(
            {}
            if {"save_minutes", "save_steps"} & job.row.finetune.keys()
            else {"save_minutes": run.settings.save_minutes}
        ),
    )


def speed(run: ResolvedRun, job: Job) -> SpeedSettings:
    """Settings for timing a row."""
    row, timing = job.row, run.settings.speed
    assert isinstance(row, SpeedRow)
    return SpeedSettings.model_validate(
        {
            **row_values(row),
            **row.finetune,
            **_common(run, job, row.dataset, run.settings.seed),
            "model_name_or_path": run.model_folder(row.model),
            "output_dir": f"{run.results}/speed/{row.row}",
            "speed_warmup_steps": timing.warmup_steps,
            "timed_steps": timing.timed_steps,
            "repeats": timing.repeats,
            "expect_processes": row.nodes * row.gpus_per_node,
            "expect_hardware": row.hardware,
            "hardware": run.settings.files.hardware,
            "stand_in": job.pool.stand_in,
        }
    )


def evaluate(run: ResolvedRun, job: Job, what: Literal["base", "trained", "official"]) -> EvaluateSettings:
    """Settings for evaluating the base model, the trained row, or the trained row on the authors' own split."""
    own, how = job.row.dataset, run.settings.evaluation
    dataset = run.datasets[own].official if what == "official" else own
    entry = run.datasets[dataset]
    values = _common(run, job, dataset, run.settings.seed) | {
        "model_name_or_path": f"{run.results}/train/{job.row.row}/final",
        # Rule `score` applies the user's own metric functions later, outside the job that occupies the GPUs.
        "metrics": [name for name in entry.metrics if ":" not in name] or ["accuracy"],
        "group_by": entry.group_by,
        "batch_size_per_gpu": how.batch_size_per_gpu,
        "max_new_tokens": entry.max_new_tokens or how.max_new_tokens,
        job.row.dtype: True,
        "flash_attention": job.row.flash_attention,
    }
    if what == "base":
        base = {"row": "", "passes": ["before"], "model_name_or_path": run.model_folder(job.row.model)}
        values |= base | {"output_dir": f"{run.results}/evaluate/base/{job.baseline}"}
    elif what == "trained":
        passes = ["after", "control"] if how.control else ["after"]
        values |= {"passes": passes, "output_dir": f"{run.results}/evaluate/{job.row.row}"}
    else:
        values |= {"output_dir": f"{run.results}/evaluate/official/{job.row.row}", "train_dir": run.data_folder(own)}
    return EvaluateSettings.model_validate(values)


def score(run: ResolvedRun, dataset: str, evaluated: str) -> ScoreSettings:
    """Settings for scoring an evaluation by the dataset's metrics, the user's own functions included.

    evaluated: ROW, base/KEY or official/ROW.
    """
    return ScoreSettings(
        input_dir=f"{run.results}/evaluate/{evaluated}",
        output_dir=f"{run.results}/score/{evaluated}",
        metrics=run.datasets[dataset].metrics,
        group_by=run.datasets[dataset].group_by,
        seed=run.settings.seed,
    )


def predict(run: ResolvedRun, job: Job, name: str) -> PredictSettings:
    """Settings for answering the pictures of an entry of the run's `predictions` with the trained row."""
    entry, how = run.settings.predictions[name], run.settings.evaluation
    return PredictSettings.model_validate(
        {
            **entry.model_dump(include={"table", "images_dir", "folder", "question"}),
            "model_name_or_path": f"{run.results}/train/{job.row.row}/final",
            "output_dir": f"{run.results}/predictions/{name}",
            "columns": [f"{role}={column}" for role, column in entry.columns.items()],
            "num_crops": job.num_crops,
            "batch_size_per_gpu": how.batch_size_per_gpu,
            "max_new_tokens": entry.max_new_tokens
            or run.datasets[job.row.dataset].max_new_tokens
            or how.max_new_tokens,
            "expect_device": _device(run.hardware[job.pool.device]),
            "num_workers": run.settings.num_workers,
            "tqdm": False,
            "flash_attention": job.row.flash_attention,
            job.row.dtype: True,
        }
    )


def demo_base(run: ResolvedRun) -> FinetuneSettings:
    """Settings for training the demo's base model, with the same script as every row."""
    assert run.demo is not None
    demo = run.demo
    return FinetuneSettings(
        model_name_or_path=f"{demo.folder}/random",
        data_dir=run.data_folder(demo.mixture),
        output_dir=f"{demo.folder}/base",
        dataset=demo.mixture,
        row="base",
        bf16=True,
        gradient_checkpointing=False,
        zero_stage=0,
        expect_device="cpu",
        seed=demo.seed,
        tqdm=False,
        **demo.base.model_dump(exclude={"processes"}),
    )
