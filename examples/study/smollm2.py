"""A second look at SmolLM2-135M, on word problems like the quickstart's: five objectives on the same groups at three
rates, with three seeds (of the order; the groups are shared). Hours on a CPU; killed, the same command goes on.

Prompts to train on are those of which the base gets 20 to 90 % of eight samples right. None of the problems is one of
the quickstart's held-out ones. Every cell answers validation problems, which choose the rate, and test problems.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from examples.quickstart.word_problems import generate, problem_sets, write_rows
from examples.study.report import bootstrap
from examples.study.settings import objective
from megatron_gft.atomic import write_json
from megatron_gft.commands.options import part
from megatron_gft.errors import EXIT_FAILED, EXIT_INTERRUPTED, command
from megatron_gft.reading import read_json
from megatron_gft.rounds.stages import Pipeline, Stage, StageFailed, prune, say

ARMS = ("gft", "dft_correct", "gft_scaled_0.25", "rft", "gft_scaled_0.5")
RATES = (2e-5, 6e-6, 6e-5)  # the quickstart's first
SEEDS = (1, 2, 3)
SAMPLES, SELVES, MAX_TOKENS = 8, 4, 64  # of the base for each prompt; of these in its group; of each
RIGHT = (0.2, 0.9)  # share of the base's samples: prompts below or above teach little
TEMPLATE = "{prompt} Answer briefly with the calculation."
CHANGED = 0.3  # share of problems whose outcome a training changes: 29 of 100 in the quickstart of 2026-11-23
MINUTES = 6.0  # of CPU, of a cell: measured at the sizes of Sizes()
Group = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Prompts asked and groups kept of them; problems to choose the rate on and to measure on."""

    asked: int = 120
    groups: int = 32
    valid: int = 64
    test: int = 128


@dataclass(frozen=True)
class Cell:
    """One run."""

    arm: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and stages."""
        return f"{self.arm}-lr{self.rate:g}-seed{self.seed}"


def cells() -> list[Cell]:
    """All runs; one seed at one rate is a whole comparison of arms."""
    return [Cell(arm, rate, seed) for seed, rate, arm in product(SEEDS, RATES, ARMS)]


def problems(sizes: Sizes, seed: int = 2001) -> dict[str, list[dict[str, str]]]:
    """Disjoint ``asked``, ``valid`` and ``test`` rows, none of which has template and numbers of a held-out problem."""
    taken = {problem.key for problem in problem_sets(1, 100, seed=1)[1]}
    fresh = (problem for problem in generate(seed) if problem.key not in taken)
    return {name: [next(fresh).row() for _ in range(getattr(sizes, name))] for name in ("test", "valid", "asked")}


def right_share(group: Group) -> float:
    """Share of right ones of the base's samples."""
    rewards = [response["reward"] for response in group["responses"] if response["source"] == "self"]
    return sum(reward > 0 for reward in rewards) / len(rewards)


def is_dead(group: Group) -> bool:
    """All rewards are equal: without a gradient where advantages compare."""
    return len({response["reward"] for response in group["responses"]}) == 1


def kept_groups(groups: Sequence[Group], count: int) -> list[Group]:
    """The first ``count`` whose base is neither too good nor too bad: the expert and the first ``SELVES`` samples."""
    fit = [group for group in groups if RIGHT[0] <= right_share(group) <= RIGHT[1]][:count]
    rest = [[r for r in group["responses"] if r["source"] != "self"] for group in fit]
    own = [[r for r in group["responses"] if r["source"] == "self"][:SELVES] for group in fit]
    return [group | {"responses": a + b} for group, a, b in zip(fit, rest, own, strict=True)]


def detectable(problems: int, changed: float = CHANGED) -> float:
    """Smallest difference of two models on the same problems that is found 4 times in 5 at 95 % (McNemar, normal)."""
    return (1.96 + 0.84) * math.sqrt(changed / problems)


