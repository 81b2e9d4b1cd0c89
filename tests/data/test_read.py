"""Every kind of file and folder, and what is wrong with them, by name and place."""

import json

import pytest

from modeling_deepseek_r1.data import open_data

ROWS = [{"text": "one", "label": "a"}, {"text": "two\nlines, and a comma", "label": "b"}]


def fields(records):
    return [record.fields for record in records]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "A.TXT"])
def test_a_text_file_is_one_document(name, tmp_path):
    records = open_data(write(tmp_path / name, "\ufeffzwölf\n\nlines\n"))
    assert fields(records) == [{"text": "zwölf\n\nlines\n"}]
    assert records.first().where.endswith(name)


def test_jsonl_and_csv(tmp_path):
    lines = write(tmp_path / "a.jsonl", "\n".join([json.dumps(ROWS[0]), "", json.dumps(ROWS[1])]))
    table = write(tmp_path / "a.csv", 'text,label\none,a\n"two\nlines, and a comma",b\n')
    assert fields(open_data([lines])) == fields(open_data([str(table)])) == ROWS
    assert [record.where for record in open_data(lines)] == [f"{lines} line 1", f"{lines} line 3"]


def test_parquet_and_datasets(tmp_path):
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "splits")
    sources = [tmp_path / "a.parquet", data, data.to_iterable_dataset(), ROWS, str(tmp_path / "saved"), tmp_path / "splits"]
    for source in sources:
        records = open_data(source)
        assert fields(records) == ROWS
        assert fields(records) == ROWS, "a second time"
    assert fields(open_data(tmp_path / "splits", split="test")) == ROWS[1:]
    assert fields(open_data(sources)) == ROWS * 6
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        open_data(tmp_path / "splits", split="dev")


def test_a_folder_is_read_in_order_and_says_what_it_leaves_out(tmp_path):
    for name in ("b/c.py", "b/a.txt", "a.md", "x.bin", "y.bin", ".hidden.txt", ".git/z.txt"):
        write(tmp_path / name, name)
    records = open_data(tmp_path)
    assert [record.fields["text"] for record in records] == ["a.md", "b/a.txt", "b/c.py"]
    assert records.notes == [f"{tmp_path}: left out 2 x .bin"]


def test_another_column_as_the_text(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"content": "x"}')
    assert open_data(file, text_column="content").first().fields["text"] == "x"
    with pytest.raises(ValueError, match="line 1: there is no column 'body'; the columns are content"):
        list(open_data(file, text_column="body"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xffdef", "a.txt is not UTF-8 text: byte 0xff at position 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', "a.jsonl is not UTF-8 text: byte 0xe9 at position 24"),
        ("a.csv", b"text\nabc\n\xfe\n", "a.csv is not UTF-8 text: byte 0xfe at position 9"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', "a.jsonl line 2 is not JSON: .* at column 8"),
        ("a.jsonl", b"[1]\n", "a.jsonl line 1: each line must be an object .*, not list"),
        ("a.csv", b"text,label\nx\n", "a.csv line 2 has 1 columns, the first line names 2"),
        ("a.csv", b'text\n"open', "a.csv line 2 is not CSV"),
        ("a.parquet", b"nothing", "a.parquet is not a Parquet file"),
    ],
)
def test_a_damaged_file_is_named_with_the_place(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        list(open_data(write(tmp_path / name, content)))


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(ValueError, match=r"files of kind '.pdf' cannot be read; known are .txt, .md"):
        open_data(write(tmp_path / "a.pdf", "x"))
    with pytest.raises(ValueError, match="holds no file that can be read"):
        open_data(tmp_path)
    for missing in (tmp_path / "none", "none.jsonl", "./none"):
        with pytest.raises(FileNotFoundError, match="no data file or folder"):
            open_data(missing)
    with pytest.raises(ValueError, match="no data is given"):
        open_data([])
    with pytest.raises(ValueError, match="a.jsonl: the data is empty"):
        open_data(write(tmp_path / "a.jsonl", "\n")).first()


def test_a_missing_datasets_package_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert fields(open_data(write(tmp_path / "a.txt", "x"))) == [{"text": "x"}]
    for source in (write(tmp_path / "a.parquet", "x"), "owner/name"):
        with pytest.raises(ImportError, match=r"modeling-deepseek-r1\[train\]"):
            open_data(source)
