"""What builds a run and ends it: the data, the process group, model and optimizer, the state to go on from."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_gft.batch import Groups, StepLoader, open_groups
from megatron_gft.checkpoints.checkpointer import Checkpointer, RunState, load_weights
from megatron_gft.checkpoints.history import find_checkpoint, list_checkpoints, newest_checkpoint
from megatron_gft.checkpoints.starts import DATA_KEYS, Changes, check_same_function, keep_config
from megatron_gft.config import Config
from megatron_gft.errors import InputError, InputErrors
from megatron_gft.gft import check_user_coefficient
from megatron_gft.hf.files import MODEL_FILES_FOLDER, ModelFiles
from megatron_gft.hf.shape import SAME_TENSORS, ModelShape, read_model_shape, shape_differences
from megatron_gft.hf.shared_folder import gather_results
from megatron_gft.hf.weights import load_hf_weights
from megatron_gft.metrics import Reporter
from megatron_gft.model import build_model
from megatron_gft.objectives import by_source
from megatron_gft.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from megatron_gft.parallel import Parallel, destroy_parallel, initialize_parallel, seed_everything
from megatron_gft.reports.plotting import plot_runs
from megatron_gft.runtime import StopRequest, Watchdog, set_up_logging, start_process_group
from megatron_gft.shards.verification import verify_at_start
from megatron_gft.step import StepRunner
from megatron_gft.tokenizer import has_tokenizer
from megatron_gft.trainer import Trainer, TrainingStopped

logger = logging.getLogger(__name__)


def build_trainer(
    config: Config,
    shape: ModelShape,
    parallel: Parallel,
    train_groups: Groups,
    valid_groups: Groups | None,
    stop: StopRequest | None = None,
) -> Trainer:
    """Model, optimizer, data and outputs of a run, with weights loaded and the run's state restored. Raises InputError
    where weights or checkpoint do not fit, or the data changed since the checkpoint was written."""
    run_folder = Path(config.train.output)
    checkpoints = run_folder / "checkpoints"
    loader = StepLoader(train_groups, config, shape, parallel)
    total_steps = loader.steps_per_epoch * config.train.epochs
    total_steps = min(total_steps, config.train.max_steps or total_steps)
    found = [_resume_point(config, checkpoints) if parallel.rank == 0 else None]
    dist.broadcast_object_list(found, src=0)
    resume_from = found[0]

    _check_function(config, shape, _weights_folder(config, resume_from))
    changed, said = check_same_function(config, resume_from, run_folder) if resume_from else ({}, [])
    kept = gather_results(lambda: [] if parallel.rank else keep_config(config, run_folder), run_folder)
    for line in [*said, *kept[0]]:
        logger.info("%s", line)
    seed_everything(config.train.seed, parallel)
    transformer, modules = build_model(shape, config.model, config.objective, config.parallel, parallel)
    if resume_from is None and not config.checkpoint.init_optimizer:
        _initial_weights(config, shape, parallel, modules)
    chunks = wrap_data_parallel(modules, transformer, config.optimizer)
    optimizer = build_optimizer(chunks, config.optimizer, bf16=transformer.bf16)
    files = model_files(config, resume_from)
    checkpointer = Checkpointer(checkpoints, chunks, optimizer, parallel, config=config, model_files=files)
    now = {"groups_per_step": config.data.groups_per_step, "total_steps": total_steps}
    state = RunState(data_fingerprint=train_groups.fingerprint, **now)
    if resume_from is not None:
        stored = checkpointer.load(resume_from, with_optimizer=config.checkpoint.load_optimizer)
        _check_same_data(stored, state, config, resume_from, changed)
        state = replace(stored, data_fingerprint=state.data_fingerprint, **now)
    elif config.checkpoint.init_optimizer:
        origin = newest_checkpoint(Path(str(config.checkpoint.init_from)), "checkpoint.init_from")
        checkpointer.load(origin, with_optimizer=True)
    reporters: list[Reporter] = []  # of rank 0; all ranks end when its files cannot be written
    progress = {"world_size": parallel.world_size, "first_step": state.step, "total_steps": total_steps}
    gather_results(lambda: None if parallel.rank else reporters.append(Reporter(config, **progress)), run_folder)
    trainer = Trainer(
        config=config,
        parallel=parallel,
        chunks=chunks,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config.optimizer, total_steps, state.step),
        runner=StepRunner(chunks, parallel),
        loader=loader,
        steps=loader.ahead(range(state.step, total_steps)),
        validation=StepLoader(valid_groups, config, shape, parallel, validation=True) if valid_groups else None,
        checkpointer=checkpointer,
        reporter=reporters[0] if reporters else None,
        state=state,
        total_steps=total_steps,
        stop=stop or StopRequest(),
        watchdog=Watchdog(
            config.train.watchdog_minutes, parallel.coordinates, run_folder / "doing" / f"rank-{parallel.rank}.txt"
        ),
    )
    trainer.stop.training_begins()
    return trainer


def join(config: Config, store: dist.Store | None = None) -> tuple[torch.device, Parallel]:
    """Meet the other processes (at ``store``) in the configured layout: this process's device, and its place."""
    p = config.parallel
    device = start_process_group(p.collective_timeout_minutes, store)
    set_up_logging(dist.get_rank())
    return device, initialize_parallel(
        tp=p.tp, pp=p.pp, vpp=p.vpp, cp=p.cp, ep=p.ep, etp=p.etp, timeout_minutes=p.collective_timeout_minutes
    )


