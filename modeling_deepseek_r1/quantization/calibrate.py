"""Quantizing a model block by block while it reads a text, so that each block makes up for the errors of those before.

Two streams of hidden states go through the blocks: that of the model as it was, for comparison, and that of the quantized one,
which the Gram matrices are made of. Only one block's Gram matrices exist at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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

Grams = dict[str, torch.Tensor]


class _FirstInput(Exception):
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
                states = decoder(window, use_cache=False).last_hidden_state.flatten(0, -2).float()
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
            raise _FirstInput

        hook = self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            for window in self.windows:
                try:
                    self.model.base_model(window, use_cache=False)
                except _FirstInput:
                    continue
        finally:
            hook.remove()
        return inputs

    def run(self, number: int, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs of a block, as it is now, for hidden states by window."""
        outputs = []
        for states, (args, kwargs) in zip(inputs, self._calls[number], strict=True):
            output = self.blocks[number](states, *args, **kwargs)
            outputs.append(output[0] if isinstance(output, tuple) else output)
        return outputs


@contextmanager
def _hooked(pairs) -> Iterator[None]:
    hooks = [module.register_forward_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Grams:
    """Adds up Gram matrices during forwards: of a linear layer's inputs, or of each expert's, `[E, in, in]`."""

    def __init__(self, chosen: list[Target]):
        self.by_name: dict[str, Grams] = {}
        self._last: tuple[torch.Tensor | None, Grams] = (None, {})
        self.hooks = [(target.module, self._hook(target)) for target in chosen if self._wanted(target)]

    @staticmethod
    def _wanted(target: Target) -> bool:
        return isinstance(target.module, (nn.Linear, DeepseekR1Experts))

    def _hook(self, target: Target) -> Callable:
        def linear(module, args, output):
            if args[0] is self._last[0]:  # several layers read the same
                self.by_name[target.name] = self._last[1]
                return
            grams = self.by_name.setdefault(target.name, {})
            rows = args[0].flatten(0, -2).float()
            _add(grams, "", rows.T @ rows)
            self._last = args[0], grams

        def experts(module, args, output):
            grams = self.by_name.setdefault(target.name, {})
            for name, gram in _expert_grams(module, *args).items():
                _add(grams, name, gram)

        return experts if isinstance(target.module, DeepseekR1Experts) else linear


def _add(grams: Grams, name: str, gram: torch.Tensor) -> None:
    grams[name] = gram if name not in grams else grams[name].add_(gram)


def _expert_grams(experts: DeepseekR1Experts, hidden_states, top_k_index, top_k_weights) -> Grams:
    """Of the tokens that are routed to each expert, weighted as its output is."""
    slots, sizes = sort_pairs(top_k_index, top_k_weights, experts.num_experts)
    tokens, weights = slots // top_k_index.shape[1], top_k_weights.flatten()[slots, None]
    grams: dict[str, list[torch.Tensor]] = {"gate_up_proj": [], "down_proj": []}
    for number, (rows, weight) in enumerate(zip(hidden_states[tokens].split(sizes), weights.split(sizes), strict=True)):
        gate, up = (rows @ experts.gate_up_proj[number].T).chunk(2, -1)
        product = ((experts.act_fn(gate) * up) * weight).float()
        rows = (rows * weight).float()
        grams["gate_up_proj"].append(rows.T @ rows)
        grams["down_proj"].append(product.T @ product)
    return {name: torch.stack(parts) for name, parts in grams.items()}


def quantized_module(
    target: Target, grams: Grams, method: str, damping: float = DAMPING
) -> tuple[nn.Module, list[MatrixRecord]]:
    """What takes the place of a target, and what it does wrong.

    Args:
        grams: by the names of `weights_of`; what is missing is rounded to nearest.
    """
    new = target.empty().to(next(target.module.parameters()).device)
    records = []
    for name, weight in weights_of(target.module).items():
        has_scale = target.input_scale and not name.startswith("factors")
        own, gram = "fitted" if method == "awq" and not has_scale else method, grams.get(name)
        if weight.dim() == 2:
            parts = [solve(weight.float(), gram, target.format, own, damping)]
        else:
            each = [None] * len(weight) if gram is None else gram
            parts = [solve(w.float(), g, target.format, own, damping) for w, g in zip(weight, each, strict=True)]
        stack = (lambda tensors: tensors[0]) if weight.dim() == 2 else torch.stack
        scales = None if parts[0].input_scale is None else stack([part.input_scale for part in parts])
        zeros = None if parts[0].grid.zeros is None else stack([part.grid.zeros for part in parts])
        grid = type(parts[0].grid)(stack([part.grid.scales for part in parts]), zeros)
        module = new.get_submodule(name)
        module.fill(stack([part.codes for part in parts]), grid, scales)
        after = sum(b.numel() * b.element_size() for b in module.buffers())
        full_name = f"{target.name}.{name}" if name else target.name
        errors = [part.error for part in parts]
        unseen = 0 if gram is None or weight.dim() == 2 else int((gram.diagonal(0, -2, -1).sum(-1) == 0).sum())
        records.append(
            MatrixRecord(
                full_name, weight.numel() * weight.element_size(), after, sum(errors) / len(errors), gram is not None, unseen
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
        block = calibration.blocks[number]
        inside = [target for target in chosen if target.name.startswith(f"{name}.")]
        choices: tuple[list, list] = ([], [])
        routers = [module for module in block.modules() if isinstance(module, DeepseekR1ExpertRouter)]
        with _hooked([(router, _remember(choices[0])) for router in routers]):
            reference = calibration.run(number, reference)
        grams = _Grams(inside)
        with _hooked(grams.hooks):
            calibration.run(number, states)
        for target in inside:
            # Low-rank experts are a target beside the layers inside of them.
            current = Target(target.name, model.get_submodule(target.name), target.format, target.input_scale)
            new, records = quantized_module(current, grams.by_name.get(target.name, {}), config.method)
            replace(model, target.name, new)
            matrices += records
        with _hooked([(router, _remember(choices[1])) for router in routers]):
            states = calibration.run(number, states)
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
        grams = {"": calibration.head_gram} if reads_head_inputs else {}
        new, own = quantized_module(target, grams, config.method, TIED_DAMPING if is_tied else DAMPING)
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
