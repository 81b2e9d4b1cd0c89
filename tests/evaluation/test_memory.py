import json
import subprocess
import sys
import time

import pytest
import torch
from conftest import make_llama

from modeling_deepseek_r1.evaluation import load_model, measure_memory, memory, memory_probe
from modeling_deepseek_r1.evaluation.loading import usable_device
from modeling_deepseek_r1.evaluation.memory_probe import PeakMemory

MIB = 2**20


@pytest.fixture
def checkpoint(tmp_path):
    make_llama().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def allocate_and_free(mebibytes: int) -> None:
    block = torch.ones(mebibytes * MIB, dtype=torch.uint8)
    # Long enough for a sampling thread to have its turn.
    time.sleep(0.05)
    del block


METHODS = ["VmHWM", "sampling"] if sys.platform == "linux" else ["ru_maxrss"]


@pytest.mark.parametrize("method", METHODS)
def test_peak_is_seen_though_it_was_freed(monkeypatch, tmp_path, method):
    if method == "sampling":
        # A place that cannot be written, as /proc/self/clear_refs is in some containers.
        monkeypatch.setattr(memory_probe, "_CLEAR_REFS", tmp_path / "absent" / "clear_refs")
        monkeypatch.setattr(memory_probe, "_SAMPLING_SECONDS", 0.0001)
    with PeakMemory() as high:
        allocate_and_free(300)
    with PeakMemory() as low:
        allocate_and_free(100)
    assert high.method == low.method == method
    # A system that takes freed pages back late may count a part of the first block into the second's start, never the reverse.
    assert 250 * MIB < high.extra_bytes < 400 * MIB
    assert low.extra_bytes < 200 * MIB


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is not on Windows")
def test_without_proc_the_highest_of_the_process_is_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_probe, "_STATUS", tmp_path / "absent")
    # As much again as the process ever had: certainly a new high, though less than the whole block above the old one.
    highest = memory_probe._highest_of_process()
    with PeakMemory() as peak:
        allocate_and_free(highest // MIB)
    assert peak.method == "ru_maxrss"
    assert 0 < peak.extra_bytes <= highest


def test_probe_holds_at_least_the_cache(checkpoint):
    short, long = (memory_probe.probe(str(checkpoint), length)["peak_bytes"] for length in (64, 8192))
    # Two layers, keys and values, two heads of eight float32 numbers.
    assert long > 2 * 2 * 2 * 8 * 4 * 8192
    assert long > short


def test_models_take_turns_and_are_compared(monkeypatch):
    calls, seen = [], []

    def fake_probe(checkpoint, length, dtype, threads, seed):
        calls.append((checkpoint, length, dtype, threads, seed))
        return {"peak_bytes": length * (100 if checkpoint == "folder_a" else 50 + len(calls)), "method": "VmHWM"}

    monkeypatch.setattr(memory, "_probe_in_fresh_process", fake_probe)
    settings = {"dtype": "bfloat16", "threads": 3, "repeats": 2, "seed": 9}
    models = {"a": "folder_a", "b": "folder_b"}
    result = measure_memory(models, lengths=[8, 16], **settings, on_progress=lambda *state: seen.append(state))
    turns = [("folder_a", 8), ("folder_b", 8)] * 2 + [("folder_a", 16), ("folder_b", 16)] * 2
    assert calls == [(*turn, "bfloat16", 3, 9) for turn in turns]
    assert seen == [(done, 8) for done in range(1, 9)]
    assert [(cell.label, cell.length) for cell in result.cells] == [("a", 8), ("b", 8), ("a", 16), ("b", 16)]
    assert result.cells[0].peak_bytes.samples == [800, 800]
    assert result.cells[1].ratio.samples == [0.52, 0.54]
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


@pytest.mark.slow
def test_fresh_processes_agree(checkpoint):
    result = measure_memory({"one": checkpoint, "same": checkpoint}, lengths=[8192], threads=1)
    assert [cell.method for cell in result.cells] == [METHODS[0]] * 2
    # Some 20 MiB, of which a few are what the interpreter happens to hold.
    assert 0.5 < result.cells[1].ratio.median < 2.0


def test_probe_by_hand_prints_json(checkpoint):
    command = [sys.executable, "-m", "modeling_deepseek_r1.evaluation.memory_probe", str(checkpoint), "256", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)) == {"peak_bytes", "method"}
    assert "RuntimeWarning" not in done.stderr


def test_a_failing_process_says_why(tmp_path):
    with pytest.raises(OSError, match="at 16 tokens failed: .*no checkpoint folder"):
        measure_memory({"none": tmp_path / "absent"}, lengths=[16])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lengths": []}, "nothing to measure"), ({"repeats": 0}, "repeats=0"), ({"dtype": "int3"}, "dtype='int3' is unknown")],
)
def test_bad_arguments_are_refused(checkpoint, settings, message):
    with pytest.raises(ValueError, match=message):
        measure_memory({"one": checkpoint}, **({"lengths": [16]} | settings))


def test_loaded_weights_are_copies_of_the_file(checkpoint):
    expected, loaded = make_llama().state_dict(), load_model(checkpoint, device="cpu")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    size = (checkpoint / "model.safetensors").stat().st_size
    (checkpoint / "model.safetensors").write_bytes(b"\0" * size)
    assert torch.equal(loaded.lm_head.weight, expected["lm_head.weight"])
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_tied_weights_stay_tied(tmp_path):
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, torch.bfloat16)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert loaded.dtype == torch.bfloat16


def test_damaged_and_absent_checkpoints_are_refused(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="are damaged"):
        load_model(checkpoint)
    with pytest.raises(FileNotFoundError, match="no checkpoint file .*absent.gguf"):
        load_model(checkpoint / "absent.gguf")
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        load_model("./absent")


def test_a_device_that_is_not_there(checkpoint):
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    assert usable_device() == (accelerator or torch.device("cpu")) and usable_device("cpu").type == "cpu"
    for name in ("gpu0", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{name}' cannot be used: "):
            load_model(checkpoint, device=name)
