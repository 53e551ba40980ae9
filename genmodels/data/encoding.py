"""Recognise the format or encoding of a file that is not UTF-8 text, and say how to convert it."""

from __future__ import annotations

import codecs
import re
import shlex
from pathlib import Path

HAS_NUL = "is not a text file: it has NUL bytes"
SAMPLE_BYTES = 2**20  # from the start; enough to recognise an encoding

# First bytes of packed files, and the command that unpacks each.
_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip --keep {}"),
    b"BZh": ("bzip2", "bunzip2 --keep {}"),
    b"\xfd7zXZ\0": ("xz", "unxz --keep {}"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "unzstd {}"),
    b"7z\xbc\xaf\x27\x1c": ("7-Zip", "7z x {}"),
    b"Rar!": ("RAR", "unrar x {}"),
    b"PK\x03\x04": ("zip", "unzip {}"),
}
_OTHER = {
    b"%PDF-": "a PDF; save it as plain text in UTF-8",
    b"\xd0\xcf\x11\xe0": "an old Office document; save it as plain text in UTF-8",
    b"{\\rtf": "a rich-text document; save it as plain text in UTF-8",
    b"\x89PNG": "one picture; name a folder of pictures",
    b"\xff\xd8\xff": "one picture; name a folder of pictures",
}
_MARKS = {  # the longer ones first: the mark of UTF-32 begins with the mark of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Multi-byte encodings refuse most bytes of other encodings. In addition a share of the characters beyond ASCII must be
# typical of the language: kana, hangul, or the most frequent Chinese characters.
_ASIAN = (
    ("EUC-JP", "[\u3041-\u30fe]", 0.2),
    ("SHIFT_JIS", "[\u3041-\u30fe]", 0.2),
    ("EUC-KR", "[\uac00-\ud7a3]", 0.8),
    ("GB18030", "[的一是不了在人有我他这个们中来上大为和国地到以说时要就出会]", 0.1),
    ("BIG5", "[的一是不了在人有我他這個們中來上大為和國地到以說時要就出會]", 0.1),
)
_CUT_OFF = "unexpected end of data"  # Python's reason if a character lacks its last bytes
_WESTERN_SHARE = 0.3  # no western European language has a larger share of bytes beyond ASCII


def other_than_text(content: bytes, path: Path) -> str | None:
    """Return what a file is instead of UTF-8 text, with the remedy; None if its first bytes do not show it."""
    file = _for_a_shell(path)
    for start, (name, command) in _PACKED.items():
        if content.startswith(start):
            return f"is packed with {name}; unpack it first: {command.format(file)}"
    for start, name in _OTHER.items():
        if content.startswith(start):
            return f"is {name}"
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), None) or _without_mark(content)
    if encoding:
        return f"is text in {encoding}; save it as UTF-8: {_iconv(encoding, file)}"
    if b"\0" in content:
        return HAS_NUL
    return None


def not_utf8(error: UnicodeDecodeError, path: Path) -> str:
    """Return what to do with a text that is not UTF-8: it is cut off, or in another encoding."""
    content, at = error.object, error.start
    left = len(content) - at
    if error.reason == _CUT_OFF and (left > 1 or not content[:at].isascii()):
        remains = "byte" if left == 1 else f"{left} bytes"
        return f"is cut off inside its last character, at byte {at:,}; copy it again, or remove the last {remains}"
    problem, file = f"is not UTF-8 text: byte {at:,} is 0x{content[at]:02x}", _for_a_shell(path)
    sample = content[:SAMPLE_BYTES]
    if encoding := next((name for name, own, share in _ASIAN if _share(sample, name, own) >= share), None):
        return f"{problem}. It looks like {encoding}; save it as UTF-8: {_iconv(encoding, file)}"
    visible = re.sub(rb"\s", b"", sample)
    if sum(byte > 127 for byte in visible) <= _WESTERN_SHARE * len(visible):
        return f"{problem}. Save it as UTF-8; for western European text: {_iconv('WINDOWS-1252', file)}"
    return (
        f"{problem}. Save it as UTF-8: {_iconv('ENCODING', file)}, where ENCODING is its encoding, "
        "e.g. WINDOWS-1251 or KOI8-R for Cyrillic"
    )


def _without_mark(content: bytes) -> str | None:
    """Recognise UTF-16 by its zeros: every second byte of a text that is mostly ASCII."""
    sample = content[: SAMPLE_BYTES // 2 * 2]
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    most, least = len(sample) * 0.4, len(sample) * 0.01
    if len(sample) < 2:
        return None
    if odd > most and even <= least:
        return "UTF-16LE"
    return "UTF-16BE" if even > most and odd <= least else None


def _share(sample: bytes, encoding: str, own: str) -> float:
    """Return the share of the characters beyond ASCII that are typical of a language; 0 if the bytes do not decode."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(sample)  # a character may be cut off at the end
    except UnicodeDecodeError:
        return 0.0
    others = sum(not character.isascii() for character in text)
    return len(re.findall(own, text)) / others if others else 0.0


def _for_a_shell(path: Path) -> str:
    return shlex.quote(str(path)) if str(path).isprintable() else "FILE"


def _iconv(encoding: str, file: str) -> str:
    return f"iconv -f {encoding} -t UTF-8 {file} > converted.txt"
