"""A real SLURM of four nodes on this machine, thrown away afterwards: what the tests of this folder run on.

python tests/slurm/cluster.py FOLDER     # starts it and waits for Enter, to use it by hand with SLURM_CONF as printed

Each node has namespaces of its own: its own host name, mounts, and process ids, which mean nothing on another node.
Everything lives in one folder: munge's key and socket, slurm.conf, the state and spool folders, the database, the logs.
Needs root (for the namespaces; links to /dev/null stand for GPUs) and Debian's slurm-wlm, slurmdbd, munge,
mariadb-server.
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

PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db", "sbatch")
# Commands inside a job lose SLURM_CONF (the executor's job step keeps only the job's identity), so on a node the
# configuration is where SLURM looks for it by itself.
SYSTEM_CONF = Path("/etc/slurm")
# Process 1 of a node: arguments are the node's name and the configuration's folder.
NODE = f"""
set -e
hostname "$1"
mount --bind "$2" {SYSTEM_CONF}
mount --bind "$2/hosts" /etc/hosts
exec slurmd -D -N "$1"
"""
NAMESPACES = ("unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
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
MinJobAge={min_job_age}
KillWait={kill_wait}
SlurmdTimeout={slurmd_timeout}
SchedulerParameters=bf_interval=2,sched_min_interval=100000,requeue_delay=1,preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
SwitchType=switch/none
NodeName=node[1-{nodes}] NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} RealMemory=512000 Gres=gpu:a100:{gpus} Feature=80gb,ib
Licenses=scratch:4
PartitionName=cpu Nodes=ALL Default=YES MaxTime=04:00:00 PriorityTier=10
PartitionName=gpu Nodes=ALL MaxTime=1-00:00:00 PriorityTier=10
PartitionName=short Nodes=ALL MaxTime={short} OverTimeLimit=0 PriorityTier=10
PartitionName=spot Nodes=node4 MaxTime=04:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=node4 MaxTime=04:00:00 PriorityTier=100 PreemptMode=OFF
"""
ACCOUNTING = """\
AccountingStorageTRES=gres/gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={dir}/munge.socket
AccountingStorageEnforce=associations,limits,qos
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
        return "the SLURM test cluster needs root: each node has namespaces of its own"
    return ""


def end_with_parent() -> None:
    """Between fork and exec: the child is killed when the process that started it ends, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring TCP ports that are free now."""
    firsts = range(16000, 30000, count)
    # Another process that starts a cluster at the same time begins elsewhere.
    begin = os.getpid() % len(firsts)
    for first in (*firsts[begin:], *firsts[:begin]):
        with contextlib.ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise RuntimeError("no free ports between 16000 and 30000")


class Cluster:
    """munged, mariadbd, slurmdbd, slurmctld and a slurmd per node, each a child of this process.

    Without accounting there is no database: sacct and sacctmgr fail, and a job is forgotten `min_job_age` seconds after
    its end.
    """

    def __init__(
        self,
        folder: Path,
        short: str = "00:02:00",
        kill_wait: int = 30,
        accounting: bool = True,
        min_job_age: int = 300,
    ) -> None:
        self.folder, self.accounting = folder, accounting
        self.conf = folder / "etc" / "slurm.conf"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        path = f"{os.environ['PATH']}:{SBIN}"
        self.environment = {**os.environ, "PATH": path, "SLURM_CONF": str(self.conf)}
        first = _free_ports(NODES + 2)
        self.values = {
            "dir": folder, "host": socket.gethostname().partition(".")[0], "port": first, "dbd_port": first + 1,
            "first": first + 2, "last": first + 1 + NODES, "nodes": NODES, "cpus": CPUS, "gpus": GPUS, "short": short,
            "kill_wait": kill_wait, "slurmd_timeout": 30, "min_job_age": min_job_age,
        }  # fmt: skip

    def start(self) -> None:
        """Bring the cluster up; raises RuntimeError with the end of the logs where it does not come."""
        reason = missing()
        if reason:
            raise RuntimeError(reason)
        for name in ("etc", "state", "dev", "db", *(f"spool/node{n}" for n in range(1, NODES + 1))):
            (self.folder / name).mkdir(parents=True)
        for number in range(GPUS):
            (self.folder / "dev" / f"nvidia{number}").symlink_to("/dev/null")
        gres = f"NodeName=node[1-{NODES}] Name=gpu Type=a100 File={self.folder}/dev/nvidia[0-{GPUS - 1}]"
        names = " ".join(f"node{number}" for number in range(1, NODES + 1))
        for name, text in {
            "slurm.conf": CONF + (ACCOUNTING if self.accounting else ""), "slurmdbd.conf": DBD,
            "gres.conf": f"AutoDetect=off\n{gres}\n", "hosts": f"127.0.0.1 localhost {{host}} {names}\n",
        }.items():  # fmt: skip
            (self.conf.parent / name).write_text(text.format(**self.values))
        (self.conf.parent / "slurmdbd.conf").chmod(0o600)
        SYSTEM_CONF.mkdir(exist_ok=True)
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
        if self.accounting:
            self._start_database()
        self.start_controller()
        for number in range(1, NODES + 1):
            self.start_node(f"node{number}")
        self._until(
            "slurmd", lambda: self.out("sinfo", "-h", "-N", "-p", "cpu", "-o", "%T").split() == ["idle"] * NODES
        )

    def _start_database(self) -> None:
        folder = self.folder
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

    def start_controller(self) -> None:
        self._spawn("slurmctld", "slurmctld", "-D")
        self._until("slurmctld", lambda: self._run("scontrol", "ping").stdout.find("is UP") > 0)

    def start_node(self, name: str) -> None:
        self._spawn(name, *NAMESPACES, "sh", "-c", NODE, "node", name, str(self.conf.parent))

    def kill(self, name: str) -> None:
        """SIGKILL a daemon. With a node's slurmd, its process 1, every job on it dies, as when a machine loses power."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def lose(self, node: str) -> None:
        """A node loses power. One that is only marked DOWN registers again by itself."""
        self.kill(node)
        self.out("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def stop(self) -> None:
        """End every node with its jobs, and every daemon, whatever state they are in."""
        for name in reversed(list(self.processes)):
            if name.startswith("node"):
                self.kill(name)
                continue
            process = self.processes.pop(name)
            process.terminate()
            try:
                process.wait(3 if name != "mariadbd" else 10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def out(self, *command: str) -> str:
        """What a client command prints; raises CalledProcessError."""
        done = self._run(*command)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def on(self, nodes: str, *command: str) -> str:
        """What a command prints that runs as root once on each of the nodes (node1, or node[1-4])."""
        return self.out("srun", f"--nodelist={nodes}", "--ntasks-per-node=1", "--mem=1", *command)

    def jobs(self) -> dict[str, str]:
        """State by job id, of every job that the controller remembers."""
        lines = self.out("squeue", "-h", "--states=all", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def restarts(self, job: str) -> int:
        """How often SLURM has put a job back into the queue; 0 while processes of an earlier start may run."""
        shown = self.out("scontrol", "show", "job", job)
        return 0 if "COMPLETING" in shown else int(shown.partition("Restarts=")[2].split()[0])

    def release(self) -> None:
        """Let jobs that SLURM put back into the queue start soon, not after two minutes.

        A node that has revoked a job's credential refuses to start the job in the same second, and the job fails.
        """
        for job, state in self.jobs().items():
            if state == "PENDING":
                self.out("scontrol", "update", f"JobId={job}", "StartTime=now+3")

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


if __name__ == "__main__":
    cluster = Cluster(Path(sys.argv[1]).resolve())
    started = time.monotonic()
    cluster.start()
    print(f"up in {time.monotonic() - started:.1f} s; SLURM_CONF={cluster.conf}; Enter stops it", flush=True)
    try:
        sys.stdin.read(1)
    finally:
        cluster.stop()
