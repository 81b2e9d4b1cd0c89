import argparse
import json

import pytest
import torch
from conftest import make_byte_tokenizer, make_llama

from modeling_deepseek_r1.commands import evaluate
from modeling_deepseek_r1.evaluation import encode_text, load_model, perplexity, read_report, read_text


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two checkpoints of one vocabulary, and one of another."""
    root = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate(("first", "second", "foreign")):
        make_llama(seed, max_position_embeddings=1024).save_pretrained(root / name)
        tokenizer = make_byte_tokenizer()
        if name == "foreign":
            tokenizer.add_tokens(["<other>"])
        tokenizer.save_pretrained(root / name)
    return root


def evaluate_with(*arguments) -> None:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    evaluate.run(parser.parse_args([str(argument) for argument in arguments]))


SMALL = ("--lengths", 450, 600, "--windows", 2, "--questions", 1, "--depths", 0.5, "--repeats", 2, "--decode-tokens", 3)


def test_all_outputs_of_one_run(folders, tmp_path, capsys):
    output, table, picture = tmp_path / "result.json", tmp_path / "table.md", tmp_path / "plot.png"
    arguments = (folders / "first", "--against", folders / "second", "--labels", "dense", "hybrid", *SMALL)
    tasks = ("--tasks", "perplexity", "retrieval", "speed")
    evaluate_with(*arguments, *tasks, "--seed", 3, "--skip-tokens", 7, "--output", output, "--table", table, "--plot", picture)
    printed = capsys.readouterr()
    assert printed.out == table.read_text()
    assert printed.out.startswith("|  | Perplexity, 450 tokens | Perplexity, 600 tokens |")
    assert "perplexity of hybrid at 600 tokens: 2/2" in printed.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = read_report(output)
    assert list(result["models"]) == ["dense", "hybrid"]
    assert result["models"]["hybrid"]["checkpoint"] == str(folders / "second")
    assert result["models"]["hybrid"]["class"] == "LlamaForCausalLM"
    assert (result["settings"]["seed"], result["settings"]["lengths"]) == (3, [450, 600])
    assert result["settings"]["text_tokens"] > 100_000
    assert result["retrieval"]["dense"]["chance_seen"] == 0.2
    ids = encode_text(make_byte_tokenizer(), read_text())[7:]
    expected = perplexity(load_model(folders / "second"), ids, context_length=600, num_windows=2).to_dict()
    assert result["perplexity"]["hybrid"][1]["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    assert result["retrieval"]["dense"]["cells"][0]["seeds"] == [3]
    assert result["speed"]["baseline"] == "dense"
    assert "memory" not in result


def test_mean_blocks_as_a_further_model(folders, tmp_path):
    output = tmp_path / "result.json"
    tasks = ("--tasks", "perplexity", "retrieval", "--planted", 1, "--mean-blocks", 2)
    evaluate_with(folders / "first", *tasks, *SMALL[3:], "--lengths", 450, 800, "--output", output)
    result = read_report(output)
    assert list(result["models"]) == ["first", "2 mean blocks"]
    short, long = (result["perplexity"][label] for label in result["models"])
    assert short[0]["perplexity"] == pytest.approx(long[0]["perplexity"], rel=1e-5)
    assert short[1]["perplexity"] != pytest.approx(long[1]["perplexity"], rel=1e-6)
    assert result["retrieval"]["first"]["chance_seen"] == 1.0


@pytest.mark.slow
def test_memory_of_two_checkpoints(folders, tmp_path):
    arguments = (folders / "first", "--against", folders / "second", "--tasks", "memory", "--lengths", 512)
    evaluate_with(*arguments, "--output", tmp_path / "result.json")
    cells = read_report(tmp_path / "result.json")["memory"]["cells"]
    assert [cell["label"] for cell in cells] == ["first", "second"]
    assert all(cell["peak_bytes"]["median"] > 0 for cell in cells)


def test_same_seed_same_result(folders, tmp_path):
    paths = (tmp_path / "a.json", tmp_path / "b.json")
    for path in paths:
        evaluate_with(folders / "first", *SMALL, "--tasks", "perplexity", "retrieval", "--output", path)
    first, second = (json.loads(path.read_text()) for path in paths)
    assert first["perplexity"] == second["perplexity"]
    assert first["retrieval"] == second["retrieval"]


def test_user_text_dtype_and_threads(folders, tmp_path):
    (tmp_path / "mine.txt").write_text("Some words of mine. " * 60, encoding="utf-8")
    threads = torch.get_num_threads()
    try:
        arguments = ("--text", tmp_path / "mine.txt", "--dtype", "bfloat16", "--threads", 1)
        output = tmp_path / "result.json"
        evaluate_with(folders / "first", *SMALL, *arguments, "--tasks", "perplexity", "--output", output)
    finally:
        torch.set_num_threads(threads)
    result = read_report(output)
    assert result["settings"]["text_tokens"] == 1200
    assert (result["environment"]["dtype"], result["environment"]["threads"]) == ("bfloat16", 1)


def test_a_length_beyond_the_model_warns(folders, capsys):
    evaluate_with(folders / "first", "--tasks", "perplexity", "--lengths", 1100, "--windows", 1)
    assert "warning: first was built for 1024 tokens, --lengths asks for 1100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["{root}/absent"], FileNotFoundError, "no checkpoint folder .*absent"),
        (["{root}/first", "--against", "{root}/foreign"], ValueError, "foreign and first have different vocabularies"),
        (["{root}/first", "--against", "{root}/first"], ValueError, "called the same"),
        (["{root}/first", "--labels", "a", "b"], ValueError, "2 names for 1 models"),
        (["{root}/first", "--lengths", "100000", "--windows", "9"], ValueError, "needs 900000 here: give more text"),
        (["{root}/first", "--lengths", "1"], ValueError, "--lengths 1"),
        (["{root}/first", "--windows", "0"], ValueError, "--windows 0"),
        (["{root}/first", "--decode-tokens", "-1"], ValueError, "--decode-tokens -1"),
        (["{root}/first", "--mean-blocks", "0"], ValueError, "--mean-blocks 0"),
        (["{root}/first", "--skip-tokens", "-3"], ValueError, "--skip-tokens -3"),
        (["{root}/first", "--threads", "0"], ValueError, "--threads 0"),
        (["{root}/first", "--text", "{root}/absent.txt"], FileNotFoundError, "no text file"),
        (["{root}/first", "--plot", "{root}/figure.doc"], ValueError, "cannot draw"),
        (["{root}/first", "--output", "{root}/absent/result.json"], FileNotFoundError, "no folder"),
    ],
)
def test_bad_input_is_refused(folders, arguments, error, message):
    with pytest.raises(error, match=message):
        evaluate_with(*(argument.format(root=folders) for argument in arguments))


def test_folders_of_one_name_are_told_apart():
    assert evaluate._label(["a/model", "b/model", "b/other"], None) == {
        "a/model": "a/model",
        "b/model": "b/model",
        "other": "b/other",
    }


def test_help_tells_defaults(capsys):
    with pytest.raises(SystemExit):
        evaluate_with("--help")
    told = " ".join(capsys.readouterr().out.split())
    assert "context lengths in tokens (default: [1024, 4096])" in told
    assert "of the weights (default: float32)" in told
