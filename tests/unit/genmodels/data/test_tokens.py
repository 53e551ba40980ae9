"""A large text: its tokens are mapped from a file that is made once, with the same bits as in memory."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from genmodels.data import CharTokenizer, tokens
from genmodels.data.text import PART, TextData, read_text
from genmodels.errors import DataError, StorageUnavailable

SIZE = 40_000_000  # bytes of a text above the limit
MEASURE = """
import resource, sys
from genmodels.data.text import read_text
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = read_text(__import__("pathlib").Path(sys.argv[1]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, len(data.train) + len(data.val))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "genmodels" / "tokens"


def write(path: Path, length: int = 3 * PART) -> Path:
    """Write a text whose pieces end inside characters and between the two bytes of a line end."""
    line = "né, 马到成功 " + "x" * 7 + "\r\n"
    path.write_bytes("\ufeff".encode() + (line * (length // len(line.encode()) + 1)).encode())
    return path


def test_memory_does_not_grow_with_the_text(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "large.txt"
    path.write_bytes(b"To be, or not to be: that is the question.\n" * (SIZE // 43 + 1))
    output = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    taken, count = map(int, output.stdout.split())
    assert count == path.stat().st_size
    assert taken < 16 * PART  # a piece as bytes, text, UTF-32 and indices; a whole text would take 40 PART
    assert [file.stat().st_size - count for file in cache.glob("*.npy")] == [128]  # the header: one byte each token


def test_mapped_tokens_have_the_bits_of_those_in_memory(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "play.txt")
    small = read_text(path)
    assert not cache.exists()
    monkeypatch.setattr(tokens, "MAX_IN_MEMORY", 1000)
    mapped = read_text(path)
    assert len(list(cache.glob("*.npy"))) == 1
    assert (mapped.digest, mapped.info, mapped.notes) == (small.digest, small.info, small.notes)
    text = path.read_text("utf-8-sig").replace("\r\n", "\n")
    assert np.array_equal(mapped.train, CharTokenizer.from_text(text).encode_array(text)[: len(mapped.train)])
    index, epoch = np.arange(40), np.arange(40) % 3
    for name in ("train", "val"):
        batches = [data.split(name, 64).take(index, epoch) for data in (small, mapped)]
        assert all(np.array_equal(batches[0][key], batches[1][key]) for key in ("tokens", "targets"))
        assert mapped.arrays(name)["tokens"].dtype == small.arrays(name)["tokens"].dtype == np.uint8

    other = CharTokenizer.from_text(small.tokenizer.vocab + "ABC")
    for data in (small, mapped):
        data.set_tokenizer(other)
    assert len(list(cache.glob("*.npy"))) == 2
    assert np.array_equal(mapped.train, small.train)
    assert other.decode(mapped.val[:50]) == text[len(mapped.train) :][:50]


def test_the_file_is_made_once_and_again_if_it_is_damaged(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "play.txt")
    monkeypatch.setattr(tokens, "MAX_IN_MEMORY", 1000)
    expected = read_text(path).train[:100].tolist()
    (file,) = cache.glob("*.npy")
    made = file.stat().st_ino
    read_text(path)
    assert file.stat().st_ino == made
    whole = file.read_bytes()
    for damage in (b"", b"nothing", whole[:-1], b"PK\3\4" + whole[4:], whole.replace(b"(", b"[", 1), whole + b"\0"):
        file.unlink()
        file.write_bytes(damage)
        assert read_text(path).train[:100].tolist() == expected
    assert not list(cache.glob("*.part"))


def test_a_full_disk_is_an_outage_and_keeps_no_part_of_a_file(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "play.txt")
    monkeypatch.setattr(tokens, "MAX_IN_MEMORY", 1000)

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageUnavailable, match="the disk of this machine is full"):
            read_text(path)
    assert [file.suffix for file in cache.iterdir() if file.suffix != ".lock"] == []
    assert len(read_text(path).train)


@pytest.mark.parametrize("later", ["ab" * 500, "ba" * 1000])
def test_a_text_that_changes_while_it_is_read_leaves_no_file(
    cache: Path, monkeypatch: pytest.MonkeyPatch, later: str
) -> None:
    monkeypatch.setattr(tokens, "MAX_IN_MEMORY", 1000)
    readings = iter(("ab" * 1000, later))
    with pytest.raises(DataError, match="the text changed while it was read"):
        TextData(lambda: [next(readings)])
    assert not list(cache.glob("*.npy"))
