"""Tiny tokenizers trained on the spot: byte-level BPE (Qwen, Llama 3), Metaspace BPE (Llama 2) and SentencePiece."""

from __future__ import annotations

from pathlib import Path

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
# Thoughts as DeepSeek-R1's template opens them, and as Qwen3's leaves them out on request.
THINKING = TURN + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
SWITCHED = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    + TURN
    + "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    f"Question {i}: what is {i} plus {i * 7}? Let us think step by step. The answer is {i * 8}.\n#### {i * 8}"
    for i in range(200)
]


def _save(backend, folder: Path, bos: str | None, eos: str, template: str | None) -> Path:
    from transformers import PreTrainedTokenizerFast

    names = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def byte_level_folder(
    folder: Path, vocab_size: int = 400, template: str | None = CHATML, eos: str = SPECIALS[2], more: tuple = ()
) -> Path:
    """Byte-level BPE with ChatML specials and ``more``; BOS <|endoftext|>, which it does not add by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIALS, *more], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _save(backend, folder, SPECIALS[0], eos, template)


def metaspace_folder(folder: Path, template: str | None = None) -> Path:
    """Metaspace BPE with byte fallback that adds a dummy prefix and BOS, as Llama 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=specials[:3], show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _save(backend, folder, "<s>", "</s>", template)


def sentencepiece_file(path: Path, **options) -> Path:
    """SentencePiece BPE with its default dummy prefix; BOS <s> = 1, EOS </s> = 2."""
    import sentencepiece

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.replace("\n", " ") for text in CORPUS),
            model_writer=file,
            minloglevel=2,
            **({"vocab_size": 400, "model_type": "bpe", "byte_fallback": True} | options),
        )
    return path
