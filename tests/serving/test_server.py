"""A real process: clients that leave, read slowly or send slowly, and a stop that lets answers end."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import psutil
import pytest

from tests.models import tiny_model
from tests.serving.clients import TEXT, events, texts, wait_until
from tests.test_conversation import word_tokenizer

LONG = {"max_tokens": 4000, "min_tokens": 4000}


def save(folder) -> None:
    tiny_model("mixed", max_position_embeddings=8192).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    (folder / "key").write_text("secret\n", encoding="utf-8")


@contextlib.contextmanager
def server(checkpoint, *options: str):
    """Process, client and its port; the process is dead afterwards."""
    command = [sys.executable, "-m", "modeling_deepseek_r1.cli", "serve", str(checkpoint), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        for line in process.stderr:
            if found := re.search(r"running on http://127.0.0.1:(\d+)", line):
                break
        else:
            raise AssertionError("the server has not started")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        with httpx2.Client(base_url=f"http://127.0.0.1:{found[1]}", timeout=60) as client:
            yield process, client, int(found[1])
    finally:
        process.kill()
        process.wait()


def gauge(client, name: str) -> float:
    return float(re.search(rf"^deepseek_r1_{name}{{.*?}} (\S+)$", client.get("/metrics").text, re.MULTILINE)[1])


def raw(port: int, body: bytes, length: int | None = None) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    head = f"POST {TEXT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length or len(body)}\r\n"
    connection.sendall(f"{head}authorization: Bearer secret\r\n\r\n".encode() + body)
    return connection


def test_clients_that_leave_or_are_slow_and_a_stop_that_lets_answers_end(tmp_path):
    save(tmp_path)
    options = "--rows", "3", "--max-body", "20000", "--api-key-file", str(tmp_path / "key"), "--grace", "60"
    with server(tmp_path, *options) as (process, client, port):
        assert client.post(TEXT, json=texts()).status_code == 401
        client.headers["authorization"] = "Bearer secret"
        leave_and_be_slow(client, port)
        with client.stream("POST", TEXT, json=texts(stream=True, max_tokens=300, min_tokens=300)) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            chunks = events("\n\n".join(line for line in lines if line))
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert process.wait(30) == 0
        with pytest.raises(httpx2.ConnectError):
            client.get("/health")


def leave_and_be_slow(client, port: int) -> None:
    """Rows of those that leave are free again, and nobody waits for those that are slow."""
    expected = client.post(TEXT, json=texts()).json()["choices"]
    with client.stream("POST", TEXT, json=texts(stream=True, **LONG)) as answer:
        lines = answer.iter_lines()  # kept: with it, the connection would end
        assert next(lines).startswith("data: ")
        whole = raw(port, json.dumps(texts(**LONG)).encode())  # not streamed
        slow = raw(port, json.dumps(texts(stream=True, max_tokens=300, min_tokens=300)).encode())  # and not read yet
        sending = raw(port, b'{"prompt": ', length=100)  # and never complete
        wait_until(lambda: gauge(client, "active_rows") == 3)
        waiting = raw(port, json.dumps(texts(**LONG)).encode())
        wait_until(lambda: gauge(client, "waiting") == 1)
        waiting.close()
        wait_until(lambda: gauge(client, "waiting") == 0)
    whole.close()
    wait_until(lambda: gauge(client, "active_rows") <= 1)
    assert client.post(TEXT, json=texts()).json()["choices"] == expected
    assert client.post(TEXT, content=b"x" * 30000).status_code == 413
    sending.close()
    received = b""
    while b"[DONE]" not in received:
        received += slow.recv(1000)
    slow.close()
    body = b"".join(re.findall(rb"data: .*\n\n", received)).decode()
    assert events(body)[-1]["choices"][0]["finish_reason"] == "length"
    wait_until(lambda: gauge(client, "active_rows") == 0)
    assert 'status="499"' in client.get("/metrics").text
    assert gauge(client, "generated_tokens_total") < 3 * 4000


@pytest.mark.slow
def test_hundreds_of_requests_of_all_kinds(tmp_path):
    """None lost, none mixed up, and memory where it was."""
    save(tmp_path)
    prompts = [f"w{number} w{number % 7 + 60} w{number % 13}" for number in range(5, 25)]
    kinds = ["whole", "streamed", "leaves", "oversized", "malformed", "slow"]

    def ask(number: int) -> None:
        prompt, kind = prompts[number * 7 % len(prompts)], kinds[number % len(kinds)]
        if kind in ("oversized", "malformed"):
            body = b"[" * (30000 if kind == "oversized" else 10)
            assert client.post(TEXT, content=body).status_code == (413 if kind == "oversized" else 400)
        elif kind == "whole":
            assert client.post(TEXT, json=texts(prompt)).json()["choices"][0]["text"] == expected[prompt]
        else:
            request = texts(prompt, stream=True, **(LONG if kind == "leaves" else {}))
            with client.stream("POST", TEXT, json=request) as answer:
                lines = answer.iter_lines()
                first = next(lines)
                if kind == "leaves":
                    return
                time.sleep(0.2 if kind == "slow" else 0)
                chunks = events("\n\n".join([first, *(line for line in lines if line)]))
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected[prompt]
            assert chunks[-1]["choices"][0]["finish_reason"] in ("length", "stop")

    with server(tmp_path, "--rows", "6", "--max-body", "20000", "--api-key-file", str(tmp_path / "key")) as (
        process,
        client,
        _,
    ):
        client.headers["authorization"] = "Bearer secret"
        expected = {prompt: client.post(TEXT, json=texts(prompt)).json()["choices"][0]["text"] for prompt in prompts}
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(ask, range(60)))
            before = psutil.Process(process.pid).memory_info().rss
            list(pool.map(ask, range(500)))
        wait_until(lambda: gauge(client, "active_rows") == gauge(client, "waiting") == 0)
        assert psutil.Process(process.pid).memory_info().rss < before + 100 * 2**20
