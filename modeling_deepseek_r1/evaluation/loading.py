"""Checkpoints as measurements need them: on this machine's CPU or accelerator, in one dtype, in memory and nowhere else."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def usable_device(name: str | None = None) -> torch.device:
    """The device of a name such as `cuda:1`; None: the machine's accelerator, or the CPU where it has none.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def load_model(checkpoint: str | Path, dtype: torch.dtype = torch.float32, device: str | None = None):
    """Loads a causal language model for evaluation, every weight copied out of the file.

    `from_pretrained` leaves weights mapped to the safetensors file: their pages would be counted as memory only when touched,
    in the middle of a measurement.

    Args:
        checkpoint: a folder, a `.gguf` file, or a hub id.
        dtype: of the weights.
        device: as in `usable_device`.

    Raises:
        OSError: nothing is there, or it is not a checkpoint.
        ValueError: no such device, or the files are damaged or of an unknown architecture.
    """
    (name, options), device = _locate(checkpoint), usable_device(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    except SafetensorError as error:
        raise ValueError(f"the weights of {checkpoint} are damaged: {error}") from error
    model.eval().requires_grad_(False)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model.to(device)


def load_tokenizer(checkpoint: str | Path):
    """Loads the tokenizer beside a checkpoint; arguments and errors as in `load_model`."""
    name, options = _locate(checkpoint)
    return AutoTokenizer.from_pretrained(name, **options)


def _locate(checkpoint: str | Path) -> tuple[str, dict[str, str]]:
    """First argument of `from_pretrained` and further options."""
    path = Path(checkpoint).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint file {checkpoint}")
        return str(path.parent), {"gguf_file": path.name}
    # Hub ids are `name` or `owner/name`; anything else that does not exist was meant as a folder.
    if not path.is_dir() and (path.is_absolute() or str(checkpoint).startswith(".") or len(path.parts) > 2):
        raise FileNotFoundError(f"no checkpoint folder {checkpoint}")
    return str(path), {}
