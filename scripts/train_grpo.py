"""Teaches a model to think before it answers: GRPO (https://arxiv.org/abs/2402.03300) on a task of reasoning-gym, by TRL's Trainer.

python scripts/train_grpo.py                                      SmolLM2, sums of two digits; writes results/smollm2_grpo.json
python scripts/train_grpo.py --model CHECKPOINT --task countdown --options '{"max_numbers": 4}' --steps 500

An answer is wanted as `<think>...</think> answer`. Rewards are, added up: the format (1, or a quarter for each of the marks that
is where it should be), and reasoning-gym's score of what follows the thoughts. A small model that was never shown the format
would never be rewarded, so that solved questions precede each one.
"""

import argparse
import json
import re
from pathlib import Path

import reasoning_gym
import torch
from datasets import Dataset
from demo import packaged_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from modeling_deepseek_r1.conversion import convert_checkpoint
from modeling_deepseek_r1.evaluation import FORMAT_VERSION, environment, write_report
from modeling_deepseek_r1.training import add_adapters

SYSTEM = "Think between <think> and </think>, then answer."
OTHER = "(?:(?!</?think>).)"
WANTED = re.compile(rf"\s*<think>{OTHER}+</think>\s*(\S{OTHER}*)", re.DOTALL)
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
CONVERTED = Path(".cache/benchmark/grpo_start")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint of this library (default: SmolLM2-135M, converted)")
    parser.add_argument("--task", default="chain_sum", help="of reasoning-gym (default: %(default)s)")
    parser.add_argument("--options", type=json.loads, help="of the task, as JSON (default for chain_sum: two digits)")
    parser.add_argument("--examples", type=int, default=2, help="solved questions before each one (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--questions", type=int, default=2, help="of a step (default: %(default)s)")
    parser.add_argument("--generations", type=int, default=4, help="answers to each question (default: %(default)s)")
    parser.add_argument("--completion-length", type=int, default=24, help="tokens, at most (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="(default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters, merged at the end (default: %(default)s)")
    parser.add_argument(
        "--beta", type=float, default=0.0, help="weight of the divergence from the start (default: %(default)s)"
    )
    parser.add_argument("--held-out", type=int, default=24, help="questions to measure on (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", default="runs/grpo", help="folder of the trained model (default: %(default)s)")
    parser.add_argument("--results", default="results/smollm2_grpo.json", help="(default: %(default)s)")
    return parser.parse_args()


class Questions:
    """A task's questions as conversations: first the examples, then those held out, then those to train on.

    Args:
        task, options: of reasoning-gym.
        examples, held_out, trained: numbers of questions.

    Raises:
        ValueError: the task has fewer different questions.
    """

    def __init__(self, task: str, options: dict, examples: int, held_out: int, trained: int):
        wanted = examples + held_out + trained
        self.task = reasoning_gym.create_dataset(task, seed=0, size=2 * wanted, **options)
        distinct = list({entry["question"]: number for number, entry in enumerate(self.task)}.values())
        if len(distinct) < wanted:
            raise ValueError(f"{task} with {options} has {len(distinct)} different questions, and {wanted} are needed")
        self.examples, rest = distinct[:examples], distinct[examples:]
        self.held_out, self.trained = self.dataset(rest[:held_out]), self.dataset(rest[held_out:][:trained])

    def dataset(self, numbers: list[int]) -> Dataset:
        solved = [message for number in self.examples for message in self.solution(self.task[number])]
        opening = [{"role": "system", "content": SYSTEM}, *solved]
        prompts = [[*opening, {"role": "user", "content": self.task[number]["question"]}] for number in numbers]
        return Dataset.from_dict({"prompt": prompts, "number": numbers})

    @staticmethod
    def solution(entry: dict) -> list[dict[str, str]]:
        expression = entry["metadata"].get("expression")
        thought = f"{expression} = {entry['answer']}" if expression else f"It must be {entry['answer']}."
        answer = f"<think>{thought}</think> {entry['answer']}"
        return [{"role": "user", "content": entry["question"]}, {"role": "assistant", "content": answer}]

    def format_reward(self, completions: list[list[dict[str, str]]], **columns) -> list[float]:
        return [format_score(completion[0]["content"]) for completion in completions]

    def answer_reward(self, completions: list[list[dict[str, str]]], number: list[int], **columns) -> list[float]:
        return [self.answer_score(completion[0]["content"], n) for completion, n in zip(completions, number, strict=True)]

    def answer_score(self, text: str, number: int) -> float:
        """Of what follows the thoughts; 0 in any other format."""
        match = WANTED.fullmatch(text)
        return float(self.task.score_answer(match[1].strip(), self.task[number])) if match else 0.0


def format_score(text: str) -> float:
    if WANTED.fullmatch(text):
        return 1.0
    opened = text.count("<think>") == 1 and text.lstrip().startswith("<think>")
    return 0.25 * opened + 0.25 * (text.count("</think>") == 1)


@torch.no_grad()
def measured(model, tokenizer, questions: Questions, length: int) -> dict:
    """Mean rewards of answers to what is held out, drawn as in training, and the first of them."""
    model.eval()
    torch.manual_seed(0)
    rows, texts = questions.held_out, []
    for start in range(0, len(rows), 8):
        inputs = tokenizer.apply_chat_template(
            rows[start : start + 8]["prompt"], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**inputs.to(model.device), do_sample=True, temperature=1.0, top_k=0, max_new_tokens=length)
        texts += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    scores = [questions.answer_score(text, number) for text, number in zip(texts, rows["number"], strict=True)]
    formats = [format_score(text) for text in texts]
    return {"format": sum(formats) / len(texts), "answer": sum(scores) / len(texts), "texts": texts[:8]}


def make_trainer(args: argparse.Namespace, model, tokenizer, questions: Questions) -> GRPOTrainer:
    config = GRPOConfig(
        output_dir=f"{args.output}-run",
        max_steps=args.steps,
        per_device_train_batch_size=args.questions * args.generations,
        num_generations=args.generations,
        max_completion_length=args.completion_length,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        beta=args.beta,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    rewards = [questions.format_reward, questions.answer_reward]
    return GRPOTrainer(model, rewards, args=config, train_dataset=questions.trained, processing_class=tokenizer)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    source = args.model or CONVERTED
    if args.model is None and not CONVERTED.exists():
        print(convert_checkpoint(packaged_checkpoint(), CONVERTED).summary(), flush=True)
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    options = args.options if args.options is not None else SUMS if args.task == "chain_sum" else {}
    questions = Questions(args.task, options, args.examples, args.held_out, args.steps * args.questions)
    before = measured(model, tokenizer, questions, args.completion_length)
    print(json.dumps(before, indent=2), flush=True)
    adapted, trained = add_adapters(model, rank=args.rank, targets=("attention", "mlp"))
    print(trained.summary(), flush=True)
    trainer = make_trainer(args, adapted, tokenizer, questions)
    trainer.train()
    merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    merged.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    after = measured(merged, tokenizer, questions, args.completion_length)
    print(json.dumps(after, indent=2), flush=True)
    log = [line for line in trainer.state.log_history if "reward" in line]
    settings = {**vars(args), "options": options, "weights": trained.trainable}
    report = {"format_version": FORMAT_VERSION, "environment": environment(), "settings": settings}
    write_report({**report, "before": before, "after": after, "log": log}, args.results)


if __name__ == "__main__":
    main()