class SecondLook:
    """The stages, each stamped.

    Args:
        output: folder of the run.
        model: Hugging Face folder of the base.
        part: I and N; this process does the I-th of N parts of the runs.
    """

    def __init__(self, output: Path, model: Path, sizes: Sizes, part: tuple[int, int] = (1, 1)):
        self.output, self.model, self.sizes = output, model, sizes
        self.cells = cells()[part[0] - 1 :: part[1]]
        timings = output / f"timings-{part[0]}-of-{part[1]}.json"
        self.pipeline = Pipeline(output / "logs", 4 + 3 * len(self.cells), timings)

    def _stage(self, name: str, words: Sequence[object], output: Path, **more: Any) -> Stage:
        return Stage(name, (sys.executable, *map(str, words)), (output,), self.output / "stages", **more)

    def _evaluate(self, name: str, model: Path, output: Path, **more: Any) -> Stage:
        measured = self.output / "measured.jsonl"
        words = ["tools/evaluate.py", "--model", model, "--problems", measured, "--output", output, "--no-reference"]
        words += ["--prompt-template", TEMPLATE, "--max-tokens", MAX_TOKENS, "--batch-size", 96]
        return self._stage(name, words, output, inputs=(measured,), **more)

    def prepare(self) -> None:
        """Problems, groups, shards, and the base's answers; says what the groups are.

        Raises:
            StageFailed: which stage, why.
        """
        out, run = self.output, self.pipeline.run
        asked, groups, scored, kept = (out / f"{name}.jsonl" for name in ("asked", "groups/groups", "scored", "kept"))
        out.mkdir(parents=True, exist_ok=True)
        sets = problems(self.sizes)
        write_rows(asked, sets["asked"])
        write_rows(out / "measured.jsonl", sets["valid"] + sets["test"])
        sampled = (
            f"kind=transformers source=self model={self.model} k={SAMPLES} max_tokens={MAX_TOKENS} temperature=0.7"
        )
        sources = ["kind=column source=expert column=solution", f"{sampled} batch_size=96 logprobs=true"]
        words = ["tools/generate_groups.py", "--input", asked, "--output", groups, "--seed", 1]
        words += ["--prompt-template", TEMPLATE, *(word for source in sources for word in ("--source", source))]
        run(self._stage("generate", words, groups.parent, resumes=True, inputs=(asked,)))
        words = ["tools/score_groups.py", "--input", groups, "--output", scored, "--verifier", "math"]
        run(self._stage("score", words, scored, needs=("generate",)))
        rows = [json.loads(line) for line in scored.read_text(encoding="utf-8").splitlines()]
        fit = kept_groups(rows, self.sizes.groups)
        write_rows(kept, fit)
        found = {"asked": facts(rows), "kept": facts(fit)}
        write_json(out / "groups.json", found)
        say(f"groups: {found}")
        words = ["tools/preprocess_groups.py", "--input", kept, "--output-prefix", out / "shards/train"]
        words += ["--tokenizer", self.model, "--model", self.model]
        run(self._stage("preprocess", words, out / "shards", inputs=(kept,)))
        run(self._evaluate("base", self.model, out / "base.json"))

    def run_cell(self, cell: Cell) -> None:
        """Train, export, evaluate; what is large goes when it is measured.

        Raises:
            StageFailed: which stage, why.
        """
        folder = self.output / "cells" / cell.name
        train, export = folder / "train", folder / "model"
        words = ["-m", "megatron_gft.train", "--config", "examples/quickstart/config.yaml", *objective(cell.arm)]
        words += ["parallel.pp=1", f"model.config={self.model}", f"checkpoint.init_from=hf:{self.model}"]
        words += [f"data.train=[{self.output}/shards/train*]", f"train.output={train}", f"train.seed={cell.seed}"]
        words += [f"optimizer.lr={cell.rate}", f"optimizer.min_lr={cell.rate / 10}"]
        words += ["train.validate_every=null", "checkpoint.save_every=null", "logging.entropy_every=1000"]
        trained = self._stage(f"{cell.name}-train", words, train, needs=("preprocess",))
        words = ["tools/convert_checkpoint.py", "megatron-to-hf", "--checkpoint", train, "--output", export]
        exported = self._stage(f"{cell.name}-export", words, export, needs=(trained.name,))
        answers = folder / "evaluation.json"
        evaluated = self._evaluate(f"{cell.name}-evaluate", export, answers, needs=(exported.name,))
        for stage in (trained, exported, evaluated):
            self.pipeline.run(stage)
        prune(trained, train / "checkpoints")
        prune(exported, export)

    def answers(self) -> dict[Cell | None, np.ndarray]:
        """Which problems a cell got right, validation problems first; of the base under None."""
        files = {None: self.output / "base.json"}
        files |= {cell: self.output / "cells" / cell.name / "evaluation.json" for cell in cells()}
        cure = "remove it (of a cell: its folder), and run this again"
        found = {cell: read_json(file, cure) for cell, file in files.items() if file.exists()}
        return {cell: np.array([o == "correct" for o in one["greedy"]["by_problem"]]) for cell, one in found.items()}


