"""Light evaluators of candidates: other checkpoints that read a prompt and a few texts and give each text a number.

Any function `(prompt, texts) -> scores` is an evaluator; these are the usual ones.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer


class _CheckpointEvaluator:
    """A model of transformers with its tokenizer, run on a few texts at a time.

    Args:
        model, tokenizer: on any device; the model is put into evaluation mode.
        batch_size: texts per forward.
        max_length: tokens per text, what follows is not read; default: what the tokenizer says, if it says anything.
    """

    auto_class: Any = AutoModel

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 16, max_length: int | None = None):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if tokenizer.pad_token_id is None:
            raise ValueError("the evaluator's tokenizer has no padding token; set tokenizer.pad_token")
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        # Tokenizers that know no limit say an astronomical one.
        self.max_length = max_length or (tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None)

    @classmethod
    def from_pretrained(cls, checkpoint: str, **options):
        """Loads model and tokenizer from a folder or a hub id; `options` as in the constructor."""
        return cls(cls.auto_class.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint), **options)

    @torch.no_grad()
    def _run(self, texts: list[str], pairs: list[str] | None = None) -> torch.Tensor:
        """What `_read` makes of the model's output, `[texts, ...]` in float32 on the CPU; each text alone or behind its pair."""
        results = []
        for start in range(0, len(texts), self.batch_size):
            part = slice(start, start + self.batch_size)
            given = (texts[part],) if pairs is None else (pairs[part], texts[part])
            encoded = self.tokenizer(
                *given, return_tensors="pt", padding=True, truncation=self.max_length is not None, max_length=self.max_length
            ).to(self.model.device)
            results.append(self._read(self.model(**encoded), encoded["attention_mask"]).float().cpu())
        return torch.cat(results)

    def _read(self, output: Any, mask: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class RewardEvaluator(_CheckpointEvaluator):
    """Scores of a reward model or a classifier.

    A model with one output gives its value (a reward); with several, the log-probability of `label`. Prompt and text go through
    the tokenizer's chat template as a question and its answer; without a template they are a pair of texts.

    Args:
        label: number or name of the class to look for.
        with_prompt: False = the text alone is classified (its tone, for instance).

    Raises:
        ValueError: several outputs and no label, or a label that the model does not have.
    """

    auto_class = AutoModelForSequenceClassification

    def __init__(self, model: Any, tokenizer: Any, *, label: int | str | None = None, with_prompt: bool = True, **options):
        super().__init__(model, tokenizer, **options)
        names = {int(number): name for number, name in model.config.id2label.items()}
        self.label = {name: number for number, name in names.items()}.get(label, label)
        self.with_prompt = with_prompt
        if len(names) > 1 and self.label not in names:
            raise ValueError(f"label={label!r}: the model tells {names} apart; say which of them is wanted")

    def __call__(self, prompt: str, texts: list[str]) -> list[float]:
        if not self.with_prompt:
            logits = self._run(texts)
        elif self.tokenizer.chat_template:
            turns = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": text}] for text in texts]
            logits = self._run([self.tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns])
        else:
            logits = self._run(texts, [prompt] * len(texts))
        return (logits[:, 0] if logits.shape[1] == 1 else logits.log_softmax(-1)[:, self.label]).tolist()

    def _read(self, output: Any, mask: torch.Tensor) -> torch.Tensor:
        return output.logits


class EmbeddingEvaluator(_CheckpointEvaluator):
    """Cosine between the embeddings of the prompt and of each text, -1 ... 1: how much a text is about what was asked.

    An embedding is the mean of the last hidden states over the real tokens, as in Sentence-BERT (https://arxiv.org/abs/1908.10084).
    An empty text gets -1.

    Args:
        target: compare with this text instead of the prompt.
    """

    def __init__(self, model: Any, tokenizer: Any, *, target: str | None = None, **options):
        super().__init__(model, tokenizer, **options)
        self.target = target

    def __call__(self, prompt: str, texts: list[str]) -> list[float]:
        filled = [text for text in texts if text.strip()]
        if not filled:
            return [-1.0] * len(texts)
        wanted, *embeddings = F.normalize(self._run([self.target or prompt, *filled]), dim=-1)
        scores = iter([float(embedding @ wanted) for embedding in embeddings])
        return [next(scores) if text.strip() else -1.0 for text in texts]

    def _read(self, output: Any, mask: torch.Tensor) -> torch.Tensor:
        mask = mask.unsqueeze(-1).to(output.last_hidden_state)
        return (output.last_hidden_state * mask).sum(1) / mask.sum(1)
