"""Tokenizers with an exact boundary between prompt and response.

Prompt and response are tokenized apart, so no token ever spans the boundary, and their ids together decode to the
joined text: a response is encoded as a continuation, without the dummy prefix ("▁") that many tokenizers put before the
first word. A rendered prompt spells its special tokens (BOS included) and is encoded with nothing added, so BOS appears
once. In a response a spelled special token is ordinary text unless ``parse_special`` asks otherwise.
"""

import hashlib
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_gft.chat_template import (
    NO_TEMPLATE,
    PLAIN,
    ChatTemplate,
    ChatTemplateError,
    Prompt,
    TemplateOptions,
    load_template,
)
from megatron_gft.errors import InputError
from megatron_gft.folders import from_folder
from megatron_gft.reading import absence
from megatron_gft.sentencepiece_model import load_sentencepiece

_CACHED_WORDS = 200_000  # 10 to 15 % faster than 10000 on English text; some 20 MB
_CLASS_PROBES = ("What is 12 + 345?", "  two  spaces", "a\n\n b's\t<c>", "\u00e9\u6f22 1.5e-3, don't!", "HELLO World_9")
_BOUNDARY_PROBES = (("question: 1", "2 two"), ("a b", " c"), ("x", "y"), ("Answer:\n", "\n\nz"))


