"""A gate on the neurons of the MLPs that depends on the task, and a smaller model for one task.

    product' = product * 2 sigmoid(W x) * e_task        product = act(gate(x)) * up(x)

W is zero and e one at the start, where the factor is exactly one. The gate acts on neurons, not on hidden states, because a
neuron has rows of `gate_proj` and `up_proj` and a column of `down_proj` to itself: one that a task does not use is dropped with
them, and what is left is an ordinary, narrower MLP. A channel of the hidden states belongs to all layers together.

    attach_task_gates(model, ["code", "prose"])
    select_task(model, "code")                                  # then any Trainer, on texts of this task
    save_task_gates(model, folder)
    small, report = specialise(model, measure_neurons(model, batches), keep=0.75, held_out=others)

What is trained are ordinary parameters of the model (`...mlp.task_gate...`), which checkpoints of a Trainer hold besides the frozen
ones; `detach_task_gates` gives the plain model again. Layers with experts have no gate: there the router chooses for each token,
`choose_experts` and `attach_experts` train the experts of a task, and `moe.surgery.prune_experts` drops those without use.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..modeling_deepseek_r1 import DeepseekR1DecoderLayer
from ..moe.mlp import DeepseekR1MLP
from ..moe.surgery import rebuilt
from .statistics import evaluated
from .trainable import TrainableReport, make_report

WEIGHTS_FILE, SETTINGS_FILE = "task_gates.safetensors", "task_gates.json"
FORMAT_VERSION = 1
NEURONS = re.compile(r"(?:.*\.)?layers\.(\d+)\.mlp\.((?:gate|up|down)_proj\.(?:weight|bias))")


class TaskGate(nn.Module):
    """`2 sigmoid(W x) * e_task` for the I neurons of an MLP of hidden size H.

    Attributes:
        weight: W, `[I, H]` float32, zero at the start and common to all tasks.
        scales: e, `[tasks, I]` float32, one at the start.
        tasks: their names.
        task: number of the chosen one, or None: the gate does nothing.
    """

    def __init__(self, mlp: DeepseekR1MLP, tasks: Sequence[str]):
        super().__init__()
        self.tasks = tuple(tasks)
        inner, hidden_size = mlp.gate_proj.weight.shape
        placed = {"dtype": torch.float32, "device": mlp.gate_proj.weight.device}
        self.weight = nn.Parameter(torch.zeros(inner, hidden_size, **placed))
        self.scales = nn.Parameter(torch.ones(len(self.tasks), inner, **placed))
        self.task: int | None = 0

    def forward(self, product: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`[..., I]` for the neurons `product` `[..., I]` and the MLP's input `x` `[..., H]`."""
        if self.task is None:
            return product
        factor = 2 * F.linear(x, self.weight.to(x.dtype)).float().sigmoid() * self.scales[self.task]
        return product * factor.to(product.dtype)


def gated_mlps(model: nn.Module) -> dict[int, DeepseekR1MLP]:
    """Number of the layer -> its MLP, of those that have a task gate.

    Raises:
        ValueError: there are none.
    """
    gated = {layer: mlp for layer, mlp in _dense_mlps(model).items() if mlp.task_gate is not None}
    if not gated:
        raise ValueError("the model has no task gate; attach_task_gates or load_task_gates gives it some")
    return gated


def _dense_mlps(model: nn.Module) -> dict[int, DeepseekR1MLP]:
    layers = [module for module in model.modules() if isinstance(module, DeepseekR1DecoderLayer)]
    return {layer.self_attn.layer_idx: layer.mlp for layer in layers if isinstance(layer.mlp, DeepseekR1MLP)}


def attach_task_gates(model: nn.Module, tasks: Sequence[str]) -> TrainableReport:
    """Puts a gate on every dense MLP, for the first task, and freezes the rest, except a new classification head. Train without
    weight decay, which would pull the scales of all tasks to zero.

    Raises:
        ValueError: gates are there already, a model whose layers all have experts, no task or one twice.
    """
    mlps = _dense_mlps(model)
    if any(mlp.task_gate is not None for mlp in mlps.values()):
        raise ValueError("the model has task gates already; detach_task_gates takes them off")
    if not mlps:
        raise ValueError(
            "every layer of this model has experts, and task gates are for dense MLPs; train the experts of a task with"
            " choose_experts and attach_experts, and drop those without use with moe.surgery.prune_experts"
        )
    if not tasks or isinstance(tasks, str) or len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks={tasks!r} must be a list of different names, at least one")
    model.requires_grad_(False)
    for mlp in mlps.values():
        mlp.task_gate = TaskGate(mlp, tasks)
    head = getattr(model, "score", None)
    if head is not None:
        head.requires_grad_(True)
    return make_report(model, {"task gates": len(mlps)})


def select_task(model: nn.Module, task: str | None) -> None:
    """From now on the gates are those of `task`; None: none of them, the plain model.

    Raises:
        ValueError: another task than those that were attached, or no gate.
    """
    gates = [mlp.task_gate for mlp in gated_mlps(model).values()]
    if task is not None and task not in gates[0].tasks:
        raise ValueError(f"there is no task {task!r}; the gates know {', '.join(gates[0].tasks)}")
    for gate in gates:
        gate.task = gate.tasks.index(task) if task is not None else None


