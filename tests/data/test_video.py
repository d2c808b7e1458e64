from __future__ import annotations

import gc
import math
import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from av.video.reformatter import Colorspace
from PIL import Image

from lightning_dfd.data import VideoError, check_video, list_clips, read_video, write_video
from lightning_dfd.data.colours import TO_RGB
from lightning_dfd.data.timing import nearest_in_time
from lightning_dfd.data.video import cover_and_crop
from lightning_dfd.toy import world
from lightning_dfd.types import VideoSize

BIKES = VideoSize(frames=12, height=272, width=640)


def decode_all(path, **options):
    """Every frame, uint8 [F, H, W, C], with its exact time: another way through PyAV than read_video's."""
    with av.open(str(path)) as container:
        frames = container.decode(video=0)
        shown = [(frame.pts * frame.time_base, frame.to_ndarray(**TO_RGB, **options)) for frame in frames]
    return [time for time, _ in shown], np.stack([pixels for _, pixels in shown])


def as_clip(frames):
    return torch.from_numpy(frames).permute(3, 0, 1, 2)


@pytest.fixture(scope="module")
def bikes(real_videos):
    return decode_all(real_videos / "bikes.mp4")


@pytest.mark.parametrize("fps", [None, 25, 8, 10, 7.3, 60])
def test_frame_rate_against_a_full_decode(real_videos, bikes, fps):
    times, frames = bikes
    wanted = list(range(12))
    if fps is not None:
        targets = [Fraction(i) / Fraction(fps) for i in range(12)]
        wanted = [min(range(len(times)), key=lambda j: (abs(times[j] - t), j)) for t in targets]
    clip = read_video(real_videos / "bikes.mp4", BIKES, fps)
    assert clip.dtype == torch.uint8
    assert torch.equal(clip, as_clip(frames[wanted]))


@pytest.mark.slow(seconds=2)
def test_frame_rate_of_a_video_with_an_odd_rate_and_of_one_with_sound(real_videos):
    hd = {"src_colorspace": Colorspace.ITU709}  # what a video of 720 lines without a tag has
    for name, fps, options in (("carphone_pristine.mp4", 8, {}), ("bigbuckbunny.mp4", 6, hd)):
        times, frames = decode_all(real_videos / name, **options)
        wanted = [min(range(len(times)), key=lambda j: (abs(times[j] - Fraction(i, fps)), j)) for i in range(9)]
        clip = read_video(real_videos / name, VideoSize(9, *frames.shape[1:3]), fps)
        assert torch.equal(clip, as_clip(frames[wanted]))


def test_nearest_in_time_with_a_variable_frame_rate():
    shown = [(Fraction(ms, 1000), ms) for ms in (0, 30, 200, 210, 500)]
    # at 0, 100, ..., 700 ms: 100 is nearer to 30, 600 and 700 still show the last frame, which lasts 290 ms
    assert list(nearest_in_time(shown, 10.0)) == [0, 30, 200, 210, 500, 500, 500, 500]
    assert list(nearest_in_time(shown, 5.0)) == [0, 200, 500, 500]  # 400 ms; 600 ms
    assert list(nearest_in_time([(Fraction(0), "a")], 10.0, last=Fraction(1, 4))) == ["a", "a", "a"]
    assert list(nearest_in_time([(Fraction(0), "a"), (Fraction(1, 5), "b")], 10.0)) == ["a", "a", "b", "b"]  # a tie


@pytest.mark.parametrize(("height", "width"), [(64, 64), (100, 40), (32, 150), (300, 700), (272, 640)])
def test_resize_and_crop_against_pillow(bikes, height, width):
    frame = bikes[1][3]
    rows, columns = frame.shape[:2]
    scale = max(height / rows, width / columns)
    scaled_height, scaled_width = max(height, round(rows * scale)), max(width, round(columns * scale))
    image = Image.fromarray(frame).resize((scaled_width, scaled_height), Image.Resampling.BILINEAR)
    left, top = (scaled_width - width) // 2, (scaled_height - height) // 2
    reference = np.asarray(image.crop((left, top, left + width, top + height))).astype(int)
    ours = cover_and_crop(torch.from_numpy(frame).permute(2, 0, 1), height, width).permute(1, 2, 0).numpy()
    assert ours.shape == (height, width, 3)
    assert np.abs(ours - reference).max() <= 1  # Pillow works with fixed-point weights


