"""Short ways to run the generation of groups in tests."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from megatron_gft.sampling.generation import GenerationRun
from megatron_gft.sampling.openai_client import OpenAIBackend
from megatron_gft.sampling.prompts import PromptSet
from megatron_gft.sampling.settings import SampleRequest, SamplingParams
from megatron_gft.sampling.sources import OpenAISource, load_sources

os.environ.setdefault("NO_PROXY", "127.0.0.1")  # where the servers of tests are
ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def client(url, **changes):
    """Client of a server at ``url``, impatient unless told otherwise."""
    fields = {"kind": "openai", "model": "m", "backoff": 0.01, "timeout": 5.0, "concurrency": 4} | changes
    return OpenAIBackend(OpenAISource(url=url, **fields))


def collect(backend, count, params=None, prompt="hi"):
    params = params or SamplingParams()
    requests = [SampleRequest(str(i), prompt, i) for i in range(count)]
    return {outcome.key: outcome for outcome in backend.generate(requests, params, lambda key: False)}


def write_prompts(path, count):
    rows = ({"question": f"Q{i}: {i}+{i}?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(prompts, output, *sources):
    """Of the command line."""
    words = ["--quiet", "--input", str(prompts), "--output", str(output)]
    return words + [word for source in sources for word in ("--source", source)]


def tool(prompts, output, *sources):
    """The command, to run in a process of its own with ``ENVIRONMENT``."""
    return [sys.executable, str(ROOT / "tools" / "generate_groups.py"), *arguments(prompts, output, *sources)]


def run(prompts, output, *sources, seed=0, **options):
    made = GenerationRun(PromptSet([prompts]), output, load_sources(sources), seed)
    return made.execute(progress=False, **options)
