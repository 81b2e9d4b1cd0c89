"""Configuration of the multimodal model: a text model, encoders of other modalities, and how they are joined.

A modality whose configuration is None does not exist: the model has no parameters for it and refuses its inputs. The same holds
for `fusion` and `bridge`, plain dictionaries that are checked by the strict dataclasses of the same names.
"""

from dataclasses import asdict, dataclass
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING
from transformers.configuration_utils import PreTrainedConfig

from .configuration_deepseek_r1 import DeepseekR1TextConfig

MODALITIES = ("text", "image", "video", "audio", "structured")
"""A token's modality is its number here; the first four are those of transformers' `mm_token_type_ids`."""

PLACEHOLDERS_OF = {"vision_config": ("image", "video"), "audio_config": ("audio",), "structured_config": ("structured",)}
VISION_TYPES = ("dinov2", "siglip_vision_model", "clip_vision_model")
AUDIO_TYPES = ("whisper",)


@strict
@dataclass
class Fusion:
    """How the embedding of a placeholder and the feature at its place are mixed: g * embedding + (1 - g) * feature.

    Attributes:
        initial_token_share: g of a new model, for every token; training then makes it a function of both.
        hidden_size: width of the small network that computes g.
    """

    initial_token_share: float | int = 0.7
    hidden_size: int = 128

    def validate_values(self):
        if not 0 < self.initial_token_share < 1:
            raise ValueError(
                f"fusion['initial_token_share']={self.initial_token_share} must lie between 0 and 1; fusion=None puts features in"
                " the place of embeddings"
            )
        if self.hidden_size < 1:
            raise ValueError(f"fusion['hidden_size']={self.hidden_size} must be at least 1")


