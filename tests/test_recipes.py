"""Every recipe in ``examples/`` loads, is right for its number of GPUs, and fits them; with FP8 too."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from test_planning import lognormal_groups
from test_train_cli import train_command, write_shard
from tiny_models import write_tiny_tokenizer

from megatron_gft.config import load_config
from megatron_gft.hf.mapping import parameter_count
from megatron_gft.hf.shape import read_model_shape
from megatron_gft.planning import FlopModel, plan_step
from megatron_gft.validation import check

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "examples").glob("*/gpus-*.yaml"))
FP8 = "examples/fp8.yaml"

# As the publishers state them (model cards, papers), in billions.
PARAMETERS = {
    "llama3.1-8b": 8.03,
    "llama3.1-70b": 70.55,
    "qwen2.5-math-1.5b": 1.54,
    "qwen2.5-math-7b": 7.62,
    "qwen2.5-7b": 7.62,
    "qwen2.5-72b": 72.71,
    "qwen3-8b": 8.19,
    "qwen3-30b-a3b": 30.53,
}
WORLD_SIZES = {
    "qwen2.5-math-1.5b": [1, 8, 64, 512],
    "qwen2.5-math-7b": [8, 64, 512],
    "qwen2.5-7b": [8, 64, 512],
    "llama3.1-8b": [8, 64, 512],
    "qwen3-8b": [8, 64, 512],
    "llama3.1-70b": [64, 512],
    "qwen2.5-72b": [64, 512],
    "qwen3-30b-a3b": [64, 512],
}


def world_size(recipe: str) -> int:
    """Number of GPUs in a recipe's name."""
    return int(re.search(r"gpus-(\d+)\.yaml", recipe).group(1))


@pytest.fixture(scope="module", autouse=True)
def at_the_root(request):
    """Recipes name their model by a path from the root of the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


def test_recipes_are_those_that_were_promised():
    found: dict[str, list[int]] = {}
    for recipe in sorted(RECIPES, key=world_size):
        found.setdefault(Path(recipe).parent.name, []).append(world_size(recipe))
    assert found == WORLD_SIZES


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_shape_is_the_published_one(name):
    assert round(parameter_count(read_model_shape(f"examples/{name}")) / 1e9, 2) == PARAMETERS[name]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_loads_and_is_sound(recipe):
    for files in ([recipe], [recipe, FP8]):
        config = load_config(files)
        assert config.model.config == str(Path(recipe).parent)
        check(config, read_model_shape(config.model.config), world_size(recipe), training=False)
    assert config.model.fp8 == "tensorwise"


# Transformer Engine's utils.py, assert_dim_for_fp8_exec (2.9: line 438, 2.14.1: 479), called with what a rank holds
# before the gather of sequence parallelism (module/layernorm_linear.py 2.9: 150, 2.14.1: 159); is_quantizable of the
# quantizer (2.9: tensor/mxfp8_tensor.py 78, float8_blockwise_tensor.py 203); cuBLAS takes what is gathered by 16.
HELD = {"tensorwise": 8, "delayed": 8, "mxfp8": 32, "blockwise": 128}


@pytest.mark.parametrize("recipe", RECIPES)
def test_transformer_engine_takes_every_pack_in_fp8(recipe):
    for kind, held in HELD.items():
        config = load_config([recipe, FP8], [f"model.fp8={kind}"])
        p, (alignment, multiple) = config.parallel, config.row_multiples
        shape = read_model_shape(config.model.config)
        dp = min(world_size(recipe) // (p.tp * p.pp * p.cp), 4)
        lengths = lognormal_groups((150, 0.5, 20, 600), (700, 0.6, 20, 1500), 8 * dp)
        plan = plan_step(
            lengths,
            dp,
            config.data.max_tokens_per_pack,
            packing=config.data.packing,
            flop_model=FlopModel.from_shape(shape),
            packs_multiple_of=p.pp if p.vpp else 1,
            pad_multiple=multiple,
            alignment=alignment,
        )
        rows = {pack.tokens for rank in plan.packs for pack in rank}
        shares = p.tp if p.sequence_parallel else 1
        assert len(rows) > 1 and not any(count % (p.cp * shares * held) or count % (p.cp * 16) for count in rows), kind
        assert shape.hidden_size % held == 0


@pytest.mark.slow  # plans of every recipe; test_plan.py plans some
def test_every_recipe_fits_and_its_readme_says_so():
    """On its own GPUs, with the budget of an H100 80 GB, with FP8 and without."""
    command = [sys.executable, "tools/recipe_tables.py", "--check"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_launch_scripts_run_recipes_of_their_size():
    for script in (ROOT / "launch").glob("gft_*.sh"):
        recipe, gpus = re.search(r'recipe="([^"]+)", gpus=(\d+)', script.read_text()).groups()
        assert recipe in RECIPES and world_size(recipe) == int(gpus)


def test_configs_are_plain_hugging_face_files():
    for path in (ROOT / "examples").glob("*/config.json"):
        config = json.loads(path.read_text())
        assert config["architectures"][0].endswith("ForCausalLM") and config["torch_dtype"] == "bfloat16"


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 503}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
SMALL |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ON_ONE_CPU = ["tp=1", "pp=1", "vpp=null", "cp=1", "ep=1", "etp=null", "sequence_parallel=false"]


@pytest.mark.slow  # a training process for each recipe
@pytest.mark.parametrize("name", WORLD_SIZES)
def test_what_a_recipe_exports_is_what_transformers_loads(name, tmp_path):
    """The recipe's own settings and config.json, with fewer and smaller layers, and weights as they come from the hub.
    Everything that is not in the recipe's folder comes from that of the weights."""
    recipe, weights, run = tmp_path / "recipe", tmp_path / "weights", tmp_path / "run"
    recipe.mkdir()
    config = json.loads((ROOT / "examples" / name / "config.json").read_text())
    config |= {key: value for key, value in SMALL.items() if key in config or key[:4] in ("bos_", "eos_")}
    (recipe / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(recipe))
    model.generation_config.update(do_sample=True, temperature=0.625, top_k=7)
    model.to(torch.bfloat16).save_pretrained(weights)
    write_tiny_tokenizer(weights)

    files = min((ROOT / "examples" / name).glob("gpus-*.yaml"), key=lambda path: world_size(str(path)))
    arguments = [f"model.config={recipe}", f"checkpoint.init_from=hf:{weights}", f"train.output={run}"]
    arguments += [f"parallel.{setting}" for setting in ON_ONE_CPU]
    arguments += ["train.max_steps=1", f"data.train=[{write_shard(tmp_path / 'train', weights)}]"]
    done = train_command(files, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    (export,) = (run / "export").iterdir()
    options = {"trust_remote_code": False, "local_files_only": True}
    exported = transformers.AutoModelForCausalLM.from_pretrained(export, **options)
    assert exported.state_dict().keys() == model.state_dict().keys()
    assert not all(torch.equal(exported.state_dict()[key], value) for key, value in model.state_dict().items())
    assert (exported.generation_config.temperature, exported.generation_config.top_k) == (0.625, 7)
    tokenizers = [transformers.AutoTokenizer.from_pretrained(folder, **options) for folder in (weights, export)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template and tokenizers[0].chat_template == tokenizers[1].chat_template

    tokenizers[0].add_tokens(["<more>"])
    tokenizers[0].save_pretrained(tmp_path / "other")
    foreign = write_shard(tmp_path / "foreign", tmp_path / "other")
    refused = train_command(files, *arguments, f"data.train=[{foreign}]", f"train.output={tmp_path / 'refused'}")
    assert refused.returncode == 2 and "made with tokenizer" in refused.stderr