class Tokenizer(ABC):
    """What the data pipeline needs of a tokenizer.

    Attributes:
        vocab_size: largest token id + 1, added tokens included; an embedding needs at least so many rows.
        eos_id: id that ends a response.
        bos_id: id of the beginning-of-sequence token, or None.
        special_ids: ids that never stand for ordinary text.
        special_pattern: matches the spelling of any special token in a text.
        fingerprint: sha256 of what ids mean (vocabulary, EOS, BOS); the same after ``save_pretrained``, on another
            machine or library version, and for a SentencePiece model and its Hugging Face twin.
        template: renders prompts; None: they are raw text. ``own_template``: the folder's, as its server would use it.
        chat_template_fingerprint: sha256 of the chat template, or ``"none"``, or ``"none+bos"`` with BOS before raw
            text: what renders a prompt.
    """

    def __init__(
        self,
        path: str | Path,
        vocab: dict[str, int],
        specials: dict[str, int],
        names: dict[str, str],
        *,
        template: ChatTemplate | None,
        own_template: ChatTemplate | None = None,
        adds_bos: bool,
    ):
        """
        Args:
            specials: special tokens that the vocabulary has, by their spelling.
            names: spelling of ``eos_token`` and ``bos_token``, and of what else the template may name.
        """
        self.path, self.vocab_size = str(path), max(vocab.values()) + 1
        eos_id, self.bos_id = (vocab.get(names.get(name, "")) for name in ("eos_token", "bos_token"))
        if eos_id is None:
            raise InputError(f"{path}: the tokenizer has no EOS token -> a response must end; set eos_token")
        self.eos_id: int = eos_id
        self.fingerprint = vocabulary_fingerprint(vocab, eos_id, self.bos_id)
        self.special_ids, self.special_pattern = frozenset(specials.values()), _any_of(specials)
        self.template, self.own_template = template, own_template
        self._bos = [self.bos_id] if adds_bos and self.bos_id is not None else []  # before raw text
        self._raw_prefix = names["bos_token"] if self._bos else ""
        raw = f"{NO_TEMPLATE}+bos" if self._raw_prefix else NO_TEMPLATE
        self.chat_template_fingerprint = raw if template is None else template.fingerprint

    def _check_boundary(self, unknown_id: int | None) -> None:
        """What the tokenizer itself makes of a text (lower case, spaces for line breaks) is what its model knows; where
        the text is cut must not matter."""
        for prompt, response in _BOUNDARY_PROBES:
            whole = self.encode(prompt + response)
            if unknown_id in whole:
                continue  # no text can be told from another then, boundary or not
            expected, joined = map(self.decode, (whole, self.encode(prompt) + self.encode_response(response)))
            if joined != expected:
                raise InputError(
                    f"{self.path}: prompt {prompt!r} and response {response!r} decode to {joined!r}, not {expected!r} "
                    "-> the boundary between them would not be exact; use another tokenizer"
                )

    def render_prompt(self, prompt: Prompt, options: TemplateOptions = PLAIN) -> str:
        """Text of a prompt as the model sees it, special tokens spelled: one user turn, or messages; with template
        ``none`` raw text, preceded by the BOS token when the tokenizer adds one by itself.

        Raises:
            ChatTemplateError: the template raises on these messages, or there is none for messages or options.
        """
        if self.template is not None:
            return self.template.render(prompt, options)
        if not isinstance(prompt, str):
            raise ChatTemplateError("the prompt is a list of messages, but the chat template is 'none'")
        if options != PLAIN:
            raise ChatTemplateError(f"{', '.join(options.record())} would be lost, as the chat template is 'none'")
        return prompt if prompt.startswith(self._raw_prefix) else self._raw_prefix + prompt

    def problems(self, options: TemplateOptions = PLAIN) -> Iterator[tuple[str, str]]:
        """Kind (see ``groups.problems``) and detail of what is wrong with the tokenizer or its template as such."""
        if self.template is not None:
            yield from self.template.problems(self.special_pattern, self.decode([self.eos_id]), options)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered prompts; special tokens are recognised, nothing is added.

        After the BOS of raw text the text still begins, as it does for the model's own tokenizer: a dummy prefix is
        due. After special tokens of a chat template it is not.
        """
        prefix = self._raw_prefix
        parts = self._encode_prompts([text.removeprefix(prefix) for text in texts])
        return [self._bos + ids if text.startswith(prefix) else ids for text, ids in zip(texts, parts, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens spelled."""
        ids = list(map(int, ids))
        if self._bos and ids[:1] == self._bos:
            return self._raw_prefix + self._decode(ids[1:])
        return self._decode(ids)

    @abstractmethod
    def _encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that begin a sequence; special tokens are recognised."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Text of token ids that begin a sequence, special tokens spelled."""

    @abstractmethod
    def encode_responses(self, texts: Sequence[str], parse_special: bool = False) -> list[list[int]]:
        """Token ids of texts that continue a prompt, without EOS; ``parse_special``: recognise special tokens that the
        text spells, which otherwise are ordinary text."""

    def encode(self, text: str) -> list[int]:
        """Token ids of one rendered prompt."""
        return self.encode_batch([text])[0]

    def encode_response(self, text: str, parse_special: bool = False) -> list[int]:
        """Token ids of one response, without EOS."""
        return self.encode_responses([text], parse_special)[0]

    def decode_response(self, prompt: Sequence[int], response: Sequence[int]) -> str:
        """Text of a response after its prompt (alone, its leading space could be lost)."""
        return self.decode([*prompt, *response])[len(self.decode(prompt)) :]

    def written(self, ids: Sequence[int]) -> str:
        """Text of a response after a prompt, special tokens spelled but for a final EOS."""
        body = ids[:-1] if ids and ids[-1] == self.eos_id else ids
        return self.decode_response(self._encode_prompts(["a"])[0], body)


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face folder with a fast tokenizer."""

    def __init__(self, path: str | Path, hf: Any, chat_template: str | None = None, add_bos: bool | None = None):
        vocab = hf.backend_tokenizer.get_vocab(with_added_tokens=True)
        specials = {token.content: id_ for id_, token in hf.added_tokens_decoder.items() if token.special}
        specials |= zip(hf.all_special_tokens, hf.all_special_ids, strict=True)
        template = load_template(chat_template, path, hf.chat_template, hf.special_tokens_map)
        own = ChatTemplate(hf.chat_template, hf.special_tokens_map) if isinstance(hf.chat_template, str) else None
        if add_bos is None:
            add_bos = hf("a")["input_ids"][:1] == [hf.bos_token_id]
        super().__init__(
            path, vocab, specials, hf.special_tokens_map, template=template, own_template=own, adds_bos=add_bos
        )
        pipeline = json.loads(hf.backend_tokenizer.to_str())
        unknown = pipeline["model"].get("unk_token")
        unknown_id = pipeline["model"].get("unk_id") if unknown is None else vocab.get(unknown)
        # Nothing is added to what is encoded here; a post-processor would only go over offsets that nobody reads.
        pipeline["padding"] = pipeline["truncation"] = pipeline["post_processor"] = None
        prompt_pipeline = json.dumps(pipeline)
        pipeline |= {part: _without_dummy_prefix(pipeline[part]) for part in ("normalizer", "pre_tokenizer")}
        response_pipeline = json.dumps(pipeline)
        self._prompt_backend, self._text_backend = _backend(prompt_pipeline), _backend(response_pipeline)
        self._special_backend = self._prompt_backend  # byte-level tokenizers: there was nothing to take away
        if response_pipeline != prompt_pipeline:
            self._special_backend = _backend(response_pipeline)
        self._text_backend.encode_special_tokens = True  # spelled special tokens become ordinary text
        self._check_boundary(unknown_id)

    def problems(self, options: TemplateOptions = PLAIN) -> Iterator[tuple[str, str]]:
        yield from super().problems(options)
        file = Path(self.path) / "tokenizer.json"
        if not file.is_file():
            return
        trained = _backend(file.read_text(encoding="utf-8"))
        for text in _CLASS_PROBES:  # a class of transformers may build a pipeline of its own from the same vocabulary
            own, ids = self._encode_prompts([text])[0], trained.encode(text, add_special_tokens=False).ids
            if own != ids:
                why = f"{text!r} is {len(ids)} tokens by tokenizer.json and {len(own)} by the class that transformers"
                remedy = "in tokenizer_config.json set tokenizer_class to PreTrainedTokenizerFast"
                yield "tokenizer_class", f"{why} chose -> {remedy}"
                return

    def _encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._prompt_backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_responses(self, texts: Sequence[str], parse_special: bool = False) -> list[list[int]]:
        backend = self._special_backend if parse_special else self._text_backend
        return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        return self._prompt_backend.decode(ids, skip_special_tokens=False)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model``; it has no chat template of its own."""

    def __init__(self, path: str | Path, chat_template: str | None = None, add_bos: bool | None = None):
        markers, (self._prompt_model, self._response_model, self._text_model) = load_sentencepiece(path)
        model = self._prompt_model
        vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
        self._controls = {piece: i for piece, i in vocab.items() if model.is_control(i)}
        self._control_ids = frozenset(self._controls.values())
        self._control_pattern = re.compile(f"({_any_of(self._controls).pattern})")  # a group: split keeps what it finds
        specials = self._controls | {piece: vocab[piece] for piece in markers}
        named = {"eos_token": model.eos_id(), "bos_token": model.bos_id()}
        names = {name: model.id_to_piece(id_) for name, id_ in named.items() if id_ >= 0}
        template = load_template(chat_template, path, None, names)
        # Language models with a SentencePiece vocabulary and a BOS are trained with it (Llama 2, Mistral, Gemma).
        super().__init__(path, vocab, specials, names, template=template, adds_bos=add_bos is not False)
        self._check_boundary(model.unk_id())

    def _encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode_with_specials(text, self._prompt_model) for text in texts]

    def encode_responses(self, texts: Sequence[str], parse_special: bool = False) -> list[list[int]]:
        if parse_special:
            return [self._encode_with_specials(text, self._response_model) for text in texts]
        return self._text_model.encode(list(texts), num_threads=1)

    def _encode_with_specials(self, text: str, first_model: Any) -> list[int]:
        """Cut at spelled control tokens, which SentencePiece takes for text; only the first part begins a text."""
        ids: list[int] = []
        model = first_model
        for part in self._control_pattern.split(text):
            if part in self._controls:
                ids.append(self._controls[part])
            elif part:
                ids += model.encode(part)
                model = self._response_model
        return ids

    def _decode(self, ids: list[int]) -> str:
        text: list[str] = []
        model = self._prompt_model  # drops the dummy prefix of the first piece of text
        for is_control, run in itertools.groupby(ids, self._control_ids.__contains__):
            if is_control:
                text += map(model.id_to_piece, run)
            else:
                text.append(model.decode(list(run)))
                model = self._response_model
        return "".join(text)


