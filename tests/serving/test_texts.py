"""Texts that grow token by token are those that the whole would give; reasoning and calls go where they belong."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_deepseek_r1.serving.texts import GrowingText, Message, response_template


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("stop", [[], ["never", "endings"], ["ü"], ["中e"], ["ab", "ending", "b中"]])
def test_growing_text_is_the_whole_text_up_to_the_first_stop_string(stop):
    tokenizer, whole = byte_tokenizer(), "Grüße ab中en endin ending"
    text = GrowingText(tokenizer, stop)
    pieces = []
    for token in tokenizer(whole).input_ids:
        pieces.append(text.add(token))
        assert not any(word in "".join(pieces) for word in stop)
    pieces.append(text.finish())
    ends = [whole.index(word) for word in stop if word in whole]
    assert "".join(pieces) == whole[: min(ends, default=None)]
    assert text.stopped == bool(ends)


def test_bytes_that_are_no_character_are_shown_at_the_end():
    tokenizer, text = byte_tokenizer(), GrowingText(byte_tokenizer(), [])
    sent = [text.add(token) for token in tokenizer("xü").input_ids[:-1]]
    assert "".join([*sent, text.finish()]) == "x\ufffd"


HERMES, DEEPSEEK = "<think></think>{{ tools }}<tool_call>", "<think></think>{{ tools }}<｜tool▁call▁begin｜>"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "zwei"}}\n</tool_call>'
DEEPSEEK_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
    '{"a": 1, "b": "zwei"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    "template, prompt, text, reasoning, content, calls",
    [
        (None, "", "<think>a</think>b", "", "<think>a</think>b", 0),
        (HERMES, "", "<think>a < b</think>c", "a < b", "c", 0),
        (HERMES, "<assistant><think>\n", "a</think>b <c>", "a", "b <c>", 0),
        (HERMES, "<think>old</think> ask", "b", "", "b", 0),
        (HERMES, "", "well " + CALL + CALL, "", "well", 2),
        (HERMES, "", "<tool_call>{no json</tool_call> rest", "", "{no json rest", 0),
        (HERMES, "", "<think>cut off", "cut off", "", 0),
        (DEEPSEEK, "<think>", "why</think>" + DEEPSEEK_CALL, "why", "", 1),
    ],
)
def test_messages_are_taken_apart_however_they_are_cut(template, prompt, text, reasoning, content, calls, size):
    tokenizer = byte_tokenizer(template)
    message = Message(tokenizer, response_template(tokenizer), prompt, calls=True)
    parts = [message.add(text[start : start + size]) for start in range(0, len(text), size)] + [message.finish()]
    assert "".join(part.reasoning for part in parts).strip() == reasoning == message.whole.reasoning.strip()
    assert "".join(part.content for part in parts).strip() == content == message.whole.content.strip()
    assert [call["index"] for part in parts for call in part.calls] == list(range(calls))
    for call in message.whole.calls:
        assert call["function"]["name"] == "add"
        assert json.loads(call["function"]["arguments"]) == {"a": 1, "b": "zwei"}


def test_calls_that_nobody_asked_for_are_text():
    tokenizer = byte_tokenizer(HERMES)
    message = Message(tokenizer, response_template(tokenizer), "", calls=False)
    message.add(CALL), message.finish()
    assert message.whole.content == CALL and not message.whole.calls
