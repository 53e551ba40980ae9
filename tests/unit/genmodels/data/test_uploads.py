"""Test datasets in the storage: added once, checked, immutable, and read the same everywhere."""

from __future__ import annotations

import contextlib
import hashlib
import io
import stat
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genmodels.data import DataConfig, ImageData, TextData, added, open_dataset, resolve_data, unpack, uploads
from genmodels.errors import DataError, DatasetExists
from genmodels.family import ImageInfo, TextInfo
from genmodels.storage import Storage, open_storage
from tests.support.paths import ROOT
from tests.support.storages import MemoryStorage, RecordingStorage, in_threads

PLAY = "SPEAKER:\nWhat light through yonder window breaks?\n\n" * 60
TALE = "Once upon a time there was a small grey mouse.\n" * 60


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "genmodels" / "datasets"


@pytest.fixture
def play(tmp_path: Path) -> Path:
    (tmp_path / "play.txt").write_text(PLAY)
    return tmp_path / "play.txt"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write pictures of two classes, all of another size than the requested one."""
    random = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "photos" / ("cats" if number % 4 else "dogs") / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 24), np.uint8)).save(path)
    return tmp_path / "photos"


def packed(folder: Path, top: str = "") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, top + path.relative_to(folder).as_posix())
        archive.writestr(f"{top}notes.txt", "no picture")
        archive.writestr(f"__MACOSX/{top}._00.png", "no picture")
        archive.writestr(f"{top}.hidden.png", "no picture")
    return out.getvalue()


def add_bytes(storage: Storage, content: bytes, image_size: int | None = None) -> tuple[uploads.StoredDataset, bool]:
    """Add bytes from the network, from a file whose name says nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "upload"
        path.write_bytes(content)
        return uploads.add(storage, "mine", path, image_size)


def config(name: str, sha256: str | None = None) -> DataConfig:
    return DataConfig.model_validate({"dataset": name, "sha256": sha256}, context={"stored": True})


def test_a_text_is_stored_as_it_was_and_read_as_if_it_were_local(storage: Storage, play: Path) -> None:
    local = open_dataset(DataConfig(path=str(play)))
    dataset, new = uploads.add(storage, "my-play", play)
    assert new
    assert dataset.sha256 == hashlib.sha256(PLAY.encode()).hexdigest()
    assert (dataset.kind, dataset.bytes, dataset.examples) == ("text", len(PLAY), len(PLAY))
    assert dataset.info == TextInfo(vocab_size=len(set(PLAY)))
    assert dataset.notes == ["3,060 characters, 28 different ones; the last 306 are for validation"]
    assert storage.get(f"datasets/my-play/{dataset.sha256}/text.txt")[0] == PLAY.encode()
    data = open_dataset(config("my-play"), storage)
    assert isinstance(data, TextData)
    assert data.digest == local.digest
    assert np.array_equal(data.train, local.train)
    assert data.notes == ["my-play: 3,060 characters, 28 different ones; the last 306 are for validation"]
    assert added.catalog(storage) == [dataset]
    assert added.Kinds(storage) == {"my-play": "text"}


def test_pictures_are_converted_once_and_are_those_of_the_folder(storage: Storage, photos: Path) -> None:
    local = open_dataset(DataConfig(path=str(photos), image_size=16))
    dataset, _ = uploads.add(storage, "photos", photos, image_size=16)
    assert (dataset.kind, dataset.examples) == ("image", 40)
    assert dataset.info == ImageInfo(channels=1, height=16, width=16, num_classes=2)
    assert dataset.notes[0] == "40 pictures as grey 16 x 16, 40 of them scaled and centre-cropped"
    data = open_dataset(config("photos"), storage)
    assert isinstance(data, ImageData)
    assert data.digest == local.digest  # pixels, classes, and which are for validation
    assert data.class_names == ("cats", "dogs")
    assert data.notes == ["photos: 40 pictures as grey 16 x 16, 2 classes"]
    assert open_dataset(config("photos", dataset.sha256), storage).digest == data.digest
    assert uploads.add(storage, "photos", photos, image_size=16) == (dataset, False)


@pytest.mark.parametrize("top", ["", "holiday/2024/"])
def test_a_zip_is_the_folder_it_was_packed_from(photos: Path, top: str) -> None:
    storage = MemoryStorage()
    from_folder, _ = uploads.add(storage, "mine", photos, image_size=16)
    assert add_bytes(storage, packed(photos, top), image_size=16) == (from_folder, False)