def load_tokenizer(
    path: str | Path, chat_template: str | None = None, add_bos: bool | None = None, trust_remote_code: bool = False
) -> Tokenizer:
    """Load a tokenizer from local files.

    Args:
        path: Hugging Face folder, or SentencePiece ``.model`` file.
        chat_template: file with a Jinja chat template; ``"none"`` for raw text; None for the folder's own template.
        add_bos: with template ``none``: put BOS before a prompt; None does what the model expects (Hugging Face: what
            its tokenizer does; SentencePiece: yes when there is a BOS).
        trust_remote_code: run Python code of the folder.

    Raises:
        InputError: not a tokenizer, no EOS, no chat template given or known, or where a text is cut into prompt
            and response changes what it decodes to. What the tokenizer does to any text (lower case, NFKC) is its own.
    """
    if Path(path).is_dir():
        from transformers import AutoTokenizer

        problem, remedy = "no tokenizer can be loaded", "give a folder with tokenizer.json and a right config.json"
        loaded = from_folder(AutoTokenizer, path, problem, remedy, trust_remote_code)
        if not loaded.is_fast:
            raise InputError(f"{path}: the tokenizer has no fast form -> save it with tokenizer.json")
        return HuggingFaceTokenizer(path, loaded, chat_template, add_bos)
    if not Path(path).is_file():
        raise InputError(f"{path}: no such tokenizer (folder or SentencePiece .model): {absence(path)}")
    return SentencePieceTokenizer(path, chat_template, add_bos)


