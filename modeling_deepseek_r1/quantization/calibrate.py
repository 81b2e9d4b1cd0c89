"""Quantizing a model block by block while it reads a text, so that each block makes up for the errors of those before.

Two streams of hidden states go through the blocks: that of the model as it was, and that of the quantized one, which the Gram
matrices are made of. Inside a block the matrices are rounded in the order in which they act. With "gptq" each of them aims at what
the first stream gets from it; those whose outputs are added to the stream itself also at what is missing there
(https://arxiv.org/abs/2505.11695). Only the Gram matrices of layers with the same inputs exist at a time.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling_deepseek_r1 import DeepseekR1TextModel
from ..moe.experts import DeepseekR1Experts
from ..moe.gates import DeepseekR1ExpertRouter
from ..moe.kernels import sort_pairs
from .quantizer import weights_of
from .report import LayerRecord, MatrixRecord
from .solve import DAMPING, TIED_DAMPING, solve
from .targets import Target, replace, targets

_STREAM_BEHIND = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}
"""Layers whose outputs are added to the stream -> the norm that reads what they are added to."""


@dataclasses.dataclass
class Seen:
    """What a text says of a matrix `W` `[out, in]` with inputs `X`, or of each expert's, `[E, ...]`.

    Attributes:
        gram: `X^T X`, `[in, in]`.
        shortfall: `(Y - X W^T)^T X`, `[out, in]`, where `Y` are the outputs that there should be; None: those that there are.
    """

    gram: torch.Tensor
    shortfall: torch.Tensor | None = None

    def __add__(self, other: "Seen") -> "Seen":
        return Seen(self.gram + other.gram, None if self.shortfall is None else self.shortfall + other.shortfall)

    def of(self, number: int) -> "Seen":
        """What is seen of one expert's."""
        return Seen(self.gram[number], None if self.shortfall is None else self.shortfall[number])


class _Enough(Exception):
    pass


