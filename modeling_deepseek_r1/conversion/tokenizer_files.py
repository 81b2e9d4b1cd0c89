"""Carrying a checkpoint's tokenizer and generation settings over.

Files of a folder are copied as they are. A GGUF file holds a vocabulary and special token ids, from which transformers builds a
tokenizer; where that tokenizer disagrees with the ids in the file, it is corrected, because the embeddings follow the file.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from ..tokenization.tokenization_deepseek_r1 import response_template
from .source import GENERATION_FILE, TOKENIZER_FILES

CONTROL, USER_DEFINED = 3, 4
"""GGUF token types: control tokens are special, user-defined ones are only never split."""

SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
STOP_KEYS = ("eos", "eot", "eom")
END_OF_TURN = ("<|im_end|>", "<|eot_id|>")
"""Tokens that end an answer wherever the chat template uses them, also if the configuration names another end of text."""

BOS_BY_DEFAULT = ("llama3", "llama-v3", "llama-bpe")
"""Byte-level vocabularies that start with the bos token although their GGUF files need not say so."""


@dataclass
class Vocabulary:
    """What generation needs to know of a tokenizer: ids of special tokens, the chat template and the end token's id."""

    special_ids: dict[str, int] = field(default_factory=dict)
    chat_template: str = ""
    stop_ids: list[int] = field(default_factory=list)


def find_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Files of `folder` that match, as paths relative to it, each once."""
    found = {path.relative_to(folder) for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def copy_tokenizer(folder: Path, destination: Path, model_type: str) -> None:
    """Copies a folder's tokenizer; only a missing or misleading class name is corrected.

    Which class reads the files otherwise depends on the model type, and that one changes.
    """
    for file in find_files(folder, TOKENIZER_FILES):
        (destination / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / file, destination / file)
    settings_file, tokenizer_file = destination / "tokenizer_config.json", destination / "tokenizer.json"
    settings = _json(settings_file)
    named = settings.get("tokenizer_class")
    if tokenizer_file.is_file() and (named is None or (named.startswith("LlamaTokenizer") and _is_byte_level(tokenizer_file))):
        # tokenizer.json is complete; LlamaTokenizer would replace its byte-level splitting by SentencePiece's.
        named = "PreTrainedTokenizerFast"
    elif named is None and find_files(destination, TOKENIZER_FILES):
        named = TOKENIZER_MAPPING_NAMES.get(model_type)
    if named is not None and named != settings.get("tokenizer_class"):
        settings["tokenizer_class"] = named
        settings_file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def folder_vocabulary(folder: Path) -> Vocabulary:
    """Special tokens of a folder's tokenizer, read from its JSON files."""
    settings = _json(folder / "tokenizer_config.json")
    added = _json(folder / "tokenizer.json").get("added_tokens") or []
    special_ids = {token["content"]: token["id"] for token in added}
    special_ids |= {token["content"]: int(number) for number, token in (settings.get("added_tokens_decoder") or {}).items()}
    template_file = folder / "chat_template.jinja"
    template = template_file.read_text(encoding="utf-8") if template_file.is_file() else settings.get("chat_template") or ""
    eos = settings.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    stop_ids = [special_ids[eos]] if eos in special_ids else []
    return Vocabulary(special_ids, template if isinstance(template, str) else json.dumps(template), stop_ids)


def gguf_vocabulary(metadata: dict[str, Any]) -> Vocabulary:
    """Special tokens of a GGUF file's metadata."""
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    types = metadata.get("tokenizer.ggml.token_type") or []
    special_ids = {token: number for number, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind == CONTROL}
    keys = [f"tokenizer.ggml.{key}_token_id" for key in STOP_KEYS]
    stop_ids = [metadata[key] for key in keys if metadata.get(key) is not None]
    return Vocabulary(special_ids, metadata.get("tokenizer.chat_template") or "", stop_ids)


def write_generation_config(config: PreTrainedConfig, vocabulary: Vocabulary, vocab_size: int, destination: Path) -> None:
    """Writes generation_config.json for a checkpoint that has none.

    Generation stops at the configuration's end token, at the tokenizer's, and at the end of a turn in its chat template.
    """
    declared = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    turns = [vocabulary.special_ids.get(token) for token in END_OF_TURN if token in vocabulary.chat_template]
    candidates = dict.fromkeys([*vocabulary.stop_ids, *declared, *turns])
    stop = [number for number in candidates if number is not None and 0 <= number < vocab_size]
    eos = (stop if len(stop) > 1 else stop[0]) if stop else None
    settings = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=eos, pad_token_id=config.pad_token_id)
    settings.save_pretrained(destination, config_file_name=GENERATION_FILE)


def gguf_tokenizer(path: Path, metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, with every special token at the id that the file gives it.

    Raises:
        ValueError: the file has no vocabulary, or one that cannot be corrected.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError("the file holds no vocabulary")
    built = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL_TOKENS.items()}
    names = {name: tokens[number] for name, number in ids.items() if number is not None and number < len(tokens)}
    document = json.loads(built.backend_tokenizer.to_str())
    _restore_ids(document, tokens, metadata.get("tokenizer.ggml.token_type") or [], {ids[name] for name in names})
    backend = Tokenizer.from_str(json.dumps(document))
    _set_boundaries(backend, metadata, names)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        response_template=response_template(metadata.get("tokenizer.chat_template")),
        clean_up_tokenization_spaces=False,
        model_max_length=metadata[f"{metadata['general.architecture']}.context_length"],
        **names,
    )
    wrong = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    wrong = [f"{name} is {number}, not {ids[name]}" for name, number in wrong.items() if number != ids[name]]
    if wrong:
        raise ValueError(f"its special tokens get other ids than in the file: {', '.join(wrong)}")
    return tokenizer


def _restore_ids(document: dict[str, Any], tokens: list[str], types: list[int], special: set[int]) -> None:
    """Gives every control and user-defined token its own spelling and id in a tokenizer.json document.

    transformers respells tokens with characters outside of the byte alphabet (`<｜User｜>`) as if they were text, and then
    adds them a second time behind the vocabulary.
    """
    vocab = document["model"]["vocab"]
    if not isinstance(vocab, dict):
        return
    spelled = {number: token for token, number in vocab.items()}
    kept = special | {number for number, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)}
    for number in sorted(kept):
        if vocab.get(tokens[number]) != number:
            vocab.pop(spelled.get(number), None)
            vocab[tokens[number]] = number
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    document["added_tokens"] = [
        {
            "id": number,
            "content": tokens[number],
            **plain,
            "special": number in special or types[number : number + 1] == [CONTROL],
        }
        for number in sorted(kept)
        if vocab[tokens[number]] == number
    ]


def _set_boundaries(backend: Tokenizer, metadata: dict[str, Any], names: dict[str, str]) -> None:
    kind, splitting = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    starts = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or splitting in BOS_BY_DEFAULT)
    ends = metadata.get("tokenizer.ggml.add_eos_token", False)
    bos = [names["bos_token"]] if starts and "bos_token" in names else []
    eos = [names["eos_token"]] if ends and "eos_token" in names else []
    backend.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", *eos, *[f"{token}:1" for token in bos], "$B:1", *[f"{token}:1" for token in eos]],
        special_tokens=[(token, backend.token_to_id(token)) for token in {*bos, *eos}],
    )


def _is_byte_level(tokenizer_file: Path) -> bool:
    document = _json(tokenizer_file)
    parts = document.get("pre_tokenizer") or {}
    return any(part.get("type") == "ByteLevel" for part in [parts, *(parts.get("pretokenizers") or [])])


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
