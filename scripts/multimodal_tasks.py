"""Questions about pictures and spoken prompts as batches for a multimodal model whose encoders are frozen.

What the frozen encoders make of every picture and clip is computed once and kept in files. In the model, modules that hand such
features on take the encoders' places.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from packaged_encoders import packaged_file
from spoken_words import Recording, fetch, other_speaker, recordings, rendition
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from modeling_deepseek_r1.data import MultimodalCollator
from modeling_deepseek_r1.tokenization.audio import spectra
from modeling_deepseek_r1.tokenization.images import read_image

SPOKEN = "What is said?"
RENDITIONS = {"words": 24, "sentences": 4}
THEREFORE = ": "
"""Between what is seen and the answer that follows from it."""
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
HELD_OUT = 8
"""Every so many-th sentence is held out."""

# A template of few tokens: the model is small, and so is the time.
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}"
    " Answer:{% endif %}{% endfor %}"
)


class Row(NamedTuple):
    """A question, its answer, and what it is about: `kind` "image" or "audio", features, samples of a clip at 16 kHz, and what is
    said before the answer."""

    question: str
    answer: str
    kind: str
    features: torch.Tensor
    samples: int = 0
    thought: str = ""

    @property
    def told(self) -> str:
        return f" {self.thought}{THEREFORE}{self.answer}" if self.thought else f" {self.answer}"


class Precomputed(nn.Module):
    """In the place of an encoder: hands on what it once computed."""

    def forward(self, features: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        return features


@torch.no_grad()
def picture_questions(split: str, model, processor, folder: Path) -> list[Row]:
    """easy-vqa's questions of a split, "train" or "test".

    Whether there is a red shape is easier to say after saying which colour is there: that is the `thought` of such questions, taken
    from what other questions of the split tell about the same picture; those of which nothing is told are left out of "train".
    """
    source = packaged_file("easy_vqa", f"data/{split}")
    file = folder / f"pictures_{split}.pt"
    if not file.exists():
        grids = []
        paths = sorted((source / "images").glob("*.png"), key=lambda path: int(path.stem))
        for start in tqdm(range(0, len(paths), 50), desc=f"pictures, {split}"):
            images = [read_image(str(path), path.name) for path in paths[start : start + 50]]
            pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            grids.append(model.model.vision_tower(pixels).half())
        torch.save(torch.cat(grids), file)
    grids = torch.load(file)
    questions = json.loads((source / "questions.json").read_text())
    facts: dict[tuple[int, tuple[str, ...]], str] = {}
    for question, answer, image in questions:
        for word in f"{question} {answer}".replace("?", "").split() if answer not in ("yes", "no") else ():
            facts |= {(image, kind): word for kind in (COLOURS, SHAPES) if word in kind}
    rows = []
    for question, answer, image in questions:
        thought = ""
        if answer in ("yes", "no"):
            kind = COLOURS if any(word in COLOURS for word in question.split()) else SHAPES
            thought = facts.get((image, kind), "")
            if not thought and split == "train":
                continue
        rows.append(Row(question, answer, "image", grids[image], thought=thought))
    return rows


def balanced(rows: list[Row]) -> list[Row]:
    """Rows again and again, so that every question has each of its answers equally often: where the wording tells which answer is
    likely, a model learns the wording and does not look."""
    answers: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        answers.setdefault(row.question, {}).setdefault(row.answer, []).append(row)
    result = []
    for own in answers.values():
        most = max(map(len, own.values())) if len(own) > 1 else 0
        result += [some[number % len(some)] for some in own.values() for number in range(most)]
    return result


@torch.no_grad()
def encode_clips(clips: list[Recording], model, processor, file: Path) -> list[Row]:
    """What is said in the clips."""
    if not file.exists():
        features = []
        for clip in tqdm(clips, desc=file.stem):
            inputs, _ = spectra([clip.samples], processor.feature_extractor, processor.audio_downsampling)
            lengths = inputs["input_features_mask"].sum(-1)
            features.append(model.model.audio_tower(inputs["input_features"], lengths)[0].half())
        torch.save(features, file)
    rows = zip(clips, torch.load(file), strict=True)
    return [Row(SPOKEN, clip.text, "audio", own, len(clip.samples)) for clip, own in rows]


def spoken_rows(model, processor, folder: Path) -> dict[str, list[Row]]:
    """Rows named "words" and "sentences" to train on and, of those aside, "held-out words" (the recordings as they are; trained
    on are renditions of them), "held-out sentences" (never trained on) and "letters, another speaker"."""
    words, sentences = recordings(fetch(folder / "recordings"))
    texts = sorted({clip.text for clip in sentences})
    aside = set(texts[::HELD_OUT])
    parts = {"words": words, "sentences": [clip for clip in sentences if clip.text not in aside]}
    generator = np.random.default_rng(0)
    clips = {
        name: [Recording(rendition(clip.samples, generator), clip.text) for clip in own for _ in range(RENDITIONS[name])]
        for name, own in parts.items()
    }
    clips["held-out words"] = words
    clips["held-out sentences"] = [clip for clip in sentences if clip.text in aside]
    clips["letters, another speaker"] = other_speaker(folder / "recordings")
    return {name: encode_clips(own, model, processor, folder / f"{name.replace(' ', '_')}.pt") for name, own in clips.items()}


class Batches(torch.utils.data.IterableDataset):
    """Endless lists of rows of one task each.

    Args:
        tasks: name -> (rows, rows of a batch, batches in a cycle).
        seed: of the order.
    """

    def __init__(self, tasks: dict[str, tuple[list[Row], int, int]], seed: int = 0):
        self.tasks, self.seed = tasks, seed

    def __iter__(self) -> Iterator[list[Row]]:
        generator = np.random.default_rng(self.seed)
        cycle = [name for name, (_, _, count) in self.tasks.items() for _ in range(count)]
        waiting: dict[str, list[int]] = {name: [] for name in self.tasks}
        while True:
            for name in generator.permutation(cycle):
                rows, size, _ = self.tasks[name]
                if len(waiting[name]) < size:
                    waiting[name] = generator.permutation(len(rows)).tolist()
                yield [rows[waiting[name].pop()] for _ in range(size)]


class Collate:
    """Batches in which the encoders' features stand for pictures and clips."""

    def __init__(self, processor):
        self.processor, self.collate = processor, MultimodalCollator(processor)
        # Placeholders are counted by the size of a picture and the length of a clip, whatever is in them.
        self.blank = torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()

    def question(self, row: Row, given: bool = True) -> list[dict]:
        text = {"type": "text", "text": row.question}
        block = {"type": "image", "image": self.blank}
        if row.kind == "audio":
            block = {"type": "audio", "audio": np.zeros(row.samples, np.float32), "sampling_rate": 16000}
        return [{"role": "user", "content": [block, text] if given else [text]}]

    def features(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        own = [row.features.float() for row in rows]
        return {"pixel_values": torch.stack(own)} if rows[0].kind == "image" else {"input_features": pad_sequence(own, True)}

    def __call__(self, batch: list[list[Row]]) -> dict[str, torch.Tensor]:
        (rows,) = batch
        answers = [{"role": "assistant", "content": row.told} for row in rows]
        messages = [{"messages": [*self.question(row), answer]} for row, answer in zip(rows, answers, strict=True)]
        inputs = self.collate(messages) | self.features(rows)
        # Rows are padded on the left: only the last tokens are answers, and logits of others cost time.
        last = int((inputs["labels"] >= 0).sum(1).max()) + 1
        return inputs | {"labels": inputs["labels"][:, -last:], "logits_to_keep": last}

    def prompts(self, rows: list[Row], shown: list[Row | None]) -> dict[str, torch.Tensor]:
        """The questions of `rows` with the pictures or clips of `shown`; all None = without any."""
        if shown[0] is None:
            asked = [self.question(row, given=False) for row in rows]
            return dict(self.processor.apply_chat_template(asked, tokenize=True, return_dict=True))
        asked = [self.question(own._replace(question=row.question)) for row, own in zip(rows, shown, strict=True)]
        return {**self.processor.apply_chat_template(asked, tokenize=True, return_dict=True), **self.features(shown)}


def word_errors(said: str, heard: str) -> int:
    """Words to change, to leave out and to add."""
    said_words, costs = said.split(), list(range(len(heard.split()) + 1))
    for number, word in enumerate(said_words, 1):
        above, costs[0] = costs[0], number
        for column, own in enumerate(heard.split(), 1):
            above, costs[column] = costs[column], min(costs[column] + 1, costs[column - 1] + 1, above + (word != own))
    return costs[-1]


@torch.no_grad()
def answer(model, collate: Collate, rows: list[Row], shift: int | None = 0, batch_size: int = 50) -> dict[str, float]:
    """Share of exact answers and word error rate, of what is said after any thought.

    Args:
        rows: all of one kind.
        shift: the picture or clip of the row so many places on; None = without any.
    """
    shown = [None] * len(rows) if shift is None else rows[shift:] + rows[:shift]
    right = errors = 0
    longest = max(len(collate.processor.tokenizer(row.told)["input_ids"]) for row in rows) + 2
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        inputs = collate.prompts(some, shown[start : start + batch_size])
        tokens = model.generate(**inputs, max_new_tokens=longest, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        texts = [text.split(THEREFORE)[-1].strip() for text in collate.processor.batch_decode(tokens, skip_special_tokens=True)]
        right += sum(text == row.answer for text, row in zip(texts, some, strict=True))
        errors += sum(word_errors(row.answer, text) for text, row in zip(texts, some, strict=True))
    words = sum(len(row.answer.split()) for row in rows)
    return {"questions": len(rows), "exact": right / len(rows), "word_error_rate": errors / words}


@torch.no_grad()
def consistency(model, collate: Collate, rows: list[Row], shift: int = 0, batch_size: int = 50) -> float:
    """Mean consistency of questions with their answers and the pictures or clips of the rows so many places on."""
    told = [
        row._replace(features=shown.features, samples=shown.samples)
        for row, shown in zip(rows, rows[shift:] + rows[:shift], strict=True)
    ]
    batches = (collate([told[start : start + batch_size]]) for start in range(0, len(told), batch_size))
    return torch.cat([model(**batch).consistency for batch in batches]).mean().item()
