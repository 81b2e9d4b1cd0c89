"""The page and its data against the model's own forwards, its functions in a JavaScript engine, and all of it in a browser where
there is one."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from modeling_deepseek_r1.attention.pattern import remote_keys, visible_keys, visible_nodes
from modeling_deepseek_r1.cli import main
from modeling_deepseek_r1.inspection import inspect_text, render_page
from tests.data.tokenizers import make_tokenizer
from tests.models import EXPERT_PATTERNS, PATTERNS, tiny_model

HOSTILE = "</script><b>&amp;\u2028 ünï “¶” <!--\n\n x = 1;" * 2


def inspected(pattern: str, text: str = HOSTILE, **options):
    model = tiny_model(pattern, vocab_size=259)
    return model, inspect_text(model, make_tokenizer(None), text, name=f"<{pattern}>", **options)


class Page(HTMLParser):
    """The data of a page, and the addresses in it."""

    def __init__(self, page: str):
        super().__init__()
        self.data, self.links, self.tags, self._reads = "", [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        self._reads = ("id", "data") in attributes

    def handle_endtag(self, tag):
        self._reads = False

    def handle_data(self, data):
        self.data += data if self._reads else ""


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_data_are_what_the_model_does(pattern):
    model, inspection = inspected(pattern)
    assert "".join(inspection.pieces) == HOSTILE
    assert len(inspection.ids) == len(HOSTILE.encode()) == inspection.text_tokens
    ids = torch.tensor([inspection.ids])
    with torch.no_grad():
        output = model(ids, labels=ids, output_router_logits=False)
        routed = model.model(ids, output_router_logits=True).routed
    assert sum(inspection.losses[1:]) / (len(inspection.ids) - 1) == pytest.approx(output.loss.item(), rel=1e-3)
    assert len(inspection.experts) == len(routed) and bool(routed) == (pattern in EXPERT_PATTERNS)
    for choice, own in zip(inspection.experts, routed, strict=True):
        active = own.top_k_weights != 0
        assert [expert for row in choice.index for expert in row] == own.top_k_index[active].tolist()
        assert sum(choice.weights, []) == pytest.approx(own.top_k_weights[active].tolist(), abs=1e-4)
        assert choice.mean_active == pytest.approx(active.sum(-1).float().mean().item())
        assert sum(choice.shares) == pytest.approx(1, abs=1e-3)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(count for _, count, _ in inspection.sizes) == total
    assert ("experts" in {part for part, *_ in inspection.sizes}) == bool(routed)


def test_parameters_per_token_are_those_of_its_experts():
    model, inspection = inspected("experts")
    experts = [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    inactive = sum(3 * 24 * 48 * (module.num_experts - 2) for module in experts)
    expected = sum(parameter.numel() for parameter in model.parameters()) - inactive
    assert dict((row[0], row[1]) for row in inspection.costs)["parameters per token"] == f"{expected:,}"


def test_the_page_is_whole_and_loads_nothing():
    _, inspection = inspected("expert_domains")
    page = render_page(inspection)
    parsed = Page(page)
    assert json.loads(parsed.data) == json.loads(json.dumps(inspection.to_dict()))
    assert parsed.links == [] and not re.search(r"https?:|@import|url\(", page)
    assert parsed.tags.count("script") == 2 and "b" not in parsed.tags
    assert "<title>&lt;expert_domains&gt;</title>" in page and "{{" not in page.split('id="data"')[0]


@pytest.mark.parametrize("pattern", ["full", "sinks", "routed", "routed_mixed", "global", "global_mixed"])
def test_the_script_shows_the_keys_that_the_definition_names(pattern):
    context = pytest.importorskip("quickjs").Context()
    model, inspection = inspected(pattern)
    script = re.search(r"<script>\n(.*?)</script>", render_page(inspection), re.DOTALL)[1]
    context.eval(script)
    places = torch.arange(len(inspection.ids))[None]
    routing = {}
    for layer in model.model.layers:
        if layer.self_attn.router is not None:
            number = layer.self_attn.layer_idx
            layer.self_attn.router.register_forward_hook(lambda m, a, output, number=number: routing.update({number: output}))
    with torch.no_grad():
        model(torch.tensor([inspection.ids]))
    for sets in inspection.to_dict()["attention"]:
        own, head = model.model.layers[sets["layer"]].self_attn.pattern, sets["heads"] - 1
        masks = {"local": visible_keys(own, places, places)[0], "node": torch.zeros(places.shape[1], places.shape[1]).bool()}
        masks["routed"] = masks["node"]
        if own.global_stride:
            masks["node"] = visible_nodes(own, places, places)[0]
        if own.routed_clusters:
            chosen = routing[sets["layer"]]
            masks["routed"] = remote_keys(own, chosen.query_clusters, chosen.key_clusters, places, places)[0, head]
        context.set("text", json.dumps(sets))
        found = json.loads(
            context.eval(f"const l{sets['layer']} = JSON.parse(text); JSON.stringify([...Array({places.shape[1]}).keys()]"
                         f".map((query) => attentionSet(l{sets['layer']}, {head}, query)))")
        )  # fmt: skip
        for query, shown in enumerate(found):
            assert sorted(shown["sink"] + shown["window"]) == masks["local"][query].nonzero().flatten().tolist()
            for kind in ("node", "routed"):
                assert shown[kind] == masks[kind][query].nonzero().flatten().tolist()
        mean = sum(len(keys) for shown in found for keys in shown.values()) / len(found) + sets["memory"]
        if not own.routed_clusters:
            assert sets["mean_keys"] == pytest.approx(mean, abs=0.051)


def test_the_script_colours_by_domain_and_number():
    context = pytest.importorskip("quickjs").Context()
    _, inspection = inspected("expert_domains")
    context.eval(re.search(r"<script>\n(.*?)</script>", render_page(inspection), re.DOTALL)[1])
    context.set("text", json.dumps(inspection.to_dict()))
    context.eval("const data = JSON.parse(text);")
    domains = json.loads(context.eval("JSON.stringify(data.ids.map((_, token) => domainOfToken(data.experts, token)))"))
    for token, shown in enumerate(domains):
        sums: dict[str, float] = {}
        for choice in inspection.experts:
            names = [domain for domain, count in choice.domains for _ in range(count)]
            for expert, weight in zip(choice.index[token], choice.weights[token], strict=True):
                sums[names[expert]] = sums.get(names[expert], 0) + weight
        assert sums[shown] == pytest.approx(max(sums.values()))
    active = context.eval("activeExperts(data.experts, 5)")
    assert active == pytest.approx(sum(len(choice.index[5]) for choice in inspection.experts) / 3)
    assert len(json.loads(context.eval("JSON.stringify(colouring(data, 'active', data.experts).colours)"))) == len(domains)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
@pytest.mark.parametrize("pattern", ["routed", "expert_domains"])
def test_a_browser_shows_it(pattern, tmp_path):
    _, inspection = inspected(pattern)
    (tmp_path / "page.html").write_text(render_page(inspection), encoding="utf-8")
    address = f"{(tmp_path / 'page.html').as_uri()}#token=30&layer=1"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(["chromium", *options, address], capture_output=True, text=True, timeout=120, check=True)
    shown = re.search(r'id="tokens"[^>]*>(.*?)</div>', done.stdout, re.DOTALL)[1]
    assert len(re.findall(r"data-token=", shown)) == len(inspection.ids)
    assert html.unescape(re.sub(r"<[^>]*>|[·↵]", "", shown)) == HOSTILE.replace("·", "")
    assert len(re.findall(r'class="self"', shown)) == 1 and ('class="routed"' in shown) == (pattern == "routed")
    assert (">domain of its experts<" in done.stdout) == (pattern == "expert_domains")
    assert (">The model has no experts.<" in done.stdout) == (pattern == "routed")


def test_the_command_writes_and_refuses(tmp_path, capsys):
    tiny_model("sinks", vocab_size=259).save_pretrained(tmp_path / "model")
    make_tokenizer(None).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("some words of prose, " * 9)
    command = ["report", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--output"]
    assert main([*command, str(tmp_path / "page.html"), "--tokens", "50"]) == 0
    assert "50 of 189 tokens" in capsys.readouterr().out
    assert len(json.loads(Page((tmp_path / "page.html").read_text(encoding="utf-8")).data)["ids"]) == 50
    (tmp_path / "text.txt").write_text("a")
    for arguments, message in (
        ([*command, str(tmp_path / "none" / "page.html")], "no folder"),
        ([*command, str(tmp_path / "page.html"), "--tokens", "1"], "2 or more"),
        ([*command, str(tmp_path / "page.html")], "the text has 1 tokens"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err


def test_models_of_other_libraries_are_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="this one is 'llama'"):
        inspect_text(LlamaForCausalLM(config), make_tokenizer(None), "some text")
