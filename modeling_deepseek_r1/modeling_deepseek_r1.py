"""The text model and its heads.

A decoder as in Llama, in which every layer is built from its own configuration `config.per_layer_config[i]` and attends by its
own pattern (`attention/pattern.py`). What the layers need to know about padding, packing and the cache is worked out once per
forward, as an `AttentionLayout`.
"""

import json

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention.cache import adopt_cache
from .attention.engines import check_pages, check_vllm
from .attention.flash import flash_kernel
from .attention.layer import OWN_IMPLEMENTATIONS, DeepseekR1Attention, cache_layer, cacheable, layer_pattern
from .attention.norm import DeepseekR1RMSNorm
from .attention.pattern import AttentionLayout
from .attention.rotary import rotary_embedding
from .attention.static_step import StaticLayout, close_cache, forward_layout
from .configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from .moe.block import DeepseekR1SparseMoeBlock
from .moe.gates import gather_statistics
from .moe.losses import output_losses, real_tokens, share_of_batch
from .moe.mlp import DeepseekR1MLP, tokens_at_once
from .moe.outputs import DeepseekR1CausalLMOutputWithPast, DeepseekR1ModelOutputWithPast, RouterOutput


class DeepseekR1DecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and beside a residual connection. A layer with experts also returns the fields of
    its `RouterOutput`: what leaves a checkpointed layer by any other way has no gradient."""

    def __init__(self, config: DeepseekR1TextConfig, layer_idx: int):
        super().__init__()
        layer = config.per_layer_config[layer_idx]
        self.self_attn = DeepseekR1Attention(config, layer_idx)
        self.mlp = DeepseekR1SparseMoeBlock(config, layer_idx) if config.is_sparse(layer_idx) else DeepseekR1MLP(layer)
        self.input_layernorm = DeepseekR1RMSNorm(layer.hidden_size, layer.rms_norm_eps)
        self.post_attention_layernorm = DeepseekR1RMSNorm(layer.hidden_size, layer.rms_norm_eps)
        self.register_module("bridge", None)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: AttentionLayout | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        bridge_memory=None,
        **kwargs,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, layout, past_key_values=past_key_values, **kwargs
        )
        hidden_states = hidden_states + attended
        if self.bridge is not None and bridge_memory is not None:
            hidden_states = self.bridge(hidden_states, bridge_memory)
        normed = self.post_attention_layernorm(hidden_states)
        if isinstance(self.mlp, DeepseekR1MLP):
            return hidden_states + self.mlp(normed)
        output, *routed = self.mlp(normed, mm_token_type_ids)
        return hidden_states + output, *routed


class DeepseekR1PreTrainedModel(PreTrainedModel):
    """What all models of this architecture tell transformers about themselves."""

    config: DeepseekR1TextConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekR1DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = False  # layouts are worked out on the host
    _can_record_outputs = {"hidden_states": DeepseekR1DecoderLayer, "attentions": DeepseekR1Attention}
    _keep_in_fp32_modules_strict = ["router", "global_tokens"]
    _can_set_experts_implementation_cached_value = True  # transformers would look for its decorator in this file alone

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        if attn_implementation == "flash_attention_2":
            flash_kernel()  # transformers would take another package's kernel, or not say what to install
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Without a request the library's own: it alone spends nothing on inactive slots."""
        return super().get_correct_experts_implementation(requested_experts or "eager")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # This library's modules with parameters of their own know how these start; models have a method of the same name.
        if hasattr(module, "init_weights") and not isinstance(module, PreTrainedModel):
            module.init_weights(self.config.initializer_range)
        else:
            super()._init_weights(module)


