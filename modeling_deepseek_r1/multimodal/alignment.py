"""What a text token can see of the features before it, and how well a text and its features agree.

Features stand in the order of their placeholders. A token sees those up to its own place. Those of clips also have a time, at
which what they show ends. The clock of a token is that of the last placeholder up to it that has a time: it does not see what
is later in the same clip. A clip begins where the times of a modality fall, and the k-th video and the k-th sound of a row are
one clip, so that frames and sound that belong together may be given one after the other.

Shapes: B rows, n tokens, M features of the row with the most, H hidden size.
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from .fusion import place_features

NO_TIME = -1.0
KINDS = range(1, 5)
"""Numbers of the modalities besides text."""


@dataclass
class BridgeMemory:
    """The features of a batch as the bridge reads them.

    Attributes:
        states: `[B, M, H]`; zero where a row has fewer.
        modality: `[B, M]` number of each feature's modality; 0 = no feature.
        times: `[B, M]` seconds; negative = timeless.
        seen: `[B, n]` how many features there are up to each token of the prompt; later tokens see as many as the last one.
        present: the modalities among them.
        start: number of the first token that the next forward computes.
        projected: keys and values by layer, filled where there are no gradients.
    """

    states: torch.Tensor
    modality: torch.Tensor
    times: torch.Tensor
    seen: torch.Tensor
    present: tuple[int, ...]
    start: int = 0
    projected: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def shift(self, tokens: int) -> "BridgeMemory":
        """The same features for the tokens from so many later on."""
        return replace(self, start=self.start + tokens)

    def repeat(self, times: int) -> "BridgeMemory":
        """Every row so many times, for beams and samples."""
        return self.select(torch.arange(len(self.states), device=self.states.device).repeat_interleave(times))

    def select(self, rows: torch.Tensor) -> "BridgeMemory":
        """The rows of these numbers, with what has been projected of them."""
        tensors = {name: getattr(self, name)[rows] for name in ("states", "modality", "times", "seen")}
        projected = {layer: (key[rows], value[rows]) for layer, (key, value) in self.projected.items()}
        return replace(self, **tensors, projected=projected)

    def after_prompt(self) -> "BridgeMemory | None":
        """What later tokens need: all that the last one sees. None where that is nothing in any row."""
        seen = self.seen[:, -1:]
        if not (width := int(seen.max())):
            return None
        tensors = {name: getattr(self, name)[:, :width] for name in ("states", "modality", "times")}
        projected = {layer: (key[:, :, :width], value[:, :, :width]) for layer, (key, value) in self.projected.items()}
        return replace(self, **tensors, seen=seen, projected=projected)

    def visible(self, length: int, aligned: bool) -> torch.Tensor:
        """`[B, length, M]` bool: what each of the next tokens sees; with `aligned` clocks count too."""
        tokens = torch.arange(self.start, self.start + length, device=self.seen.device).clamp(max=self.seen.shape[1] - 1)
        return visible_features(self.seen[:, tokens], self.modality, self.times if aligned else None)


def gather_memory(
    features: dict[int, torch.Tensor], places: dict[int, torch.Tensor], times: torch.Tensor | None
) -> BridgeMemory | None:
    """Puts the features of all modalities into rows, in the order of their placeholders; None where there are none.

    Args:
        features: `[N, H]` for each number of a modality.
        places: `[B, n]` bool for the same numbers, true N times.
        times: `[B, n]` seconds at the placeholders; None = nothing has a time.
    """
    if not features:
        return None
    some = next(iter(features.values()))
    batch_size, length = next(iter(places.values())).shape
    states = some.new_zeros(batch_size, length, some.shape[-1])
    modality = torch.zeros(batch_size, length, dtype=torch.long, device=some.device)
    for number, own in features.items():
        states = place_features(states, own, places[number])
        modality = modality.masked_fill(places[number], number)
    filled = modality > 0
    order = filled.int().argsort(dim=1, descending=True, stable=True)[:, : int(filled.sum(1).max())]
    times = torch.full_like(modality, NO_TIME, dtype=torch.float32) if times is None else times.float()
    return BridgeMemory(
        states.gather(1, order[..., None].expand(-1, -1, states.shape[-1])),
        modality.gather(1, order),
        times.gather(1, order).masked_fill(~filled.gather(1, order), NO_TIME),
        filled.cumsum(1),
        tuple(sorted(features)),
    )


def join_memories(first: BridgeMemory | None, rows: int, second: BridgeMemory | None, more: int) -> BridgeMemory | None:
    """The features of two batches of so many rows, of which both have been read (`after_prompt`); None = a batch without any."""
    known = [memory for memory in (first, second) if memory is not None]
    if not known:
        return None
    width = max(memory.states.shape[1] for memory in known)
    parts = [memory or _empty(known[0], count) for memory, count in ((first, rows), (second, more))]

    def together(tensors: list[torch.Tensor], dim: int = 1, value: float = 0) -> torch.Tensor:
        after = [0, 0] * (tensors[0].dim() - 1 - dim)
        return torch.cat([F.pad(x, (*after, 0, width - x.shape[dim]), value=value) for x in tensors])

    layers = set.intersection(*(set(part.projected) for part in parts))
    return BridgeMemory(
        together([part.states for part in parts]),
        together([part.modality for part in parts]),
        together([part.times for part in parts], value=NO_TIME),
        torch.cat([part.seen for part in parts]),
        tuple(sorted({kind for part in parts for kind in part.present})),
        projected={
            layer: tuple(together([part.projected[layer][i] for part in parts], dim=2) for i in range(2)) for layer in layers
        },
    )


def _empty(like: BridgeMemory, rows: int) -> BridgeMemory:
    """Rows without features."""

    def nothing(tensor: torch.Tensor, dim: int = 1) -> torch.Tensor:
        return tensor.new_zeros(rows, *tensor.shape[1:dim], 0, *tensor.shape[dim + 1 :])

    return BridgeMemory(
        *(nothing(tensor) for tensor in (like.states, like.modality, like.times)),
        like.seen.new_zeros(rows, 1),
        (),
        projected={layer: (nothing(key, 2), nothing(value, 2)) for layer, (key, value) in like.projected.items()},
    )


def clips(modality: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """`[B, M]` number of the clip that each feature with a time belongs to, within its modality; -1 without a time."""
    number = torch.full_like(modality, -1)
    indices = torch.arange(modality.shape[1], device=modality.device).expand_as(modality)
    for kind in KINDS:
        own = (modality == kind) & (times >= 0)
        latest = torch.where(own, indices, -1).cummax(1).values
        previous = F.pad(latest, (1, 0), value=-1)[:, :-1]
        falls = own & (previous >= 0) & (times < times.gather(1, previous.clamp(min=0)))
        number = torch.where(own, falls.cumsum(1), number)
    return number


def visible_features(seen: torch.Tensor, modality: torch.Tensor, times: torch.Tensor | None) -> torch.Tensor:
    """`[B, q, M]` bool.

    Args:
        seen: `[B, q]` features up to each token.
        modality, times: `[B, M]`, as in `BridgeMemory`; times None = no clocks.
    """
    indices = torch.arange(modality.shape[1], device=modality.device)
    visible = indices < seen[..., None]
    if times is None or modality.shape[1] == 0:
        return visible
    number = clips(modality, times)
    latest = torch.where(times >= 0, indices, -1).cummax(1).values
    clock = latest.gather(1, (seen - 1).clamp(min=0)).masked_fill(seen == 0, -1)
    own_clip = number.gather(1, clock.clamp(min=0)).masked_fill(clock < 0, -2)
    now = times.gather(1, clock.clamp(min=0))
    later = (number[:, None] == own_clip[..., None]) & (times[:, None] > now[..., None])
    return visible & ~later


def visible_features_reference(seen: torch.Tensor, modality: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """What `visible_features` computes, feature by feature."""
    result = torch.zeros(*seen.shape, modality.shape[1], dtype=torch.bool)
    for row in range(len(seen)):
        number, last = [], {}
        for kind, time in zip(modality[row].tolist(), times[row].tolist(), strict=True):
            clip, before = last.get(kind, (0, 0.0))
            last[kind] = last[kind] if time < 0 and kind in last else (clip + (time < before), max(time, 0.0))
            number.append(last[kind][0] if time >= 0 else None)
        for token, count in enumerate(seen[row].tolist()):
            timed = [feature for feature in range(count) if times[row, feature] >= 0]
            for feature in range(count):
                same = bool(timed) and number[feature] is not None and number[feature] == number[timed[-1]]
                result[row, token, feature] = not (same and times[row, feature] > times[row, timed[-1]])
    return result


def pooled(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`[B, H]` float32 mean of `[B, n, H]` where the mask `[B, n]` is true; zero where it is so nowhere."""
    weights = mask.float() / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("bn,bnh->bh", weights, states.float())


def cross_modal_consistency(text: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`[B]` cosine of pooled states `[B, H]`; NaN for a row that lacks either."""
    lacking = (text == 0).all(-1) | (other == 0).all(-1)
    return F.cosine_similarity(text, other, dim=-1).masked_fill(lacking, float("nan"))


def alignment_loss(text: torch.Tensor, other: torch.Tensor, temperature: float) -> torch.Tensor:
    """Contrastive loss (https://arxiv.org/abs/2103.00020) of pooled states `[B, H]`: each text against the features of all rows
    and the other way round; zero with fewer than two rows that have both."""
    both = ((text != 0).any(-1) & (other != 0).any(-1)).nonzero().squeeze(-1)
    if len(both) < 2:
        return (text.sum() + other.sum()) * 0.0
    logits = F.normalize(text[both], dim=-1) @ F.normalize(other[both], dim=-1).T / temperature
    targets = torch.arange(len(both), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
