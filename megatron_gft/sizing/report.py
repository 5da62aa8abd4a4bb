"""A plan as text for people."""

from megatron_gft.hf.mapping import parameter_count
from megatron_gft.sizing.fit import GIB, Plan


def format_plan(plan: Plan) -> str:
    """Several lines: layout, a row a stage, packs of a step, expected time, verdict and what to do."""
    p = plan.config.parallel
    layout = f"tp {p.tp}, pp {p.pp}" + (f" x {p.vpp} chunks" if p.vpp else "") + f", cp {p.cp}, dp {plan.dp}"
    if p.ep > 1:
        layout += f", ep {p.ep}, etp {p.etp or p.tp}"
    device = plan.device
    lines = [
        f"{plan.shape.architecture}, {parameter_count(plan.shape) / 1e9:.2f} billion parameters, on "
        f"{plan.world_size} x {device.name}: {layout}, recompute {plan.config.model.recompute}, "
        f"packs of {plan.config.data.max_tokens_per_pack} tokens",
        "",
        "memory per rank in GiB (weights, gradients and optimizer exact, the rest estimated)",
        *_memory_table(plan),
        f"  budget {device.budget_bytes / GIB:.1f} = {device.memory_gib:g} usable - {device.reserve_gib:g} reserve "
        "(CUDA context, NCCL, fragmentation)",
        "",
        *_steps(plan),
        *(f"note: {note}" for note in plan.notes),
        f"verdict: {plan.verdict} ({plan.peak_bytes / GIB:.1f} of {device.budget_bytes / GIB:.1f} GiB on the fullest)",
        *_suggestion(plan),
    ]
    return "\n".join(lines)


def _memory_table(plan: Plan) -> list[str]:
    heading = ["stage", "parameters", "weights", "gradients", "optimizer", "activations", "working", "fp8", "total"]
    rows = [heading]
    for stage in plan.stages:
        exact, estimate = stage.exact, stage.estimate
        parts = [exact.weights, exact.gradients, exact.optimizer, estimate.saved, estimate.working]
        parts += [estimate.fp8_copies, stage.total]
        row = [str(stage.stage), f"{exact.parameters:,}", *(f"{part / GIB:.2f}" for part in parts)]
        if len(rows) > 1 and rows[-1][1:] == row[1:]:
            rows[-1] = [f"{rows[-1][0].split('-')[0]}-{stage.stage}", *row[1:]]
        else:
            rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(heading))]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _steps(plan: Plan) -> list[str]:
    steps, time = plan.steps, plan.time
    if steps is None or time is None:
        return []
    origin = "assumed groups, no data.train" if steps.assumed else "of the shards, exact for the sampled steps"
    hidden = "the rest overlaps" if plan.config.optimizer.overlap_grad_reduce else "not overlapped"
    return [
        f"steps ({origin}; {steps.sampled_steps} of {steps.steps_per_epoch} planned)",
        f"  {steps.groups:,} groups, {steps.steps_per_epoch:,} steps per epoch, {steps.packs_per_rank:.1f} packs per "
        "rank and step",
        f"  {steps.tokens:,.0f} tokens per step ({steps.loss_tokens:,.0f} with loss, {steps.padding_share:.1%} "
        f"padding), {steps.flops / 1e15:,.6g} PFLOP",
        f"  fill {steps.fill:.1%}, balance {steps.balance:.1%}, {steps.dead_groups:.1f} groups per step without signal",
        "time (estimate; a model or step too small to fill the devices takes longer)",
        f"  {time.seconds:.4g} s per step = {time.compute_seconds:.4g} s at {time.efficiency:.0%} of "
        f"{plan.device.peak_tflops:g} TFLOP/s (stages {time.stage_balance:.1%} even) + "
        f"{time.tensor_parallel_seconds:.4g} s tensor parallel + bubble {time.bubble:.1%}",
        f"  + {time.gradient_sync_seconds:.4g} s gradients ({hidden}) + {time.save_seconds:.4g} s saves",
        f"  MFU {time.mfu:.1%}, {time.tokens_per_second_per_device:,.0f} tokens/s per device, "
        f"{time.epoch_hours:.4g} h per epoch",
        "",
    ]


def _suggestion(plan: Plan) -> list[str]:
    if plan.fits:
        return []
    if plan.suggestion is None:
        return ["no layout of this model that fits was found -> shorter packs, or a larger device"]
    s = plan.suggestion
    where = "here" if s.world_size == plan.world_size else f"on {s.world_size} devices"
    return [f"nearest that fits {where} ({s.peak_bytes / GIB:.1f} GiB): {' '.join(s.overrides) or 'the same layout'}"]
