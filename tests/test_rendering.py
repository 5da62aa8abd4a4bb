"""What was judged is what is trained: prompts rendered as they were sampled, ids that spell the text, thoughts kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from generation_runs import client, collect, run, write_prompts
from openai_server import FaultyServer, vllm_reply
from tiny_language_model import language_model_folder
from tiny_tokenizers import (
    CHATML,
    GEMMA,
    LLAMA2,
    SPECIALS,
    SWITCHED,
    THINKING,
    TURN,
    byte_level_folder,
    metaspace_folder,
    sentencepiece_file,
)

from megatron_gft.chat_template import PLAIN, ChatTemplateError, TemplateOptions, template_kwargs
from megatron_gft.errors import InputError
from megatron_gft.evaluation.run import EvaluationOptions, evaluate, result_table
from megatron_gft.groups import iter_group_file
from megatron_gft.groups.problems import parse_policies
from megatron_gft.preprocess.run import PreprocessOptions, preprocess
from megatron_gft.sampling.generation import GenerationRun, summary_path
from megatron_gft.sampling.local_model import LocalModel
from megatron_gft.sampling.prompts import PromptSet
from megatron_gft.sampling.sources import load_sources
from megatron_gft.scoring.judging import ScoringOptions
from megatron_gft.scoring.score import score_group_file
from megatron_gft.shards import GroupShard
from megatron_gft.tokenizer import load_tokenizer
from tools import evaluate as evaluate_tool
from tools import generate_groups, preprocess_groups

HARMONY_TOKENS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>")
HARMONY = "<|channel|>analysis<|message|>2+2<|end|><|start|>assistant<|channel|>final<|message|>It is 4."


def preprocessed(path, tokenizer, *policies, **options):
    """The shard of a group file, and the findings."""
    out = path.with_name(f"{path.name}-{len(list(path.parent.iterdir()))}") / "train"
    base = PreprocessOptions([str(path)], str(tokenizer), str(out), policies=parse_policies(policies))
    summary = preprocess(replace(base, **options), progress=False)
    return GroupShard(summary.prefixes[0]), summary.problems


def write_groups(path: Path, *responses, prompt="1+1?", **fields):
    made = [{"text": r, "source": "expert"} if isinstance(r, str) else {"source": "self", **r} for r in responses]
    path.write_text(json.dumps({"id": "a", "prompt": prompt, "responses": made, **fields}) + "\n")
    return path


# --- the whole way ---------------------------------------------------------------------------------------------------

KINDS = {
    "chatml": lambda folder: (byte_level_folder(folder), None),
    "opens_thoughts": lambda folder: (byte_level_folder(folder, template=THINKING), None),
    "gemma": lambda folder: (
        byte_level_folder(folder, template=GEMMA, eos="<end_of_turn>", more=("<start_of_turn>", "<end_of_turn>")),
        None,
    ),
    "llama2": lambda folder: (metaspace_folder(folder, LLAMA2), None),
    "sentencepiece": lambda folder: (sentencepiece_file(folder / "sp.model"), LLAMA2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_shards_hold_the_judged_text_after_the_recorded_prompt(kind, tmp_path):
    """Server (ids, or text that its ids do not spell) -> group file -> scores -> shard."""
    path, template = KINDS[kind](tmp_path / "tokenizer")
    option = {}
    if template is not None:
        (tmp_path / "t.jinja").write_text(template)
        option = {"chat_template": str(tmp_path / "t.jinja")}
    tokenizer = load_tokenizer(path, **option)
    before = "2 and 2.</think>\n" if kind == "opens_thoughts" else ""

    def answer(body):
        text = f"{before}The answer is {body['seed'] % 5}"
        if body["seed"] % 2:
            return 200, _completion(text, token_ids=tokenizer.encode_response(text))
        cut = _completion(text, token_ids=tokenizer.encode_response(text + "\nQ"), stop_reason=None)
        return 200, cut  # at a stop string, by a server that does not say so

    output, rows = (
        tmp_path / "g.jsonl",
        [{"question": f"What is {i} plus {i}?", "answer": f"{2 * i}"} for i in range(3)],
    )
    prompts = _file(tmp_path / "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    source = f"kind=openai api=completions source=self model=m k=6 token_ids=true tokenizer={path}"
    source += "".join(f" {name}={value}" for name, value in option.items())
    with FaultyServer(answer=answer) as server:
        summary = run(prompts, output, f"{source} url={server.url}", "kind=column column=answer")
        sent = [body["prompt"] for body in server.requests]
    left_out = summary.notes["self: token ids that do not spell the text, left out"]
    assert 0 < left_out < 18
    scored = tmp_path / "scored.jsonl"
    score_group_file([output], scored, ScoringOptions("exact"), progress=False)
    policies = ["thoughts_open=keep"] if kind == "opens_thoughts" else []  # experts have none
    shard, problems = preprocessed(scored, path, *policies, **option)
    assert problems.keys() <= {"duplicate_response", "equal_rewards", "expert_wrong", "thoughts_open"}
    for number, (record, _) in enumerate(iter_group_file(scored)):
        group = shard[number]
        assert group.prompt.tolist() in sent
        assert record.responses[0].extra["rendering"]["chat_template"] == tokenizer.chat_template_fingerprint
        for response, ids in zip(record.responses, group.responses, strict=True):
            assert ids.tolist()[-1] == tokenizer.eos_id and response.outcome is not None
            assert tokenizer.written(ids.tolist()) == response.text.replace("\n", _newline(kind))


def _completion(text, finish="stop", **fields):
    return json.dumps({"choices": [{"text": text, "finish_reason": finish} | fields]}).encode()


def _newline(kind):
    return " " if kind == "sentencepiece" else "\n"


def test_a_model_in_this_process_is_trained_on_what_it_wrote(tmp_path):
    model = language_model_folder(tmp_path / "model", template=SWITCHED)
    prompts, output = write_prompts(tmp_path / "p.jsonl", 4), tmp_path / "g.jsonl"
    source = load_sources([f"kind=transformers model={model} k=4 max_tokens=8 device=cpu"])
    off = {"enable_thinking": False}
    summary = GenerationRun(PromptSet([prompts]), output, source, template_kwargs=off).execute(progress=False)
    tokenizer = load_tokenizer(model)
    shard, problems = preprocessed(output, model, "special_tokens=fix")  # follows what was recorded
    assert problems.keys() <= {"truncated", "no_expert", "duplicate_response"}
    kept = 0
    for number, (record, _) in enumerate(iter_group_file(output)):
        prompt = tokenizer.encode(tokenizer.render_prompt(record.prompt, TemplateOptions(kwargs=off)))
        assert shard[number].prompt.tolist() == prompt
        for response, ids in zip(record.responses, shard[number].responses, strict=True):
            assert tokenizer.written(ids.tolist()) == response.text
            kept += response.token_ids is not None
    assert kept == 16 - summary.notes["self: token ids that do not spell the text, left out"]
    for changes, message in (
        ({"template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs was {'enable_thinking': False}"),
        ({"chat_template": str(_file(tmp_path / "other.jinja", CHATML))}, "chat_template was"),
    ):
        with pytest.raises(InputError, match=f"other_rendering: .*{message}"):
            preprocessed(output, model, "special_tokens=fix", **changes)
    teachers = output.read_text().replace('"source": "self"', '"source": "teacher"')
    _, problems = preprocessed(_file(tmp_path / "teacher.jsonl", teachers), model, "special_tokens=fix", **changes)
    assert problems["foreign_rendering"] == {"keep": 16}
    other = byte_level_folder(tmp_path / "other", 390, template=SWITCHED)
    with pytest.raises(InputError, match="other_rendering: tokenizer was"):
        preprocessed(output, other)


def _file(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# --- ids that do not spell the text ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_level_folder(tmp_path_factory.mktemp("tokenizer") / "hf", more=HARMONY_TOKENS)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


# What a server says, and what its ids spell.
OTHERS = {
    "stop string cut": ("It is 4", "It is 4\n####"),
    "another choice": ("It is 4", "It is 5"),
    "stripped": ("It is 4", "\n\nIt is 4"),
    "line ends": ("It is\r\n4", "It is\n4"),
    "special tokens skipped": ("It is 4", "It<|im_start|> is 4"),
    "a tool's call taken out": ("", "<tool_call>{}</tool_call>"),
    "fullwidth": ("It is ４", "It is 4"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_ids_that_spell_something_else_are_left_out_when_sampling_and_when_preprocessing(
    case, tmp_path, folder, tokenizer
):
    text, spelled = OTHERS[case]
    ids = tokenizer.encode_response(spelled, parse_special=True)
    reply = vllm_reply(text, token_ids=[*ids, tokenizer.eos_id])
    with FaultyServer(answer=lambda body: reply) as server:
        (outcome,) = collect(client(server.url, token_ids=True, tokenizer=str(folder)), 1).values()
    assert (outcome.text, outcome.token_ids) == (text, None) and "do not spell" in outcome.note
    said = {"text": text, "token_ids": ids, "logprobs": [-1.0] * len(ids), "tokenizer": tokenizer.fingerprint}
    path = write_groups(tmp_path / "g.jsonl", "gold", said)
    policies = ["special_tokens=keep", "empty_response=drop"]
    shard, problems = preprocessed(path, folder, *policies)
    assert problems["mismatched_token_ids"] == {"keep": 1}
    assert [tokenizer.written(ids.tolist()) for ids in shard[0].responses[1:]] == [text] * bool(text)
    assert shard[0].logprobs is None
    with pytest.raises(InputError, match="response 1 mismatched_token_ids: token_ids spell"):
        preprocessed(path, folder, *policies, "mismatched_token_ids=error")


def test_half_a_character_at_the_end(tmp_path, folder, tokenizer):
    ids = [*tokenizer.encode_response("so "), tokenizer.encode_response("漢")[0]]
    for text, kept in (("so ", None), ("so \ufffd", ids)):
        reply = vllm_reply(text, finish="length", token_ids=ids)
        with FaultyServer(answer=lambda body, reply=reply: reply) as server:
            (outcome,) = collect(client(server.url, token_ids=True, tokenizer=str(folder)), 1).values()
        assert (outcome.text, outcome.token_ids) == (text, kept)


@pytest.mark.parametrize(
    "served, place, finding",
    [
        (CHATML, "top", None),
        (CHATML, "choice", None),
        (TURN, "top", "other_rendering: the server's prompt was tokens"),
        (CHATML, "odd", "unverified_rendering"),
        (CHATML, None, "unverified_rendering"),
    ],
)
def test_a_chat_servers_own_rendering_is_compared(served, place, finding, tmp_path):
    folder = byte_level_folder(tmp_path / "t")
    tokenizer = load_tokenizer(folder)
    theirs = load_tokenizer(folder, str(_file(tmp_path / "theirs.jinja", served)))

    def answer(body):
        ids = theirs.encode(theirs.render_prompt(body["messages"]))
        reply = {"choices": [{"message": {"content": "It is 4."}, "finish_reason": "stop"}]}
        where = reply["choices"][0] if place == "choice" else reply
        where["prompt_token_ids"] = {None: None, "odd": "12"}.get(place, ids)
        return 200, json.dumps(reply).encode()

    output = tmp_path / "g.jsonl"
    with FaultyServer(answer=answer) as server:
        source = f"kind=openai source=self model=m k=2 token_ids=true tokenizer={folder} url={server.url}"
        run(write_prompts(tmp_path / "p.jsonl", 2), output, source)
    policies = ["duplicate_response=keep"]
    if finding and finding.startswith("other"):
        with pytest.raises(InputError, match=finding):
            preprocessed(output, folder, *policies)
        return
    _, problems = preprocessed(output, folder, *policies)
    assert problems.get("unverified_rendering") == ({"keep": 4} if finding else None)
    assert tokenizer.fingerprint == theirs.fingerprint


# --- thoughts --------------------------------------------------------------------------------------------------------

THOUGHT = "<think>\n2+2\n</think>\n\nIt is 4."


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize(
    "parser, written, template",
    [
        ("qwen3", THOUGHT, SWITCHED),
        ("deepseek_r1", THOUGHT.removeprefix("<think>\n"), THINKING),
        ("openai_gptoss", HARMONY, CHATML + "{# <|channel|>final<|message|> #}"),
    ],
)
def test_thoughts_are_the_same_with_and_without_a_reasoning_parser(parser, written, template, with_ids, tmp_path):
    folder = byte_level_folder(tmp_path / "t", template=template, more=HARMONY_TOKENS)
    tokenizer = load_tokenizer(folder)
    ids = [*tokenizer.encode_response(written, parse_special=True), tokenizer.eos_id]
    fields = {"token_ids": ids} if with_ids else {}
    texts = []
    for used in (parser, None):
        reply = vllm_reply(written, used, specials=tokenizer.special_pattern, **fields)
        with FaultyServer(answer=lambda body, reply=reply: reply) as server:
            backend = client(server.url, token_ids=with_ids, tokenizer=str(folder))
            if parser == "openai_gptoss" and not with_ids and used is None:
                with pytest.raises(InputError, match="leaves out special tokens.*skip_special_tokens: false"):
                    collect(backend, 1)
                continue
            (outcome,) = collect(backend, 1).values()
        assert outcome.token_ids == (ids if with_ids else None) and outcome.finish_reason == "stop"
        texts.append(outcome.text)
    assert set(texts) == {written}


def test_thoughts_cut_off_or_without_an_answer(tmp_path):
    folder = byte_level_folder(tmp_path / "t", template=SWITCHED)
    for finish, text, dropped in (("length", "<think>2+", False), ("stop", "", True)):
        reply = vllm_reply("<think>2+", "qwen3", finish=finish)
        with FaultyServer(answer=lambda body, reply=reply: reply) as server:
            (outcome,) = collect(client(server.url, tokenizer=str(folder)), 1).values()
        assert (outcome.text, outcome.without_reasoning) == (text, dropped)


def test_thoughts_of_unknown_spelling_end_the_run_with_the_way_out(folder):
    reply = vllm_reply(THOUGHT, "qwen3")
    with FaultyServer(answer=lambda body: reply) as server:
        for known in ({}, {"tokenizer": str(folder)}):  # whose template and vocabulary have no such tags
            with pytest.raises(InputError, match="how the model writes them is not known -> start it without a reason"):
                collect(client(server.url, **known), 1)
        for name, text in (("qwen", THOUGHT), ("<a>...</a>", "<a>\n2+2\n</a>\n\nIt is 4."), ("none", "\n\nIt is 4.")):
            (outcome,) = collect(client(server.url, thoughts=name), 1).values()
            assert outcome.text == text
        with pytest.raises(InputError, match="several families"):
            client(server.url, thoughts="qwen,mistral")


@pytest.mark.parametrize(
    "response, kind, way",
    [
        ("<think>\nadd</think>\n2", "thoughts_twice", "fix"),
        ("  <think>add</think>2", "thoughts_twice", "drop"),
        ("< Think >\nadd</think>\n2", "thoughts_twice", "fix"),
        ("It is 2.", "thoughts_open", "drop"),
        ({"text": "add and", "finish_reason": "stop"}, "thoughts_open", "drop"),
    ],
)
def test_responses_that_do_not_fit_a_template_that_opens_thoughts(response, kind, way, tmp_path):
    folder = byte_level_folder(tmp_path / "t", template=THINKING)
    cut = {"text": "add and", "finish_reason": "length"}
    path = write_groups(tmp_path / "g.jsonl", response, "add</think>\n2", cut)
    with pytest.raises(InputError, match=f"response 0 {kind}: .*'<think>'.* or set {kind}="):
        preprocessed(path, folder)
    shard, problems = preprocessed(path, folder, f"{kind}={way}")
    assert problems[kind] == {way: 1} and len(shard[0].responses) == (3 if way == "fix" else 2)
    if way == "fix":
        whole = load_tokenizer(folder).decode([*shard[0].prompt, *shard[0].responses[0]])
        assert whole.endswith("<think>\nadd</think>\n2<|im_end|>") and whole.count("<think>") == 1


# --- templates and tokenizers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, message, template, changes",
    [
        ("turn_end", "ends turns with '<\\|im_end\\|>', EOS is '<\\|endoftext\\|>'", CHATML, {"eos": "<|endoftext|>"}),
        ("turn_end", "'<end_of_turn>'.*set eos_token", GEMMA, {"more": ("<start_of_turn>", "<end_of_turn>")}),
        ("turn_end", "'<end_of_turn>'", GEMMA, {}),  # not even a token
        ("bad_template", "byte-order mark", "\ufeff" + CHATML, {}),
        ("bad_template", "ignores add_generation_prompt.*im_start", TURN, {}),
        ("lost_prompt", "of message 0 .user.: '1.1", CHATML.replace("['content']", "['contents']"), {}),
        ("lost_prompt", "message 0", "Question: {% if add_generation_prompt %}Answer:{% endif %}", {}),
    ],
)
def test_templates_that_would_train_something_else(kind, message, template, changes, tmp_path):
    folder = byte_level_folder(tmp_path / "t", template=template, **changes)
    path = write_groups(tmp_path / "g.jsonl", "2")
    with pytest.raises(InputError, match=f"{kind}: .*{message}.* or set {kind}="):
        preprocessed(path, folder)
    _, problems = preprocessed(path, folder, f"{kind}=keep")
    assert problems == {kind: {"keep": 1}}


@pytest.mark.parametrize("kind", ["chatml", "gemma", "llama2"])
def test_sound_templates_have_no_finding(kind, tmp_path):
    path, _ = KINDS[kind](tmp_path / "t")
    assert list(load_tokenizer(path).problems()) == []


def test_a_class_that_ignores_tokenizer_json(tmp_path, folder):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    path = write_groups(tmp_path / "g.jsonl", "2")
    with pytest.raises(InputError, match=r"tokenizer_class: .* is \d+ tokens by tokenizer.json and \d+ by the class"):
        preprocessed(path, copy)
    assert preprocessed(path, folder)[1] == {}


# --- options ---------------------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


@pytest.fixture(scope="module")
def switched(tmp_path_factory):
    return byte_level_folder(tmp_path_factory.mktemp("switched") / "hf", template=SWITCHED)


@pytest.mark.parametrize(
    "fields, options, expected",
    [
        ({}, {}, PLAIN),
        ({"tools": TOOLS}, {}, TemplateOptions(TOOLS)),
        ({"tools": json.dumps(TOOLS)}, {}, TemplateOptions(TOOLS)),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {}, TemplateOptions(None, {"enable_thinking": False})),
        ({"chat_template_kwargs": {"enable_thinking": True}}, {"enable_thinking": False}, PLAIN),
        ({"chat_template_kwargs": {"enable_thinking": None}, "tools": []}, {}, PLAIN),
        ({}, {"enable_thinking": False}, TemplateOptions(None, {"enable_thinking": False})),
        ({"tools": 5}, {}, "tools is '5', no JSON for it"),
        ({"chat_template_kwargs": [1]}, {}, "no JSON for it"),
        ({"chat_template_kwargs": {"enable_thinkng": False}}, {}, "'enable_thinkng'.*did you mean enable_thinking"),
        ({"chat_template_kwargs": {"messages": []}}, {}, "sets messages"),
        ({"tools": [{"name": "<|im_end|>"}]}, {}, "special_tokens: the prompt spells"),
    ],
)
def test_options_of_rows_and_runs_are_rendered(fields, options, expected, tmp_path, switched):
    path = write_groups(tmp_path / "g.jsonl", "2", **fields)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            preprocessed(path, switched, template_kwargs=options)
        return
    shard, _ = preprocessed(path, switched, template_kwargs=options)
    tokenizer = load_tokenizer(switched)
    assert tokenizer.decode(shard[0].prompt) == tokenizer.render_prompt("1+1?", expected)


def test_options_that_a_prompt_would_lose_are_refused(folder):
    tokenizer, raw = load_tokenizer(folder), load_tokenizer(folder, "none")
    tools, kwargs = TemplateOptions(TOOLS), TemplateOptions(None, {"x": 1})
    for own, options in ((tokenizer, tools), (tokenizer, kwargs), (raw, kwargs), (raw, tools)):
        with pytest.raises(ChatTemplateError, match="would be lost"):
            own.render_prompt("hi", options)
    answered = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer"}]
    with pytest.raises(ChatTemplateError, match="ends with a turn of the assistant"):
        tokenizer.render_prompt(answered)


def test_options_reach_a_server_and_the_shard(tmp_path, switched):
    prompts, output = tmp_path / "p.jsonl", tmp_path / "g.jsonl"
    rows = [{"id": "a", "prompt": "q", "tools": TOOLS}, {"id": "b", "prompt": "q"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with FaultyServer() as server:
        extra = "extra_body='{chat_template_kwargs: {enable_thinking: false}}'"
        run(prompts, output, f"kind=openai url={server.url} model=m {extra}")
        sent = sorted(server.requests, key=lambda body: "tools" in body)
    assert [body["chat_template_kwargs"] for body in sent] == [{"enable_thinking": False}] * 2
    assert [(body.get("tools"), body.get("tool_choice")) for body in sent] == [(None, None), (TOOLS, "none")]
    shard, problems = preprocessed(output, switched)
    tokenizer = load_tokenizer(switched)
    for number, tools in enumerate([TOOLS, None]):
        options = TemplateOptions(tools, {"enable_thinking": False})
        assert tokenizer.decode(shard[number].prompt) == tokenizer.render_prompt("q", options)
    assert "other_rendering" not in problems
    with pytest.raises(InputError, match="other_rendering: chat_template_kwargs was"):
        preprocessed(output, switched, template_kwargs={"enable_thinking": True})
    text = output.read_text().replace("weather", "stocks")
    with pytest.raises(InputError, match="other_rendering: tools was"):
        preprocessed(_file(tmp_path / "edited.jsonl", text), switched)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["enable_thinking=false", "effort=high"], {"enable_thinking": False, "effort": "high"}),
        (['{"enable_thinking": false}'], {"enable_thinking": False}),
        (["enable_thinking"], "'enable_thinking': neither JSON nor key=value"),
        (["{oops"], "neither JSON nor"),
    ],
)
def test_template_kwargs_of_the_command_line(words, expected):
    if isinstance(expected, dict):
        assert template_kwargs(words) == expected
        return
    with pytest.raises(InputError, match=expected):
        template_kwargs(words)


# --- evaluation, failures --------------------------------------------------------------------------------------------


def test_evaluation_renders_and_judges_the_same_way(tmp_path, monkeypatch):
    model = language_model_folder(tmp_path / "model", template=SWITCHED + "{% if opened %}<think>{% endif %}")
    problems = write_prompts(tmp_path / "p.jsonl", 2)
    seen = []
    monkeypatch.setattr(LocalModel, "response_text", lambda self, prompt, ids: seen.append(prompt) or "so 0")
    for kwargs, outcome in (({"enable_thinking": False}, "wrong"), ({"opened": True}, "unparsed")):
        seen.clear()
        result = evaluate(
            lambda: LocalModel(model, device="cpu"),
            PromptSet([problems]),
            EvaluationOptions(max_tokens=2, reference_logprobs=False, template_kwargs=kwargs),
            progress=False,
        )
        tokenizer = load_tokenizer(model)
        options = TemplateOptions(kwargs=kwargs)
        assert tokenizer.encode(tokenizer.render_prompt("Q1: 1+1?", options)) in seen
        assert set(result["greedy"]["by_problem"]) <= {outcome, "correct" if outcome == "wrong" else outcome}
        assert result["findings"] == [] and result["options"]["template_kwargs"] == kwargs


def test_refused_replies_are_counted_by_reason(tmp_path):
    prompts, output = write_prompts(tmp_path / "p.jsonl", 4), tmp_path / "g.jsonl"

    def answer(body):
        number = int(body["messages"][0]["content"][1])
        finish = ("abort", "error", "tool_calls", "stop")[number]
        calls = [{"id": "1", "function": {"name": "f", "arguments": "{}"}}] if finish == "stop" else None
        status, content = vllm_reply("x", finish=finish, error={"message": "out of memory"} if number == 1 else None)
        reply = json.loads(content)
        reply["choices"][0]["message"]["tool_calls"] = calls
        return status, json.dumps(reply).encode()

    with FaultyServer(answer=answer) as server:
        source = f"kind=openai url={server.url} model=m attempts=2 backoff=0.01"
        with pytest.raises(InputError, match=r"finish_reason 'error': .*out of memory.* \(2 attempts\)"):
            run(prompts, output, source)
        summary = run(prompts, output, source, allow_failures=True)
        assert len(server.requests) == 2 * (2 + 2 + 1 + 1)
    assert summary.dropped == {"request failed": 4, "group without responses": 4}
    assert summary.notes == {
        "teacher: request failed: reply with finish_reason 'abort' (2 attempts)": 1,
        "teacher: request failed: reply with finish_reason 'error'": 1,
        "teacher: request failed: reply with finish_reason 'tool_calls'": 1,
        "teacher: request failed: reply with tool calls taken out of the text": 1,
    }
    assert json.loads(summary_path(output).read_text())["notes"] == summary.notes


@pytest.mark.parametrize("tool", [generate_groups, preprocess_groups, evaluate_tool])
def test_the_tools_take_template_kwargs(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    assert "--template-kwargs" in capsys.readouterr().out


def test_reference_answers_that_do_not_fit_are_told(tmp_path):
    model = language_model_folder(tmp_path / "model", template=THINKING)
    problems = _file(tmp_path / "p.jsonl", json.dumps({"question": "1+1?", "solution": "2", "answer": "2"}) + "\n")
    options = EvaluationOptions(greedy=False)
    result = evaluate(lambda: LocalModel(model, device="cpu"), PromptSet([problems]), options, progress=False)
    assert result["reference"]["unfit"] == {"thoughts_open": 1}
    assert "thoughts_open: 1 reference answers do not fit" in result_table(result)


def test_findings_about_a_template_are_in_the_summary(tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", 1)
    folder = byte_level_folder(tmp_path / "t", eos="<|endoftext|>")
    with FaultyServer(answer=lambda body: (200, _completion("4"))) as server:
        source = f"kind=openai api=completions url={server.url} model=m tokenizer={folder}"
        summary = run(prompts, tmp_path / "g.jsonl", source)
    assert any(note.startswith("teacher: turn_end: the chat template ends turns") for note in summary.notes)


def rewritten(name, **changes):
    """Changes keys of a JSON file of the tokenizer's folder."""

    def cure(folder, path):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return {}

    return cure


