import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from modeling_deepseek_r1.multimodal.adapter import AudioAdapter, ImageAdapter
from modeling_deepseek_r1.multimodal.alignment import (
    alignment_loss,
    cross_modal_consistency,
    gather_memory,
    visible_features,
    visible_features_reference,
)
from modeling_deepseek_r1.multimodal.bridge import bridge_attention, bridge_attention_reference
from modeling_deepseek_r1.multimodal.fusion import GatedFusion, place_features, place_features_reference
from modeling_deepseek_r1.multimodal.towers import AudioTower, VisionTower

from .models import AUDIO, VISION


def gradients(output, inputs):
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return torch.autograd.grad((output * weights).sum(), inputs)


def test_features_take_their_places_in_order():
    embeddings, features = torch.randn(3, 7, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    places = torch.zeros(3, 7, dtype=torch.bool)
    places[[0, 0, 2, 2, 2], [5, 1, 0, 6, 3]] = True
    fusion = GatedFusion(8, 6, 0.7)
    torch.nn.init.normal_(fusion.output.weight)
    for fuse in (None, fusion):
        ours = place_features(embeddings, features, places, fuse)
        theirs = place_features_reference(embeddings, features, places, fuse)
        torch.testing.assert_close(ours, theirs)
        for mine, expected in zip(
            gradients(ours, (embeddings, features)), gradients(theirs, (embeddings, features)), strict=True
        ):
            torch.testing.assert_close(mine, expected)


def test_aligned_features_share_a_softmax():
    fusion, embeddings = GatedFusion(8, 6, 0.7), torch.randn(4, 8)
    frame, sound = torch.randn(2, 4, 8)
    sound[1] = 0
    torch.nn.init.normal_(fusion.output.weight)
    fused = fusion(embeddings, frame, sound)
    for place in range(4):
        token = embeddings[place]
        parts = [token, *(own[place] for own in (frame, sound) if own[place].any())]
        logits = [torch.zeros(1), *(-fusion.output(torch.nn.functional.silu(fusion.hidden(token + own))) for own in parts[1:])]
        shares = torch.cat(logits).softmax(0)
        torch.testing.assert_close(fused[place], sum(share * own for share, own in zip(shares, parts, strict=True)))
    torch.testing.assert_close(fused[1], fusion(embeddings, frame)[1])


@pytest.mark.parametrize("kinds", [(), (1, 3), (1, 2, 3)])
@pytest.mark.parametrize("features", [1, 6])
def test_attention_over_features(kinds, features, monkeypatch):
    monkeypatch.setattr("modeling_deepseek_r1.multimodal.bridge.BLOCK", 3)
    query, key, value = (
        torch.randn(2, 3, size, 4, dtype=torch.float64, requires_grad=True) for size in (7, features, features)
    )
    visible = torch.rand(2, 7, features) < 0.5
    visible[0, 0], visible[1, 3] = False, True
    modality = torch.randint(1, 4, (2, features))
    modality = torch.where(modality == 2, 1, modality) if kinds == (1, 3) else modality
    arguments = query, key, value, visible, modality, kinds
    ours, theirs = bridge_attention(*arguments), bridge_attention_reference(*arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for mine, expected in zip(gradients(ours, (query, key, value)), gradients(theirs, (query, key, value)), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)
    assert not ours[:, 0, :, 0].any()
    torch.testing.assert_close(ours.sum(0), bridge_attention(*arguments[:5], ()).sum(0), rtol=1e-6, atol=1e-6)


def test_visible_features_of_random_rows():
    for seed in range(30):
        torch.manual_seed(seed)
        modality = torch.randint(1, 4, (3, 9))
        times = torch.where(modality == 1, -1.0, torch.randint(0, 4, (3, 9)).float())
        seen = torch.randint(0, 10, (3, 12)).sort(1).values
        expected = visible_features_reference(seen, modality, times)
        assert torch.equal(visible_features(seen, modality, times), expected)


def test_a_token_does_not_see_what_comes_later_in_its_clip():
    # Two seconds of sound, one frame of the video that belongs to it, then an image and a second video.
    modality = torch.tensor([[3, 3, 2, 1, 2, 2]])
    times = torch.tensor([[1.0, 2.0, 1.0, -1.0, 0.5, 3.0]])
    seen = torch.tensor([[0, 2, 3, 4, 5, 6]])
    visible = visible_features(seen, modality, times)[0].int().tolist()
    assert visible == [
        [0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1],
    ]
    assert visible_features(seen, modality, None)[0, 2].tolist() == [True, True, True, False, False, False]


def test_the_memory_has_the_features_in_the_order_of_their_places():
    places = {1: torch.zeros(2, 6, dtype=torch.bool), 3: torch.zeros(2, 6, dtype=torch.bool)}
    places[1][0, [1, 4]] = places[3][0, 2] = places[3][1, 5] = True
    images, sounds = torch.tensor([[1.0], [2.0]], requires_grad=True), torch.tensor([[30.0], [40.0]])
    times = torch.full((2, 6), -1.0)
    times[0, 2], times[1, 5] = 0.5, 0.7
    memory = gather_memory({1: images, 3: sounds}, places, times)
    assert memory.states.squeeze(-1).tolist() == [[1, 30, 2], [40, 0, 0]]
    assert memory.modality.tolist() == [[1, 3, 1], [3, 0, 0]] and memory.present == (1, 3)
    assert torch.equal(memory.times, torch.tensor([[-1, 0.5, -1], [0.7, -1, -1]]))
    assert memory.seen.tolist() == [[0, 1, 2, 2, 3, 3], [0, 0, 0, 0, 0, 1]]
    assert memory.visible(9, aligned=True)[:, 8].tolist() == [[True, True, True], [True, False, False]]
    assert memory.repeat(2).shift(5).visible(1, aligned=False).shape == (4, 1, 3)
    assert gradients(memory.states, images)[0].abs().sum() > 0


def test_consistency_and_alignment_of_pairs():
    text = torch.eye(4, 8)
    assert torch.equal(cross_modal_consistency(text, 2 * text), torch.ones(4))
    assert cross_modal_consistency(text, text * torch.tensor([[1.0], [0], [1], [1]])).isnan().tolist() == [
        False,
        True,
        False,
        False,
    ]
    matching, shuffled = alignment_loss(text, text, 0.1), alignment_loss(text, text.roll(1, 0), 0.1)
    assert matching < 0.01 and shuffled > 9
    assert alignment_loss(text[:1], text[:1], 0.1) == 0


def test_a_shorter_clip_costs_less_and_hears_the_same():
    tower = AudioTower(AUDIO).eval()
    spectra = torch.randn(3, 8, 60)
    with torch.no_grad():
        torch.testing.assert_close(tower(spectra, torch.tensor([60] * 3)), tower.encoder(spectra).last_hidden_state)
        batch = tower(spectra[..., :31], torch.tensor([31, 18, 5]))
        for clip, length in enumerate((31, 18, 5)):
            alone = tower(spectra[clip : clip + 1, :, :length], torch.tensor([length]))
            torch.testing.assert_close(batch[clip : clip + 1, : alone.shape[1]], alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="have 61 frames; the audio encoder reads at most 60"):
        tower(torch.randn(1, 8, 61), torch.tensor([61]))


def test_one_second_costs_at_most_a_fifth_of_thirty():
    config = WhisperConfig(d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64)
    tower, original = AudioTower(config), WhisperEncoder(config)
    costs = []
    for run in (lambda: tower(torch.randn(1, 80, 100), torch.tensor([100])), lambda: original(torch.randn(1, 80, 3000))):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        costs.append(counter.get_total_flops())
    assert 0 < costs[0] <= costs[1] / 5


def test_a_clip_gives_as_many_features_as_its_length_promises():
    adapter = AudioAdapter(6, 8, 4, 1e-6)
    features, lengths = torch.randn(3, 10, 6), torch.tensor([10, 3, 4])
    output = adapter(features, lengths)
    assert output.shape == (3 + 1 + 1, 8)
    torch.testing.assert_close(output[3:4], adapter(features[1:2, :3], torch.tensor([3])))


@pytest.mark.parametrize("vision", VISION)
def test_patches_of_an_image(vision):
    tower = VisionTower(VISION[vision]).eval()
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        grid = tower(images)
        states = tower.encoder(images).last_hidden_state
    assert grid.shape == (2, 24, 4, 4)
    torch.testing.assert_close(grid[:, :, 1, 2], states[:, states.shape[1] - 16 + 6])
    assert ImageAdapter(24, 8, 3, 1e-6)(grid).shape == (2, 4, 8)
