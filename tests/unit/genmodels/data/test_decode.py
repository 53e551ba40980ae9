"""Test pictures of every mode in every format that Pillow writes: each is scaled correctly, or refused by one line."""

from __future__ import annotations

import io
import itertools
import os
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genmodels.data import DataConfig, ImageData, decode, decode_image, open_dataset, unpack, uploads
from genmodels.data.decode import FORMATS
from genmodels.data.files import find_pictures, shown, skipped_note
from genmodels.data.images import REQUEST_FORMATS, read_folder
from genmodels.errors import DataError, RequestError, SpecError
from genmodels.family import ImageInfo
from tests.support.spec_files import read_spec
from tests.support.storages import MemoryStorage

MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
SIDE = 16
SUFFIX = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif", "TIFF": ".tif"}


def ramp(high: int = 255) -> np.ndarray:
    """Return a ramp from black at the left to `high` at the right: (SIDE, SIDE)."""
    return np.linspace(0, high, SIDE).round().astype(np.int64)[None].repeat(SIDE, axis=0)


def of_mode(mode: str) -> Image.Image:
    """Return the ramp in a mode, over the mode's whole range, as a person's program would write it."""
    grey = Image.fromarray(ramp().astype(np.uint8))
    if mode.startswith("I;16"):
        order = ">u2" if mode == "I;16B" else "<u2"
        return Image.frombytes(mode, (SIDE, SIDE), ramp(65535).astype(order).tobytes())
    if mode == "I":
        return Image.fromarray(ramp(2**31 - 1).astype(np.int32))
    if mode == "F":
        return Image.fromarray((ramp() / 255).astype(np.float32))
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.applyTransform(grey.convert("RGB"), ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    if mode in ("La", "RGBa"):
        return grey.convert(mode.upper()).convert(mode)
    if mode == "1":
        return grey.convert("1", dither=0)
    return grey.convert("L" if mode in ("P", "PA") else "RGB").convert(mode)


def written() -> Iterator[tuple[str, str, bytes]]:
    for format, mode in itertools.product(FORMATS, (*MODES, *DEEP_MODES)):
        out = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                of_mode(mode).save(out, format, **({"quality": 100} if format in ("JPEG", "WEBP") else {}))
            except (OSError, ValueError, KeyError):  # no such mode in this format
                continue
        yield format, mode, out.getvalue()


WRITTEN = [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in written()]


def decoded(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        return np.asarray(decode.decode(image).convert("L")).astype(np.int64)


def test_nearly_all_modes_are_tried() -> None:
    tried = {param.values[1] for param in WRITTEN}
    assert tried >= {*MODES, *DEEP_MODES} - {"La", "I;16N"}
    assert len(WRITTEN) > 45


@pytest.mark.parametrize(("format", "mode", "content"), WRITTEN)
def test_every_mode_in_every_format_is_scaled_right_or_refused(format: str, mode: str, content: bytes) -> None:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        kept = image.mode
    # A picture that Pillow converts while it writes has another mode in the file; that is the writer's responsibility.
    if kept == "I":
        with pytest.raises(DataError, match="samples of 32 bits, whose value for white is unknown"):
            decoded(content)
        return
    result = decoded(content)
    if mode in DEEP_MODES and not kept.startswith(("I", "F")):
        return
    expected = (ramp() >= 128) * 255 if mode == "1" else ramp()
    tolerance = 12 if format == "JPEG" or mode in ("LAB", "YCbCr", "CMYK", "PA", "P") else 2
    assert abs(result - expected).max() <= tolerance, (kept, result[0])


@pytest.mark.parametrize(("format", "mode", "content"), [case for case in WRITTEN if case.values[0] in REQUEST_FORMATS])
def test_a_request_means_what_training_means(format: str, mode: str, content: bytes, tmp_path: Path) -> None:
    for number in range(32):
        (tmp_path / f"{number}{SUFFIX[format]}").write_bytes(content)
    data = open_dataset(DataConfig(path=str(tmp_path), image_size=SIDE))
    assert isinstance(data, ImageData)
    batch = data.split("train").take(np.zeros(1, np.int64), np.zeros(1, np.int64))
    assert np.array_equal(decode_image(content, data.info), batch["images"][0])


def tiff(bits: int, samples: np.ndarray, *, order: str = "<", photometric: int = 1, kind: int = 1) -> bytes:
    """Return an uncompressed TIFF of one strip, as scientific programs write it: integers (kind 1) or floats (3)."""
    height, width = samples.shape[:2]
    channels = samples.shape[2] if samples.ndim == 3 else 1
    if bits == 12:
        packed = "".join(f"{int(value):012b}" for value in samples.ravel())
        data = int(packed, 2).to_bytes(len(packed) // 8, "big")
    else:
        data = samples.astype(f"{order}{'f' if kind == 3 else 'u'}{bits // 8}").tobytes()
    entries = [
        *((256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, bits), (259, 3, 1, 1)),
        *((262, 3, 1, photometric), (273, 4, 1, 0), (277, 3, 1, channels), (278, 3, 1, height)),
        *((279, 4, 1, len(data)), (339, 3, channels, kind)),
    ]
    head = 8 + 2 + 12 * len(entries) + 4
    body = struct.pack(f"{order}H", len(entries))
    extra = b""
    for tag, kind_of, count, value in entries:
        if count > 1:
            field = struct.pack(f"{order}I", head + len(extra))
            extra += struct.pack(f"{order}{count}H", *[value] * count)
        elif tag == 273:
            field = struct.pack(f"{order}I", head + 12)
        else:
            field = struct.pack(f"{order}H2x" if kind_of == 3 else f"{order}I", value)
        body += struct.pack(f"{order}HHI", tag, kind_of, count) + field
    extra = extra.ljust(12, b"\0")
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return start + body + struct.pack(f"{order}I", 0) + extra + data


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize(
    ("bits", "kind", "order", "high"),
    [(8, 1, "<", 255), (12, 1, "<", 4095), (16, 1, "<", 65535), (16, 1, ">", 65535), (32, 3, "<", 1), (32, 3, ">", 1)],
)
def test_tiffs_of_science_are_scaled_right(bits: int, kind: int, order: str, high: int, photometric: int) -> None:
    samples = ramp(65535) / 65535 * high
    content = tiff(bits, samples if kind == 3 else samples.round(), order=order, photometric=photometric, kind=kind)
    if photometric == 0 and (bits, order) in ((12, "<"), (16, ">")):
        with pytest.raises(OSError, match="cannot identify image file"):  # Pillow does not know it
            decoded(content)
        return
    expected = ramp() if photometric else 255 - ramp()
    assert abs(decoded(content) - expected).max() <= 1


REFUSED = {
    "12 bits in 16": (tiff(16, ramp(4095)), "has 16 bits a sample but uses 12 or fewer, so it would be black"),
    "12 bits in 16, big-endian": (tiff(16, ramp(4095), order=">"), "uses 12 or fewer"),
    "10 bits in 16": (tiff(16, ramp(1023)), "uses 12 or fewer"),
    "12 bits in 16, RGB": (tiff(16, ramp(4095)[..., None].repeat(3, 2), photometric=2), "uses 12 or fewer"),
    "32 bits": (tiff(32, ramp(255)), "samples of 32 bits, whose value for white is unknown"),
    "floats to 255": (tiff(32, ramp(255), kind=3), "must be from 0 to 1, got 0 to 255; scale them"),
    "negative floats": (tiff(32, ramp(1) - 0.5, kind=3), "must be from 0 to 1, got -0.5 to 0.5"),
    "not a number": (tiff(32, ramp(1) + np.nan, kind=3), "must be from 0 to 1, some are not finite"),
    "infinite": (tiff(32, np.where(ramp(1), np.inf, 0), kind=3), "must be from 0 to 1, some are not finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_black_or_noise_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    for number in range(40):
        of_mode("L").save(tmp_path / f"{number}.png")
    (tmp_path / "microscope.tif").write_bytes(content)
    with pytest.raises(DataError, match=rf"1 of 41 pictures cannot be read: .*microscope\.tif \(.*{message}") as caught:
        read_folder(tmp_path, SIDE, None)
    assert len(str(caught.value).splitlines()) == 1


def test_black_is_black_in_any_depth() -> None:
    for bits in (8, 12, 16):
        assert decoded(tiff(bits, ramp(0))).max() == 0
    rgb = tiff(16, ramp(65535)[..., None].repeat(3, 2), photometric=2)
    assert abs(decoded(rgb) - ramp()).max() <= 1


def test_sixteen_bits_in_a_request_are_held_to_the_same() -> None:
    out = io.BytesIO()
    Image.fromarray(ramp(4095).astype(np.uint16)).save(out, "PNG")
    with pytest.raises(RequestError, match="uses 12 or fewer") as caught:
        decode_image(out.getvalue(), ImageInfo(channels=1, height=SIDE, width=SIDE))
    assert (caught.value.status, caught.value.param) == (400, "image")


@pytest.mark.parametrize(
    ("format", "mode", "channels"),
    [
        *[("PNG", mode, 1) for mode in ("1", "L", "LA", "P", "I;16")],
        *[("TIFF", mode, 1) for mode in ("1", "L", "LA", "P", "I;16", "I;16B", "F")],
        *[("GIF", mode, 1) for mode in ("1", "L")],
        *[("PNG", mode, 3) for mode in ("RGB", "RGBA")],
        *[("TIFF", mode, 3) for mode in ("CMYK", "YCbCr", "LAB", "RGB")],
    ],
)
def test_grey_is_what_has_no_colours(tmp_path: Path, format: str, mode: str, channels: int) -> None:
    image = Image.fromarray(ramp().astype(np.uint8)).convert("P") if mode == "P" else of_mode(mode)
    image.save(tmp_path / f"0{SUFFIX[format]}", format)
    for number in range(1, 32):
        of_mode("L").save(tmp_path / f"{number}.png")
    assert read_folder(tmp_path, SIDE, None).images.shape[1] == channels


def test_a_palette_with_a_colour_is_rgb(tmp_path: Path) -> None:
    coloured = Image.new("RGB", (SIDE, SIDE), (200, 10, 10))
    coloured.quantize(4).save(tmp_path / "0.gif")
    for number in range(1, 32):
        of_mode("L").save(tmp_path / f"{number}.png")
    assert read_folder(tmp_path, SIDE, None).images.shape[1] == 3


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured_in_training_and_in_requests(tmp_path: Path, format: str, orientation: int) -> None:
    lying = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
    lying[: SIDE // 2, : SIDE // 2] = 255  # one corner is white
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    Image.fromarray(lying).save(out, format, exif=exif, **({"quality": 100} if format in ("JPEG", "WEBP") else {}))
    turn = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
        8: np.rot90,
    }[orientation]
    upright = turn(lying)
    with Image.open(io.BytesIO(out.getvalue())) as image:
        assert abs(np.asarray(decode.decode(image)).astype(int) - upright).max() < 40
    if format in REQUEST_FORMATS:
        info = ImageInfo(channels=3, height=upright.shape[0], width=upright.shape[1])
        result = decode_image(out.getvalue(), info)
        assert abs(result * 255 - upright.transpose(2, 0, 1)).max() < 40
        other = info.model_copy(update={"height": info.width, "width": info.height})
        with pytest.raises(RequestError, match=rf"image is {info.width} x {info.height}, this model takes"):
            decode_image(out.getvalue(), other)


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_what_is_transparent_becomes_white(mode: str) -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image = clear.convert(mode.upper() if mode.endswith("a") else mode).convert(mode)
    assert np.asarray(decode.decode(image).convert("L")).min() == 255


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16"])
def test_a_transparent_colour_becomes_white(mode: str) -> None:
    out = io.BytesIO()
    Image.new(mode, (4, 4)).save(out, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert decoded(out.getvalue()).min() == 255


def test_a_picture_beyond_the_bound_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", SIDE * SIDE - 1)
    for _, mode, content in written():
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            monkeypatch.setattr(image, "load", lambda: pytest.fail("it was decoded"))
            with pytest.raises(DataError, match=f"{SIDE} x {SIDE} is more than {SIDE * SIDE - 1} pixels"):
                decode.decode(image)
        assert mode


# ---- files that are no pictures, and names


def fill(folder: Path, count: int = 32) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def test_what_is_skipped_is_counted_and_named_by_kind(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    fill(folder)
    (folder / "a.png").symlink_to(folder / "0.png")
    (folder / "more").symlink_to(tmp_path)
    (folder / "nowhere.png").symlink_to(folder / "gone.png")
    (folder / "b.HEIC").write_bytes(b"x")
    (folder / "README").write_text("x")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "c.png").write_bytes(b"x")
    os.mkfifo(folder / "pipe.png")
    note = "7 skipped: 3 links, 1 .heic, 1 hidden, 1 special file, 1 without a suffix"
    assert read_folder(folder, SIDE, None).notes[-1] == note
    dataset, _ = uploads.add(MemoryStorage(), "mine", folder)
    assert dataset.notes[-1] == note
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    (nothing / "a.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"has no pictures .*; 1 skipped: 1 \.heic\)"):
        read_folder(nothing, SIDE, None)


def test_a_zip_counts_what_it_skips_as_well(tmp_path: Path) -> None:
    fill(tmp_path / "photos")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in (tmp_path / "photos").iterdir():
            archive.write(path, path.name)
        for name in ("a.heic", "b.HEIC", "__MACOSX/._0.png", "notes"):
            archive.writestr(name, "x")
    dataset, _ = uploads.add(MemoryStorage(), "mine", tmp_path / "photos.zip")
    assert dataset.notes[-1] == "4 skipped: 2 .heic, 1 hidden, 1 without a suffix"


def test_many_kinds_are_not_all_named() -> None:
    note = skipped_note({f".{letter}": 1 for letter in "abcdefghijkl"})
    assert note == "12 skipped: 1 .a, 1 .b, 1 .c, 1 .d, 1 .e, 1 .f, 1 .g, 1 .h, and other kinds"
    assert skipped_note({}) == ""


def test_folders_that_cannot_be_read_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "deep")
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match="deep cannot be read: Permission denied"):
        find_pictures(tmp_path)


NAMES = [b"caf\xe9", b"\xff\xfe", "café".encode(), b"two\nlines", b"\x1b[31mred"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_not_utf_8_work_and_are_shown_escaped(tmp_path: Path, name: bytes) -> None:
    folder = tmp_path / "photos"
    for label in (name, b"dogs"):
        fill(folder / os.fsdecode(label), 32)
    (folder / os.fsdecode(name) / os.fsdecode(b"x." + name)).write_bytes(b"x")
    data = open_dataset(DataConfig(path=str(folder), image_size=SIDE))
    assert isinstance(data, ImageData)
    escaped = shown(os.fsdecode(name))
    assert set(data.class_names) == {escaped, "dogs"}
    escaped.encode()
    assert escaped.isprintable()
    data.assets()
    for note in data.notes:
        note.encode()
        assert note.isprintable()
    dataset, _ = uploads.add(MemoryStorage(), "mine", folder / os.fsdecode(name), SIDE)
    dataset.model_dump_json().encode()
    (folder / os.fsdecode(name) / os.fsdecode(name + b".png")).write_bytes(b"x")
    with pytest.raises(DataError, match="1 of 65 pictures cannot be read") as caught:
        open_dataset(DataConfig(path=str(folder)))
    str(caught.value).encode()
    assert str(caught.value).isprintable()


def test_a_spec_in_a_folder_that_is_not_utf_8_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    fill(folder / "photos")
    model = "models: [{name: mine, model: {family: vae}, data: {path: photos}}]"
    (folder / "job.yaml").write_text(f"name: job\n{model}\n")
    with pytest.raises(SpecError, match=r"models\[0\]\.data\.path: .*/caf%E9/photos is not UTF-8; rename"):
        read_spec(folder / "job.yaml")


@pytest.mark.parametrize("content", [b"PK", b"PK\x03\x04", b"PK\x05\x06cut", b"PK\x07\x08PK\x03\x04"])
def test_a_broken_zip_is_told_as_a_zip(tmp_path: Path, content: bytes) -> None:
    for name in ("photos", "photos.zip"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} cannot be read as a zip: .*; pack it again"):
            uploads.add(MemoryStorage(), "mine", tmp_path / name)
    (tmp_path / "named.zip").write_bytes(content[:1])
    assert unpack.is_zip(tmp_path / "named.zip")
