import copy

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_deepseek_r1 import DeepseekR1ForCausalLM, DeepseekR1Model
from modeling_deepseek_r1.generation import HierarchicalCandidates
from modeling_deepseek_r1.multimodal.bridge import DeepseekR1Bridge

from ..models import PATTERNS, random_ids
from .models import PLACEHOLDERS, mixed_batch, multimodal_model

ROUTING = {"routing": {**PATTERNS["expert_domains"]["routing"], "num_modalities": 5}}
TEXT = {"expert_domains": ROUTING}
GREEDY = {"do_sample": False, "pad_token_id": 0, "suppress_tokens": list(PLACEHOLDERS.values())}
SOME_PATTERNS = ["mixed", "routed_mixed", "global_mixed", "expert_domains"]


@pytest.fixture(scope="module")
def model():
    return multimodal_model()


def rows_of(batch, row, counts):
    """One row of `mixed_batch`, which has so many images, frames, clips and table rows."""
    kept = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask", "mm_token_times")}
    names = {"pixel_values": 0, "pixel_values_videos": 1, "input_features": 2, "input_features_mask": 2}
    names |= {"row_numeric": 3, "row_categorical": 3, "row_missing": 3}
    return kept | {name: batch[name] for name, kind in names.items() if counts[kind]}


def text_model(model, implementation="sdpa"):
    own = DeepseekR1ForCausalLM._from_config(model.config.text_config, attn_implementation=implementation)
    result = own.model.load_state_dict(model.model.language_model.state_dict(), strict=False)
    assert not result.missing_keys and all(".bridge." in name for name in result.unexpected_keys)
    own.lm_head.load_state_dict(model.lm_head.state_dict())
    return own.eval()


@pytest.mark.parametrize("pattern", SOME_PATTERNS)
def test_text_alone_is_the_text_model_bit_for_bit(pattern):
    model, ids = multimodal_model(pattern, text=TEXT.get(pattern)), random_ids(2, 30, vocab_size=90)
    own = text_model(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, own(ids).logits)
    assert torch.equal(model.generate(ids, **GREEDY, max_new_tokens=5), own.generate(ids, **GREEDY, max_new_tokens=5))


def test_a_closed_bridge_changes_no_bit(model):
    closed, batch = copy.deepcopy(model), mixed_batch()
    for module in closed.modules():
        if isinstance(module, DeepseekR1Bridge):
            torch.nn.init.zeros_(module.gate)
    joined = closed.model.join(**{name: value for name, value in batch.items() if name != "attention_mask"})
    with torch.no_grad():
        logits = closed(**batch).logits
        plain = text_model(closed)(
            inputs_embeds=joined.arguments["inputs_embeds"], attention_mask=batch["attention_mask"]
        ).logits
        assert torch.equal(logits, plain)
        assert not torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("pattern", SOME_PATTERNS)
def test_a_row_gives_the_same_alone_and_in_a_batch(pattern):
    model, batch = multimodal_model(pattern, text=TEXT.get(pattern)), mixed_batch()
    with torch.no_grad():
        together = model(**batch).logits
        for row, counts in enumerate([(2, 0, 1, 0), (0, 2, 0, 1), (0, 0, 0, 0)]):
            alone = model(**rows_of(batch, row, counts)).logits
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row, real], alone[0, real], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", SOME_PATTERNS)
def test_generation_with_a_cache_equals_generation_without(pattern):
    model, batch = multimodal_model(pattern, text=TEXT.get(pattern)), mixed_batch()
    model.config.text_config.chunk_size_feed_forward = 0
    settings = {**GREEDY, "max_new_tokens": 5, "min_new_tokens": 5}
    expected = model.generate(**batch, **settings, use_cache=False)
    assert torch.equal(model.generate(**batch, **settings), expected)
    model.config.text_config.chunk_size_feed_forward = 7
    assert torch.equal(model.generate(**batch, **settings), expected)
    beams = {**settings, "num_beams": 2, "num_return_sequences": 2}
    assert torch.equal(model.generate(**batch, **beams), model.generate(**batch, **beams, use_cache=False))


def test_encoders_run_once_per_generate():
    model, calls = multimodal_model(), []
    for part in (model.model.vision_tower, model.model.audio_tower, model.model.row_encoder, model.model.word_projection):
        part.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**mixed_batch(), **GREEDY, max_new_tokens=6, num_beams=3)
    # Images and frames through the vision tower, sound, rows, and four modalities into the word space.
    assert len(calls) == 2 + 1 + 1 + 4


