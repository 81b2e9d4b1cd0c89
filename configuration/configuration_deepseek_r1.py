"""Configuration of the text model.

Fields that engines and tools read are flat and spelled as in Llama, Qwen3 and Mistral. What belongs to the sparse attention is
nested in `sparse_attention`, a plain dictionary like `rope_parameters`, checked by the strict dataclass `SparseAttention`, and
what belongs to the mixture of experts in `routing` (`ExpertRouting`); where one is absent, the mechanism does not exist. Anything may differ from layer to layer through transformers'
`per_layer_config={layer: {field: value}}`; a layer is built from `config.per_layer_config[layer]` and from nothing else.
"""

import copy
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .parallel import EXPERTS_EP, tensor_parallel_plan
from .presets import LAYER_LETTERS, expand_layer_pattern, preset_fields
from .routing import ExpertRouting, complete_routing, validate_sparse_layer
from .sparse import OWN_LAYER_TYPES, SparseAttention, complete_sparse_attention

STORED_PATTERN = "layer_pattern"
LAYER_TYPES = tuple(LAYER_LETTERS.values())
MLP_LAYER_TYPES = ("dense", "sparse")
SHARED_FIELDS = ("vocab_size", "hidden_size", "num_hidden_layers", "layer_types", "no_rope_layers", "max_position_embeddings")
SHARED_FIELDS += ("mlp_layer_types", "router_aux_loss_coef", "output_router_logits", "use_bidirectional_attention")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "piecewise_linear")


