"""Videos of known sRGB colours, in every kind of video, are read as these colours."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from lightning_dfd.data import VideoDataModule, VideoError, check_video, read_video
from lightning_dfd.data.video import glance, look
from lightning_dfd.types import VideoSize

BT601, BT709, BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)  # what red and blue contribute to Y'
SIZE = VideoSize(2, 64, 96)
# From linear BT.709, as printed in ITU-R BT.2087 and, for Display P3, in Apple's and the W3C's documents.
TO_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
TO_P3 = np.array([[0.8225, 0.1774, 0.0], [0.0332, 0.9669, 0.0], [0.0171, 0.0724, 0.9108]])


BLOCKS = np.array([(1, 1, 1), (1, 0, 0), (0, 0, 1), (0.5, 0.5, 0.5), (0.2, 0.6, 0.3), (0.9, 0.6, 0.5)])


def write_tagged(
    path: Path,
    signal: np.ndarray,
    matrix: tuple[float, float],
    tags: tuple[int, int, int],
    bits: int = 8,
    full: bool = False,
    height: int = 64,
    width: int = 96,
) -> Path:
    """Two frames of blocks side by side, of non-linear R'G'B' [blocks, 3].

    Args:
        matrix: what red and blue contribute to Y'.
        tags: FFmpeg's numbers of the matrix, the primaries and the transfer curve, 2 for none.
        bits: 8 or 10.
        full: range of the numbers.
    """
    red, blue = matrix
    luma = signal @ (red, 1 - red - blue, blue)
    chroma = (signal[:, 2] - luma) / (2 - 2 * blue), (signal[:, 0] - luma) / (2 - 2 * red)
    scale, top, middle = 2 ** (bits - 8), 2**bits - 1, 2 ** (bits - 1)
    rows = [top * luma, *(middle + top * value for value in chroma)]
    if not full:
        rows = [scale * (16 + 219 * luma), *(scale * (128 + 224 * value) for value in chroma)]
    kind = np.uint8 if bits == 8 else np.uint16
    planes = [
        np.repeat(np.round(values).clip(0, top).astype(kind)[None], side // len(values), 1).repeat(high, 0)
        for values, side, high in zip(
            rows, (width, width // 2, width // 2), (height, height // 2, height // 2), strict=True
        )
    ]
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p" if bits == 8 else "yuv420p10le"
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc = tags
        context.color_range = 2 if full else 1
        for number in range(2):
            frame = av.VideoFrame(width, height, stream.pix_fmt)
            for plane, values in zip(frame.planes, planes, strict=True):
                padded = np.zeros((len(values), plane.line_size // kind().itemsize), kind)
                padded[:, : values.shape[1]] = values
                plane.update(padded.tobytes())
            frame.pts, frame.time_base = number, Fraction(1, 8)
            frame.colorspace, frame.color_range = tags[0], context.color_range
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def light(code: np.ndarray) -> np.ndarray:
    """sRGB's curve."""
    return np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)


def code(light: np.ndarray) -> np.ndarray:
    """Its inverse."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 0) ** (1 / 2.4) - 0.055)


def pq(nits: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084."""
    power = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(nits: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100's inverse OOTF for 1000 cd/m2, and the OETF."""
    shown = nits / 1000
    scene = shown * (np.maximum(shown @ (0.2627, 0.678, 0.0593), 1e-9) ** (1 / 1.2 - 1))[:, None]
    high = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)


def blocks(path: Any, fps: float | None = None) -> np.ndarray:
    """The middle of every block of the second frame."""
    return read_video(path, SIZE, fps)[:, 1, 16, 8::16].T.numpy().astype(int)


def rolled_off(colours: np.ndarray) -> np.ndarray:
    """What HDR of reference white becomes: exact up to 0.8 of its light, white 0.9."""
    linear = light(colours)
    most = linear.max(axis=1, keepdims=True)
    over = np.maximum(most - 0.8, 0) / 0.2
    return 255 * code(linear * np.where(most > 0.8, (0.8 + 0.2 * over / (1 + over)) / most, 1))


@pytest.mark.parametrize(
    ("signal", "matrix", "tags", "options"),
    [
        (BLOCKS, BT709, (1, 1, 1), {}),
        (BLOCKS, BT709, (1, 1, 1), {"full": True}),
        (BLOCKS, BT709, (1, 1, 1), {"bits": 10}),
        (BLOCKS, BT709, (2, 1, 1), {}),
        (BLOCKS, BT601, (6, 6, 6), {}),
        (BLOCKS, BT601, (5, 5, 6), {"full": True}),
        (BLOCKS, BT601, (2, 2, 2), {}),
        (code(light(BLOCKS) @ TO_2020.T), BT2020, (9, 9, 14), {"bits": 10}),
        (code(light(BLOCKS) @ TO_2020.T), BT2020, (9, 9, 1), {"bits": 10, "full": True}),
        (code(light(BLOCKS) @ TO_2020.T), BT2020, (2, 9, 14), {"bits": 10}),
        (code(light(BLOCKS) @ TO_P3.T), BT709, (1, 12, 13), {}),
        (code(light(BLOCKS) @ TO_P3.T), BT709, (1, 12, 1), {"full": True}),
    ],
    ids=["709", "709 full", "709 10", "709 by primaries", "601", "601 full", "SD", "2020", "2020 full",
         "2020 by primaries", "P3", "P3 full"],
)  # fmt: skip
def test_standard_video(tmp_path, signal, matrix, tags, options):
    path = write_tagged(tmp_path / "a.mp4", signal, matrix, tags, **options)
    assert np.abs(blocks(path) - 255 * BLOCKS).max() <= 3