def load_model(config: Config, shape: ModelShape, parallel: Parallel) -> list[torch.nn.Module]:
    """This rank's chunks with the weights of ``checkpoint.init_from``, to be run forward only."""
    _check_function(config, shape, _weights_folder(config, None))
    seed_everything(config.train.seed, parallel)
    _, modules = build_model(shape, config.model, config.objective, config.parallel, parallel)
    _initial_weights(config, shape, parallel, modules)
    return [module.eval() for module in modules]


def _resume_point(config: Config, checkpoints: Path) -> Path | None:
    if config.checkpoint.resume == "never":
        if list_checkpoints(checkpoints):
            raise InputError(
                f"{checkpoints}: holds checkpoints and checkpoint.resume=never would overwrite them -> choose another "
                "train.output, or remove them"
            )
        return None
    return find_checkpoint(checkpoints, config.checkpoint.resume)


def _weights_folder(config: Config, resume_from: Path | None) -> Path | None:
    """The folder whose config.json belongs to the weights that a run goes on or begins with; None for random ones."""
    origin = config.checkpoint.init_from
    if resume_from is not None:
        return resume_from / MODEL_FILES_FOLDER
    if origin is None:
        return None
    if origin.startswith("hf:"):
        return Path(origin.removeprefix("hf:"))
    return newest_checkpoint(Path(origin), "checkpoint.init_from") / MODEL_FILES_FOLDER


def model_files(config: Config, resume_from: Path | None) -> ModelFiles:
    """Tokenizer, template and generation settings come from the weights' folder: a recipe has a config.json only."""
    tokenizer = Path(config.model.tokenizer) if config.model.tokenizer else None
    other_config = config.model.folder if config.model.allow_config_mismatch else None
    for start in dict.fromkeys((resume_from, None)):  # checkpoints of earlier versions may have no tokenizer
        with contextlib.suppress(InputError):  # what a run began with may be gone; at the beginning, loading says so
            folder = _weights_folder(config, start)
            if folder is not None and has_tokenizer(folder):
                return ModelFiles(folder, other_config, tokenizer)
    return ModelFiles(config.model.folder, None, tokenizer)


def _check_function(config: Config, shape: ModelShape, folder: Path | None) -> None:
    """``model.config`` describes the model of the weights; InputErrors with all that makes it another one."""
    if folder is None:
        return
    if not (folder / "config.json").is_file():
        logger.warning("%s: there is no config.json, so model.config is not compared with the weights'", folder)
        return
    lines = {
        key: f"{key}: {ours!r} by {config.model.config}, {theirs!r} by {folder}"
        for key, (ours, theirs) in shape_differences(shape, read_model_shape(folder)).items()
    }
    others = lines.keys() - SAME_TENSORS
    if refused := [key for key in lines if key in others or key not in config.model.allow_config_mismatch]:
        allow = f", or train them as another function: model.allow_config_mismatch=[{','.join(lines)}]"
        raise InputErrors(
            f"model.config is not that of the weights -> take theirs (model.config={folder}){'' if others else allow}",
            [lines[key] + (", which makes other tensors" if key in others else "") for key in refused],
        )
    for line in lines.values():
        logger.warning("allowed by model.allow_config_mismatch: %s", line)
    if not lines:
        logger.info("model.config agrees with %s", folder)


