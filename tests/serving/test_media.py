"""Images and sound in requests: answered in one batch with texts as generate() answers them alone; what cannot be read is refused."""

import base64
import io
import struct
import wave
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from modeling_deepseek_r1 import serving
from modeling_deepseek_r1.cli import main
from modeling_deepseek_r1.serving import MediaLimits
from tests.multimodal.models import multimodal_model
from tests.multimodal.test_model import TEXT as EXPERTS
from tests.serving.clients import CHAT, TEXT, chat, events, served, texts, wait_until
from tests.tokenization.test_processing import make_processor

PICTURES = [np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8) for seed in range(3)]
SOUND = (np.sin(np.arange(3200) / 10) * 20000).astype("<i2")


def image(pixels=PICTURES[0], kind="PNG", cut=None) -> dict:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return picture_of(file.getvalue()[:cut], kind.lower())


def picture_of(data: bytes, kind="png") -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}


def sound(samples=SOUND, rate=8000) -> dict:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(samples.tobytes())
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}}


def said(text: str) -> dict:
    return {"type": "text", "text": text}


def model_and_processor(pattern="mixed"):
    processor = make_processor()
    names = {"image": "image", "video": "video", "audio": "audio", "structured": "row"}
    ids = {f"{kind}_token_id": processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for kind, name in names.items()}
    fields = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 512, **EXPERTS.get(pattern, {})}
    return multimodal_model(pattern, text=fields, **ids), processor


CONTENTS = [
    [said("Look: "), image(PICTURES[0]), said(" what?")],
    "only text",
    [sound(), said("what is said?")],
    [image(PICTURES[1], "WEBP"), said(" between "), image(PICTURES[2], "JPEG"), sound(rate=16000)],
    "a longer text than the other one " * 3,
]


def alone(model, processor, content, **options) -> str:
    """What plain generate() says, with inputs that the processor reads by itself from what the client has sent."""
    blocks = [said(content)] if isinstance(content, str) else content
    plain = []
    for block in blocks:
        if block["type"] == "image_url":
            data = base64.b64decode(block["image_url"]["url"].partition(",")[2])
            plain.append({"type": "image", "image": Image.open(io.BytesIO(data))})
        elif block["type"] == "input_audio":
            with wave.open(io.BytesIO(base64.b64decode(block["input_audio"]["data"]))) as file:
                samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 2.0**15
                plain.append({"type": "audio", "audio": samples.astype(np.float32), "sampling_rate": file.getframerate()})
        else:
            plain.append(block)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": plain}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    never = [processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image", "video", "audio", "row")]
    with torch.no_grad():
        output = model.generate(
            **inputs, do_sample=False, eos_token_id=[2, 33], pad_token_id=0, suppress_tokens=never, **options
        )
    kept = [token for token in output[0, inputs["input_ids"].shape[1] :].tolist() if token not in (2, 33)]
    return processor.tokenizer.decode(kept, skip_special_tokens=True)


@pytest.mark.parametrize("pattern", ["routed_mixed", "expert_domains"])
def test_a_batch_of_images_sound_and_texts_gets_what_each_gets_alone(pattern):
    model, processor = model_and_processor(pattern)

    def ask(number):
        content, stream = CONTENTS[number % len(CONTENTS)], number % 3 == 0
        request = chat(content, max_tokens=6 + 5 * (number % 4), stream=stream, n=1 + number % 2)
        answer = client.post(CHAT, json=request)
        assert answer.status_code == 200, answer.text
        if stream:
            deltas = [c["choices"][0] for c in events(answer.text)]
            return ["".join(d["delta"].get("content", "") for d in deltas if d["index"] == i) for i in range(request["n"])]
        return [choice["message"]["content"] for choice in answer.json()["choices"]]

    mixed = []
    with served(model=model, tokenizer=processor.tokenizer, processor=processor, limits={"rows": 5}) as (client, engine):
        model.get_input_embeddings().register_forward_hook(
            lambda *_: mixed.append(engine._busy.memory is not None and set(engine._busy.memory.seen[:, 0].tolist()))
        )
        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(ask, range(10)))
        wait_until(lambda: engine.active_rows == 0)
        assert engine._busy.cache is None and engine._busy.memory is None
    assert any(seen and len(seen) > 2 and 0 in seen for seen in mixed)  # rows of text beside rows of different media
    expected = [alone(model, processor, CONTENTS[n % 5], max_new_tokens=6 + 5 * (n % 4)) for n in range(10)]
    assert answers == [[text] * (1 + n % 2) for n, text in enumerate(expected)]
    assert len({text[:6] for text in expected[:4]}) == 4


