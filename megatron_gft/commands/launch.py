"""What the scripts in ``launch/`` do: become a training process, or start the right number of them.

A script can be started in four ways, and finds out from the environment which it was:

- by torchrun (``TORCHELASTIC_RUN_ID``) or by ``srun`` from ``launch/slurm.sbatch`` (:data:`SRUN_MARK`): it is one of
  the training processes;
- by a bare ``torchrun launch/x.sh``, that is as the only process of a model that needs several: it starts over with
  ``NNODES`` and ``GPUS_PER_NODE`` when they are set, else it prints the command to type and ends;
- by bash or Python: it checks the configuration against ``NNODES * GPUS_PER_NODE`` and then runs torchrun's agent in
  this process, which passes SIGTERM and SIGUSR1 on and gives every training process the time it needs to save.

Nothing here imports torch before the configuration has been checked.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megatron_gft.commands.train import main as train
from megatron_gft.commands.train import read_command_line
from megatron_gft.config import Config
from megatron_gft.errors import EXIT_BAD_INPUT, EXIT_REQUEUE, InputError, command
from megatron_gft.hf.shape import read_model_shape
from megatron_gft.launchers import DEFAULT_PORT, Launcher, find_launcher
from megatron_gft.runtime import REQUEUE_FILE, StopRequest, process_exit_code
from megatron_gft.validation import check

SRUN_MARK = "GFT_STARTED_BY_SRUN"
GPUS_PER_MACHINE = 8


@dataclass(frozen=True)
class Job:
    """How many processes where, from the environment.

    ``named`` is false when nothing named a size and both are those of this machine.
    """

    nnodes: int
    gpus_per_node: int
    named: bool
    master_addr: str | None
    master_port: int
    node_rank: int | None
    max_restarts: int
    log_dir: str | None
    job_id: str

    @property
    def world_size(self) -> int:
        """Training processes of all machines."""
        return self.nnodes * self.gpus_per_node

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read the variables that the head of each script names.

        Kubernetes' PyTorchJob starts a script once per machine: there RANK counts machines, and so does WORLD_SIZE,
        unless the job says ``nprocPerNode``.

        Raises:
            InputError: a number is none, several machines have no ``MASTER_ADDR`` to meet at, or others were started
                that this one would not count.
        """

        def number(default: Any, smallest: int, *names: str) -> Any:
            for name in names:
                if (text := environment.get(name) or "auto") != "auto":
                    if not text.isdecimal() or int(text) < smallest:
                        raise InputError(f"{name}={text}: not a whole number of at least {smallest}")
                    return int(text)
            return default

        nodes, processes = ("NNODES", "PET_NNODES", "WORLD_SIZE"), ("GPUS_PER_NODE", "PET_NPROC_PER_NODE")
        job = cls(
            nnodes=number(1, 1, *nodes),
            gpus_per_node=number(count_gpus() or 1, 1, *processes),
            named=number(None, 1, "NNODES", *processes) is not None or number(1, 1, *nodes) > 1,
            master_addr=environment.get("MASTER_ADDR") or None,
            master_port=number(DEFAULT_PORT, 1, "MASTER_PORT"),
            node_rank=number(None, 0, "NODE_RANK", "PET_NODE_RANK", "RANK"),
            max_restarts=number(0, 0, "MAX_RESTARTS"),
            log_dir=environment.get("LOG_DIR") or None,
            job_id=environment.get("JOB_ID") or "gft",
        )
        job.check_started(number(job.nnodes, 1, "WORLD_SIZE"), find_launcher(environment), environment)
        if job.nnodes > 1 and job.master_addr is None:
            raise InputError(
                f"NNODES={job.nnodes} and no MASTER_ADDR: the machines need a place to meet -> set it to the name of "
                "one of them, the same on all"
            )
        return job

    def check_started(self, started: int, launcher: Launcher | None, environment: Mapping[str, str]) -> None:
        """Refuse to be one of several jobs where the environment (WORLD_SIZE, or a launcher) says that there is one."""
        if started not in (self.nnodes, self.world_size):
            raise InputError(
                f"WORLD_SIZE={started}: neither the number of machines ({self.nnodes}) nor that of processes "
                f"({self.world_size}) -> set NNODES and GPUS_PER_NODE so that it is, or unset it"
            )
        if launcher and launcher.name == "srun" and "SLURM_STEP_ID" not in environment:
            launcher = None  # the batch script itself, once
        if launcher and int(launcher.size) != self.nnodes:
            raise InputError(
                f"{launcher.name} started {launcher.size} of this script, each for a job of {self.nnodes} machines -> "
                "under Slurm: sbatch launch/slurm.sbatch SCRIPT; else once per machine, with NNODES and MASTER_ADDR"
            )

    def torchrun_flags(self) -> list[str]:
        """Flags of torchrun that start this job's processes on this machine."""
        flags = ["--nnodes", str(self.nnodes), "--nproc-per-node", str(self.gpus_per_node)]
        if self.nnodes == 1:
            flags.append("--standalone")
        else:
            endpoint = f"{self.master_addr}:{self.master_port}"
            flags += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", self.job_id]
            if self.node_rank is not None:
                flags += ["--rdzv-conf", f"is_host={int(self.node_rank == 0)}"]
            if self.master_addr in ("localhost", "127.0.0.1"):
                flags += ["--local-addr", "127.0.0.1"]
        flags += ["--max-restarts", str(self.max_restarts), "--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT"]
        if self.log_dir:
            flags += ["--log-dir", self.log_dir, "--redirects", "3", "--tee", "0:3"]
        return flags