def template_file(change):
    """The tokenizer's own template, changed, in a file for --chat-template."""

    def cure(folder, path):
        text = load_tokenizer(folder).template.text
        assert change(text) != text
        return {"chat_template": str(_file(path.with_name("mended.jinja"), change(text)))}

    return cure


ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # as the message says
THINKS = TURN + ASKS.replace("\n{%", "\n{% if enable_thinking | default(true) %}<think>\n{% endif %}{%")


@pytest.mark.parametrize(
    "kind, template, changes, response, cure",
    [
        ("bad_template", "\ufeff" + CHATML, {}, "2", template_file(lambda text: text.replace("\ufeff", ""))),
        ("bad_template", TURN, {}, "2", template_file(lambda text: text + ASKS)),
        ("lost_prompt", CHATML.replace("content", "contents"), {}, "2", template_file(lambda t: t.replace("ts", "t"))),
        ("lost_prompt", ASKS, {}, "2", template_file(lambda text: TURN + text)),
        ("turn_end", CHATML, {"eos": SPECIALS[0]}, "2", rewritten("tokenizer_config.json", eos_token=SPECIALS[2])),
        ("thoughts_open", THINKS, {}, "2", lambda *_: {"template_kwargs": {"enable_thinking": False}}),
        ("thoughts_open", THINKING, {}, "2", template_file(lambda text: text.replace("<think>\n", ""))),
        ("thoughts_twice", THINKING, {}, "<think>\na</think>2", template_file(lambda t: t.replace("<think>\n", ""))),
    ],
)  # fmt: skip
def test_the_way_out_of_a_message_leads_out(kind, template, changes, response, cure, tmp_path):
    folder = byte_level_folder(tmp_path / "t", template=template, **changes)
    path = write_groups(tmp_path / "g.jsonl", response)
    with pytest.raises(InputError, match=f"{kind}: "):
        preprocessed(path, folder)
    shard, problems = preprocessed(path, folder, **cure(folder, path))
    assert problems == {}
    tokenizer = load_tokenizer(folder)
    text = tokenizer.decode([*shard[0].prompt, *shard[0].responses[0]])
    assert text.endswith(f"1+1?<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>")