@strict
@dataclass
class Bridge:
    """Cross-attention from text states to the encoders' features.

    Attributes:
        layers: numbers of the decoder layers that have it.
        num_heads: None = those of the text model.
        temporal_alignment: whether a token sees only what has happened in a clip by the end of the placeholder span before it.
        conflict_hidden_size: width of the network that gives each modality a confidence; None = all count fully.
        alignment_loss_coef: weight of the contrastive loss between the texts and the features of a batch; 0 = none.
        alignment_temperature: of that loss.
    """

    layers: list[int]
    num_heads: int | None = None
    temporal_alignment: bool = True
    conflict_hidden_size: int | None = 1024
    alignment_loss_coef: float | int = 0.0
    alignment_temperature: float | int = 0.07

    def validate_values(self):
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"bridge['layers']={self.layers} must be different numbers of layers, at least one")
        for name in ("num_heads", "conflict_hidden_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"bridge[{name!r}]={value} must be at least 1")
        if self.alignment_loss_coef < 0 or self.alignment_temperature <= 0:
            raise ValueError(
                f"bridge['alignment_loss_coef']={self.alignment_loss_coef} must be 0 or more and"
                f" bridge['alignment_temperature']={self.alignment_temperature} positive"
            )


@strict
@dataclass
class Structured:
    """Rows of a table; each of its fields takes one placeholder, numeric ones first.

    Attributes:
        num_numeric: numeric fields.
        categories: for each categorical field the number of its categories.
    """

    num_numeric: int = 0
    categories: list[int] | None = None

    def validate_fields(self):
        if self.num_numeric < 0 or any(size < 1 for size in self.categories or ()):
            raise ValueError(
                f"structured_config has num_numeric={self.num_numeric} and categories={self.categories}; counts cannot be negative"
                " and every categorical field needs at least one category"
            )
        if self.num_fields == 0:
            raise ValueError("structured_config has no field; structured_config=None = no rows")

    @property
    def num_fields(self) -> int:
        return self.num_numeric + len(self.categories or ())


def complete(kind: type, name: str, value: dict[str, Any] | None) -> dict[str, Any] | None:
    """The dictionary with all its fields.

    Raises:
        ValueError: not a dictionary, or an unknown field. What is in the fields is checked by the dataclass.
    """
    if value is None:
        return None
    known = kind.__dataclass_fields__
    if not isinstance(value, dict) or set(value) - set(known):
        raise ValueError(f"{name}={value!r} must be a dictionary with keys among {sorted(known)}")
    return asdict(kind(**value))


@strict
class DeepseekR1Config(PreTrainedConfig):
    r"""
    Configuration of [`DeepseekR1Model`] and [`DeepseekR1ForConditionalGeneration`].

    Args:
        text_config (`DeepseekR1TextConfig` or `dict`): the decoder.
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Encoder of images and frames of videos: `dinov2`, `siglip_vision_model` or `clip_vision_model`.
        audio_config (`PreTrainedConfig` or `dict`, *optional*): a `whisper` configuration, of which the encoder is built.
        structured_config (`dict`, *optional*): fields of `Structured`.
        fusion (`dict`, *optional*): fields of `Fusion`; None = features take the place of the placeholders' embeddings.
        bridge (`dict`, *optional*): fields of `Bridge`.
        vision_downsampling (`int`): patches of an image are joined into squares of so many by so many.
        audio_downsampling (`int`): so many positions of the audio encoder, 20 ms each, are joined into one.
        image_token_id, video_token_id, audio_token_id, structured_token_id (`int`, *optional*):
            Placeholders, each of which gets one feature.

    Raises:
        ValueError: an unsupported encoder or an impossible value; the message names the field, its value and what would be valid.
    """

    model_type = "deepseek_r1"
    sub_configs = {
        "text_config": DeepseekR1TextConfig,
        "vision_config": PreTrainedConfig,
        "audio_config": PreTrainedConfig,
    }
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "aux_loss", "consistency", "alignment_loss"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    structured_config: dict | None = None
    fusion: dict | None = None
    bridge: dict | None = None
    vision_downsampling: int = 1
    audio_downsampling: int = 4
    image_token_id: int | None = None
    video_token_id: int | None = None
    audio_token_id: int | None = None
    structured_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = DeepseekR1TextConfig(**(self.text_config or {}))
        self.vision_config = _encoder_config("vision_config", self.vision_config, VISION_TYPES)
        self.audio_config = _encoder_config("audio_config", self.audio_config, AUDIO_TYPES)
        self.structured_config = complete(Structured, "structured_config", self.structured_config)
        self.fusion = complete(Fusion, "fusion", self.fusion)
        self.bridge = complete(Bridge, "bridge", self.bridge)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)

    @property
    def initializer_range(self) -> float:
        """That of the decoder, for what joins it with the encoders."""
        return self.text_config.initializer_range

    def token_id(self, modality: str) -> int | None:
        """The placeholder of a modality of `MODALITIES`; None where the model does not have the modality."""
        present = any(getattr(self, name) is not None for name, modalities in PLACEHOLDERS_OF.items() if modality in modalities)
        return getattr(self, f"{modality}_token_id") if present else None

    @property
    def placeholders(self) -> dict[str, int]:
        """Modality -> id of its placeholder, for the modalities that exist."""
        ids = {modality: self.token_id(modality) for modality in MODALITIES[1:]}
        return {modality: token for modality, token in ids.items() if token is not None}

    def validate_architecture(self):
        """Part of `@strict` validation: what must fit together."""
        if self.text_config.model_type != DeepseekR1TextConfig.model_type:
            raise ValueError(
                f"text_config has model_type={self.text_config.model_type!r}; it must be {DeepseekR1TextConfig.model_type!r}: convert"
                " the checkpoint first"
            )
        for name in ("vision_downsampling", "audio_downsampling"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        placeholders, vocab_size = self.placeholders, self.text_config.vocab_size
        for name, modalities in PLACEHOLDERS_OF.items():
            if getattr(self, name) is not None and not set(modalities) & set(placeholders):
                raise ValueError(f"{name} is given, but no {' or '.join(f'{modality}_token_id' for modality in modalities)}")
        for modality, token in placeholders.items():
            if not 0 <= token < vocab_size or list(placeholders.values()).count(token) > 1:
                raise ValueError(
                    f"{modality}_token_id={token} must be an id of its own within the vocabulary (0 ... {vocab_size - 1})"
                )
        layers = self.text_config.num_hidden_layers
        outside = [layer for layer in (self.bridge or {}).get("layers", ()) if not 0 <= layer < layers]
        if outside:
            raise ValueError(f"bridge['layers'] has {outside[0]}; the text model has the layers 0 ... {layers - 1}")
        self._validate_routing(placeholders)

    def _validate_routing(self, placeholders: dict[str, int]) -> None:
        needed = max((MODALITIES.index(modality) for modality in placeholders), default=0) + 1
        for layer in range(self.text_config.num_hidden_layers):
            rows = self.text_config.routing_of(layer).num_modalities if self.text_config.is_sparse(layer) else 0
            if 0 < rows < needed:
                raise ValueError(
                    f"layer {layer}: routing['num_modalities']={rows}, but tokens of this model have modalities 0 ... {needed - 1};"
                    f" it must be at least {needed}, or 0"
                )

    def __eq__(self, other) -> bool:
        if getattr(other, "model_type", None) != self.model_type:
            return False
        mine, theirs = self.to_dict(), other.to_dict()
        return all(mine.get(key) == theirs.get(key) for key in {*mine, *theirs} - {"_name_or_path"})


def _encoder_config(name: str, value, supported: tuple[str, ...]) -> PreTrainedConfig | None:
    if value is None:
        return None
    model_type = value.get("model_type") if isinstance(value, dict) else value.model_type
    if model_type not in supported:
        raise ValueError(f"{name} has model_type={model_type!r}; supported are {list(supported)}")
    return CONFIG_MAPPING[model_type](**value) if isinstance(value, dict) else value


__all__ = ["MODALITIES", "Bridge", "DeepseekR1Config", "Fusion", "Structured"]
