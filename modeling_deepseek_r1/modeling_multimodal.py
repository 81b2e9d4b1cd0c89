"""The text model with encoders of other modalities before it and beside it.

Each modality has a placeholder token. What its encoder makes of an input is fused into the embeddings at the placeholders
(`multimodal/fusion.py`) and read again by the bridges of chosen layers (`multimodal/bridge.py`). Without such inputs the model is
its text model, bit for bit.
"""

from dataclasses import replace

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration.configuration_multimodal import MODALITIES, Bridge, DeepseekR1Config, Structured
from .modeling_deepseek_r1 import DeepseekR1ForCausalLM, DeepseekR1PreTrainedModel, DeepseekR1TextModel
from .moe.losses import real_tokens, share_of_batch
from .moe.outputs import DeepseekR1ModelOutputWithPast
from .multimodal.adapter import AudioAdapter, ImageAdapter, RowEncoder
from .multimodal.alignment import BridgeMemory, alignment_loss, cross_modal_consistency, gather_memory, pooled
from .multimodal.bridge import DeepseekR1Bridge
from .multimodal.fusion import GatedFusion, place_features
from .multimodal.inputs import (
    ALIGNED,
    ENCODER_INPUTS,
    JOINED_INPUTS,
    DeepseekR1MultimodalOutput,
    Joined,
    encoded_features,
    span_means,
)
from .multimodal.parts import composed, load_audio, load_vision
from .multimodal.towers import AudioTower, VisionTower


class DeepseekR1MultimodalPreTrainedModel(DeepseekR1PreTrainedModel):
    """What the multimodal models tell transformers about themselves."""

    config: DeepseekR1Config
    input_modalities = ("text", "image", "video", "audio")
    _can_record_outputs = {}


