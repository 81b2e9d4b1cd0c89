import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, BitImageProcessor, WhisperFeatureExtractor

from modeling_deepseek_r1 import DeepseekR1Processor
from modeling_deepseek_r1.tokenization import RowSchema, Video
from modeling_deepseek_r1.tokenization.images import tiles

from ..data.tokenizers import make_tokenizer
from ..multimodal.models import PLACEHOLDERS, multimodal_config

ROWS = [{"age": 30, "job": "cook", "sex": "f"}, {"age": 50.0, "job": "smith"}, {"age": None, "job": "baker", "sex": "m"}]
PICTURE = np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3)
SOUND = np.sin(np.arange(2400) / 10).astype(np.float32)
VIDEO = {"frames": [PICTURE, PICTURE + 1], "timestamps": [0.0, 1.5]}


def make_processor(**fields):
    tokenizer = make_tokenizer()
    DeepseekR1Processor.add_placeholders(tokenizer, list(PLACEHOLDERS))
    values = dict(
        image_processor=BitImageProcessor(size={"height": 28, "width": 28}, do_center_crop=False),
        feature_extractor=WhisperFeatureExtractor(feature_size=8),
        row_schema=RowSchema.fit(ROWS),
        patch_size=7,
        vision_downsampling=2,
    )
    return DeepseekR1Processor(tokenizer, **{**values, **fields})


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def count(processor, inputs, modality):
    return int((inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(f"<|{modality}|>")).sum())


def test_placeholders_become_as_many_as_there_are_features(processor):
    texts = ["see <|image|> and <|video|>", "hear <|audio|><|image|> of <|row|>", "plain"]
    inputs = processor(
        text=texts, images=[PICTURE, Image.fromarray(PICTURE)], videos=[VIDEO], audio=[SOUND], sampling_rate=8000, rows=ROWS[:1]
    )
    assert [count(processor, inputs, kind) for kind in ("image", "video", "audio", "row")] == [8, 8, 4, 3]
    assert {name: list(inputs[name].shape) for name in inputs if name.startswith(("pixel", "input_f", "row"))} == {
        "pixel_values": [2, 3, 28, 28],
        "pixel_values_videos": [2, 3, 28, 28],
        "input_features": [1, 8, 30],
        "input_features_mask": [1, 30],
        "row_numeric": [1, 1],
        "row_categorical": [1, 2],
        "row_missing": [1, 3],
    }
    types, times = inputs["mm_token_type_ids"], inputs["mm_token_times"]
    assert [int((types == kind).sum()) for kind in range(1, 5)] == [8, 8, 4, 3]
    assert times[types == 2].tolist() == [0.0] * 4 + [1.5] * 4
    assert torch.allclose(times[types == 3], torch.tensor([0.08, 0.16, 0.24, 0.3]))
    assert (times[(types != 2) & (types != 3)] == -1).all()
    assert set(inputs) <= set(processor.model_input_names)


def test_the_model_takes_what_the_processor_makes(processor):
    from modeling_deepseek_r1 import DeepseekR1ForConditionalGeneration

    ids = {f"{kind}_token_id": processor.tokenizer.convert_tokens_to_ids(text) for kind, text in (
        ("image", "<|image|>"), ("video", "<|video|>"), ("audio", "<|audio|>"), ("structured", "<|row|>"),
    )}  # fmt: skip
    config = multimodal_config(text={"vocab_size": len(processor.tokenizer)}, structured_config={"num_numeric": 1, "categories": [3, 2]}, **ids)  # fmt: skip
    model = DeepseekR1ForConditionalGeneration(config).eval()
    clip = {"array": np.concatenate([SOUND] * 2), "sampling_rate": 8000}
    inputs = processor(
        text=["<|image|> <|audio|>", "<|video|> <|row|>"], images=PICTURE, videos=VIDEO, audio=clip, rows=ROWS[2]
    )
    assert model(**inputs, labels=inputs["input_ids"]).loss.isfinite()
    tokens = model.generate(**inputs, max_new_tokens=3, pad_token_id=0, suppress_tokens=list(ids.values()))
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3 or tokens.shape[1] > inputs["input_ids"].shape[1]