def test_the_same_again_writes_nothing_and_another_content_leaves_pins_alone(play: Path) -> None:
    storage = RecordingStorage()
    first, _ = uploads.add(storage, "mine", play)
    written = len(storage.log)
    folder = f"datasets/mine/{first.sha256}"
    assert [key for key, _ in storage.log] == [
        f"{folder}/text.txt",
        f"{folder}/dataset.json",
        "datasets/mine/current.json",
    ]
    assert uploads.add(storage, "mine", play) == (first, False)
    assert len(storage.log) == written
    pinned = resolve_data(config("mine"), storage)
    assert pinned.sha256 == first.sha256
    play.write_text(TALE)
    with pytest.raises(DatasetExists, match="dataset 'mine' exists with another content: 3,060 characters"):
        uploads.add(storage, "mine", play)
    assert len(storage.log) == written
    second, new = uploads.add(storage, "mine", play, replace=True)
    assert new
    assert open_dataset(pinned, storage).digest == hashlib.sha256(PLAY.encode()).hexdigest()
    assert open_dataset(config("mine"), storage).digest == hashlib.sha256(TALE.encode()).hexdigest()
    assert resolve_data(pinned, storage) == pinned
    assert resolve_data(config("mine"), storage).sha256 == second.sha256
    play.write_text(PLAY)
    assert uploads.add(storage, "mine", play, replace=True) == (first, True)  # the name means the first content
    assert storage.log[-1][0] == "datasets/mine/current.json"
    assert [key for key, _ in storage.log].count(f"datasets/mine/{first.sha256}/text.txt") == 1
    assert added.catalog(storage) == [first]


def test_many_add_the_same_at_once(file_storage: Storage, play: Path) -> None:
    results = in_threads(6, lambda i: uploads.add(file_storage, "mine", play))
    assert {dataset.sha256 for dataset, _ in results} == {hashlib.sha256(PLAY.encode()).hexdigest()}
    assert len(added.catalog(file_storage)) == 1


def test_what_is_in_the_cache_needs_no_storage_and_is_checked(play: Path, cache: Path) -> None:
    storage = MemoryStorage()
    dataset, _ = uploads.add(storage, "mine", play)
    with pytest.raises(DataError, match="is not on this machine, and no storage is given"):
        open_dataset(config("mine", dataset.sha256))
    open_dataset(config("mine"), storage)
    assert open_dataset(config("mine", dataset.sha256)).digest == dataset.sha256
    (cache / dataset.sha256 / "text.txt").write_text(TALE)
    with pytest.raises(DataError, match="is not on this machine"):
        open_dataset(config("mine", dataset.sha256))
    assert open_dataset(config("mine"), storage).digest == dataset.sha256  # fetched again
    (cache / dataset.sha256 / "text.txt").unlink()
    storage.objects[dataset.key] = TALE.encode()
    with pytest.raises(DataError, match=f"'mine' is damaged in the storage .*{dataset.key}"):
        open_dataset(config("mine"), storage)
    assert [path.name for path in (cache / dataset.sha256).iterdir()] == []


def test_four_processes_fetch_one_dataset(tmp_path: Path, play: Path, cache: Path) -> None:
    storage = open_storage((tmp_path / "storage").as_uri())
    dataset, _ = uploads.add(storage, "mine", play)
    code = (
        "import sys; from genmodels.data import uploads; from genmodels.storage import open_storage;"
        f"print(uploads.load('mine', None, open_storage({storage.url!r})).digest);"
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(4)]
    assert [process.communicate()[0].decode().strip() for process in processes] == [dataset.sha256] * 4
    assert [path.name for path in (cache / dataset.sha256).iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "/x", "a/b", "Mine", "a" * 64, "-a", "a\n", "\udcff", "mine ", "current.json", "ü"]
)
def test_hostile_names_are_refused_before_anything_is_touched(name: str, play: Path) -> None:
    storage = RecordingStorage()
    for work in (
        lambda: uploads.add(storage, name, play),
        lambda: uploads.find(storage, name),
        lambda: uploads.load(name, None, storage),
    ):
        with pytest.raises(DataError, match="lower-case letters, digits and"):
            work()
    assert storage.log == []


def test_names_that_mean_something_else_are_refused(play: Path, photos: Path) -> None:
    storage = MemoryStorage()
    with pytest.raises(DataError, match="'digits' is a built-in dataset; choose another name"):
        uploads.add(storage, "digits", play)
    uploads.add(storage, "mine", play)
    with pytest.raises(DataError, match="'mine' is a dataset of texts, but this one has images: choose another name"):
        uploads.add(storage, "mine", photos)
    with pytest.raises(
        DataError, match=r"dataset 'other' is not in the storage .* genmodels data add other FILE\|FOLDER"
    ):
        open_dataset(config("other"), storage)
    with pytest.raises(DataError, match=r"dataset 'mine' has no content aaaaaaaaaaaa\.\.\. .*genmodels data add mine"):
        open_dataset(config("mine", "a" * 64), storage)
    with pytest.raises(DataError, match="a name has lower-case"):
        uploads.find(storage, "mine", "../../secrets")