def _initial_weights(config: Config, shape: ModelShape, parallel: Parallel, modules: list[torch.nn.Module]) -> None:
    origin = config.checkpoint.init_from
    if origin is None:
        logger.info("checkpoint.init_from is not set: training starts from random weights")
    elif origin.startswith("hf:"):
        load_hf_weights(modules, shape, origin.removeprefix("hf:"), parallel)
    else:
        load_weights(newest_checkpoint(Path(origin), "checkpoint.init_from"), modules, parallel)


def _check_same_data(stored: RunState, now: RunState, config: Config, path: Path, changed: Changes) -> None:
    """The order of groups is a function of these two; with others, "continue at step n" means other groups."""
    if stored.data_fingerprint == now.data_fingerprint and stored.groups_per_step == now.groups_per_step:
        return
    lines = [f"{key}: {changed[key][0]!r} then, {changed[key][1]!r} now" for key in DATA_KEYS if key in changed]
    names = [name for name in ("data_fingerprint", "groups_per_step") if getattr(stored, name) != getattr(now, name)]
    lines = lines or [f"state.json, {n}: {getattr(stored, n)!r:.15} then, {getattr(now, n)!r:.15} now" for n in names]
    if not config.data.allow_changed_data:
        raise InputErrors(
            f"{path}: was trained on other data -> restore it, set another train.output, or set "
            "data.allow_changed_data=true to go on from the same step number in the new order",
            lines,
        )
    logger.warning("allowed by data.allow_changed_data: %s", "; ".join(lines))


def _report(trainer: Trainer) -> None:
    """A run that is done does not fail for want of a picture; of fewer than three steps there is no curve."""
    if trainer.reporter is None or not 3 <= trainer.total_steps == trainer.state.step:
        return
    path = trainer.output / "report.html"
    try:
        plot_runs([path.parent], path)
        logger.info("report: %s", path)
    except Exception as error:
        logger.warning("%s: not written (%s)", path, error or type(error).__name__)


@contextlib.contextmanager
def open_run(config: Config, shape: ModelShape, store: dist.Store, stop: StopRequest) -> Iterator[Trainer]:
    """The run on this process: data, process group (of ``store``), trainer; ended in order when the block is left.

    A run that stopped says why; its exception goes no further.
    """
    for name in {name for name in by_source(config.objective.coefficient) if name and ":" in name}:
        check_user_coefficient(name, with_q=config.data.logprobs is not None)
    files = model_files(config, _resume_point(config, Path(config.train.output) / "checkpoints")).folder
    data = None if config.data.cache else open_groups(config, shape, files)  # Megatron's cache needs the process group
    device, parallel = join(config, store)
    train_groups, valid_groups = data or open_groups(config, shape, files)
    for split in filter(None, (train_groups, valid_groups)):
        if any(asdict(split.limited).values()):
            logger.info("%s data: %s (data.overlong=%s)", split.name, split.limited, config.data.overlong)
    if config.data.verify:
        shards = {shard.prefix: shard for split in filter(None, (train_groups, valid_groups)) for shard in split.shards}
        verify_at_start([*shards.values()], Path(config.train.output) / "verified.json")
    trainer = build_trainer(config, shape, parallel, train_groups, valid_groups, stop)
    layout = f"tp {parallel.tp_size}, pp {parallel.pp_size}, cp {parallel.cp_size}, dp {parallel.dp_size}"
    if parallel.ep_size > 1:
        layout += f", ep {parallel.ep_size}"
    work = f"{len(train_groups)} groups, {trainer.total_steps} steps from {trainer.state.step}"
    logger.info("%s on %s; %s on %d x %s", config.objective.name, work, layout, parallel.world_size, device)
    if len(train_groups) < (wanted := config.data.groups_per_step):
        logger.warning(
            "data.groups_per_step=%d: there are %d groups -> an epoch is one step", wanted, len(train_groups)
        )
    logger.info(
        "a process without progress for %g minutes ends; what each is doing: %s",
        config.train.watchdog_minutes,
        trainer.watchdog.path.with_name("rank-*.txt"),
    )
    try:
        yield trainer
    except TrainingStopped as error:
        if parallel.rank == 0:
            logger.error("%s", error)
    finally:
        trainer.close()
    destroy_parallel()
    _report(trainer)
