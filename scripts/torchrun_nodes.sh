#!/usr/bin/env bash
# Start a script on several machines of the SLURM job that this runs in: one agent a node, static rendezvous.
#   scripts/torchrun_nodes.sh NODES PROCESSES_PER_NODE scripts/finetune.py --flags …
# An agent passes SIGTERM and SIGUSR1 on and gives its workers time to save; 30 s, its default, do not do for 58 GB.
# The batch shell of the executor has no node list, so the geometry comes as arguments; the address of the first
# node is read inside the step.
set -euo pipefail
nodes=$1 processes=$2
shift 2
if ! command -v srun >/dev/null; then
  echo "torchrun_nodes.sh: $nodes nodes were asked for and srun was not found; expected to run inside a SLURM job" >&2
  exit 2
fi
# Jobs that share a node must not meet on one port.
port=$((20000 + ${SLURM_JOB_ID:?expected inside a SLURM job} % 20000))
agent='
first=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | sed -n "s/.*NodeAddr=\([^ ]*\).*/\1/p")
exec python -m torch.distributed.run --nnodes='"$nodes"' --nproc-per-node='"$processes"' \
  --shutdown-timeout=900 --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  --node-rank="$SLURM_NODEID" --master-addr="$address" --master-port='"$port"' "$@"'
exec srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  --kill-on-bad-exit=1 --cpu-bind=none bash -c "$agent" agent "$@"
