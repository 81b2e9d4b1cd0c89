"""A byte tokenizer with ChatML's special tokens, and chat templates of several kinds."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like DeepSeek-R1's: reasoning leaves the earlier answers, and the generation prompt opens it.
REASONING = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "[A]{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}<|im_end|>"
    "{% else %}[U]{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}[A]<think>{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token per byte, numbers below 259; special tokens 0 ... 2."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def learned_text(tokenizer, example: dict) -> list[str]:
    """The runs of learned tokens of an example, decoded."""
    runs, last = [], False
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (token, -100)
        if label != -100:
            runs = runs if last else [*runs, []]
            runs[-1].append(token)
        last = label != -100
    return [tokenizer.decode(run) for run in runs]
