"""Requests that share a batch get what each would get alone; what cannot be answered is refused in OpenAI's form."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_deepseek_r1.serving import Canary, Engine
from modeling_deepseek_r1.serving.protocol import TextRequest
from modeling_deepseek_r1.serving.versions import Versions
from tests.models import tiny_model
from tests.serving.clients import CHAT, TEXT, chat, events, served, texts, tiny_version, wait_until
from tests.test_conversation import word_tokenizer

PROMPTS = ["w5 w6 w7", "w8", " ".join(f"w{n}" for n in range(20, 40)), "w9 w10", "w50 w51 w52", "w5 w6 w8", "w77 w1"]


def alone(pattern: str, prompt: str, **options) -> tuple[str, int]:
    """Text and number of tokens of plain generation."""
    model, tokenizer = tiny_model(pattern), word_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=[2, 33], do_sample=False, **options)
    kept = [token for token in output[0, ids.shape[1] :].tolist() if token not in (2, 33)]
    return tokenizer.decode(kept, skip_special_tokens=True), output.shape[1] - ids.shape[1]


@pytest.mark.parametrize("pattern", ["full", "mixed", "routed", "global_mixed"])
def test_concurrent_requests_get_what_each_gets_alone(pattern):
    def ask(number):
        prompt, length = PROMPTS[number % len(PROMPTS)], 6 + 5 * (number % 4)
        request = texts(prompt, max_tokens=length, stream=number % 3 == 0, stream_options={"include_usage": True})
        answer = client.post(TEXT, json=request)
        assert answer.status_code == 200
        if number % 3:
            body = answer.json()
            return prompt, length, body["choices"][0]["text"], body["usage"]["completion_tokens"]
        *chunks, last = events(answer.text)
        return prompt, length, "".join(c["choices"][0]["text"] for c in chunks), last["usage"]["completion_tokens"]

    with served(pattern, limits={"rows": 4, "cache_tokens": 150}) as (client, engine):
        rows = []
        engine.model.model.embed_tokens.register_forward_hook(lambda module, args, output: rows.append(len(output)))
        with ThreadPoolExecutor(9) as pool:
            answers = list(pool.map(ask, range(9)))
        wait_until(lambda: engine.active_rows == 0)
        assert engine._busy.cache is None
    for prompt, length, text, tokens in answers:
        assert (text, tokens) == alone(pattern, prompt, max_new_tokens=length)
    assert 1 < max(rows) <= 4


def test_chat_streamed_or_not_with_several_choices_seeds_and_log_probabilities():
    request = chat(temperature=1.0, seed=3, n=3, logprobs=True, top_logprobs=2)
    with served() as (client, engine):
        whole = client.post(CHAT, json=request).json()
        again = client.post(CHAT, json=request).json()
        chunks = events(client.post(CHAT, json={**request, "stream": True}).text)
    assert whole["object"] == "chat.completion" and whole["model"] == "tiny"
    contents = [choice["message"]["content"] for choice in whole["choices"]]
    assert contents == [choice["message"]["content"] for choice in again["choices"]]
    assert len(set(contents)) == 3
    for index, choice in enumerate(whole["choices"]):
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert parts[0]["delta"]["role"] == "assistant"
        assert "".join(part["delta"].get("content", "") for part in parts) == contents[index]
        assert [part["finish_reason"] for part in parts][-1] == choice["finish_reason"]
        entries = choice["logprobs"]["content"]
        assert [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]] == entries
        assert contents[index].split() == [entry["token"] for entry in entries if entry["token"][0] != "<"]
        for entry in entries:
            assert entry["logprob"] <= entry["top_logprobs"][0]["logprob"] <= 0
            assert len(entry["top_logprobs"]) == 2
    ids = word_tokenizer().apply_chat_template(request["messages"], add_generation_prompt=True)["input_ids"]
    with torch.no_grad():
        expected = tiny_model("mixed")(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    first = whole["choices"][0]["logprobs"]["content"][0]
    token = word_tokenizer().convert_tokens_to_ids(first["token"])
    assert first["logprob"] == pytest.approx(expected[token].item(), abs=1e-4)


def test_stop_strings_end_the_text_and_free_the_row():
    full, _ = alone("mixed", "w5 w6", max_new_tokens=60)
    word = full.split()[6]
    with served(step_seconds=0.01) as (client, engine):
        for stream in (False, True):
            answer = client.post(TEXT, json=texts(max_tokens=200, stop=["never", word], stream=stream))
            choices = [chunk["choices"][0] for chunk in (events(answer.text) if stream else [answer.json()])]
            assert "".join(choice["text"] for choice in choices) == full[: full.index(word)]
            assert choices[-1]["finish_reason"] == "stop"
            wait_until(lambda: engine.active_rows == 0)
    assert engine.generated_tokens < 2 * 60


def test_several_prompts_and_ids_in_one_request():
    with served() as (client, _):
        answer = client.post(TEXT, json=texts(PROMPTS[:3], n=2)).json()
        ids = word_tokenizer()(PROMPTS[0]).input_ids
        same = client.post(TEXT, json=texts(ids)).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for number, choice in enumerate(answer["choices"]):
        assert choice["text"] == alone("mixed", PROMPTS[number // 2], max_new_tokens=12)[0]
    assert same["choices"][0]["text"] == answer["choices"][0]["text"]
    assert answer["usage"]["prompt_tokens"] == sum(len(prompt.split()) for prompt in PROMPTS[:3])


@pytest.mark.parametrize(
    "path, body, status, said",
    [
        (TEXT, b'{"prompt": ', 400, "Invalid JSON"),
        (TEXT, b"\xff\xfe", 400, "Invalid JSON"),
        (TEXT, texts(temperature=-1), 400, "temperature"),
        (TEXT, texts(temperature="hot"), 400, "temperature"),
        (TEXT, texts(max_tokens=0), 400, "max_tokens"),
        (TEXT, texts(n=10**9), 400, "n=1000000000"),
        (TEXT, texts(["w5"] * 65), 400, "65 prompts"),
        (TEXT, texts(best_of=4), 400, "best_of"),
        (TEXT, texts(frequency_penalty=0.5), 400, "frequency_penalty"),
        (TEXT, texts(beams=4), 400, "beams"),
        (TEXT, texts(""), 400, "empty"),
        (TEXT, texts([5, 1000]), 400, "1000"),
        (TEXT, texts("w5 " * 300), 400, "300 tokens"),
        (TEXT, texts(max_tokens=100_000), 400, "context"),
        (TEXT, texts(model="gpt-4"), 404, "gpt-4"),
        (TEXT, texts("w5 " * 5000), 413, "4096 bytes"),
        (CHAT, chat(messages=[]), 400, "messages"),
        (CHAT, chat([{"type": "image_url", "image_url": {"url": "x"}}]), 400, "messages"),
        (CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "tools"),
        (CHAT, chat(chat_template_kwargs={"tokenize": False}), 400, "tokenize"),
        (CHAT, chat(messages=[{"role": "robot", "content": "w5"}]), 400, "role"),
        ("/v1/embeddings", texts(), 404, "/v1/embeddings"),
    ],
)
def test_what_cannot_be_answered_is_refused(refusing, path, body, status, said):
    client, engine = refusing
    answer = client.post(path, content=body) if isinstance(body, bytes) else client.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, said in error["message"]) == (status, True), error
    assert set(error) == {"message", "type", "param", "code"}
    assert engine.generated_tokens == 0


@pytest.fixture(scope="module")
def refusing():
    with served(max_body=4096) as pair:
        yield pair


def test_a_template_that_refuses_is_the_clients_fault():
    with served(template="{{ raise_exception('roles must alternate') }}") as (client, _):
        answer = client.post(CHAT, json=chat())
    assert answer.status_code == 400 and "roles must alternate" in answer.json()["error"]["message"]


def test_a_full_queue_refuses_and_whoever_waited_is_answered():
    with served(step_seconds=0.03, limits={"rows": 1, "queue": 2}) as (client, engine), ThreadPoolExecutor(3) as pool:
        running = [pool.submit(client.post, TEXT, json=texts(max_tokens=100, min_tokens=100)) for _ in range(1)]
        wait_until(lambda: engine.active_rows == 1)
        running += [pool.submit(client.post, TEXT, json=texts(max_tokens=2)) for _ in range(2)]
        wait_until(lambda: engine.waiting == 2)
        refused = client.post(TEXT, json=texts())
        both = client.post(TEXT, json=texts(["w5", "w6"]))
        assert [future.result().status_code for future in running] == [200] * 3
    assert (refused.status_code, both.status_code) == (429, 429)
    assert refused.headers["retry-after"] == "1" and refused.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_at_once_costs_nothing(stream):
    body = json.dumps(texts(max_tokens=200, min_tokens=200, stream=stream)).encode()
    arriving = iter([{"type": "http.request", "body": body}])
    scope = {"type": "http", "method": "POST", "path": TEXT, "headers": [], "query_string": b"", "http_version": "1.1"}

    async def receive():
        return next(arriving, {"type": "http.disconnect"})

    async def send(message):
        pass

    with served(step_seconds=0.02) as (client, engine):
        client.portal.call(client.app, scope, receive, send)
        wait_until(lambda: engine.active_rows == engine.waiting == 0)
        assert engine.generated_tokens < 100
        assert client.get("/health").status_code == 200


def test_a_request_that_takes_too_long_is_ended():
    with served(step_seconds=0.03, timeout=0.3) as (client, engine):
        answer = client.post(TEXT, json=texts(max_tokens=200, min_tokens=200))
        assert answer.status_code == 504
        body = client.post(TEXT, json=texts(max_tokens=200, min_tokens=200, stream=True)).text
        assert '"code": "timeout"' in body and "[DONE]" in body
        wait_until(lambda: engine.active_rows == 0)
    assert engine.generated_tokens < 100


def test_a_step_that_fails_costs_its_requests_only():
    with served(step_seconds=0.01) as (client, engine), ThreadPoolExecutor(1) as pool:
        reading = engine._busy.read
        engine._busy.read = lambda wave: reading(wave) if len(wave.ids[0]) < 5 else (_ for _ in ()).throw(MemoryError("full"))
        slow = pool.submit(client.post, TEXT, json=texts(max_tokens=30, min_tokens=30))
        wait_until(lambda: engine.active_rows == 1)
        assert client.post(TEXT, json=texts("w5 w6 w7 w8 w9 w10")).status_code == 500
        assert slow.result().status_code == 200
        engine._busy.step = lambda: (_ for _ in ()).throw(RuntimeError("broken"))
        answer = client.post(TEXT, json=texts())
        assert answer.status_code == 500 and "broken" not in answer.text
        assert client.post(TEXT, json=texts()).json()["choices"][0]["text"] == alone("mixed", "w5 w6", max_new_tokens=12)[0]


def test_keys_models_health_and_metrics():
    with served(api_key="secret") as (client, engine):
        assert client.post(TEXT, json=texts()).status_code == 401
        assert client.get("/v1/models", headers={"authorization": "Bearer secre"}).status_code == 401
        client.headers["authorization"] = "Bearer secret"
        (model,) = client.get("/v1/models").json()["data"]
        assert (model["id"], model["max_model_len"]) == ("tiny", 256)
        assert client.get("/v1/models/tiny").json() == model
        assert client.get("/v1/models/other").status_code == 404
        assert client.post(TEXT, json=texts(max_tokens=5, min_tokens=5)).status_code == 200
        assert client.get("/health").json() == {"status": "ok"}
        lines = client.get("/metrics").text.splitlines()
        engine.stop()
        assert client.get("/health").status_code == 503
        assert client.post(TEXT, json=texts()).status_code == 503
    for line in (
        'deepseek_r1_generated_tokens_total{model="tiny"} 5.0',
        'deepseek_r1_prompt_tokens_total{model="tiny"} 2.0',
        'deepseek_r1_requests_total{model="tiny",path="/v1/completions",status="200"} 1.0',
        'deepseek_r1_requests_total{model="",path="/v1/completions",status="401"} 1.0',
        'deepseek_r1_first_token_seconds_count{model="tiny"} 1.0',
    ):
        assert line in lines


def test_stopping_ends_what_is_running():
    with served(step_seconds=0.03) as (client, engine), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, TEXT, json=texts(max_tokens=200, min_tokens=200))
        wait_until(lambda: engine.active_rows == 1)
        engine.stop()
        assert answer.result().status_code == 503
    assert threading.active_count() < 20


def test_a_model_of_another_library_is_refused():
    llama = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=97))
    with pytest.raises(ValueError, match="convert_checkpoint"):
        Engine(llama)


def test_a_canary_gets_its_share_and_the_same_users_each_time():
    canary = Canary(tiny_version("sinks", name="tiny-canary"), 0.3)
    with served(canary=canary) as (client, engine):
        users = [f"user {number}" for number in range(60)]
        first = {user: client.post(TEXT, json=texts(max_tokens=1, user=user)).json()["model"] for user in users}
        again = {user: client.post(TEXT, json=texts(max_tokens=1, user=user)).json()["model"] for user in users[:20]}
        asked = client.post(TEXT, json=texts(model="tiny-canary", user=users[0])).json()
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny", "tiny-canary"]
        assert client.post(TEXT, json=texts(model="tiny-other")).status_code == 404
        lines = client.get("/metrics").text.splitlines()
        canary.version.engine.stop()
        assert client.get("/health").status_code == 503
    assert again == {user: first[user] for user in users[:20]}
    given = list(first.values()).count("tiny-canary")
    assert 8 <= given <= 28  # 18 of 60 on average; the hashes are fixed
    assert asked["choices"][0]["text"] == alone("sinks", "w5 w6", max_new_tokens=12)[0]
    counted = given + list(again.values()).count("tiny-canary") + 1
    assert f'deepseek_r1_requests_total{{model="tiny-canary",path="/v1/completions",status="200"}} {counted}.0' in lines
    assert 'deepseek_r1_requests_total{model="",path="/v1/completions",status="404"} 1.0' in lines


def test_a_growing_share_keeps_the_users_it_has():
    def chosen(share: float) -> set[int]:
        versions = Versions(stable, Canary(candidate, share))
        return {n for n in range(200) if versions.choose(TextRequest(prompt="w5", user=f"user {n}")) is candidate}

    stable, candidate = tiny_version(), tiny_version(name="tiny-canary")
    assert chosen(0.0) == set() and chosen(0.1) < chosen(0.4) < chosen(1.0) == set(range(200))
    drawn = [Versions(stable, Canary(candidate, 0.5)).choose(TextRequest(prompt="w5")) for _ in range(200)]
    assert 50 < drawn.count(candidate) < 150
    with pytest.raises(ValueError, match="share of 1.5 must lie in 0 ... 1"):
        Canary(candidate, 1.5)
    with pytest.raises(ValueError, match="called 'tiny' like the served version"):
        Versions(stable, Canary(tiny_version(), 0.5))
