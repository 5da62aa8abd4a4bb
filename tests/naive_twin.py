"""The GFT loss and its gradient the slow way: the transformers model, one response at a time, formulas in loops.

Shares no code with the package: advantages, coefficients, normalisers and masks are written out again from the
paper's definitions, the softmax is dense, nothing is packed, padded or cut.
"""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from megatron_gft.shards import Group


@dataclass(frozen=True)
class TwinResult:
    """Surrogate loss of a step, sum of |w * c * ce| / D (the scale of its rounding), gradients by Hugging Face name, p
    of every token that is computed, D, and the loss as published: its gradient is that of the surrogate."""

    loss: float
    scale: float
    denominator: int
    probabilities: list[float]
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    published: float = 0.0


def advantages(rewards: list[float], mode: str, eps: float, shift: float = 0.0) -> list[float]:
    """Advantage of each response of one group."""
    if mode == "none":
        return [1.0] * len(rewards)
    if mode == "reward" or len(rewards) == 1:
        return list(rewards)
    return [value - shift for value in _relative(rewards, mode, eps)]


def _relative(rewards: list[float], mode: str, eps: float) -> list[float]:
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    if mode == "std":
        return [(r - mean) / (statistics.stdev(rewards) + eps) for r in rewards]
    if mode == "population":
        return [(r - mean) / (statistics.pstdev(rewards) + eps) for r in rewards]
    if mode == "mean_only":
        return [r - mean for r in rewards]
    assert mode == "rloo"
    return [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]


NAMES = ("expert", "teacher", "self")


def of(value, source: str):
    """The setting of a source."""
    return value[source] if isinstance(value, dict) else value


def group_advantages(group: Group, chosen: list[int], objective) -> dict[int, float]:
    """A of the chosen responses; each kind of advantage has statistics of its own."""
    found = {}
    for mode in {of(objective.advantage, NAMES[group.sources[k]]) for k in chosen}:
        mine = [k for k in chosen if of(objective.advantage, NAMES[group.sources[k]]) == mode]
        rewards = [float(group.rewards[k]) for k in mine]
        values = advantages(rewards, mode, objective.advantage_eps, objective.baseline_shift)
        for k, value in zip(mine, values, strict=True):
            if mode == "reward" and value == 0:
                continue  # as if it were not there
            if value < 0 and objective.negative_scale == 0:
                continue
            found[k] = value * objective.negative_scale if value < 0 else value
    return found


def weighted_responses(groups: list[Group], objective) -> tuple[list[tuple[Group, int, float, float]], int]:
    """[(group, response, A * u, beta * u)] of the selected responses, and D."""
    losses = [[name] for name in objective.sources] if objective.per_source_denominator else [objective.sources]
    parts = [_weighted(groups, objective, sources) for sources in losses]
    total = sum(count for _, count in parts)
    mixed = []
    for weighted, count in parts:
        for group, k, a, b in weighted:
            factor = (total / count if objective.per_source_denominator else 1.0) * of(
                {"expert": 1.0, "teacher": 1.0, "self": 1.0} | objective.source_weights, NAMES[group.sources[k]]
            )
            if objective.mu_peak is not None:
                factor *= objective.mu_peak if group.sources[k] == 0 else 1 - objective.mu_peak
            mixed.append((group, k, a * factor, b * factor))
    return mixed, total


def _weighted(groups: list[Group], objective, sources) -> tuple[list[tuple[Group, int, float, float]], int]:
    """Of one loss with one denominator."""
    weighted, tokens, responses, counted_groups = [], 0, 0, 0
    for group in groups:
        trained = [k for k, source in enumerate(group.sources) if NAMES[source] in objective.sources]
        ended = [k for k in trained if group.ended is None or group.ended[k]]
        if objective.cut_off == "drop":
            trained = ended
        values = group_advantages(group, trained, objective)
        anchors = {k: objective.beta for k in trained if NAMES[group.sources[k]] in objective.kl_sources}
        if objective.beta:
            values = {k: 0.0 for k in anchors} | values
        if objective.cut_off == "no_loss":
            values = {k: value for k, value in values.items() if k in ended}
        values = {k: value for k, value in values.items() if NAMES[group.sources[k]] in sources}
        alive = any(values.values()) or any(anchors.get(k) for k in values)
        if not values or (objective.zero_variance == "skip" and not alive):
            continue
        counted_groups += 1
        for k, value in sorted(values.items()):
            length = len(group.responses[k])
            tokens += length
            responses += 1
            u = {"tokens": 1.0, "sequences": 1 / length, "groups": 1 / (len(values) * length)}[objective.normalize]
            weighted.append((group, k, value * u, anchors.get(k, 0.0) * u))
    return weighted, {"tokens": tokens, "sequences": responses, "groups": counted_groups}[objective.normalize]


