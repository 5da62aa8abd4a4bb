"""From prompts to a group file: journal, server client under faults, restarts after SIGKILL, sources, prompts."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace as Namespace

import pytest
from generation_runs import ENVIRONMENT, arguments, client, collect, run, tool, write_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_server import FAULTS, FaultyServer, expected_text
from tiny_language_model import language_model_folder
from tiny_tokenizers import byte_level_folder

from megatron_gft.errors import InputError
from megatron_gft.groups import iter_group_file
from megatron_gft.journal import Journal
from megatron_gft.sampling.generation import journal_path, summary_path
from megatron_gft.sampling.openai_client import FAILURES_IN_A_ROW
from megatron_gft.sampling.settings import Sample, SampleFailure, SampleRequest, SamplingParams, sample_seed
from megatron_gft.sampling.sources import load_sources
from megatron_gft.tokenizer import load_tokenizer
from tools import generate_groups

# --- journal ---------------------------------------------------------------------------------------------------------


def journal_with(path, count):
    with Journal(path, {"for": "test"}) as journal:
        for i in range(count):
            journal.append(f"k{i}", {"text": f"line {i}\u2028\n\u00e9\ud800", "n": i})
    return path.read_bytes()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_journal_cut_anywhere_keeps_every_whole_record(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("journal") / "j"
    content = journal_with(path, 6)
    ends = [i + 1 for i, byte in enumerate(content) if byte == 10]
    cut = data.draw(st.integers(ends[0], len(content)))
    path.write_bytes(content[:cut])
    whole = sum(end <= cut for end in ends) - 1
    with Journal(path, {"for": "other"}) as journal:
        assert journal.header == {"for": "test"} and len(journal) == whole
        assert journal.torn == cut - ends[whole]
        for i in range(whole):
            assert journal[f"k{i}"] == {"text": f"line {i}\u2028\n\u00e9\ud800", "n": i}
        for i in range(whole, 6):
            journal.append(f"k{i}", {"text": f"line {i}\u2028\n\u00e9\ud800", "n": i})
    assert path.read_bytes() == content


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_never_gives_a_wrong_record(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("journal") / "j"
    content = bytearray(journal_with(path, 6))
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        with Journal(path, {}) as journal:
            found = {key: journal[key] for key in (f"k{i}" for i in range(6)) if key in journal}
            assert 4 <= len(found) == len(journal) and journal.damaged + bool(journal.torn) >= 1
    except InputError as error:
        assert "not a journal" in str(error)  # the header itself
        return
    assert all(value == {"text": f"line {value['n']}\u2028\n\u00e9\ud800", "n": value["n"]} for value in found.values())


def test_two_runs_never_share_a_journal_and_a_key_is_written_once(tmp_path):
    with Journal(tmp_path / "j", {}) as journal:
        with pytest.raises(InputError, match="in use by another run"):
            Journal(tmp_path / "j", {})
        journal.append("a", 1)
        with pytest.raises(ValueError, match="already holds 'a'"):
            journal.append("a", 1)


# --- the client ------------------------------------------------------------------------------------------------------


def test_a_healthy_server_is_asked_once_per_response_with_all_parameters():
    with FaultyServer() as server:
        params = SamplingParams(0.7, 0.9, 5, 33, ("END",))
        outcomes = collect(client(server.url, extra_body={"min_p": 0.1}), 30, params)
    messages = [{"role": "user", "content": "hi"}]
    assert {key: o.text for key, o in outcomes.items()} == {str(i): expected_text(messages, i) for i in range(30)}
    assert len(server.requests) == 30 and sorted(body["seed"] for body in server.requests) == list(range(30))
    expected = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_tokens": 33, "stop": ["END"], "min_p": 0.1, "n": 1}
    assert expected.items() <= server.requests[0].items() and server.requests[0]["messages"] == messages


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_survived(fault, caplog):
    with FaultyServer(fault_share=0.3, seed=3, faults=(fault,), stall=0.5) as server:
        timeout = 0.25 if fault == "stall" else 5.0
        outcomes = collect(client(server.url, timeout=timeout, attempts=12), 25)
        assert server.seen[fault] >= 3
    assert all(isinstance(outcome, Sample) for outcome in outcomes.values()) and len(outcomes) == 25
    (said,) = caplog.messages
    assert said.startswith(server.url) and said.endswith("; each request is tried up to 12 times")


def test_a_request_that_always_fails_is_given_up_and_a_dead_server_ends_the_run():
    with FaultyServer(fault_share=1.0, faults=("500",)) as server:
        backend = client(server.url, attempts=2, concurrency=2)
        outcomes = []
        with pytest.raises(InputError, match=f"{FAILURES_IN_A_ROW} requests in a row failed.*HTTP 500: internal error"):
            for outcome in backend.generate(
                (SampleRequest(str(i), "hi", i) for i in range(1000)), SamplingParams(), lambda key: False
            ):
                outcomes.append(outcome)
        assert all(isinstance(outcome, SampleFailure) and "(2 attempts)" in outcome.reason for outcome in outcomes)
        assert len(server.requests) < 100
    with pytest.raises(InputError, match="ConnectionRefusedError"):
        collect(client(server.url, attempts=1), 40)


def test_a_refusal_is_not_tried_again():
    with FaultyServer(status=400) as server:
        outcomes = collect(client(server.url), 5)
        assert all("HTTP 400" in outcome.reason for outcome in outcomes.values()) and len(server.requests) == 5
    with FaultyServer(status=401) as server:
        with pytest.raises(InputError, match="HTTP 401.*check url, model and api_key_env"):
            collect(client(server.url), 100)
        assert len(server.requests) <= 10


def test_the_key_comes_from_the_environment(monkeypatch):
    with FaultyServer() as server:
        with pytest.raises(InputError, match="NO_SUCH_KEY is not set"):
            client(server.url, api_key_env="NO_SUCH_KEY")
        monkeypatch.setenv("SOME_KEY", "s3cret")
        collect(client(server.url, api_key_env="SOME_KEY"), 1)
        assert server.headers[0]["Authorization"] == "Bearer s3cret"
    with FaultyServer(status=401) as server:
        with pytest.raises(InputError, match="HTTP 401") as caught:
            collect(client(server.url.replace("//", "//bob:s3cret@"), api_key_env="SOME_KEY"), 1)
        assert "s3cret" not in str(caught.value) and server.headers[0]["Authorization"] == "Bearer s3cret"


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_ids_and_logprobs_come_with_the_tokenizer_that_vouches_for_them(tmp_path, api):
    tokenizer = load_tokenizer(byte_level_folder(tmp_path / "t"))

    def sampled(text):
        return [*tokenizer.encode_response(text), tokenizer.eos_id]

    with FaultyServer(token_ids=sampled) as server:
        keyed = client(server.url, api=api, token_ids=True, tokenizer=str(tmp_path / "t"))
        outcomes = collect(keyed, 3, SamplingParams(logprobs=True))
        sent = server.requests[0]
        without = collect(client(server.url, extra_body={"return_token_ids": True}), 1)
    if api == "completions":
        assert sent["prompt"] == tokenizer.encode(tokenizer.render_prompt("hi")) and sent["logprobs"] == 1
    for outcome in outcomes.values():
        assert outcome.token_ids == sampled(outcome.text)
        assert len(outcome.logprobs) == len(outcome.token_ids) and outcome.logprobs[0] == -0.5
    assert without["0"].token_ids is None and without["0"].logprobs is None


# --- restarts --------------------------------------------------------------------------------------------------------


def journal_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow  # 22 kills; torn journals are tested one by one
def test_sigkill_at_random_points_loses_and_doubles_nothing(tmp_path):
    """22 kills of the real tool, against a server that fails, stalls and drops connections all the while."""
    dice = random.Random(7)
    prompts, output = write_prompts(tmp_path / "prompts.jsonl", 60), tmp_path / "groups.jsonl"
    journal = journal_path(output)
    with FaultyServer(fault_share=0.25, seed=7, delay=0.004, stall=0.4) as server:
        common = f"url={server.url} model=m k=4 timeout=0.25 backoff=0.02 attempts=30 concurrency=6"
        sources = ["kind=column column=answer", f"kind=openai {common}", f"kind=openai name=self source=self {common}"]
        command = [*tool(prompts, output, *sources), "--seed", "5"]
        kills = 0
        while kills < 22:
            process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            goal = journal_lines(journal) + dice.randint(1, 18)
            while journal_lines(journal) < goal and process.poll() is None:
                time.sleep(0.002)
            time.sleep(dice.random() * 0.01)
            assert process.poll() is None, process.stderr.read().decode()
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            process.stderr.close()
            kills += 1
            assert not output.exists() and journal_lines(journal) < 60 * 8
            if kills % 5 == 0:  # the power went, too: the end of the last line never reached the disk
                with open(journal, "r+b") as file:
                    file.truncate(journal.stat().st_size - dice.randint(1, 40))
        subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL, timeout=120)
        assert set(FAULTS) <= set(server.seen)

    with FaultyServer() as healthy:
        common, twin = f"url={healthy.url} model=m k=4", tmp_path / "twin.jsonl"
        run(prompts, twin, sources[0], f"kind=openai {common}", f"kind=openai name=self source=self {common}", seed=5)
    assert output.read_bytes() == twin.read_bytes()
    keys = Counter(json.loads(line[17:])["key"] for line in journal.read_bytes().splitlines()[1:])
    assert set(keys.values()) == {1} and len(keys) == 60 * 8 + 2  # and two descriptions of sources
    records = [record for record, _ in iter_group_file(output)]
    assert len(records) == 60 and all(len(record.responses) == 9 for record in records)
    assert len({r.sampling["seed"] for record in records for r in record.responses[1:]}) == 480


def test_a_finished_run_is_recognised_and_may_be_enlarged(tmp_path):
    prompts, output = write_prompts(tmp_path / "p.jsonl", 5), tmp_path / "g.jsonl"
    with FaultyServer() as server:
        source = f"kind=openai url={server.url} model=m"
        first = run(prompts, output, source + " k=2")
        assert len(server.requests) == 10 and first.responses == {"teacher": {"stop": 10}}
        assert run(prompts, output, source + " k=2").sha256 == first.sha256
        assert len(server.requests) == 10  # nothing was asked again
        before = [record.responses for record, _ in iter_group_file(output)]
        run(prompts, output, source + " k=3", f"kind=openai url={server.url} model=n name=other")
        assert len(server.requests) == 10 + 5 + 5
        after = [record.responses for record, _ in iter_group_file(output)]
        assert [responses[:2] for responses in after] == before and {len(r) for r in after} == {4}
        with pytest.raises(InputError, match=r"teacher: temperature=1.0 \(now 0.5\)"):
            run(prompts, output, source + " k=3 temperature=0.5")
        with pytest.raises(InputError, match=r"seed=0 \(now 1\)"):
            run(prompts, output, source + " k=3", seed=1)
        output.write_text("tampered\n")
        run(prompts, output, source + " k=2")
        assert [record.responses for record, _ in iter_group_file(output)] == before
        assert json.loads(summary_path(output).read_text())["groups"] == 5
        asked, made = len(server.requests), output.read_bytes()
        journal_path(output).unlink()
        with pytest.raises(InputError, match=r"g\.jsonl: is there, but g\.jsonl\.journal is not"):
            run(prompts, output, source + " k=2")
        assert (len(server.requests), output.read_bytes()) == (asked, made)


def test_a_model_in_this_process_from_prompts_to_groups_in_two_goes(tmp_path):
    model = language_model_folder(tmp_path / "model")
    prompts = write_prompts(tmp_path / "p.jsonl", 6)
    source = f"kind=transformers model={model} k=3 max_tokens=10 batch_size=4 logprobs=true device=cpu"
    summary = run(prompts, tmp_path / "whole.jsonl.gz", "kind=column column=answer", source)
    whole = [record for record, _ in iter_group_file(tmp_path / "whole.jsonl.gz")]
    assert sum(summary.responses["self"].values()) == 18 and summary.groups == 6
    tokenizer = load_tokenizer(model)
    for record in whole:
        expert, *own = record.responses
        assert (expert.source, expert.model, record.answer) == ("expert", None, expert.text.split("#### ")[1])
        for k, response in enumerate(own):
            assert response.source == "self" and response.tokenizer == tokenizer.fingerprint
            assert len(response.token_ids) == len(response.logprobs) <= 10
            assert response.sampling["seed"] == sample_seed(0, record.id, "self", k)
            assert len(response.sampling["checkpoint"]) == 64 and response.model == str(model)
    lines = journal_path(tmp_path / "whole.jsonl.gz").read_bytes().splitlines(keepends=True)
    journal_path(tmp_path / "half.jsonl.gz").write_bytes(b"".join(lines[:10]) + lines[10][:-5])
    run(prompts, tmp_path / "half.jsonl.gz", "kind=column column=answer", source)
    assert [record for record, _ in iter_group_file(tmp_path / "half.jsonl.gz")] == whole


def test_vllm_is_called_as_it_wants_to_be(tmp_path, monkeypatch):
    """Against a stand-in that takes only what vLLM's interface takes."""
    folder = byte_level_folder(tmp_path / "model")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    tokenizer, calls = load_tokenizer(folder), []

    def params(*, n, seed, temperature, top_p, top_k, max_tokens, stop, logprobs):
        assert (n, top_k, stop) == (1, -1, None)
        return Namespace(seed=seed, logprobs=logprobs)

    def reply(prompt, params):
        text = f"{len(prompt['prompt_token_ids'])} {params.seed}"
        ids = (*tokenizer.encode_response(text), tokenizer.eos_id)
        logprobs = [{token: Namespace(logprob=-0.25)} for token in ids] if params.logprobs == 0 else None
        output = Namespace(text=text, token_ids=ids, finish_reason="stop", stop_reason=None, logprobs=logprobs)
        return Namespace(outputs=[output])

    def generate(prompts, params, *, use_tqdm):
        calls.append(len(prompts))
        return list(map(reply, prompts, params))

    def engine(model, *, max_model_len, trust_remote_code):
        assert not trust_remote_code
        config = Namespace(max_model_len=max_model_len)
        return Namespace(llm_engine=Namespace(model_config=config), generate=generate)

    monkeypatch.setitem(sys.modules, "vllm", Namespace(LLM=engine, SamplingParams=params))
    prompts = write_prompts(tmp_path / "p.jsonl", 4)
    common = f"kind=vllm model={folder} k=2 logprobs=true max_tokens=16"
    run(prompts, tmp_path / "g.jsonl", f'{common} requests_per_call=3 engine="{{max_model_len: 200}}"')
    assert calls == [3, 3, 2]
    for record, _ in iter_group_file(tmp_path / "g.jsonl"):
        length = len(tokenizer.encode(tokenizer.render_prompt(record.prompt)))
        for response in record.responses:
            assert response.text == f"{length} {response.sampling['seed']}"
            assert response.token_ids[-1] == tokenizer.eos_id
            assert response.logprobs == [-0.25] * len(response.token_ids)


