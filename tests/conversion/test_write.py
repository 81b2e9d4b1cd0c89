"""At every moment the old state or the complete new one; and memory that does not grow with the checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modeling_deepseek_r1.conversion import convert_checkpoint, source, to_dense
from modeling_deepseek_r1.conversion.plan import expected_tensors
from modeling_deepseek_r1.conversion.target import plain_target
from modeling_deepseek_r1.conversion.write import TensorInfo, write_weights

from .sources import assert_same_tensors, config_of, model_of, save

HANG_AFTER_FIVE_TENSORS = """
import sys, time
from modeling_deepseek_r1.conversion import convert_checkpoint, source

read, count = source.FolderSource.read, 0

def slow(self, name):
    global count
    count += 1
    if count == 6:
        print("writing", flush=True)
        time.sleep(600)
    return read(self, name)

source.FolderSource.read = slow
convert_checkpoint(sys.argv[1], sys.argv[2], overwrite=True, max_shard_size="20KB")
"""

MEASURE_PEAK = """
import sys
from pathlib import Path
from modeling_deepseek_r1.conversion import convert_checkpoint

def resident(field):
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))

Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, without that of the imports
before = resident("VmRSS")
convert_checkpoint(sys.argv[1], sys.argv[2], max_shard_size="100MB", dtype=sys.argv[3])
print(resident("VmHWM") - before)
"""


@pytest.fixture
def llama(tmp_path):
    return save(model_of("llama"), tmp_path / "source")


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def killed_conversion(llama, destination):
    process = subprocess.Popen(
        [sys.executable, "-c", HANG_AFTER_FIVE_TENSORS, llama, destination], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_killed_conversion_leaves_nothing_at_the_destination(llama, tmp_path):
    killed_conversion(llama, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
    assert len(hidden(tmp_path)) == 1
    report = convert_checkpoint(llama, tmp_path / "converted")
    assert hidden(tmp_path) == [] and any("left by an interrupted conversion" in line for line in report.warnings)
    assert_same_tensors(tmp_path / "converted", llama)


def test_killed_conversion_keeps_what_was_there(llama, tmp_path):
    convert_checkpoint(llama, tmp_path / "converted", preset="low_latency")
    before = {path.name: path.read_bytes() for path in (tmp_path / "converted").iterdir()}
    killed_conversion(llama, tmp_path / "converted")
    assert {path.name: path.read_bytes() for path in (tmp_path / "converted").iterdir()} == before


def test_folder_that_was_being_replaced_is_put_back(llama, tmp_path):
    convert_checkpoint(llama, tmp_path / "converted")
    (tmp_path / "converted" / "mine.txt").write_text("kept")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = os.uname().nodename.replace("-", "_")
    (tmp_path / "converted").rename(tmp_path / f".converted.replaced-{host}-{dead.pid}")
    with pytest.raises(FileExistsError, match="is not empty"):
        convert_checkpoint(llama, tmp_path / "converted")
    assert (tmp_path / "converted" / "mine.txt").read_text() == "kept" and hidden(tmp_path) == []


def test_temporary_folders_of_others_are_left_alone(llama, tmp_path):
    names = [".converted.converting-otherhost-1", ".converted.notes", f".converted.converting-{os.uname().nodename}-1"]
    for name in names:
        (tmp_path / name).mkdir()
    report = convert_checkpoint(llama, tmp_path / "converted")
    assert sorted(hidden(tmp_path)) == sorted(names)
    assert sum("belongs to another conversion" in line for line in report.warnings) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_failure_in_the_middle_removes_what_was_written(error, llama, tmp_path, monkeypatch):
    convert_checkpoint(llama, tmp_path / "converted")
    before = (tmp_path / "converted" / "model.safetensors").read_bytes()
    read, seen = source.FolderSource.read, []

    def failing(self, name):
        seen.append(name)
        if len(seen) == 6:
            assert hidden(tmp_path) != []
            raise error
        return read(self, name)

    monkeypatch.setattr(source.FolderSource, "read", failing)
    with pytest.raises(error):
        convert_checkpoint(llama, tmp_path / "converted", overwrite=True, dtype="bfloat16")
    assert hidden(tmp_path) == [] and (tmp_path / "converted" / "model.safetensors").read_bytes() == before


def test_failing_swap_restores_the_old_folder(llama, tmp_path, monkeypatch):
    convert_checkpoint(llama, tmp_path / "converted")
    rename = os.rename

    def failing(old, new):
        if ".converting-" in str(old):
            raise OSError("swap failed")
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="swap failed"):
        convert_checkpoint(llama, tmp_path / "converted", overwrite=True, dtype="bfloat16")
    assert hidden(tmp_path) == []
    assert_same_tensors(tmp_path / "converted", llama)


def test_existing_destination(llama, tmp_path):
    destination = tmp_path / "converted"
    destination.mkdir()
    convert_checkpoint(llama, destination)
    with pytest.raises(FileExistsError, match="is not empty; choose another folder, or overwrite=True"):
        convert_checkpoint(llama, destination)
    (destination / "old.txt").write_text("old")
    convert_checkpoint(llama, destination, overwrite=True, dtype="bfloat16")
    assert not (destination / "old.txt").exists() and hidden(tmp_path) == []
    assert load_file(destination / "model.safetensors")["model.norm.weight"].dtype is torch.bfloat16


def test_destinations_that_are_never_replaced(llama, tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(FileExistsError, match="is a file"):
        convert_checkpoint(llama, tmp_path / "file", overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("jpg")
    with pytest.raises(FileExistsError, match="no checkpoint and is not replaced"):
        convert_checkpoint(llama, tmp_path / "photos", overwrite=True)
    with pytest.raises(ValueError, match="contains the source"):
        convert_checkpoint(llama, tmp_path, overwrite=True)
    with pytest.raises(OSError, match="cannot write to .*file"):
        convert_checkpoint(llama, tmp_path / "file" / "converted")


def test_a_checkpoint_may_replace_itself(llama, tmp_path):
    convert_checkpoint(llama, tmp_path / "converted")
    report = convert_checkpoint(tmp_path / "converted", tmp_path / "converted", preset="low_latency", overwrite=True)
    assert "sliding_attention" in report.pattern
    assert_same_tensors(tmp_path / "converted", llama)


def test_full_disk_is_said_before_writing(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1000))
    with pytest.raises(OSError, match=r"are to be written to .*, which has 1\.00 KB free"):
        convert_checkpoint(llama, tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_dry_run_reads_headers_and_writes_nothing(llama, tmp_path, monkeypatch):
    expected = convert_checkpoint(llama, tmp_path / "converted", preset="low_latency").to_dict()
    shutil.rmtree(tmp_path / "converted")
    monkeypatch.setattr(source.FolderSource, "read", lambda self, name: pytest.fail("a dry run read a tensor"))
    report = convert_checkpoint(llama, tmp_path / "converted", preset="low_latency", dry_run=True)
    assert report.to_dict() == expected | {"dry_run": True}
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    report = convert_checkpoint(llama, llama, dry_run=True)
    assert any("is not empty" in line for line in report.warnings)


def test_dry_run_of_to_dense_writes_nothing(llama, tmp_path):
    convert_checkpoint(llama, tmp_path / "converted")
    assert to_dense(tmp_path / "converted", tmp_path / "dense", dry_run=True).target_family == "llama"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "source"]


def test_weights_file_is_what_the_format_asks_for(tmp_path):
    tensors = {
        "odd": torch.arange(3, dtype=torch.float16),
        "wide": torch.randn(2, 5),
        "view": torch.randn(4, 6)[:, ::2].bfloat16(),
        "empty": torch.zeros(0, 4),
        "double": torch.randn(3, dtype=torch.float64),
    }
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_weights(tmp_path, infos, tensors.__getitem__, 10**9)
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) and stored[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_hold_at_most_their_size_or_one_tensor(tmp_path):
    infos = {str(number): TensorInfo((size,), torch.float32) for number, size in enumerate([10, 10, 50, 5, 5, 5])}
    write_weights(tmp_path, infos, lambda name: torch.zeros(infos[name].shape), 80)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert [weight_map[name][6:11] for name in infos] == ["00001", "00001", "00002", "00003", "00003", "00003"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize(("shards", "dtype"), [(1, "float32"), (4, "bfloat16")])
def test_peak_memory_is_far_below_the_size_of_the_checkpoint(shards, dtype, tmp_path):
    config = config_of(
        "llama", vocab_size=8000, hidden_size=512, intermediate_size=8000, num_hidden_layers=5, num_attention_heads=8
    )
    folder = tmp_path / "source"
    folder.mkdir()
    config.save_pretrained(folder)
    expected = {name: torch.zeros(shape) for name, shape in expected_tensors(plain_target(config, torch.float32)).items()}
    names = list(expected)
    total = sum(tensor.nbytes for tensor in expected.values())
    assert total > 280 * 10**6
    if shards == 1:
        save_file(expected, folder / "model.safetensors")
    else:
        files = {f"model-{k}.safetensors": names[k::shards] for k in range(shards)}
        for file, part in files.items():
            save_file({name: expected[name] for name in part}, folder / file)
        weight_map = {name: file for file, part in files.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    command = [sys.executable, "-c", MEASURE_PEAK, folder, tmp_path / "converted", dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    largest = max(tensor.nbytes for tensor in expected.values())
    assert 0 < int(result.stdout) < 4 * largest + 60 * 10**6 < total / 2
