"""Does GFT help? Many small models, every arm at every rate on the same groups: ``make study``.

    prepare -> for each seed: base -> its groups -> arms x rates -> [rates chosen on validation problems]
            -> test of each arm -> GRPO rounds from the best of some arms -> one arm through the tools -> report

One file a result, in OUTPUT/STUDY/results; what is there is not run again. What is not reached is said.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from examples.study import report, settings
from examples.study.runner import Result, Runner, Task
from megatron_gft.errors import EXIT_INTERRUPTED, command
from megatron_gft.runtime import StopRequest


class Progress:
    """A line a result, with the time that remains by the budget and the pace so far."""

    def __init__(self, runners: list[Runner]):
        self.tasks = [task for runner in runners for task in all_tasks(runner)]
        self.left = sum(t.seconds for runner in runners for t in all_tasks(runner) if runner.result(t.name) is None)
        self.done, self.started, self.count = 0.0, time.monotonic(), 0

    def say(self, task: Task, made: Result) -> None:
        """What came out."""
        self.done, self.left, self.count = self.done + task.seconds, self.left - task.seconds, self.count + 1
        eta = (time.monotonic() - self.started) / self.done * max(self.left, 0.0)
        shown = f" FAILED: {made['failed']}" if made.get("failed") else ""
        for name in ("valid", "test"):
            if name in made:
                samples = 8 if name == "valid" else 16
                shown += f" {name} {100 * sum(made[name]) / len(made[name]) / samples:.1f} % right"
        line = f"{time.strftime('%H:%M:%S')} [{self.count}] {task.name}:{shown} ({made['seconds']:.1f} s), "
        print(
            f"{line}ETA {int(eta // 3600)}:{int(eta % 3600 // 60):02d}:{int(eta % 60):02d}", file=sys.stderr, flush=True
        )


def phases(runner: Runner) -> Iterator[Callable[[], list[Task]]]:
    """In their order."""
    yield from (runner.sweep, runner.tests, runner.products, runner.rounds, runner.tests_after_rounds)


def all_tasks(runner: Runner) -> list[Task]:
    """Of all phases."""
    return [task for phase in phases(runner) for task in phase()]


def budget(studies: list[Runner]) -> str:
    """What will be run, before it is."""
    lines = []
    for runner in studies:
        parts = {
            "runs": runner.sweep(),
            "tests": runner.tests() + runner.tests_after_rounds(),
            "rounds": runner.rounds(),
        }
        minutes = {name: sum(task.seconds for task in tasks) / 60 for name, tasks in parts.items()}
        missing = sum(runner.result(task.name) is None for task in all_tasks(runner))
        text = ", ".join(f"{len(tasks)} {name} {minutes[name]:.0f} min" for name, tasks in parts.items() if tasks)
        lines.append(f"{runner.study.name}: {text}; about {sum(minutes.values()):.0f} min of one core, {missing} to do")
    return "\n".join(lines)


@command
def main(argv: list[str] | None = None) -> int:
    """Run, or go on with, a study; exit code 0 when every result is there."""
    parser = argparse.ArgumentParser(prog="python -m examples.study", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=("study", "quick", "full", "tiny"), default="study")
    parser.add_argument("--seeds", type=int, help="fewer or more of them")
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    options = parser.parse_args(argv)
    studies = settings.axes() if options.size == "full" else [getattr(settings, options.size.upper())]
    if options.seeds:
        studies = [replace(study, sizes=replace(study.sizes, seeds=options.seeds)) for study in studies]
    stop = StopRequest()
    from examples.study import lab  # torch: seconds

    opened = None if options.report else lab.Lab.open(options.output / "log.txt", stop)
    runners = [Runner(study, options.output, opened) for study in studies]
    print(budget(runners), file=sys.stderr, flush=True)
    try:
        progress = Progress(runners)
        for runner in runners if opened else ():
            for phase in phases(runner):
                runner.run(phase(), progress.say)
    except lab.Interrupted:
        print("stopped; the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        for runner in runners:
            report.write(runner.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
