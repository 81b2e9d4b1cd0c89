"""Healing: a converted model learns to predict what its dense source predicts.

Per predicted token, with the teacher's distribution p, the student's q, both at temperature T, and hidden states h of L layers:

    loss = T^2 KL(p || q)  +  ce_weight (-log q(label) at T = 1)  +  hidden_weight / L sum_l |h_l - h'_l|^2 / |h'_l|^2

The first term is that of https://arxiv.org/abs/1503.02531; that a few million tokens and low-rank updates suffice to move a
pretrained model to another attention is known from LoLCATs (https://arxiv.org/abs/2410.10254).

The teacher is a model of its own, but where its weights are frozen in the student it has the student's: with adapters, memory
stays near that of one model. Logits of either model exist for a few positions at a time, and their gradient is computed on the
way, so that rows can be long.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from ..attention.layer import DeepseekR1Attention
from ..conversion.calibrate import load_plain
from ..conversion.convert import weights_dtype
from ..conversion.families import TARGET_MODEL_TYPE
from ..conversion.plan import expected_tensors, plan_tensors
from ..conversion.source import open_source
from ..conversion.target import plain_target, read_source_config
from ..modeling_deepseek_r1 import DeepseekR1ForCausalLM
from .trainer import DeepseekR1Trainer

POSITIONS_PER_CHUNK = 256
"""Positions whose logits exist at the same time."""
TEACHER_INPUTS = ("input_ids", "attention_mask", "position_ids", "seq_idx", "mm_token_type_ids")


@dataclass(frozen=True)
class DistillationConfig:
    """The loss of a distillation.

    Args:
        temperature: T; 1 = the distributions themselves.
        top_k: look at the teacher's k most probable tokens and take all others for one; None = the whole vocabulary.
        ce_weight: of the cross-entropy to the labels.
        hidden_weight: of the relative error of the hidden states behind every layer.
        window: while the student trains its sliding windows are at most so long; None = as they are. Rows are far shorter than the
            texts that a model is for, and in long windows they would hardly show it what lies beyond.

    Raises:
        ValueError: a temperature, top_k or window that is not positive, or a negative weight.
    """

    temperature: float = 1.0
    top_k: int | None = None
    ce_weight: float = 0.0
    hidden_weight: float = 0.0
    window: int | None = None

    def __post_init__(self):
        if self.temperature <= 0 or any(count is not None and count < 1 for count in (self.top_k, self.window)):
            raise ValueError(f"temperature={self.temperature}, top_k={self.top_k} and window={self.window} must be positive")
        if self.ce_weight < 0 or self.hidden_weight < 0:
            raise ValueError(f"ce_weight={self.ce_weight} and hidden_weight={self.hidden_weight} must be 0 or more")


def load_teacher(source: str | os.PathLike, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A checkpoint of this library or of a family that converts (folder, GGUF file, hub id) as a frozen model of this library.

    Raises:
        ValueError: an unsupported or damaged checkpoint.
        OSError: nothing is there.
    """
    origin = open_source(source)
    source_config = read_source_config(origin)
    if source_config.model_type == TARGET_MODEL_TYPE:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    else:
        config = plain_target(source_config, weights_dtype(origin, source_config, dtype))
        plan_tensors(origin, config, dtype)
        model = load_plain(config, list(expected_tensors(config)), origin.read)
    return model.eval().requires_grad_(False)


def share_weights(teacher: nn.Module, student: nn.Module) -> int:
    """Gives the teacher the student's own storage of every frozen weight that both have in common.

    Whatever changes these weights of the student later (merging adapters into them, say) changes the teacher.

    Returns:
        The number of single weights that are shared now.
    """
    frozen = {_plain_name(name): weight for name, weight in student.named_parameters() if not weight.requires_grad}
    shared = 0
    for name, weight in teacher.named_parameters():
        same = frozen.get(name)
        if same is None or same.dtype != weight.dtype or same.shape != weight.shape:
            continue
        if torch.equal(weight.to(same.device), same):
            weight.data = same.data
            shared += weight.numel()
    return shared


