"""`deepseek-r1 convert`."""

import argparse
import json

import pytest

from modeling_deepseek_r1.commands import convert

from .sources import assert_same_tensors, model_of, save


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(model_of("qwen2"), tmp_path_factory.mktemp("command") / "source")


def run(*arguments):
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    convert.run(parser.parse_args([str(argument) for argument in arguments]))


def test_converts_and_prints_the_report(source, tmp_path, capsys):
    run(source, tmp_path / "converted")
    out, err = capsys.readouterr()
    assert "3 x full_attention" in out and "converting" not in err
    assert_same_tensors(tmp_path / "converted", source)


def test_every_argument_reaches_the_function(source, tmp_path, capsys):
    pattern = ["--preset", "balanced", "--layer-types", "SSF", "--sliding-window", 8, "--num-sink-tokens", 2]
    run(source, tmp_path / "a", *pattern, "--dtype", "bfloat16", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["pattern"] == "2 x sliding_attention (8 tokens + 2 sink tokens), 1 x full_attention"
    assert report["dtype"] == "bfloat16" and not report["dry_run"]
    run(source, tmp_path / "a", "--overwrite", "--json")
    assert json.loads(capsys.readouterr().out)["exact"]
    run(source, tmp_path / "b", "--dry-run", "--json")
    assert json.loads(capsys.readouterr().out)["dry_run"] and not (tmp_path / "b").exists()


def test_the_way_back(source, tmp_path, capsys):
    run(source, tmp_path / "sparse", "--preset", "low_latency")
    with pytest.raises(ValueError, match="allow_pattern_change"):
        run(tmp_path / "sparse", tmp_path / "dense", "--to-dense")
    run(tmp_path / "sparse", tmp_path / "dense", "--to-dense", "--allow-pattern-change")
    assert "(qwen2)" in capsys.readouterr().out
    assert_same_tensors(tmp_path / "dense", source)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to-dense", "--preset", "dense", "--gguf-file", "x"], "--preset, --gguf-file: not with --to-dense"),
        (["--allow-pattern-change"], "belongs to --to-dense"),
        (["--gguf-file", "x.gguf"], "x.gguf does not exist"),
    ],
)
def test_arguments_that_do_not_fit(arguments, words, source, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        run(source, tmp_path / "a", *arguments)


@pytest.mark.parametrize("arguments", [["--preset", "mobile"], ["--dtype", "int8"], ["--sliding-window", "many"]])
def test_bad_values_are_rejected_by_the_parser(arguments, source, tmp_path):
    with pytest.raises(SystemExit) as caught:
        run(source, tmp_path / "a", *arguments)
    assert caught.value.code == 2


def test_experts(source, tmp_path, capsys):
    experts = ["--experts", 4, "--experts-per-token", 3, "--expert-rank", 2, "--expert-layers", "EDD"]
    run(source, tmp_path / "a", *experts, "--json")
    assert json.loads(capsys.readouterr().out)["experts"].startswith("1 layer x 4 experts (rank 2), +")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["num_experts_per_tok"] == 3 and config["mlp_layer_types"] == ["sparse", "dense", "dense"]
    run(source, tmp_path / "b", "--expert-topology", "text=2,code=1", "late=4", "--expert-layers", "0,2", "--dry-run")
    assert "1 layer x 3 experts (code 1, text 2), 1 layer x 4 experts, +" in capsys.readouterr().out
    domains = ["--domains", "code=code", "text=prose", "text=b.txt"]
    run(source, tmp_path / "b", "--experts", 6, *domains, "--dry-run", "--json")
    assert json.loads(capsys.readouterr().out)["calibration"]["domains"]["texts"] == {
        "code": ["code"],
        "text": ["prose", "b.txt"],
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to-dense", "--experts", 4, "--domains", "a=b"], "--experts, --domains: not with --to-dense"),
        (["--expert-rank", 4], "expert_rank has no effect without experts"),
        (["--experts", 4, "--expert-layers", "0,9"], "layers are numbered"),
    ],
)
def test_experts_that_do_not_fit(arguments, words, source, tmp_path):
    with pytest.raises(ValueError, match=words):
        run(source, tmp_path / "a", *arguments)


@pytest.mark.parametrize(
    "arguments", [["--expert-topology", "text"], ["--expert-topology", "a=1,a=2"], ["--domains", "code="], ["--experts", "few"]]
)
def test_bad_experts_are_rejected_by_the_parser(arguments, source, tmp_path):
    with pytest.raises(SystemExit) as caught:
        run(source, tmp_path / "a", *arguments)
    assert caught.value.code == 2
