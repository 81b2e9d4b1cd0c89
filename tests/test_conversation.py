"""Conversations keep their cache and answer as if they had none; commands read prompts and refuse nonsense."""

import io

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_deepseek_r1.cli import main
from modeling_deepseek_r1.generation import Conversation, SegmentedCache
from modeling_deepseek_r1.tokenization import encode_messages, encode_prompt
from tests.models import tiny_model

TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)
WORDS = ["<pad>", "<s>", "</s>", "user", "assistant", "system", *(f"w{i}" for i in range(91))]


def word_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


@pytest.fixture
def checkpoint(tmp_path):
    tiny_model("mixed").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_turns_equal_a_conversation_without_a_cache():
    model, tokenizer = tiny_model("mixed"), word_tokenizer()
    conversation = Conversation(model, tokenizer, {"max_new_tokens": 9, "do_sample": False})
    lengths = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
    for turn in ("w5 w6 w7 w8", "w9 w10", "w11 w12 w13"):
        messages = [*conversation.messages, {"role": "user", "content": turn}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
        expected = model.generate(ids, max_new_tokens=9, do_sample=False, use_cache=False)[0, ids.shape[1] :]
        lengths.clear()
        assert conversation.say(turn) == tokenizer.decode(expected, skip_special_tokens=True)
        assert lengths[0] == ids.shape[1] or lengths[0] < ids.shape[1] - 5
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 3
    conversation.forget()
    assert conversation.messages == []


def test_a_conversation_goes_on_over_segments():
    model, tokenizer = tiny_model("mixed"), word_tokenizer()

    def make_cache():
        return SegmentedCache(model.config, 32)

    conversation = Conversation(model, tokenizer, {"max_new_tokens": 9, "do_sample": False}, make_cache=make_cache)
    for turn in ("w5 w6 w7 w8", "w9 w10", "w11 w12 w13"):
        messages = [*conversation.messages, {"role": "user", "content": turn}]
        ids = encode_messages(tokenizer, messages)
        expected = model.generate(ids, past_key_values=make_cache(), max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
        assert conversation.say(turn) == tokenizer.decode(expected, skip_special_tokens=True)
    assert ids.shape[1] > 32


def test_a_template_that_rewrites_history_is_answered_rightly():
    model = tiny_model("mixed")
    tokenizer = word_tokenizer(TEMPLATE.replace("m['content']", "(m['content'] if loop.last else 'w1')"))
    conversation = Conversation(model, tokenizer, {"max_new_tokens": 5, "do_sample": False})
    for turn in ("w5 w6 w7", "w9"):
        ids = tokenizer.apply_chat_template(
            [*conversation.messages, {"role": "user", "content": turn}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).input_ids
        expected = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert conversation.say(turn) == tokenizer.decode(expected, skip_special_tokens=True)


def test_prompts_are_encoded_by_template_or_raw():
    tokenizer = word_tokenizer()
    assert (
        tokenizer.decode(encode_prompt(tokenizer, "w5", system="w9")[0]) == "<s> system w9 </s> <s> user w5 </s> <s> assistant"
    )
    assert tokenizer.decode(encode_prompt(tokenizer, "w5 w6", raw=True)[0]) == "w5 w6"
    assert tokenizer.decode(encode_prompt(word_tokenizer(None), "w5 w6")[0]) == "w5 w6"
    with pytest.raises(ValueError, match="prompt is empty"):
        encode_prompt(tokenizer, "  \n")
    with pytest.raises(ValueError, match="needs a chat template"):
        encode_prompt(tokenizer, "w5", system="w9", raw=True)
    with pytest.raises(ValueError, match="no chat template"):
        Conversation(tiny_model(), word_tokenizer(None))
    with pytest.raises(ValueError, match="message is empty"):
        Conversation(tiny_model(), tokenizer).say(" ")


def test_generate_command(checkpoint, capsys, monkeypatch):
    arguments = ["generate", checkpoint, "--max-new-tokens", "8", "--temperature", "0"]
    assert main([*arguments, "--prompt", "w5 w6"]) == 0
    first = capsys.readouterr().out
    assert len(first.split()) >= 4
    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6"))
    assert main(arguments) == 0
    assert capsys.readouterr().out == first
    assert main([*arguments, "--prompt", "w5 w6", "--segment-length", "40"]) == 0
    assert capsys.readouterr().out == first
    assert main([*arguments, "--prompt", "w5 w6", "--segment-length", "13"]) == 1
    assert "the largest window (7)" in capsys.readouterr().err
    sampled = ["generate", checkpoint, "--prompt", "w5", "--max-new-tokens", "30", "--temperature", "2", "--seed"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*sampled, seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_chat_command(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6\n\n/reset\nw5 w6\n/exit\nw7\n"))
    assert main(["chat", checkpoint, "--max-new-tokens", "8", "--temperature", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["--temperature", "-1"], "--temperature -1.0 must be 0"),
        (["--top-p", "1.5"], r"--top-p 1.5 must lie in (0, 1]"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["--compile", "--image", "a.png"], "--compile is for texts"),
    ],
)
def test_generate_refuses_nonsense_in_one_line(checkpoint, arguments, message, capsys):
    prompt = [] if "--prompt-file" in arguments else ["--prompt", "w5"]
    assert main(["generate", checkpoint, *prompt, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_generate_refuses_an_empty_prompt_and_a_missing_checkpoint(checkpoint, tmp_path, capsys):
    assert main(["generate", checkpoint, "--prompt", ""]) == 1
    assert "prompt is empty" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "nothing"), "--prompt", "w5"]) == 1
    assert "nothing" in capsys.readouterr().err.splitlines()[-1]