def _plain_name(name: str) -> str:
    """A parameter's name without what PEFT puts around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0, top_k: int | None = None
) -> torch.Tensor:
    """`T^2 KL(teacher || student)` in nats, `[N]` float32, of logits `[N, V]`.

    With `top_k` the KL of distributions over the teacher's k best tokens and the rest, which is at most the full one.
    """
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    q, p = (F.log_softmax(logits.float(), -1) for logits in (student, teacher))
    if top_k is not None and top_k < p.shape[-1]:
        best = p.topk(top_k, -1).indices
        q, p = (torch.cat((chosen, _log_rest(chosen)), -1) for chosen in (q.gather(-1, best), p.gather(-1, best)))
    return temperature**2 * F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def _log_rest(log_probabilities: torch.Tensor) -> torch.Tensor:
    """`[N, 1]`: log of what the probabilities of a row leave of 1, kept away from the logarithm of 0."""
    rest = -torch.expm1(log_probabilities.logsumexp(-1, keepdim=True))
    return rest.clamp(min=torch.finfo(torch.float32).eps).log()


class _ThroughHead(torch.autograd.Function):
    """The sum of two losses of logits `head(hidden)`, and both by themselves; the gradient is computed with them, chunk by chunk.

    `measure` gets the logits and the number of their rows, and returns the two losses, each summed over the rows.
    """

    @staticmethod
    def forward(ctx, measure: Callable[[torch.Tensor, slice], torch.Tensor], head: nn.Module, hidden, *parameters):
        gradients = [torch.zeros_like(tensor) for tensor in (hidden, *parameters)]
        sums = torch.zeros(2, device=hidden.device)
        for start in range(0, len(hidden), POSITIONS_PER_CHUNK):
            rows = slice(start, start + POSITIONS_PER_CHUNK)
            with torch.enable_grad():
                states = hidden[rows].detach().requires_grad_()
                parts = measure(head(states), rows)
                found = torch.autograd.grad(parts.sum(), [states, *parameters])
            gradients[0][rows] = found[0]
            for total, part in zip(gradients[1:], found[1:], strict=True):
                total += part
            sums += parts.detach()
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(sums)
        return sums.sum(), sums

    @staticmethod
    def backward(ctx, gradient, _):
        return None, None, *(gradient.to(saved.dtype) * saved for saved in ctx.saved_tensors)


class DistillationTrainer(DeepseekR1Trainer):
    """Trains a causal language model to predict what a teacher predicts.

    The parts of the loss are logged as `divergence`, `cross_entropy`, `hidden_error` and `router_loss`, where they are asked for;
    auxiliary losses of experts stay in. An evaluation's loss is the student's own cross-entropy as ever; beside its perplexity
    the teacher's is given, by which share the former is higher (`gap`), and the mean divergence, at temperature 1.

    Args:
        model, args, ...: as for the Trainer; the student is any causal language model of this library, with adapters or not.
        teacher: a frozen causal language model of this library with the same vocabulary (`load_teacher`). It takes over the
            storage of what is frozen in the student, see `share_weights`.
        distillation: the loss.

    Raises:
        ValueError: models that do not fit each other, or settings that cannot be beside a teacher.
    """

    def __init__(
        self, model=None, args=None, *rest, teacher: nn.Module, distillation: DistillationConfig | None = None, **named
    ):
        super().__init__(model, args, *rest, **named)
        self.distillation = distillation or DistillationConfig()
        self.student = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        self._check(teacher)
        self.shared_weights = share_weights(teacher, self.model)
        self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
        self._compared = torch.zeros(4)
        attentions = [module for module in self.student.modules() if isinstance(module, DeepseekR1Attention)]
        self._patterns = {one: one.pattern for one in attentions if one.pattern.window is not None}

    def train(self, *args, **kwargs):
        """As the Trainer's; windows are the student's own again when it returns."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._limit_windows(None)

    def _limit_windows(self, limit: int | None) -> None:
        for attention, own in self._patterns.items():
            attention.pattern = replace(own, window=min(own.window, limit or own.window))

    def _check(self, teacher: nn.Module) -> None:
        models = {"student": self.student, "teacher": teacher}
        for name, model in models.items():
            if not isinstance(model, DeepseekR1ForCausalLM):
                raise ValueError(
                    f"the {name} is a {type(model).__name__}; it must be a DeepseekR1ForCausalLM (see load_teacher)"
                )
        student, taught = (model.config for model in models.values())
        if student.vocab_size != taught.vocab_size:
            raise ValueError(
                f"the student's vocabulary has {student.vocab_size} tokens and the teacher's {taught.vocab_size}; they must be the same"
            )
        shapes = [(config.num_hidden_layers, config.hidden_size) for config in (student, taught)]
        if self.distillation.hidden_weight and shapes[0] != shapes[1]:
            raise ValueError(
                f"hidden_weight={self.distillation.hidden_weight} compares layers one by one, but the student has {shapes[0][0]} of"
                f" width {shapes[0][1]} and the teacher {shapes[1][0]} of width {shapes[1][1]}; set it to 0"
            )
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:
            raise ValueError("label smoothing and a compute_loss_func have no place beside a teacher, who gives the targets")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("a teacher cannot share weights that FSDP or DeepSpeed divide; use plain data parallelism")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """In training the distillation's loss, in an evaluation the cross-entropy, while teacher and student are compared."""
        self._limit_windows(self.distillation.window if model.training else None)
        labels = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
        learned = labels != -100
        if "attention_mask" in inputs:
            # Padding on the left would predict the first token.
            learned = learned & inputs["attention_mask"].bool()
        labels = labels[learned]
        if not model.training:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            self._compare(outputs.logits[learned], self._teach(inputs)[-1][learned], labels, len(learned))
            return (loss, outputs) if return_outputs else loss
        coefficient = self.student.config.router_aux_loss_coef if self.student.model.routers else 0
        outputs = model(
            **{name: tensor for name, tensor in inputs.items() if name != "labels"},
            use_cache=False,
            logits_to_keep=1,
            output_hidden_states=True,
            output_router_logits=bool(coefficient),
        )
        loss, parts = self._imitation(outputs.hidden_states, self._teach(inputs), learned, labels)
        # Trainer adds up the micro-batches of a step, and averages over the ranks.
        scale = 1 / max(1, len(labels)) if num_items_in_batch is None else 1 / num_items_in_batch
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            scale = scale * (self.accelerator.num_processes // self.get_tp_size())
        if coefficient:
            parts["router_loss"] = coefficient * outputs.aux_loss * len(labels)
            loss = loss + parts["router_loss"]
        outputs.loss_parts = {name: part * scale for name, part in parts.items()}
        self._remember(outputs)
        return (loss * scale, outputs) if return_outputs else loss * scale

    @torch.no_grad()
    def _teach(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """The teacher's hidden states, those of the last layer at the end; alone, if no others are needed."""
        known = {name: inputs[name] for name in TEACHER_INPUTS if name in inputs}
        outputs = self.teacher.model(**known, use_cache=False, output_hidden_states=self.distillation.hidden_weight > 0)
        return outputs.hidden_states or (outputs.last_hidden_state,)

    def _imitation(self, student, teacher, learned: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """The sum of the loss over the learned tokens, and its parts."""
        settings, head, taught = self.distillation, self.student.lm_head, teacher[-1][learned]

        def measure(logits: torch.Tensor, rows: slice) -> torch.Tensor:
            with torch.no_grad():
                target = self.teacher.lm_head(taught[rows])
            entropy = logits.new_zeros((), dtype=torch.float32)
            if settings.ce_weight:
                entropy = settings.ce_weight * F.cross_entropy(logits.float(), labels[rows], reduction="sum")
            return torch.stack((divergence(logits, target, settings.temperature, settings.top_k).sum(), entropy))

        # A quantized head is an embedding's, whose scales may be trained.
        trained = [parameter for parameter in getattr(head, "embedding", head).parameters() if parameter.requires_grad]
        loss, sums = _ThroughHead.apply(measure, head, student[-1][learned], *trained)
        parts = {"divergence": sums[0]} | ({"cross_entropy": sums[1]} if settings.ce_weight else {})
        if settings.hidden_weight:
            pairs = zip(student[1:], teacher[1:], strict=True)
            errors = [relative_error(own[learned], target[learned]).sum() for own, target in pairs]
            parts["hidden_error"] = settings.hidden_weight * torch.stack(errors).mean()
            loss = loss + parts["hidden_error"]
        return loss, parts

    @torch.no_grad()
    def _compare(self, logits: torch.Tensor, taught: torch.Tensor, labels: torch.Tensor, rows: int) -> None:
        """Adds both cross-entropies and the divergence on one batch of so many rows, by which the Trainer weighs losses too."""
        sums = torch.zeros(3, device=logits.device)
        for own, states, targets in zip(*(x.split(POSITIONS_PER_CHUNK) for x in (logits, taught, labels)), strict=True):
            target = self.teacher.lm_head(states)
            entropies = [F.cross_entropy(one.float(), targets, reduction="sum") for one in (own, target)]
            sums += torch.stack((*entropies, divergence(own, target).sum()))
        values = torch.cat((sums / max(1, len(labels)), sums.new_ones(1)))
        self._compared = self._compared.to(values.device) + rows * values

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Adds perplexities, divergence and gap to the metrics."""
        self._compared = torch.zeros(4)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        *sums, rows = self.accelerator.reduce(self._compared.to(self.args.device), "sum").tolist()
        loss, teacher, mean_divergence = (value / rows for value in sums)
        values = {
            "perplexity": _exp(loss),
            "teacher_perplexity": _exp(teacher),
            "gap": _exp(loss - teacher) - 1,
            "divergence": mean_divergence,
        }
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in values.items()})
        return output


def relative_error(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`|states - targets|^2 / |targets|^2` over the last dimension, in float32."""
    states, targets = states.float(), targets.float()
    return (states - targets).square().sum(-1) / targets.square().sum(-1)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
