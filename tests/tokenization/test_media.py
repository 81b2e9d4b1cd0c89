import av
import numpy as np
import pytest

from modeling_deepseek_r1.tokenization.audio import read_audio
from modeling_deepseek_r1.tokenization.images import read_video
from modeling_deepseek_r1.tokenization.media import sound_of_video


def write_video(path, brightness, rate=4, samples=None):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        sound = container.add_stream("pcm_s16le", rate=16000, layout="mono") if samples is not None else None
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for value in brightness:
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), value, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            frame.sample_rate = 16000
            for part in (frame, None):
                container.mux(sound.encode(part))
    return path


def write_sound(path, codec, samples, rate):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack((samples, samples)), format="s16p", layout="stereo")
        frame.sample_rate = rate
        for part in (*av.AudioResampler(format=stream.format, layout="stereo", rate=rate).resample(frame), None):
            container.mux(stream.encode(part))
    return path


@pytest.mark.parametrize(("most", "times"), [(None, [0.0, 0.25, 0.5, 0.75, 1.0]), (3, [0.0, 0.5, 1.0]), (9, None)])
def test_frames_of_a_file(most, times, tmp_path):
    video = read_video(write_video(tmp_path / "a.mp4", [0, 60, 120, 180, 240]), "video 0", most)
    assert video.timestamps == (times or [0.0, 0.25, 0.5, 0.75, 1.0])
    assert [frame.size for frame in video.frames] == [(32, 16)] * len(video.timestamps)
    np.testing.assert_allclose([np.asarray(frame).mean() for frame in video.frames], 240 * np.array(video.timestamps), atol=12)


@pytest.mark.parametrize(("name", "codec"), [("a.flac", "flac"), ("a.wav", "pcm_f32le")])
def test_sound_that_is_no_pcm_wav(name, codec, tmp_path):
    samples = (10000 * np.sin(np.arange(8000) / 10)).astype(np.int16)
    read = read_audio(write_sound(tmp_path / name, codec, samples, 16000), "audio 0", 16000, None)
    np.testing.assert_allclose(read, samples / 2.0**15, atol=1e-3)


def test_sound_in_a_file_of_a_video(tmp_path):
    samples = (10000 * np.sin(np.arange(16000) / 10)).astype(np.int16)
    path = write_video(tmp_path / "a.mkv", [0, 60, 120, 180], samples=samples)
    np.testing.assert_allclose(read_audio(sound_of_video(path), "sound", 16000, None), samples / 2.0**15, atol=1e-3)
    assert sound_of_video(write_video(tmp_path / "b.mkv", [0, 60])) is None
    assert sound_of_video(([0], [0.0])) is None


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no film")
    with pytest.raises(ValueError, match="video 0: .*a.mp4 cannot be decoded"):
        read_video(tmp_path / "a.mp4", "video 0", None)
    with pytest.raises(ValueError, match="video 0: http.* is not a file"):
        read_video("http://127.0.0.1:9/a.mp4", "video 0", None)
    sound = write_sound(tmp_path / "a.flac", "flac", np.zeros(4000, np.int16), 16000)
    with pytest.raises(ValueError, match="video 0: .*a.flac has no video stream"):
        read_video(sound, "video 0", None)
    with pytest.raises(ValueError, match="audio 0: .*a.wav is not a file"):
        read_audio(tmp_path / "a.wav", "audio 0", 16000, None)
