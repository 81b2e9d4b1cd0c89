"""Parts of a multimodal model from checkpoints that exist, and how a text model takes them up."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..configuration.configuration_multimodal import MODALITIES
from .adapter import FeatureNorm

WHOLE_MODELS = {"clip": "vision_config", "siglip": "vision_config"}
"""Model types that contain a vision encoder -> its configuration in theirs."""


def load_vision(source) -> PreTrainedModel:
    """A vision encoder: a model, or a folder or hub id; of CLIP and SigLIP the image half is taken."""
    if isinstance(source, PreTrainedModel):
        return source
    config = AutoConfig.from_pretrained(source)
    config = getattr(config, WHOLE_MODELS.get(config.model_type, ""), config)
    return AutoModel.from_pretrained(source, config=config)


def load_audio(source) -> PreTrainedModel:
    """Whisper's encoder: of a Whisper model, or of a folder or hub id.

    Raises:
        ValueError: not a Whisper checkpoint.
    """
    model = source if isinstance(source, PreTrainedModel) else AutoModel.from_pretrained(source)
    if model.config.model_type != "whisper":
        raise ValueError(f"the audio encoder has model_type={model.config.model_type!r}; supported is 'whisper'")
    return model if type(model).__name__ == "WhisperEncoder" else model.get_encoder()


def composed(
    model_class: type[PreTrainedModel],
    text: PreTrainedModel,
    towers: tuple[PreTrainedModel | None, PreTrainedModel | None],
    placeholders: Mapping[str, int],
    modality_preference: float,
    fields: Mapping,
) -> PreTrainedModel:
    """A multimodal model with the weights of its parts: a text model, and encoders of images and of sound.

    Args:
        model_class: of the result.
        placeholders, modality_preference, fields: as `from_text_vision_audio_pretrained` takes them.
    """
    encoders = [copy.deepcopy(tower.config) if tower is not None else None for tower in towers]
    for own in encoders:
        if own is not None:
            own.dtype = text.dtype
    ids = {f"{modality}_token_id": token for modality, token in placeholders.items()}
    config = extended_config(text.config, max(placeholders.values(), default=0) + 1, len(MODALITIES))
    values = {"text_config": config, "vision_config": encoders[0], "audio_config": encoders[1], "fusion": {}, **ids, **fields}
    model = model_class._from_config(model_class.config_class(**values), dtype=text.dtype)
    weights = extended_weights(text.model.state_dict(), config.vocab_size, len(MODALITIES))
    model.model.language_model.load_state_dict({**model.model.language_model.state_dict(), **weights})
    model.lm_head.load_state_dict({"weight": extended_rows(text.lm_head.weight, config.vocab_size)})
    for own, tower in zip((model.model.vision_tower, model.model.audio_tower), towers, strict=True):
        if own is not None:
            own.encoder.load_state_dict(tower.state_dict())
    scale_features(model.model, model.get_input_embeddings().weight)
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_sparse(layer)]
    prefer_domains(model.model.routers, [config.expert_domains(layer) for layer in layers], MODALITIES, modality_preference)
    model.generation_config = copy.deepcopy(text.generation_config)
    model.generation_config.suppress_tokens = list(placeholders.values())
    return model


def extended_config(config, vocab_size: int, num_modalities: int):
    """A copy of a text configuration with at least so many tokens, whose domain gates know a token's modality."""
    fields = copy.deepcopy(config.to_dict())
    fields["vocab_size"] = max(vocab_size, config.vocab_size)
    if config.routing is not None and any(len(stage) > 1 for stage in config.routing["expert_topology"] or ()):
        fields["routing"] |= {"num_modalities": max(num_modalities, config.routing["num_modalities"])}
    return type(config)(**fields)


def extended_rows(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """An embedding or head with so many rows, of which new ones are the mean of the others."""
    mean = weight.float().mean(0, keepdim=True).to(weight)
    return torch.cat((weight, mean.expand(max(0, rows - len(weight)), -1)))


def extended_weights(state: Mapping[str, torch.Tensor], vocab_size: int, num_modalities: int) -> dict[str, torch.Tensor]:
    """The weights of a text model for its extended configuration; new rows of the tables of modalities are zero."""
    result = dict(state)
    for name, value in state.items():
        if name.endswith("embed_tokens.weight"):
            result[name] = extended_rows(value, vocab_size)
        elif name.endswith("domain_gate.modality_bias"):
            result[name] = nn.functional.pad(value, (0, 0, 0, max(0, num_modalities - len(value))))
    return result


def prefer_domains(routers: Sequence[nn.Module], domains: Sequence[Mapping[str, int]], modalities: Sequence[str], by: float):
    """Lets tokens of a modality go to the experts of the domain that has its name.

    Args:
        routers, domains: of the same layers; the latter domain -> number of experts.
        modalities: names, in the order of their numbers.
        by: added to the logit of the domain's gate, and taken from those of the others.
    """
    for router, names in zip(routers, domains, strict=True):
        table = getattr(router.domain_gate, "modality_bias", None)
        for number, modality in enumerate(modalities) if table is not None else ():
            if number and modality in names:
                with torch.no_grad():
                    table[number] -= by
                    table[number, list(names).index(modality)] += 2 * by


def scale_features(model: nn.Module, embeddings: torch.Tensor) -> None:
    """Gives features the root mean square of the token embeddings."""
    rms = float(embeddings.detach().float().square().mean().sqrt())
    for module in model.modules():
        if isinstance(module, FeatureNorm):
            nn.init.constant_(module.weight, rms)
