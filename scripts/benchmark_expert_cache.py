"""Time of decoding against the share of experts in memory; writes results/expert_cache.json and results/expert_cache.png.

python scripts/benchmark_expert_cache.py

SmolLM2-135M whose upper 15 layers have 8 experts each, copies of the MLP, 4 for code and 4 for prose, of which a token uses 2. Texts
of one domain, and of both in turn, are continued greedily with all experts in memory and with budgets for parts of them, in turn;
the texts that come out must be the same. The first continuation of each fills the cache and does not count. The file is in the
system's memory: a miss costs a copy, not a disk's time.
"""

import argparse
import time
from pathlib import Path

import torch
from two_domains import write_domain_texts

from modeling_deepseek_r1.conversion import convert_checkpoint
from modeling_deepseek_r1.evaluation import (
    FORMAT_VERSION,
    check_plot,
    encode_text,
    environment,
    load_model,
    load_tokenizer,
    read_text,
    write_report,
)
from modeling_deepseek_r1.evaluation.report import figure_class
from modeling_deepseek_r1.evaluation.speed import Measurement
from modeling_deepseek_r1.moe.offload import offload_experts

MODELS = Path(".cache/benchmark")
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "expert_layers": list(range(15, 30))}


def converted(texts: dict[str, tuple[Path, Path]]) -> Path:
    folder = MODELS / "two_domains_copies"
    if not folder.exists():
        from demo import packaged_checkpoint

        domain_texts = {domain: str(own) for domain, (own, _) in texts.items()}
        print(convert_checkpoint(packaged_checkpoint(), folder, **EXPERTS, domain_texts=domain_texts).summary(), flush=True)
    return folder


def prompts(tokenizer, texts: dict[str, tuple[Path, Path]], number: int, tokens: int) -> dict[str, list[torch.Tensor]]:
    """Kind of text -> prompts `[1, tokens]` from what is held out."""
    held_out = {domain: encode_text(tokenizer, read_text([aside])) for domain, (_, aside) in texts.items()}
    cut = {domain: [ids[1000 * n :][None, :tokens] for n in range(number + 1)] for domain, ids in held_out.items()}
    return {"one domain": cut["code"], "both in turn": [cut[("code", "prose")[n % 2]][n] for n in range(number + 1)]}


def decode(model, prompt: torch.Tensor, tokens: int) -> tuple[float, list[int]]:
    """Seconds per token after the first, and the tokens."""
    with torch.no_grad():
        output = model(prompt, use_cache=True, logits_to_keep=1)
        found, start = [int(output.logits[0, -1].argmax())], time.perf_counter()
        for _ in range(tokens - 1):
            output = model(torch.tensor([found[-1:]]), past_key_values=output.past_key_values, use_cache=True)
            found.append(int(output.logits[0, -1].argmax()))
    return (time.perf_counter() - start) / (tokens - 1), found


def measure(folder: Path, whole, share: float, prefetch: bool, given: list[torch.Tensor], tokens: int) -> dict:
    """One budget, beside the model that has all experts in memory."""
    total = sum(
        p.nbytes for layer in whole.model.layers if hasattr(layer.mlp, "experts") for p in layer.mlp.experts.parameters()
    )
    model = offload_experts(folder, int(share * total), prefetch)
    times: dict[str, list[float]] = {"cached": [], "whole": []}
    for number, prompt in enumerate(given):
        if number == 1:
            model.expert_cache.reset_statistics()
        (cached, text), (all_there, expected) = decode(model, prompt, tokens), decode(whole, prompt, tokens)
        if text != expected:
            raise RuntimeError(f"share {share}: another text with the cache than without, prompt {number}")
        if number:
            times["cached"].append(cached)
            times["whole"].append(all_there)
    seconds = {name: Measurement.of(values) for name, values in times.items()}
    return {
        "share": share,
        "prefetch": prefetch,
        "budget_bytes": model.expert_cache.budget_bytes,
        "resident_bytes": model.expert_cache.resident_bytes,
        **model.expert_cache.statistics.to_dict(),
        "seconds_per_token": vars(seconds["cached"]),
        "speed": vars(seconds["whole"].over(seconds["cached"])),
    }


def draw(result: dict, path: str) -> None:
    """Speed against hit rate, a line per kind of text."""
    check_plot(path)
    figure = figure_class()(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for colour, (kind, cells) in zip(("#0072B2", "#D55E00"), result["texts"].items(), strict=True):
        for prefetch, style in ((True, "-o"), (False, "--s")):
            chosen = sorted((c for c in cells if c["prefetch"] == prefetch), key=lambda c: c["share"])
            if not chosen:
                continue
            hits = [100 * c["hit_rate"] for c in chosen]
            speeds = [c["speed"]["median"] for c in chosen]
            axes.plot(hits, speeds, style, color=colour, label=f"{kind}{'' if prefetch else ', nothing read in advance'}")
            for cell, hit, speed in zip(chosen, hits, speeds, strict=True):
                if prefetch:
                    axes.annotate(f"{cell['share']:.0%}", (hit, speed), (4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("experts that were in memory when asked for, %")
    axes.set_ylabel("speed of decoding, all in memory = 1")
    axes.set_ylim(0, max(1.15, axes.get_ylim()[1]))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.supxlabel("At each point: the budget, as a share of all experts", fontsize=8, color="#555555")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.125, 0.25, 0.375, 0.5, 0.75, 1.0], help="of the experts")
    parser.add_argument("--prompts", type=int, default=3, help="that count, of each kind (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="to decode (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", default="results/expert_cache.json", help="the plot lies beside it (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plot = str(Path(args.output).with_suffix(".png"))
    check_plot(plot)
    texts = write_domain_texts(MODELS / "two_domains")
    folder = converted(texts)
    whole, tokenizer = load_model(folder), load_tokenizer(folder)
    result = {"format_version": FORMAT_VERSION, "environment": environment(whole), "settings": {**vars(args), **EXPERTS}}
    result["texts"] = {}
    for kind, given in prompts(tokenizer, texts, args.prompts, args.prompt_tokens).items():
        cells = result["texts"][kind] = []
        for share in args.shares:
            for prefetch in (True, False):
                cells.append(measure(folder, whole, share, prefetch, given, args.tokens))
                print(f"{kind}, {share:.0%} of the experts, prefetch {prefetch}: hit rate {cells[-1]['hit_rate']:.1%}, "
                      f"{1000 * cells[-1]['seconds_per_token']['median']:.1f} ms per token, "
                      f"{cells[-1]['speed']['median']:.2f}x the speed with all in memory", flush=True)  # fmt: skip
    write_report(result, args.output)
    draw(result, plot)


if __name__ == "__main__":
    main()
