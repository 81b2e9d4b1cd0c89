"""A tokenizer in DeepSeek-R1's manner: its special tokens, its way to split text, its chat template, and how answers parse.

Converted checkpoints keep the tokenizer of their source; this one is for models that are trained from nothing.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
TOOL_TOKENS = [f"<｜tool▁{name}▁{end}｜>" for name in ("calls", "call", "outputs", "output") for end in ("begin", "end")]
SPECIAL_TOKENS = [BOS, EOS, PAD, USER, ASSISTANT, *TOOL_TOKENS, "<｜tool▁sep｜>"]
VISIBLE_TOKENS = ["<think>", "</think>"]
"""Tokens of their own that decoding shows."""

SPLITS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""Numbers in threes, Chinese and Japanese writing, and words, punctuation and white space."""

CHAT_TEMPLATE = """
{%- set ns = namespace(system='', outputs=false) -%}
{%- for message in messages if message['role'] == 'system' -%}
  {%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') + message['content'] -%}
{%- endfor -%}
{%- if tools -%}
  {%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') + 'You can call these functions:\\n' + (tools | tojson) -%}
{%- endif -%}
{{- bos_token + ns.system -}}
{%- for message in messages -%}
  {%- if ns.outputs and message['role'] != 'tool' -%}{{- '<｜tool▁outputs▁end｜>' -}}{%- set ns.outputs = false -%}{%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- '<｜User｜>' + message['content'] -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- '<｜Assistant｜>' -}}
    {%- if loop.last and message['reasoning_content'] -%}
      {{- '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' -}}
    {%- endif -%}
    {%- if message['content'] -%}
      {{- message['content'] if loop.last else message['content'].split('</think>')[-1].lstrip() -}}
    {%- endif -%}
    {%- if message['tool_calls'] -%}
      {{- '<｜tool▁calls▁begin｜>' -}}
      {%- for call in message['tool_calls'] -%}
        {%- set own = call['function'] -%}
        {%- set given = own['arguments'] if own['arguments'] is string else own['arguments'] | tojson -%}
        {{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + own['name'] + '\\n```json\\n' + given + '\\n```<｜tool▁call▁end｜>' -}}
      {%- endfor -%}
      {{- '<｜tool▁calls▁end｜>' -}}
    {%- endif -%}
    {{- eos_token -}}
  {%- elif message['role'] == 'tool' -%}
    {{- '' if ns.outputs else '<｜tool▁outputs▁begin｜>' -}}{%- set ns.outputs = true -%}
    {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if ns.outputs -%}{{- '<｜tool▁outputs▁end｜>' -}}{%- endif -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}
"""
"""Reasoning leaves all answers but the last; a generation prompt opens it."""

RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": ASSISTANT,
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": "(?:<｜tool▁calls▁begin｜>|\n)?<｜tool▁call▁begin｜>function<｜tool▁sep｜>(?P<name>[^\n]+)\n```json\n",
            "close_pattern": "\n```<｜tool▁call▁end｜>(?:<｜tool▁calls▁end｜>)?",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": EOS, "content": "text"},
    },
}
"""How transformers' `parse_response` takes an answer apart."""


def response_template(chat_template: str | None) -> dict | None:
    """`RESPONSE_TEMPLATE` for a chat template in DeepSeek-R1's manner; None for any other."""
    return RESPONSE_TEMPLATE if ASSISTANT in (chat_template or "") else None


class DeepseekR1Tokenizer(PreTrainedTokenizerFast):
    """Byte-level BPE with DeepSeek-R1's special tokens and chat template.

    It is saved as a plain fast tokenizer, which loads without this package.

    Example:

    ```python
    tokenizer = DeepseekR1Tokenizer.train(texts, vocab_size=32000)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    tokenizer.parse_response(answer, prefix=prompt)  # {"role": ..., "reasoning_content": ..., "content": ...}
    ```"""

    def __init__(self, tokenizer_object: Tokenizer | None = None, **kwargs):
        defaults = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "clean_up_tokenization_spaces": False}
        defaults |= {"chat_template": CHAT_TEMPLATE.strip(), "response_template": RESPONSE_TEMPLATE}
        super().__init__(tokenizer_object=tokenizer_object, **{**defaults, **kwargs})

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, **kwargs) -> "DeepseekR1Tokenizer":
        """Learns merges from texts.

        Args:
            vocab_size: tokens in all, with the special ones and the 256 bytes.
            kwargs: of the tokenizer.

        Raises:
            ValueError: a vocabulary that has no room for bytes and special tokens.
        """
        least = 256 + len(SPECIAL_TOKENS) + len(VISIBLE_TOKENS)
        if vocab_size < least:
            raise ValueError(f"vocab_size={vocab_size} must be at least {least}: the bytes and the special tokens")
        backend = Tokenizer(models.BPE())
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITS]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = [*SPECIAL_TOKENS, *VISIBLE_TOKENS]
        settings = {"vocab_size": vocab_size, "initial_alphabet": alphabet, "special_tokens": special, "show_progress": False}
        backend.train_from_iterator(texts, trainers.BpeTrainer(**settings))
        pieces = [(BOS, backend.token_to_id(BOS))]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=pieces
        )
        return cls(tokenizer_object=_showing(backend), **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs) -> tuple[str, ...]:
        files = super().save_pretrained(save_directory, *args, **kwargs)
        file = Path(save_directory, "tokenizer_config.json")
        fields = json.loads(file.read_text(encoding="utf-8"))
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return files


def _showing(backend: Tokenizer) -> Tokenizer:
    """The tokenizer with the marks of reasoning as tokens that are not left out of decoded text."""
    document = json.loads(backend.to_str())
    for token in document["added_tokens"]:
        token["special"] = token["content"] not in VISIBLE_TOKENS
    return Tokenizer.from_str(json.dumps(document))


__all__ = ["DeepseekR1Tokenizer", "response_template"]
