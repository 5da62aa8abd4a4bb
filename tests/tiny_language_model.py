"""A tiny random Llama with a byte-level tokenizer and a chat template, as a Hugging Face folder."""

from pathlib import Path

import torch
from tiny_tokenizers import CHATML, byte_level_folder

from megatron_gft.tokenizer import load_tokenizer


def language_model_folder(folder: Path, seed: int = 0, positions: int = 512, template: str = CHATML) -> Path:
    """Write the model; its weights are large enough that its distributions are far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    byte_level_folder(folder, template=template)
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.4,
        eos_token_id=tokenizer.eos_id,
        bos_token_id=tokenizer.bos_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # ends now and then, as a real model does
        model.lm_head.weight[tokenizer.eos_id] *= 1.7
    model.save_pretrained(folder)
    return folder
