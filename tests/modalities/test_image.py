"""Any image becomes the same square of pixels, or a reason why not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import media
from mmmoe_pretrain import limits
from mmmoe_pretrain.modalities import BadSampleError
from mmmoe_pretrain.modalities.image import Image as ImageModality
from mmmoe_pretrain.modalities.image import ImageEmbedder, ImageSettings

SIZE = 16
IMAGES = ImageModality("image", ImageSettings(size=SIZE))
RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def decode(data: bytes, rng: np.random.Generator | None = None, images: ImageModality = IMAGES) -> np.ndarray:
    value = images.decode(data, rng)
    assert value is not None
    return value


def flat(mode: str, colour: object, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    return Image.new(mode, size, colour)  # type: ignore[arg-type]


def palette(transparent: bool) -> bytes:
    image = flat("P", 0)
    image.putpalette([*RED, 0, 0, 255])
    return encoded(image, transparency=0) if transparent else encoded(image)


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (encoded(flat("RGB", RED)), RED),
        (encoded(flat("L", 77)), (77, 77, 77)),
        (encoded(flat("1", 1)), WHITE),
        (encoded(flat("1", 0)), (0, 0, 0)),
        (palette(transparent=False), RED),
        (palette(transparent=True), WHITE),
        # half of red over white: 255 * (1 - 128 / 255) = 127 in the other channels
        (encoded(flat("RGBA", (255, 0, 0, 128))), (255, 127, 127)),
        (encoded(flat("LA", (0, 0))), WHITE),
        (encoded(flat("RGB", RED), transparency=RED), WHITE),
        # 0x8080 of 16 bits is 0x80 of 8
        (encoded(Image.fromarray(np.full((SIZE, SIZE), 0x8080, np.uint16))), (128, 128, 128)),
        (encoded(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), RED),
        (encoded(flat("RGB", RED), "WEBP", lossless=True), RED),
        (encoded(flat("P", 0), "GIF"), (0, 0, 0)),
        (encoded(flat("RGB", RED), "BMP"), RED),
        (encoded(flat("RGB", RED), "TIFF", compression="tiff_lzw"), RED),
        (encoded(Image.fromarray(np.full((SIZE, SIZE), 0x8080, ">u2")), "TIFF"), (128, 128, 128)),
    ],
)
def test_every_mode_becomes_rgb_on_white(data: bytes, colour: tuple[int, int, int]) -> None:
    pixels = decode(data)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (3, SIZE, SIZE)
    assert pixels.flags.c_contiguous
    np.testing.assert_allclose(pixels, np.broadcast_to(np.array(colour)[:, None, None], pixels.shape), atol=2)


def test_a_wide_picture_stands_between_white_bars() -> None:
    pixels = decode(encoded(flat("RGB", RED, (64, 32))))  # drawn 16 x 8, bars of 4 rows
    assert (pixels[:, :3] == 255).all()
    assert (pixels[:, 13:] == 255).all()
    assert (pixels[0, 5:11] == 255).all()
    assert (pixels[1:, 5:11] == 0).all()


def test_exif_orientation_is_applied() -> None:
    upright = Image.new("RGB", (SIZE, SIZE), WHITE)
    upright.paste(RED, (0, 0, SIZE, SIZE // 2))  # the top half
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: to be turned by 90 degrees clockwise
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    pixels = decode(encoded(lying, exif=exif))
    assert (pixels[1, :6] < 50).all()
    assert (pixels[1, 10:] > 200).all()


@pytest.mark.parametrize("size", [(1, 1), (500, 1), (1, 500), (900, 700)])
def test_odd_sizes_decode(size: tuple[int, int]) -> None:
    assert decode(encoded(flat("RGB", RED, size))).shape == (3, SIZE, SIZE)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image cannot be decoded: is empty and is not PNG, JPEG, WEBP, GIF, BMP or TIFF$"),
        (encoded(flat("RGB", RED), "AVIF"), r"begins with b'\\x00.*ftypavif.*' and is not PNG, JPEG, WEBP, GIF, BMP"),
        (encoded(flat("RGB", RED))[:20], "begins like a PNG and cannot be read further"),
        (encoded(flat("RGB", RED, (99, 99)))[:90], "cannot be decoded"),
        (encoded(Image.effect_noise((99, 99), 50).convert("RGB"), "JPEG")[:900], "truncated"),
        (encoded(Image.fromarray(np.ones((SIZE, SIZE), np.float32)), "TIFF"), "32-bit floats"),
    ],
)
def test_damage_is_a_bad_sample_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadSampleError, match=reason) as error:
        decode(data)
    assert " at 0x" not in str(error.value)


def test_a_palette_picture_without_its_palette_is_a_bad_sample() -> None:
    data = palette(transparent=False)
    start = data.index(b"PLTE") - 4  # length, name, colours, checksum
    length = int.from_bytes(data[start : start + 4])
    with pytest.raises(BadSampleError):
        decode(data[:start] + data[start + 12 + length :])


def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PIXELS", 99)
    with pytest.raises(BadSampleError, match="10 x 10 pixels exceeds the limit of 99"):
        decode(encoded(flat("RGB", RED, (10, 10))))
    for form in ("PNG", "TIFF"):
        with pytest.raises(BadSampleError, match="20000 x 20000 pixels exceeds the limit of 99 decoded pixels"):
            decode(encoded(flat("1", 0, (20_000, 20_000)), form, compression="tiff_deflate"))  # in 50 kB


def test_a_jpeg_above_the_limit_is_decoded_at_a_smaller_scale(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, tmp_path: Path
) -> None:
    monkeypatch.setattr(limits, "MAX_PIXELS", 5000)
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 4000
    )  # Pillow's own limit, which warns and at twice as much raises
    image = flat("RGB", RED, (160, 64))  # 10,240 pixels; at half the scale 2,560
    image.paste(WHITE, (80, 0, 160, 64))
    data = encoded(image, "JPEG", comment=b"\xff\xda of a thumbnail")
    pixels = decode(data)  # drawn 16 x 6 between white bars
    np.testing.assert_allclose(pixels[:, 6:10, :7], np.full((3, 4, 7), 0) + np.array(RED)[:, None, None], atol=6)
    np.testing.assert_allclose(pixels[:, 6:10, 9:], 255, atol=6)
    (tmp_path / "a.jpg").write_bytes(data)
    assert media.image_member(tmp_path / "a.jpg", None).data == data
    # At an eighth 800 x 800 are 10,000; the coefficients of a progressive JPEG are in memory at any scale.
    too_large = flat("RGB", RED, (800, 800))
    for refused in (encoded(image), encoded(too_large, "JPEG"), encoded(image, "JPEG", progressive=True)):
        with pytest.raises(BadSampleError, match=r"an image of \d+ x \d+ pixels exceeds the limit of 5000 decoded"):
            decode(refused)
    assert not recwarn.list


def test_a_jpeg_with_a_scan_a_colour_is_held_whole() -> None:
    data = encoded(flat("RGB", RED), "JPEG")
    assert not limits.jpeg_held_whole(data)
    scan = data.index(b"\xff\xda")
    assert data[scan + 4] == 3, "colours of the first scan"
    assert limits.jpeg_held_whole(data[: scan + 4] + b"\x01" + data[scan + 5 :])
    assert limits.jpeg_held_whole(data[:scan])


def test_a_tiff_of_many_jpeg_scans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.effect_noise((64, 64), 50), "TIFF", compression="jpeg")
    assert decode(data).shape == (3, SIZE, SIZE)
    monkeypatch.setattr(limits, "MAX_SCANNED_PIXELS", 64 * 64 * 9)
    with pytest.raises(BadSampleError, match="64 x 64 pixels in 10 scans exceeds the limit"):
        decode(data + 9 * b"\xff\xda")


def test_augmentation_is_a_function_of_the_generator() -> None:
    data = encoded(Image.effect_noise((40, 30), 80).convert("RGB"))
    first, again, other = (decode(data, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    assert (first != decode(data)).any()


def test_without_flip_no_picture_is_mirrored() -> None:
    image = Image.new("RGB", (SIZE, SIZE), WHITE)
    image.paste((0, 0, 0), (0, 0, SIZE // 2, SIZE))  # the left half is dark
    data = encoded(image)

    def mirrored(flip: bool) -> int:
        images = ImageModality("image", ImageSettings(size=SIZE, flip=flip))
        decoded = [decode(data, np.random.default_rng(seed), images).astype(float) for seed in range(60)]
        return sum(pixels[..., :4].mean() > pixels[..., -4:].mean() for pixels in decoded)

    assert mirrored(False) == 0
    assert 15 < mirrored(True) < 45  # half of 60, within four standard deviations


def test_a_linear_stem_reads_its_own_patch_alone() -> None:
    embedder = ImageEmbedder(ImageSettings(size=16, patch=8, stem="linear"), 12)
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    changed = images.clone()
    changed[..., :8, 8:] = 200  # the second patch of the first row of patches
    differs = (embedder(images) != embedder(changed)).any(dim=1)
    assert differs.tolist() == [False, True, False, False]


NATIVE = ImageModality("image", ImageSettings(aspect="native", patch=4, max_tokens=12, stem="linear"))


@pytest.mark.parametrize(
    ("size", "shape"),
    [  # (width, height) -> (height, width): whole patches of 4 pixels, at most 12
        ((12, 8), (8, 12)),  # 3 x 2 patches as they are
        ((7, 5), (4, 8)),  # rounded to whole patches, and no pixel is invented beyond that
        ((40, 30), (12, 16)),  # 1200 pixels of which 192 fit: at 0.4 of its sides
        ((400, 3), (4, 48)),  # a strip of one row, not above the budget
        ((3, 400), (48, 4)),
        ((1, 1), (4, 4)),
        ((4000, 4000), (12, 12)),
    ],
)
def test_an_image_at_its_own_aspect_has_whole_patches_within_the_budget(
    size: tuple[int, int], shape: tuple[int, int]
) -> None:
    value = decode(encoded(flat("RGB", RED, size)), images=NATIVE)
    assert value.shape == (3, *shape)
    assert NATIVE.num_tokens(value) == shape[0] * shape[1] // 16 <= 12
    np.testing.assert_array_equal(value[:, 0, 0], RED)  # no white bars
    seen = decode(encoded(flat("RGB", RED, size)), np.random.default_rng(0), NATIVE)
    assert seen.shape == value.shape


def test_patches_of_an_image_at_its_own_aspect_run_row_by_row_with_their_places() -> None:
    first, second = NATIVE.example(np.random.default_rng(1)), np.zeros((3, 8, 12), dtype=np.uint8)
    second[1, 4:8, 8:12] = 255  # green, in the last of 2 x 3 patches
    collated = NATIVE.collate([first, second])
    start = collated.starts[1]
    assert start == NATIVE.num_tokens(first)
    np.testing.assert_array_equal(collated.arrays["places"][start:], [(r, c) for r in range(2) for c in range(3)])
    patches = collated.arrays["patches"][start:].reshape(6, 3, 16)
    assert (patches[5, 1] == 255).all() and not patches[:5].any() and not patches[5, ::2].any()
    shown = NATIVE.draw(second, 5)
    assert shown is not None and shown[1] == pytest.approx((2 / 3, 1 / 2, 1, 1))


@pytest.mark.parametrize("settings", [{"stem": "conv"}, {"positions": "rotary"}])
def test_what_knows_one_shape_alone_is_refused_at_an_image_s_own_aspect(settings: dict) -> None:
    with pytest.raises(ValueError, match="aspect native of an image"):
        ImageSettings(**{"aspect": "native", "stem": "linear", **settings})
