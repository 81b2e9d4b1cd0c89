"""A tiny model behind an application, and clients of it."""

import contextlib
import json
import time

from starlette.testclient import TestClient

from modeling_deepseek_r1.serving import Engine, Settings, Version, create_app
from tests.models import tiny_model
from tests.test_conversation import TEMPLATE, word_tokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def tiny_version(
    pattern="mixed", *, name="tiny", template=TEMPLATE, step_seconds=0.0, model=None, tokenizer=None, limits=None, **parts
):
    """A version that answers; its steps can be made to last."""
    model = tiny_model(pattern) if model is None else model
    model.generation_config.eos_token_id = [2, 33]
    if step_seconds:
        model.get_input_embeddings().register_forward_hook(lambda *_: time.sleep(step_seconds))
    return Version(name, Engine(model, **(limits or {})), tokenizer or word_tokenizer(template), **parts)


@contextlib.contextmanager
def served(pattern="mixed", *, canary=None, api_key=None, max_body=2**20, timeout=600.0, **version):
    """Client and engine; further arguments are those of `tiny_version`."""
    version = tiny_version(pattern, **version)
    app = create_app(version, Settings(api_key=api_key, max_body=max_body, timeout=timeout), canary)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client, version.engine


def texts(prompt="w5 w6", **fields):
    return {"prompt": prompt, "temperature": 0, "max_tokens": 12, **fields}


def chat(content="w5 w6", **fields):
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 12, **fields}


def events(body: str) -> list[dict]:
    """Chunks of a stream, which must be complete."""
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)
