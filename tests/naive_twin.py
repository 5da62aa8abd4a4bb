"""The GFT loss and its gradient the slow way: the transformers model, one response at a time, formulas in loops.

Shares no code with the package: advantages, coefficients, normalisers and masks are written out again from the
paper's definitions, the softmax is dense, nothing is packed, padded or cut.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from megatron_gft.shards import Group


@dataclass(frozen=True)
class TwinResult:
    """Loss of a step, sum of |w * c * ce| / D (the scale of its rounding), gradients by Hugging Face name, p of
    every token that is computed, and D."""

    loss: float
    scale: float
    denominator: int
    probabilities: list[float]
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def advantages(rewards: list[float], mode: str, eps: float) -> list[float]:
    """Advantage of each response of one group."""
    if mode == "none":
        return [1.0] * len(rewards)
    if len(rewards) == 1:
        return list(rewards)
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


def weighted_responses(groups: list[Group], objective) -> tuple[list[tuple[Group, int, float]], int]:
    """[(group, response, A * u)] of the selected responses, and D."""
    weighted, tokens, responses, counted_groups = [], 0, 0, 0
    names = ("expert", "teacher", "self")
    for group in groups:
        chosen = [k for k, source in enumerate(group.sources) if names[source] in objective.sources]
        if not chosen:
            continue
        values = advantages([group.rewards[k] for k in chosen], objective.advantage, objective.advantage_eps)
        if objective.zero_variance == "skip" and not any(values):
            continue
        counted_groups += 1
        for k, value in zip(chosen, values, strict=True):
            length = len(group.responses[k])
            tokens += length
            responses += 1
            unit = {"tokens": 1.0, "sequences": 1 / length, "groups": 1 / (len(chosen) * length)}
            weighted.append((group, k, value * unit[objective.normalize]))
    return weighted, {"tokens": tokens, "sequences": responses, "groups": counted_groups}[objective.normalize]


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
    loss = scale = 0.0
    probabilities: list[float] = []
    for group, k, weight in weighted:
        if weight == 0:
            continue
        logprobs = response_logprobs(model, group, k)
        p = logprobs.detach().exp()
        if objective.coefficient == "rectified":
            c = torch.tensor([1.0 if float(value) > objective.tau else float(value) for value in p])
        else:
            c = p if objective.coefficient == "probability" else torch.ones(len(p))
        part = (weight * c.double() * -logprobs).sum() / denominator
        if gradients:
            part.backward()
        loss += part.item()
        scale += (abs(weight) * c.double() * -logprobs.detach()).sum().item() / denominator
        probabilities += p.tolist()
    return TwinResult(loss, scale, denominator, probabilities, checkpoint_gradients(model))


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
