"""The output layer inside Megatron: its DDP, distributed optimizer, tied embeddings and sequence parallelism."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import run_ranks

from megatron_gft.gft import token_coefficient
from megatron_gft.model import GFTOutputLayer
from megatron_gft.objectives import HeadSettings
from megatron_gft.parallel import initialize_parallel, seed_everything

HIDDEN, VOCAB, PADDED, ROWS, TAU = 16, 61, 64, 24, 0.2


class TinyModel(LanguageModule):
    """Embedding, one pointwise layer and the output layer, put together by Megatron's own rules for tying."""

    def __init__(self, config: TransformerConfig, tied: bool):
        super().__init__(config)
        self.pre_process = self.post_process = True
        self.share_embeddings_and_output_weights = tied
        self.embedding = LanguageModelEmbedding(config, PADDED, 64, position_embedding_type="none")
        self.output_layer = ColumnParallelLinear(
            HIDDEN,
            PADDED,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_weight_param_allocation=tied,
        )
        self.output_layer.__class__ = GFTOutputLayer
        self.setup_embeddings_and_output_layer()

    def forward(self, tokens: torch.Tensor, **loss: torch.Tensor | HeadSettings):
        hidden = torch.tanh(self.embedding(input_ids=tokens[None], position_ids=None))
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden, weight=weight, **loss)


def build(tp: int = 1, sp: bool = False, tied: bool = False, seed: int = 0, **config) -> TinyModel:
    seed_everything(seed, initialize_parallel(tp=tp))  # whole matrices are drawn, so every layout starts the same
    return TinyModel(
        TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=4,
            hidden_dropout=0.0,
            tensor_model_parallel_size=tp,
            sequence_parallel=sp,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            calculate_per_token_loss=True,
            init_method=lambda weight: torch.nn.init.normal_(weight, std=0.7),
            **config,
        ),
        tied,
    )


def make_batch(seed: int, num_rows: int = 20) -> dict[str, torch.Tensor]:
    """One pack; row 3 predicts several first tokens, as the last prompt row does in a shared-prefix pack."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(4, ROWS, (num_rows,), generator=g)
    rows[:5] = 3
    return {
        "tokens": torch.randint(0, VOCAB, (ROWS,), generator=g),
        "loss_rows": rows,
        "labels": torch.randint(0, VOCAB, (num_rows,), generator=g),
        "token_weights": torch.randn(num_rows, generator=g),
    }


def head_settings(**changes) -> HeadSettings:
    return HeadSettings(**({"tau": TAU, "vocab_size": VOCAB, "chunk_tokens": 7} | changes))


def gather_tp(parameter: torch.Tensor, model: TinyModel) -> torch.Tensor:
    group = model.output_layer.tp_group
    parts = [torch.empty_like(parameter) for _ in range(group.size())]
    dist.all_gather(parts, parameter.detach().contiguous(), group=group)
    return torch.cat(parts)


def whole_weights(model: TinyModel) -> dict[str, torch.Tensor]:
    return {name: gather_tp(p, model).double() for name, p in model.named_parameters()}


def train(tp: int, sp: bool, tied: bool, ddp: dict, settings: HeadSettings, *, zero_out: bool = True) -> dict:
    """Two optimizer steps of two microbatches per data rank: losses and how far each weight moved.

    Adam with a large epsilon: the update is close to linear in the gradient, so errors are not amplified.
    """
    model = build(tp, sp, tied)
    if not zero_out:
        model.embedding.word_embeddings.weight.zero_out_wgrad = False
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(**ddp), model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=0.1,
            adam_eps=1.0,
            weight_decay=0.0,
            clip_grad=0.0,
            use_distributed_optimizer=ddp.get("use_distributed_optimizer", False),
            overlap_param_gather=ddp.get("overlap_param_gather", False),
        ),
        [wrapped],
    )
    start, losses, scales, data_rank = whole_weights(model), [], [], dist.get_rank() // tp
    for step in range(2):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        for micro in range(2):
            with wrapped.no_sync() if micro == 0 else contextlib.nullcontext():
                batch = make_batch(100 * step + 10 * data_rank + micro)
                loss, logprobs, _ = wrapped(**batch, settings=settings)
                loss.backward()
            losses.append(loss.item())
            scales.append((batch["token_weights"] * logprobs).abs().sum().item())
        wrapped.finish_grad_sync()
        optimizer.step()
    if ddp.get("overlap_param_gather"):
        wrapped.start_param_sync(force_sync=True)
    parallel_state.destroy_model_parallel()
    return {"losses": losses, "scales": scales, "moved": {n: w - start[n] for n, w in whole_weights(model).items()}}


def fused_and_unfused(tp: int, sp: bool, tied: bool, ddp: dict, zero_out: bool = True) -> tuple[dict, dict]:
    unfused = train(tp, sp, tied, ddp, head_settings(fused=False))
    return train(tp, sp, tied, ddp, head_settings(fused=True), zero_out=zero_out), unfused


def movement_error(fused: dict, unfused: dict) -> float:
    """Largest relative difference of the movement of any weight."""
    return max(error(fused["moved"][name], moved) for name, moved in unfused["moved"].items())


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


DDP = {
    "plain": {"overlap_grad_reduce": False},
    "overlap": {"overlap_grad_reduce": True},
    "distributed": {"overlap_grad_reduce": True, "use_distributed_optimizer": True},
    "gather": {"overlap_grad_reduce": True, "use_distributed_optimizer": True, "overlap_param_gather": True},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ddp", list(DDP))
@pytest.mark.parametrize(("world_size", "tp", "sp"), [(2, 1, False), (2, 2, False), (2, 2, True), (4, 2, True)])
def test_training_with_the_fused_head_equals_megatrons_path(world_size, tp, sp, ddp, tied):
    for fused, unfused in run_ranks(world_size, fused_and_unfused, tp, sp, tied, DDP[ddp]):
        for got, want, scale in zip(fused["losses"], unfused["losses"], unfused["scales"], strict=True):
            assert abs(got - want) <= 1e-6 * scale
        assert movement_error(fused, unfused) <= 5e-6


def test_placeholder_that_is_not_added_loses_the_embeddings_gradient():
    """Negative control: without ``zero_out_wgrad`` the test above must see the tied embedding's gradient missing."""
    ((fused, unfused), _) = run_ranks(2, fused_and_unfused, 1, False, True, DDP["overlap"], False)
    assert movement_error(fused, unfused) > 0.1


