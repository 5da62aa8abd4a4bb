"""What a model wrote, from what a back end says that it wrote: text and token ids that belong together.

Servers cut texts at stop strings, leave special tokens out, take thoughts and tool calls out of the text, hold half a
character back; their token ids do not know of that. Ids are believed when they spell the text, and thoughts go back
where they stood: the text that is judged is the text that is trained.
"""

from megatron_gft.chat_template import ChatTemplateError, Prompt, TemplateOptions
from megatron_gft.errors import InputError
from megatron_gft.sampling.settings import Sample
from megatron_gft.scoring.thoughts import TAGS, opened_by, tags_named_in, thought_tags
from megatron_gft.tokenizer import Tokenizer

MISMATCH = "token ids that do not spell the text, left out"
PUT_BACK = "thoughts that the server kept apart, put back"
BY_TAGS = f"{PUT_BACK} between their tags, with the white space that it left"


def written_sample(
    key: str,
    finish_reason: str,
    tokenizer: Tokenizer | None,
    text: str,
    ids: list[int] | None,
    logprobs: list[float] | None,
    note: str | None = None,
) -> Sample:
    """A sample whose ids are its text, or that has none. A text that lacks nothing but special tokens gets them back
    where they are tags of thoughts."""
    if ids is None or tokenizer is None:
        return Sample(key, text, finish_reason, note=note)
    spelled = tokenizer.written(ids)
    if spelled != text and any(tag in spelled and tag not in text for pair in TAGS.values() for tag in pair):
        text = spelled if tokenizer.special_pattern.sub("", spelled) == text else text
    if spelled == text:
        return Sample(key, text, finish_reason, ids, logprobs, note=note)
    return Sample(key, text, finish_reason, note=note or MISMATCH)


def server_tags(name: str | None, tokenizer: Tokenizer | None) -> tuple[str, str] | None:
    """How a model writes thoughts: as the user says, else as its template or its vocabulary does; None: unknown."""
    if name is not None:
        return thought_tags(name)
    if tokenizer is None:
        return None
    families = tags_named_in("" if tokenizer.own_template is None else tokenizer.own_template.text)
    if not families:  # a base model's, whose template knows nothing of thoughts
        tokens = {pair: family for family, pair in TAGS.items() if all(len(tokenizer.encode(tag)) == 1 for tag in pair)}
        families = list(tokens.values())
    return thought_tags(families[0]) if len(families) == 1 else None


def prompt_opens(tokenizer: Tokenizer | None, prompt: Prompt, options: TemplateOptions, by_server: bool) -> str:
    """The tag of thoughts that the rendered prompt ends with; "" when there is none, or it is not known here."""
    if tokenizer is None or (by_server and tokenizer.own_template is None):
        return ""
    renderer = tokenizer.own_template.render if by_server and tokenizer.own_template else tokenizer.render_prompt
    try:
        tags = opened_by(renderer(prompt, options))
    except ChatTemplateError:
        return ""  # a server's own template seems to be another
    return tags[0] if tags else ""


def with_thoughts(thoughts: str, answer: str, spelled: str | None, tags: tuple[str, str] | None, opened: bool) -> str:
    """The text as the model wrote it, of the two parts that a server's reasoning parser made of it; InputError when it
    cannot be known.

    Args:
        spelled: text of the sampled ids, where they are known; it wins when it holds both parts.
        tags: opening and closing; ``opened``: the prompt ends with the opening one.
    """
    if spelled is not None and thoughts.strip() in spelled and spelled.rstrip().endswith(answer.strip()):
        return spelled
    if tags is None:
        raise InputError(
            "the server keeps thoughts apart (reasoning_content), and how the model writes them is not known -> start "
            "it without a reasoning parser, or set tokenizer=DIR of the model, or thoughts=qwen|deepseek|...|none"
        )
    return ("" if opened else tags[0]) + thoughts + (tags[1] + answer if answer else "")