def test_conversations(processor, tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    content = [
        {"type": "text", "text": "Look:"},
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "image_url", "image_url": {"url": str(tmp_path / "a.png")}},
        {"type": "video", "video": [PICTURE], "timestamps": [2.0]},
        {"type": "audio", "audio": SOUND, "sampling_rate": 16000},
        {"type": "row", "row": ROWS[0]},
    ]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "So?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\nLook:<|image|><|image|><|video|><|audio|><|row|><|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = processor.apply_chat_template([messages, messages[2:]], tokenize=True, return_dict=True)
    assert [count(processor, inputs, kind) for kind in ("image", "video", "audio", "row")] == [8, 4, 2, 3]
    assert inputs["input_ids"].shape[0] == 2 and not inputs["attention_mask"].all()
    ids = processor.apply_chat_template(messages[2:], tokenize=True)
    assert torch.equal(ids, processor(text=processor.apply_chat_template(messages[2:]))["input_ids"])
    with pytest.raises(ValueError, match="video 0: film.mp4 is not a file"):
        film = [{"role": "user", "content": [{"type": "video", "path": "film.mp4"}]}]
        processor.apply_chat_template(film, tokenize=True)
    with pytest.raises(ValueError, match="a block of type 'smell'; known are"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "smell"}]}])
    with pytest.raises(ValueError, match="a block of type 'image' has no 'image', 'path' or 'url'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])


def test_save_and_load(tmp_path, processor):
    multimodal_config().save_pretrained(tmp_path)
    for own in (processor, make_processor(image_processor=None, row_schema=None, audio_downsampling=2)):
        own.save_pretrained(tmp_path)
        loaded = AutoProcessor.from_pretrained(tmp_path)
        assert type(loaded) is DeepseekR1Processor and loaded.to_dict() == own.to_dict()
        audio = {"text": "a <|audio|>", "audio": SOUND, "sampling_rate": 22050}
        ours, theirs = own(**audio), loaded(**audio)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert loaded.chat_template == own.chat_template
    assert loaded.image_processor is None and "pixel_values" not in loaded.model_input_names


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text": "<|image|> <|image|>", "images": [PICTURE]}, "2 placeholders <|image|> but 1 inputs of modality 'image'"),
        ({"text": "no place", "images": [PICTURE]}, "0 placeholders <|image|> but 1 inputs"),
        ({"text": "<|audio|>"}, "1 placeholders <|audio|> but 0 inputs of modality 'audio'"),
        ({"text": ["<|image|><|image|>", ""], "images": [[PICTURE], [PICTURE]]}, "text 0 has 2 placeholders .* but 1 inputs"),
        ({"images": PICTURE}, "there is no text"),
        ({"text": "<|image|>", "images": "nowhere.png"}, r"image 0 \(nowhere.png\) cannot be read"),
        ({"text": "<|image|>", "images": PICTURE.astype(np.float32)}, "image 0 .* pixels must be uint8"),
        ({"text": "<|image|>", "images": PICTURE[..., :2]}, r"image 0 .*shape \[30, 40, 2\]"),
        ({"text": "<|video|>", "videos": {"frames": [PICTURE]}}, "video 0 has 1 frames and 0 timestamps"),
        ({"text": "<|video|>", "videos": [[PICTURE]]}, "video 0 is a ndarray without timestamps"),
        ({"text": "<|video|>", "videos": Video([PICTURE] * 2, [1.0, 0.5])}, "must be seconds from 0 on that do not fall"),
        ({"text": "<|video|>", "videos": Video([], [])}, "video 0 has no frames"),
        ({"text": "<|audio|>", "audio": SOUND}, "audio 0 has no sampling rate"),
        ({"text": "<|row|>", "rows": {"job": "pilot"}}, "row 0: field 'job' has the category 'pilot'; known are .*baker"),
        ({"text": "<|row|>", "rows": {"weight": 1}}, "row 0 has the field 'weight'; the schema has"),
        ({"text": "<|row|>", "rows": {"age": "old"}}, "row 0: field 'age' has the value 'old'; it must be a finite number"),
        ({"text": "<|image|> x", "images": PICTURE, "truncation": True, "max_length": 2}, "2 placeholders .* give 4 features; was the"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit(processor, inputs, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        processor(**inputs)


def test_a_damaged_image(processor, tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"image 1 \(.*b.png\) cannot be read"):
        processor(text="<|image|><|image|>", images=[str(tmp_path / "a.png"), str(tmp_path / "b.png")])


def test_a_part_that_is_absent():
    with pytest.raises(ValueError, match="1 inputs of modality 'audio' were given, but this processor has no part for them"):
        make_processor(feature_extractor=None)(text="<|audio|>", audio=SOUND, sampling_rate=8000)


def test_large_images_are_also_seen_in_parts():
    image = Image.fromarray(np.repeat(np.repeat(PICTURE, 3, 0), 3, 1))
    parts = tiles(image, 28, 6)
    assert [part.size for part in parts] == [(120, 90), *[(40, 45)] * 6]
    assert np.array_equal(np.asarray(parts[4]), np.asarray(image)[45:, :40])
    assert len(tiles(image, 200, 6)) == 1 and len(tiles(image, 28, 1)) == 1
    processor = make_processor(max_tiles=6)
    inputs = processor(text="<|image|><|image|>", images=[image, image.resize((20, 20))])
    assert inputs["pixel_values"].shape[0] == 7 + 1 and count(processor, inputs, "image") == 8 * 4


def test_a_long_video_is_read_at_some_frames():
    frames = [PICTURE + number for number in range(9)]
    inputs = make_processor(max_frames=3)(text="<|video|>", videos={"frames": frames, "timestamps": list(range(9))})
    assert inputs["mm_token_times"].unique().tolist() == [0.0, 4.0, 8.0]


def test_frames_and_what_sounds_up_to_them():
    # A feature of sound is 80 ms; 0.3 s have four, which end at 0.08, 0.16, 0.24 and 0.3.
    sounding = {"frames": [PICTURE] * 3, "timestamps": [0.0, 0.2, 0.25], "audio": {"array": SOUND, "sampling_rate": 8000}}
    inputs = make_processor(use_audio_in_video=True)(
        text=["<|video|>", "<|video|> <|video|>"], videos=[VIDEO, sounding, sounding]
    )
    assert inputs["video_sound_features"].shape[:2] == (2, 8)
    spans = [[0, 0], [0, 2], [2, 4], [4, 4], [4, 6], [6, 8]]
    assert inputs["video_sound_spans"].tolist() == [[0, 0]] * 8 + [span for span in spans for _ in range(4)]
    assert not {"video_sound_spans"} & set(make_processor()(text="<|video|>", videos=sounding))
    with pytest.raises(ValueError, match="needs a feature extractor of sound"):
        make_processor(use_audio_in_video=True, feature_extractor=None)(text="<|video|>", videos=sounding)
    with pytest.raises(ValueError, match="sound of video 0 has nan at sample 3"):
        sounding["audio"] = {"array": np.where(np.arange(2400) == 3, np.nan, SOUND), "sampling_rate": 8000}
        make_processor(use_audio_in_video=True)(text="<|video|>", videos=sounding)


def test_a_schema_knows_numbers_categories_and_what_is_missing():
    schema = RowSchema.fit([*ROWS, {"age": float("nan"), "sex": True}])
    assert schema.fields == ["age", "job", "sex"] and schema.numeric == [["age", 40.0, 10.0]]
    encoded = schema.encode([{"age": 55, "job": "smith"}, {"sex": True}])
    assert encoded["row_numeric"].tolist() == [[1.5], [0.0]]
    assert encoded["row_missing"].tolist() == [[0, 0, 1], [1, 1, 0]]
    assert encoded["row_categorical"][0, 0] == schema.categorical[0][1].index("smith")
    with pytest.raises(ValueError, match="field 'x' has no value in any of the 1 rows"):
        RowSchema.fit([{"x": None}])
