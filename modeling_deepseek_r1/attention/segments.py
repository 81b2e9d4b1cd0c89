"""Documents longer than a model was trained for: segments that overlap, with a cache that is carried over.

A cache with at most `segment_length` tokens. When it is full, its first `kept_tokens` and its last `overlap` tokens stay, all
between them go, and reading goes on: every token is predicted from at least `overlap` tokens before it, and no distance is larger
than in training. Keys and values are carried over, not computed again, so what stays also knows of what has gone (as in
Transformer-XL, https://arxiv.org/abs/1901.02860); the first tokens stay because models lean on them (StreamingLLM,
https://arxiv.org/abs/2309.17453).
"""

import math

import torch
from transformers.cache_utils import DynamicCache

from .layer import layer_pattern
from .pattern import valid_tokens
from .rotary import moved_up

FIRST_TOKENS = 4
"""Of the document, which stay unless told otherwise: as many as StreamingLLM needs."""
LENGTH_DEPENDENT = ("dynamic", "longrope")


class SegmentedCache(DynamicCache):
    """A cache for documents of any length; give it to `generate()` or to the model as `past_key_values`.

        cache = SegmentedCache(model.config, segment_length=8192, overlap=4096)
        model.generate(**inputs, past_key_values=cache, max_new_tokens=500)

    Works in every decoding mode but assisted decoding, and with padding; the model reads a long input segment by segment, and every
    row of a batch as it would be read alone. Memory and the time of a token stay those of `segment_length` tokens.

    Args:
        config: of a model of this library.
        segment_length: tokens that the cache holds at most (default: `max_position_embeddings`).
        overlap: tokens that are carried over to the next segment, at least the largest window (default: half a segment).
        kept_tokens: tokens of the document's beginning that stay, at least the sink tokens of its layers (default: these, at
            least 4).
        reset_positions: a segment's tokens are numbered from 0: those that were carried over stand directly behind the first
            ones, and their keys are rotated anew. Otherwise positions go on; the first tokens, and with a rotation that does not
            depend on distances alone all others, then get ever farther away.

    Raises:
        ValueError: lengths that do not fit together or the layers, a model of another library, or positions to be reset in
            segments in which the frequencies of the model change with the length.
    """

    is_croppable = False

    def __init__(
        self,
        config,
        segment_length: int | None = None,
        overlap: int | None = None,
        *,
        kept_tokens: int | None = None,
        reset_positions: bool = True,
    ):
        super().__init__()
        config = config.get_text_config()
        if not hasattr(config, "sparse_attention_of"):
            raise ValueError(f"segments need a model of this library, not {config.model_type!r}; convert the checkpoint first")
        patterns = [layer_pattern(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        sinks, window = (max(getattr(p, name) or 0 for p in patterns) for name in ("num_sink_tokens", "window"))
        self.segment_length = config.max_position_embeddings if segment_length is None else segment_length
        self.overlap = self.segment_length // 2 if overlap is None else overlap
        self.kept_tokens = max(sinks, FIRST_TOKENS) if kept_tokens is None else kept_tokens
        self.reset_positions = reset_positions
        if self.kept_tokens < sinks or self.overlap < max(window, 1):
            raise ValueError(
                f"kept_tokens={self.kept_tokens} and overlap={self.overlap} must be at least the {sinks} sink tokens and the largest"
                f" window ({window}) of the layers, and overlap at least 1"
            )
        # Nodes are every so many tokens, and must be the same tokens afterwards.
        stride = math.lcm(*(pattern.global_stride or 1 for pattern in patterns))
        self.step = (self.segment_length - self.kept_tokens - self.overlap) // stride * stride
        if self.step < 1:
            raise ValueError(
                f"segment_length={self.segment_length} leaves no room for new tokens beside kept_tokens={self.kept_tokens} and"
                f" overlap={self.overlap}; it must exceed both together by {stride} or more"
            )
        if reset_positions:
            _check_frequencies(config, self.segment_length)
        self._forget()

    def _forget(self) -> None:
        self.total = 0
        self.removed: torch.Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding and what is gone included."""
        return self.total

    def read_segments(self, model, inputs, attention_mask, position_ids, seq_idx, cache, output_router_logits, **kwargs):
        """What `model.read` does with the same arguments, for as many segments as the new tokens need; `cache` is this one.

        Raises:
            ValueError: packed rows, or several segments where outputs of every layer, features of other modalities or
                gradients of a training step are asked for.
        """
        valid = valid_tokens(attention_mask, *inputs.shape[:2], self.total)
        _refuse_packing(attention_mask, position_ids, seq_idx)
        types, outputs, start, routed = kwargs.pop("mm_token_type_ids", None), [], 0, []
        while start < inputs.shape[1]:
            self._make_room(model)
            stop = self._end_of_piece(valid, start, inputs.shape[1])
            if start or stop < inputs.shape[1]:
                _refuse_records(model, output_router_logits, kwargs)
            part = slice(start, stop)
            mask = None if valid is None else valid[:, part]
            hidden, routed = model.read(
                inputs[:, part], mask, self._position_ids(mask, stop - start, inputs.device), None, self, output_router_logits,
                mm_token_type_ids=None if types is None else types[:, part], **kwargs,
            )  # fmt: skip
            outputs.append(hidden)
            self.total += stop - start
            start = stop
        return (outputs[0], routed) if len(outputs) == 1 else (torch.cat(outputs, 1), [])

    def _make_room(self, model) -> None:
        """Cuts the rows whose segment is full."""
        first = self.layers[0]
        if first.positions is None:
            count = self.step if first.seen >= self.segment_length else 0
            cut, rows = count > 0, torch.tensor([[count]])
        else:
            count = rows = (first.next_positions >= self.segment_length) * self.step
            cut = bool(rows.any())
        if not cut:
            return
        self.removed = rows if self.removed is None else self.removed.to(rows.device) + rows
        for layer_idx, layer in enumerate(self.layers):
            rotary = None
            if self.reset_positions and model.layers[layer_idx].self_attn.uses_rotary:
                rotary = model.rotary_embs[model.rotary_of_layer[layer_idx]]
            layer.take_out(self.kept_tokens, count, None if rotary is None else lambda *keys, r=rotary: moved_up(r, *keys))

    def _end_of_piece(self, valid: torch.Tensor | None, start: int, length: int) -> int:
        """Up to which of the new tokens no row gets longer than a segment."""
        first = self.layers[0]
        if valid is None:
            held = first.seen if first.next_positions is None else int(first.next_positions.max())
            return min(length, start + self.segment_length - held)
        held = first.seen if first.next_positions is None else first.next_positions
        fits = (held + valid[:, start:].cumsum(1) <= self.segment_length).all(0)
        return start + int(fits.sum())

    def _position_ids(self, mask: torch.Tensor | None, count: int, device: torch.device) -> torch.Tensor | None:
        """`[B or 1, count]` where positions go on; None = those of the segment."""
        if self.reset_positions or self.removed is None:
            return None
        first = self.layers[0]
        held = first.seen if first.next_positions is None else first.next_positions
        new = torch.arange(count, device=device)[None] if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        return held + new + self.removed.to(device)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused once something is gone (RuntimeError): it would have to come back."""
        if self.removed is not None and tokens_to_remove:
            raise RuntimeError("tokens cannot be taken back from a SegmentedCache that has begun a further segment")
        super().crop(tokens_to_remove)
        self.total = max(0, self.total + tokens_to_remove)

    def activate_past_recording(self) -> None:
        raise ValueError(
            "drafts cannot be taken back across the border of two segments: generate without assistant_model and prompt lookup, or"
            " pass another cache than SegmentedCache"
        )

    def reset(self) -> None:
        super().reset()
        self._forget()

    def _select(self, select) -> None:
        if self.removed is not None and len(self.removed) > 1:
            self.removed = select(self.removed)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(lambda x: x[indices.to(x.device)] if isinstance(indices, torch.Tensor) else x[indices])


def _check_frequencies(config, segment_length: int) -> None:
    for layer_idx, layer in enumerate(config.per_layer_config):
        rope = layer.rope_parameters
        limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if rope["rope_type"] in LENGTH_DEPENDENT and segment_length > limit:
            raise ValueError(
                f"layer {layer_idx}: the frequencies of rope_type={rope['rope_type']!r} change beyond {limit} tokens, so keys in segments"
                f" of {segment_length} cannot be rotated anew; make segment_length at most {limit}"
            )


def _refuse_packing(attention_mask, position_ids, seq_idx) -> None:
    restarts = position_ids is not None and attention_mask is None and position_ids.shape[-1] > 1
    if seq_idx is not None or (restarts and bool((position_ids.diff(dim=-1) != 1).any())):
        raise ValueError("a SegmentedCache reads one document per row; packed rows need none, or a row for each document")


def _refuse_records(model, output_router_logits: bool, kwargs: dict) -> None:
    names = [f"output_{name}" for name in model._can_record_outputs]
    asked = [name for name in names if kwargs.get(name) or getattr(model.config, name, False)]
    asked += ["output_router_logits"] if output_router_logits else []
    asked += ["features behind a bridge"] if kwargs.get("bridge_memory") is not None else []
    asked += ["gradients in training mode"] if model.training and torch.is_grad_enabled() else []
    if asked:
        raise ValueError(f"{asked[0]}: not over several segments; read at most what is left of a segment at a time")
