"""Which parameters are trained: low-rank adapters by PEFT (https://arxiv.org/abs/2106.09685), or all but the frozen ones."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import ModuleType

from torch import nn

TARGETS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "experts": ("experts.gate_up_proj", "experts.down_proj"),
    "router": ("router", "global_tokens"),
}
"""Target -> ends of the names of its modules; of its parameters for `experts`, which are fused. Encoders of a multimodal model
get no adapters."""

JOINTS = ("vision_adapter", "audio_adapter", "row_encoder", "fusion", "word_projection", "bridge")
"""Names of the modules that join encoders to a text model; a composed model has never learned them."""


@dataclass(frozen=True)
class TrainableReport:
    """What will be trained.

    Attributes:
        matched: target or pattern -> number of modules or parameters that it matched.
        trainable, total: numbers of single weights.
    """

    matched: dict[str, int]
    trainable: int
    total: int

    def summary(self) -> str:
        """One line."""
        what = ", ".join(f"{name} ({count})" for name, count in self.matched.items())
        return f"trains {self.trainable:,} of {self.total:,} weights ({self.trainable / self.total:.2%}){what and ': ' + what}"


def add_adapters(
    model: nn.Module, *, rank: int, targets: Iterable[str] = ("attention",), alpha: float | None = None, dropout: float = 0.0
) -> tuple[nn.Module, TrainableReport]:
    """Puts low-rank adapters on the chosen parts and freezes the rest.

    Routers, and gates and memory tokens of global layers, are trained as they are: a gate has one row per head or expert, fewer
    weights than a low-rank update of it. So are a new classification head and what joins encoders to the text model.

    Args:
        model: is changed.
        rank: of every update.
        targets: keys of `TARGETS`.
        alpha: the update is scaled by `alpha / rank`; default: `2 * rank`.
        dropout: before the update; 0 with experts, whose weights are fused.

    Raises:
        ImportError: PEFT is missing.
        ValueError: an unknown target, one that matches nothing, or impossible numbers.
    """
    peft = _import_peft()
    found = _find_targets(model, list(dict.fromkeys(targets)), rank, dropout)
    task = getattr(model, "score", None) is not None
    joints = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in JOINTS and "_tower." not in name]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=[name for target in ("attention", "mlp") for name in found.get(target, ())],
        target_parameters=found.get("experts"),
        modules_to_save=[*found.get("router", ()), *joints, *(["score"] if task else [])] or None,
        task_type="SEQ_CLS" if task else "CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, config)
    return adapted, make_report(adapted, {target: len(names) for target, names in found.items()})


def _find_targets(model: nn.Module, targets: list[str], rank: int, dropout: float) -> dict[str, list[str]]:
    if rank < 1:
        raise ValueError(f"the rank of the adapters, {rank}, must be at least 1")
    unknown = [target for target in targets if target not in TARGETS]
    if unknown or not targets:
        raise ValueError(f"adapters for {unknown or 'nothing'}: choose some of {', '.join(TARGETS)}")
    if targets == ["router"]:
        raise ValueError("routers alone are trained as they are, without adapters; freeze everything else instead")
    if "experts" in targets and dropout:
        raise ValueError(f"adapters on fused experts cannot have dropout, and it is {dropout}")
    found = {target: _matching(model, target) for target in targets}
    for target, names in found.items():
        if not names:
            raise ValueError(
                f"adapters for {target!r}: the model has no {' or '.join(TARGETS[target])}; leave out {target!r} or choose others"
            )
    return found


def freeze(model: nn.Module, patterns: Iterable[str]) -> TrainableReport:
    """Freezes the parameters whose names match one of the patterns (`*`, `?`, `[...]`).

    Raises:
        ValueError: a pattern that matches nothing, or nothing left to train.
    """
    matched = {}
    for pattern in patterns:
        names = [name for name, _ in model.named_parameters() if fnmatchcase(name, pattern)]
        if not names:
            examples = ", ".join(name for name, _ in list(model.named_parameters())[:3])
            raise ValueError(f"freeze: no parameter is called {pattern!r}; names are like {examples}")
        matched[f"without {pattern}"] = len(names)
        for name in names:
            model.get_parameter(name).requires_grad_(False)
    report = make_report(model, matched)
    if not report.trainable:
        raise ValueError(f"freeze: {', '.join(matched)} leaves nothing to train")
    return report


def _matching(model: nn.Module, target: str) -> list[str]:
    named = model.named_parameters() if target == "experts" else model.named_modules()
    names = [name for name, _ in named if name.endswith(tuple(f".{end}" for end in TARGETS[target]))]
    names = [name for name in names if "_tower." not in name and ".bridge." not in name]
    # Layers of fused experts have projections of the same names below them, as parameters.
    return (
        names
        if target in ("experts", "router")
        else [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]
    )


def make_report(model: nn.Module, matched: dict[str, int]) -> TrainableReport:
    """Counts what a model trains; `matched` as in `TrainableReport`."""
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return TrainableReport(matched, trainable, sum(parameter.numel() for parameter in parameters))


def _import_peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ImportError('adapters need the package peft: pip install "modeling-deepseek-r1[train]"') from error
    return peft
