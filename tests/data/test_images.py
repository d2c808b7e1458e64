"""Image files of every usual kind give the same picture."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from lightning_dfd.data import VideoError, read_first_frame, write_video
from lightning_dfd.data.video import cover_and_crop


@pytest.fixture(scope="module")
def picture():
    """Three colours, none of them where another lies after a turn."""
    pixels = np.empty((64, 96, 3), np.uint8)
    pixels[:, :48], pixels[:, 48:], pixels[:16] = (220, 40, 60), (30, 90, 200), (240, 240, 230)
    return Image.fromarray(pixels)


def seen(path, height=64, width=96):
    return read_first_frame(path, height, width).permute(1, 2, 0).numpy().astype(int)


def apart(path, picture):
    return np.abs(seen(path) - np.asarray(picture.convert("RGB"))).mean()


@pytest.mark.parametrize(
    ("name", "mode", "options", "allowed"),
    [
        ("a.png", "RGB", {}, 0),
        ("a.png", "P", {}, 0),
        ("a.png", "RGBA", {}, 0),
        ("a.jpg", "RGB", {"quality": 95}, 2),
        ("a.jpg", "RGB", {"quality": 95, "progressive": True, "subsampling": 0}, 2),
        ("a.jpg", "CMYK", {"quality": 95}, 2),
        ("a.webp", "RGB", {"lossless": True}, 0),
        ("a.webp", "RGBA", {"lossless": True}, 0),
        ("a.bmp", "RGB", {}, 0),
        ("a.tiff", "RGB", {}, 0),
        ("a.tiff", "CMYK", {}, 0),
        ("a.tiff", "RGB", {"compression": "tiff_lzw"}, 0),
        ("a.gif", "RGB", {}, 0),
        ("a.avif", "RGB", {"quality": 95}, 2),
        ("a.PNG", "RGB", {}, 0),
    ],
)
def test_formats(tmp_path, picture, name, mode, options, allowed):
    colours = {"palette": Image.Palette.ADAPTIVE} if mode == "P" else {}
    picture.convert(mode, **colours).save(tmp_path / name, **options)
    assert apart(tmp_path / name, picture) <= allowed


def test_content_counts_and_not_the_suffix(tmp_path, picture):
    picture.save(tmp_path / "a.jpg", format="PNG")
    picture.save(tmp_path / "b.mp4", format="PNG")
    assert apart(tmp_path / "a.jpg", picture) == apart(tmp_path / "b.mp4", picture) == 0


def test_grey_of_every_depth(tmp_path, picture):
    grey = picture.convert("L")
    grey.save(tmp_path / "8.png")
    deep = np.asarray(grey).astype(np.uint16) * 257
    for name, values in (("16.png", deep), ("16.tiff", deep), ("32.tiff", deep.astype(np.int32))):
        Image.fromarray(values).save(tmp_path / name)
    for name in ("8.png", "16.png", "16.tiff", "32.tiff"):
        assert apart(tmp_path / name, grey) == 0
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(VideoError, match="mode F, of which black and white are unknown"):
        seen(tmp_path / "float.tiff")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path, picture, suffix, orientation):
    stored = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture if stored is None else picture.transpose(stored)
    image.save(tmp_path / f"a{suffix}", exif=exif, quality=95)
    assert apart(tmp_path / f"a{suffix}", picture) <= 3


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tiff"])
def test_what_is_transparent_is_white(tmp_path, picture, name):
    alpha = np.full((64, 96), 255, np.uint8)
    alpha[:, :24], alpha[:, 24:48] = 0, 128
    image = picture.copy()
    image.putalpha(Image.fromarray(alpha))
    image.save(tmp_path / name, lossless=True)
    got = seen(tmp_path / name)
    assert got[40, 10].tolist() == [255, 255, 255]
    assert np.abs(got[40, 36] - (np.array([220, 40, 60]) * 128 + 255 * 127) / 255).max() <= 1
    assert got[40, 80].tolist() == [30, 90, 200]


def test_a_palette_s_transparent_colour_is_white(tmp_path, picture):
    image = picture.convert("P", palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / "a.png", transparency=image.getpixel((20, 40)))
    assert seen(tmp_path / "a.png")[40, 20].tolist() == [255, 255, 255]


def wide_profile():
    """An ICC profile whose red and green are swapped: any that is not used shows."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(data[at : at + 4]): at + 4 for at in range(132, 132 + 12 * struct.unpack(">I", data[128:132])[0], 12)}
    red, green = (bytes(data[tags[name] : tags[name] + 8]) for name in (b"rXYZ", b"gXYZ"))
    data[tags[b"rXYZ"] : tags[b"rXYZ"] + 8], data[tags[b"gXYZ"] : tags[b"gXYZ"] + 8] = green, red
    return bytes(data)


def test_colour_profiles_are_followed(tmp_path, picture):
    picture.save(tmp_path / "a.png", icc_profile=wide_profile())
    assert np.abs(seen(tmp_path / "a.png")[40, 20] - (40, 220, 60)).max() <= 3
    picture.save(tmp_path / "b.png", icc_profile=b"nonsense" * 30)
    with pytest.warns(UserWarning, match=r"b\.png: its colour profile cannot be used .* read as sRGB"):
        assert apart(tmp_path / "b.png", picture) == 0


def test_animations_and_videos_give_their_first_picture(tmp_path, picture):
    for name in ("a.gif", "a.webp"):
        picture.save(tmp_path / name, save_all=True, append_images=[Image.new("RGB", (96, 64))], lossless=True)
        assert apart(tmp_path / name, picture) == 0
    write_video(tmp_path / "a.mp4", np.stack([np.asarray(picture), np.zeros((64, 96, 3), np.uint8)]), 8)
    assert apart(tmp_path / "a.mp4", picture) <= 4


def test_scaled_and_cropped_as_videos_are(tmp_path, picture):
    picture.save(tmp_path / "a.png")
    whole = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert torch.equal(read_first_frame(tmp_path / "a.png", 32, 32), cover_and_crop(whole, 32, 32))


def png(height, width, rows=b""):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("bomb.png", png(60000, 60000), "may be a bomb"),
        ("large.png", png(9000, 8000), "9000x8000 pixels are too many"),
        ("line.png", png(60000, 1), "too oblong"),
        ("empty.png", png(8, 8), "truncated|unrecognized|broken"),
        ("nothing.png", b"", "no image that can be read"),
        ("text.png", b"hello", "no image that can be read"),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no image that can be read"),
        ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC is not read; save it as PNG or JPEG"),
    ],
)
def test_what_is_no_picture_is_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoError, match=rf"{name}: .*({said})") as caught:
        seen(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_one_line(tmp_path):
    with pytest.raises(VideoError, match=r"gone\.png: No such file"):
        seen(tmp_path / "gone.png")
    with pytest.raises(VideoError, match="Is a directory"):
        seen(tmp_path)


def test_a_cut_picture_is_one_line(tmp_path, picture):
    for name in ("a.png", "a.jpg", "a.webp"):
        noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1500])
        with pytest.raises(VideoError, match=name):
            seen(tmp_path / name)
