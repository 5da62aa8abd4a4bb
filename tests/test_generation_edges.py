"""Generation when something is wrong: found before the first request, told in one message, nothing lost or silent."""

import json
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest
from generation_runs import ENVIRONMENT, arguments, client, collect, run, tool, write_prompts
from openai_server import FaultyServer
from tiny_language_model import language_model_folder
from tiny_tokenizers import byte_level_folder

from megatron_gft.errors import InputError
from megatron_gft.groups import iter_group_file
from megatron_gft.journal import Journal
from megatron_gft.sampling.generation import GenerationRun, journal_path, summary_path
from megatron_gft.sampling.openai_client import FAILURES_IN_A_ROW
from megatron_gft.sampling.prompts import PromptSet
from megatron_gft.sampling.settings import Sample, SampleFailure, SamplingParams, model_fingerprint
from megatron_gft.sampling.sources import load_sources
from megatron_gft.tokenizer import load_tokenizer
from tools import generate_groups


def reply(content="fine", finish="stop", **fields):
    """Status and bytes of a chat reply; ``fields`` go into the choice, those of ``message`` into the message."""
    message = {"role": "assistant", "content": content} | fields.pop("message", {})
    return 200, json.dumps({"choices": [{"message": message, "finish_reason": finish} | fields]}).encode()


def seeded_reply(body):
    return reply(f"answer {body['seed']}")


def served(server, more=""):
    return f"kind=openai url={server.url} model=m backoff=0.01 concurrency=4 {more}"


def responses(path):
    return [response for record, _ in iter_group_file(path) for response in record.responses]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return byte_level_folder(tmp_path_factory.mktemp("tokenizer") / "t")


# --- failures --------------------------------------------------------------------------------------------------------


def test_prompts_that_are_refused_neither_end_a_run_nor_stay_undone_for_ever(tmp_path):
    prompts, output, healthy = write_prompts(tmp_path / "p.jsonl", 4), tmp_path / "g.jsonl", threading.Event()

    def answer(body):
        is_long = body["messages"][0]["content"].startswith(("Q0", "Q1"))
        return (400, b"too long") if is_long and not healthy.is_set() else seeded_reply(body)

    with FaultyServer(answer=answer) as server:
        source = served(server, "k=12")
        assert 2 * 12 > FAILURES_IN_A_ROW
        with pytest.raises(InputError, match="(?s)24 of 48 responses failed.*HTTP 400: too long"):
            run(prompts, output, source)
        assert not output.exists()
        for _ in range(2):
            summary = run(prompts, output, source, allow_failures=True)
            assert summary.dropped == {"request failed": 24, "group without responses": 2}
        assert len(server.requests) == 24 + 3 * 24  # each run tries the failures once more
        summary = run(prompts, tmp_path / "more.jsonl", "kind=column column=answer", source, allow_failures=True)
        assert summary.dropped == {"request failed": 24} and summary.responses["expert"] == {"stop": 4}
        assert [len(record.responses) for record, _ in iter_group_file(tmp_path / "more.jsonl")] == [1, 1, 13, 13]
        server.requests.clear()
        healthy.set()
        assert run(prompts, output, source).responses == {"teacher": {"stop": 48}}
        assert len(server.requests) == 24  # the last run tried the failures again


def test_settings_that_never_worked_may_be_corrected(tmp_path):
    prompts, output = write_prompts(tmp_path / "p.jsonl", 2), tmp_path / "g.jsonl"
    answer = lambda body: seeded_reply(body) if body["model"] == "good" else (404, b"no such model")  # noqa: E731
    with FaultyServer(answer=answer) as server:
        with pytest.raises(InputError, match="HTTP 404"):
            run(prompts, output, f"kind=openai url={server.url} model=bad")
        assert run(prompts, output, f"kind=openai url={server.url} model=good").responses == {"teacher": {"stop": 2}}


def test_everything_wrong_is_told_together_before_the_first_request(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    with FaultyServer() as server:
        with pytest.raises(InputError) as caught:
            run(
                prompts,
                tmp_path / "g.csv",
                "kind=column column=solution",
                served(server),
                served(server, "name=keyed api_key_env=NO_SUCH_KEY"),
                "kind=vllm model=/nowhere",
                "kind=transformers name=small model=/nowhere",
            )
        assert server.requests == []
    wanted = ("g.csv: unknown kind", "no column 'solution'", "NO_SUCH_KEY", "vllm package", "small: /nowhere")
    assert len(caught.value.problems) == 6 and all(text in str(caught.value) for text in wanted)


@pytest.mark.parametrize("value", [True, ["5"], float("nan"), None, "  "])
def test_an_expert_answer_is_text_or_a_number(tmp_path, value):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"question": "1?", "solution": value}) + "\n")
    with pytest.raises(InputError, match=r"p\.jsonl:1: column 'solution'"):
        run(prompts, tmp_path / "g.jsonl", "kind=column column=solution")


