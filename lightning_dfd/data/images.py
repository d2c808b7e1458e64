"""Image files, as the first frame of an image-to-video sample.

Axis legend: C = 3 colour channels, H height, W width.
"""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from lightning_dfd.data.video import MAX_PIXELS, VideoError, cover_and_crop, read_video
from lightning_dfd.files import ShardMember
from lightning_dfd.types import VideoSize

# Pillow's, without those that start other programs, as EPS does.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "QOI")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# What Pillow raises about damaged files, besides its own errors.
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, struct.error, OverflowError, IndexError, KeyError, TypeError)


def read_first_frame(path: str | Path | ShardMember, height: int, width: int) -> Tensor:
    """An image file, or the first frame of a video, uint8 [C, H, W], scaled and cropped as videos are.

    Of an image: turned as its EXIF data say; transparent parts on white; colours from its ICC profile to sRGB; 16 bits
    to 8; of an animation the first picture. What is a video is decided by the content.

    Raises:
        VideoError: the file is missing, damaged or neither image nor video.
    """
    size = VideoSize(1, height, width)
    if isinstance(path, ShardMember):
        return read_video(path, size, None)[:, 0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()  # older versions of Pillow lack some formats
            with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
                pixels = _as_rgb(path, image, height, width)
    except UnidentifiedImageError:
        if _is_heif(Path(path)):
            raise VideoError(f"{path}: HEIC is not read; save it as PNG or JPEG") from None
        try:
            return read_video(path, size, None)[:, 0]
        except VideoError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise VideoError(f"{path}: no image that can be read, and as a video: {reason}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise VideoError(f"{path}: more than {MAX_PIXELS} pixels, which may be a bomb; make it smaller") from error
    except VideoError:
        raise
    except (*DAMAGED, MemoryError) as error:
        what = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(f"{path}: {what}") from error
    return cover_and_crop(torch.from_numpy(pixels).permute(2, 0, 1), height, width)


def _as_rgb(path: str | Path, image: Image.Image, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, C], not yet scaled."""
    columns, rows = image.size
    scaled = rows * columns * max(height / rows, width / columns, height / columns, width / rows) ** 2
    if max(rows * columns, scaled) > MAX_PIXELS:
        raise VideoError(f"{path}: {rows}x{columns} pixels are too many, or too oblong, to be scaled; crop it")
    profile = image.info.get("icc_profile")
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I") or turned.mode == "F":
        return _of_deep_grey(path, turned)
    alpha = None
    if turned.has_transparency_data:
        turned = turned.convert("RGBA")
        alpha = turned.getchannel("A")
        turned = turned.convert("RGB")
    elif turned.mode not in ("RGB", "L", "CMYK", "LAB"):
        turned = turned.convert("RGB")
    colours = _to_srgb(path, turned, profile)
    if alpha is not None:
        white = Image.new("RGB", colours.size, "white")
        colours = Image.composite(colours, white, alpha)
    return np.array(colours)


def _of_deep_grey(path: str | Path, image: Image.Image) -> np.ndarray:
    """Grey of 16 bits, or of 32 that hold no more, as uint8 [H, W, C]."""
    grey = np.asarray(image).astype(np.float64)
    if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
        raise VideoError(f"{path}: its grey is of mode {image.mode}, of which black and white are unknown; save 8 bits")
    return np.repeat(np.round(grey / 257).astype(np.uint8)[..., None], 3, axis=2)


def _to_srgb(path: str | Path, image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image in the colours of its ICC profile as sRGB; without one its numbers count as sRGB's."""
    if not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:  # of another kind than the pixels, or damaged
        warnings.warn(f"{path}: its colour profile cannot be used ({error}); read as sRGB", stacklevel=2)
        return image.convert("RGB")
    assert converted is not None  # as it was not asked to work in place
    return converted


def _is_heif(path: Path) -> bool:
    """By the brand that such files begin with. FFmpeg would take one of a picture's tiles for the whole."""
    with path.open("rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS
