from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dist_graft.config import DataConfig
from dist_graft.training.data import load_data
from dist_graft.training.data.folder import Unreadable, read_image

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
GRAY = np.random.default_rng(1).integers(0, 256, (20, 30), dtype=np.uint8)
DEEP = np.random.default_rng(2).integers(0, 65536, (20, 30), dtype=np.uint16)
CLEAR = np.arange(600, dtype=np.uint16).reshape(20, 30).astype(np.uint8)


def three_channels(gray):
    return np.repeat(gray[:, :, None], 3, axis=2)


def palette_image():
    image = Image.fromarray(GRAY % 64, "P")
    image.putpalette(RGB.reshape(-1)[: 3 * 64].tobytes())
    return image


PALETTE = RGB.reshape(-1, 3)[GRAY % 64]
CMYK = np.dstack([255 - RGB, np.zeros_like(GRAY)])
BLACK_AND_WHITE = np.where(GRAY < 128, 0, 255).astype(np.uint8)
FILES = {
    "RGB.png": (Image.fromarray(RGB), {}, RGB),
    "L.png": (Image.fromarray(GRAY), {}, three_channels(GRAY)),
    "L transparent.png": (Image.fromarray(GRAY), {"transparency": 7}, three_channels(GRAY)),
    "RGB transparent.png": (Image.fromarray(RGB), {"transparency": (1, 2, 3)}, RGB),
    "1.png": (Image.fromarray(GRAY >= 128), {}, three_channels(BLACK_AND_WHITE)),
    "P.png": (palette_image(), {}, PALETTE),
    "P one transparent.png": (palette_image(), {"transparency": 3}, PALETTE),
    "P transparent.png": (palette_image(), {"transparency": bytes(range(64))}, PALETTE),
    "LA.png": (Image.fromarray(np.dstack([GRAY, CLEAR])), {}, three_channels(GRAY)),
    "RGBA.png": (Image.fromarray(np.dstack([RGB, CLEAR])), {}, RGB),
    "PA.tiff": (
        Image.fromarray(np.dstack([GRAY, CLEAR])).convert("PA"),
        {},
        three_channels(GRAY),
    ),
    "CMYK.tiff": (Image.fromarray(CMYK, "CMYK"), {}, RGB),
    "I;16.png": (Image.fromarray(DEEP), {}, three_channels(DEEP >> 8)),
    "I;16.tiff": (Image.fromarray(DEEP), {}, three_channels(DEEP >> 8)),
    "I;16.pgm": (Image.fromarray(DEEP), {}, three_channels(DEEP >> 8)),
    "deep for 8 bits.png": (Image.fromarray(GRAY * np.uint16(257)), {}, three_channels(GRAY)),
}


@pytest.mark.parametrize("name", FILES)
def test_every_mode_decodes_to_rgb(name, tmp_path):
    image, options, rgb = FILES[name]
    image.save(tmp_path / name, **options)
    read = read_image(str(tmp_path / name))
    assert read.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(read), rgb)


def test_the_files_cover_the_modes(tmp_path):
    modes = set()
    for name, (image, options, _) in FILES.items():
        image.save(tmp_path / name, **options)
        with Image.open(tmp_path / name) as stored:
            modes.add(stored.mode)
    assert modes >= {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "I"}


def test_cmyk_jpeg(tmp_path):
    path = tmp_path / "image.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path)
    red, green, blue = np.asarray(read_image(str(path))).reshape(-1, 3).mean(axis=0)
    assert red > 250
    assert max(green, blue) < 5


def test_orientation_is_ignored(tmp_path):
    path = tmp_path / "image.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(path, exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(str(path))), RGB)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("workers", [0, 1])
def test_all_modes_in_one_batch(channels, workers, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        for name, (image, options, _) in FILES.items():
            image.save(tmp_path / split / "one" / name, **options)
    config = DataConfig(
        name="imagefolder", root=str(tmp_path), channels=channels, image_size=16, workers=workers
    )
    data = load_data(config, seed=0, network=0, device=torch.device("cpu"), channels_last=False)
    for batches in (data.train_batches(0, 0, 1), data.eval_batches("test")):
        ((images, labels),) = list(batches)
        assert images.shape == (len(FILES), channels, 16, 16)
        assert labels.tolist() == [0] * len(FILES)


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "webp", "tiff", "ppm"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.9])
def test_truncated_files_are_broken(kind, part, tmp_path):
    path = tmp_path / f"image.{kind}"
    Image.fromarray(RGB).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    read = read_image(str(path))
    assert isinstance(read, Unreadable)
    assert (read.path, read.broken) == (str(path), True)
    assert read.reason
    assert "\n" not in read.reason
    assert "object at" not in read.reason


def chunk(kind, content):
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png_of(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "file is empty"),
        (b"<html>not found</html>", "unknown image format"),
        (bytes(1000), "unknown image format"),
        (png_of(60_000, 60_000), "exceeds limit"),
        (png_of(20, 20), "truncated"),
    ],
    ids=["empty", "text", "zeros", "too large", "no pixels"],
)
def test_the_reason_of_an_unreadable_file(content, reason, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    read = read_image(str(path))
    assert isinstance(read, Unreadable)
    assert read.broken
    assert reason in read.reason


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_unknown_range_are_rejected(kind, tmp_path):
    path = tmp_path / "image.tiff"
    Image.fromarray(GRAY.astype(kind)).save(path)
    assert "32-bit" in read_image(str(path)).reason


def test_a_missing_file_is_not_broken(tmp_path):
    path = str(tmp_path / "gone.png")
    assert read_image(path) == Unreadable(path, "No such file or directory", broken=False)
