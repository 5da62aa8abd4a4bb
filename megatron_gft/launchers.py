"""What started this process, and which of how many it is: torchrun's, Slurm's, MPI's and Kubernetes' variables."""

import re
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from megatron_gft.errors import InputError

DEFAULT_PORT = 29500


class Launcher(NamedTuple):
    """Its name; the number of processes it started, this one's rank among them all and on this machine, as texts."""

    name: str
    size: str
    rank: str
    local_rank: str


def find_launcher(environment: Mapping[str, str], smallest: int = 2) -> Launcher | None:
    """The launcher other than torchrun that started ``smallest`` processes or more, this one among them; or None."""
    found = [
        Launcher(name, environment[size], environment[rank], environment.get(local, ""))
        for name, size, rank, local in (
            ("srun", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
            ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
            ("mpiexec", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
        )
        if environment.get(size, "").isdecimal() and int(environment[size]) >= smallest and rank in environment
    ]
    # MPI's launchers start a helper per machine by srun
    return max(found, key=lambda launcher: int(launcher.size), default=None)


def name_rank(environment: MutableMapping[str, str]) -> None:
    """Give this process torch's RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, from what started it.

    Raises:
        InputError: they are incomplete or contradict each other: each process would train alone, into one folder.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        return
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name, "set"):  # templates of jobs leave variables empty
            del environment[name]
    launcher, port = find_launcher(environment, smallest=1), DEFAULT_PORT
    if launcher and not environment.keys() & {"RANK", "WORLD_SIZE"}:
        environment.update(RANK=launcher.rank, WORLD_SIZE=launcher.size)
        if launcher.local_rank:
            environment["LOCAL_RANK"] = launcher.local_rank
        if launcher.name == "srun":  # rank 0 is on the first machine of node[03-05,9],other: node03
            first = re.split(r",(?![^[]*\])", environment.get("SLURM_STEP_NODELIST", ""))[0]
            environment.setdefault("MASTER_ADDR", re.sub(r"\[(\w+)[^]]*\]", r"\1", first))
            job = environment.get("SLURM_JOB_ID", "")
            port += int(job) % 10000 if job.isdecimal() else 0  # jobs may share a machine
    given = {name: environment.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    if problem := _problem(launcher, *given.values()):
        shown = ", ".join(f"{name}={value}" if value else f"no {name}" for name, value in given.items())
        raise InputError(
            f"{shown}: {problem} -> set all four in each process, MASTER_ADDR to the machine of rank 0; "
            "or RANK=0 WORLD_SIZE=1 for a run of one process"
        )
    environment.setdefault("MASTER_PORT", str(port))


def _problem(launcher: Launcher | None, rank: str, size: str, local_rank: str, address: str) -> str | None:
    if local_rank and not local_rank.isdecimal():
        return "LOCAL_RANK is no number"
    if not (rank or size or address):
        return None
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        return "no rank below a number of processes"
    if size != "1" and not address:
        return "the processes have no place to meet"
    as_started = launcher and (launcher.size, launcher.rank, True) == (size, rank, bool(local_rank))
    if launcher and not as_started and "1" not in (size, launcher.size):
        return f"{launcher.name} started {launcher.size} processes, this is {launcher.rank}"
    return None