def test_features_matter_and_rows_without_any_do_not_feel_them():
    """The same question about other pictures, and a text beside them."""
    model, processor = model_and_processor()
    with served(model=model, tokenizer=processor.tokenizer, processor=processor, step_seconds=0.005) as (
        client,
        engine,
    ):

        def first(content):
            answer = client.post(CHAT, json=chat(content, max_tokens=40, min_tokens=40, logprobs=True)).json()
            return [entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"]]

        with ThreadPoolExecutor(3) as pool:
            one, two, text = pool.map(first, [[image(PICTURES[0]), said("a")], [image(PICTURES[1]), said("a")], "b"])
        assert first("b") == pytest.approx(text, abs=1e-4)
    assert abs(one[0] - two[0]) > 1e-3


def bomb(width: int, height: int) -> dict:
    """A small file of many pixels."""
    file = io.BytesIO()
    Image.new("1", (100, 100)).save(file, "PNG")
    head = b"IHDR" + struct.pack(">II", width, height) + file.getvalue()[24:29]
    return picture_of(b"\x89PNG\r\n\x1a\n\0\0\0\r" + head + struct.pack(">I", zlib.crc32(head)) + file.getvalue()[33:])


@pytest.mark.parametrize(
    "content, said_of_it",
    [
        ([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}], "fetches nothing"),
        ([{"type": "image_url", "image_url": {"url": "file:///etc/hosts"}}], "fetches nothing"),
        ([{"type": "image_url", "image_url": {"url": "/etc/hosts"}}], "fetches nothing"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png,abc"}}], "of the form"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,a*b"}}], "not base64"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}], "empty"),
        ([{"type": "image_url", "image_url": {"url": "data:,", "detail": "high"}}], "image_url.detail: "),
        ([picture_of(b"<svg/>", "svg+xml")], "no PNG, JPEG, WEBP, GIF image"),
        ([image(kind="TIFF")], "no PNG, JPEG, WEBP, GIF image"),
        ([said("a"), image(cut=200)], "messages.0.content.1: the image is damaged"),
        ([bomb(5000, 5000)], "5000 x 5000 pixels; a request may have 5000 in all"),
        ([bomb(60000, 60000)], "may have 5000 pixels"),
        ([image(np.zeros((60, 60, 3), np.uint8)), image(np.zeros((60, 60, 3), np.uint8))], "may have 5000 in all"),
        ([image()] * 4, "more than 3 images and clips"),
        ([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}], "empty"),
        ([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}}], "'wav'"),
        ([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}], "no PCM WAV file"),
        ([sound(SOUND[:0])], "is empty"),
        ([sound(rate=16001)], "16001 Hz is not read"),
        ([sound(rate=1)], "1 Hz is not read"),
        ([sound(np.zeros(20000, "<i2"))], "2.5 seconds of sound; a request may have 2"),
        ([{"type": "video_url", "video_url": {"url": "data:,"}}], "video_url"),
        ("what is <|image|>?", "stands for image input"),
        ([image(), said("<|image|>")], "2 placeholders"),
        ([image(), said("long " * 200)], "context"),
    ],
)
def test_what_cannot_be_read_is_the_clients_fault(refusing, content, said_of_it):
    client, engine = refusing
    answer = client.post(CHAT, json=chat(content))
    assert (answer.status_code, said_of_it in answer.json()["error"]["message"]) == (400, True), answer.text
    assert engine.prompt_tokens == 0


@pytest.fixture(scope="module")
def refusing():
    model, processor = model_and_processor()
    media = MediaLimits(items=3, pixels=5000, seconds=2.0)
    with served(model=model, tokenizer=processor.tokenizer, processor=processor, media=media) as pair:
        yield pair


def test_media_where_they_do_not_belong(refusing):
    client, engine = refusing
    placeholder = engine.model.config.placeholders["audio"]
    answers = [
        client.post(CHAT, json=chat(messages=[{"role": "system", "content": [image()]}, {"role": "user", "content": "a"}])),
        client.post(TEXT, json=texts([5, placeholder])),
    ]
    deaf = make_processor(feature_extractor=None)
    with served() as (text_only, _):
        answers.append(text_only.post(CHAT, json=chat([image()])))
    with served(model=model_and_processor()[0], tokenizer=deaf.tokenizer, processor=deaf) as (other, _):
        answers.append(other.post(CHAT, json=chat([sound()])))
    assert [answer.status_code for answer in answers] == [400] * 4
    messages = [answer.json()["error"]["message"] for answer in answers]
    for message, words in zip(
        messages,
        ("role user", "stands for audio", "no image input; it reads text", "no audio input; it reads text, image"),
        strict=True,
    ):
        assert words in message


def test_the_command_serves_a_composed_checkpoint_beside_its_canary(tmp_path, monkeypatch):
    model, processor = model_and_processor()
    for name in ("seeing", "canary"):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    apps = []
    monkeypatch.setattr(serving, "serve", lambda app, **_: apps.append(app))
    canary = ["--canary", str(tmp_path / "canary"), "--canary-share", "0"]
    assert main(["serve", str(tmp_path / "seeing"), *canary, "--max-media", "1", "--rows", "2"]) == 0
    with TestClient(apps[0]) as client:
        answers = [client.post(CHAT, json=chat([image(), said("what?")], model=name)) for name in ("seeing", "seeing-canary")]
        assert client.post(CHAT, json=chat([image(), image()])).status_code == 400
        large = client.post(CHAT, json=chat("a " * 2**20))
    assert [answer.json()["model"] for answer in answers] == ["seeing", "seeing-canary"]
    assert answers[0].json()["choices"] == answers[1].json()["choices"]
    assert large.status_code == 400  # beyond the context, but not too large: 2 MiB are room for text, 16 for pictures
    for wrong in (["--canary-share", "2"], ["--max-pixels", "0"]):
        assert main(["serve", str(tmp_path / "seeing"), *canary, *wrong]) == 1
