"""The colours of decoded frames, whatever the file's kind of video, as 8-bit sRGB.

Standard video with the primaries of BT.709 or close to them (BT.601) is taken as stored: its R'G'B' is what a display
shows. Wider gamuts (BT.2020, P3) are brought into that of BT.709 in linear light; what lies outside is clipped. HDR is
tone-mapped first:

1. PQ (SMPTE ST 2084) gives light in cd/m2. HLG (ARIB STD-B67) gives that of a display of 1000 cd/m2 with a system
   gamma of 1.2, as ITU-R BT.2100 has it.
2. Reference white, 203 cd/m2 (ITU-R BT.2408), becomes 1; the gamut becomes BT.709's.
3. Per pixel, with m the largest of R, G and B: up to 0.8 nothing changes; above, m becomes 0.8 + 0.2 u / (1 + u) with
   u = (m - 0.8) / 0.2, and the colour keeps its hue. So reference white becomes 0.9 (243 of 255), 1000 cd/m2 254.

Axis legend: C = 3 colour channels, H height, W width.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, cast

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation
from numpy.typing import NDArray

# FFmpeg's numbers: AVColorSpace, AVColorPrimaries and AVColorTransferCharacteristic
BT709, UNKNOWN, RESERVED, BT2020 = 1, 2, 3, 9
MATRICES = {0: "RGB", BT709: "BT.709", 4: "FCC", 5: "BT.601", 6: "BT.601", 7: "SMPTE 240M", BT2020: "BT.2020"}
OTHER_MATRICES = {8: "YCgCo", 10: "BT.2020 with constant luminance", 11: "YDzDx", 14: "ICtCp", 15: "IPT-C2"}
PQ, HLG = 16, 18
OTHER_CURVES = {8: "linear", 9: "logarithmic", 10: "logarithmic", 17: "DCI"}
CHROMATICITIES = {  # x and y of red, green and blue; white is D65
    BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # P3 in cinemas; its own white becomes D65
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # Display P3
}
D65 = (0.3127, 0.3290)
WHITE = 203.0  # cd/m2
HLG_PEAK, HLG_GAMMA = 1000.0, 1.2
KNEE = 0.8
ROWS = 32
DOLBY_TAGS = ("dvh1", "dvhe", "dva1", "dvav", "dav1")

Pixels = NDArray[np.uint8]

# FFmpeg's fast conversion to RGB rounds down, which darkens by more than one level of 255 on average. PyAV before
# 18 (all there is for Python 3.10) cannot be asked for the exact one.
TO_RGB: dict[str, Any] = {"format": "rgb24"}
if hasattr(Interpolation, "ACCURATE_RND"):
    TO_RGB["interpolation"] = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


class Colours(NamedTuple):
    """How a frame's numbers are meant, in FFmpeg's numbers.

    Attributes:
        matrix: of Y'CbCr; UNKNOWN for FFmpeg's own choice, BT.601.
        primaries: those of a wider gamut than BT.709's, else BT709.
        curve: PQ, HLG, or UNKNOWN for any of standard video.
        guessed: whether the matrix is BT.709's because of the picture's size alone.
    """

    matrix: int
    primaries: int
    curve: int
    guessed: bool


def colours_of(frame: av.VideoFrame | av.VideoCodecContext) -> Colours:
    """From a frame's tags, or a stream's; where they are missing, from those that are there, or from its size."""
    matrix, primaries, curve = frame.colorspace, frame.color_primaries, frame.color_trc
    hdr = curve in (PQ, HLG)
    is_rgb = _has_no_matrix(frame)
    guessed = False
    if matrix in (UNKNOWN, RESERVED) or (matrix == 0 and not is_rgb):
        if primaries == BT2020 or hdr:
            matrix = BT2020
        elif primaries == BT709:
            matrix = BT709
        elif primaries not in (4, 5, 6, 7) and (frame.width >= 1280 or frame.height >= 720) and not is_rgb:
            matrix, guessed = BT709, True
        else:
            matrix = UNKNOWN
    if primaries in (UNKNOWN, RESERVED, 0):
        primaries = BT2020 if hdr or matrix == BT2020 else BT709
    return Colours(matrix, primaries if primaries in CHROMATICITIES else BT709, curve if hdr else UNKNOWN, guessed)


def why_unreadable(frame: av.VideoFrame, codec_tag: str) -> str:
    """Why a frame's colours cannot be brought to sRGB; empty if they can."""
    matrix, curve = frame.colorspace, frame.color_trc
    what = OTHER_CURVES.get(curve)
    if what:
        return f"its transfer curve is {what}, and standard, PQ and HLG ones are read; convert it to BT.709"
    if frame.color_primaries == 10:
        return "its primaries are CIE XYZ; convert it to BT.709"
    if matrix not in (*MATRICES, UNKNOWN, RESERVED):
        return f"its colours are {OTHER_MATRICES.get(matrix, f'of matrix {matrix}')}; convert it to BT.709"
    if codec_tag in DOLBY_TAGS and curve not in (PQ, HLG) and frame.color_primaries in (UNKNOWN, BT2020):
        return "Dolby Vision without an HDR10 or HLG base, whose colours its own players alone know; convert it"
    return ""


