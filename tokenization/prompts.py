"""Prompts and conversations as token ids, by the checkpoint's chat template."""

import torch


def encode_prompt(tokenizer, prompt: str, *, system: str | None = None, raw: bool = False) -> torch.Tensor:
    """Token ids `[1, n]` of a prompt.

    Args:
        tokenizer: the checkpoint's.
        prompt: what the user says, or with `raw` the beginning of a text.
        system: instructions that come before it.
        raw: continue the text as it is instead of answering it by the chat template. Without a template this is so anyway.

    Raises:
        ValueError: an empty prompt, or a system message where there is no template to put it in.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; give at least one word")
    if raw or not tokenizer.chat_template:
        if system:
            raise ValueError("a system message needs a chat template, and this prompt is continued as plain text")
        return tokenizer(prompt, return_tensors="pt").input_ids
    messages = [{"role": "system", "content": system}] if system else []
    return encode_messages(tokenizer, [*messages, {"role": "user", "content": prompt}])


def encode_messages(tokenizer, messages: list[dict[str, str]]) -> torch.Tensor:
    """Token ids `[1, n]` of a conversation `{"role": ..., "content": ...}`, up to where the model is to answer."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids
