"""Every recipe in ``examples/`` loads, is right for its number of GPUs, and fits them; with FP8 too."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_plan import ask

from megatron_gft.config import load_config
from megatron_gft.hf.mapping import parameter_count
from megatron_gft.hf.shape import read_model_shape
from megatron_gft.validation import check

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "examples").glob("*/gpus-*.yaml"))
FP8 = "examples/fp8.yaml"
GIB = 2**30

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


@pytest.mark.slow  # plans of every recipe; test_plan.py plans some
def test_every_recipe_fits_and_its_readme_says_so():
    """``parallel`` on its own GPUs, with the budget of an H100 80 GB; memory of the table in each README."""
    plans = ask(
        plan=[[files, [], world_size(recipe), False] for recipe in RECIPES for files in ([recipe], [recipe, FP8])]
    )
    for recipe, bf16, fp8 in zip(RECIPES, plans["plan"][::2], plans["plan"][1::2], strict=True):
        peaks = []
        for plan in (bf16, fp8):
            assert plan["verdict"] == "fits", (recipe, plan["text"])
            peaks.append(max(stage["estimate"]["total_with_exact"] for stage in plan["stages"]) / GIB)
        readme = (ROOT / recipe).with_name("README.md").read_text()
        row = next(line for line in readme.splitlines() if f"`{Path(recipe).name}`" in line and line.startswith("|"))
        assert row.split(" | ")[2:4] == [f"{peak:.1f}" for peak in peaks], (recipe, row)


def test_launch_scripts_run_recipes_of_their_size():
    for script in (ROOT / "launch").glob("gft_*.sh"):
        recipe, gpus = re.search(r'recipe="([^"]+)", gpus=(\d+)', script.read_text()).groups()
        assert recipe in RECIPES and world_size(recipe) == int(gpus)


def test_configs_are_plain_hugging_face_files():
    for path in (ROOT / "examples").glob("*/config.json"):
        config = json.loads(path.read_text())
        assert config["architectures"][0].endswith("ForCausalLM") and config["torch_dtype"] == "bfloat16"
