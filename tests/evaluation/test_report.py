import json
import math
import os
import sys

import pytest
import torch
import transformers
from PIL import Image

from modeling_deepseek_r1.evaluation import check_plot, environment, markdown_table, plot, read_report, report, write_report


def measurement(*samples: float) -> dict:
    ordered = sorted(samples)
    return {"median": ordered[len(ordered) // 2], "minimum": ordered[0], "maximum": ordered[-1], "samples": list(samples)}


def made_result(*tasks: str) -> dict:
    """Two models at two lengths, with numbers that are easy to recognise."""
    lengths = (1024, 4096)
    cells = {
        "speed": [
            {
                "label": label,
                "length": length,
                "prefill_seconds": measurement(1.0 * factor, 2.0 * factor, 3.0 * factor),
                "decode_seconds_per_token": measurement(0.02 * factor),
                "prefill_ratio": measurement(factor),
                "decode_ratio": measurement(factor),
                "cache_bytes": int(length * 2**10 * factor),
            }
            for length in lengths
            for label, factor in (("dense", 1.0), ("hybrid", 0.5))
        ],
        "memory": [
            {
                "label": label,
                "length": length,
                "peak_bytes": measurement(length * 2**15 * f),
                "ratio": measurement(f),
                "method": "VmHWM",
            }
            for length in lengths
            for label, f in (("dense", 1.0), ("hybrid", 0.25))
        ],
    }
    parts = {
        "perplexity": {
            label: [{"context_length": length, "perplexity": value} for length in lengths]
            for label, value in (("dense", 10.0), ("hybrid", 10.5))
        },
        "retrieval": {
            label: {
                "chance": 0.1,
                "chance_seen": 0.2,
                "by_length": [
                    {"length": n, "accuracy": share, "accuracy_interval": [share - 0.1, share + 0.1]} for n in lengths
                ],
            }
            for label, share in (("dense", 0.8), ("hybrid", 0.6))
        },
        "speed": {"cells": cells["speed"]},
        "memory": {"cells": cells["memory"]},
    }
    result = {"format_version": 1, "environment": environment(), "settings": {}, "models": {"dense": {}, "hybrid": {}}}
    return result | {task: parts[task] for task in tasks}


ALL = ("perplexity", "retrieval", "speed", "memory")


def test_environment_names_what_a_number_depends_on(llama):
    about = environment(llama.bfloat16())
    assert about["torch"] == torch.__version__
    assert about["transformers"] == transformers.__version__
    assert about["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (about["device"], about["dtype"], about["threads"]) == ("cpu", "bfloat16", torch.get_num_threads())
    assert about["processor"]
    assert about["command"] == sys.argv


def test_json_round_trip(tmp_path):
    result = made_result(*ALL)
    write_report(result, tmp_path / "new" / "result.json")
    assert read_report(tmp_path / "new" / "result.json") == result
    assert os.listdir(tmp_path / "new") == ["result.json"]


def test_numbers_that_json_lacks_are_still_strict_json(tmp_path):
    write_report({"format_version": 1, "values": [math.inf, -math.inf, math.nan, 1.5]}, tmp_path / "result.json")

    def refuse(constant):
        raise AssertionError(constant)

    loaded = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert loaded["values"] == ["inf", "-inf", "nan", 1.5]
    assert [float(value) for value in loaded["values"]][:2] == [math.inf, -math.inf]


def test_interrupted_writing_leaves_the_old_file(monkeypatch, tmp_path):
    path = tmp_path / "result.json"
    write_report(made_result("perplexity"), path)
    before = path.read_bytes()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(report.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report(made_result("speed"), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["result.json"]


def test_unreadable_reports_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_report(tmp_path / "absent.json")
    (tmp_path / "other.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format_version is 99, this version of the library reads 1"):
        read_report(tmp_path / "other.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="format_version is None"):
        read_report(tmp_path / "list.json")


def test_table_has_a_row_per_model_and_a_column_per_quantity_and_length():
    table = markdown_table(made_result(*ALL))
    header, ruler, dense, hybrid, _, note = table.splitlines()
    names = [cell.strip() for cell in header.strip("|").split("|")]
    assert len(names) == 1 + 6 * 2 and ruler == "|:--|" + "--:|" * 12
    first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in (dense, hybrid))
    cells = {name: (one, two) for name, one, two in zip(names, first, second, strict=True)}
    assert cells[""] == ("dense", "hybrid")
    assert cells["Perplexity, 1,024 tokens"] == ("10.00", "10.50 · 1.05x")
    assert cells["Retrieval, % (95 % interval), 4,096 tokens"] == ("80 (70–90)", "60 (50–70) · 0.75x")
    assert cells["Prefill, s, 1,024 tokens"] == ("2.00 (1.00–3.00)", "1.00 (0.50–1.50) · 0.50x")
    assert cells["Decode, ms/token, 1,024 tokens"] == ("20.0", "10.0 · 0.50x")
    assert cells["Cache, MiB, 4,096 tokens"] == ("4.0", "2.0 · 0.50x")
    assert cells["Peak memory beyond weights, MiB, 4,096 tokens"] == ("128", "32 · 0.25x")
    assert f"torch {torch.__version__}" in note
    assert "retrieval by chance: 10 %" in note


def test_table_of_one_model_has_no_ratios():
    result = made_result("perplexity")
    del result["models"]["hybrid"]
    assert markdown_table(result).splitlines()[:3] == [
        "|  | Perplexity, 1,024 tokens | Perplexity, 4,096 tokens |",
        "|:--|--:|--:|",
        "| dense | 10.00 | 10.00 |",
    ]


@pytest.mark.parametrize("tasks", [("perplexity",), ("perplexity", "memory"), ("retrieval", "speed"), ALL])
def test_plot_draws_every_panel(tmp_path, tasks):
    plot(made_result(*tasks), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=1 << 24)}
        wide = image.width > image.height
    assert {(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)} <= colours
    assert wide


def test_plot_shows_the_numbers_as_text(tmp_path):
    plot(made_result(*ALL), tmp_path / "figure.svg")
    # Letters are drawn as outlines; matplotlib keeps the text beside them as comments.
    drawn = (tmp_path / "figure.svg").read_text()
    for text in (
        "dense",
        "hybrid",
        "10.50",
        "1,024",
        "context length (tokens)",
        "Prefill time",
        "peak of the prefill, MiB",
        "chance",
        "Planted facts found",
    ):
        assert text in drawn


def test_an_empty_result_is_not_drawn(tmp_path):
    with pytest.raises(ValueError, match="no measurement"):
        plot(made_result(), tmp_path / "figure.png")


def test_unknown_picture_formats_are_refused():
    with pytest.raises(ValueError, match="cannot draw figure.doc: the suffix must be one of .*png"):
        check_plot("figure.doc")


def test_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "modeling-deepseek-r1\[plot\]"'):
        plot(made_result("speed"), tmp_path / "figure.png")