# --- sources --------------------------------------------------------------------------------------------------------


def test_sources_come_from_yaml_and_arguments_and_get_names(tmp_path):
    (tmp_path / "s.yaml").write_text(
        "sources:\n- {kind: column, column: solution}\n- {kind: openai, url: 'http://h/v1', model: m, stop: ['a b']}\n"
    )
    sources = load_sources(["kind=openai url=http://h/v1 model=n k=2 stop='[\"x, y\"]'"], tmp_path / "s.yaml")
    assert [source.name for source in sources] == ["expert", "teacher", "teacher2"]
    assert sources[1].stop == ["a b"] and sources[2].stop == ["x, y"] and sources[2].k == 2


SERVER = "kind=openai url=http://h/v1 model=m"


@pytest.mark.parametrize(
    "argument, message",
    [
        (f"{SERVER} temprature=1", "did you mean temperature"),
        (rf'{SERVER} stop=["\n\n"]', r"""stop=\[\\n\\n\]: not valid YAML -> quote a list twice: stop='\["\\n"""),
        (f"{SERVER} stop='[####, END]'", "not valid YAML -> quote a list twice"),
        (f"{SERVER} stop=END", "not a list .got 'END'. -> quote a list twice"),
        (f"{SERVER} k=2 k=3", "k is given twice"),
        (f"{SERVER} temperature=inf", "finite"),
        ("kind=openai model=m", "url: missing"),
        ("kind=opnai model=m", "opnai"),
        ("kind=transformers model=m k=0", "greater than 0"),
        ("kind=transformers model=m k=2 temperature=0", "the same response 2 times"),
        (f"{SERVER} logprobs=true", "token_ids=true"),
        (f"{SERVER} api=completions", "set tokenizer=DIR"),
        ("kind=column", "column: missing"),
        ("column", "not key=value"),
        ("kind=column column=a name=x/y", "with a '/' in it"),
    ],
)
def test_bad_sources_are_refused_with_the_way_out(argument, message):
    with pytest.raises(InputError, match=message):
        load_sources([argument])


