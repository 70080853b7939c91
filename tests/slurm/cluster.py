"""A real SLURM of four nodes on this machine, thrown away afterwards: what the tests of this folder run on.

python tests/slurm/cluster.py FOLDER     # starts it and waits for Enter, for looking around by hand

Everything lives in one folder: munge's key and socket, slurm.conf, the state and spool folders, the database, the logs.
Needs root (for /etc/slurm; links to /dev/null stand for GPUs) and Debian's slurm-wlm, slurmdbd, munge, mariadb-server.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db", "sbatch")
# Commands inside a job lose SLURM_CONF (the executor's job step keeps only the job's identity), so the file stands where
# SLURM looks for it by itself.
SYSTEM_CONF = Path("/etc/slurm/slurm.conf")
CONF_FILES = ("slurm.conf", "gres.conf", "slurmdbd.conf")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
NODES, CPUS, GPUS = 4, 8, 8

CONF = """\
ClusterName=phi3v
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={dir}/munge.socket
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory,CR_LLN
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
MinJobAge=300
KillWait={kill_wait}
SlurmdTimeout={slurmd_timeout}
SchedulerParameters=bf_interval=2,sched_min_interval=100000,requeue_delay=1,preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
SwitchType=switch/none
AccountingStorageTRES=gres/gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={dir}/munge.socket
AccountingStorageEnforce=associations,limits,qos
NodeName=node[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} RealMemory=512000 Gres=gpu:a100:{gpus}
PartitionName=cpu Nodes=ALL Default=YES MaxTime=04:00:00 PriorityTier=10
PartitionName=gpu Nodes=ALL MaxTime=1-00:00:00 PriorityTier=10
PartitionName=short Nodes=ALL MaxTime={short} OverTimeLimit=0 PriorityTier=10
PartitionName=spot Nodes=node4 MaxTime=04:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=node4 MaxTime=04:00:00 PriorityTier=100 PreemptMode=OFF
"""
DBD = """\
AuthType=auth/munge
AuthInfo=socket={dir}/munge.socket
DbdHost=localhost
DbdPort={dbd_port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
LogFile={dir}/slurmdbd.log
PidFile={dir}/slurmdbd.pid
"""


def missing() -> str:
    """Why no cluster can run on this machine; "" where one can."""
    path = f"{os.environ['PATH']}:{SBIN}"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"SLURM is not installed ({', '.join(absent)} missing): apt-get install slurm-wlm slurmdbd munge mariadb-server"
    if os.geteuid() != 0:
        return "the SLURM test cluster needs root: its configuration stands in /etc/slurm while it is up"
    if SYSTEM_CONF.is_symlink() and not _alive(SYSTEM_CONF.readlink().parent / "slurmctld.pid"):
        return ""  # left by a test cluster that was killed
    if SYSTEM_CONF.exists() or SYSTEM_CONF.is_symlink():
        return f"{SYSTEM_CONF} exists: this machine belongs to a cluster already"
    return ""


def _alive(pid_file: Path) -> bool:
    """Whether the process that a daemon's pid file names is there."""
    try:
        return Path(f"/proc/{int(pid_file.read_text())}").exists()
    except (OSError, ValueError):
        return False


def end_with_parent() -> None:
    """Between fork and exec: the child is killed when the process that started it ends, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring TCP ports that are free now."""
    for first in range(16000, 30000, count):
        with contextlib.ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise RuntimeError("no free ports between 16000 and 30000")


class Cluster:
    """munged, mariadbd, slurmdbd, slurmctld and a slurmd a node, each a child of this process."""

    def __init__(self, folder: Path, short: str = "00:02:00", kill_wait: int = 30) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "PATH": f"{os.environ['PATH']}:{SBIN}"}
        first = _free_ports(NODES + 2)
        self.values = {
            "dir": folder, "host": socket.gethostname().partition(".")[0], "port": first, "dbd_port": first + 1,
            "first": first + 2, "last": first + 1 + NODES, "nodes": NODES, "cpus": CPUS, "gpus": GPUS, "short": short,
            "kill_wait": kill_wait, "slurmd_timeout": 30,
        }  # fmt: skip

    def start(self) -> None:
        """Bring the cluster up; raises RuntimeError with the end of the logs where it does not come."""
        reason = missing()
        if reason:
            raise RuntimeError(reason)
        for name in ("state", "spool", "dev", "db"):
            (self.folder / name).mkdir(parents=True)
        for name in (f"node{n}" for n in range(1, NODES + 1)):
            (self.folder / "spool" / name).mkdir()
        for number in range(GPUS):
            (self.folder / "dev" / f"nvidia{number}").symlink_to("/dev/null")
        (self.folder / "slurm.conf").write_text(CONF.format(**self.values))
        gres = f"NodeName=node[1-{NODES}] Name=gpu Type=a100 File={self.folder}/dev/nvidia[0-{GPUS - 1}]"
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\n{gres}\n")
        (self.folder / "slurmdbd.conf").write_text(DBD.format(**self.values))
        (self.folder / "slurmdbd.conf").chmod(0o600)
        SYSTEM_CONF.parent.mkdir(exist_ok=True)
        # The other files are looked for beside the one that the link names.
        for name in CONF_FILES:
            SYSTEM_CONF.with_name(name).unlink(missing_ok=True)
            SYSTEM_CONF.with_name(name).symlink_to(self.folder / name)
        try:
            self._start_daemons()
        except BaseException:
            self.stop()
            raise

    def _start_daemons(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        folder, munge = self.folder, self.folder / "munge.socket"
        self._spawn(
            "munged", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed",
        )  # fmt: skip
        made = self._run(
            "mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={folder}/db", "--skip-test-db",
            "--auth-root-authentication-method=normal",
        )  # fmt: skip
        if made.returncode:
            raise RuntimeError(f"mariadb-install-db: {made.stdout}{made.stderr}")
        self._spawn(
            "mariadbd", "mariadbd", "--no-defaults", "--user=root", f"--datadir={folder}/db", "--skip-networking",
            f"--socket={folder}/db.socket", f"--pid-file={folder}/mariadbd.pid", "--innodb-buffer-pool-size=32M",
            "--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=0",
        )  # fmt: skip
        self._until("mariadbd", lambda: (folder / "db.socket").exists())
        # Its client library takes the socket from here; slurmdbd.conf has no field for it.
        self.environment["MYSQL_UNIX_PORT"] = str(folder / "db.socket")
        self._spawn("slurmdbd", "slurmdbd", "-D")
        self._until("slurmdbd", lambda: self._run("sacctmgr", "-n", "show", "cluster").returncode == 0)
        self._run("sacctmgr", "-i", "add", "cluster", "phi3v")
        self._run("sacctmgr", "-i", "add", "account", "research", "Cluster=phi3v")
        self._run("sacctmgr", "-i", "add", "user", "root", "Account=research")
        self.start_controller()
        for number in range(1, NODES + 1):
            self.start_node(f"node{number}")
        self._until(
            "slurmd", lambda: self.out("sinfo", "-h", "-N", "-p", "cpu", "-o", "%T").split() == ["idle"] * NODES
        )

    def start_controller(self) -> None:
        self._spawn("slurmctld", "slurmctld", "-D")
        self._until("slurmctld", lambda: self._run("scontrol", "ping").stdout.find("is UP") > 0)

    def start_node(self, name: str) -> None:
        self._spawn(name, "slurmd", "-D", "-N", name)

    def kill(self, name: str, with_steps: bool = False) -> None:
        """SIGKILL a daemon; with_steps: and, as a machine that loses power, every job process under it."""
        process = self.processes.pop(name)
        family: list[int] = []
        if with_steps:
            family = [
                child for line in self.out("ps", "-eo", "pid=,args=").splitlines()
                if "slurmstepd: [" in line and self._node_of(int(line.split()[0])) == name
                for child in (int(line.split()[0]), *_descendants(int(line.split()[0])))
            ]  # fmt: skip
        process.kill()
        process.wait()
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _node_of(self, pid: int) -> str:
        """Node of a slurmstepd: its working folder or open log belongs to one slurmd."""
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                found = os.readlink(handle)
                for number in range(1, NODES + 1):
                    if f"spool/node{number}" in found or f"slurmd-node{number}.log" in found:
                        return f"node{number}"
        return ""

    def stop(self) -> None:
        """End every job and daemon, whatever state they are in, and take the links away."""
        if "slurmctld" in self.processes:
            self._run("scancel", "--user=root", "--signal=KILL", "--full")
            self._run("scancel", "--user=root")
        for pid in _step_daemons(self.folder):
            for child in (*_descendants(pid), pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        # What a job left behind: without control groups SLURM loses sight of a process whose parent has gone.
        job = f"phi3v:127.0.0.1:{self.values['port']}:"
        for process in psutil.process_iter(["environ"]):
            if (process.info["environ"] or {}).get("SLURM_WORKING_CLUSTER", "").startswith(job):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        for name in reversed(list(self.processes)):
            process = self.processes.pop(name)
            process.terminate()
            try:
                process.wait(3 if name != "mariadbd" else 10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for name in CONF_FILES:
            link = SYSTEM_CONF.with_name(name)
            if link.is_symlink() and link.readlink().parent == self.folder:
                link.unlink()

    def out(self, *command: str) -> str:
        """What a client command prints; raises CalledProcessError."""
        done = self._run(*command)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """State by job id, of every job that the controller remembers."""
        lines = self.out("squeue", "-h", "--states=all", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def release(self) -> None:
        """Let jobs that SLURM put back into the queue start now, not after two minutes."""
        for job, state in self.jobs().items():
            if state == "PENDING":
                self.out("scontrol", "update", f"JobId={job}", "StartTime=now")

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)

    def _spawn(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def _until(self, name: str, ready, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            process = self.processes.get(name)
            if time.monotonic() > deadline or (process is not None and process.poll() is not None):
                logs = [*self.folder.glob(f"{name}*.out"), *self.folder.glob(f"{name}*.log")]
                text = "\n".join(f"{log.name}:\n{log.read_text(errors='replace')[-1500:]}" for log in logs)
                raise RuntimeError(f"{name} did not come up in {seconds:.0f} s\n{text}")
            time.sleep(0.05)


def _descendants(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}").glob("children"):
        with contextlib.suppress(OSError):
            for name in child.read_text().split():
                found += [int(name), *_descendants(int(name))]
    return found


def _step_daemons(folder: Path) -> list[int]:
    """slurmstepd processes that have a file of this cluster open."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if (entry / "comm").read_text().strip() == "slurmstepd" and any(
                    str(folder) in os.readlink(handle) for handle in (entry / "fd").iterdir()
                ):
                    found.append(int(entry.name))
    return found


if __name__ == "__main__":
    cluster = Cluster(Path(sys.argv[1]).resolve())
    started = time.monotonic()
    cluster.start()
    print(f"up in {time.monotonic() - started:.1f} s; logs in {cluster.folder}; Enter stops it", flush=True)
    try:
        sys.stdin.read(1)
    finally:
        cluster.stop()