class Calibration:
    """What the blocks of a decoder get while it reads a text.

    Args:
        model: the model before quantization, in evaluation mode.
        windows: `[windows, n]` token ids, each window read by itself.

    Attributes:
        names: of the blocks. inputs: hidden states of the first one, by window. head_gram: Gram matrix of what the head gets.

    Raises:
        ValueError: another family's model.
    """

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor):
        self.model, self.windows = model, windows.to(model.device).split(1)
        decoder = getattr(model.base_model, "language_model", model.base_model)
        if not isinstance(decoder, DeepseekR1TextModel):
            raise ValueError(f"{type(model).__name__} cannot read a text here; only decoders of this library are calibrated")
        found = {id(block): name for name, block in model.named_modules() if name}
        self.blocks = list(decoder.layers)
        self.names = [found[id(block)] for block in self.blocks]
        self._calls: list[list[tuple[tuple, dict]]] = [[] for _ in self.blocks]
        self.inputs: list[torch.Tensor] = []
        self.head_gram: torch.Tensor | None = None
        hooks = [
            block.register_forward_pre_hook(self._recorder(number), with_kwargs=True)
            for number, block in enumerate(self.blocks)
        ]
        try:
            for window in self.windows:
                states = _rows(decoder(window, use_cache=False).last_hidden_state)
                self.head_gram = states.T @ states if self.head_gram is None else self.head_gram.addmm_(states.T, states)
        finally:
            for hook in hooks:
                hook.remove()

    def _recorder(self, number: int) -> Callable:
        def record(block, args, kwargs):
            self._calls[number].append((args[1:], kwargs))
            if number == 0:
                self.inputs.append(args[0])

        return record

    def embedded(self) -> list[torch.Tensor]:
        """The first block's inputs with the embedding that the model has now."""
        inputs = []

        def stop(block, args, kwargs):
            inputs.append(args[0])
            raise _Enough

        hook = self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            for window in self.windows:
                with suppress(_Enough):
                    self.model.base_model(window, use_cache=False)
        finally:
            hook.remove()
        return inputs

    def run(self, number: int, block: nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs of a block in the place of block `number`, for hidden states by window."""
        outputs = []
        for states, (args, kwargs) in zip(inputs, self._calls[number], strict=True):
            output = block(states, *args, **kwargs)
            outputs.append(output[0] if isinstance(output, tuple) else output)
        return outputs

    def read(
        self, number: int, block: nn.Module, names: list[str], window: int, states: torch.Tensor
    ) -> dict[str, tuple[tuple, Any]]:
        """What some modules of a block get and give while it reads a window, in the order in which they are ready. The block is
        left behind the last of them."""
        found: dict[str, tuple[tuple, Any]] = {}

        def remember(name: str) -> Callable:
            def hook(module, args, output):
                found[name] = args, output
                if len(found) == len(names):
                    raise _Enough

            return hook

        args, kwargs = self._calls[number][window]
        with _hooked([(block.get_submodule(name), remember(name)) for name in names]), suppress(_Enough):
            block(states, *args, **kwargs)
        return found


@contextmanager
def _hooked(pairs) -> Iterator[None]:
    hooks = [module.register_forward_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rows(states: torch.Tensor) -> torch.Tensor:
    return states.flatten(0, -2).float()


def _stages(order: dict[str, tuple[tuple, Any]], chosen: dict[str, Target]) -> list[list[str]]:
    """Names of a block's targets in the order in which they act, linear layers with the same inputs together, and at the end what a
    text does not get to.

    Args:
        order: what `Calibration.read` finds of them.
    """
    stages, last = [], None
    for name, (args, _) in order.items():
        if args[0] is last:
            stages[-1].append(name)
        else:
            stages.append([name])
        last = args[0] if isinstance(chosen[name].module, nn.Linear) else None
    missing = [name for name in chosen if name not in order]
    return [*stages, missing] if missing else stages


def _look(
    calibration: Calibration, number: int, original: nn.Module | None, chosen: dict[str, Target], states, reference
) -> dict[str, dict[str, Seen]]:
    """What the text says of some targets of a block, by their names and those of `weights_of`.

    Args:
        original: the block as it was, if its outputs are aimed at.
        chosen: targets with the same inputs.
        states, reference: the block's inputs by window, with the blocks before it quantized, and as they were.
    """
    names = [name for name, target in chosen.items() if isinstance(target.module, (nn.Linear, DeepseekR1Experts))]
    norms = [_STREAM_BEHIND[name] for name in names if name in _STREAM_BEHIND]
    seen: dict[str, dict[str, Seen]] = {name: {} for name in chosen}
    for window, (own, other) in enumerate(zip(states, reference, strict=True)):
        ours = calibration.read(number, calibration.blocks[number], norms + names, window, own)
        theirs = ours if original is None else calibration.read(number, original, norms + names, window, other)
        gram = None
        for name in filter(ours.__contains__, names):
            (inputs, *rest), output = ours[name]
            if isinstance(chosen[name].module, DeepseekR1Experts):
                found = _of_experts(chosen[name].module, inputs, *rest, wanted=theirs[name][0][0])
            else:
                rows, missing = _rows(inputs), _rows(theirs[name][1] - output)
                gram = rows.T @ rows if gram is None else gram
                if name in _STREAM_BEHIND:
                    missing += _rows(theirs[_STREAM_BEHIND[name]][0][0] - ours[_STREAM_BEHIND[name]][0][0])
                found = {"": Seen(gram, None if original is None else missing.T @ rows)}
            for part, one in found.items():
                seen[name][part] = seen[name][part] + one if part in seen[name] else one
    return seen


def _of_experts(experts: DeepseekR1Experts, hidden_states, top_k_index, top_k_weights, wanted: torch.Tensor) -> dict[str, Seen]:
    """Of the tokens that are routed to each expert, weighted as its output is.

    Args:
        wanted: the hidden states that there should be.
    """
    slots, sizes = sort_pairs(top_k_index, top_k_weights, experts.num_experts)
    tokens, weights = slots // top_k_index.shape[1], top_k_weights.flatten()[slots, None]
    parts: dict[str, list[Seen]] = {"gate_up_proj": [], "down_proj": []}
    streams = (states[tokens].split(sizes) for states in (hidden_states, wanted))
    for number, (*pair, weight) in enumerate(zip(*streams, weights.split(sizes), strict=True)):
        inputs = {"gate_up_proj": [rows * weight for rows in pair], "down_proj": []}
        for rows in pair:
            gate, up = (rows @ experts.gate_up_proj[number].T).chunk(2, -1)
            inputs["down_proj"].append(experts.act_fn(gate) * up * weight)
        for name, (own, other) in inputs.items():
            own, other = own.float(), other.float()
            drift = (other - own).T @ own
            parts[name].append(Seen(own.T @ own, getattr(experts, name)[number].float() @ drift))
    return {
        name: Seen(*(torch.stack(tensors) for tensors in zip(*((one.gram, one.shortfall) for one in found), strict=True)))
        for name, found in parts.items()
    }


def quantized_module(
    target: Target, seen: dict[str, Seen], method: str, damping: float = DAMPING
) -> tuple[nn.Module, list[MatrixRecord]]:
    """What takes the place of a target, and what it does wrong.

    Args:
        seen: by the names of `weights_of`; what is missing is rounded to nearest.
    """
    new = target.empty().to(next(target.module.parameters()).device)
    records = []
    for name, weight in weights_of(target.module).items():
        has_scale = target.input_scale and not name.startswith("factors")
        own, found = "fitted" if method == "awq" and not has_scale else method, seen.get(name)
        each = [(weight, found)]
        if weight.dim() == 3:
            each = [(one, found and found.of(number)) for number, one in enumerate(weight)]
        parts = [
            solve(one.float(), text and text.gram, target.format, own, damping, text and text.shortfall) for one, text in each
        ]
        stack = (lambda tensors: tensors[0]) if weight.dim() == 2 else torch.stack
        scales = None if parts[0].input_scale is None else stack([part.input_scale for part in parts])
        zeros = None if parts[0].grid.zeros is None else stack([part.grid.zeros for part in parts])
        grid = type(parts[0].grid)(stack([part.grid.scales for part in parts]), zeros)
        module = new.get_submodule(name)
        module.fill(stack([part.codes for part in parts]), grid, scales)
        after = sum(b.numel() * b.element_size() for b in module.buffers())
        full_name = f"{target.name}.{name}" if name else target.name
        errors = [part.error for part in parts]
        unseen = 0 if found is None or weight.dim() == 2 else int((found.gram.diagonal(0, -2, -1).sum(-1) == 0).sum())
        records.append(
            MatrixRecord(
                full_name, weight.numel() * weight.element_size(), after, sum(errors) / len(errors), found is not None, unseen
            )
        )
    return new, records


def calibrated(
    model: PreTrainedModel, config, windows: torch.Tensor, on_progress: Callable[[int, int], None] | None = None
) -> tuple[list[MatrixRecord], list[LayerRecord]]:
    """Quantizes a model in place while it reads a text.

    Args:
        config: a `DeepseekR1QuantizationConfig`.
        windows: `[windows, n]` token ids.
        on_progress: called with (blocks done, blocks).
    """
    chosen = targets(model, config)
    calibration, matrices, layers = Calibration(model, windows), [], []
    outside = [target for target in chosen if not target.name.startswith(tuple(f"{name}." for name in calibration.names))]
    matrices += _quantize_outside(model, outside, calibration, config)
    reference, states = calibration.inputs, calibration.embedded()
    for number, name in enumerate(calibration.names):
        block, original = calibration.blocks[number], deepcopy(calibration.blocks[number])
        aim = original if config.method == "gptq" else None
        inside = {target.name.removeprefix(f"{name}."): target for target in chosen if target.name.startswith(f"{name}.")}
        for names in _stages(calibration.read(number, block, list(inside), 0, states[0]), inside):
            # Low-rank experts are a target beside the layers inside of them, which are others by now.
            stage = {one: dataclasses.replace(inside[one], module=block.get_submodule(one)) for one in names}
            seen = _look(calibration, number, aim, stage, states, reference)
            for one, target in stage.items():
                new, records = quantized_module(target, seen[one], config.method)
                replace(model, target.name, new)
                matrices += records
        streams, choices = [], []
        for one, inputs in ((original, reference), (block, states)):
            routers = [module for module in one.modules() if isinstance(module, DeepseekR1ExpertRouter)]
            choices.append([])
            with _hooked([(router, _remember(choices[-1])) for router in routers]):
                streams.append(calibration.run(number, one, inputs))
        reference, states = streams
        own = [record for record in matrices if record.name.startswith(f"{name}.")]
        layers.append(LayerRecord.of(name, own, _distance(states, reference), _agreement(*choices)))
        if on_progress is not None:
            on_progress(number + 1, len(calibration.blocks))
    return matrices, layers


def _quantize_outside(model, outside: list[Target], calibration: Calibration, config) -> list[MatrixRecord]:
    """Embedding and head, and the towers of other modalities, which a text says nothing of."""
    records, head, embedding = [], model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    for target in outside:
        if is_tied and target.module is head:
            continue  # see `targets.tie_head`
        reads_head_inputs = target.module is head or (is_tied and target.module is embedding)
        seen = {"": Seen(calibration.head_gram)} if reads_head_inputs else {}
        new, own = quantized_module(target, seen, config.method, TIED_DAMPING if is_tied else DAMPING)
        replace(model, target.name, new)
        records += own
    return records


def _remember(choices: list) -> Callable:
    def hook(module, args, output):
        index = torch.where(output.top_k_weights != 0, output.top_k_index, -1)
        choices.append(index.sort(-1).values)

    return hook


def _agreement(before: list[torch.Tensor], after: list[torch.Tensor]) -> float | None:
    """Share of tokens with the same experts."""
    if not before:
        return None
    return float((torch.cat(before) == torch.cat(after)).all(-1).float().mean())


def _distance(states: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    wrong = sum(float((a - b).float().square().sum()) for a, b in zip(states, reference, strict=True))
    return (wrong / sum(float(b.float().square().sum()) for b in reference)) ** 0.5
