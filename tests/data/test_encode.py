"""What is learned of a record: against expectations written by hand."""

import pytest

from modeling_deepseek_r1.data import Record, data_task, make_encoder, open_data
from modeling_deepseek_r1.data.encode import find_labels

from .tokenizers import MARKED, REASONING, learned_text, make_tokenizer

TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "  ho\n\nha "},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "end"},
    {"role": "user", "content": "never answered"},
]
CHATML_TEXT = (
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n  ho\n\nha <|im_end|>\n"
    "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\nend<|im_end|>\n"
)


def record(**fields):
    return Record(fields, "file line 7")


@pytest.mark.parametrize("template", [None, MARKED], ids=["rendered", "marked"])
def test_chatml_learns_the_answers_and_their_ends(template):
    tokenizer = make_tokenizer(*([template] if template else []))
    (example,) = make_encoder("chat", tokenizer)(record(messages=TALK))
    assert tokenizer.decode(example["input_ids"]) == CHATML_TEXT
    assert learned_text(tokenizer, example) == ["  ho\n\nha <|im_end|>", "end<|im_end|>"]


def test_labels_token_by_token():
    tokenizer = make_tokenizer()
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (example,) = make_encoder("chat", tokenizer)(record(messages=messages))
    prompt = tokenizer("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n").input_ids
    b, end, newline = tokenizer("b<|im_end|>\n").input_ids
    assert example["input_ids"] == [*prompt, b, end, newline]
    assert example["labels"] == [-100] * len(prompt) + [b, end, -100]


def test_answers_that_later_change_become_examples_of_their_own():
    tokenizer = make_tokenizer(REASONING)
    talk = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "<think>hm</think>one"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    examples = make_encoder("chat", tokenizer)(record(messages=talk))
    texts = [tokenizer.decode(example["input_ids"]) for example in examples]
    assert texts == ["[U]1[A]<think>hm</think>one<|im_end|>", "[U]1[A]one<|im_end|>[U]2[A]two<|im_end|>"]
    assert [learned_text(tokenizer, example) for example in examples] == [["hm</think>one<|im_end|>"], ["two<|im_end|>"]]


def test_prompt_and_completion():
    tokenizer = make_tokenizer()
    encode = make_encoder("chat", tokenizer)
    (example,) = encode(record(prompt="2+2=", completion="4"))
    assert tokenizer.decode(example["input_ids"]) == "2+2=4<|im_end|>"
    assert learned_text(tokenizer, example) == ["4<|im_end|>"]
    (example,) = encode(record(prompt=TALK[:4], completion=TALK[4:5]))
    assert tokenizer.decode(example["input_ids"]) == CHATML_TEXT
    assert learned_text(tokenizer, example) == ["end<|im_end|>"]


def test_tools_and_template_arguments_reach_the_template():
    tokenizer = make_tokenizer("{{ tools | length }}{{ mood }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
                               "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip
    talk = [{"role": "user", "content": "x", "name": None}, {"role": "assistant", "content": "y"}]
    fields = record(messages=talk, tools=[{"name": "f"}], chat_template_kwargs={"mood": "!"})
    (example,) = make_encoder("chat", tokenizer)(fields)
    assert tokenizer.decode(example["input_ids"]) == "1![user]x[assistant]y"
    assert learned_text(tokenizer, example) == ["y"]


def test_a_long_conversation_is_cut_and_counted():
    encode = make_encoder("chat", make_tokenizer(), max_length=30)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 40}]
    (example,) = encode(record(messages=talk))
    assert len(example["input_ids"]) == 30
    assert encode(record(messages=[{"role": "user", "content": "a" * 40}, *talk[1:]])) == []
    assert encode.notes == ["cut 1 conversations to 30 tokens", "left out 1 conversations whose answers begin after 30 tokens"]


def test_text_ends_with_the_end_token_and_empty_ones_are_counted():
    tokenizer = make_tokenizer()
    encode = make_encoder("text", tokenizer)
    (example,) = encode(record(text="ab"))
    assert tokenizer.decode(example["input_ids"]) == "ab<|im_end|>"
    assert encode(record(text=" \n")) == []
    assert encode.notes == ["left out 1 empty texts"]


def test_classes():
    records = open_data([{"text": "x", "label": label} for label in (10, 2, 10)])
    names = find_labels(records)
    assert names == ["2", "10"]
    encode = make_encoder("classification", make_tokenizer(), max_length=2, label_names=names)
    assert [encode(one)[0]["labels"] for one in records] == [1, 0, 1]
    assert len(encode(record(text="abc", label="2"))[0]["input_ids"]) == 2
    assert encode.notes == ["cut 1 texts to 2 tokens"]
    with pytest.raises(ValueError, match="file line 7: the label '3' is unknown; known are 2, 10"):
        encode(record(text="x", label=3))
    with pytest.raises(ValueError, match="1 kinds of labels"):
        find_labels(open_data([{"text": "x", "label": "a"}]))


@pytest.mark.parametrize(
    ("fields", "task"),
    [
        ({"text": 1}, "text"),
        ({"text": 1, "label": 1}, "classification"),
        ({"messages": []}, "chat"),
        ({"prompt": "", "completion": ""}, "chat"),
    ],
)
def test_the_columns_tell_the_task(fields, task):
    assert data_task(record(**fields)) == task


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        ("text", {"body": "x"}, "file line 7: the column 'text' must be a text; there is no such column"),
        ("text", {"text": 3}, "it is int"),
        ("chat", {"messages": "x"}, "must be a list of messages"),
        ("chat", {"messages": [{"role": "user", "content": "x"}]}, "has no message of the role 'assistant'"),
        ("chat", {"messages": [{"role": "assistant", "content": "x"}]}, "begins with an answer"),
        ("classification", {"text": " ", "label": "a"}, "the text is empty"),
        ("classification", {"text": "x"}, "the column 'label' must be a name or a whole number, not None"),
        ("classification", {"text": "x", "label": 0.5}, "not 0.5"),
        ("ranking", {}, "task 'ranking' is unknown"),
    ],
)
def test_wrong_records_are_named(task, fields, message):
    with pytest.raises(ValueError, match=message):
        make_encoder(task, make_tokenizer(), label_names=["a", "b"])(record(**fields))


def test_templates_that_cannot_be_used():
    with pytest.raises(ValueError, match="has no chat template"):
        make_encoder("chat", make_tokenizer(None))
    with pytest.raises(ValueError, match="file line 7: the chat template refuses the conversation: no system"):
        make_encoder("chat", make_tokenizer("{{ raise_exception('no system') }}"))(record(messages=TALK))
    with pytest.raises(ValueError, match="changes what comes before an answer"):
        counted = "{{ messages | length }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
        make_encoder("chat", make_tokenizer(counted))(record(messages=TALK))
    with pytest.raises(ValueError, match="needed are text, or messages"):
        data_task(record(body="x"))
