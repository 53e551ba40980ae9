"""Test files that are not UTF-8 text: the error names the encoding where it is sure, and the command to convert it."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shlex
import subprocess
from pathlib import Path

import pytest

from genmodels.data.text import read_text
from genmodels.errors import DataError

LATIN = "Le café déjà vu était près de la forêt.\n" * 100
CYRILLIC = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.\n" * 60
CHINESE = "他在这个地方住了三年，我们都说他是一个很有意思的人，大家不时要去看他。\n" * 80
TRADITIONAL = "他在這個地方住了三年，我們都說他是一個很有意思的人，大家不時要去看他。\n" * 80
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n" * 80
KOREAN = "나는 오늘 아침에 일어나서 학교에 갔다가 친구를 만나 함께 밥을 먹었다.\n" * 80


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_text(path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "encoding", "named"),
    [
        *[(LATIN, name, "UTF-16") for name in ("utf-16",)],
        (LATIN, "utf-32", "UTF-32"),
        (CHINESE, "utf-16", "UTF-16"),
        (LATIN, "utf-16-le", "UTF-16LE"),
        (LATIN, "utf-16-be", "UTF-16BE"),
        (LATIN, "cp1252", "WINDOWS-1252"),
        (LATIN, "latin-1", "WINDOWS-1252"),
        (CHINESE, "gbk", "GB18030"),
        (CHINESE, "gb18030", "GB18030"),
        (TRADITIONAL, "big5", "BIG5"),
        (JAPANESE, "shift_jis", "SHIFT_JIS"),
        (JAPANESE, "euc_jp", "EUC-JP"),
        (KOREAN, "euc_kr", "EUC-KR"),
    ],
)
def test_the_advice_makes_the_text_readable(tmp_path: Path, text: str, encoding: str, named: str) -> None:
    path = tmp_path / "a book.txt"
    message = refusal(path, text.encode(encoding))
    command = message.partition(": iconv ")[2]
    assert command.startswith(f"-f {named} -t UTF-8 ")
    assert shlex.quote(str(path)) in command
    subprocess.run(f"iconv {command}", shell=True, check=True, cwd=tmp_path)
    converted = (tmp_path / "converted.txt").read_text("utf-8")
    assert converted.removeprefix("\ufeff") == text
    assert len(read_text(tmp_path / "converted.txt").train) > 1000


@pytest.mark.parametrize("encoding", ["cp1251", "koi8-r", "iso8859-5"])
def test_where_it_cannot_be_told_none_is_invented(tmp_path: Path, encoding: str) -> None:
    message = refusal(tmp_path / "book.txt", CYRILLIC.encode(encoding))
    assert "iconv -f ENCODING -t UTF-8" in message
    assert "1252" not in message


@pytest.mark.parametrize(
    ("content", "report"),
    [
        (gzip.compress(LATIN.encode(), mtime=0), "is packed with gzip; unpack it first: gunzip --keep '"),
        (bz2.compress(LATIN.encode()), "is packed with bzip2; unpack it first: bunzip2 --keep '"),
        (lzma.compress(LATIN.encode()), "is packed with xz; unpack it first: unxz --keep '"),
        (b"PK\x03\x04" + bytes(2000), "is packed with zip; unpack it first: unzip '"),
        (b"%PDF-1.7\n" + b"\xe9" * 3000, "is a PDF; save it as plain text in UTF-8"),
        (b"{\\rtf1 " + LATIN.encode(), "is a rich-text document; save it as plain text in UTF-8"),
        (b"\x89PNG\r\n\x1a\n" + bytes(2000), "is one picture; name a folder of pictures"),
        (bytes(range(256)) * 20, "is not a text file: it has NUL bytes"),
        (LATIN.encode() + b"\0", "is not a text file: it has NUL bytes"),
        (b"", "has 0 characters, too few to train on"),
        (b"x", "has 1 character, too few to train on"),
        (b"z" * 5000, "repeats one character ('z'), so there is nothing to learn; a text needs at least 2 different"),
        ("é".encode() * 5000, "repeats one character ('é')"),
        (b"\r\n" * 5000, "repeats one character ('\\n')"),
        (b"\0", "is not a text file: it has NUL bytes"),
    ],
)
def test_other_files_are_told_for_what_they_are(tmp_path: Path, content: bytes, report: str) -> None:
    assert report in refusal(tmp_path / "a book.txt", content)


@pytest.mark.parametrize("text", [LATIN, CHINESE, KOREAN, "x" * 3000 + "€", LATIN + "😀"])
def test_a_text_that_is_cut_off_inside_a_character_is_told_so(tmp_path: Path, text: str) -> None:
    last = next(character for character in reversed(text) if not character.isascii())
    whole = text[: text.rindex(last)].encode()
    for remains in range(2 if whole.isascii() else 1, len(last.encode())):
        message = refusal(tmp_path / "book.txt", whole + last.encode()[:remains])
        count = "byte" if remains == 1 else f"{remains} bytes"
        place = f"inside its last character, at byte {len(whole):,}"
        assert message.endswith(f"is cut off {place}; copy it again, or remove the last {count}")


@pytest.mark.parametrize("marks", [1, 2, 3])
def test_byte_order_marks_are_no_characters(tmp_path: Path, marks: int) -> None:
    """A file that was joined from several also has them inside."""
    path = tmp_path / "book.txt"
    path.write_bytes((b"\xef\xbb\xbf" * marks + LATIN.encode()) * 2)
    data = read_text(path)
    assert data.tokenizer.vocab == "".join(sorted(set(LATIN)))
    assert len(data.train) + len(data.val) == 2 * len(LATIN)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("before", [0, 1, 3, 1000])
def test_the_byte_that_is_named_is_the_files(tmp_path: Path, mark: bytes, before: int) -> None:
    start = mark + b"x" * before
    message = refusal(tmp_path / "book.txt", start + b"\xe9 " + b"y" * 3000)
    assert f"byte {len(start):,} is 0xe9" in message
