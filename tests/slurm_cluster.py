"""A real Slurm of two nodes on this machine: munged, slurmctld and two ``slurmd -N``, with configuration of their own.

Debian: ``apt-get install slurmctld slurmd slurm-client munge``. What it cannot show: cgroups, several machines, GPUs
(their device files are ``/dev/zero`` and ``/dev/full``).
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

NODES = ("gft-n1", "gft-n2")
HOSTS = Path("/etc/hosts")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")

CONFIGURATION = """
ClusterName=gft
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
GresTypes=gpu
MinJobAge=3600
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 Gres=gpu:2
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 Gres=gpu:2
PartitionName=gft Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here; None where it can."""
    if os.geteuid():
        return "needs root"
    if absent := [program for program in PROGRAMS if not shutil.which(program)]:
        return f"needs {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge"
    return None if os.access(HOSTS, os.W_OK) else f"needs to write {HOSTS}"


def wait_for(true, what: str, seconds: float = 180):
    """Poll until ``true()`` is; its value."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"in {seconds:.0f} s not seen: {what}"
        time.sleep(0.2)
    return value


class Cluster:
    """Commands of the running cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.conf = folder, folder / "slurm.conf"
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "TORCHELASTIC", "GFT_", "PYTEST"))
            and name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        } | {"SLURM_CONF": str(self.conf), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(self, *command: object, expected: int = 0, **options) -> str:
        """Run one of Slurm's commands; its output."""
        result = subprocess.run(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
            **{"env": self.environment} | options,
        )
        assert result.returncode == expected, f"{command} ended with {result.returncode}:\n{result.stdout}"
        return result.stdout

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says of it."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", number)))

    def wait(self, number: str, *states: str, restarts: int | None = None) -> dict[str, str]:
        """Wait until a job is in one of the states, after so many restarts."""

        def reached() -> dict[str, str] | None:
            job = self.job(number)
            return job if job["JobState"] in states and restarts in (None, int(job["Restarts"])) else None

        return wait_for(reached, f"job {number} {' or '.join(states)}, {restarts} restarts; {self.job(number)}")

    def processes(self) -> list[psutil.Process]:
        """Everything that this cluster started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get("SLURM_CONF") == str(self.conf):
                    found.append(process)
        return found

    def ready(self) -> bool:
        result = subprocess.run(
            ["scontrol", "show", "node"], env=self.environment, capture_output=True, text=True, timeout=60
        )
        return len(re.findall(r"State=IDLE\s", result.stdout)) == len(NODES)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextlib.contextmanager
def start_cluster(folder: Path) -> Iterator[Cluster]:
    """Start the daemons in the foreground, as children; end them, and all that they started, by pid."""
    cluster, host = Cluster(folder), socket.gethostname().split(".")[0]
    names = f"127.0.0.1 {' '.join(NODES)} # {folder}, tests of megatron_gft\n"
    (folder / "state").mkdir()
    cluster.conf.write_text(CONFIGURATION.format(host=host, folder=folder, nodes=NODES, ports=free_ports(3)))
    gres = (f"NodeName={node} Name=gpu File=/dev/{file}\n" for node in NODES for file in ("zero", "full"))
    (folder / "gres.conf").write_text("".join(gres))
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    daemons = [["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files]]
    daemons += [["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    children = []
    try:
        HOSTS.write_text(f"{HOSTS.read_text().rstrip()}\n{names}")  # in place: in containers it is a mount
        for number, daemon in enumerate(daemons):
            with open(folder / f"{number}-{daemon[0]}.log", "w") as log:
                children.append(subprocess.Popen(daemon, env=cluster.environment, stdout=log, stderr=log))
            if daemon[0] == "munged":
                wait_for((folder / "munge.socket").exists, "munged's socket", 30)
        wait_for(cluster.ready, f"two idle nodes; see {folder}", 60)
        yield cluster
    finally:
        subprocess.run(["scancel", "--user=root", "--signal=KILL"], env=cluster.environment, timeout=60)
        for child in reversed(children):
            child.send_signal(signal.SIGTERM)
        left = cluster.processes()
        _, alive = psutil.wait_procs(left, timeout=15)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for child in children:
            child.wait()
        HOSTS.write_text(HOSTS.read_text().replace(names, ""))
