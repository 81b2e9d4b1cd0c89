import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_llama
from transformers import DynamicCache

from modeling_deepseek_r1.evaluation import Measurement, cache_bytes, measure_speed
from modeling_deepseek_r1.evaluation import speed as speed_module


def random_ids(count: int) -> torch.Tensor:
    return torch.randint(260, (count,), generator=torch.Generator().manual_seed(0))


def test_measurement_and_ratios():
    slow, fast = Measurement.of([4.0, 6.0, 5.0]), Measurement.of([2.0, 2.0, 5.0])
    assert (slow.median, slow.minimum, slow.maximum, slow.samples) == (5.0, 4.0, 6.0, [4.0, 6.0, 5.0])
    assert fast.over(slow).samples == pytest.approx([0.5, 1 / 3, 1.0])
    assert str(fast.over(Measurement.of([0, 0, 0])).median) == "nan"


@pytest.mark.parametrize("length", [1, 63])
def test_cache_bytes_of_a_dynamic_cache_are_exact(llama, length):
    with torch.no_grad():
        cache = llama(random_ids(length).unsqueeze(0), use_cache=True).past_key_values
    layers, key_value_heads, head_dim, float32 = 2, 2, 8, 4
    assert cache_bytes(cache) == 2 * layers * key_value_heads * head_dim * float32 * length


def test_cache_bytes_count_storage_once_and_whole():
    large = torch.zeros(1, 2, 100, 8)
    cache = DynamicCache()
    cache.update(large, large, 0)
    cache.layers[0].keys = large[:, :, -10:]
    cache.layers[0].values = large[:, :, :10]
    cache.layers[0].clusters = [torch.zeros(5, dtype=torch.int64)]
    assert cache_bytes(cache) == large.numel() * 4 + 5 * 8


def test_cache_without_layers_is_refused():
    with pytest.raises(ValueError, match="SimpleNamespace has no layers"):
        cache_bytes(SimpleNamespace())


def test_models_take_turns_and_every_sample_is_kept(monkeypatch):
    models = {"a": make_llama(0), "b": make_llama(1, num_hidden_layers=4)}
    names = {id(model): label for label, model in models.items()}
    turns = []

    def counting(model, input_ids, length, run=speed_module._run_once):
        turns.append((names[id(model)], length, input_ids.shape[1]))
        return run(model, input_ids, length)

    monkeypatch.setattr(speed_module, "_run_once", counting)
    seen = []
    settings = {"lengths": [40, 80], "repeats": 3, "decode_tokens": 4}
    result = measure_speed(models, random_ids(100), **settings, on_progress=lambda *state: seen.append(state))
    assert turns[-12:] == [("a", 40, 44), ("b", 40, 44)] * 3 + [("a", 80, 84), ("b", 80, 84)] * 3
    assert seen == [(done, 12) for done in range(1, 13)]
    assert [(cell.label, cell.length) for cell in result.cells] == [("a", 40), ("b", 40), ("a", 80), ("b", 80)]
    for cell in result.cells:
        assert len(cell.prefill_seconds.samples) == len(cell.decode_seconds_per_token.samples) == 3
        assert cell.prefill_seconds.minimum > 0
        assert cell.cache_bytes == 2 * (2 if cell.label == "a" else 4) * 2 * 8 * 4 * (cell.length + 4)
    assert result.cells[0].prefill_ratio.samples == [1.0] * 3
    pairs = zip(result.cells[1].prefill_seconds.samples, result.cells[0].prefill_seconds.samples, strict=True)
    assert result.cells[1].prefill_ratio.samples == [b / a for b, a in pairs]
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_decode_error_tells_right_from_wrong(any_model):
    def decode_error(model):
        return measure_speed({"m": model}, random_ids(60), lengths=[40], repeats=1, decode_tokens=4).decode_error["m"]

    assert decode_error(any_model) < 1e-3
    forward = any_model.base_model.forward

    def forgetful(input_ids, past_key_values=None, use_cache=False):
        return forward(input_ids=input_ids, use_cache=use_cache)

    any_model.base_model.forward = forgetful
    assert decode_error(any_model) > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": []}, "nothing to measure"),
        ({"repeats": 0}, "repeats=0"),
        ({"decode_tokens": 0}, "decode_tokens=0"),
        ({"lengths": [0]}, r"lengths=\[0\]"),
        ({"lengths": [90]}, "need 106, the text has 100"),
    ],
)
def test_bad_arguments_are_refused(llama, settings, message):
    with pytest.raises(ValueError, match=message):
        measure_speed({"m": llama}, random_ids(100), **({"lengths": [10]} | settings))