def test_nothing_of_a_read_video_waits_for_the_garbage_collector(make_clip, tmp_path):
    """A decoded frame that lived on into a forked worker would hang it when it is collected there."""
    path = make_clip(tmp_path / "a.mp4")
    gc.collect()
    gc.disable()
    try:
        for size in (VideoSize(5, 16, 24), VideoSize(5, 32, 32)):
            read_video(path, size, None)
            read_video(path, size, 4)
        assert not [one for one in gc.get_objects() if type(one) is av.VideoFrame]
    finally:
        gc.enable()


def test_read_video_resizes_every_frame(real_videos, bikes):
    clip = read_video(real_videos / "bikes.mp4", VideoSize(3, 48, 64), None)
    frames = as_clip(bikes[1][:3])
    assert torch.equal(clip, torch.stack([cover_and_crop(frames[:, i], 48, 64) for i in range(3)], dim=1))


def test_write_then_read(tmp_path, bikes):
    frames = bikes[1][:9]
    write_video(tmp_path / "a.mp4", torch.from_numpy(frames), 12.5)
    write_video(tmp_path / "b.mp4", frames, 12.5)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]
    times, shown = decode_all(tmp_path / "a.mp4")
    assert times == [Fraction(2 * i, 25) for i in range(9)]
    error = shown.astype(float) - frames
    assert 10 * math.log10(255**2 / np.mean(error**2)) > 34  # dB; half of the loss is 4:2:0 colour
    assert abs(error.mean(axis=(0, 1, 2))).max() < 1.6  # no cast: colours are written as they are labelled
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")


@pytest.mark.slow(seconds=7)
def test_another_process_writes_the_same_bytes(tmp_path):
    """glibc fills fresh memory with MALLOC_PERTURB_'s pattern, which brings out an encoder that reads it unwritten."""
    program = (
        "import sys\n"
        "from lightning_dfd.data import write_video\n"
        "from lightning_dfd.toy import world\n"
        "for i, clip in enumerate(world.draw_clips(6, seed=1)[1]):\n"
        "    write_video(f'{sys.argv[1]}/{i}.mp4', clip, 8)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "MALLOC_PERTURB_": "85"})
    for i, clip in enumerate(world.draw_clips(6, seed=1)[1]):
        write_video(tmp_path / "again.mp4", clip, 8)
        assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / f"{i}.mp4").read_bytes()


def test_saturated_colours_survive(tmp_path):
    colours = np.array([[220, 45, 45], [45, 180, 65], [50, 85, 230], [240, 205, 45]], dtype=np.uint8)
    frames = np.broadcast_to(colours.repeat(16, axis=0)[None, None], (3, 32, 64, 3))
    write_video(tmp_path / "a.mp4", frames, 8)
    clip = read_video(tmp_path / "a.mp4", VideoSize(3, 32, 64), None)
    middle = clip[:, 1, 16, 8::16].T.numpy().astype(int)
    assert np.abs(middle - colours).max() <= 4


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((2, 15, 16, 3), np.uint8), 8, "even sides, got 15x16"),
        (np.zeros((2, 16, 16, 3), np.float32), 8, "float32"),
        (np.zeros((2, 3, 16, 16), np.uint8), 8, r"\[2, 3, 16, 16\]; need uint8 \[F, H, W, 3\]"),
        (np.zeros((0, 16, 16, 3), np.uint8), 8, "at least one frame"),
        (np.zeros((2, 16, 16, 3), np.uint8), 0, "fps must be above 0"),
    ],
)
def test_write_refuses(tmp_path, frames, fps, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "a.mp4", frames, fps)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, make_clip, monkeypatch):
    path = make_clip(tmp_path / "a.mp4")
    before = path.read_bytes()

    class Fails:
        @staticmethod
        def from_ndarray(*args, **options):
            raise RuntimeError("full disk")

    monkeypatch.setattr("av.VideoFrame", Fails)
    with pytest.raises(RuntimeError, match="full disk"):
        make_clip(path, shade=90)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def sound_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("read", [read_video, check_video])
