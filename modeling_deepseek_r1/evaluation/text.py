"""Long real text for measurements: the user's own files, or text that every Python installation carries.

`"prose"` is the language reference that `help()` prints (`pydoc_data.topics`), about 100K tokens of English in common
vocabularies; `"code"` is the source of two long modules, `_pydecimal` and `typing`. The text depends on the Python version,
so a result names both that version and `text_digest`.
"""

import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

import torch

BUILT_IN_TEXTS = ("prose", "code")
_CODE_MODULES = ("_pydecimal", "typing")


def standard_library_text(kind: str = "prose") -> str:
    """Real text of the running Python's standard library.

    Args:
        kind: one of `BUILT_IN_TEXTS`.

    Raises:
        ValueError: `kind` is unknown.
        OSError: this Python ships without the sources.
    """
    if kind == "prose":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name].strip() for name in sorted(topics))
    if kind == "code":
        return "\n\n".join(_module_source(name) for name in _CODE_MODULES)
    raise ValueError(f"text kind {kind!r} is unknown, choose one of {', '.join(BUILT_IN_TEXTS)}")


def _module_source(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise OSError(f"the source of the standard library's module {name!r} is not installed; pass text files instead")
    return Path(spec.origin).read_text(encoding="utf-8")


def read_text(sources: Iterable[str | Path] = ("prose",)) -> str:
    """Joins texts: each source is a name of `BUILT_IN_TEXTS` or the path of a UTF-8 text file.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not UTF-8 text, or all of it together is empty.
    """
    parts = [_read_source(source) for source in sources]
    text = "\n\n".join(parts)
    if not text.strip():
        raise ValueError("the text to evaluate on is empty")
    return text


def _read_source(source: str | Path) -> str:
    if isinstance(source, str) and source in BUILT_IN_TEXTS:
        return standard_library_text(source)
    try:
        return Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error}") from error
    except FileNotFoundError as error:
        names = " or ".join(repr(name) for name in BUILT_IN_TEXTS)
        raise FileNotFoundError(f"no text file {source!s} (a built-in text is called {names})") from error


def text_digest(text: str) -> str:
    """SHA-256 of the UTF-8 bytes, hexadecimal: two results with the same digest read the same text."""
    return hashlib.sha256(text.encode()).hexdigest()


def encode_text(tokenizer, text: str) -> torch.Tensor:
    """Token ids `[tokens]` (int64) without special tokens; documents longer than the model's context are what is wanted here."""
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def leading_token_id(tokenizer) -> int | None:
    """The token that this tokenizer puts in front of a text by itself (Llama 3: yes, SmolLM2 and Qwen: none)."""
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def token_windows(
    input_ids: torch.Tensor, *, context_length: int, num_windows: int, bos_token_id: int | None = None
) -> torch.Tensor:
    """The first `num_windows` non-overlapping windows of a text.

    Args:
        input_ids: `[tokens]`.
        context_length: tokens per window, a leading `bos_token_id` included.
        num_windows: how many windows.
        bos_token_id: put in front of every window, for models that were trained so.

    Returns:
        `[num_windows, context_length]`, int64.

    Raises:
        ValueError: a shape or count that makes no sense, or a text with too few tokens.
    """
    if input_ids.dim() != 1:
        raise ValueError(f"input_ids must have shape [tokens], got {list(input_ids.shape)}")
    if context_length < 2 or num_windows < 1:
        raise ValueError(f"context_length={context_length} must be 2 or more and num_windows={num_windows} 1 or more")
    stride = context_length - (bos_token_id is not None)
    needed = stride * num_windows
    if needed > input_ids.numel():
        raise ValueError(
            f"{num_windows} windows of {context_length} tokens need {needed} tokens of text, but there are {input_ids.numel()}"
        )
    windows = input_ids[:needed].reshape(num_windows, stride)
    if bos_token_id is None:
        return windows
    return torch.cat([windows.new_full((num_windows, 1), bos_token_id), windows], dim=1)