def test_two_system_messages_are_refused(tmp_path):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1?"}]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"messages": messages}) + "\n")
    with FaultyServer() as server:
        with pytest.raises(InputError, match=r"p\.jsonl:1: the prompt begins with a system message, source teacher"):
            run(prompts, tmp_path / "g.jsonl", served(server, 'system="be long"'))
        run(prompts, tmp_path / "g.jsonl", served(server))
        assert [body["messages"] for body in server.requests] == [messages]


def test_a_limit_takes_the_first_prompts_and_looks_at_no_more(tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    with prompts.open("a") as file:
        file.write("not json\n")
    assert [row.place for row in PromptSet([prompts], limit=2)] == [f"{prompts}:1", f"{prompts}:2"]
    with pytest.raises(InputError, match="--limit -3"):
        PromptSet([prompts], limit=-3)


@pytest.mark.parametrize(
    "output, message",
    [
        ("folder.jsonl", "exists and is no file"),
        ("p.jsonl/below.jsonl", "Not a directory"),
        ("/proc/out.jsonl", "cannot be written"),
        ("p.jsonl", "is an input too"),
        ("folder.jsonl/../p.jsonl", "is an input too"),
    ],
)
def test_an_output_that_cannot_be_is_refused_at_once(tmp_path, output, message):
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    (tmp_path / "folder.jsonl").mkdir()
    before = prompts.read_bytes()
    with pytest.raises(InputError, match=message):
        run(prompts, tmp_path / output, "kind=column column=answer")
    assert prompts.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["folder.jsonl", "p.jsonl"]


def test_responses_that_the_input_carries_are_not_made_again(tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", 3)
    with FaultyServer() as server:
        run(prompts, tmp_path / "a.jsonl", served(server, "k=2"))
        summary = run(tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", served(server, "k=3"))
        assert len(server.requests) == 3 * 3 and summary.notes == {"teacher: in the input already": 6}
        assert len({(r.sampling["seed"], r.text) for r in responses(tmp_path / "b.jsonl.gz")}) == 9
        run(tmp_path / "b.jsonl.gz", tmp_path / "c.jsonl", served(server, "k=3 system='Be brief.'"))
        assert len(server.requests) == 9 + 9  # other settings: other responses
    assert len(responses(tmp_path / "c.jsonl")) == 18


def test_ctrl_c_ends_with_a_line_and_the_next_run_continues(tmp_path):
    prompts, output = write_prompts(tmp_path / "p.jsonl", 30), tmp_path / "g.jsonl"
    with FaultyServer(delay=0.05) as server:
        command = tool(prompts, output, served(server))
        process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        while not journal_path(output).exists() or journal_path(output).read_bytes().count(b"\n") < 4:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1].startswith("interrupted -> run the same command again")
        assert process.returncode == 130
        run(prompts, output, served(server))
        assert len(server.requests) < 30 + 10


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument, field, value",
    [
        ("system='Think, then answer after ####'", "system", "Think, then answer after ####"),
        ("system='Answer #1: be brief'", "system", "Answer #1: be brief"),
        ("model=405", "model", "405"),
        ("name=null", "name", "null"),
        (r"""stop='["\n\n", "#### "]'""", "stop", ["\n\n", "#### "]),
        ("stop=[END]", "stop", ["END"]),
        ("extra_body='{min_p: 0.1, x: [1]}'", "extra_body", {"min_p": 0.1, "x": [1]}),
        ("temperature=1e-1", "temperature", 0.1),
        ("logprobs=false", "logprobs", False),
    ],
)
def test_text_is_taken_as_it_is_and_the_rest_as_yaml(argument, field, value):
    model = "" if field == "model" else "model=m"
    (source,) = load_sources([f"kind=openai url=http://h/v1 {model} {argument}"])
    assert getattr(source, field) == value


def test_duplicate_prompts_on_request(tmp_path, capsys):
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    prompts.write_text(prompts.read_text() * 2)
    common = arguments(prompts, tmp_path / "g.jsonl", "kind=column column=answer")
    assert generate_groups.main(common) == 2 and "--duplicates" in capsys.readouterr().err
    assert generate_groups.main([*common, "--duplicates", "drop"]) == 0
    assert "2 groups; responses: expert 2; dropped: {'prompt given before': 2}" in capsys.readouterr().out
    assert generate_groups.main([*common, "--duplicates", "number"]) == 0
    assert "4 groups" in capsys.readouterr().out


# --- what a sample is ------------------------------------------------------------------------------------------------


def test_ids_keep_the_tokenizer_that_made_them(tmp_path, tokenizer_folder):
    prompts, output = write_prompts(tmp_path / "p.jsonl", 1), tmp_path / "g.jsonl"
    tokenizer, moved, other = load_tokenizer(tokenizer_folder), tmp_path / "moved", tmp_path / "other"
    shutil.copytree(tokenizer_folder, moved)
    shutil.copytree(tokenizer_folder, other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with FaultyServer(token_ids=lambda text: [*tokenizer.encode_response(text), tokenizer.eos_id]) as server:
        run(prompts, output, served(server, f"token_ids=true tokenizer={tokenizer_folder}"))
        with pytest.raises(InputError, match="begun with other settings.*(?s:.*)tokenizer="):
            run(prompts, output, served(server, f"k=2 token_ids=true tokenizer={other}"))
        run(prompts, output, served(server, f"k=2 token_ids=true tokenizer={moved}"))  # the place may change
    assert [r.tokenizer for r in responses(output)] == [tokenizer.fingerprint] * 2


def test_an_edited_template_is_not_mixed_with_the_one_before(tmp_path):
    model, template = language_model_folder(tmp_path / "model"), tmp_path / "template.jinja"
    prompts, output = write_prompts(tmp_path / "p.jsonl", 1), tmp_path / "g.jsonl"
    source = f"kind=transformers model={model} max_tokens=2 device=cpu chat_template={template}"
    template.write_text("{{ messages[0]['content'] }} A:")
    run(prompts, output, source)
    template.write_text("{{ messages[0]['content'] }} B:")
    with pytest.raises(InputError, match="chat_template="):
        run(prompts, output, source + " k=2")


def test_a_model_is_known_by_all_that_decides_its_samples(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no weights"):
        model_fingerprint(folder)
    weights, seen = bytearray(50 << 20), set()
    for position in (None, 33 << 19, 32 << 20, len(weights) - 1):
        if position is not None:
            weights[position] ^= 1
        (folder / "model.safetensors").write_bytes(weights)
        seen.add(model_fingerprint(folder))
    for name in ("generation_config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
        seen.add(model_fingerprint(folder))
    (folder / "results.json").write_text("{}")  # which decides nothing
    assert len(seen) == 6 and model_fingerprint(folder) in seen
    (folder / "model.safetensors").write_bytes(weights[: 12 << 20])  # small files count whole
    before = model_fingerprint(folder)
    weights[7 << 20] ^= 1
    (folder / "model.safetensors").write_bytes(weights[: 12 << 20])
    assert model_fingerprint(folder) != before


def test_half_a_character_is_replaced_and_counted(tmp_path, tokenizer_folder):
    prompts, output = write_prompts(tmp_path / "p.jsonl", 2), tmp_path / "g.jsonl"
    with FaultyServer(answer=lambda body: reply("hi \ud83d \U0001f600", token_ids=[5, 6])) as server:
        source = served(server, f"token_ids=true tokenizer={tokenizer_folder}")
        summary = run(prompts, output, source)
        summary_path(output).unlink()
        run(prompts, output, source)
        assert len(server.requests) == 2
    assert summary.notes["teacher: half a character replaced by U+FFFD"] == 2
    assert [(r.text, r.token_ids) for r in responses(output)] == [("hi \ufffd \U0001f600", None)] * 2


# --- replies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, missing",
    [(reply(logprobs={"content": [{"logprob": -1.0}]}), "token_ids"), (reply(token_ids=[5]), "logprobs")],
)
def test_log_probs_that_a_server_cannot_give_end_the_run_at_once(tokenizer_folder, answer, missing):
    with FaultyServer(answer=lambda body: answer) as server:
        backend = client(server.url, token_ids=True, tokenizer=str(tokenizer_folder))
        with pytest.raises(InputError, match=f"the reply has no {missing}.*set logprobs=false"):
            collect(backend, 50, SamplingParams(logprobs=True))
        assert len(server.requests) < 20


def test_responses_without_their_log_probs_are_counted(tmp_path, tokenizer_folder):
    prompts, output = write_prompts(tmp_path / "p.jsonl", 2), tmp_path / "g.jsonl"
    two_for_one = {"token_ids": [5], "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -2.0}]}}
    with FaultyServer(answer=lambda body: reply("#", **two_for_one)) as server:
        summary = run(prompts, output, served(server, f"token_ids=true logprobs=true tokenizer={tokenizer_folder}"))
    assert summary.notes == {"teacher: without log-probs": 2}
    assert [(r.token_ids, r.logprobs) for r in responses(output)] == [([5], None)] * 2


@pytest.mark.parametrize(
    "answer, result, requests",
    [
        (reply(None, "length"), Sample("0", "", "length"), 1),
        (reply("#", message={"reasoning_content": None}, token_ids=[5]), Sample("0", "#", "stop", [5]), 1),
        (reply("4", message={"reasoning_content": {"text": "2"}}), "content '4', reasoning", 2),
        (reply("4", "content_filter"), "finish_reason 'content_filter'", 1),
        (reply("4", token_ids=[10**9]), "token id 1000000000, unknown to tokenizer", 1),
        (reply(None), "content None", 2),
        (reply("4", token_ids=5), "token_ids 5", 2),
        (reply("4", token_ids=["a"]), "token_ids ['a']", 2),
        (reply("4", token_ids=[True, -1]), "token_ids [True, -1]", 2),
        (reply("4", token_ids=[5], logprobs={"content": [{"logprob": "abc"}]}), "reply with log-probs", 2),
        (reply("4", token_ids=[5], logprobs={"content": [{"logprob": float("nan")}]}), "not finite", 2),
        (reply("4", token_ids=[5], logprobs=7), "reply with log-probs 7", 2),
        ((200, b"[" * 200_000), "not JSON", 2),
        ((200, b'{"choices": [7]}'), "reply without", 2),
        ((200, b'{"choices": []}'), "reply without the text of a choice: {'choices': []}", 2),
        ((200, b'{"error": "overloaded"}'), "reply without the text of a choice: {'error': 'overloaded'}", 2),
        ((200, b"<html>a proxy"), "reply is not JSON: <html>a proxy", 2),
        ((429, b"later"), "HTTP 429", 2),
        ((307, b"elsewhere"), "HTTP 307: elsewhere", 1),
    ],
)
def test_replies_that_are_not_what_they_should_be(tokenizer_folder, answer, result, requests):
    with FaultyServer(answer=lambda body: answer) as server:
        backend = client(server.url, token_ids=True, tokenizer=str(tokenizer_folder), attempts=2)
        (outcome,) = collect(backend, 1, SamplingParams(logprobs=b"logprobs" in answer[1])).values()
        assert len(server.requests) == requests
    if isinstance(result, Sample):
        assert outcome == result
    else:
        assert isinstance(outcome, SampleFailure) and result in outcome.reason and outcome.transient == (requests > 1)


def test_what_a_reasoning_model_does_not_say_is_counted(tmp_path):
    prompts, output = write_prompts(tmp_path / "p.jsonl", 2), tmp_path / "g.jsonl"

    def answer(body):
        thoughts = {"reasoning_content": "let me think"}
        if body["messages"][0]["content"].startswith("Q0"):
            return reply(None, "length", message=thoughts)
        return reply("#### 2", message=thoughts)

    with FaultyServer(answer=answer) as server:
        summary = run(prompts, output, served(server, "thoughts=none"))
    assert summary.dropped == {"reasoning without an answer": 1, "group without responses": 1}
    assert summary.notes == {"teacher: reasoning, which the server kept apart, left out": 1}
    assert json.loads(summary_path(output).read_text())["notes"] == summary.notes


@pytest.mark.parametrize(
    "first, drop",
    [(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"), (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", b"{"), (b"", b"")],
)
def test_the_time_limit_is_for_the_whole_request_however_it_trickles(first, drop):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle():
            connection = listener.accept()[0]
            with connection:
                connection.sendall(first)
                for _ in range(60):
                    time.sleep(0.05)
                    try:
                        connection.sendall(drop)
                    except OSError:
                        return

        threading.Thread(target=trickle, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        began = time.monotonic()
        (outcome,) = collect(client(url, timeout=0.4, attempts=1), 1).values()
    assert "no reply within 0.4 s" in outcome.reason and 0.3 < time.monotonic() - began < 2.0


@pytest.mark.parametrize(
    "url", [*(f"http://{place}/v1" for place in ("h:99999", "h:abc", "h:0", "a..b", "[::1", "")), "h:8"]
)
def test_urls_that_are_none(url):
    with pytest.raises(InputError, match="is not http"):
        client(url)


@pytest.mark.parametrize("key", ["abc\n", "clé", "日本", ""])
def test_keys_that_are_none(monkeypatch, key):
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(InputError, match="SOME_KEY (is not set|holds what no HTTP header can carry)") as caught:
        client("http://h/v1", api_key_env="SOME_KEY")
    assert not key or key.strip() not in str(caught.value)


def test_a_path_beyond_ascii_and_a_query_reach_the_server():
    with FaultyServer(answer=seeded_reply) as server:
        (outcome,) = collect(client(server.url + "/é x?api-version=1", attempts=1), 1).values()
        assert outcome.text == "answer 0" and server.paths == ["/v1/%C3%A9%20x/chat/completions?api-version=1"]


def test_a_proxy_of_the_environment_is_used_and_a_broken_one_refused(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "")
    with FaultyServer(answer=seeded_reply) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        assert collect(client("http://far.invalid/v1"), 1)["0"].text == "answer 0"
        assert proxy.paths == ["http://far.invalid/v1/chat/completions"]
    monkeypatch.setenv("HTTP_PROXY", "http://h:port")
    with pytest.raises(InputError, match="proxy of the environment: Invalid port.* unset HTTP_PROXY"):
        client("http://h/v1")


# --- the journal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"my notes without newline", b"something else\n", b"\0" * 40, b'{"header": {}}'])
def test_a_file_of_someone_else_stays_untouched(tmp_path, content):
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(InputError, match="not a journal of this program"):
        Journal(tmp_path / "j", {"format": 1})
    assert (tmp_path / "j").read_bytes() == content


def test_a_journal_that_was_cut_in_its_first_line_begins_anew(tmp_path):
    with Journal(tmp_path / "whole", {"format": 1}):
        pass
    whole = (tmp_path / "whole").read_bytes()
    for cut in range(len(whole)):
        (tmp_path / "j").write_bytes(whole[:cut])
        with Journal(tmp_path / "j", {"format": 1}) as journal:
            assert journal.torn == cut
        assert (tmp_path / "j").read_bytes() == whole


def test_two_journals_in_one_file_are_refused(tmp_path):
    with Journal(tmp_path / "j", {}) as journal:
        journal.append("a", 1)
    (tmp_path / "j").write_bytes((tmp_path / "j").read_bytes() * 2)
    with pytest.raises(InputError, match="j:3: a second journal begins here"):
        Journal(tmp_path / "j", {})


def test_lines_that_a_journal_lost_are_in_the_summary(tmp_path, capsys):
    prompts, output = write_prompts(tmp_path / "p.jsonl", 3), tmp_path / "g.jsonl"
    with FaultyServer(answer=seeded_reply) as server:
        run(prompts, output, served(server))
        lines = journal_path(output).read_bytes().splitlines(keepends=True)
        lines[2] = lines[2].replace(b"answer", b"AnsweR")
        journal_path(output).write_bytes(b"".join(lines)[:-5])
        output.unlink()
        assert generate_groups.main(arguments(prompts, output, served(server))) == 0 and len(server.requests) == 3 + 2
    notes = json.loads(summary_path(output).read_text())["notes"]
    assert notes["damaged lines of the journal, sampled again"] == 1 and len(notes) == 2
    assert "note: damaged lines of the journal, sampled again: 1" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [200, 2000])
def test_a_full_disk_costs_nothing_but_a_message(tmp_path, limit):
    """Of the journal, and of the output: a limit on the size of files stands for the disk."""
    prompts, output = write_prompts(tmp_path / "p.jsonl", 8), tmp_path / "g.jsonl"
    with FaultyServer(answer=seeded_reply) as server:
        run_it = GenerationRun(PromptSet([prompts]), output, load_sources([served(server)]))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(InputError, match="g.jsonl(.journal)?: cannot be written .File too large"):
                run_it.execute(progress=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not output.exists()
        assert run(prompts, output, served(server)).groups == 8
        assert limit == 200 or len(server.requests) == 8