def test_broken_files_are_named(tmp_path, real_videos, read):
    whole = (real_videos / "bikes.mp4").read_bytes()
    contents = {
        "noise.mp4": np.random.default_rng(0).bytes(5000),
        "empty.mp4": b"",
        "cut.mp4": whole[: len(whole) // 2],  # its index stood at the end
        "text.mp4": b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.mp4\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    sound_only(tmp_path / "sound.mp4")
    for name in (*contents, "sound.mp4", "missing.mp4"):
        with pytest.raises(VideoError, match=name) as caught:
            read(tmp_path / name, VideoSize(9, 16, 16), None)
        assert "\n" not in str(caught.value)
        if name == "sound.mp4":
            assert "no video stream" in str(caught.value)


def move_index_to_the_front(data):
    """An mp4 with its moov atom first, so that it opens even when its end is missing."""
    atoms, position = [], 0
    while position < len(data):
        size, kind = struct.unpack(">I4s", data[position : position + 8])
        atoms.append((kind, data[position : position + size]))
        position += size
    names = [kind for kind, _ in atoms]
    moov = bytearray(dict(atoms)[b"moov"])
    before = sum(len(atom) for kind, atom in atoms[: names.index(b"moov")] if kind != b"ftyp")
    assert before > 0
    at = moov.find(b"stco")
    (count,) = struct.unpack(">I", moov[at + 8 : at + 12])
    for entry in range(count):
        place = slice(at + 12 + 4 * entry, at + 16 + 4 * entry)
        moov[place] = struct.pack(">I", struct.unpack(">I", moov[place])[0] + len(moov))
    rest = [atom for kind, atom in atoms if kind not in (b"ftyp", b"moov")]
    return b"".join([dict(atoms)[b"ftyp"], bytes(moov), *rest])


def test_a_file_without_its_end_passes_the_check_but_not_the_reading(tmp_path, make_clip):
    rng = np.random.default_rng(0)
    write_video(tmp_path / "a.mp4", rng.integers(0, 255, (9, 64, 64, 3), dtype=np.uint8), 8)
    data = move_index_to_the_front((tmp_path / "a.mp4").read_bytes())
    path = tmp_path / "cut.mp4"
    path.write_bytes(data)
    size = VideoSize(9, 64, 64)
    assert torch.equal(read_video(path, size, None), read_video(tmp_path / "a.mp4", size, None))
    path.write_bytes(data[: int(0.7 * len(data))])
    check_video(path, size, None)
    with pytest.raises(VideoError, match=r"cut\.mp4"):
        read_video(path, size, None)


@pytest.mark.parametrize("read", [read_video, check_video])
def test_too_short_says_how_many_there_are(tmp_path, make_clip, read):
    path = make_clip(tmp_path / "short.mp4", frames=9, fps=8)
    with pytest.raises(VideoError, match=r"short\.mp4: too short, 9 frames where 13 are needed; lower frames"):
        read(path, VideoSize(13, 16, 24), None)
    with pytest.raises(VideoError, match=r"5 frames at 4 .* where 9 are needed; .*raise fps"):
        read(path, VideoSize(9, 16, 24), 4)
    with pytest.raises(VideoError, match="9 frames at 8 frames per second where 10 are needed"):
        read(path, VideoSize(10, 16, 24), 8)
    for frames, fps in ((9, None), (9, 8), (5, 4), (18, 16)):
        read(path, VideoSize(frames, 16, 24), fps)


def test_a_telephone_s_turned_video_stands_upright(tmp_path):
    frames = np.zeros((2, 16, 32, 3), np.uint8)
    frames[:, :, :16] = 230  # bright on the left; turned a quarter clockwise: bright on top
    write_video(tmp_path / "a.mp4", frames, 8)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    at = data.find(b"tkhd") + 4 + 40  # version 0: the matrix stands 40 bytes into the atom
    straight = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    assert data[at : at + 36] == straight
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 16 << 16, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    clip = read_video(tmp_path / "turned.mp4", VideoSize(2, 32, 16), None)
    assert clip[:, :, :12].float().mean() > 200
    assert clip[:, :, 20:].float().mean() < 30


def test_a_gif_and_a_still_are_videos_of_their_length(tmp_path):
    pictures = [Image.new("RGB", (24, 16), (shade, 0, 0)) for shade in (10, 100, 200)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=100)
    clip = read_video(Path(tmp_path / "a.gif"), VideoSize(3, 16, 24), None)
    assert (clip[0, :, 8, 8].int() - torch.tensor([10, 100, 200])).abs().max() <= 3
    check_video(tmp_path / "a.gif", VideoSize(3, 16, 24), None)
    pictures[0].save(tmp_path / "still.gif")
    with pytest.raises(VideoError, match="1 frames where 3"):
        read_video(tmp_path / "still.gif", VideoSize(3, 16, 24), None)


def write_at(path, count, rate, container=None, size=(16, 24), codec="libx264"):
    """A clip of `count` frames, the k-th of brightness k."""
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for number in range(count):
            pixels = np.full((*size, 3), number % 250, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(
    ("rate", "count", "fps", "frames"),
    [
        (24, 144, 8, 49),
        (25, 150, 8, 49),
        (30, 180, 8, 49),
        (Fraction(24000, 1001), 144, 8, 49),
        (Fraction(30000, 1001), 180, 8, 49),
        (24, 120, 16, 81),
        (30, 150, 16, 81),
        (25, 125, 24, 121),
        (60, 300, 24, 121),
        (24, 144, 24, 144),  # at its own rate a clip has its own frames
        (8, 9, 8, 9),
        (16, 80, 16, 80),
    ],
)
def test_whole_seconds_are_whole(tmp_path, suffix, rate, count, fps, frames):
    """6 seconds hold 49 frames at 8 a second: the last one wanted is a part of a step after the last that there is."""
    path = write_at(tmp_path / f"a{suffix}", count, rate)
    check_video(path, VideoSize(frames, 16, 24), fps)
    clip = read_video(path, VideoSize(frames, 16, 24), fps)
    assert abs(int(clip[0, -1, 8, 8]) - (count - 1) % 250) <= 3
    for read in (check_video, read_video):
        with pytest.raises(VideoError, match=f"{frames} frames at .* where {frames + 1} are needed"):
            read(path, VideoSize(frames + 1, 16, 24), fps)


def test_the_last_item_lasts_as_long_as_it_says():
    shown = [(Fraction(0), "a"), (Fraction(1, 5), "b")]
    assert list(nearest_in_time(shown, 10.0, lasts={"b": Fraction(1, 2)}.get)) == ["a", "a", *"bbbbb"]
    assert list(nearest_in_time(shown, 10.0, lasts={"b": None}.get)) == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("suffix", "codec", "rate"),
    [(".mpg", "mpeg2video", 25), (".ts", "libx264", 25), (".mts", "libx264", 25), (".flv", "flv1", 25),
     (".wmv", "wmv2", 25), (".m4v", "libx264", 25), (".ogv", "libvpx", 25), (".mxf", "mpeg2video", 25),
     (".vob", "mpeg2video", 25), (".3gp", "libx264", 25), (".f4v", "libx264", 25), (".nut", "mpeg4", 25),
     (".y4m", "wrapped_avframe", 25), (".h264", "libx264", 25), (".ivf", "libvpx", 25), (".m2v", "mpeg2video", 25)],
)  # fmt: skip
def test_videos_of_other_suffixes_are_read(tmp_path, suffix, codec, rate):
    container = {".mts": "mpegts", ".m4v": "mp4", ".f4v": "mp4", ".m2v": "mpeg2video"}.get(suffix)
    path = write_at(tmp_path / f"a{suffix}", 12, rate, container, (32, 48), codec)
    path.with_suffix(".txt").write_text("a dog")
    (clip,) = list_clips(tmp_path).clips
    check_video(clip.source, VideoSize(9, 32, 48), None)
    assert abs(int(read_video(clip.source, VideoSize(9, 32, 48), None)[0, 8, 16, 24]) - 8) <= 4


def test_the_best_of_several_tracks_is_read(tmp_path):
    """The largest, and never the cover picture, wherever they stand."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        streams = []
        for codec, side in (("mjpeg", 400), ("libx264", 32), ("libx264", 96)):
            stream = out.add_stream(codec, rate=8)
            stream.height, stream.width, stream.pix_fmt = side, side, "yuvj420p" if codec == "mjpeg" else "yuv420p"
            streams.append(stream)
        streams[0].disposition = Disposition.attached_pic
        for number in range(9):
            for stream, shade in zip(streams, (200, 100, 50), strict=True):
                if number and stream is streams[0]:
                    continue
                pixels = np.full((stream.height, stream.width, 3), shade, np.uint8)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in streams:
            out.mux(stream.encode())
    clip = read_video(path, VideoSize(9, 32, 32), None)
    assert (clip.int() - 50).abs().max() <= 3


def test_a_cover_picture_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("mjpeg", rate=1)
        stream.height, stream.width, stream.pix_fmt, stream.disposition = 32, 32, "yuvj420p", Disposition.attached_pic
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode())
    with pytest.raises(VideoError, match="no video stream in it, only 1 pictures"):
        check_video(tmp_path / "a.mp4", VideoSize(1, 32, 32), None)