def test_what_does_not_fit_says_why_and_names_no_folder_of_ours(tmp_path: Path, play: Path, photos: Path) -> None:
    storage = MemoryStorage()
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(DataError, match=r"^/.*short\.txt has 9 characters, too few"):
        uploads.add(storage, "mine", short)
    for size in (-1, 0, 7, 257):
        with pytest.raises(DataError, match=f"image_size: got {size}, expected 8 to 256 pixels"):
            uploads.add(storage, "mine", photos, image_size=size)
    with pytest.raises(DataError, match=r"nowhere does not exist: name a text file, a folder of pictures, or a zip"):
        uploads.add(storage, "mine", tmp_path / "nowhere")
    with pytest.raises(DataError, match="is not a folder or zip of pictures"):
        uploads.add(storage, "mine", play, image_size=16)
    (photos / "cats" / "broken.png").write_text("no picture")
    with pytest.raises(DataError) as caught:
        add_bytes(storage, packed(photos))
    assert str(caught.value) == (
        "1 of 41 pictures cannot be read: upload/cats/broken.png (not a picture). Remove them or save them again"
    )
    with pytest.raises(DataError, match=r"^upload has no pictures"):
        add_bytes(storage, packed(tmp_path / "nothing"))
    assert storage.objects == {}


def archive(*entries: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as writer:
        for name, content in entries:
            writer.writestr(name, content)
    return out.getvalue()


@pytest.mark.parametrize("name", ["../out.png", "a/../../out.png", "/out.png", "..\\out.png", "C:\\out.png"])
def test_nothing_in_a_zip_leads_out_of_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="would be outside its folder"):
        add_bytes(MemoryStorage(), archive(("a.png", b"x"), (name, b"x")))
    path = tmp_path / "hostile.zip"
    path.write_bytes(archive((name, b"x")))
    with pytest.raises(DataError, match="would be outside its folder"):
        unpack.unpack(path, tmp_path / "inside")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hostile.zip", "inside"]
    assert list((tmp_path / "inside").iterdir()) == []


def test_links_in_a_zip_are_passed_over(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as writer:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        writer.writestr(link, "/etc/passwd")
        writer.writestr("a.png", b"x")
    (tmp_path / "links.zip").write_bytes(out.getvalue())
    folder, skipped = unpack.unpack(tmp_path / "links.zip", tmp_path / "inside")
    assert skipped == {"link": 1}
    assert [path.name for path in folder.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "name",
    [
        b"\0.png",
        b"\0",
        b"\0/\0.png",
        b"a\0.png",
        b"dir/\0.png",
        b".",
        b"./",
        b"./.png",
        b" ",
        b"a.png",
        b"a.png/",
        b"a.png/b.png",
        b"\xff.png",
        b"n" * 300 + b".png",
        b"d/" * 3000 + b"d.png",
        b"\r\n.png",
    ],
    ids=lambda name: repr(name[:12]),
)
def test_no_name_in_a_zip_breaks_it(tmp_path: Path, name: bytes) -> None:
    """Each name is skipped, unpacked inside the folder, or refused."""
    stand_in = "X" * len(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning about a duplicate name
        data = archive(("a.png", b"x"), (stand_in, b"x")).replace(stand_in.encode(), name)
    path = tmp_path / "odd.zip"
    path.write_bytes(data)
    with contextlib.suppress(DataError):
        unpack.unpack(path, tmp_path / "inside")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["inside", "odd.zip"]


def test_a_directory_of_a_zip_that_was_tampered_with_is_read_or_a_data_error(tmp_path: Path) -> None:
    chance, whole = np.random.default_rng(1), archive(*((f"d/{i}.png", b"x" * 50) for i in range(3)))
    directory = whole.index(b"PK\x01\x02")
    for number in range(300):
        data = bytearray(whole)
        for place in chance.integers(directory, len(data), 2):
            data[place] = chance.choice([0, 1, 255])
        path = tmp_path / f"{number}.zip"
        path.write_bytes(data)
        with contextlib.suppress(DataError):
            unpack.unpack(path, tmp_path / f"{number}")


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_BYTES", 5_000_000, "unpacks to more than 5,000,000 bytes"),
        ("MAX_FILES", 1, "has 2 files, the limit is 1"),
        ("MAX_DIRECTORY_BYTES", 50, "has too many files"),
    ],
)
def test_a_zip_that_grows_too_large_is_refused(
    monkeypatch: pytest.MonkeyPatch, limit: str, value: int, message: str
) -> None:
    bomb = archive(("a.png", b"\0" * 3_000_000), ("b.png", b"\0" * 3_000_000))
    assert len(bomb) < 10_000
    monkeypatch.setattr(unpack, limit, value)
    with pytest.raises(DataError, match=f"upload {message}"):
        add_bytes(MemoryStorage(), bomb)


def test_a_damaged_zip_is_a_data_error() -> None:
    storage, random = MemoryStorage(), np.random.default_rng(0)
    whole = archive(*((f"{i}.png", random.bytes(200)) for i in range(10)))
    for _ in range(100):
        damaged = bytearray(whole[: random.integers(5, len(whole) + 1)])
        for place in random.integers(4, len(damaged), 8):
            damaged[place] = random.integers(256)
        with pytest.raises(DataError):
            add_bytes(storage, bytes(damaged))
    assert storage.objects == {}
