from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dist_graft.config import DataConfig
from dist_graft.training.data import decoding, load_data
from dist_graft.training.data.decoding import CenterCrop, RandomCrop, Unreadable, decode, read_image

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
GRAY = np.random.default_rng(1).integers(0, 256, (20, 30), dtype=np.uint8)
DEEP = np.random.default_rng(2).integers(0, 65536, (20, 30), dtype=np.uint16)
CLEAR = np.arange(600, dtype=np.uint16).reshape(20, 30).astype(np.uint8)


def read_rgb(path):
    """The whole image as [height, width, 3], or the reason why it cannot be read."""
    read = read_image(path, decode)
    return read if isinstance(read, Unreadable) else read.permute(1, 2, 0).numpy()


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
    np.testing.assert_array_equal(read_rgb(tmp_path / name), rgb)


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
    red, green, blue = read_rgb(path).reshape(-1, 3).mean(axis=0)
    assert red > 250
    assert max(green, blue) < 5


def test_orientation_is_ignored(tmp_path):
    path = tmp_path / "image.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(path, exif=exif)
    np.testing.assert_array_equal(read_rgb(path), RGB)


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
    read = read_rgb(path)
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
    read = read_rgb(path)
    assert isinstance(read, Unreadable)
    assert read.broken
    assert reason in read.reason


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_unknown_range_are_rejected(kind, tmp_path):
    path = tmp_path / "image.tiff"
    Image.fromarray(GRAY.astype(kind)).save(path)
    assert "32-bit" in read_rgb(path).reason


def test_a_missing_file_is_not_broken(tmp_path):
    path = tmp_path / "gone.png"
    assert read_rgb(path) == Unreadable(str(path), "No such file or directory", broken=False)


@pytest.fixture
def photo(tmp_path):
    """Saves a smooth image; returns its path, and its pixels as PIL decodes them."""

    def save(width, height, kind="jpg", mode="RGB", **options):
        noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        path = tmp_path / f"photo.{kind}"
        image.convert(mode).save(path, **options)
        with Image.open(path) as stored:
            return path, v2.functional.pil_to_tensor(stored.convert("RGB"))

    return save


JPEG_OPTIONS = {
    "4:4:4": {"subsampling": 0},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "gray": {"mode": "L"},
}


@pytest.mark.parametrize("name", JPEG_OPTIONS)
def test_torchvision_and_pil_decode_a_jpeg_to_the_same_pixels(name, photo, monkeypatch):
    path, pixels = photo(75, 50, quality=90, **JPEG_OPTIONS[name])
    monkeypatch.setattr(decoding, "_as_rgb", None)  # called for what PIL decodes
    assert torch.equal(read_image(path, decode), pixels)


def refuse(*_, **__):
    raise RuntimeError("damaged")


@pytest.mark.parametrize("decoder", [None, refuse])
def test_pil_decodes_a_jpeg_that_torchvision_does_not(decoder, photo, monkeypatch):
    monkeypatch.setattr(decoding, "decode_jpeg", decoder)
    path, pixels = photo(75, 50)
    assert torch.equal(read_image(path, decode), pixels)


def random_crop(size):
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("seed", range(4))
def test_a_random_crop_is_that_of_torchvision(kind, seed, photo):
    path, pixels = photo(75, 50, kind)
    torch.manual_seed(seed)
    expected = random_crop(32)(pixels)
    torch.manual_seed(seed)
    assert torch.equal(read_image(path, RandomCrop(32, 3)), expected)


@pytest.mark.parametrize(
    ("size", "reduced"), [(16, {(76, 51), (38, 26)}), (40, {(151, 101), (76, 51)}), (70, set())]
)
def test_large_crops_of_a_jpeg_are_decoded_at_a_fraction_of_its_size(
    size, reduced, photo, monkeypatch
):
    sizes = set()
    as_rgb = decoding._as_rgb

    def spy(image):
        sizes.add(image.size)
        return as_rgb(image)

    monkeypatch.setattr(decoding, "_as_rgb", spy)
    path, pixels = photo(301, 201, quality=95)
    for seed in range(30):
        torch.manual_seed(seed)
        crop = read_image(path, RandomCrop(size, 3))
        torch.manual_seed(seed)
        expected = random_crop(size)(pixels)
        assert crop.shape == expected.shape
        assert (crop.int() - expected.int()).abs().float().mean() < 4
    assert sizes == reduced


def test_a_crop_of_a_reduced_image_lies_within_it(tmp_path):
    """Pixels outside of an image would be black."""
    path = tmp_path / "white.jpg"
    Image.new("RGB", (133, 91), "white").save(path)
    torch.manual_seed(0)
    crops = torch.stack([read_image(path, RandomCrop(9, 1)) for _ in range(200)])
    assert crops.shape == (200, 1, 9, 9)
    assert int(crops.min()) == 255


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_the_center_crop_is_that_of_torchvision(kind, photo):
    path, pixels = photo(75, 50, kind)
    expected = v2.Compose([v2.Resize(37), v2.CenterCrop(32)])(pixels)
    assert torch.equal(read_image(path, CenterCrop(32, 3)), expected)