class DeepseekR1Model(DeepseekR1MultimodalPreTrainedModel):
    """Text model, encoders, fusion and bridges, without a head. A part whose configuration is None is None."""

    def __init__(self, config: DeepseekR1Config):
        super().__init__(config)
        text, vision, audio = config.text_config, config.vision_config, config.audio_config
        sizes = text.hidden_size, text.rms_norm_eps
        self.language_model = DeepseekR1TextModel(text)
        self.vision_tower = self.vision_adapter = self.audio_tower = self.audio_adapter = None
        self.row_encoder = self.fusion = self.word_projection = None
        if vision is not None:
            self.vision_tower = VisionTower(vision)
            self.vision_adapter = ImageAdapter(vision.hidden_size, sizes[0], config.vision_downsampling, sizes[1])
        if audio is not None:
            self.audio_tower = AudioTower(audio)
            self.audio_adapter = AudioAdapter(audio.d_model, sizes[0], config.audio_downsampling, sizes[1])
        if config.structured_config is not None:
            rows = Structured(**config.structured_config)
            self.row_encoder = RowEncoder(rows.num_numeric, rows.categories or [], *sizes)
        if config.fusion is not None:
            self.fusion = GatedFusion(sizes[0], config.fusion["hidden_size"], config.fusion["initial_token_share"])
        if config.bridge is not None:
            settings = Bridge(**config.bridge)
            self.word_projection = nn.Linear(sizes[0], sizes[0])
            for layer in settings.layers:
                self.language_model.layers[layer].bridge = DeepseekR1Bridge(text, settings, layer)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self.language_model.layers

    @property
    def patterns(self) -> list:
        """The attention patterns of the decoder layers."""
        return self.language_model.patterns

    @property
    def routers(self) -> list[nn.Module]:
        """The routers of the decoder's sparse layers."""
        return self.language_model.routers

    def make_cache_layer(self, *args):
        """The cache layer that a decoder layer needs; not for compiled steps, because where features go depends on the ids."""
        (layer := self.language_model.make_cache_layer(*args)).is_compileable = False
        return layer

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[features, hidden]`, image after image, of `[images, 3, height, width]`."""
        return self.vision_adapter(self.vision_tower(pixel_values)).flatten(0, 1)

    def encode_audio(self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`[features, hidden]`, clip after clip, of log-mel spectra `[clips, mel bins, frames]` and a mask `[clips, frames]`."""
        frames = input_features.shape[-1]
        lengths = torch.full((len(input_features),), frames, device=input_features.device)
        lengths = lengths if input_features_mask is None else input_features_mask.sum(-1)
        return self.audio_adapter(self.audio_tower(input_features, lengths), (lengths + 1) // 2)

    def encode_rows(self, row_numeric: torch.Tensor, row_categorical: torch.Tensor, row_missing: torch.Tensor) -> torch.Tensor:
        """`[features, hidden]`, row after row; arguments as in `RowEncoder`."""
        return self.row_encoder(row_numeric, row_categorical, row_missing).flatten(0, 1)

    def encode_video_sound(self, features: torch.Tensor, mask: torch.Tensor | None, spans: torch.Tensor) -> torch.Tensor:
        """`[video features, hidden]`: what sounds at each feature of the videos, zeros for silence.

        Args:
            features, mask: as `encode_audio` takes them.
            spans: `[video features, 2]` first of the sound's features, and the one after the last.
        """
        if self.audio_tower is None or self.fusion is None:
            raise ValueError(
                "sound in videos (video_sound_features) needs an audio encoder and gates (fusion); the model lacks one"
            )
        return span_means(self.encode_audio(features, mask), spans)

    def encode(self, **inputs) -> dict[str, torch.Tensor]:
        """Features `[N, hidden]` of each modality that `inputs`, named as in `ENCODER_INPUTS`, contain.

        Raises:
            ValueError: inputs of a modality that the configuration does not have.
        """
        encoders = {"image": self.encode_images, "video": self.encode_images, "audio": self.encode_audio}
        encoders |= {"structured": self.encode_rows, "video_sound": self.encode_video_sound}
        features = {}
        for modality, names in ENCODER_INPUTS.items():
            if inputs.get(names[0]) is None:
                continue
            if self.config.token_id(ALIGNED.get(modality, modality)) is None:
                raise ValueError(
                    f"{names[0]} were given, but the model reads no {modality} input: it has"
                    f" {', '.join(['text', *self.config.placeholders])}"
                )
            features[modality] = encoders[modality](*(inputs.get(name) for name in names))
        return features

    def places(self, input_ids: torch.Tensor, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`[batch, n]` bool for each modality of `features`: its placeholders.

        Raises:
            ValueError: more or fewer placeholders than features.
        """
        places = {}
        for modality, token in self.config.placeholders.items():
            places[modality] = input_ids == token
            found, given = int(places[modality].sum()), len(features[modality]) if modality in features else 0
            if found != given:
                raise ValueError(
                    f"input_ids have {found} placeholders of modality {modality!r} (token {token}), but its inputs give {given}"
                    " features; each placeholder takes one"
                )
        for modality, own in ALIGNED.items():
            if modality in features and len(features[modality]) != len(features.get(own, ())):
                raise ValueError(
                    f"{modality} was given for {len(features[modality])} features of modality {own!r}; it must be for each one of them"
                )
        return {modality: places[ALIGNED.get(modality, modality)] for modality in features}

    def memory(
        self, input_ids: torch.Tensor, features: dict[str, torch.Tensor], mm_token_times: torch.Tensor | None
    ) -> BridgeMemory | None:
        """The features as the bridges read them; None without bridges or features."""
        if self.word_projection is None or not features:
            return None
        places = self.places(input_ids, features)
        numbers = {MODALITIES.index(modality): modality for modality in features if modality not in ALIGNED}
        mapped = {number: self.word_projection(features[modality]) for number, modality in numbers.items()}
        return gather_memory(mapped, {number: places[modality] for number, modality in numbers.items()}, mm_token_times)

    def join(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_token_times: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        bridge_memory: BridgeMemory | None = None,
        past: int = 0,
        **inputs,
    ) -> Joined:
        """Encodes, fuses and gathers; arguments as in `forward`, `past` = tokens in the cache."""
        features = self.encode(**inputs) if mm_encoder_outputs is None else encoded_features(mm_encoder_outputs)
        if bridge_memory is not None:
            bridge_memory = replace(bridge_memory, start=past)
        arguments = {"mm_token_type_ids": mm_token_type_ids, "bridge_memory": bridge_memory}
        if input_ids is None:
            if features:
                raise ValueError("pass input_ids beside other modalities: their placeholders say where features belong")
            return Joined(arguments)
        # Of a single token an accelerator would have to be waited for at every step.
        if not features and input_ids.shape[1] == 1 and input_ids.device.type != "cpu":
            return Joined({**arguments, "input_ids": input_ids})
        places = self.places(input_ids, features)
        if not features:
            return Joined({**arguments, "input_ids": input_ids})
        words = embeddings = self.language_model.embed_tokens(input_ids)
        types = torch.zeros_like(input_ids)
        for modality, own in features.items():
            if modality in ALIGNED:
                continue
            beside = [features[name] for name, host in ALIGNED.items() if host == modality and name in features]
            embeddings = place_features(embeddings, own, places[modality], self.fusion, *beside)
            types = types.masked_fill(places[modality], MODALITIES.index(modality))
        arguments |= {
            "inputs_embeds": embeddings,
            "mm_token_type_ids": types if mm_token_type_ids is None else mm_token_type_ids,
        }
        if self.word_projection is None or bridge_memory is not None:
            return Joined(arguments)
        memory = self.memory(input_ids, features, mm_token_times)
        real = real_tokens(attention_mask, types.numel())
        spoken = types == 0 if real is None else (types == 0) & real.view_as(types)
        text, other = pooled(words, spoken), pooled(memory.states, memory.modality > 0)
        loss = alignment_loss(text, other, self.config.bridge["alignment_temperature"])
        return Joined({**arguments, "bridge_memory": memory}, cross_modal_consistency(text.detach(), other.detach()), loss)

    def forward(
        self, input_ids: torch.LongTensor | None = None, inputs_embeds: torch.Tensor | None = None, **kwargs
    ) -> DeepseekR1ModelOutputWithPast:
        """The text model's output; arguments as in `DeepseekR1ForConditionalGeneration.forward`."""
        own = {name: kwargs.pop(name) for name in JOINED_INPUTS if name in kwargs}
        joined = self.join(input_ids, kwargs.get("attention_mask"), past=cached_tokens(kwargs.get("past_key_values")), **own)
        if joined.arguments["bridge_memory"] is not None and kwargs.get("seq_idx") is not None:
            raise ValueError("packed rows (seq_idx) cannot be read with a bridge, whose tokens see all features before them")
        if inputs_embeds is not None:
            joined.arguments["inputs_embeds"] = inputs_embeds
        return self.language_model(**joined.arguments, **kwargs)


def cached_tokens(past_key_values: Cache | None) -> int:
    """Tokens that a cache has seen."""
    return past_key_values.get_seq_length() if past_key_values is not None else 0


class DeepseekR1ForConditionalGeneration(DeepseekR1ForCausalLM):
    """[`DeepseekR1Model`] with a language-modeling head; works with `generate()` and any Trainer."""

    config: DeepseekR1Config
    input_modalities = ("text", "image", "video", "audio")
    _can_record_outputs = {}
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: DeepseekR1Config):
        super(DeepseekR1ForCausalLM, self).__init__(config)
        self.model = DeepseekR1Model(config)
        self.vocab_size = config.text_config.vocab_size
        self.lm_head = nn.Linear(config.text_config.hidden_size, self.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_text_vision_audio_pretrained(
        cls,
        text: str | DeepseekR1ForCausalLM,
        *,
        placeholders: dict[str, int],
        vision: str | nn.Module | None = None,
        audio: str | nn.Module | None = None,
        modality_preference: float = 2.0,
        **fields,
    ) -> "DeepseekR1ForConditionalGeneration":
        """A model of trained parts. Adapters, fusion and bridges are new; text alone gives the text model's logits.

        Args:
            text: converted checkpoint (folder, hub id or model).
            placeholders: modality -> token id, of "image", "video", "audio", "structured"; new ids extend the vocabulary.
            vision: checkpoint of DINOv2, SigLIP or CLIP.
            audio: checkpoint of Whisper, whose encoder is used.
            modality_preference: how strongly tokens of a modality are sent to the experts of a domain of its name at first.
            fields: of [`DeepseekR1Config`], e.g. `bridge={"layers": [4, 8]}`; fusion is on unless it is None.

        Raises:
            ValueError: a part that is not supported, or fields that do not fit together.
        """
        text = text if isinstance(text, nn.Module) else DeepseekR1ForCausalLM.from_pretrained(text)
        towers = load_vision(vision) if vision is not None else None, load_audio(audio) if audio is not None else None
        return composed(cls, text, towers, placeholders, modality_preference, fields)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        row_numeric: torch.Tensor | None = None,
        row_categorical: torch.Tensor | None = None,
        row_missing: torch.Tensor | None = None,
        video_sound_features: torch.Tensor | None = None,
        video_sound_features_mask: torch.Tensor | None = None,
        video_sound_spans: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_token_times: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        bridge_memory: BridgeMemory | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> DeepseekR1MultimodalOutput:
        """As `DeepseekR1ForCausalLM.forward`; with the bridge's `alignment_loss_coef` training adds its loss.

        Features take the placeholders of their modality in the order of the rows, however many a row has.

        Args:
            pixel_values: `[images, 3, height, width]` of all rows.
            pixel_values_videos: `[frames, 3, height, width]` of all videos.
            input_features, input_features_mask: `[clips, mel bins, frames]` log-mel spectra, `[clips, frames]` 1 = real.
            row_numeric, row_categorical, row_missing: `[rows, numeric]`, `[rows, categorical]`, `[rows, fields]`.
            video_sound_features, video_sound_features_mask, video_sound_spans: sound in the videos, as `encode_video_sound` takes it.
            mm_token_type_ids: `[batch, n]` modality of each token; default: by its placeholder.
            mm_token_times: `[batch, n]` seconds at which what a placeholder shows ends; negative = none.
            mm_encoder_outputs: modality -> output whose `pooler_output` has the features, instead of raw inputs.
            bridge_memory: as `DeepseekR1Model.memory` makes it; `generate()` does so once.

        Raises:
            ValueError: as many features as placeholders are not given, or a modality that the model does not have.
        """
        values = (pixel_values, pixel_values_videos, input_features, input_features_mask)
        values += (row_numeric, row_categorical, row_missing)
        values += (video_sound_features, video_sound_features_mask, video_sound_spans)
        values += (mm_token_type_ids, mm_token_times, mm_encoder_outputs, bridge_memory)
        own = dict(zip(JOINED_INPUTS, values, strict=True))
        joined = self.model.join(input_ids, attention_mask, past=cached_tokens(past_key_values), **own)
        arguments = joined.arguments if inputs_embeds is None else {**joined.arguments, "inputs_embeds": inputs_embeds}
        kwargs |= {"position_ids": position_ids, "past_key_values": past_key_values, "logits_to_keep": logits_to_keep}
        output = super().forward(attention_mask=attention_mask, labels=labels, **arguments, **{**kwargs, "return_dict": True})
        coefficient = self.config.bridge["alignment_loss_coef"] if self.config.bridge is not None else 0
        loss = output.loss
        if loss is not None and self.training and coefficient > 0 and joined.alignment_loss is not None:
            share = share_of_batch(labels, kwargs.get("num_items_in_batch"), kwargs.get("shift_labels"))
            loss = loss + coefficient * share * joined.alignment_loss.to(loss)
        fields = {**output, "loss": loss, "consistency": joined.consistency, "alignment_loss": joined.alignment_loss}
        return DeepseekR1MultimodalOutput(**fields)

    @torch.no_grad()
    def _maybe_prepare_encoder_kwargs_for_generation(self, inputs_tensor, model_kwargs, *args, **kwargs):
        """Runs the encoders once per `generate()`; inputs whose placeholders are in the cache already are not fused again."""
        raw = {name: model_kwargs.pop(name, None) for names in ENCODER_INPUTS.values() for name in names}
        times = model_kwargs.pop("mm_token_times", None)
        features = self.model.encode(**raw) or encoded_features(model_kwargs.pop("mm_encoder_outputs", None) or {})
        bridged = self.model.word_projection is not None and model_kwargs.get("bridge_memory") is None
        if inputs_tensor.is_floating_point() and features:
            raise ValueError("pass input_ids beside other modalities: their placeholders say where features belong")
        if not features:
            # What a cache has read before is needed again by the bridge.
            if bridged and not inputs_tensor.is_floating_point():
                self.model.places(inputs_tensor, {})
            return model_kwargs
        places = self.model.places(inputs_tensor, features)
        memory = self.model.memory(inputs_tensor, features, times)
        if memory is not None:
            model_kwargs["bridge_memory"] = memory
        past = cached_tokens(model_kwargs.get("past_key_values"))
        new = {modality: torch.arange(inputs_tensor.shape[1], device=inputs_tensor.device) >= past for modality in features}
        new = {modality: new[modality].expand_as(places[modality])[places[modality]] for modality in features}
        model_kwargs["mm_encoder_outputs"] = {
            modality: BaseModelOutputWithPooling(pooler_output=own[new[modality]][None])
            for modality, own in features.items()
            if bool(new[modality].any())
        }
        return model_kwargs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeats the rows, with all the features of each."""
        encoded, memory = model_kwargs.pop("mm_encoder_outputs", None), model_kwargs.pop("bridge_memory", None)
        ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        if encoded is not None:
            past = cached_tokens(kwargs.get("past_key_values"))
            for modality, output in encoded.items() if expand_size > 1 else ():
                token = self.config.token_id(ALIGNED.get(modality, modality))
                counts = (input_ids[:, past:] == token).sum(1).tolist()
                rows = output.pooler_output[0].split(counts)
                output.pooler_output = torch.cat([part for row in rows for part in [row] * expand_size])[None]
            kwargs["mm_encoder_outputs"] = encoded
        if memory is not None:
            kwargs["bridge_memory"] = memory if expand_size == 1 else memory.repeat(expand_size)
        return ids, kwargs


__all__ = ["DeepseekR1ForConditionalGeneration", "DeepseekR1Model", "DeepseekR1MultimodalPreTrainedModel"]
