#!/usr/bin/env bash
# Start a script on the machines of the SLURM job that this runs in: one torchrun per machine, static rendezvous.
#   scripts/torchrun_nodes.sh NODES PROCESSES_PER_NODE [torchrun's options] scripts/finetune.py --flags …
#   scripts/torchrun_nodes.sh 1 1 python scripts/finetune.py --flags …     one process, without torchrun
# The executor's batch shell has no list of machines, so their number comes as an argument. The address of the first one is
# read inside the step.
set -euo pipefail
nodes=$1 processes=$2
shift 2
export nodes processes port=0
if [ "$nodes" != 1 ]; then
  # This shell runs on the step's first machine. Linux uses ports from 32768 on for outgoing connections
  # (net.ipv4.ip_local_port_range). Jobs that share the machine begin their search at different ones.
  port=$(python - "${SLURM_JOB_ID:?expected inside a SLURM job}" <<'END'
import contextlib, socket, sys

for offset in range(12000):
    port = 20000 + (37 * int(sys.argv[1]) + offset) % 12000
    with contextlib.suppress(OSError), socket.create_server(("", port)):
        sys.exit(print(port))
sys.exit("torchrun_nodes.sh: no free port from 20000 to 31999")
END
  )
fi
# Where the nodes meet (config/site.yaml, rendezvous): a pattern for the first node's name, or an interface of the first
# node, which is this one.
rendezvous=${PHI3V_RENDEZVOUS:-}
if [ -n "$rendezvous" ] && [ "${rendezvous#*"{host}"}" = "$rendezvous" ]; then
  rendezvous=$(python -c 'import fcntl, socket, sys
request = sys.argv[1].encode()[:15].ljust(256, b"\0")
print(socket.inet_ntoa(fcntl.ioctl(socket.socket(), 0x8915, request)[20:24]))  # SIOCGIFADDR, netdevice(7)' \
    "$rendezvous" 2>/dev/null) || {
    echo "torchrun_nodes.sh: rendezvous: got $PHI3V_RENDEZVOUS: no network interface of $(hostname) with an IPv4 address; expected one of" \
      "$(ls /sys/class/net | xargs)" >&2
    exit 2
  }
fi
export rendezvous
agent='
set -euo pipefail
# SLURM sends SIGUSR1 to every process of the step before the time limit. Training handles it; the processes that start
# training must not die of it.
trap "" USR1
if [ -n "${PHI3V_SCRATCH:-}" ]; then
  # Pictures on the machine'"'"'s own disk: copied once, under a name that changes with the conversion, by one job at a time.
  arguments=("$@")
  for ((i = 1; i < ${#arguments[@]}; i++)); do
    data=${arguments[i]}
    if [ "${arguments[i - 1]}" = --data_dir ] && [ -f "$data/dataset.json" ]; then
      copy="$PHI3V_SCRATCH/phi3v-$(id -u)/$(basename "$data")-$(cksum <"$data/dataset.json" | cut -d" " -f1)"
      mkdir -p "$PHI3V_SCRATCH/phi3v-$(id -u)"
      if (
        flock 9
        [ -d "$copy" ] || { rm -rf "$copy.part" && mkdir "$copy.part" \
          && tar -C "$data" --exclude=./source --exclude=./logs -cf - . | tar -C "$copy.part" -xf - && mv "$copy.part" "$copy"; }
      ) 9>"$copy.lock"; then
        arguments[i]=$copy
      else
        rm -rf "$copy.part"
        echo "torchrun_nodes.sh: $PHI3V_SCRATCH on $(hostname): could not copy $data (disk full?), so it is read in place" >&2
      fi
    fi
  done
  set -- "${arguments[@]}"
fi
if [ -n "${PHI3V_NUMA_BINDING:-}" ] && [ -n "${CUDA_VISIBLE_DEVICES:-${ROCR_VISIBLE_DEVICES:-}}" ]; then
  set -- --numa-binding="$PHI3V_NUMA_BINDING" "$@"
fi
if [ "$1" = python ]; then
  exec "$@"
fi
if [ "$nodes" = 1 ]; then
  exec python -m torch.distributed.run --standalone --nproc-per-node="$processes" "$@"
fi
first=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
address=${rendezvous//"{host}"/$first}
[ -n "$address" ] || address=$(scontrol show node "$first" | sed -n "s/.*NodeAddr=\([^ ]*\).*/\1/p")
exec python -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$processes" \
  --node-rank="$SLURM_NODEID" --master-addr="$address" --master-port="$port" "$@"'
if ! command -v srun >/dev/null; then
  # In a container without SLURM's client: docs/how-to/slurm-site.md.
  if [ "$nodes" != 1 ]; then
    echo "torchrun_nodes.sh: got $nodes machines, but srun was not found; expected SLURM's client in the container (docs/how-to/slurm-site.md)" >&2
    exit 2
  fi
  echo "torchrun_nodes.sh: srun was not found, so the job has no step of its own and gets no signal before its time limit" >&2
  exec bash -c "$agent" agent "$@"
fi
# --whole: all CPUs and GPUs that the job has on each machine.
exec srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --whole --kill-on-bad-exit=1 --cpu-bind=none \
  bash -c "$agent" agent "$@"