def test_a_group_file_is_enlarged_and_keeps_its_responses(tmp_path):
    prompts, first = write_prompts(tmp_path / "p.jsonl", 3), tmp_path / "first.jsonl"
    with FaultyServer() as server:
        run(prompts, first, "kind=column column=answer")
        run(first, tmp_path / "second.jsonl", f"kind=openai source=self url={server.url} model=m system='Be brief.'")
        assert server.requests[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    before = [record for record, _ in iter_group_file(first)]
    after = [record for record, _ in iter_group_file(tmp_path / "second.jsonl")]
    assert [(r.id, r.prompt, r.answer, r.responses[0]) for r in after] == [
        (r.id, r.prompt, r.answer, r.responses[0]) for r in before
    ]
    assert all([response.source for response in record.responses] == ["expert", "self"] for record in after)


def test_help_needs_no_torch():
    code = "import sys; from tools.generate_groups import main\n"
    code += "try: main(['--help'])\nfinally: print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert "--allow-failures" in found.stdout and found.stdout.endswith("False\n")


def test_the_tool_says_what_is_wrong_and_exits_2(tmp_path, capsys):
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    output, expert = tmp_path / "g.jsonl", "kind=column column=answer"
    assert generate_groups.main(arguments(prompts, output, expert)) == 0
    assert "2 groups; responses: expert 2" in capsys.readouterr().out
    (tmp_path / "twice.jsonl").write_text(prompts.read_text() * 2)
    for words, message in (
        (arguments(prompts, output), "sources"),
        (arguments(prompts, output, "kind=column column=solution"), "no column 'solution' for source expert"),
        (arguments(tmp_path / "none", output, expert), "no such file"),
        (arguments(tmp_path / "twice.jsonl", output, expert), "ids must"),
        (arguments(prompts, output, "kind=transformers model=/nowhere"), "nowhere"),
        ([*arguments(prompts, output), "--config", str(tmp_path / "none.yaml")], "none.yaml: cannot be read"),
    ):
        assert generate_groups.main(words) == 2, words
        assert message in capsys.readouterr().err
