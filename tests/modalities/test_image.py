"""Any image becomes the same square of pixels, or a reason why not."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image

from mmmoe_pretrain import limits
from mmmoe_pretrain.data_prep.shards.encode import Encoder
from mmmoe_pretrain.data_prep.shards.media import MediaOptions
from mmmoe_pretrain.modalities import BadSampleError, image_file
from mmmoe_pretrain.modalities.image import Image as ImageModality
from mmmoe_pretrain.modalities.image import ImageEmbedder
from mmmoe_pretrain.modalities.image_settings import ImageSettings
from mmmoe_pretrain.modalities.image_view import View, random_view, render
from tests.support import image_bytes as encoded
from tests.support import in_forks

SIZE = 16
IMAGES = ImageModality("image", ImageSettings(size=SIZE))
RED, WHITE = (255, 0, 0), (255, 255, 255)


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


# How an upright image is stored, by its EXIF orientation.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,  # to be turned clockwise
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_exif_orientation_is_applied_at_any_scale(orientation: int, form: str) -> None:
    """Of 131 x 77 pixels a JPEG decodes 33 x 20 at a quarter, of which 32.75 x 19.25 are the image's."""
    upright = Image.new("RGB", (131, 77), (0, 90, 200))
    upright.paste(RED, (0, 0, 60, 30))
    upright.paste((20, 200, 0), (90, 40, 131, 77))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(upright.transpose(STORED[orientation]), form, exif=exif, quality=95, subsampling=0)
    pixels = decode(data).astype(int)
    assert np.abs(pixels - decode(encoded(upright))).max() < 20
    seen = [decode(content, np.random.default_rng(3)).astype(int) for content in (data, encoded(upright))]
    assert np.abs(seen[0] - seen[1]).mean() < 12  # of the wrong side it is 50; the edge is one of 16 rows


def photograph(**options: object) -> bytes:
    """A photograph of 512 x 600 pixels that comes with matplotlib, re-encoded with ``options``."""
    with get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        return encoded(image.convert("RGB"), "JPEG", **{"quality": 95, **options})