def tokenizer_fingerprint(path: str | Path) -> str:
    """:attr:`Tokenizer.fingerprint` of a tokenizer on disk. Raises as :func:`load_tokenizer`."""
    return load_tokenizer(path, NO_TEMPLATE).fingerprint


def has_tokenizer(path: str | Path) -> bool:
    """Whether there are tokenizer files at ``path`` (a folder, or a SentencePiece model)."""
    path = Path(path)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return (path.suffix == ".model" and path.is_file()) or any((path / name).is_file() for name in names)


def vocabulary_fingerprint(vocab: dict[str, int], eos_id: int, bos_id: int | None) -> str:
    """Hex sha256 of (id, token) pairs in id order, then EOS and BOS."""
    pairs = sorted((id_, token) for token, id_ in vocab.items())
    content = json.dumps([pairs, eos_id, bos_id], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def _backend(pipeline: str) -> Any:
    """A fast tokenizer from its JSON form, with room for more words in its cache (10000 by default)."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE, Unigram

    backend = Backend.from_str(pipeline)
    if isinstance(backend.model, BPE | Unigram):
        backend.model._resize_cache(_CACHED_WORDS)
    return backend


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Matches each of the words, the longest of those that begin at one place."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")


def _without_dummy_prefix(part: Any) -> Any:
    """Pipeline of a fast tokenizer that adds nothing before a text (JSON form of the ``tokenizers`` library)."""
    if isinstance(part, list):
        return [item for item in map(_without_dummy_prefix, part) if item is not None]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    changed = {name: _without_dummy_prefix(value) if isinstance(value, list) else value for name, value in part.items()}
    if "add_prefix_space" in changed:
        changed["add_prefix_space"] = False
    if "prepend_scheme" in changed:
        changed["prepend_scheme"] = "never"
    return changed
