"""Training with rounded weights: what forwards see is what quantization makes."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_deepseek_r1 import DeepseekR1ForCausalLM, DeepseekR1QuantizationConfig
from modeling_deepseek_r1.quantization.run import quantize_model
from modeling_deepseek_r1.training import QuantizationAware, Recipe
from tests.models import random_ids, tiny_model
from tests.training.runs import losses, make_trainer

SETTINGS = {"bits": 4, "group_size": 8}


@pytest.mark.parametrize("pattern", ["experts", "low_rank_experts"])
def test_a_trained_model_is_what_it_becomes_quantized(pattern, tmp_path):
    model, before = tiny_model(pattern, tie_word_embeddings=True), tiny_model(pattern, tie_word_embeddings=True)
    trainer = make_trainer(model, tmp_path, max_steps=8, quantization_aware=SETTINGS)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    moved = [name for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True) if not torch.equal(a, b)]
    assert len(moved) == len(list(model.parameters()))
    seen = trainer.evaluate()["eval_loss"]
    model.save_pretrained(tmp_path / "saved")
    quantized = DeepseekR1ForCausalLM.from_pretrained(tmp_path / "saved")
    quantize_model(quantized, DeepseekR1QuantizationConfig(**SETTINGS))
    ids = random_ids(2, 20)
    torch.testing.assert_close(quantized(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, QuantizationAware))
    callback.detach()
    assert trainer.evaluate()["eval_loss"] != seen
    assert not torch.allclose(quantized(ids).logits, model(ids).logits, rtol=1e-2, atol=1e-2)


def test_the_plain_trainer_and_an_error_inside_a_forward(tmp_path):
    model, callback = tiny_model("mixed"), QuantizationAware(DeepseekR1QuantizationConfig(8))
    arguments = {"arguments_class": TrainingArguments, "max_steps": 1}
    make_trainer(model, tmp_path, Trainer, callbacks=[callback], **arguments).train()
    with pytest.raises(RuntimeError):
        model.model.layers[0].mlp(torch.randn(2, 7))
    assert all("weight" not in module.__dict__ for module in model.modules())
    with pytest.raises(ValueError, match="attached already"):
        callback.attach(model)


def test_what_is_refused():
    with pytest.raises(ValueError, match="rounds to nearest"):
        QuantizationAware(DeepseekR1QuantizationConfig(8, "awq"))
    model = tiny_model("mixed")
    quantize_model(model, DeepseekR1QuantizationConfig(8))
    with pytest.raises(ValueError, match="begin with the checkpoint that it was made of"):
        QuantizationAware(DeepseekR1QuantizationConfig(8)).attach(model)
    recipe = Recipe(model="m", data=["d"], output="o", quantization_aware={"bits": 4})
    recipe.check()
    with pytest.raises(ValueError, match="quantization_aware trains the weights themselves"):
        recipe.changed({"lora_rank": 4}).check()
