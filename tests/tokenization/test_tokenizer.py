import pytest
from transformers import AutoTokenizer

from modeling_deepseek_r1 import DeepseekR1Tokenizer
from modeling_deepseek_r1.tokenization.tokenization_deepseek_r1 import response_template

TEXTS = ["The quick brown fox 12345 jumps.", "def f(x):\n    return x + 1\n", "你好 世界 naïve café"] * 20
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, 3]}}}


@pytest.fixture(scope="module")
def tokenizer():
    return DeepseekR1Tokenizer.train(TEXTS, 400)


@pytest.mark.parametrize("text", ["The quick fox", "  spaces \n\n and\ttabs", "你好 café 1234567 ☃", "a<think>b</think>c"])
def test_text_comes_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids, skip_special_tokens=True) == text


def test_numbers_are_split_in_threes_and_marks_are_one_token(tokenizer):
    pieces = [text for text, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a1234567 b")]
    assert pieces == ["a", "123", "456", "7", "Ġb"]
    assert len(tokenizer("<think>", add_special_tokens=False).input_ids) == 1


def test_save_and_load_without_this_class(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded).__module__.startswith("transformers.")
    assert loaded("The fox 12").input_ids == tokenizer("The fox 12").input_ids
    assert loaded.chat_template == tokenizer.chat_template and loaded.response_template == tokenizer.response_template
    with pytest.raises(ValueError, match="vocab_size=200 must be at least"):
        DeepseekR1Tokenizer.train(TEXTS, 200)


def test_conversations(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+5?"},
        {"role": "assistant", "content": "<think>a sum</think>\n\nI ask.", "tool_calls": [CALL]},
        {"role": "tool", "content": "6"},
        {"role": "tool", "content": "six"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>1+5?<｜Assistant｜>I ask.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function"
        '<｜tool▁sep｜>add\n```json\n{"a": 1, "b": [2, 3]}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>6<｜tool▁output▁end｜><｜tool▁output▁begin｜>six<｜tool▁output▁end｜>"
        "<｜tool▁outputs▁end｜><｜Assistant｜><think>\n"
    )
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    assert '"name": "add"' in tokenizer.apply_chat_template(messages[:2], tools=tools, tokenize=False)


def test_an_answer_is_taken_apart(tokenizer):
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "1+5?"}], tokenize=False, add_generation_prompt=True)
    answer = "a sum\n</think>\n\nSix.<｜end▁of▁sentence｜>"
    parsed = tokenizer.parse_response(answer, prefix=prompt)
    assert parsed["reasoning_content"].strip() == "a sum" and parsed["content"].strip() == "Six."
    message = {"role": "assistant", "reasoning_content": "hm", "content": "Let me see.", "tool_calls": [CALL, CALL]}
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "?"}, message], tokenize=False)
    prefix, answer = rendered.split("<｜Assistant｜>")
    parsed = tokenizer.parse_response(answer, prefix=prefix + "<｜Assistant｜>")
    assert parsed["tool_calls"] == [CALL, CALL] and parsed["content"].strip() == "Let me see."
    assert parsed["reasoning_content"].strip() == "hm"
    # DeepSeek-R1's own template puts every call on a line of its own.
    lines = answer.replace("<｜tool▁call▁end｜><｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>")
    assert lines != answer
    assert tokenizer.parse_response(lines, prefix=prefix + "<｜Assistant｜>") == parsed


def test_a_template_in_this_manner_is_known():
    assert response_template("{{ '<｜Assistant｜>' }}")["fields"].keys() >= {"reasoning_content", "tool_calls"}
    assert response_template(None) is response_template("<|im_start|>") is None
