"""Tokenizers with an exact boundary between prompt and response.

Two kinds of files: a Hugging Face folder (``tokenizer.json``) and a SentencePiece ``.model``. Prompt and response are
tokenized apart, so no token ever spans the boundary, and their ids together decode to the joined text: a response is
encoded as a continuation, without the dummy prefix ("▁") that many tokenizers put before the first word.

A prompt is rendered by the chat template with its generation prompt; the rendered text spells its special tokens (BOS
included) and is encoded with nothing added, so BOS appears once. In a response a spelled special token is ordinary
text unless ``parse_special`` asks otherwise.

Nothing here needs megatron; torch comes only with transformers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_gft.errors import InputError

NO_TEMPLATE = "none"
# Templates that print today's date would make other shards tomorrow: they get the date that Llama 3.x falls back to.
_FIXED_DATE = (("%d", "26"), ("%b", "Jul"), ("%B", "July"), ("%m", "07"), ("%Y", "2024"), ("%y", "24"))
_FIXED_DATE_MACRO = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{code}', '{text}')" for code, text in _FIXED_DATE)
    + " }}{% endmacro %}"
)
_CACHED_WORDS = 200_000  # 10 to 15 % faster than 10000 on English text; some 20 MB
# User-defined pieces of SentencePiece models are role markers (<start_of_turn>, [INST]), which text must not forge, but
# also what people write: HTML, as in Gemma's vocabulary, and thoughts.
_MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_WRITTEN_TAG = re.compile(
    r"</?(a|b|i|u|s|p|br|hr|em|strong|sub|sup|code|pre|blockquote|h[1-6]|ul|ol|li|div|span|img|think"
    r"|table|caption|thead|tbody|tfoot|tr|th|td)>"
)
_BOUNDARY_PROBES = (("question: 1", "2 two"), ("a b", " c"), ("x", "y"), ("Answer:\n", "\n\nz"))


class ChatTemplateError(InputError):
    """The chat template cannot render this prompt."""


class Tokenizer(ABC):
    """What the data pipeline needs of a tokenizer.

    Attributes:
        path: where it was loaded from.
        vocab_size: largest token id + 1, added tokens included; an embedding needs at least so many rows.
        eos_id: id that ends a response.
        bos_id: id of the beginning-of-sequence token, or None.
        special_ids: ids that never stand for ordinary text.
        special_pattern: matches the spelling of any special token in a text.
        fingerprint: sha256 of what ids mean (vocabulary, EOS, BOS); the same after ``save_pretrained``, on another
            machine or library version, and for a SentencePiece model and its Hugging Face twin.
        chat_template_fingerprint: sha256 of the chat template, or ``"none"``, or ``"none+bos"`` with BOS before raw
            text: what renders a prompt.
    """

    path: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    special_ids: frozenset[int]
    special_pattern: re.Pattern[str]
    fingerprint: str
    chat_template: str | None
    chat_template_fingerprint: str
    _unknown_id: int | None

    def _describe(self, path: str, vocab: dict[str, int], eos_id: int | None, bos_id: int | None) -> None:
        if eos_id is None or eos_id < 0:
            raise InputError(f"{path}: the tokenizer has no EOS token -> a response must end; set eos_token")
        self.path = path
        self.vocab_size = max(vocab.values()) + 1
        self.eos_id, self.bos_id = eos_id, bos_id
        self.fingerprint = vocabulary_fingerprint(vocab, eos_id, bos_id)

    def _describe_specials(self, specials: dict[str, int]) -> None:
        self.special_ids = frozenset(specials.values())
        self.special_pattern = _any_of(specials)

    def _describe_template(self, template: str | None, bos_token: str | None, adds_bos: bool) -> None:
        self.chat_template = template
        dated = template is not None and "strftime_now" in template
        self._rendered_template = _FIXED_DATE_MACRO + (template or "") if dated else template
        self._raw_prefix = bos_token if adds_bos and bos_token else ""
        raw = f"{NO_TEMPLATE}+bos" if self._raw_prefix else NO_TEMPLATE
        self.chat_template_fingerprint = raw if template is None else hashlib.sha256(template.encode()).hexdigest()

    def _check_boundary(self) -> None:
        """What the tokenizer itself makes of a text (lower case, spaces for line breaks) is what its model knows; where
        the text is cut must not matter."""
        for prompt, response in _BOUNDARY_PROBES:
            whole = self.encode(prompt + response)
            if self._unknown_id in whole:
                continue  # no text can be told from another then, boundary or not
            expected = self.decode(whole)
            joined = self.decode(self.encode(prompt) + self.encode_response(response))
            if joined != expected:
                raise InputError(
                    f"{self.path}: prompt {prompt!r} and response {response!r} decode to {joined!r}, not {expected!r} "
                    "-> the boundary between them would not be exact; use another tokenizer"
                )

    @property
    @abstractmethod
    def _template_renderer(self) -> Any:
        """Hugging Face tokenizer whose ``apply_chat_template`` renders."""

    def render_prompt(self, prompt: str | list[dict[str, Any]]) -> str:
        """Text of a prompt as the model sees it, special tokens spelled.

        Args:
            prompt: one user turn, or messages ``{"role", "content"}``. With template ``none``: raw text, preceded by
                the BOS token when the tokenizer adds one by itself.

        Raises:
            ChatTemplateError: the template raises on these messages, or there is none for messages.
        """
        if self.chat_template is None:
            if not isinstance(prompt, str):
                raise ChatTemplateError("the prompt is a list of messages, but the chat template is 'none'")
            return prompt if prompt.startswith(self._raw_prefix) else self._raw_prefix + prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            return self._template_renderer.apply_chat_template(
                messages,
                chat_template=self._rendered_template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # a template is a program of the user's; it may raise anything
            raise ChatTemplateError(f"{type(error).__name__}: {error}") from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered prompts; special tokens are recognised, nothing is added.

        After the BOS of raw text the text still begins, as it does for the model's own tokenizer: a dummy prefix is
        due. After special tokens of a chat template it is not.
        """
        prefix = self._raw_prefix
        if not prefix:
            return self._encode_prompts(texts)
        parts = self._encode_prompts([text.removeprefix(prefix) for text in texts])
        bos = [] if self.bos_id is None else [self.bos_id]
        return [bos + ids if text.startswith(prefix) else ids for text, ids in zip(texts, parts, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens spelled."""
        ids = list(map(int, ids))
        if self._raw_prefix and ids and ids[0] == self.bos_id:
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
        """Token ids of texts that continue a prompt, without EOS.

        Args:
            texts: responses.
            parse_special: recognise special tokens that the text spells; otherwise they are ordinary text.
        """

    def encode(self, text: str) -> list[int]:
        """Token ids of one rendered prompt."""
        return self.encode_batch([text])[0]

    def encode_response(self, text: str, parse_special: bool = False) -> list[int]:
        """Token ids of one response, without EOS."""
        return self.encode_responses([text], parse_special)[0]

    def decode_response(self, prompt: Sequence[int], response: Sequence[int]) -> str:
        """Text of a response after its prompt (alone, its leading space could be lost)."""
        return self.decode([*prompt, *response])[len(self.decode(prompt)) :]


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face folder with a fast tokenizer."""

    def __init__(self, path: str | Path, chat_template: str | None = None, add_bos: bool | None = None):
        self._hf = _load_hugging_face(path)
        backend = self._hf.backend_tokenizer
        vocab = backend.get_vocab(with_added_tokens=True)
        self._describe(str(path), vocab, self._hf.eos_token_id, self._hf.bos_token_id)
        added = {token.content: id_ for id_, token in self._hf.added_tokens_decoder.items() if token.special}
        named = dict(zip(self._hf.all_special_tokens, self._hf.all_special_ids, strict=True))
        self._describe_specials(added | named)
        template = _template_text(chat_template, path, self._own_template)
        ids = self._hf("a")["input_ids"]
        adds_bos = bool(ids) and ids[0] == self.bos_id if add_bos is None else add_bos
        self._describe_template(template, self._hf.bos_token, adds_bos)

        pipeline = json.loads(backend.to_str())
        unknown = pipeline["model"].get("unk_token")
        self._unknown_id = pipeline["model"].get("unk_id") if unknown is None else vocab.get(unknown)
        # Nothing is added to what is encoded here; a post-processor would only go over offsets that nobody reads.
        pipeline["padding"] = pipeline["truncation"] = pipeline["post_processor"] = None
        prompt_pipeline = json.dumps(pipeline)
        for part in ("normalizer", "pre_tokenizer"):
            pipeline[part] = _without_dummy_prefix(pipeline[part])
        response_pipeline = json.dumps(pipeline)
        self._prompt_backend, self._text_backend = _backend(prompt_pipeline), _backend(response_pipeline)
        same = response_pipeline == prompt_pipeline  # nothing to take away: byte-level tokenizers
        self._special_backend = self._prompt_backend if same else _backend(response_pipeline)
        self._text_backend.encode_special_tokens = True  # spelled special tokens become ordinary text
        self._check_boundary()

    def _own_template(self) -> str | None:
        own = self._hf.chat_template
        if isinstance(own, dict) and "default" not in own:
            raise InputError(
                f"{self.path}: the chat templates have names ({', '.join(sorted(own))}) and none is the default "
                "-> save one in a file and set --chat-template FILE, or none (raw text)"
            )
        return self._hf.get_chat_template() if own else None

    @property
    def _template_renderer(self) -> Any:
        return self._hf

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
        template = _template_text(chat_template, path, lambda: None)
        markers, (self._prompt_model, self._response_model, self._text_model) = _load_sentencepiece(path)
        model = self._prompt_model
        self._unknown_id = model.unk_id()
        vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
        bos_id = model.bos_id() if model.bos_id() >= 0 else None
        self._describe(str(path), vocab, model.eos_id(), bos_id)
        self._controls = {piece: i for piece, i in vocab.items() if model.is_control(i)}
        self._control_ids = frozenset(self._controls.values())
        self._control_pattern = _any_of(self._controls)
        self._describe_specials(self._controls | {piece: vocab[piece] for piece in markers})
        bos_token = None if bos_id is None else model.id_to_piece(bos_id)
        # Language models with a SentencePiece vocabulary and a BOS are trained with it (Llama 2, Mistral, Gemma).
        self._describe_template(template, bos_token, bos_id is not None if add_bos is None else add_bos)
        self._check_boundary()

    @functools.cached_property
    def _template_renderer(self) -> Any:
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE
        from transformers import PreTrainedTokenizerFast

        names = {"eos_token": self.eos_id, "bos_token": self.bos_id}
        tokens = {name: self._prompt_model.id_to_piece(id_) for name, id_ in names.items() if id_ is not None}
        return PreTrainedTokenizerFast(tokenizer_object=Backend(BPE()), **tokens)

    def _encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode_with_specials(text, self._prompt_model) for text in texts]

    def encode_responses(self, texts: Sequence[str], parse_special: bool = False) -> list[list[int]]:
        if parse_special:
            return [self._encode_with_specials(text, self._response_model) for text in texts]
        return self._text_model.encode(list(texts), num_threads=1)

    def _encode_with_specials(self, text: str, first_model: Any) -> list[int]:
        """Cut at spelled control tokens, which SentencePiece takes for text; only the first part begins a text."""
        ids: list[int] = []
        model, position = first_model, 0
        for match in self._control_pattern.finditer(text):
            if match.start() > position:
                ids += model.encode(text[position : match.start()])
                model = self._response_model
            ids.append(self._controls[match.group()])
            position = match.end()
        if position < len(text):
            ids += model.encode(text[position:])
        return ids

    def _decode(self, ids: list[int]) -> str:
        text: list[str] = []
        run: list[int] = []
        model = self._prompt_model  # drops the dummy prefix of the first piece of text
        for id_ in [*ids, -1]:
            if id_ >= 0 and id_ not in self._control_ids:
                run.append(id_)
                continue
            if run:
                text.append(model.decode(run))
                model, run = self._response_model, []
            if id_ >= 0:
                text.append(model.id_to_piece(id_))
        return "".join(text)


def load_tokenizer(path: str | Path, chat_template: str | None = None, add_bos: bool | None = None) -> Tokenizer:
    """Load a tokenizer from local files.

    Args:
        path: Hugging Face folder, or SentencePiece ``.model`` file.
        chat_template: file with a Jinja chat template; ``"none"`` for raw text; None for the folder's own template.
        add_bos: with template ``none``: put BOS before a prompt; None does what the model expects (Hugging Face: what
            its tokenizer does; SentencePiece: yes when there is a BOS).

    Raises:
        InputError: not a tokenizer, no EOS, no chat template given or known, or where a text is cut into prompt
            and response changes what it decodes to. What the tokenizer does to any text (lower case, NFKC) is its own.
    """
    if Path(path).is_dir():
        return HuggingFaceTokenizer(path, chat_template, add_bos)
    if not Path(path).is_file():
        raise InputError(f"{path}: no such tokenizer -> give a Hugging Face folder or a SentencePiece .model file")
    return SentencePieceTokenizer(path, chat_template, add_bos)


def tokenizer_fingerprint(path: str | Path) -> str:
    """:attr:`Tokenizer.fingerprint` of a tokenizer on disk; no chat template is needed.

    Raises:
        InputError: not a tokenizer.
    """
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


def _load_hugging_face(path: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers raises many kinds for unreadable folders
        raise InputError(
            f"{path}: no tokenizer can be loaded ({error}) -> give a folder with tokenizer.json"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(f"{path}: the tokenizer has no fast form -> save it with tokenizer.json")
    return tokenizer


def _backend(pipeline: str) -> Any:
    """A fast tokenizer from its JSON form, with room for more words in its cache (10000 by default)."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE, Unigram

    backend = Backend.from_str(pipeline)
    model = backend.model
    if isinstance(model, BPE | Unigram):
        model._resize_cache(_CACHED_WORDS)
    return backend


def _load_sentencepiece(path: str | Path) -> tuple[list[str], tuple[Any, Any, Any]]:
    """Pieces that mark roles, then the model three times, keeping every space: as it begins a text, as it continues
    one (no dummy prefix), and as it continues one in which spelled markers are ordinary text."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    model = protobuf.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(Path(path).read_bytes())
        if not model.pieces:
            raise ValueError("it has no pieces")
    except Exception as error:  # protobuf's error type differs between its versions
        raise InputError(f"{path}: not a SentencePiece model ({error}) -> give its .model file") from error
    normal = model.normalizer_spec
    normal.remove_extra_whitespaces = False
    begins = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    normal.add_dummy_prefix = False
    continues = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    kinds = model.SentencePiece
    markers = [piece for piece in model.pieces if piece.type == kinds.USER_DEFINED and _is_marker(piece.piece)]
    for piece in markers:
        piece.type = kinds.CONTROL  # which SentencePiece never finds in a text
    text = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString()) if markers else continues
    return [piece.piece for piece in markers], (begins, continues, text)


def _is_marker(piece: str) -> bool:
    return bool(_MARKER.fullmatch(piece)) and not _WRITTEN_TAG.fullmatch(piece)


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Matches each of the words, the longest of those that begin at one place."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")


def _template_text(chat_template: str | None, path: str | Path, own: Any) -> str | None:
    if chat_template == NO_TEMPLATE:
        return None
    if chat_template is not None:
        try:
            return Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{chat_template}: chat template cannot be read ({error})") from error
    template = own()
    if template is None:
        raise InputError(f"{path}: the tokenizer has no chat template -> set --chat-template FILE or none (raw text)")
    return template


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
