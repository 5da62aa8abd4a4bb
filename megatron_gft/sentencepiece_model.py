"""A SentencePiece model as prompts, responses and texts with spelled markers need it."""

import re
from pathlib import Path
from typing import Any

from megatron_gft.errors import InputError

# User-defined pieces of SentencePiece models are role markers (<start_of_turn>, [INST]), which text must not forge, but
# also what people write: HTML, as in Gemma's vocabulary, and thoughts.
_MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_WRITTEN_TAG = re.compile(
    r"</?(a|b|i|u|s|p|br|hr|em|strong|sub|sup|code|pre|blockquote|h[1-6]|ul|ol|li|div|span|img|think"
    r"|table|caption|thead|tbody|tfoot|tr|th|td)>"
)


def load_sentencepiece(path: str | Path) -> tuple[list[str], tuple[Any, Any, Any]]:
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
    defined = [piece for piece in model.pieces if piece.type == kinds.USER_DEFINED]
    markers = [p for p in defined if _MARKER.fullmatch(p.piece) and not _WRITTEN_TAG.fullmatch(p.piece)]
    for piece in markers:
        piece.type = kinds.CONTROL  # which SentencePiece never finds in a text
    text = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString()) if markers else continues
    return [piece.piece for piece in markers], (begins, continues, text)