def dense(start: dict[str, torch.Tensor], tied: bool, batches: list[dict], coefficient: str = "rectified") -> dict:
    """Loss and gradients of the whole model in float64 on one rank, summed over ``batches``."""
    weights = {name: value.clone().requires_grad_() for name, value in start.items()}
    embedding = weights["embedding.word_embeddings.weight"]
    output = embedding if tied else weights["output_layer.weight"]
    loss, logprobs = torch.zeros((), dtype=torch.float64), []
    for batch in batches:
        hidden = torch.tanh(embedding[batch["tokens"]])[batch["loss_rows"]]
        lp = torch.log_softmax(hidden @ output[:VOCAB].t(), dim=1).gather(1, batch["labels"][:, None])[:, 0]
        loss = loss - (batch["token_weights"] * token_coefficient(lp, TAU, coefficient) * lp).sum()
        logprobs.append(lp.detach())
    loss.backward()
    return {"loss": loss.item(), "logprobs": torch.cat(logprobs), "gradients": {n: w.grad for n, w in weights.items()}}


def first_gradients(tp: int, sp: bool, tied: bool, settings: HeadSettings, batches: list[dict]) -> dict:
    """One forward and backward under DDP: one batch for each data rank."""
    model = build(tp, sp, tied)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(overlap_grad_reduce=True), model)
    wrapped.zero_grad_buffer()
    loss, logprobs, entropy = wrapped(**batches[dist.get_rank() // tp], settings=settings)
    loss.backward()
    wrapped.finish_grad_sync()
    return {
        "loss": loss.item(),
        "logprobs": logprobs,
        "entropy": entropy,
        "start": whole_weights(model),
        "gradients": {name: gather_tp(p.main_grad, model) for name, p in model.named_parameters()},
    }


LAYOUTS = [(1, 1, False), (2, 1, False), (2, 2, False), (2, 2, True), (4, 4, True), (4, 2, True)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("world_size", "tp", "sp"), LAYOUTS)
def test_gradients_equal_a_dense_model(world_size, tp, sp, tied, fused):
    """Odd vocabulary (61 of 64 rows), repeated rows, prompt rows without loss, both branches at tau."""
    batches = [make_batch(seed) for seed in range(world_size // tp)]
    results = run_ranks(world_size, first_gradients, tp, sp, tied, head_settings(fused=fused), batches)
    want = dense(results[0]["start"], tied, batches)
    p = want["logprobs"].exp()
    assert (p > TAU).any() and (p < TAU).any() and ((p - TAU).abs() > 1e-4).all()
    scale = sum(b["token_weights"].abs().sum() for b in batches).item()
    assert abs(sum(r["loss"] for r in results[::tp]) - want["loss"]) <= 1e-6 * scale * want["logprobs"].abs().max()
    for name, gradient in want["gradients"].items():
        for result in results:
            assert error(result["gradients"][name], gradient) <= (5e-6 if fused else 1e-6), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_data_rank_without_loss_rows_takes_part(fused, tied):
    """Fewer packs than ranks: the hooks fire, the collectives match, and it adds nothing."""
    batches = [make_batch(0), make_batch(1, num_rows=0)]
    results = run_ranks(4, first_gradients, 2, True, tied, head_settings(fused=fused, entropy=True), batches)
    want = dense(results[0]["start"], tied, batches[:1])
    assert results[2]["loss"] == 0 and len(results[2]["logprobs"]) == len(results[2]["entropy"]) == 0
    for name, gradient in want["gradients"].items():
        assert error(results[3]["gradients"][name], gradient) <= 5e-6


@pytest.mark.parametrize("coefficient", ["rectified", "none", "probability"])
@pytest.mark.parametrize(("world_size", "tp"), [(1, 1), (2, 2)])
def test_both_paths_report_the_same_metrics(world_size, tp, coefficient):
    settings = [head_settings(fused=fused, entropy=True, coefficient=coefficient) for fused in (True, False)]
    fused, unfused = (run_ranks(world_size, first_gradients, tp, False, False, s, [make_batch(2)])[0] for s in settings)
    want = dense(fused["start"], False, [make_batch(2)], coefficient)
    for result in (fused, unfused):
        torch.testing.assert_close(result["logprobs"].double(), want["logprobs"], rtol=0, atol=1e-5)
        assert error(result["gradients"]["output_layer.weight"], want["gradients"]["output_layer.weight"]) <= 5e-6
    torch.testing.assert_close(fused["entropy"], unfused["entropy"], rtol=0, atol=1e-5)


def plain_logits() -> tuple:
    model = build()
    hidden, layer = torch.randn(5, 1, HIDDEN), model.output_layer
    logits, bias = layer(hidden)
    return logits.detach(), bias, (hidden @ layer.weight.t()).detach()


def test_without_loss_rows_it_is_megatrons_layer():
    [(logits, bias, expected)] = run_ranks(1, plain_logits)
    assert bias is None and torch.equal(logits, expected)


def wrapped_model() -> DistributedDataParallel:
    model = build()
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    wrapped.zero_grad_buffer()
    return wrapped


def forward_in_eval_mode() -> tuple[float, float]:
    wrapped = wrapped_model()
    wrapped.eval()
    loss, _, _ = wrapped(**make_batch(0), settings=head_settings())
    gradient = wrapped.module.output_layer.weight.main_grad
    before = gradient.abs().sum().item()
    loss.backward()
    return before, gradient.abs().sum().item()


def test_forward_in_eval_mode_leaves_main_grad_alone():
    """Only training may write gradients in forward; a backward still delivers them, through autograd."""
    ((before, after),) = run_ranks(1, forward_in_eval_mode)
    assert before == 0 and after > 0


def with_loss_scales(*scales: float) -> list[dict[str, torch.Tensor]]:
    results = []
    for scale in scales:
        wrapped = wrapped_model()
        wrapped.config.grad_scale_func = lambda loss, scale=scale: loss * scale
        loss, _, _ = wrapped(**make_batch(0), settings=head_settings())
        wrapped.config.grad_scale_func(loss).backward()
        parallel_state.destroy_model_parallel()
        results.append({name: p.main_grad / scale for name, p in wrapped.module.named_parameters()})
    return results


def test_megatrons_loss_scale_is_honoured():
    ((plain, scaled),) = run_ranks(1, with_loss_scales, 1.0, 2.0**16)
    for name, gradient in plain.items():
        assert torch.equal(scaled[name], gradient)  # a power of two changes no bits