@pytest.mark.parametrize(
    ("curve", "tags", "options"),
    [
        (pq, (9, 9, 16), {}),
        (pq, (9, 9, 16), {"full": True}),
        (pq, (2, 2, 16), {}),
        (hlg, (9, 9, 18), {}),
        (hlg, (2, 2, 18), {}),
    ],
    ids=["PQ", "PQ full", "PQ by curve", "HLG", "HLG by curve"],
)
def test_hdr_is_tone_mapped(tmp_path, curve, tags, options):
    """Light of 203 cd/m2 is white."""
    signal = curve(203 * (light(BLOCKS) @ TO_2020.T))
    got = blocks(write_tagged(tmp_path / "a.mp4", signal, BT2020, tags, bits=10, **options))
    assert np.abs(got - rolled_off(BLOCKS)).max() <= 4
    assert got[0].min() > 240
    assert np.abs(got[3] - 127.5).max() <= 2


def test_highlights_keep_their_order_and_hue(tmp_path):
    nits = np.array([100.0, 203, 400, 1000, 4000, 10000])
    grey = blocks(write_tagged(tmp_path / "a.mp4", pq(np.repeat(nits[:, None], 3, 1)), BT2020, (9, 9, 16), bits=10))
    assert (np.diff(grey[:4, 1]) > 0).all()
    assert grey[3].min() >= 252
    orange = nits[:, None] * (light(np.array([1.0, 0.6, 0.3])) @ TO_2020.T)
    seen = light(blocks(write_tagged(tmp_path / "b.mp4", pq(orange), BT2020, (9, 9, 16), bits=10)) / 255)
    assert np.abs(seen[:, 1] / seen[:, 0] - light(np.array(0.6))).max() < 0.02


@pytest.mark.parametrize(("height", "width"), [(720, 1280), (1280, 720), (540, 1296)])
def test_hd_without_a_tag_is_bt709_and_said_once(tmp_path, height, width):
    size = VideoSize(2, 32, 96)
    for name in "ab":
        path = write_tagged(tmp_path / f"{name}.mp4", BLOCKS, BT709, (2, 2, 2), height=height, width=width)
        path.with_suffix(".txt").write_text("x")
    seen = read_video(path, VideoSize(2, height, width), None)[:, 1, height // 2, width // 12 :: width // 6].T.numpy()
    assert np.abs(seen.astype(int) - 255 * BLOCKS).max() <= 3
    assert look(path, (size,), None).guessed_colours
    assert glance(path).guessed_colours
    tagged = write_tagged(tmp_path / "tagged.mov", BLOCKS, BT709, (1, 1, 1), height=height, width=width)
    assert not look(tagged, (size,), None).guessed_colours
    assert not glance(tagged).guessed_colours
    tagged.unlink()
    with pytest.warns(UserWarning, match="2 HD videos have no colour tag and are read as BT.709") as caught:
        VideoDataModule(str(tmp_path), None, 2, 32, 96).setup("fit")
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        ((1, 1, 9), "its transfer curve is logarithmic"),
        ((1, 1, 8), "its transfer curve is linear"),
        ((8, 1, 1), "its colours are YCgCo"),
        ((1, 10, 1), "its primaries are CIE XYZ"),
    ],
)
def test_other_colours_are_left_out_by_name(tmp_path, tags, said):
    path = write_tagged(tmp_path / "a.mp4", BLOCKS, BT709, tags)
    for read in (read_video, check_video):
        with pytest.raises(VideoError, match=rf"a\.mp4: {said}.*convert it to BT\.709$"):
            read(path, SIZE, None)


def test_dolby_vision_without_a_base_is_left_out(tmp_path):
    path = write_tagged(tmp_path / "a.mp4", BLOCKS, BT2020, (2, 2, 2), bits=10)
    content = path.read_bytes()
    assert content.count(b"avc1") == 2  # brand and codec
    path.write_bytes(content.replace(b"avc1", b"dvav"))
    with pytest.raises(VideoError, match="Dolby Vision without an HDR10 or HLG base"):
        check_video(path, SIZE, None)
    hdr = write_tagged(tmp_path / "b.mp4", pq(203 * light(BLOCKS) @ TO_2020.T), BT2020, (9, 9, 16), bits=10)
    hdr.write_bytes(hdr.read_bytes().replace(b"avc1", b"dvav"))  # with a base that others can show
    check_video(hdr, SIZE, None)