def facts(groups: Sequence[Group]) -> dict[str, float]:
    """Their number, and means in percent."""
    shares = {"right samples": [right_share(group) for group in groups], "dead": [is_dead(group) for group in groups]}
    return {"groups": len(groups)} | {f"{name}, %": round(100 * float(np.mean(v)), 1) for name, v in shares.items()}


def summarise(answers: dict[Cell | None, np.ndarray], valid: int) -> dict[str, Any]:
    """For each arm its rates on validation problems, and the best of them on test problems, against base and GFT.

    Args:
        valid: so many of the problems choose the rate.
    """
    base, arms, chosen = answers[None], dict[str, Any](), dict[str, np.ndarray]()
    for arm in ARMS:
        ran: dict[float, list[np.ndarray]] = {}
        for cell in (cell for cell in cells() if cell.arm == arm and cell in answers):
            ran.setdefault(cell.rate, []).append(answers[cell])
        valids = {rate: float(np.mean(runs, 0)[:valid].mean()) for rate, runs in ran.items()}
        rates = {rate: {"seeds": len(ran[rate]), "valid": share} for rate, share in valids.items()}
        arms[arm] = {"rates": rates}
        if rates:
            best = max(valids, key=valids.__getitem__)
            chosen[arm] = tests = np.array(ran[best])[:, valid:].astype(float)
            arms[arm] |= {"rate": best, "test": bootstrap(tests), "change": bootstrap(tests - base[valid:])}
            if len(tests) == len(chosen["gft"]) and arm != "gft":  # its cells run first; the same seeds
                arms[arm]["to_gft"] = bootstrap(tests - chosen["gft"])
    return {"base": {"valid": float(base[:valid].mean()), "test": float(base[valid:].mean())}, "arms": arms}


def table(summary: dict[str, Any]) -> str:
    """As Markdown, in percent."""
    base = summary["base"]
    heads = ["arm", *(f"valid, {rate:g} (seeds)" for rate in RATES), "rate", "test", "change", "to gft"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines.append(f"| base | {100 * base['valid']:.1f} | | | - | {100 * base['test']:.1f} | - | - |")
    for arm, one in summary["arms"].items():
        rates = [one["rates"].get(rate) for rate in RATES]
        valids = [f"{100 * found['valid']:.1f} ({found['seeds']})" if found else "not run" for found in rates]
        shown = ["", "", "", ""]
        if "rate" in one:
            test, *others = ([100 * value for value in one.get(name, ())] for name in ("test", "change", "to_gft"))
            shown = [f"{one['rate']:g}", "{:.1f} [{:.1f}, {:.1f}]".format(*test)]
            shown += ["{:+.1f} [{:+.1f}, {:+.1f}]".format(*other) if other else "-" for other in others]
        lines.append("| " + " | ".join([arm, *valids, *shown]) + " |")
    return "\n".join(lines)


@command
def main(argv: list[str] | None = None) -> int:
    """Run, or go on; exit code 0 when every cell is there, 1 when a stage failed."""
    parser = argparse.ArgumentParser(prog="python -m examples.study.smollm2", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".models/SmolLM2-135M-Instruct"))
    parser.add_argument("--output", type=Path, default=Path("runs/study/smollm2"))
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="do every N-th run, from the I-th")
    options = parser.parse_args(argv)
    sizes = Sizes()
    look = SecondLook(options.output, options.model, sizes, part(options.part))
    left = [cell for cell in look.cells if cell not in look.answers()]
    points = 100 * detectable(sizes.test)
    hours = MINUTES * len(left) / 60
    say(f"{len(left)} of {len(look.cells)} cells to do, about {MINUTES:g} min of one core each, {hours:.1f} h together")
    say(f"smallest detectable difference of two runs on {sizes.test} test problems: {points:.0f} points")
    try:
        if not options.report:
            look.prepare()
        started = time.monotonic()
        for cell in [] if options.report else look.cells:
            look.run_cell(cell)
            if cell in left:
                done = 1 + left.index(cell)
                eta = (time.monotonic() - started) / done * (len(left) - done) / 60
                say(f"{time.strftime('%H:%M:%S')} {cell.name}: {done} of {len(left)}, ETA {eta:.0f} min")
    except StageFailed as error:
        say(f"error: {error}")
        return EXIT_FAILED
    except KeyboardInterrupt:
        say("stopped; the same command goes on")
        return EXIT_INTERRUPTED
    finally:
        if None in (answers := look.answers()):
            summary = summarise(answers, sizes.valid)
            write_json(look.output / "summary.json", summary)
            print(table(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
