"""A cluster's own values, the same for every run there: config/site.yaml. Read only where jobs go to SLURM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints

from phi3v.settings import Strict, read_yaml, validate

SITE_FILE = "config/site.yaml"
CPU = "cpu"
"""Entry of `partitions` for work without GPUs, also where a run trains on CPUs."""
# These land on command lines of sbatch, and in the shell of each job where $NAME is expanded.
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.@:/&|*,\[\]-]*$")]
Module = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.+:/@-]+$")]
Folder = Annotated[str, StringConstraints(pattern=r"^([/$][A-Za-z0-9_./${}-]*)?$")]


class Partition(Strict):
    """Where jobs of one device go."""

    partition: Word
    """SLURM's name of the partition."""
    max_runtime: int | None = Field(None, ge=1)
    """Minutes that a job may take there; longer jobs are cut to it and resume in the next one. Left out: no limit."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs of a machine."""
    gpu_type: Word = ""
    """Type in the machine's GRES (`a100` of `gpu:a100:8`), where jobs must name it."""
    cpus_per_gpu: int = Field(8, ge=1)
    """CPUs that a job gets with each GPU: its process, and the threads that load pictures."""
    account: Word = ""
    """Instead of the site's account."""
    qos: Word = ""
    """Instead of the site's quality of service."""
    constraint: Word = ""
    """Features that a machine must have."""


class Site(Strict):
    """config/site.yaml: the cluster's own values."""

    account: Word = ""
    """Account that jobs are charged to; empty: the one SLURM takes by itself."""
    qos: Word = ""
    """Quality of service; empty: the account's default."""
    partitions: dict[str, Partition] = {}
    """Device of the hardware file to the partition of its machines; `cpu`: conversion, validation, report. A device
    that is not named, and whose pool names no slurm_partition either, goes to the cluster's default partition."""
    modules: list[Module] = []
    """Environment modules that each job loads."""
    cache: Folder = ""
    """Folder for caches, off the home quota; $USER and other variables of the job are expanded."""
    scratch: Folder = ""
    """Folder on the machine's own disk: pictures are copied there before training; empty: read where they are."""
    offline: bool = False
    """Compute nodes have no network, so libraries must not use it. Downloads run where Snakemake runs."""
    leave_seconds: int = Field(300, ge=10)
    """Seconds before its time limit at which a training job gets the signal to save and exit."""

    def of(self, device: str, partition: str = "") -> Partition:
        """The entry of a device; `partition`: the pool's own, which goes before it."""
        entry = self.partitions.get(device)
        if partition and (entry is None or entry.partition != partition):
            named = [other for other in self.partitions.values() if other.partition == partition]
            return named[0] if named else Partition(partition=partition)
        return entry or Partition(partition="")

    def prologue(self, scripts: str) -> str:
        """Shell text in front of each command inside a SLURM job: modules, caches, and torchrun as a step of the job.

        scripts: folder of torchrun_nodes.sh. A step is what SLURM tells before the time is over; a command outside one would
        only be ended.
        """
        # Module commands use variables that may not be set.
        lines = [f"set +u; module load {' '.join(self.modules)} || exit 1; set -u"] if self.modules else []
        # Not every system sets it for a job, and an unset variable is an error.
        if "USER" in self.cache + self.scratch:
            lines.append('export USER="${USER:-$(id -un)}"')
        if self.cache:
            folders = {
                "XDG_CACHE_HOME": "", "HF_HOME": "/huggingface", "TORCH_HOME": "/torch", "TRITON_CACHE_DIR": "/triton",
                "TORCHINDUCTOR_CACHE_DIR": "/inductor", "TORCH_EXTENSIONS_DIR": "/extensions", "PIP_CACHE_DIR": "/pip",
                "APPTAINER_CACHEDIR": "/apptainer",
            }  # fmt: skip
            lines += [f'export {name}="{self.cache}{below}"' for name, below in folders.items()]
        if self.scratch:
            lines.append(f'export PHI3V_SCRATCH="{self.scratch}"')
        if self.offline:
            lines.append("export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 WANDB_MODE=offline")
        # `torchrun --standalone --nproc_per_node=N script …` is what a person types, and what the rules print.
        lines.append(f'torchrun() {{ {scripts}/torchrun_nodes.sh 1 "${{2#--nproc_per_node=}}" "${{@:3}}"; }}')
        return "; ".join(lines) + "; "


def load_site(path: str | Path = SITE_FILE) -> Site:
    """The site file, or the defaults where there is none. Raises SettingsError."""
    return validate(Site, read_yaml(path), str(path)) if Path(path).is_file() else Site()