def to_rgb(frame: av.VideoFrame) -> Pixels:
    """A frame as 8-bit sRGB [H, W, C]; `why_unreadable` has to be empty."""
    matrix, primaries, curve, _ = colours_of(frame)
    options = dict(TO_RGB)
    if matrix in (BT709, BT2020) and frame.colorspace != matrix:
        options["src_colorspace"] = Colorspace(matrix)
    if primaries == BT709 and curve == UNKNOWN:
        return cast(Pixels, frame.to_ndarray(**options))
    # not rgb48le, which FFmpeg gets wrong for limited range; some rows at a time stay within the processor's cache
    deep = cast(NDArray[np.uint16], frame.to_ndarray(**{**options, "format": "gbrp16le", "interpolation": None}))
    return np.concatenate([_converted(deep[row : row + ROWS], primaries, curve) for row in range(0, len(deep), ROWS)])


def _converted(deep: NDArray[np.uint16], primaries: int, curve: int) -> Pixels:
    """R'G'B' [H, W, C] of 16 bits as 8-bit sRGB, which is BT.709's gamut."""
    to_light = _hlg_light() if curve == HLG else _pq_light() if curve == PQ else _srgb_light()
    light = np.take(to_light, deep.reshape(-1, 3).T)  # [C, H * W], as the rest is
    if curve == HLG:
        scene = _to_xyz(primaries)[1].astype(np.float32) @ light  # luminance, 1 at the most
        light *= scene ** np.float32(HLG_GAMMA - 1) * np.float32(HLG_PEAK / WHITE)
    light = np.linalg.solve(_to_xyz(BT709), _to_xyz(primaries)).astype(np.float32) @ light
    np.maximum(light, 0, out=light)
    if curve != UNKNOWN:
        _roll_off(light)
    np.minimum(light, 1, out=light)
    codes = np.take(_srgb_codes(), (light * 65535 + 0.5).astype(np.uint16))
    return np.ascontiguousarray(codes.T).reshape(deep.shape)


def _roll_off(light: NDArray[np.float32]) -> None:
    """Step 3 of the tone mapping above, in place."""
    most = np.maximum(light.max(axis=0), np.float32(KNEE))
    over = (most - KNEE) / (1 - KNEE)
    light *= (KNEE + (1 - KNEE) * over / (1 + over)) / most


def _has_no_matrix(frame: av.VideoFrame | av.VideoCodecContext) -> bool:
    """RGB, palettes and grey."""
    kind = frame.format
    return kind is not None and (kind.is_rgb or kind.has_palette or len(kind.components) < 3)


# ---- curves and gamuts -----------------------------------------------------------------------------------------


def _signal() -> NDArray[np.float64]:
    """Every value of 16 bits, from 0 to 1; FFmpeg's white is 255 * 256."""
    return np.minimum(np.arange(65536) / 65280, 1)


@cache
def _srgb_light() -> NDArray[np.float32]:
    """sRGB's curve: light from 0 to 1, by 16-bit code."""
    code = _signal()
    return np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4).astype(np.float32)


@cache
def _srgb_codes() -> Pixels:
    """Its inverse: 8-bit codes, by light in 65535ths."""
    light = np.arange(65536) / 65535
    code = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(255 * code).astype(np.uint8)


@cache
def _pq_light() -> NDArray[np.float32]:
    """The EOTF of SMPTE ST 2084: light, 1 for reference white, by 16-bit code."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 4096 * 128, 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    root = _signal() ** (1 / m2)
    light = (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1) * (10000 / WHITE)
    return light.astype(np.float32)


@cache
def _hlg_light() -> NDArray[np.float32]:
    """The inverse OETF of ARIB STD-B67: scene light from 0 to 1, by 16-bit code."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    code = _signal()
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)


@cache
def _to_xyz(primaries: int) -> NDArray[np.float64]:
    """From linear R, G, B to CIE X, Y, Z, white being D65 of luminance 1; the second row gives luminance."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in CHROMATICITIES[primaries]]).T
    x, y = D65
    white = np.array((x / y, 1, (1 - x - y) / y))
    found: NDArray[np.float64] = columns * np.linalg.solve(columns, white)
    return found
