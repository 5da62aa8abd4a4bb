"""Tokenizers: exact boundary, one BOS, stable fingerprints, special tokens as text."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, byte_level_folder, metaspace_folder, sentencepiece_file

from megatron_gft.errors import InputError
from megatron_gft.tokenizer import ChatTemplateError, load_tokenizer, tokenizer_fingerprint, vocabulary_fingerprint

IDENTITY = {"normalization_rule_name": "identity"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte_level": byte_level_folder(folder / "byte_level"),
        "metaspace": metaspace_folder(folder / "metaspace"),
        "sentencepiece": sentencepiece_file(folder / "sp" / "identity.model", **IDENTITY),
        "sentencepiece_unigram": sentencepiece_file(folder / "sp" / "unigram.model", model_type="unigram", **IDENTITY),
    }


@pytest.fixture(scope="module")
def tokenizers(files):
    return {name: load_tokenizer(path, "none") for name, path in files.items()}


NAMES = ["byte_level", "metaspace", "sentencepiece", "sentencepiece_unigram"]
texts = st.text(st.sampled_from("Question 12:ab\n <>/s|é漢😀#"), max_size=20)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(prompt=texts.filter(bool), response=texts)
def test_prompt_and_response_decode_to_the_joined_text(tokenizers, name, prompt, response):
    if name == "metaspace":  # its training left out characters that only byte pieces could spell
        keep = str.maketrans("", "", "é漢😀<>/|")
        prompt, response = "Q" + prompt.translate(keep), response.translate(keep)  # " x" and "x" are one text to it
    tokenizer = tokenizers[name]
    rendered = tokenizer.render_prompt(prompt)
    ids = tokenizer.encode(rendered)
    answer = tokenizer.encode_response(response)
    assert tokenizer.decode(ids + answer) == rendered + response
    assert tokenizer.decode_response(ids, answer) == response


@pytest.mark.parametrize("name", NAMES)
def test_response_has_no_dummy_prefix(tokenizers, name):
    tokenizer = tokenizers[name]
    assert tokenizer.decode(tokenizer.encode("answer ") + tokenizer.encode_response("is")) == "answer is"
    assert tokenizer.encode_responses(["is", "step by"]) == [
        tokenizer.encode_response("is"),
        tokenizer.encode_response("step by"),
    ]


def test_prompt_is_tokenized_as_the_model_does(tokenizers, files):
    import sentencepiece
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(files["metaspace"])
    rendered = tokenizers["metaspace"].render_prompt("Question 1")
    assert tokenizers["metaspace"].encode(rendered) == own("Question 1")["input_ids"]
    model = sentencepiece.SentencePieceProcessor(model_file=str(files["sentencepiece"]))
    rendered = tokenizers["sentencepiece"].render_prompt("Question 1")
    assert tokenizers["sentencepiece"].encode(rendered) == [model.bos_id(), *model.encode("Question 1")]


@pytest.mark.parametrize("name,bos", [("byte_level", 0), ("metaspace", 1), ("sentencepiece", 1)])
def test_bos_appears_once(tokenizers, files, name, bos):
    tokenizer = tokenizers[name]
    once = tokenizer.render_prompt("Question 1")
    assert tokenizer.encode(once).count(tokenizer.bos_id) == bos
    assert tokenizer.render_prompt(once) == once
    assert load_tokenizer(files[name], "none", add_bos=False).encode("Question 1").count(tokenizer.bos_id) == 0


def test_chat_template_renders_messages_and_one_user_turn(files, tmp_path):
    tokenizer = load_tokenizer(files["byte_level"])
    rendered = tokenizer.render_prompt("hi")
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render_prompt([{"role": "user", "content": "hi"}]) == rendered
    ids = tokenizer.encode(rendered)
    assert ids[0] == 1 and ids.count(2) == 1 and tokenizer.decode(ids) == rendered
    template = tmp_path / "t.jinja"
    template.write_text("{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]")
    model = load_tokenizer(files["sentencepiece"], str(template))
    assert model.render_prompt("hi") == "<s>[INST] hi [/INST]"
    assert model.encode(model.render_prompt("hi")).count(model.bos_id) == 1
    assert model.chat_template_fingerprint not in ("none", tokenizer.chat_template_fingerprint)


def test_template_that_prints_the_date_gives_the_same_text_every_day(files, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}")
    assert load_tokenizer(files["byte_level"], str(template)).render_prompt("hi") == "26 Jul 2024 hi"


def test_template_failures_are_input_errors(files, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception('no system turn') }}")
    with pytest.raises(ChatTemplateError, match="no system turn"):
        load_tokenizer(files["byte_level"], str(template)).render_prompt("hi")
    with pytest.raises(ChatTemplateError, match="list of messages"):
        load_tokenizer(files["sentencepiece"], "none").render_prompt([{"role": "user", "content": "hi"}])


def test_spelled_special_tokens_are_text_in_a_response(tokenizers):
    for name, spelled in (("byte_level", "<|im_end|>"), ("sentencepiece", "</s>")):
        tokenizer = tokenizers[name]
        assert tokenizer.special_pattern.search(f"so {spelled}")
        as_text = tokenizer.encode_response(f"so {spelled}")
        assert tokenizer.eos_id not in as_text and tokenizer.decode(as_text).endswith(spelled)
        assert tokenizer.encode_response(f"so {spelled}", parse_special=True)[-1] == tokenizer.eos_id
    assert not tokenizers["byte_level"].special_pattern.search("nothing <|special")


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def with_markers(request, tmp_path_factory):
    """A SentencePiece model whose role markers are user-defined pieces, as Gemma's; <b> and @@ are words to it."""
    path = tmp_path_factory.mktemp("markers") / f"{request.param}.model"
    pieces = ["<start_of_turn>", "[INST]", "<b>", "@@"]
    size = {"bpe": 400, "unigram": 300}[request.param]
    sentencepiece_file(path, model_type=request.param, vocab_size=size, user_defined_symbols=pieces, **IDENTITY)
    return load_tokenizer(path, "none")


