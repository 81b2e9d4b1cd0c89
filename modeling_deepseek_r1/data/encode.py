"""Records as token ids and labels.

The columns are those of TRL's dataset formats: `text`; `messages` (and `tools`); `prompt` and `completion`, each a text or a
list of messages; `text` and `label`. A label of -100 is not learned.
"""

import re
from collections.abc import Callable
from os.path import commonprefix
from typing import Any

from ..evaluation.text import leading_token_id
from .read import Record, Records

IGNORED = -100
GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
TASKS = ("text", "chat", "classification")

Example = dict[str, Any]
"""`input_ids`, and `labels`: a list of equal length, absent where it would be the same, or the number of a class."""


def data_task(record: Record) -> str:
    """Which of `TASKS` a record is meant for, by its columns.

    Raises:
        ValueError: for none of them.
    """
    names = set(record.fields)
    if "messages" in names or {"prompt", "completion"} <= names:
        return "chat"
    if {"text", "label"} <= names:
        return "classification"
    if "text" in names:
        return "text"
    raise ValueError(
        f"{record.where} has the columns {', '.join(map(str, record.fields))}; needed are text, or messages, or prompt and"
        " completion, or text and label"
    )


def make_encoder(
    task: str, tokenizer, *, max_length: int | None = None, label_names: list[str] | None = None
) -> "TextEncoder | ChatEncoder | ClassificationEncoder":
    """The encoder of a task; see the classes.

    Raises:
        ValueError: an unknown task.
    """
    if task == "text":
        return TextEncoder(tokenizer)
    if task == "chat":
        return ChatEncoder(tokenizer, max_length)
    if task == "classification":
        return ClassificationEncoder(tokenizer, label_names or [], max_length)
    raise ValueError(f"task {task!r} is unknown, choose one of {', '.join(TASKS)}")


def _text_of(record: Record, column: str = "text") -> str:
    text = record.fields.get(column)
    if not isinstance(text, str):
        found = "there is no such column" if column not in record.fields else f"it is {type(text).__name__}"
        raise ValueError(f"{record.where}: the column {column!r} must be a text; {found}")
    return text