@strict
class DeepseekR1TextConfig(PreTrainedConfig):
    r"""
    Configuration of [`DeepseekR1TextModel`] and its heads. Field names and meanings are those of transformers' Llama, Qwen3 and
    SmolLM3 configurations; the ones below are particular to this library or combine what differs between those families.

    Args:
        layer_types (`list[str]` or `str`, *optional*):
            `"full_attention"`, `"sliding_attention"`, `"local_routed_attention"` or `"local_global_attention"` per layer, or a
            pattern string such as `"SSSR"` that repeats over the layers. Default: sliding where `sliding_window` is set,
            otherwise full.
        sliding_window (`int`, *optional*):
            Tokens that a sliding layer sees, the current one included: position `i` sees `i - sliding_window < j <= i`.
        use_bidirectional_attention (`bool`):
            Tokens see later ones as well, for classification and embeddings, without a cache: a window reaches `sliding_window - 1`
            tokens to both sides, the last `num_sink_tokens` tokens of a document are seen like the first, and nodes and clusters
            are looked up on both sides.
        rope_parameters (`dict`, *optional*):
            As in transformers, and `{"rope_type": "piecewise_linear", "segments": [[0, 10000.0], [8192, 1000000.0]]}`: from each of
            the positions on, phases grow with the base beside it.
        sparse_attention (`dict`, *optional*):
            Fields of `SparseAttention`, e.g. `{"num_sink_tokens": 32}`: sliding and routed layers additionally see the first 32
            tokens of the document.
        no_rope_layers (`list[int]`, *optional*):
            One entry per layer, 1 = rotary position embedding, 0 = none (SmolLM3's convention). Default: all ones.
        attention_bias (`bool`): biases of the query, key and value projections.
        attention_out_bias (`bool`, *optional*): bias of the output projection; default: as `attention_bias`.
        mlp_bias (`bool`): biases of the MLP's projections.
        qk_norm (`"head"` or `"projection"`, *optional*):
            RMS norm of queries and keys before rotation, over each head (Qwen3) or over all heads together (OLMoE).
        clip_qkv (`float`, *optional*):
            Queries and keys, after that norm, and values are clipped to `[-clip_qkv, clip_qkv]` (OLMoE).
        num_experts (`int`, *optional*):
            Experts of a sparse layer, over all domains; None or 0 = no mixture of experts. Derived from
            `routing["expert_topology"]` where that is given.
        num_experts_per_tok (`int`): experts that a token gets, at most.
        moe_intermediate_size (`int`, *optional*): width of one expert; default: `intermediate_size`.
        shared_expert_intermediate_size (`int`, *optional*):
            Width of an expert that every token gets besides, under a sigmoid gate of its own (Qwen2-MoE); None = there is none.
        norm_topk_prob (`bool`): whether the weights of a token's experts are made to sum to one.
        router_aux_loss_coef (`float`):
            Weight of the routers' auxiliary loss. It is part of the training loss of every model with experts; 0 = never, and
            always 0 without experts.
        output_router_logits (`bool`): return `router_logits` and `aux_loss`, and add the latter to `loss` in evaluation too.
        mlp_layer_types (`list[str]`, *optional*):
            `"dense"` or `"sparse"` per layer. Default: all sparse where there are experts.
        routing (`dict`, *optional*):
            Fields of `ExpertRouting`, e.g. `{"expert_topology": [{"text": 6, "code": 2}], "min_experts_per_tok": 1}`.
        chunk_size_feed_forward (`int`):
            Without gradients, a sequence longer than this goes through the layers this many tokens at a time, which bounds the
            memory of a long prompt; 0 = all at once. On accelerators 32 times as many. The result is the same up to rounding.
        per_layer_config (`dict[int, dict]`, *optional*):
            Overrides for single layers, e.g. `{3: {"sliding_window": 1024, "attention_bias": True, "head_dim": 128}}`.

    Raises:
        ValueError: an impossible pattern or nested field; the message names the field, its value and what would be valid.
        huggingface_hub.errors.StrictDataclassError: a wrong type or combination of fields, likewise.

    Example:

    ```python
    >>> from modeling_deepseek_r1 import DeepseekR1TextConfig
    >>> config = DeepseekR1TextConfig.from_preset("high_accuracy", num_hidden_layers=3)
    >>> config.layer_types
    ['local_routed_attention', 'full_attention', 'local_routed_attention']
    ```"""

    model_type = "deepseek_r1_text"
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "aux_loss"]
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "layout"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    layer_types: list[str] | str | None = None
    sliding_window: int | None = None
    use_bidirectional_attention: bool = False
    sparse_attention: dict | None = None
    no_rope_layers: list[int] | None = None
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    mlp_bias: bool = False
    attention_dropout: float | int = 0.0
    qk_norm: Literal["head", "projection"] | None = None
    clip_qkv: float | int | None = None
    num_experts: int | None = None
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    router_aux_loss_coef: float | int = 0.1
    output_router_logits: bool = False
    mlp_layer_types: list[str] | None = None
    routing: dict | None = None
    chunk_size_feed_forward: int = 1024

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        stored = kwargs.pop(STORED_PATTERN, None)
        if self.layer_types is None:
            self.layer_types = stored
        if self.layer_types is None:
            self.layer_types = "S" if self.sliding_window is not None else "F"
        if isinstance(self.layer_types, str):
            self.layer_types = expand_layer_pattern(self.layer_types, self.num_hidden_layers)
        if self.no_rope_layers is None:
            self.no_rope_layers = [1] * self.num_hidden_layers
        self.sparse_attention = complete_sparse_attention(self.sparse_attention, "")
        self.routing = complete_routing(self.routing, "", has_experts=bool(self.num_experts))
        by_layer = copy.deepcopy(kwargs.pop("per_layer_config", None)) or {}
        by_layer = {int(layer): overrides for layer, overrides in by_layer.items()}
        for layer, overrides in by_layer.items():
            shared = sorted(set(overrides) & set(SHARED_FIELDS))
            if shared:
                raise ValueError(f"per_layer_config: layer {layer} sets {shared[0]}, which all layers have in common")
            if "sparse_attention" in overrides:
                overrides["sparse_attention"] = complete_sparse_attention(overrides["sparse_attention"], f"layer {layer}: ")
            if "routing" in overrides:
                overrides["routing"] = complete_routing(overrides["routing"], f"layer {layer}: ", has_experts=True)
        self._complete_experts(by_layer)
        # TRL takes it for granted where a checkpoint's class is none of transformers'; empty, it is not written.
        kwargs.setdefault("auto_map", {})
        super().__post_init__(**kwargs, per_layer_config=by_layer or None)
        for layer in self.per_layer_config if by_layer else ():
            # Fills in what a rotary type needs, as transformers does for the common `rope_parameters`.
            layer.standardize_rope_params()

    def _complete_experts(self, by_layer: dict[int, dict[str, Any]]) -> None:
        """Derives what a mixture of experts leaves open; the number of experts of a layer is that of its stage."""
        if not self.num_experts and self.routing is None:
            # Trainers with a balance loss of their own (TRL's) take a coefficient for a sign that there are experts.
            self.router_aux_loss_coef = 0.0
            return
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["sparse"] * self.num_hidden_layers
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        sparse = [layer for layer, kind in enumerate(self.mlp_layer_types) if kind == "sparse"]
        totals = {}
        for number, layer in enumerate(sparse):
            routing = by_layer.get(layer, {}).get("routing", self.routing)
            stage = ExpertRouting(**routing).stage(number, len(sparse)) if routing is not None else None
            if stage is not None:
                totals[layer] = sum(stage.values())
        if self.num_experts and totals and self.num_experts not in totals.values():
            raise ValueError(
                f"num_experts={self.num_experts} but the stages of routing['expert_topology'] have"
                f" {sorted(set(totals.values()))} experts; leave num_experts out or make them agree"
            )
        self.num_experts = self.num_experts or max(totals.values(), default=None)
        for layer, total in totals.items():
            stated = by_layer.get(layer, {}).get("num_experts", total)
            if stated != total:
                raise ValueError(
                    f"layer {layer}: num_experts={stated} but its stage of routing['expert_topology'] has {total}"
                    " experts; leave num_experts out or make them agree"
                )
            if total != self.num_experts:
                by_layer.setdefault(layer, {})["num_experts"] = total

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds. transformers reads such files by its base class too (a Trainer that resumes, a tokenizer), which
        refuses layer types that it does not know: a pattern that has some is stored by its letters."""
        fields = super().to_diff_dict()
        if not fields.get("auto_map"):
            fields.pop("auto_map", None)
        if set(OWN_LAYER_TYPES) & set(fields.get("layer_types", ())):
            letters = {kind: letter for letter, kind in LAYER_LETTERS.items()}
            fields[STORED_PATTERN] = "".join(letters[kind] for kind in fields.pop("layer_types"))
        return fields

    @classmethod
    def from_preset(cls, name: str, **fields) -> "DeepseekR1TextConfig":
        """A configuration for a new model from a row of `configuration.presets.PRESETS`; `fields` given here win over the row."""
        return cls(**{**preset_fields(name, new_model=True), **fields})

    def sparse_attention_of(self, layer_idx: int) -> SparseAttention | None:
        """The sparse attention settings of one layer, or None where the layer has none."""
        value = self.per_layer_config[layer_idx].sparse_attention
        return SparseAttention(**value) if value is not None else None

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Tensor parallelism, as in Qwen3-MoE or OLMoE."""
        whole = any(layer.qk_norm == "projection" for layer in self.per_layer_config)
        return tensor_parallel_plan(packed_experts=self._has_packed_experts, norm_over_projection=whole)

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]) -> None:
        # transformers 5.19 wants to spread an embedding that is tied to the head; here it stays whole.
        pass

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """Expert parallelism, as in Qwen3-MoE."""
        return dict(EXPERTS_EP) if self._has_packed_experts else {}

    @property
    def _has_packed_experts(self) -> bool:
        # Low-rank experts are few parameters of other names; they stay whole on every rank.
        sparse = [layer for layer in range(self.num_hidden_layers) if self.is_sparse(layer)]
        return bool(sparse) and all(self.routing_of(layer).expert_rank is None for layer in sparse)

    def is_sparse(self, layer_idx: int) -> bool:
        """Whether the MLP of a layer is a mixture of experts."""
        return self.mlp_layer_types is not None and self.mlp_layer_types[layer_idx] == "sparse"

    def routing_of(self, layer_idx: int) -> ExpertRouting:
        """The routing settings of one sparse layer."""
        return ExpertRouting(**(self.per_layer_config[layer_idx].routing or {}))

    def expert_domains(self, layer_idx: int) -> dict[str, int]:
        """Domain -> number of experts of one sparse layer, in the order of the experts; `{"all": num_experts}` without domains."""
        sparse = [layer for layer in range(self.num_hidden_layers) if self.is_sparse(layer)]
        stage = self.routing_of(layer_idx).stage(sparse.index(layer_idx), len(sparse))
        return stage if stage is not None else {"all": self.per_layer_config[layer_idx].num_experts}

    def __eq__(self, other) -> bool:
        # The generated comparison reads every field of the whole model, which per-layer fields forbid.
        if getattr(other, "model_type", None) != self.model_type:
            return False
        mine, theirs = self.to_dict(), other.to_dict()
        return all(mine.get(key) == theirs.get(key) for key in {*mine, *theirs} - {"_name_or_path"})

    def validate_layer_type(self):
        """Part of `@strict` validation: the lists that have one entry per layer."""
        if self.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers={self.num_hidden_layers} must be at least 1")
        lists = {"layer_types": LAYER_TYPES, "no_rope_layers": (0, 1), "mlp_layer_types": MLP_LAYER_TYPES}
        for name, allowed in lists.items():
            values = getattr(self, name)
            if name == "mlp_layer_types" and values is None:
                continue
            if len(values) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {len(values)} entries; it needs one per layer (num_hidden_layers={self.num_hidden_layers})"
                )
            wrong = [value for value in values if value not in allowed]
            if wrong:
                raise ValueError(f"{name} contains {wrong[0]!r}; each entry must be one of {list(allowed)}")

    def validate_architecture(self):
        """Part of `@strict` validation: sizes that must fit together, in every layer."""
        self.validate_layer_type()
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.router_aux_loss_coef < 0:
            raise ValueError(f"router_aux_loss_coef={self.router_aux_loss_coef} must be 0 or more")
        if self.chunk_size_feed_forward < 0:
            raise ValueError(
                f"chunk_size_feed_forward={self.chunk_size_feed_forward} must be 0 (no chunks) or a number of tokens"
            )
        for layer_idx in range(self.num_hidden_layers):
            layer = self.per_layer_config[layer_idx]
            self._validate_layer(layer_idx, layer)
            if self.is_sparse(layer_idx):
                validate_sparse_layer(f"layer {layer_idx}: ", layer, self.routing_of(layer_idx))

    def validate_rope(self):
        """Part of `@strict` validation: transformers only warns about a rotary type that it does not know."""
        checked = []
        for layer_idx, layer in enumerate(self.per_layer_config):
            parameters = layer.rope_parameters or {}
            if parameters in checked:
                continue
            checked.append(parameters)
            if self.nested_rope_parameter_keys(parameters):
                raise ValueError(
                    f"rope_parameters has one entry per layer type ({list(parameters)}); give the common one as rope_parameters and"
                    " the others by layer in per_layer_config"
                )
            rope_type = parameters.get("rope_type", "default")
            if rope_type not in ROPE_TYPES:
                raise ValueError(
                    f"layer {layer_idx}: rope_parameters['rope_type']={rope_type!r} must be one of {list(ROPE_TYPES)}"
                )
            super(DeepseekR1TextConfig, layer).validate_rope()

    def _validate_piecewise_linear_rope_parameters(self, rope_parameters: dict[str, Any], ignore_keys=None) -> None:
        # transformers' `validate_rope` calls this by the name of the type.
        segments = rope_parameters.get("segments")
        pairs = isinstance(segments, (list, tuple)) and all(isinstance(x, (list, tuple)) and len(x) == 2 for x in segments)
        starts, bases = ([pair[i] for pair in segments] for i in range(2)) if pairs else ([], [])
        numbers = all(type(x) is int for x in starts) and all(type(x) in (int, float) and 0 < x < float("inf") for x in bases)
        if not (starts and numbers and starts[0] == 0 and starts == sorted(set(starts))):
            raise ValueError(
                f"rope_parameters['segments']={segments!r} must be pairs [first position, base] with positions that begin at 0 and"
                " increase, and positive bases, e.g. [[0, 10000.0], [8192, 1000000.0]]"
            )

    def _validate_layer(self, layer_idx: int, layer: "DeepseekR1TextConfig") -> None:
        heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"layer {layer_idx}: num_key_value_heads={kv_heads} must divide num_attention_heads={heads}, so that every"
                " key/value head serves equally many query heads"
            )
        if layer.head_dim < 1 or (self.no_rope_layers[layer_idx] and layer.head_dim % 2):
            raise ValueError(
                f"layer {layer_idx}: head_dim={layer.head_dim} must be positive, and even where rotary embedding is on"
            )
        if layer.intermediate_size < 1:
            raise ValueError(f"layer {layer_idx}: intermediate_size={layer.intermediate_size} must be at least 1")
        if not 0.0 <= layer.attention_dropout < 1.0:
            raise ValueError(f"layer {layer_idx}: attention_dropout={layer.attention_dropout} must lie in [0, 1)")
        if layer.clip_qkv is not None and layer.clip_qkv <= 0:
            raise ValueError(f"layer {layer_idx}: clip_qkv={layer.clip_qkv} must be positive; None = no clipping")
        if layer.shared_expert_intermediate_size is not None and not self.num_experts:
            raise ValueError(
                f"shared_expert_intermediate_size={layer.shared_expert_intermediate_size} has no effect without experts; give"
                " num_experts too"
            )
        layer_type = self.layer_types[layer_idx]
        if layer_type in OWN_LAYER_TYPES and layer.sparse_attention is None:
            field = OWN_LAYER_TYPES[layer_type]
            raise ValueError(f"layer {layer_idx} is {layer_type} but sparse_attention is None; give its {field}")
        if layer_type != "full_attention" and (layer.sliding_window is None or layer.sliding_window < 1):
            raise ValueError(
                f"layer {layer_idx} is {layer_type} but sliding_window={layer.sliding_window}; give the number of tokens it"
                " sees, at least 1"
            )


__all__ = ["DeepseekR1TextConfig", "ExpertRouting", "SparseAttention"]