class DeepseekR1TextModel(DeepseekR1PreTrainedModel):
    """The decoder without a head. Also used by engines, which own cache and attention (`attention/layer.py`)."""

    def __init__(self, config: DeepseekR1TextConfig):
        super().__init__(config)
        if config._attn_implementation == "vllm":
            check_vllm(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([DeepseekR1DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = DeepseekR1RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # One rotary module for each distinct head size and set of frequencies; mostly there is just one.
        layers = config.per_layer_config
        keys = [json.dumps([layer.head_dim, layer.rope_parameters], sort_keys=True) for layer in layers]
        distinct = list(dict.fromkeys(keys))
        self.rotary_embs = nn.ModuleList([rotary_embedding(layers[keys.index(key)]) for key in distinct])
        self.rotary_of_layer = [distinct.index(key) for key in keys]
        self.patterns = [layer_pattern(config, i) for i in range(config.num_hidden_layers)]
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> DeepseekR1ModelOutputWithPast:
        """Runs the decoder.

        Args:
            input_ids: `[batch, n]` token ids; or `inputs_embeds` `[batch, n, hidden]`.
            attention_mask: `[batch, cached + n]`, 0 = padding, on either side or between.
            position_ids: `[batch, n]`; default: the number of each token within its document. Without `attention_mask`,
                restarting positions mark packed documents.
            past_key_values: an empty `DynamicCache`, or one that this model has filled.
            seq_idx: `[batch, n]` number of each token's document in packed rows.
            mm_token_type_ids: `[batch, cached + n]` or `[batch, n]` modality of each token, for gates with a table of them.
            output_router_logits: return `router_logits`, `[batch * n, experts]` per sparse layer.

        Raises:
            ValueError: no tokens, both or neither of ids and embeddings, an id outside of the vocabulary, a mask that does
                not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        inputs = input_ids if input_ids is not None else inputs_embeds
        output_router_logits = self.config.output_router_logits if output_router_logits is None else output_router_logits
        kwargs["mm_token_type_ids"] = None if mm_token_type_ids is None else mm_token_type_ids[:, -inputs.shape[1] :]
        if self.config._attn_implementation not in OWN_IMPLEMENTATIONS or kwargs.get("cache") is not None:
            return self._forward_for_engine(inputs, position_ids, attention_mask, output_router_logits, **kwargs)
        self._check_tokens(inputs, input_ids is not None)
        use_cache = cacheable(self.config, past_key_values) and use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if past_key_values is not None:
            adopt_cache(past_key_values, len(self.layers), self.make_cache_layer, inputs.device)
        read = getattr(past_key_values, "read_segments", DeepseekR1TextModel.read)
        place = attention_mask, position_ids, seq_idx, past_key_values, output_router_logits
        hidden_states, routed = read(self, inputs, *place, **kwargs)
        # Without gradients nothing is trained: a Trainer generates in this mode, and asks for a reference.
        if routed and self.training and torch.is_grad_enabled():
            gather_statistics(self.routers, routed, real_tokens(attention_mask, len(routed[0].logits)))
        return self._output(hidden_states, routed, output_router_logits, past_key_values if use_cache else None)

    def read(self, inputs, attention_mask, position_ids, seq_idx, past_key_values, output_router_logits, **kwargs):
        """The last hidden states `[B, n, hidden]` of new tokens, and what the routers chose."""
        layout, position_ids = forward_layout(past_key_values, inputs, attention_mask, position_ids, seq_idx, self.config)
        result = self._run(inputs, layout, position_ids.to(inputs.device), past_key_values, output_router_logits, **kwargs)
        close_cache(past_key_values)
        return result

    @property
    def routers(self) -> list[nn.Module]:
        """The `DeepseekR1ExpertRouter`s of the sparse layers, in their order."""
        return [layer.mlp.router for layer in self.layers if isinstance(layer.mlp, DeepseekR1SparseMoeBlock)]

    def _output(self, hidden_states, routed, output_router_logits, past_key_values=None) -> DeepseekR1ModelOutputWithPast:
        return DeepseekR1ModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            router_logits=tuple(layer.logits for layer in routed) if output_router_logits else None,
            routed=tuple(routed) if output_router_logits or (self.training and torch.is_grad_enabled()) else None,
        )

    def make_cache_layer(self, layer_idx: int, record_past: bool = False, max_cache_len: int | None = None):
        """The cache layer that a decoder layer needs; with `max_cache_len` for a static cache."""
        return cache_layer(self.config, layer_idx, record_past, max_cache_len)

    def _check_tokens(self, inputs: torch.Tensor, are_ids: bool) -> None:
        if inputs.shape[0] == 0 or inputs.shape[1] == 0:
            raise ValueError(f"the input has shape {list(inputs.shape)}: there is no token to run the model on")
        # On an accelerator this would wait for the device at every step; compiled code cannot raise.
        checked = are_ids and inputs.device.type == "cpu" and not torch.compiler.is_compiling()
        if checked and (int(inputs.min()) < 0 or int(inputs.max()) >= self.config.vocab_size):
            wrong = inputs[(inputs < 0) | (inputs >= self.config.vocab_size)][0]
            raise ValueError(f"token id {int(wrong)} is outside of the vocabulary (0 ... {self.config.vocab_size - 1})")

    def _run(self, inputs, layout, position_ids, past_key_values, output_router_logits, **kwargs):
        """All layers, and what their routers chose; without gradients and with a cache, a long input goes through them in chunks."""
        like = torch.empty(0, dtype=self.norm.weight.dtype, device=inputs.device)
        embeddings = [rotary(like, position_ids) for rotary in self.rotary_embs]
        chunk, length = tokens_at_once(self.config.chunk_size_feed_forward, inputs.device), inputs.shape[1]
        records = output_router_logits or any(
            kwargs.get(f"output_{name}") or getattr(self.config, f"output_{name}", False) for name in self._can_record_outputs
        )
        whole = past_key_values is None or torch.is_grad_enabled() or records or not 0 < chunk < length
        if whole or isinstance(layout, StaticLayout) or self.config._attn_implementation == "eager":
            return self._run_layers(self._embed(inputs), layout, embeddings, past_key_values, **kwargs)
        for layer in (layer.open_layer for layer in past_key_values.layers):
            layer.reserve = max(layer.reserve, 0 if layer.is_sliding else layer.seen + length)
        output, types, memory = None, kwargs.pop("mm_token_type_ids"), kwargs.pop("bridge_memory", None)
        for start in range(0, length, chunk):
            stop = min(length, start + chunk)
            part = [(cos[:, start:stop], sin[:, start:stop]) for cos, sin in embeddings]
            kwargs["mm_token_type_ids"] = types[:, start:stop] if types is not None else None
            kwargs["bridge_memory"] = memory.shift(start) if memory is not None else None
            result, _ = self._run_layers(
                self._embed(inputs[:, start:stop]), layout.slice(start, stop), part, past_key_values, **kwargs
            )
            output = result.new_empty(inputs.shape[0], length, result.shape[-1]) if output is None else output
            output[:, start:stop] = result
        return output, []

    def _embed(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(inputs) if inputs.dim() == 2 else inputs

    def _run_layers(self, hidden_states, layout, embeddings, past_key_values, **kwargs):
        routed = []
        for layer_idx, layer in enumerate(self.layers):
            output = layer(
                hidden_states, layout, embeddings[self.rotary_of_layer[layer_idx]], past_key_values=past_key_values, **kwargs
            )
            hidden_states = output[0] if isinstance(output, tuple) else output
            routed += [RouterOutput(*output[1:])] if isinstance(output, tuple) else []
        return self.norm(hidden_states), routed

    def _forward_for_engine(self, inputs, position_ids, attention_mask, output_router_logits, **kwargs):
        hidden_states = self._embed(inputs)
        if position_ids is None:
            raise ValueError(
                f"attention implementation {self.config._attn_implementation!r} computes attention outside of the model and must"
                f" pass position_ids; for plain use choose one of {OWN_IMPLEMENTATIONS}"
            )
        embeddings = [rotary(hidden_states, position_ids) for rotary in self.rotary_embs]
        hidden_states, routed = self._run_layers(hidden_states, None, embeddings, None, attention_mask=attention_mask, **kwargs)
        return self._output(hidden_states, routed, output_router_logits)


class DeepseekR1ForCausalLM(DeepseekR1PreTrainedModel, GenerationMixin):
    """The decoder with a language-modeling head; works with `generate()` and any Trainer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: DeepseekR1TextConfig):
        super().__init__(config)
        self.model = DeepseekR1TextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> DeepseekR1CausalLMOutputWithPast:
        """Logits `[batch, kept, vocab]` and, with `labels` `[batch, n]` (-100 = ignored), the next-token loss.

        A model with experts adds `router_aux_loss_coef * aux_loss` to the loss in training (`moe/losses.py`).

        Args:
            output_router_logits: return `router_logits` and `aux_loss`, and add the latter to the loss in evaluation too.
            logits_to_keep: only the last so many positions (0 = all), or the positions in a 1-D tensor.
            kwargs: `seq_idx` and the other arguments of `DeepseekR1TextModel.forward`; `num_items_in_batch` for the loss.
        """
        config = self.config.get_text_config()
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_token_type_ids=mm_token_type_ids,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        kept = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else slice(-logits_to_keep or None, None)
        # Of a slice as it lies in memory, the product would copy the head's weights for every row.
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :].clone(memory_format=torch.contiguous_format))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs)
        losses = self._router_losses(outputs, attention_mask, labels, output_router_logits)
        if loss is not None and losses:
            share = share_of_batch(labels, kwargs.get("num_items_in_batch"), kwargs.get("shift_labels"))
            loss = loss + config.router_aux_loss_coef * share * losses["aux_loss"].to(loss)
        return DeepseekR1CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **losses,
        )

    def _router_losses(self, outputs, attention_mask, labels, asked) -> dict[str, torch.Tensor]:
        """Empty where nobody needs them: evaluation without a request, or training without experts or with coefficient 0."""
        coefficient = self.config.get_text_config().router_aux_loss_coef
        trained = labels is not None and self.training and coefficient > 0 and outputs.routed
        return output_losses(self.model.routers, outputs, attention_mask, self.training) if asked or trained else {}

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, inputs_embeds=None, **kwargs):
        """The new tokens' columns of the padding mask, so that it has the same shape in every step; `generate()` asks for them
        with caches that can be compiled. Masks are made by the layers that need them."""
        if attention_mask is None or inputs_embeds is None:
            return attention_mask
        return attention_mask[:, -inputs_embeds.shape[1] :]

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        cacheable(self.config.get_text_config(), "generate()")
        if generation_config.cache_implementation == "quantized":
            raise ValueError(
                'cache_implementation="quantized" is not supported: its layers know neither windows nor the positions of padded rows;'
                " local layers hold a bounded number of keys without it"
            )
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, Cache):
            adopt_cache(cache, len(self.model.layers), self.model.make_cache_layer, self.device)
        return result

    def init_continuous_batching(self, *args, **kwargs):
        """Paged continuous batching (`generate_batch`); ValueError for remote keys, sink tokens, windows that differ."""
        check_pages(self.config.get_text_config(), "generate_batch()")
        return super().init_continuous_batching(*args, **kwargs)


class DeepseekR1ForSequenceClassification(GenericForSequenceClassification, DeepseekR1PreTrainedModel):
    """The decoder with a classification head on the last real token of each row."""

    # Its loss is a mean over the batch, which a Trainer must divide by the accumulation steps.
    accepts_loss_kwargs = False


class DeepseekR1ForTokenClassification(GenericForTokenClassification, DeepseekR1PreTrainedModel):
    """The decoder with a classification head on every token."""

    accepts_loss_kwargs = False


class DeepseekR1ForQuestionAnswering(GenericForQuestionAnswering, DeepseekR1PreTrainedModel):
    """The decoder with a span head (start and end logits)."""


__all__ = [
    "DeepseekR1ForCausalLM",
    "DeepseekR1ForQuestionAnswering",
    "DeepseekR1ForSequenceClassification",
    "DeepseekR1ForTokenClassification",
    "DeepseekR1PreTrainedModel",
    "DeepseekR1TextModel",
]
