"""Time the all-reduce that sums gradients, over all processes that torchrun started.

    python scripts/cluster.py check --nodes 2 --device a100-80gb     # as a SLURM job, over nodes
    torchrun --standalone --nproc_per_node=2 scripts/slurm/all_reduce.py

The bus bandwidth is what each link carries: 2 (n-1) / n of the size per time (nccl-tests, PERFORMANCE.md).
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist

REPEATS = 10


def interface(host: str) -> str:
    """`NAME (ADDRESS)` of this machine by which it reaches a host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, 0x8915, name.encode().ljust(256, b"\0"))[20:24]  # SIOCGIFADDR, netdevice(7)
            except OSError:
                continue
            if socket.inet_ntoa(found) == address:
                return f"{name} ({address})"
    return address


def seconds(device: torch.device, megabytes: int) -> float:
    """Of one all-reduce; raises RuntimeError if the sum is wrong."""
    ranks = dist.get_world_size()
    tensor = torch.empty(megabytes * 2**18, device=device)
    best = float("inf")
    for _ in range(REPEATS):
        tensor.fill_(dist.get_rank() + 1)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
        if not bool((tensor == ranks * (ranks + 1) / 2).all()):
            raise RuntimeError(
                f"all-reduce of {megabytes} MB over {ranks} processes: wrong sum on {socket.gethostname()}"
            )
    return best


def main() -> None:
    """Print the rate, and how the last rank reaches the first."""
    os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET"}
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=120))
    rank, ranks, sizes = dist.get_rank(), dist.get_world_size(), (1, 1024) if on_gpu else (1, 64)
    times = {megabytes: seconds(device, megabytes) for megabytes in sizes}
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    if rank == 0:
        print(
            f"all-reduce: {ranks // local} nodes x {local} processes, {dist.get_backend()} on {device.type}:", end=" "
        )
        rates = [f"{size} MB in {1e3 * time:.2f} ms" for size, time in times.items()]
        bus = sizes[-1] * 2**20 / times[sizes[-1]] * 2 * (ranks - 1) / ranks / 1e9
        print(f"{', '.join(rates)}, bus bandwidth {bus:.2f} GB/s", flush=True)
    dist.barrier()
    if rank == ranks - 1:
        host = os.environ["MASTER_ADDR"]
        print(f"all-reduce: {socket.gethostname()} reaches {host} through {interface(host)}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