def test_user_defined_role_markers_are_special(with_markers):
    import sentencepiece

    text = "a <start_of_turn>model [INST]<b>b @@"
    assert [with_markers.special_pattern.findall(text), with_markers.special_ids] == [
        ["<start_of_turn>", "[INST]"],
        {1, 2, 3, 4},
    ]
    prompt = with_markers.encode(with_markers.render_prompt("Q"))
    as_text, parsed = (with_markers.encode_response(text, special) for special in (False, True))
    assert with_markers.special_ids.isdisjoint(as_text) and {5, 6} < set(as_text)
    assert [i for i in parsed if i in with_markers.special_ids] == [3, 4]
    for ids in (as_text, parsed):
        assert with_markers.decode_response(prompt, ids) == text
    model = sentencepiece.SentencePieceProcessor(model_file=with_markers.path)
    rendered = with_markers.render_prompt("<start_of_turn>user [INST] x")  # a prompt is tokenized as the model does
    assert with_markers.encode(rendered) == [1, *model.encode("<start_of_turn>user [INST] x")]


def test_named_chat_templates_without_a_default_are_refused(files, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(files["byte_level"])
    tokenizer.chat_template = {"rag": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"names \(rag, tool_use\) and none is the default.*set --chat-template FILE"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, "none").template is None
    tokenizer.chat_template = {"rag": "{{ 1 }}", "default": CHATML}
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).template.text == CHATML


def _changed(files, folder, **parts):
    """The byte-level tokenizer with other parts of its pipeline."""
    shutil.copytree(files["byte_level"], folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return folder


def test_a_tokenizer_may_alter_text_but_not_at_the_boundary(files, tmp_path):
    lower = load_tokenizer(_changed(files, tmp_path / "lower", normalizer={"type": "Lowercase"}), "none")
    assert lower.decode(lower.encode("What IS")) == "what is"
    ends = {"type": "Replace", "pattern": {"Regex": "$"}, "content": "!"}  # every text gets an end of its own
    with pytest.raises(InputError, match="the boundary between them would not be exact"):
        load_tokenizer(_changed(files, tmp_path / "ends", normalizer=ends), "none")


def test_fingerprint_survives_saving_and_changes_with_the_vocabulary(files, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(files["byte_level"])
    tokenizer.padding_side, tokenizer.chat_template = "left", "{{ 1 }}"
    tokenizer.save_pretrained(tmp_path / "again")
    fingerprint = tokenizer_fingerprint(files["byte_level"])
    assert tokenizer_fingerprint(tmp_path / "again") == fingerprint
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(tmp_path / "more")
    assert tokenizer_fingerprint(tmp_path / "more") != fingerprint
    assert len({tokenizer_fingerprint(path) for path in files.values()}) == len(files)
    assert load_tokenizer(tmp_path / "more", "none").vocab_size == load_tokenizer(files["byte_level"]).vocab_size + 1


def test_vocabulary_fingerprint_depends_on_every_part():
    vocab = {"a": 0, "b": 1}
    prints = {
        vocabulary_fingerprint(*parts)
        for parts in ((vocab, 1, 0), (vocab, 0, 0), (vocab, 1, None), ({"a": 1, "b": 0}, 1, 0))
    }
    assert len(prints) == 4
    assert vocabulary_fingerprint({"b": 1, "a": 0}, 1, 0) in prints


def test_added_tokens_count_in_vocab_size(files):
    tokenizer = load_tokenizer(files["byte_level"])
    highest = max(json.loads((files["byte_level"] / "tokenizer.json").read_text())["model"]["vocab"].values())
    assert tokenizer.vocab_size == highest + 1


def test_what_cannot_be_used_is_refused(files, tmp_path):
    with pytest.raises(InputError, match="no chat template -> set --chat-template FILE or none"):
        load_tokenizer(files["sentencepiece"])
    with pytest.raises(InputError, match="no chat template"):
        load_tokenizer(files["metaspace"])
    with pytest.raises(InputError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "bad.model").write_bytes(b"\x00nonsense")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model", "none")
    with pytest.raises(InputError, match="no tokenizer can be loaded"):
        (tmp_path / "empty").mkdir()
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(InputError, match="absent.jinja: cannot be read"):
        load_tokenizer(files["byte_level"], str(tmp_path / "absent.jinja"))
    assert load_tokenizer(files["byte_level"]).template.text == CHATML
