"""What SLURM's executor plugin does not do: check a run against the cluster, and follow its jobs. Imports no torch."""