def detach_task_gates(model: nn.Module) -> None:
    """Takes the gates off, and everything is trainable again; ValueError where there is no gate."""
    for mlp in gated_mlps(model).values():
        mlp.task_gate = None
    model.requires_grad_(True)


def save_task_gates(model: nn.Module, folder: str | Path) -> None:
    """Writes the gates of all tasks, for `load_task_gates`; the folder may be that of the model. ValueError where there is no gate."""
    mlps, folder = gated_mlps(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{layer}.{name}": p.detach().contiguous() for layer, mlp in mlps.items() for name, p in _own(mlp).items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    settings = {"format_version": FORMAT_VERSION, "tasks": list(next(iter(mlps.values())).task_gate.tasks)}
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _own(mlp: DeepseekR1MLP) -> dict[str, nn.Parameter]:
    return dict(mlp.task_gate.named_parameters())


def load_task_gates(model: nn.Module, folder: str | Path) -> TrainableReport:
    """Attaches what `save_task_gates` has written.

    Raises:
        OSError: no such files.
        ValueError: another format, or a model with other layers or sizes.
    """
    settings = json.loads(Path(folder, SETTINGS_FILE).read_text(encoding="utf-8"))
    if settings.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{folder} has format version {settings.get('format_version')}; {FORMAT_VERSION} is known")
    tensors = load_file(Path(folder, WEIGHTS_FILE))
    report = attach_task_gates(model, settings["tasks"])
    own = {f"{layer}.{name}": p for layer, mlp in gated_mlps(model).items() for name, p in _own(mlp).items()}
    shapes = [{name: list(tensor.shape) for name, tensor in side.items()} for side in (tensors, own)]
    if shapes[0] != shapes[1]:
        detach_task_gates(model)
        name = min(name for name in {**own, **tensors} if shapes[0].get(name) != shapes[1].get(name))
        there, here = (side.get(name, "missing") for side in shapes)
        raise ValueError(f"{folder} does not fit this model: {name} is {there} there and {here} here")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    return report


@dataclass(frozen=True)
class NeuronUse:
    """What a text needs of the I neurons of one layer.

    Attributes:
        scores: `[I]` mean square of what each neuron adds to the layer's output; the smaller, the less it is used.
        factors: `[I]` the constants that come closest, by least squares, to what the gate makes of each neuron.
    """

    scores: torch.Tensor
    factors: torch.Tensor


@torch.no_grad()
def measure_neurons(model: nn.Module, batches: Iterable[Mapping[str, Any]], max_tokens: int = 65536) -> dict[int, NeuronUse]:
    """Which neurons the chosen task uses: number of the layer -> its neurons.

    Args:
        model: with task gates, in any mode; it is run as in evaluation.
        batches: arguments of its forward on texts of the task, as a collator makes them; labels are not used.
        max_tokens: no further batch is read from so many real tokens on.

    Raises:
        ValueError: no gate, none that is in use, or no token.
    """
    mlps, real, tokens = gated_mlps(model), torch.empty(0), 0
    if next(iter(mlps.values())).task_gate.task is None:
        raise ValueError("no task is selected; select_task chooses the one that is to be measured")
    sums = {layer: torch.zeros(3, mlp.down_proj.in_features, dtype=torch.float64) for layer, mlp in mlps.items()}

    def add(layer: int, product: torch.Tensor, gated: torch.Tensor) -> None:
        before, after = (rows[real.to(rows.device)].float() for rows in (product, gated))
        sums[layer] += torch.stack([(a * b).sum(0) for a, b in ((before, before), (before, after), (after, after))]).cpu()

    hooks, chunks = [], {mlp: mlp.chunk_size for mlp in mlps.values()}
    try:
        for layer, mlp in mlps.items():
            mlp.chunk_size = 0  # The hook must see all tokens of a row at once.
            hook = mlp.task_gate.register_forward_hook(lambda _, inputs, output, layer=layer: add(layer, inputs[0], output))
            hooks.append(hook)
        for inputs, real in evaluated(model, batches, max_tokens):
            model(**inputs, use_cache=False)
            tokens += int(real.sum())
    finally:
        for hook in hooks:
            hook.remove()
        for mlp, size in chunks.items():
            mlp.chunk_size = size
    if not tokens:
        raise ValueError("there is no token to measure the neurons on")
    return {layer: _use(mlps[layer], *rows, tokens) for layer, rows in sums.items()}


def _use(mlp: DeepseekR1MLP, before: torch.Tensor, both: torch.Tensor, after: torch.Tensor, tokens: int) -> NeuronUse:
    columns = mlp.down_proj.weight.detach().double().square().sum(0).cpu()
    # A neuron that was never active may have any factor.
    factors = torch.where(before > 0, both / before.clamp(min=1e-300), torch.ones_like(both))
    return NeuronUse((after / tokens * columns).float(), factors.float())


@dataclass(frozen=True)
class SpecialisationReport:
    """What became of a model.

    Attributes:
        kept: layer -> neurons that are left. widths: layer -> neurons that there were.
        bytes_before, bytes_after: of the weights, without the gates.
        loss_before, loss_after: mean next-token loss on held-out text, with the gates and in the smaller model; None = not asked.
    """

    kept: dict[int, int]
    widths: dict[int, int]
    bytes_before: int
    bytes_after: int
    loss_before: float | None
    loss_after: float | None

    def summary(self) -> str:
        """Some lines."""
        lines = [
            f"neurons         {sum(self.kept.values()):,} of {sum(self.widths.values()):,} in {len(self.kept)} layers",
            f"weights         {self.bytes_before / 1e6:,.2f} -> {self.bytes_after / 1e6:,.2f} MB",
        ]
        if self.loss_after is not None:
            lines.append(f"held-out loss   {self.loss_before:.4f} -> {self.loss_after:.4f}")
        return "\n".join(lines)


def specialise(
    model: PreTrainedModel,
    use: Mapping[int, NeuronUse],
    keep: float,
    held_out: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[PreTrainedModel, SpecialisationReport]:
    """A smaller model for the task: of every gated MLP the neurons that it uses most, the gates folded into `down_proj` as constants.
    It has no gates and is saved and loaded like any other. With untrained W, and all neurons, it is the same function.

    Args:
        model: a model of this library itself, without wrapper, with gates; it stays as it is.
        use: what `measure_neurons` says of texts of the task.
        keep: share of the neurons of a layer that stay, in (0, 1]; at least one stays.
        held_out: batches of the task on which the loss before and after is measured; for a causal language model.

    Raises:
        ValueError: a share outside of (0, 1], a wrapped model, no gates, or `use` of another model.
    """
    mlps = gated_mlps(model)
    widths = {layer: mlp.down_proj.in_features for layer, mlp in mlps.items()}
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep} must be a share of the neurons in (0, 1]")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} wraps the model; unwrap it (PEFT: merge_and_unload()) and specialise that")
    if {layer: len(neurons.scores) for layer, neurons in use.items()} != widths:
        raise ValueError(f"use must have the scores of this model's gated layers and neurons, {widths}")
    kept = {n: use[n].scores.topk(max(1, round(keep * width))).indices.sort().values for n, width in widths.items()}
    counts = {layer: len(chosen) for layer, chosen in kept.items()}
    loss_before = mean_loss(model, held_out) if held_out is not None else None
    gates = {mlp: mlp.task_gate for mlp in mlps.values()}
    try:
        for mlp in gates:
            mlp.task_gate = None
        small = rebuilt(model, _narrower(model.config, counts), NEURONS, _dropping(kept, use))
        bytes_before = sum(parameter.nbytes for parameter in model.parameters())
    finally:
        for mlp, gate in gates.items():
            mlp.task_gate = gate
    bytes_after = sum(parameter.nbytes for parameter in small.parameters())
    loss_after = mean_loss(small, held_out) if held_out is not None else None
    return small, SpecialisationReport(counts, widths, bytes_before, bytes_after, loss_before, loss_after)


