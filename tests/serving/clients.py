"""A tiny model behind an application, and clients of it."""

import contextlib
import json
import time

from starlette.testclient import TestClient

from modeling_deepseek_r1.serving import Engine, Settings, create_app
from tests.models import tiny_model
from tests.test_conversation import TEMPLATE, word_tokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@contextlib.contextmanager
def served(pattern="mixed", *, template=TEMPLATE, step_seconds=0.0, model=None, tokenizer=None, limits=None, **settings):
    """Client and engine; steps can be made to last."""
    model = tiny_model(pattern) if model is None else model
    model.generation_config.eos_token_id = [2, 33]
    engine = Engine(model, **(limits or {}))
    if step_seconds:
        model.model.embed_tokens.register_forward_hook(lambda *_: time.sleep(step_seconds))
    app = create_app(engine, tokenizer or word_tokenizer(template), Settings(**{"name": "tiny", **settings}))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client, engine


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