def count_gpus() -> int:
    """NVIDIA GPUs that this process may use; 0 without any. Asks the driver's tool, so that torch stays unloaded."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.splitlines())


def apply_environment(file: Path) -> None:
    """Take over what ``env.sh`` exports; variables that were set before keep their values."""
    script = 'source "$1" && env -0'
    result = subprocess.run(["bash", "-c", script, "bash", str(file)], capture_output=True, text=True)
    if result.returncode:
        raise InputError(f"{file}: {result.stderr.strip() or 'bash could not read it'}")
    for entry in result.stdout.split("\0"):
        name, separator, value = entry.partition("=")
        if separator:
            os.environ.setdefault(name, value)


@command
def main(
    script: str, *, recipe: str, gpus: int, argv: Sequence[str] | None = None, stop: StopRequest | None = None
) -> int:
    """Run the launch script at ``script``.

    Args:
        recipe: configuration file for ``gpus`` devices, used where ``CONFIG`` is not set.
        argv: ``[--config OVERLAY ...] [section.key=value ...]``; default the command line.
        stop: made in the first lines of the process.
    """
    stop = stop or StopRequest()
    arguments = list(sys.argv[1:] if argv is None else argv)
    apply_environment(Path(script).resolve().parent / "env.sh")
    chosen = os.environ.get("CONFIG")
    files = chosen.split(os.pathsep) if chosen else [recipe]
    training = [part for file in files for part in ("--config", file)] + arguments
    if os.environ.get(SRUN_MARK):
        for name, slurm in (("RANK", "PROCID"), ("WORLD_SIZE", "NTASKS"), ("LOCAL_RANK", "LOCALID")):
            os.environ[name] = os.environ[f"SLURM_{slurm}"]  # whatever the shell had that called sbatch
        return train(training, stop)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        if os.environ.keys() >= {"RANK", "LOCAL_RANK", "WORLD_SIZE"}:  # by hand, or by another launcher
            return train(training, stop)
        return _start(script, training, arguments, gpus if not chosen else None, stop)
    if os.environ["WORLD_SIZE"] == "1":
        again = _sizes_for_one_process(script, training, arguments, gpus if not chosen else None)
        if again is not None:
            os.execve(sys.executable, [sys.executable, script, *arguments], again)
    return process_exit_code(train(training, stop))


def _processes_needed(config: Config) -> tuple[int, str]:
    """Smallest number of processes of a configuration, and where it comes from."""
    p = config.parallel
    size, text = p.tp * p.pp * p.cp, f"tp {p.tp} x pp {p.pp} x cp {p.cp}"
    expert = (p.etp or p.tp) * p.ep * p.pp
    return (expert, f"etp {p.etp or p.tp} x ep {p.ep} x pp {p.pp}") if expert > size else (size, text)


def _sizes_for_one_process(
    script: str, training: list[str], arguments: list[str], gpus: int | None
) -> dict[str, str] | None:
    """Environment to start over with, or None when one process is what this configuration takes.

    Raises:
        InputError: it takes more, and nothing says where they should run.
    """
    # torchrun replaced MASTER_ADDR and more; the agent, our parent, still has what the user set.
    try:
        entries = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
        user = dict(entry.decode(errors="surrogateescape").split("=", 1) for entry in entries if b"=" in entry)
    except OSError:
        user = {}
    job = Job.from_environment(user)
    if job.named and job.world_size > 1:
        return user
    needed, reason = _processes_needed(read_command_line(training))
    if needed == 1:
        return None
    raise InputError(
        f"{script}: torchrun started one process, and the configuration needs {needed} ({reason}) -> "
        + commands(script, arguments, gpus or needed)
    )


def commands(script: str, arguments: Sequence[str], gpus: int) -> str:
    """What to type to run a script on ``gpus`` devices, for each way of starting."""
    per_node = min(gpus, count_gpus() or GPUS_PER_MACHINE)
    nnodes = -(-gpus // per_node)
    tail = shlex.join([script, *arguments])
    if nnodes == 1:
        return f"type\n    torchrun --nproc-per-node {per_node} {tail}\nor\n    GPUS_PER_NODE={per_node} bash {tail}"
    return (
        f"type on each of {nnodes} machines (FIRST is the name of one of them)\n"
        f"    torchrun --nnodes {nnodes} --nproc-per-node {per_node} --rdzv-backend c10d "
        f"--rdzv-endpoint FIRST:{DEFAULT_PORT} {tail}\n"
        f"or\n    NNODES={nnodes} GPUS_PER_NODE={per_node} MASTER_ADDR=FIRST bash {tail}\n"
        f"or once, under Slurm\n    sbatch --nodes {nnodes} launch/slurm.sbatch {tail}"
    )


def _start(script: str, training: list[str], arguments: list[str], gpus: int | None, stop: StopRequest) -> int:
    """Check the configuration, then be torchrun's agent of this machine."""
    job, config = Job.from_environment(os.environ), read_command_line(training)
    needed, reason = _processes_needed(config)
    if not job.named and job.world_size % needed:
        raise InputError(
            f"{script}: the configuration needs a multiple of {needed} processes ({reason}), this machine has "
            f"{job.world_size} -> " + commands(script, arguments, gpus or needed)
        )
    check(config, read_model_shape(config.model.config), job.world_size)
    with tempfile.TemporaryDirectory(prefix="gft-launch-") as folder:
        requeue = Path(folder) / "requeue"
        code = _run_agent([*job.torchrun_flags(), script, *arguments], requeue, stop)
        return EXIT_REQUEUE if code == 0 and requeue.exists() else code


def _run_agent(arguments: list[str], requeue: Path, stop: StopRequest) -> int:
    """torchrun in this process; the exit code is that of the first training process that failed."""
    import psutil  # with torch, seconds: only after the configuration was found sound
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def pass_on(number: int, _frame: Any) -> None:
        workers = 0
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):  # it has just ended
                if "TORCHELASTIC_RUN_ID" in child.environ():
                    child.send_signal(number)
                    workers += 1
        if not workers:  # the machines have not met yet
            raise SystemExit(StopRequest.CODES[signal.Signals(number)])

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    stop.training_begins()
    if stop.received:
        return StopRequest.CODES[signal.Signals(stop.received)]
    os.environ[REQUEUE_FILE] = str(requeue)
    # Workers inherit this: a signal waits until they can answer. This process's own come in by the thread of `stop`.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode == EXIT_BAD_INPUT:
            return EXIT_BAD_INPUT  # said by the process itself
        print(error, file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0
