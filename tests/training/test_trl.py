"""TRL's Trainers on our models, unmodified: preferences and rewards, whole and with adapters, and what they start from."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.data.tokenizers import make_tokenizer
from tests.models import tiny_model

pytest.importorskip("trl")
pytest.importorskip("peft")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

PROMPTS = ["a", "what is it, and what is it for?", "two and two", "hello world, how are you"]
LORA = LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
EXPERT_LORA = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
COMMON = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def checkpoint(pattern, folder, **fields):
    """A saved model with its tokenizer, as a user has it."""
    tiny_model(pattern, vocab_size=259, **fields).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def preferences(pattern, folder, peft_config=None, model=None, **fields):
    pairs = [{"prompt": user(p), "chosen": assistant(f"yes, {p}"), "rejected": assistant("no")} for p in PROMPTS]
    arguments = DPOConfig(output_dir=str(folder / "run"), **{**COMMON, "max_steps": 4, **fields})
    data = Dataset.from_list(pairs)
    return DPOTrainer(
        model or checkpoint(pattern, folder / "model"), args=arguments, train_dataset=data, peft_config=peft_config,
        processing_class=make_tokenizer(),
    )  # fmt: skip


def small_letters(completions, **columns):
    """Share of the first letters of the alphabet."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum("a" <= letter <= "m" for letter in text) / max(len(text), 1) for text in texts]


def rewards(pattern, folder, peft_config=None, **fields):
    settings = {"num_generations": 8, "max_completion_length": 8, "max_steps": 12, "per_device_train_batch_size": 16}
    arguments = GRPOConfig(output_dir=str(folder / "run"), **{**COMMON, **settings, **fields})
    data = Dataset.from_dict({"prompt": [user(prompt) for prompt in PROMPTS]})
    return GRPOTrainer(
        checkpoint(pattern, folder / "model"), small_letters, args=arguments, train_dataset=data, peft_config=peft_config,
        processing_class=make_tokenizer(),
    )  # fmt: skip


def column(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


@pytest.mark.parametrize(
    ("pattern", "peft_config"),
    [("routed_mixed", None), ("shared_expert", None), ("global_mixed", LORA), ("experts", EXPERT_LORA)],
)
def test_preferences_are_learned_from_the_reference_on(pattern, peft_config, tmp_path):
    trainer = preferences(pattern, tmp_path, peft_config, gradient_accumulation_steps=1)
    trainer.train()
    # The reference, another model or the one without adapters, is what training starts from: log 2, and the balance loss.
    coefficient = trainer.model.config.router_aux_loss_coef
    assert (coefficient > 0) == bool(column(trainer, "aux_loss"))
    start = math.log(2) + (coefficient * column(trainer, "aux_loss")[0] if coefficient else 0.0)
    assert column(trainer, "loss")[0] == pytest.approx(start, abs=2e-4)
    assert column(trainer, "rewards/margins")[-1] > column(trainer, "rewards/margins")[0] + 0.1
    assert column(trainer, "rewards/accuracies")[-1] == 1
    trainer.save_model(tmp_path / "trained")
    ids = torch.tensor([make_tokenizer()("two").input_ids])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / ("model" if peft_config else "trained"))
    if peft_config:
        saved.load_adapter(tmp_path / "trained")
    torch.testing.assert_close(saved(ids).logits, trainer.model.eval()(ids).logits)


def test_the_balance_loss_is_switched_off_by_its_coefficient(tmp_path):
    trainer = preferences("expert_domains", tmp_path, router_aux_loss_coef=0.0, max_steps=1)
    trainer.train()
    assert column(trainer, "loss")[0] == pytest.approx(math.log(2), abs=2e-4) and not column(trainer, "aux_loss")


@pytest.mark.parametrize(
    ("pattern", "peft_config", "beta"),
    [("routed_mixed", None, 0.0), ("shared_expert", None, 0.01), ("global_mixed", LORA, 0.01)],
)
def test_rewards_rise(pattern, peft_config, beta, tmp_path):
    trainer = rewards(pattern, tmp_path, peft_config, beta=beta)
    trainer.train()
    reward = column(trainer, "reward")
    assert sum(reward[-3:]) / 3 > sum(reward[:3]) / 3 + 0.15
    if beta:
        divergence = column(trainer, "kl")
        assert divergence[0] == pytest.approx(0, abs=1e-5) and divergence[-1] > 1e-3


@pytest.mark.parametrize("pattern", ["routed_mixed", "experts"])
def test_packed_supervised_rows(pattern, tmp_path):
    data = Dataset.from_list([{"prompt": user(p), "completion": assistant(f"yes, {p}")} for p in PROMPTS] * 4)
    arguments = SFTConfig(output_dir=str(tmp_path / "run"), **{**COMMON, "max_steps": 4, "packing": True, "max_length": 64})
    model = checkpoint(pattern, tmp_path / "model")
    trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=make_tokenizer())
    trainer.train()
    loss = column(trainer, "loss")
    assert loss[-1] < loss[0] - 0.3


def test_the_recipe_rewards_the_format_and_the_answer(tmp_path, monkeypatch):
    """scripts/train_grpo.py, whole, on a checkpoint with experts."""
    pytest.importorskip("reasoning_gym")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    import train_grpo

    questions = train_grpo.Questions("chain_sum", train_grpo.SUMS, examples=1, held_out=3, trained=4)
    asked = {message["content"] for prompt in questions.trained["prompt"] for message in prompt[-1:]}
    assert len(asked) == 4 and not asked & {prompt[-1]["content"] for prompt in questions.held_out["prompt"]}
    number = questions.trained["number"][0]
    answer = questions.task[number]["answer"]
    with pytest.raises(ValueError, match="has .* different questions, and 2001 are needed"):
        train_grpo.Questions("chain_sum", train_grpo.SUMS, examples=1, held_out=1000, trained=1000)
    for text, by_format, by_answer in (
        (f"<think>so it is</think> {answer}", 1.0, 1.0),
        ("<think>so it is\n</think>\nnine hundred", 1.0, 0.0),
        (f"<think>so it is</think> {answer}</think>", 0.25, 0.0),
        (f"so it is</think> {answer}", 0.25, 0.0),
        ("<think>so it is</think>", 0.5, 0.0),
        (answer, 0.0, 0.0),
    ):
        assert questions.format_reward([assistant(text)]) == [by_format], text
        assert questions.answer_reward([assistant(text)], [number]) == [by_answer], text
    checkpoint("experts", tmp_path / "model", max_position_embeddings=1024)
    given = {
        "model": tmp_path / "model",
        "output": tmp_path / "out",
        "results": tmp_path / "grpo.json",
        "steps": 2,
        "held-out": 3,
    }
    arguments = [f"--{name}={value}" for name, value in {**given, "examples": 1, "completion-length": 5}.items()]
    monkeypatch.setattr("sys.argv", ["train_grpo.py", *arguments])
    train_grpo.main()
    report = json.loads((tmp_path / "grpo.json").read_text())
    assert len(report["log"]) == 2 and report["before"].keys() == report["after"].keys() == {"format", "answer", "texts"}
    start, end = (AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("model", "out"))
    assert start.state_dict().keys() == end.state_dict().keys()