@pytest.mark.parametrize("size", [48, 64, 104, 224])  # at an eighth, a quarter, a quarter, and half of the scale
@pytest.mark.parametrize("options", [{}, {"progressive": True, "subsampling": 0}])
def test_a_jpeg_decoded_at_a_smaller_scale_is_close_to_a_full_decode(size: int, options: dict[str, object]) -> None:
    data = photograph(**options)
    pixels = decode(data, images=ImageModality("image", ImageSettings(size=size, fit="stretch"))).astype(int)
    full = Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    difference = np.abs(pixels - np.asarray(full).transpose(2, 0, 1))
    assert difference.mean() < 2.5  # the bound of image.MARGIN, on photographs
    assert difference.max() < 45


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 1}, {"restart_marker_rows": 1}])
def test_pixels_are_the_same_with_and_without_simplejpeg(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    pytest.importorskip("simplejpeg")
    data = photograph(**options)
    broken = bytearray(data)
    broken[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    images = [ImageModality("image", ImageSettings(size=size)) for size in (48, 104, 224, 512)]

    def pixels() -> list[np.ndarray]:
        return [decode(content, images=size) for size in images for content in (data, bytes(broken))]

    with_it = pixels()
    monkeypatch.setattr(image_file, "_simplejpeg", lambda: None)
    for found, expected in zip(with_it, pixels(), strict=True):  # of torch's resize and Pillow's
        np.testing.assert_allclose(found.astype(int), expected, atol=2)


def _decode_in_a_fork(data: bytes, threads: int) -> None:
    torch.set_num_threads(threads)
    for size in (64, 224):
        images = ImageModality("image", ImageSettings(size=size))
        for rng in (None, np.random.default_rng(0)):
            decode(data, rng, images)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_worker_decodes_after_its_parent_used_torch_s_threads(threads: int) -> None:
    """OpenMP's threads do not survive a fork; what waits for them would hang."""
    data, before = photograph(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.ones(1500, 1500) @ torch.ones(1500, 1500)
        decode(data, images=ImageModality("image", ImageSettings(size=64)))
        assert in_forks(*4 * [partial(_decode_in_a_fork, data, threads)]) == [0] * 4, "None: it hung"
    finally:
        torch.set_num_threads(before)


def test_an_adobe_jpeg_of_inverted_colours_is_read() -> None:
    """Pillow writes CMYK inverted and marked by Adobe's APP14, whose last byte says how the colours are coded."""
    data = encoded(flat("CMYK", (255, 0, 127, 0)), "JPEG", quality=100)
    np.testing.assert_allclose(decode(data)[:, 3, 3], (0, 255, 128), atol=2)
    marker = data.index(b"Adobe") + 11
    assert data[marker] == 0
    # Its bytes 0, 255, 128, 255 as YCCK (Adobe TN 5116): Y 0, Cb 255 and Cr 128 are the red, green and blue 0, 0 and
    # 1.772 * 127 = 225 of the inverse of the inverse of cyan, magenta and yellow.
    ycck = data[:marker] + b"\2" + data[marker + 1 :]
    np.testing.assert_allclose(decode(ycck)[:, 3, 3], (255, 255, 255 - 225), atol=4)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(form: str) -> None:
    frames = [flat("RGB", (0, 0, 255)) for _ in range(5)]
    data = encoded(flat("RGB", RED), form, save_all=True, append_images=frames, duration=9)
    np.testing.assert_allclose(decode(data)[:, 3, 3], RED, atol=4)


@pytest.mark.parametrize(
    ("fit", "size", "row"),
    [  # of the middle row of 4 pixels: a wide image of red, green, blue thirds
        ("letterbox", (90, 30), "rgb"),
        ("stretch", (90, 30), "rgb"),
        ("crop", (90, 30), "ggg"),
        ("crop", (30, 90), "rgb"),
    ],
)
def test_the_image_fits_as_the_settings_say(fit: str, size: tuple[int, int], row: str) -> None:
    colours = {"r": RED, "g": (0, 255, 0), "b": (0, 0, 255)}
    image = Image.new("RGB", size)
    for place, colour in enumerate(colours.values()):
        image.paste(colour, (place * size[0] // 3, 0, (place + 1) * size[0] // 3, size[1]))
    settings = ImageSettings(size=24, fit=fit, background=(9, 8, 7))  # type: ignore[arg-type]
    pixels = decode(encoded(image), images=ImageModality("image", settings))
    np.testing.assert_allclose(pixels[:, 12, [3, 12, 20]].T, [colours[letter] for letter in row], atol=3)
    is_bar = (pixels[:, [0, 7, 16, 23], 12].T == (9, 8, 7)).all()
    assert is_bar == (fit == "letterbox")
    assert decode(encoded(flat("RGBA", (0, 0, 0, 0))), images=ImageModality("image", settings))[:, 5, 5].tolist() == [
        9, 8, 7,
    ]  # fmt: skip


@pytest.mark.parametrize("size", [(1, 1), (500, 1), (1, 65_535), (900, 700)])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("fit", ["letterbox", "crop", "stretch"])
def test_odd_sizes_decode(size: tuple[int, int], form: str, fit: str) -> None:
    if form == "JPEG" and max(size) > 65_500:
        size = (1, 65_500)  # libjpeg's limit
    images = ImageModality("image", ImageSettings(size=SIZE, fit=fit, crop_scale=(0.01, 1)))  # type: ignore[arg-type]
    data = encoded(flat("RGB", RED, size), form)
    for rng in (None, np.random.default_rng(0)):
        pixels = decode(data, rng, images)
        assert pixels.shape == (3, SIZE, SIZE) and pixels.dtype == np.uint8


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image cannot be decoded: is empty and is not PNG, JPEG, WEBP, GIF, BMP or TIFF$"),
        (encoded(flat("RGB", RED), "AVIF"), "begins like AVIF, HEIC or MP4 and is not PNG, JPEG, WEBP, GIF, BMP"),
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
    assert Encoder(tmp_path, MediaOptions()).media("image", "a.jpg").data == data
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


NOTHING: dict = {
    "crop_scale": (1, 1),
    "crop_ratio": (1, 1),
    "rotation": 0,
    "flip": False,
    "brightness": 0,
    "contrast": 0,
}


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
def test_augmentation_without_strength_changes_nothing(fit: str) -> None:
    data = photograph()
    images = ImageModality("image", ImageSettings(size=64, fit=fit, **NOTHING))  # type: ignore[arg-type]
    np.testing.assert_array_equal(decode(data, np.random.default_rng(0), images), decode(data, images=images))


@pytest.mark.parametrize("side", [40, 100, 700])  # of an image that is enlarged, sampled, and shrunk
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_rotated_view_shows_what_rotating_cropping_and_resizing_one_by_one_show(side: int, mirrored: bool) -> None:
    with get_sample_data("grace_hopper.jpg") as file:
        image = Image.open(file).convert("RGB").resize((side, side * 3 // 4), Image.Resampling.LANCZOS)
    view = View((64, 64), image.size, 0.1 * side, -0.1 * side, 0.8 * side, 0.85 * side, 11.0, mirrored)
    content = (0.0, 0.0, *map(float, image.size))
    shown = render(image_file.Decoded(image, content), view, Image.Resampling.BICUBIC, (10, 200, 30))
    found = shown.transpose(1, 2, 0).astype(int)
    # On a large canvas, so that rotating about its centre is exact and nothing is lost at the corners.
    canvas = Image.new("RGB", (800, 800), (10, 200, 30))
    canvas.paste(image.resize((400, 300), Image.Resampling.BICUBIC), (200, 250))
    scale = 400 / side
    box = (200 + 40, 250 - 40, 200 + 40 + view.width * scale, 250 - 40 + view.height * scale)
    expected = canvas.rotate(11.0, Image.Resampling.BICUBIC, fillcolor=(10, 200, 30))
    expected = expected.resize((64, 64), Image.Resampling.BICUBIC, box=box)
    if mirrored:
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.abs(found - np.asarray(expected)).mean() < 4


@pytest.mark.parametrize("of", [(300, 200), (50, 900)])
def test_a_random_resized_crop_is_inside_of_the_image_with_its_shape(of: tuple[int, int]) -> None:
    settings = ImageSettings(fit="crop", crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), rotation=0)
    rng, areas = np.random.default_rng(0), []
    for _ in range(200):
        view, _ = random_view(of, (48, 48), "crop", settings, rng)
        assert view.left >= -1e-6 and view.left + view.width <= of[0] + 1e-6
        assert view.top >= -1e-6 and view.top + view.height <= of[1] + 1e-6
        assert 3 / 4 - 1e-6 <= view.width / view.height <= 4 / 3 + 1e-6
        areas.append(view.width * view.height / (of[0] * of[1]))
    assert 0.02 < min(areas) < 0.15 and max(areas) <= 1.0
    assert max(areas) > 0.7 or of == (50, 900)  # of which no such shape has more than a fourteenth


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


@pytest.mark.parametrize("stem", [{"stem": "linear"}, {"stem": "linear", "aspect": "native"}])
def test_pixels_are_normalized_by_channel(stem: dict) -> None:
    torch.manual_seed(0)
    clip = ImageModality("image", ImageSettings(size=16, mean="clip", std="clip", **stem))
    half = ImageModality("image", ImageSettings(size=16, **stem))
    one, other = clip.embedder(12, 0), half.embedder(12, 0)
    other.load_state_dict(one.state_dict())
    value = np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8)
    # The pixels that half's normalization takes to where clip's takes ``value``.
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    same = (((value / 255 - mean[:, None, None]) / std[:, None, None]) * 0.5 + 0.5) * 255
    arrays = [its.collate([value]).arrays for its in (clip, half)]
    inputs = [{name: torch.from_numpy(array) for name, array in found.items()} for found in arrays]
    name = "patches" if "aspect" in stem else "pixels"
    shaped = same.reshape(3, 2, 8, 2, 8).transpose(1, 3, 0, 2, 4).reshape(4, -1) if "aspect" in stem else same[None]
    inputs[1][name] = torch.from_numpy(shaped).float()
    torch.testing.assert_close(one(**inputs[0]), other(**inputs[1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"mean": "imagenett"}, "'imagenett' is not half, imagenet, clip, a number or three numbers"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale 0.5 to 1.5"),
        ({"crop_ratio": (2, 1)}, "crop_ratio 2.0 to 1.0"),
        ({"fit": "crop", "aspect": "native", "stem": "linear"}, "aspect native shows whole images"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ImageSettings(**settings)


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
