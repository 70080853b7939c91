"""What a SLURM cluster has, whether a run fits it, and where a run's jobs stand. Imports no torch and no Snakemake."""

from phi3v.cluster.check import Problem, Request, fit, problems, requests, settings_problems
from phi3v.cluster.facts import ClusterError, Facts, PartitionFacts, look
from phi3v.cluster.status import RunningJob, running_jobs, status_lines

__all__ = [
    "ClusterError",
    "Facts",
    "PartitionFacts",
    "Problem",
    "Request",
    "RunningJob",
    "fit",
    "look",
    "problems",
    "requests",
    "running_jobs",
    "settings_problems",
    "status_lines",
]
