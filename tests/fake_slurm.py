"""Stand-ins for ``sbatch``, ``srun`` and ``scontrol`` on one machine, so that the Slurm script runs for real.

``install(folder)`` writes the three commands. ``srun`` starts nodes x tasks processes with Slurm's variables, hands
SIGUSR1 and SIGTERM on to them, writes ``--output`` with %t replaced, ends the rest ``--wait`` seconds after the first
one ended, and returns the largest exit code, as Slurm does.
``scontrol requeue`` is noted in ``folder/requeued``. What they cannot show: cgroups, real time limits, preemption.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SBATCH = """#!/bin/bash
export SLURM_JOB_ID=4711 SLURM_JOB_NODELIST=node[1-2] SLURM_SUBMIT_DIR="$PWD"
export SLURM_JOB_NUM_NODES="${FAKE_NODES:-1}"
exec bash "$@"
"""

SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") echo 127.0.0.1 ;;
    requeue*) echo "$2" >> "$(dirname "$0")/requeued" ;;
    *) exit 1 ;;
esac
"""


def install(folder: Path) -> Path:
    """Write the commands into ``folder`` and return it, for PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    srun = f'#!/bin/bash\nexec "{sys.executable}" "{Path(__file__).resolve()}" "$@"\n'
    for name, text in {"sbatch": SBATCH, "scontrol": SCONTROL, "srun": srun}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def srun(argv: list[str]) -> int:
    """Run ``srun [--flag=value ...] command ...``."""
    flags, command = {}, list(argv)
    while command and command[0].startswith("--"):
        name, _, value = command.pop(0).partition("=")
        flags[name] = value
    nodes, tasks = int(flags["--nodes"]), int(flags["--ntasks-per-node"])
    processes = []
    for rank in range(nodes * tasks):
        environment = os.environ | {
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank % tasks),
            "SLURM_NTASKS": str(nodes * tasks),
        }
        with open(flags["--output"].replace("%t", str(rank)), "ab") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _: [process.send_signal(number) for process in processes])
    patience = int(flags["--wait"])
    while all(process.poll() is None for process in processes):
        time.sleep(0.05)
    deadline = time.monotonic() + patience
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return max(code if code >= 0 else 128 - code for code in (process.wait() for process in processes))


if __name__ == "__main__":
    sys.exit(srun(sys.argv[1:]))
