import wave

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from modeling_deepseek_r1.tokenization.audio import read_audio, read_sound, resample, spectra


def tone(rate, seconds=0.5, frequency=440.0):
    return np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
def test_a_tone_stays_the_same_at_another_rate(rate):
    result = resample(tone(rate), rate, 16000)
    assert len(result) == 8000 or (rate == 11025 and abs(len(result) - 8000) <= 1)
    np.testing.assert_allclose(result[300:7700], tone(16000)[300:7700], atol=2e-3)


def test_what_the_lower_rate_cannot_hold_is_filtered_out():
    assert np.abs(resample(tone(48000, frequency=20000.0), 48000, 16000)[200:-200]).max() < 1e-2


@pytest.mark.parametrize(("width", "tolerance"), [(1, 2e-2), (2, 1e-4), (3, 1e-6), (4, 1e-6)])
def test_wav_files_of_every_width(width, tolerance, tmp_path):
    samples = np.stack((tone(8000), tone(8000)), 1)
    whole = (samples.astype(np.float64) * (2 ** (8 * width - 1) - 1)).round().astype(np.int64)
    data = (whole + 128).astype(np.uint8).tobytes() if width == 1 else None
    data = data or np.ascontiguousarray(whole.astype("<i8")[..., None].view(np.uint8)[..., :width]).tobytes()
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(width)
        file.setframerate(8000)
        file.writeframes(data)
    read, rate = read_sound(tmp_path / "a.wav")
    assert rate == 8000
    np.testing.assert_allclose(read, tone(8000), atol=tolerance)


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        (np.zeros(0), 16000, "audio 3 is empty"),
        (np.array([0.0, np.nan]), 16000, "audio 3 has nan at sample 1; samples must be finite"),
        (np.array([0.0, 1.0, np.inf]), 16000, "audio 3 has inf at sample 2"),
        (np.zeros((2, 5)), 16000, r"audio 3 has the shape \[2, 5\]; give one channel"),
        (np.zeros(5), None, "audio 3 has no sampling rate"),
        ({"array": np.zeros(5)}, None, "audio 3 has no sampling rate"),
    ],
)
def test_sound_that_cannot_be_read(audio, rate, message):
    with pytest.raises(ValueError, match=message):
        read_audio(audio, "audio 3", 16000, rate)


def test_a_file_that_is_no_sound(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF but nothing else")
    with pytest.raises(ValueError, match="a.wav cannot be decoded"):
        read_audio(tmp_path / "a.wav", "audio 0", 16000, None)


def test_clips_are_as_long_as_they_are():
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    clips = [tone(16000, 0.25), tone(16000, 2.3), tone(16000, 0.01)]
    inputs, times = spectra(clips, extractor, 4)
    assert inputs["input_features"].shape == (1 + 3 + 1, 8, 100)
    assert inputs["input_features_mask"].sum(1).tolist() == [25, 100, 100, 30, 2]
    assert [len(own) for own in times] == [4, 13 + 13 + 4, 1]
    np.testing.assert_allclose(times[0], [0.08, 0.16, 0.24, 0.25])
    assert times[1][12:14] == [1.0, 1.08] and times[1][-1] == 2.3 and times[2] == [0.01]
    alone, _ = spectra(clips[:1], extractor, 4)
    assert (inputs["input_features"][0, :, :25] == alone["input_features"][0]).all()
