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

from __future__ import annotations

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
from typing import Any

from megatron_gft.commands.train import main as train
from megatron_gft.commands.train import read_command_line
from megatron_gft.config import Config
from megatron_gft.errors import EXIT_BAD_INPUT, EXIT_REQUEUE, InputError, command
from megatron_gft.hf.shape import read_model_shape
from megatron_gft.validation import check

SRUN_MARK = "GFT_STARTED_BY_SRUN"
REQUEUE_FILE = "GFT_REQUEUE_FILE"
DEFAULT_PORT = 29500
GPUS_PER_MACHINE = 8


@dataclass(frozen=True)
class Job:
    """How many processes where, from the environment.

    ``named`` is false when neither ``NNODES`` nor ``GPUS_PER_NODE`` was set and the sizes are those of this machine.
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
    def from_environment(cls, environment: Mapping[str, str]) -> Job:
        """Read the variables that the head of each script names.

        Raises:
            InputError: a number is none, or several machines have no ``MASTER_ADDR`` to meet at.
        """

        def number(name: str, default: int, smallest: int) -> int:
            text = environment.get(name) or str(default)
            if not text.isdecimal() or int(text) < smallest:
                raise InputError(f"{name}={text}: not a whole number of at least {smallest}")
            return int(text)

        job = cls(
            nnodes=number("NNODES", 1, 1),
            gpus_per_node=number("GPUS_PER_NODE", count_gpus() or 1, 1),
            named=bool(environment.get("NNODES") or environment.get("GPUS_PER_NODE")),
            master_addr=environment.get("MASTER_ADDR") or None,
            master_port=number("MASTER_PORT", DEFAULT_PORT, 1),
            node_rank=number("NODE_RANK", 0, 0) if environment.get("NODE_RANK") else None,
            max_restarts=number("MAX_RESTARTS", 0, 0),
            log_dir=environment.get("LOG_DIR") or None,
            job_id=environment.get("JOB_ID") or "gft",
        )
        if job.nnodes > 1 and job.master_addr is None:
            raise InputError(
                f"NNODES={job.nnodes} and no MASTER_ADDR: the machines need a place to meet -> set it to the name of "
                "one of them, the same on all"
            )
        return job

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
def main(script: str, *, recipe: str, gpus: int, argv: Sequence[str] | None = None) -> int:
    """Run a launch script.

    Args:
        script: its path.
        recipe: configuration file used where ``CONFIG`` is not set.
        gpus: devices that the recipe is made for.
        argv: ``[--config OVERLAY ...] [section.key=value ...]``; default the command line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    apply_environment(Path(script).resolve().parent / "env.sh")
    chosen = os.environ.get("CONFIG")
    files = chosen.split(os.pathsep) if chosen else [recipe]
    training = [part for file in files for part in ("--config", file)] + arguments
    if os.environ.get(SRUN_MARK):
        for name, slurm in (("RANK", "PROCID"), ("WORLD_SIZE", "NTASKS"), ("LOCAL_RANK", "LOCALID")):
            os.environ[name] = os.environ[f"SLURM_{slurm}"]  # named as torchrun would
        return _work(training)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return _start(script, training, arguments, gpus if not chosen else None)
    if os.environ["WORLD_SIZE"] == "1":
        again = _sizes_for_one_process(script, training, arguments, gpus if not chosen else None)
        if again is not None:
            os.execve(sys.executable, [sys.executable, script, *arguments], again)
    return _work(training)


def _work(training: list[str]) -> int:
    """Be one training process."""
    code = train(training)
    if code == EXIT_REQUEUE and REQUEUE_FILE in os.environ:
        # torchrun's agent knows only success and failure, and would report this as the latter.
        Path(os.environ[REQUEUE_FILE]).touch()
        return 0
    return code


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
    if (user.get("NNODES") or user.get("GPUS_PER_NODE")) and Job.from_environment(user).world_size > 1:
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


def _start(script: str, training: list[str], arguments: list[str], gpus: int | None) -> int:
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
        os.environ[REQUEUE_FILE] = str(Path(folder) / "requeue")
        code = _run_agent([*job.torchrun_flags(), script, *arguments])
        return EXIT_REQUEUE if code == 0 and Path(os.environ[REQUEUE_FILE]).exists() else code


def _run_agent(arguments: list[str]) -> int:
    """torchrun in this process; the exit code is that of the first training process that failed."""
    import psutil  # with torch, seconds: only after the configuration was found sound
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def pass_on(number: int, _frame: Any) -> None:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):  # it has just ended
                if "TORCHELASTIC_RUN_ID" in child.environ():
                    child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode == EXIT_BAD_INPUT:
            return EXIT_BAD_INPUT  # said by the process itself
        print(error, file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0