def test_features_that_are_encoded_before(model):
    batch = mixed_batch()
    with torch.no_grad():
        features = model.model.encode(**batch).items()
    encoded = {modality: BaseModelOutputWithPooling(pooler_output=own[None]) for modality, own in features}
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "mm_token_times")}
    with torch.no_grad():
        assert torch.equal(model(**given, mm_encoder_outputs=encoded).logits, model(**batch).logits)
    expected = model.generate(**batch, **GREEDY, max_new_tokens=6)
    assert torch.equal(model.generate(**given, mm_encoder_outputs=encoded, **GREEDY, max_new_tokens=6), expected)


def with_sound(batch):
    """The batch with sound in its video, whose second frame starts in silence."""
    spans = torch.tensor([[0, 2], [0, 2], [0, 3], [1, 3], [3, 3], [3, 3], [2, 3], [0, 1]])
    sound = {"video_sound_features": torch.randn(1, 8, 19), "video_sound_features_mask": torch.ones(1, 19, dtype=torch.long)}
    return {**batch, **sound, "video_sound_spans": spans}


def test_sound_in_a_video_is_fused_with_its_frames(model):
    batch = with_sound(mixed_batch())
    with torch.no_grad():
        features = model.model.encode(**batch)
        heard = model.model.encode_audio(batch["video_sound_features"], batch["video_sound_features_mask"])
        expected = torch.stack([heard[first:last].mean(0) for first, last in batch["video_sound_spans"].tolist()]).nan_to_num()
        torch.testing.assert_close(features["video_sound"], expected)
        inputs = {name: value for name, value in batch.items() if name != "attention_mask"}
        places = batch["input_ids"] == PLACEHOLDERS["video"]
        fused = model.model.join(**inputs).arguments["inputs_embeds"][places]
        words = model.get_input_embeddings()(batch["input_ids"][places])
        torch.testing.assert_close(fused, model.model.fusion(words, features["video"], expected))
        # Without a mask all frames are real, as here.
        unmasked = model(**{**batch, "video_sound_features_mask": None}).logits
        torch.testing.assert_close(unmasked, model(**batch).logits)
        silent = {**batch, "video_sound_spans": torch.zeros(8, 2, dtype=torch.long)}
        torch.testing.assert_close(model(**silent).logits, model(**mixed_batch()).logits)
    settings = {**GREEDY, "max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2}
    assert torch.equal(model.generate(**batch, **settings), model.generate(**batch, **settings, use_cache=False))
    with pytest.raises(ValueError, match="video_sound was given for 7 features of modality 'video'"):
        model(**{**batch, "video_sound_spans": batch["video_sound_spans"][:7]})
    with pytest.raises(ValueError, match=r"sound in videos .* needs an audio encoder and gates \(fusion\)"):
        multimodal_model(fusion=None)(**batch)


def test_a_conversation_goes_on_from_its_cache(model):
    batch = rows_of(mixed_batch(), 0, (2, 0, 1, 0))
    first = {**batch, "pixel_values": batch["pixel_values"][:1]}
    first |= {name: batch[name][:, :18] for name in ("input_ids", "attention_mask", "mm_token_times")}
    settings = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    answer = model.generate(**first, **settings, use_cache=True)
    ids = torch.cat((answer.sequences, batch["input_ids"][:, 18:]), 1)
    longer = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    longer["mm_token_times"] = torch.nn.functional.pad(first["mm_token_times"], (0, ids.shape[1] - 18), value=-1.0)
    expected = model.generate(**longer, **settings).sequences
    with pytest.raises(ValueError, match="placeholders of modality 'image' .* its inputs give 0 features"):
        ids_alone = {name: longer[name] for name in ("input_ids", "attention_mask")}
        model.generate(**ids_alone, **settings, past_key_values=copy.deepcopy(answer.past_key_values))
    assert torch.equal(model.generate(**longer, **settings, past_key_values=answer.past_key_values).sequences, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "8 placeholders of modality 'image' .* its inputs give 0 features"),
        ({"pixel_values": torch.zeros(3, 3, 28, 28)}, "8 placeholders of modality 'image' .* its inputs give 12 features"),
        ({"input_features_mask": torch.ones(1, 19).tril(-1) + torch.arange(19) // 18}, "3 placeholders .* give 1 feature"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(3, 40, 48)}, "pass input_ids beside other modalities"),
        ({"seq_idx": torch.zeros(3, 40, dtype=torch.long)}, r"packed rows \(seq_idx\) cannot be read with a bridge"),
    ],
)
def test_inputs_that_do_not_fit(model, change, message):
    with pytest.raises(ValueError, match=message):
        model(**{**mixed_batch(), **change})


def test_a_modality_that_the_model_does_not_have():
    model = multimodal_model(vision_config=None)
    assert model.model.vision_tower is None and not any("vision" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="pixel_values were given, but .* no image input: it has text, audio, structured"):
        model(random_ids(1, 5, vocab_size=90), pixel_values=torch.zeros(1, 3, 28, 28))
    with pytest.raises(ValueError, match="pixel_values_videos were given"):
        model.generate(random_ids(1, 5, vocab_size=90), pixel_values_videos=torch.zeros(1, 3, 28, 28))


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    batch = mixed_batch()
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is type(model) and not any(info[name] for name in ("missing_keys", "unexpected_keys"))
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is DeepseekR1Model
    with torch.no_grad():
        states = base(**batch).last_hidden_state
        assert torch.equal(model.lm_head(states), model(**batch).logits)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(**batch).logits.dtype == torch.bfloat16


def test_a_new_model_starts_with_closed_gates():
    torch.manual_seed(0)
    model = multimodal_model().__class__(multimodal_model().config)
    bridges = [module for module in model.modules() if isinstance(module, DeepseekR1Bridge)]
    assert len(bridges) == 2 and all(not bridge.gate.any() and not bridge.resolver.output.weight.any() for bridge in bridges)
    fusion = model.model.fusion
    assert not fusion.output.weight.any() and torch.allclose(fusion.output.bias.sigmoid(), torch.tensor(0.7))
    features = model.model.encode_images(torch.randn(1, 3, 28, 28))
    assert torch.allclose(features.square().mean(-1).sqrt(), torch.tensor(model.config.initializer_range), rtol=1e-3)


def test_other_ways_to_generate(model):
    batch = rows_of(mixed_batch(), 0, (2, 0, 1, 0))
    expected = model.generate(**batch, **GREEDY, max_new_tokens=6)
    assert torch.equal(model.generate(**batch, **GREEDY, max_new_tokens=6, prompt_lookup_num_tokens=3), expected)
    one = HierarchicalCandidates(num_candidates=1, stages=[])
    assert torch.equal(model.generate(**batch, **GREEDY, max_new_tokens=6, custom_generate=one), expected)
    several = HierarchicalCandidates(num_candidates=3, stages=[(2, 1)])
    likeliest = {**GREEDY, "do_sample": True, "top_k": 1}
    assert torch.equal(model.generate(**batch, **likeliest, max_new_tokens=6, custom_generate=several), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_reaches_everything(checkpointing):
    model, batch = multimodal_model("expert_domains", text=ROUTING).train(), mixed_batch()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    output = model(**batch, labels=batch["input_ids"])
    output.loss.backward()
    unused = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    known = ("mask_token", "pooler", "k_proj.bias", "key.bias", "missing", "categories", "layernorm", "experts", "cls_token")
    assert {name for name in unused if not any(part in name for part in known)} == set()
    assert output.consistency.isnan().tolist() == [False, False, True]
    with torch.no_grad():
        plain = model.eval()(**batch, labels=batch["input_ids"]).loss
    expected = plain + 0.3 * output.alignment_loss + model.config.text_config.router_aux_loss_coef * output.aux_loss
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)


def test_consistency_rises_and_tells_matching_pairs_from_others():
    model = multimodal_model(bridge={"layers": [1], "alignment_loss_coef": 1.0}).train()
    ids = random_ids(4, 12, vocab_size=90)
    ids[:, 1:5] = PLACEHOLDERS["image"]
    pictures = torch.randn(4, 3, 28, 28)
    optimizer = torch.optim.AdamW(
        [*model.model.vision_adapter.parameters(), *model.model.word_projection.parameters()], lr=1e-2
    )

    def consistency(order):
        with torch.no_grad():
            return model(ids, pixel_values=pictures[order]).consistency.mean()

    matching, shuffled = torch.arange(4), torch.tensor([1, 2, 3, 0])
    before = consistency(matching)
    for _ in range(30):
        optimizer.zero_grad()
        model(ids, pixel_values=pictures, labels=ids).loss.backward()
        optimizer.step()
    assert consistency(matching) > max(before, consistency(shuffled)) + 0.2


def test_the_modality_of_a_token_moves_its_experts():
    model, batch = multimodal_model("expert_domains", text=ROUTING), mixed_batch()
    batch = rows_of(batch, 0, (2, 0, 1, 0))
    before = model(**batch, output_router_logits=True).router_logits[0].softmax(-1)
    table = model.model.routers[0].domain_gate.modality_bias
    with torch.no_grad():
        table[1, 0] -= 20.0
    after = model(**batch, output_router_logits=True).router_logits[0].softmax(-1)
    image = batch["input_ids"][0] == PLACEHOLDERS["image"]
    first = model.model.routers[0].domain_gate.sizes[0]
    assert (after[image, :first] < 1e-4).all() and torch.equal(after[~image], before[~image])
