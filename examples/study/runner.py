"""One study in its folder: what each result costs, what it needs, and how it is made."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from examples.study import report
from examples.study.countdown import group_row, model_folder, pretraining_rows, problem_rows, side_skill, write_rows
from examples.study.settings import BASE, Study, objective
from megatron_gft.atomic import write_json
from megatron_gft.errors import InputError

Result = dict[str, Any]
TEST_SEED = 10_000  # of the problems that are measured on: the same for all seeds
# CPU seconds on one core of a small machine, for the budget and the estimate of what remains.
SECONDS = {"step of pre-training": 0.09, "response": 0.0011, "sample": 0.0009, "start": 1.5}


@dataclass(frozen=True)
class Task:
    """One result: its name (a path), what it costs in seconds, and what makes it."""

    name: str
    seconds: float
    make: Callable[[], Result]


class Runner:
    """Runs one study in its folder."""

    def __init__(self, study: Study, root: Path, lab: Any):
        from examples.study import lab as laboratory  # torch: seconds

        self.study, self.world, self.sizes = study, study.world, study.sizes
        self.folder, self.lab, self.laboratory = root / study.name, lab, laboratory
        self.model = self.folder / "model"

    # --- results --------------------------------------------------------------------------------------------------

    def result_file(self, name: str) -> Path:
        """Where a result lies."""
        return self.folder / "results" / f"{name}.json"

    def result(self, name: str) -> Result | None:
        """A finished result, None where there is none.

        Raises:
            InputError: it was made with other settings, or is damaged.
        """
        if not (file := self.result_file(name)).is_file():
            return None
        found = report.read_result(file)
        if found["key"] != self.study.key:
            raise InputError(f"{file}: was made with other settings -> another --output, or remove the folder")
        return found

    def run(self, tasks: list[Task], say: Callable[[Task, Result], None]) -> None:
        """Make what is missing, in order."""
        for task in tasks:
            self.lab.check_stop()
            if self.result(task.name) is None:
                started = sum(os.times()[:4])  # with the children's: one arm goes through the tools
                made = task.make()
                made |= {"name": task.name, "key": self.study.key, "seconds": sum(os.times()[:4]) - started}
                write_json(self.result_file(task.name), made)
                say(task, made)

    # --- tasks ----------------------------------------------------------------------------------------------------

    def sweep(self) -> list[Task]:
        """Bases and runs of all arms at all rates."""
        world, sizes = self.world, self.sizes
        pretraining = world.pretrain // world.pretrain_batch * SECONDS["step of pre-training"]
        responses = world.prompts * (1 + world.teachers + world.selves) * world.epochs
        validation = sizes.valid * (sizes.valid_samples + 1) * SECONDS["sample"] + SECONDS["start"]
        cell = responses * SECONDS["response"] + validation
        tasks = [Task("prepare", world.pretrain * 4e-4, self.prepare)]
        for seed in range(sizes.seeds):
            tasks.append(Task(f"seed-{seed}/base", pretraining + validation, functools.partial(self.base, seed)))
            for arm in sizes.arms:
                of_arm = cell if "self" in str(arm) or "expert" not in str(objective(arm)) else cell / 2
                for lr in sizes.lrs:
                    make = functools.partial(self.tune, seed, arm, lr)
                    tasks.append(Task(f"seed-{seed}/{arm}/lr-{lr:g}", of_arm, make))
        return tasks

    def tests(self) -> list[Task]:
        """The chosen rate of each arm, on problems that nothing was chosen on."""
        sizes = self.sizes
        cost = sizes.test * (sizes.test_samples + sizes.larger_samples + 2) * SECONDS["sample"] + SECONDS["start"]
        return [
            Task(f"seed-{seed}/{arm}/test-lr-{lr:g}", cost, functools.partial(self.test, seed, arm, lr))
            for arm in (BASE, *sizes.arms)
            for lr in [0.0 if arm == BASE else self.chosen(arm, sizes.lrs)]
            for seed in range(sizes.seeds)
        ]

    def rounds(self) -> list[Task]:
        """GRPO from each start at each rate."""
        sizes = self.sizes
        cost = sizes.rounds * (
            sizes.round_prompts * sizes.round_samples * (SECONDS["response"] + SECONDS["sample"]) + SECONDS["start"]
        )
        return [Task("starts", 0.0, self.fix_starts)] * bool(sizes.starts) + [
            Task(f"seed-{seed}/rounds/{start}/lr-{lr:g}", cost, functools.partial(self.grpo, seed, start, lr))
            for seed in range(sizes.seeds)
            for start in sizes.starts
            for lr in sizes.round_lrs
        ]

    def tests_after_rounds(self) -> list[Task]:
        """As :meth:`tests`, of what the rounds made."""
        cost = self.sizes.test * (self.sizes.test_samples + 2) * SECONDS["sample"] + SECONDS["start"]
        return [
            Task(f"seed-{seed}/{place}/test-lr-{lr:g}", cost, functools.partial(self.test, seed, place, lr))
            for place in (f"rounds/{start}" for start in self.sizes.starts)
            for lr in [self.chosen(place, self.sizes.round_lrs)]
            for seed in range(self.sizes.seeds)
        ]

    def products(self) -> list[Task]:
        """Some arms again through the tools, from the first seed's base."""
        seconds = 60 + self.world.prompts * 0.1
        return [Task(f"product/{arm}", seconds, functools.partial(self.product, arm)) for arm in self.sizes.product]

    # --- what makes them ------------------------------------------------------------------------------------------

    def shard(self, groups: Path) -> Path:
        """The group file as a shard beside it."""
        from megatron_gft.groups.problems import DEFAULT_POLICIES, DROP
        from megatron_gft.preprocess.run import PreprocessOptions, preprocess

        prefix = groups.parent / "shards" / groups.stem
        shutil.rmtree(prefix.parent, ignore_errors=True)
        policies = DEFAULT_POLICIES | {"empty_response": DROP}
        options = PreprocessOptions([str(groups)], str(self.model), str(prefix), "none", policies=policies)
        preprocess(options, progress=False)
        return prefix

    def problems(self, share: str, count: int, *, larger: bool = False) -> list[dict]:
        """Problems to measure on."""
        return problem_rows(share, count, TEST_SEED, larger=larger, least_ways=self.world.least_ways)

    def prepare(self) -> Result:
        """Tokenizer, configuration and pre-training data; seeds share the data, not its order."""
        world = self.world
        model_folder(self.model, hidden=world.hidden, layers=world.layers)
        shares = {"right": world.right, "rare": world.rare, "side": world.side, "larger": world.larger}
        rows = pretraining_rows(world.pretrain, 0, **shares)
        self.shard(write_rows(self.folder / "pretraining" / "groups.jsonl", rows))
        return {"world": asdict(world), "sizes": asdict(self.sizes)}

    def train(self, output: Path, *overrides: str, keep: bool = False) -> tuple[Path | None, str]:
        return self.lab.train(output, [f"model.config={self.model}", *overrides], keep=keep)

    def base(self, seed: int) -> Result:
        """Pre-train, look at it, and make the groups: experts, teachers, and samples of this base."""
        world, here = self.world, self.folder / f"seed-{seed}"
        export, why = self.train(
            here / BASE,
            *("objective=sft", f"data.train=[{self.folder}/pretraining/shards/groups]", f"train.seed={seed}"),
            *(f"data.groups_per_step={world.pretrain_batch}", f"optimizer.lr={world.pretrain_lr}"),
            *("optimizer.schedule=cosine", "optimizer.warmup_steps=50", "objective.entropy=false"),
        )
        assert export is not None, why
        model = self.laboratory.open_model(export)
        options = {"teachers": world.teachers, "right": world.teacher_right, "least_ways": world.least_ways}
        rows = problem_rows("tune", world.prompts, seed, **options)
        answers = self.laboratory.answer(model, [row["prompt"] for row in rows], world.selves, f"{seed} self")
        for index, row in enumerate(rows):
            ours = slice(index * world.selves, (index + 1) * world.selves)
            texts = [("self", text) for text in answers.texts[ours]]
            judged = group_row(row["id"], row["prompt"], texts)["responses"]
            for response, one in zip(judged, answers.decoded[ours], strict=True):
                response["finish_reason"] = one.finish_reason
            row["responses"] += judged
        self.shard(write_rows(here / "tune" / "groups.jsonl", rows))
        return self.validation(model, seed) | {"self_right": float(answers.right.mean())}

    def validation(self, model: Any, seed: int) -> Result:
        """What rates are chosen by, and what collapses show in."""
        prompts = [row["prompt"] for row in self.problems("valid", self.sizes.valid)]
        answers = self.laboratory.answer(model, prompts, self.sizes.valid_samples, f"{seed} valid")
        greedy = self.laboratory.answer(model, prompts, 0, "")
        return {
            "valid": answers.right.sum(1).tolist(),
            "valid_greedy": greedy.right[:, 0].astype(int).tolist(),
            "valid_entropy": answers.entropy,
        }

    def export(self, seed: int, *place: str) -> Path | None:
        """What a run exported; None where it failed."""
        return max(self.folder.joinpath(f"seed-{seed}", *place).glob("export/step-*"), default=None)

    def tune_settings(self, seed: int, arm: str, lr: float) -> list[str]:
        """An arm's run, as on a command line."""
        world, here = self.world, self.folder / f"seed-{seed}"
        return [
            *(f"checkpoint.init_from=hf:{self.export(seed, BASE)}", f"data.train=[{here}/tune/shards/groups]"),
            *(f"data.groups_per_step={world.groups_per_step}", f"train.epochs={world.epochs}", f"train.seed={seed}"),
            *(f"optimizer.lr={lr:g}", *objective(arm)),
        ]

    def tune(self, seed: int, arm: str, lr: float) -> Result:
        """A run of an arm."""
        output = self.folder / f"seed-{seed}" / arm / f"lr-{lr:g}"
        export, why = self.train(output, *self.tune_settings(seed, arm, lr))
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        result: Result = {"losses": [line["loss"] for line in lines], "failed": why}
        return result | (self.validation(self.laboratory.open_model(export), seed) if export else {})

    def chosen(self, place: str, lrs: tuple[float, ...]) -> float:
        """The rate with most right samples of validation problems; the first one while none is known."""
        found = {
            n: r
            for seed in range(self.sizes.seeds)
            for lr in lrs
            for n in [f"seed-{seed}/{place}/lr-{lr:g}"]
            if (r := self.result(n))
        }
        return report.chosen_rate(found, place, lrs, self.sizes.seeds) or lrs[0]

    def measured(self, folder: Path | None, seed: int) -> Result:
        """All measures on test problems."""
        if folder is None:
            return {"failed": "the run failed"}
        lab, sizes, model = self.laboratory, self.sizes, self.laboratory.open_model(folder)
        rows = self.problems("test", sizes.test)
        prompts, sides = [row["prompt"] for row in rows], [side_skill(Random(i))[0] for i in range(sizes.test)]
        larger = [row["prompt"] for row in self.problems("test", sizes.test, larger=True)]
        answers = lab.answer(model, prompts, sizes.test_samples, f"{seed} test")
        return {
            "test": answers.right.sum(1).tolist(),
            "greedy": lab.answer(model, prompts, 0, "").right[:, 0].astype(int).tolist(),
            "larger": lab.answer(model, larger, sizes.larger_samples, f"{seed} larger").right.sum(1).tolist(),
            "side": lab.answer(model, sides, 0, "").right[:, 0].astype(int).tolist(),
            "rare": sum(">" in text for text in answers.texts) / len(answers.texts),
            "entropy": answers.entropy,
            "expert_nll": lab.expert_nll(model, rows),
        }

    def test(self, seed: int, place: str, lr: float) -> Result:
        """A run on test problems; rate 0 is the base."""
        folder = self.export(seed, *([BASE] if place == BASE else [place, f"lr-{lr:g}"]))
        return {"lr": lr} | self.measured(folder, seed)

    def fix_starts(self) -> Result:
        """The rates of the runs that rounds begin with: seeds that come later do not change them."""
        return {"lrs": {start: self.chosen(start, self.sizes.lrs) for start in self.sizes.starts if start != BASE}}

    def start_of(self, seed: int, start: str) -> Path | None:
        """What rounds begin with."""
        if start == BASE:
            return self.export(seed, BASE)
        return self.export(seed, start, f"lr-{(self.result('starts') or {})['lrs'][start]:g}")

    def grpo(self, seed: int, start: str, lr: float) -> Result:
        """Rounds of sampling from the newest model and training on its samples; one run, one optimizer state.

        The base gets as many rounds more as the groups' self samples were worth, so that all have seen equally many.
        """
        from megatron_gft.shards import GroupShardWriter, tokenizer_stamp

        sizes, output = self.sizes, self.folder / f"seed-{seed}" / "rounds" / start / f"lr-{lr:g}"
        shutil.rmtree(output, ignore_errors=True)
        first = folder = self.start_of(seed, start)
        more = -(-self.world.prompts * self.world.selves // (sizes.round_prompts * sizes.round_samples))
        curve: list[float] = []
        why = "" if first else "its start failed"
        for turn in range(sizes.rounds + (more if start == BASE else 0)):
            if folder is None:
                break
            model = self.laboratory.open_model(folder)
            options = {"least_ways": self.world.least_ways}
            prompts = [
                r["prompt"] for r in problem_rows("tune", sizes.round_prompts, (seed + 1) * 1000 + turn, **options)
            ]
            answers = self.laboratory.answer(model, prompts, sizes.round_samples, f"{seed} round {turn}")
            curve.append(float(answers.right.mean()))
            prefix = output / "shards" / f"round-{turn}"
            with GroupShardWriter(prefix, tokenizer_stamp(model.tokenizer)) as writer:
                for index, prompt in enumerate(prompts):
                    ours = answers.decoded[index * sizes.round_samples : (index + 1) * sizes.round_samples]
                    writer.add_group(
                        *(model.prompt_ids(prompt), [one.ids for one in ours], ["self"] * len(ours)),
                        answers.right[index].astype(float).tolist(),
                        group_id=f"{turn}-{index}",
                        logprobs=[one.logprobs for one in ours],
                    )
            folder, why = self.train(
                output,
                *(f"checkpoint.init_from=hf:{first}", f"data.train=[{prefix}]", "data.allow_changed_data=true"),
                *(f"data.groups_per_step={sizes.round_prompts // sizes.round_steps}", f"train.seed={seed}"),
                *(f"train.epochs={turn + 1}", f"optimizer.lr={lr:g}", "optimizer.schedule=constant", "objective=grpo"),
                keep=True,
            )
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        result: Result = {"curve": curve, "failed": why}
        return result | (self.validation(self.laboratory.open_model(folder), seed) if folder else {})

    def product(self, arm: str) -> Result:
        """What the tools measure, beside what the sweep did; each has samples of its own."""
        from examples.study.product import through_the_tools, write_problems

        world, sizes, lr = self.world, self.sizes, self.chosen(arm, self.sizes.lrs)
        folder, base = (self.folder / "product" / arm).resolve(), self.export(0, BASE)
        assert base is not None
        shutil.rmtree(folder, ignore_errors=True)
        options = {"teachers": world.teachers, "right": world.teacher_right, "least_ways": world.least_ways}
        write_problems(folder / "tune.jsonl", problem_rows("tune", world.prompts, 0, **options))
        write_problems(folder / "test.jsonl", self.problems("test", sizes.test))
        shared = [one for one in self.tune_settings(0, arm, lr) if not one.startswith("data.train=")]
        shared = [one.replace(str(base), str(base.resolve())) for one in shared]
        found = through_the_tools(
            *(folder, base.resolve(), self.model.resolve()),
            samples=sizes.test_samples, teachers=world.teachers, selves=world.selves, settings=shared,
        )  # fmt: skip
        swept = self.result(f"seed-0/{arm}/test-lr-{lr:g}") or {"greedy": [0], "test": [0]}
        ours = {"greedy": sum(swept["greedy"]) / sizes.test, "sampled": sum(swept["test"]) / sizes.test}
        ours["sampled"] /= sizes.test_samples
        return {"lr": lr, "tools": found, "sweep": ours}