def _dropping(
    kept: Mapping[int, torch.Tensor], use: Mapping[int, NeuronUse]
) -> Callable[[int, str, torch.Tensor], torch.Tensor]:
    """Makes the tensors of a narrower MLP (`moe.surgery.rebuilt`)."""

    def convert(layer: int, part: str, tensor: torch.Tensor) -> torch.Tensor:
        if layer not in kept or part == "down_proj.bias":
            return tensor
        chosen = kept[layer].to(tensor.device)
        if part != "down_proj.weight":
            return tensor[chosen]
        return (tensor[:, chosen].float() * use[layer].factors.to(tensor.device)[chosen]).to(tensor.dtype)

    return convert


def _narrower(config, widths: Mapping[int, int]):
    """The configuration with other widths of MLPs: one for all where they agree, else by layer."""
    fields = config.to_dict()
    by_layer = {int(layer): dict(values) for layer, values in (fields.pop("per_layer_config", None) or {}).items()}
    common = max(widths.values(), key=list(widths.values()).count)
    fields["intermediate_size"] = common
    for layer, width in widths.items():
        by_layer.setdefault(layer, {}).pop("intermediate_size", None)
        if width != common:
            by_layer[layer]["intermediate_size"] = width
    fields["per_layer_config"] = {layer: values for layer, values in by_layer.items() if values} or None
    return type(config).from_dict(fields)


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    """The mean next-token loss over the tokens of all documents in batches, whatever labels they have.

    Raises:
        ValueError: there is no token to predict.
    """
    total, count = 0.0, 0
    for inputs, mask in evaluated(model, batches):
        labels = inputs["input_ids"].masked_fill(~mask, -100)
        labels[:, 1:].masked_fill_(~mask[:, :-1], -100)
        if "position_ids" in inputs:
            labels.masked_fill_(inputs["position_ids"] == 0, -100)
        predicted = int((labels[:, 1:] != -100).sum())
        if predicted:
            total += predicted * float(model(**inputs, labels=labels, use_cache=False).loss)
            count += predicted
    if not count:
        raise ValueError("there is no token to predict")
    return total / count