class TextEncoder:
    """Whole texts, ended by the end-of-text token.

    Attributes:
        notes: a line for everything that was left out or cut.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.empty = 0

    def __call__(self, record: Record) -> list[Example]:
        """One example, or none for an empty text.

        Raises:
            ValueError: the record has no text.
        """
        text = _text_of(record)
        if not text.strip():
            self.empty += 1
            return []
        ids = self.tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return [{"input_ids": ids if end is None or ids[-1] == end else [*ids, end]}]

    @property
    def notes(self) -> list[str]:
        return [f"left out {self.empty} empty texts"] if self.empty else []


class ChatEncoder:
    """Conversations by the tokenizer's chat template; only what the assistant says is learned, the token that ends its turn
    included.

    A template with `{% generation %}` markers says itself what that is. For others the conversation is rendered up to every
    answer, with and without it: what the answer adds behind the generation prompt is its own. Where a template renders an
    answer in another way once the conversation goes on (reasoning that is dropped, for one), every answer becomes an example
    of its own, in the context that the model will have when it gives it.

    Args:
        tokenizer: with a chat template.
        max_length: longer examples are cut at the end; one without any learned token left is left out.

    Raises:
        ValueError: there is no chat template.
    """

    def __init__(self, tokenizer, max_length: int | None = None):
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; set tokenizer.chat_template, or train on plain text")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.marked = isinstance(tokenizer.chat_template, str) and bool(GENERATION_MARKER.search(tokenizer.chat_template))
        self.cut = self.without_answer = 0

    def __call__(self, record: Record) -> list[Example]:
        """Examples of one conversation.

        Raises:
            ValueError: no conversation in the record, or none with an answer, or one that the template refuses.
        """
        fields = record.fields
        if "messages" in fields:
            examples = self._conversation(record, _messages(record, "messages"), 0)
        elif isinstance(fields.get("prompt"), str):
            prompt, completion = _text_of(record, "prompt"), _text_of(record, "completion") + (self.tokenizer.eos_token or "")
            span = (len(prompt), len(prompt) + len(completion))
            examples = [self._spans(prompt + completion, [span], leading_token_id(self.tokenizer))]
        else:
            prompt, completion = _messages(record, "prompt"), _messages(record, "completion")
            examples = self._conversation(record, [*prompt, *completion], len(prompt))
        return [example for example in map(self._shorten, examples) if example is not None]

    @property
    def notes(self) -> list[str]:
        notes = [f"cut {self.cut} conversations to {self.max_length} tokens"] if self.cut else []
        if self.without_answer:
            notes.append(f"left out {self.without_answer} conversations whose answers begin after {self.max_length} tokens")
        return notes

    def _conversation(self, record: Record, messages: list[dict[str, Any]], first: int) -> list[Example]:
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant" and number >= first]
        if not turns or turns[0] == 0:
            what = "begins with an answer" if turns else "has no message of the role 'assistant' that could be learned"
            raise ValueError(f"{record.where}: the conversation {what}")
        options = {**(record.fields.get("chat_template_kwargs") or {}), "tools": record.fields.get("tools") or None}

        def render(number: int, prompt: bool = False) -> str:
            return self.tokenizer.apply_chat_template(
                messages[:number], tokenize=False, add_generation_prompt=prompt, **options
            )

        try:
            if self.marked and first == 0:
                return [self._marked(messages[: turns[-1] + 1], options)]
            answers = [_answer(render, turn) for turn in turns]
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"{record.where}: the chat template refuses the conversation: {error}") from error
        whole = answers[-1][0]
        if all(whole.startswith(text) for text, _ in answers):
            return [self._spans(whole, [(start, len(text)) for text, start in answers])]
        return [self._spans(text, [(start, len(text))]) for text, start in answers]

    def _marked(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> Example:
        encoded = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        return {"input_ids": ids, "labels": [token if learned else IGNORED for token, learned in zip(ids, mask, strict=True)]}

    def _spans(self, text: str, spans: list[tuple[int, int]], leading: int | None = None) -> Example:
        """The text's ids, with the tokens inside of the spans of characters as labels.

        Places are found by encoding the text up to them, which every tokenizer can do; reported offsets leave out white space.
        A token that lies on both sides of a span's beginning or end is not learned.
        """
        ids = self._encode(text)
        labels = [IGNORED] * len(ids)
        for start, stop in spans:
            before = self._encode(text[:start])
            first = _common_length(before, ids)
            first += first < len(before)
            last = _common_length(self._encode(text[: _without_space(text, start, stop, self.tokenizer.eos_token)]), ids)
            labels[first:last] = ids[first:last]
        if leading is not None:
            ids, labels = [leading, *ids], [IGNORED, *labels]
        return {"input_ids": ids, "labels": labels}

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _shorten(self, example: Example) -> Example | None:
        if self.max_length is not None and len(example["input_ids"]) > self.max_length:
            self.cut += 1
            example = {name: values[: self.max_length] for name, values in example.items()}
            if all(label == IGNORED for label in example["labels"]):
                self.cut -= 1
                self.without_answer += 1
                return None
        return example


def _answer(render: Callable[..., str], turn: int) -> tuple[str, int]:
    """The conversation rendered up to an answer, and the character at which what the model has to say begins."""
    text, prompt = render(turn + 1), render(turn, prompt=True)
    # A generation prompt may open a block (reasoning) that a rendered answer does not have: the common part is the prompt.
    start = len(commonprefix((text, prompt)))
    if start < len(render(turn)):
        raise ValueError(
            "it changes what comes before an answer, so that the answer's beginning is unknown; mark it by {% generation %}"
        )
    return text, start


def _common_length(some: list[int], others: list[int]) -> int:
    differing = (number for number, (one, other) in enumerate(zip(some, others, strict=False)) if one != other)
    return next(differing, min(len(some), len(others)))


def _without_space(text: str, start: int, stop: int, end_of_turn: str | None) -> int:
    """Where a span stops if the white space after the token that ends the turn, at which generation stops, is left out."""
    stripped = text[start:stop].rstrip()
    return start + len(stripped) if end_of_turn and stripped.endswith(end_of_turn) else stop


def _messages(record: Record, column: str) -> list[dict[str, Any]]:
    messages = record.fields.get(column)
    if not isinstance(messages, list) or not all(isinstance(message, dict) and "role" in message for message in messages):
        raise ValueError(f"{record.where}: the column {column!r} must be a list of messages with role and content")
    # Tables fill up the fields that other messages have.
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


class ClassificationEncoder:
    """Texts with a class.

    Args:
        tokenizer: the checkpoint's.
        label_names: names of the classes, in the order of their numbers; labels are these names, or numbers.
        max_length: longer texts are cut at the end.
    """

    def __init__(self, tokenizer, label_names: list[str], max_length: int | None = None):
        self.tokenizer, self.max_length, self.cut = tokenizer, max_length, 0
        self.label_names = label_names
        self.number_of = {name: number for number, name in enumerate(label_names)}

    def __call__(self, record: Record) -> list[Example]:
        """One example.

        Raises:
            ValueError: an empty text, or a label that is not among the classes.
        """
        text, label = _text_of(record), label_name(record)
        if not text.strip():
            raise ValueError(f"{record.where}: the text is empty, there is nothing to classify")
        if label not in self.number_of:
            raise ValueError(f"{record.where}: the label {label!r} is unknown; known are {', '.join(self.label_names)}")
        ids = self.tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
        self.cut += self.max_length is not None and len(ids) > self.max_length
        return [{"input_ids": ids[: self.max_length], "labels": self.number_of[label]}]

    @property
    def notes(self) -> list[str]:
        return [f"cut {self.cut} texts to {self.max_length} tokens"] if self.cut else []


def label_name(record: Record) -> str:
    """The label of a record as text.

    Raises:
        ValueError: it is missing, or neither a text nor a whole number.
    """
    label = record.fields.get("label")
    if isinstance(label, bool) or not isinstance(label, (str, int)) or label == "":
        raise ValueError(f"{record.where}: the column 'label' must be a name or a whole number, not {label!r}")
    return str(label)


def find_labels(records: Records) -> list[str]:
    """All labels of the data, whole numbers by value, others by name.

    Raises:
        ValueError: fewer than two.
    """
    names = {label_name(record) for record in records}
    if len(names) < 2:
        raise ValueError(f"{', '.join(records.names)}: {len(names)} kinds of labels; a classification needs at least two")
    numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
    return sorted(names, key=int if numbers else None)
