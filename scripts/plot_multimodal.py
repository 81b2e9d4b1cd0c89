"""Draws what a model of scripts/benchmark_multimodal.py has learned: which experts tokens of each modality get, and where in a
picture its bridges look; writes results/multimodal_routing.png and results/multimodal_bridge.png.

python scripts/plot_multimodal.py .cache/benchmark/multimodal/trained
"""

import argparse
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import torch
from benchmark_multimodal import MODELS
from packaged_encoders import packaged_file
from spoken_words import RATE, fetch, recordings
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_deepseek_r1.configuration.configuration_multimodal import MODALITIES
from modeling_deepseek_r1.evaluation.domains import expert_routers

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SHOWN = ("text", "image", "audio")
QUESTIONS = ["what is the color of the shape?", "what shape is in the image?"]


@contextmanager
def watching(modules: dict, look):
    """Calls `look(name, module, inputs, output)` after every forward of the modules."""
    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: look(name, module, inputs, output))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def ask(processor, block: dict, text: str) -> dict[str, torch.Tensor]:
    content = [block, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)


def draw_routing(model, prompts: list[dict], path: Path) -> None:
    """Modality by domain: the share of the active slots, for each sparse layer and for all."""
    layers, routers = expert_routers(model).keys(), dict(enumerate(expert_routers(model).values()))
    domains = {number: list(router.domains.items()) for number, router in routers.items()}
    counts = torch.zeros(len(routers), len(SHOWN), len(domains[0]))
    kinds = torch.zeros(0)

    def look(number, module, inputs, output):
        owner = torch.tensor([place for place, (_, size) in enumerate(domains[number]) for _ in range(size)])
        for row, modality in enumerate(SHOWN):
            chosen = owner[output.top_k_index[kinds == MODALITIES.index(modality)]]
            counts[number, row] += torch.bincount(chosen.flatten(), minlength=len(domains[number]))

    with watching(routers, look), torch.no_grad():
        for inputs in prompts:
            kinds = inputs["mm_token_type_ids"].flatten()
            model(**inputs, logits_to_keep=1)
    shares = counts / counts.sum(-1, keepdim=True)
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(10, 3.6), sharey=True, layout="constrained")
    for row, (modality, own) in enumerate(zip(SHOWN, axes, strict=True)):
        image = own.imshow(shares[:, row], vmin=0, vmax=1, cmap="Blues", aspect="auto")
        own.set_xticks(
            range(len(domains[0])), [f"{name}\n{shares[:, row, i].mean():.0%}" for i, (name, _) in enumerate(domains[0])]
        )
        own.set_title(f"tokens: {modality}")
        own.set_xlabel("experts of the domain")
    axes[0].set_yticks(range(len(routers)), map(str, layers))
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="share of the active slots")
    figure.savefig(path, dpi=110)


def draw_bridge(model, processor, pictures: list[Path], path: Path) -> None:
    """Attention of the last token of a question over the features of a picture, mean over heads, for each bridge."""
    bridges = {layer: model.model.layers[layer].bridge for layer in model.config.bridge["layers"]}
    weights = {}

    def look(layer, module, inputs, output):
        states, memory = inputs
        query = module._heads(module.q_proj(module.norm(states)))[:, :, -1:]
        key, _ = module._project(memory)
        logits = (query @ key.transpose(-1, -2))[0, :, 0] * query.shape[-1] ** -0.5
        # One further slot of logit zero is attended to by who looks at nothing.
        weights[layer] = torch.nn.functional.pad(logits, (1, 0)).softmax(-1)[:, 1:].mean(0)

    figure, axes = plt.subplots(len(bridges) + 1, len(pictures), figsize=(1.7 * len(pictures), 5.4), layout="constrained")
    for column, picture in enumerate(pictures):
        pixels = plt.imread(picture)
        axes[0, column].imshow(pixels)
        block = {"type": "image", "image": str(picture)}
        inputs = ask(processor, block, QUESTIONS[column % 2])
        with watching(bridges, look), torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            model(**inputs, logits_to_keep=1)
        said = processor.decode(tokens, skip_special_tokens=True).strip()
        axes[0, column].set_title(
            f"{QUESTIONS[column % 2].removesuffix('?').replace(' in the image', '')}?\n{said}", fontsize=7
        )
        for row, (layer, own) in enumerate(weights.items(), 1):
            side = int(len(own) ** 0.5)
            axes[row, column].imshow(pixels, extent=(0, side, side, 0))
            axes[row, column].imshow(own.view(side, side), extent=(0, side, side, 0), cmap="inferno", alpha=0.65, vmin=0)
            axes[row, column].set_title(f"layer {layer}: {own.sum():.0%}", fontsize=7)
    for own in axes.flat:
        own.set_axis_off()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the trained model")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the pictures (default: %(default)s)")
    args = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(args.model).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    folder = packaged_file("easy_vqa", "data/test/images")
    pictures = [folder / f"{number}.png" for number in (3, 17, 42, 105, 250, 777)]
    words, sentences = recordings(fetch(MODELS / "recordings"))
    clips = [*words[::16], *sentences[::40]]
    prompts = [ask(processor, {"type": "image", "image": str(picture)}, QUESTIONS[0]) for picture in pictures]
    prompts += [
        ask(processor, {"type": "audio", "audio": clip.samples, "sampling_rate": RATE}, "What is said?") for clip in clips
    ]
    draw_routing(model, prompts, args.output / "multimodal_routing.png")
    draw_bridge(model, processor, pictures, args.output / "multimodal_bridge.png")


if __name__ == "__main__":
    main()
