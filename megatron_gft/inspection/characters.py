"""Group files without a tokenizer: every character is a token."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_gft.chat_template import PLAIN, Prompt, TemplateOptions
from megatron_gft.groups import GroupRecord
from megatron_gft.groups.messages import message_text
from megatron_gft.groups.problems import DROP, KEEP, KINDS, Found
from megatron_gft.preprocess.encode import ChunkEncoder
from megatron_gft.tokenizer import Tokenizer

# Everything is looked at, nothing stops: what cannot be used is left out and counted.
LENIENT = {name: KEEP if KEEP in kind.choices else DROP for name, kind in KINDS.items()}


class CharacterTokenizer(Tokenizer):
    """Stands in when no tokenizer is given: one token a character."""

    def __init__(self) -> None:
        self.path, self.vocab_size, self.eos_id, self.bos_id = "", 0x110002, 0x110001, None
        self.special_ids, self.special_pattern = frozenset(), re.compile(r"(?!)")
        self._bos, self._raw_prefix, self.template, self.chat_template_fingerprint = [], "", None, ""

    def render_prompt(self, prompt: Prompt, options: TemplateOptions = PLAIN) -> str:
        return prompt if isinstance(prompt, str) else "\n".join(map(message_text, prompt))

    def encode_responses(self, texts: Sequence[str], parse_special: bool = False) -> list[list[int]]:
        return [list(map(ord, text)) for text in texts]

    _encode_prompts = encode_responses

    def _decode(self, ids: list[int]) -> str:
        return "".join(chr(i) for i in ids if i != self.eos_id)


class CharacterEncoder(ChunkEncoder):
    """Counts characters also where a file has token ids: without their tokenizer they mean nothing."""

    def __init__(self) -> None:
        super().__init__(CharacterTokenizer(), LENIENT)

    def _check_rendering(self, *_: object) -> str:
        return KEEP

    def _problems_of_ids(self, *_: object) -> Iterator[tuple[str, str]]:
        return iter(())  # they come from here

    def _prepare(self, record: GroupRecord, found: Found, waiting: Any) -> str | None:
        for response in record.responses:
            if response.token_ids is not None:
                # No text is a lone EOS, or a cut-off piece of a character.
                alone = 0xFFFD if response.finish_reason == "length" else self.tokenizer.eos_id
                response.token_ids = list(map(ord, response.text)) or [alone]
                response.logprobs = None
        return super()._prepare(record, found, waiting)
