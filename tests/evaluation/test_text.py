import pytest
import torch
from transformers import PreTrainedTokenizerFast

from modeling_deepseek_r1.evaluation import (
    encode_text,
    leading_token_id,
    read_text,
    standard_library_text,
    text_digest,
    token_windows,
)


@pytest.mark.parametrize(("kind", "phrase"), [("prose", "The following table summarizes"), ("code", "class Decimal(")])
def test_standard_library_text_is_long_and_real(kind, phrase):
    text = standard_library_text(kind)
    assert len(text) > 200_000
    assert phrase in text


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'poems' is unknown, choose one of prose, code"):
        standard_library_text("poems")


def test_files_are_joined_in_order(tmp_path):
    (tmp_path / "a.txt").write_text("grüße", encoding="utf-8")
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    text = read_text([tmp_path / "a.txt", str(tmp_path / "b.txt")])
    assert text == "grüße\n\nsecond"
    assert text_digest(text) != text_digest(text + " ")


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.txt.*'prose' or 'code'"):
        read_text([tmp_path / "absent.txt"])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary is not UTF-8 text"):
        read_text([tmp_path / "binary"])
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match="empty"):
        read_text([tmp_path / "blank.txt"])


def test_encoding_adds_nothing_and_loses_nothing(byte_tokenizer):
    ids = encode_text(byte_tokenizer, "two\nlines")
    assert ids.dtype == torch.long
    assert byte_tokenizer.decode(ids) == "two\nlines"


def test_windows_follow_each_other():
    windows = token_windows(torch.arange(10), context_length=3, num_windows=3)
    assert windows.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_windows_start_with_bos_where_asked():
    windows = token_windows(torch.arange(10), context_length=4, num_windows=3, bos_token_id=77)
    assert windows.tolist() == [[77, 0, 1, 2], [77, 3, 4, 5], [77, 6, 7, 8]]


@pytest.mark.parametrize(
    ("shape", "length", "count", "message"),
    [
        ((1, 10), 3, 1, "shape"),
        ((10,), 1, 1, "context_length=1"),
        ((10,), 4, 0, "num_windows=0"),
        ((10,), 4, 3, "need 12 tokens"),
    ],
)
def test_bad_windows_are_refused(shape, length, count, message):
    with pytest.raises(ValueError, match=message):
        token_windows(torch.zeros(shape, dtype=torch.long), context_length=length, num_windows=count)


def test_leading_token_is_what_the_tokenizer_adds(byte_tokenizer):
    from tokenizers.processors import TemplateProcessing

    assert leading_token_id(byte_tokenizer) is None
    backend = type(byte_tokenizer.backend_tokenizer).from_str(byte_tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<bos>"])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    assert leading_token_id(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")) == bos