def published_loss(objective, source: str, logprob: torch.Tensor, log_q: float, weight: float) -> torch.Tensor:
    """One token's loss as its paper writes it; ``weight`` is A * u. Where q is unknown, the ratio is p / sg(p)."""
    name, p = of(objective.coefficient, source), logprob.exp()
    if name == "none":
        return -weight * logprob
    if name == "probability":
        return -weight * p.detach() * logprob
    if name == "rectified":
        return -weight * (1.0 if p.item() > objective.tau else p.detach()) * logprob
    if name == "uncertainty":
        return -weight * (p * (1 - p)).detach() * logprob
    if name == "shaped":
        return -weight * p / (p + objective.shaping)
    ratio = p / p.detach() if math.isnan(log_q) else p / math.exp(log_q)
    if name == "ratio":
        return -weight * ratio
    if name == "truncated_ratio":
        return -weight * ratio.detach().clamp(max=1 + objective.eps_high) * logprob
    assert name == "clipped_ratio"
    gain = torch.minimum(ratio * weight, ratio.clamp(1 - objective.eps_low, 1 + objective.eps_high) * weight)
    if objective.ratio_dual_clip is not None and weight < 0:
        gain = torch.maximum(gain, torch.tensor(objective.ratio_dual_clip * weight, dtype=gain.dtype))
    return -gain


def anchor_loss(logprob: torch.Tensor, reference: float, weight: float) -> torch.Tensor:
    """k3 estimate of the KL divergence from the reference; ``weight`` is beta * u."""
    if math.isnan(reference):
        return logprob * 0
    ratio = math.exp(reference) / logprob.exp()
    return weight * (ratio - torch.log(ratio) - 1)


def response_logprobs(model, group: Group, k: int) -> torch.Tensor:
    """log p of each token of a response after its prompt, by a softmax over the whole vocabulary; float64 [R]."""
    prompt, response = (torch.as_tensor(tokens) for tokens in (group.prompt, group.responses[k]))
    logits = model(torch.cat((prompt, response))[None]).logits[0].double()
    predictions = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return predictions[torch.arange(len(response)), response]


def load_twin(folder: Path, dtype: torch.dtype = torch.float64):
    """The transformers model in double precision; plain loops instead of kernels."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).train()


def twin_step(model, groups: list[Group], objective, *, gradients: bool = True) -> TwinResult:
    """One step over ``groups`` with the settings of an ``ObjectiveConfig``; D = 0 gives loss 0 and no gradient."""
    model.zero_grad()
    weighted, denominator = weighted_responses(groups, objective)
    loss = scale = published = 0.0
    probabilities: list[float] = []
    for group, k, weight, anchor in weighted:
        if weight == 0 and anchor == 0:
            continue
        logprobs = response_logprobs(model, group, k)
        rows = logprobs.detach().requires_grad_()
        sampled = group.logprobs[k].tolist() if group.logprobs is not None else [math.nan] * len(rows)
        source = NAMES[group.sources[k]]
        part = sum(
            published_loss(objective, source, row, log_q, weight) for row, log_q in zip(rows, sampled, strict=True)
        )
        (slopes,) = torch.autograd.grad(part, rows) if weight else (torch.zeros_like(rows),)
        loss += (slopes * rows.detach()).sum().item() / denominator  # -w c log p, where the slope is -w c
        scale += (slopes * rows.detach()).abs().sum().item() / denominator
        if anchor:
            reference = group.reference[k].tolist()
            kl = sum(anchor_loss(row, other, anchor) for row, other in zip(rows, reference, strict=True))
            slopes = slopes + torch.autograd.grad(kl, rows)[0]
            part = part + kl
        published += float(part) / denominator
        if gradients:
            (slopes / denominator * logprobs).sum().backward()
        probabilities += logprobs.detach().exp().tolist()
    return TwinResult(loss, scale, denominator, probabilities, checkpoint_gradients(model), published)


def checkpoint_gradients(model) -> dict[str, torch.Tensor]:
    """Gradients under the names of the checkpoint, where each expert's three matrices are tensors of their own."""
    found = {}
    mixtral = model.config.model_type == "mixtral"
    block, gate, up, down = ("block_sparse_moe", "w1", "w3", "w2") if mixtral else ("mlp", *_PROJECTIONS)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        grad = parameter.grad.clone()
        if ".experts." not in name:
            found[name.replace(".mlp.gate.", f".{block}.gate.")] = grad
            continue
        experts = f"{name.split('.mlp.')[0]}.{block}.experts"
        for e, matrix in enumerate(grad):
            parts = (
                {down: matrix} if name.endswith("down_proj") else dict(zip((gate, up), matrix.chunk(2), strict=True))
            )
            found |= {f"{experts}.{e}.{part}.weight": value for part, value in parts.items()}
    return found


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
