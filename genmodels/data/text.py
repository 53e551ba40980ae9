"""Read text datasets: characters as tokens, and windows of tokens."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from genmodels.data.encoding import HAS_NUL, SAMPLE_BYTES, not_utf8, other_than_text
from genmodels.data.files import shown
from genmodels.data.tokens import hold
from genmodels.errors import DataError, RequestError
from genmodels.family import TextInfo

MAX_BYTES = 2**30
PART = 2**20  # characters that are converted at once
MIN_CHARACTERS, MIN_DIFFERENT = 2_000, 2
BYTE_ORDER_MARK = "\ufeff"  # at the start of a file, and inside a file that was joined from several
EXAMPLE = "The "  # a prompt whose characters occur in most texts


class Tokenizer(Protocol):
    """Convert text to token ids and back. Another kind needs a class of this form and a case in `load_tokenizer`."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, param: str = "prompt") -> list[int]:
        """Return the token ids of a text. Raises RequestError (400) with `param` and the unknown characters."""

    def normalize(self, text: str) -> str:
        """Rewrite a text in the way in which the training text was rewritten before training."""

    @property
    def example_prompt(self) -> str:
        """Return a short prompt that `encode` accepts, to suggest to users."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of token ids."""

    def to_json(self) -> bytes:
        """Return the bytes that `load_tokenizer` reads."""


def load_tokenizer(content: bytes) -> Tokenizer:
    """Load the tokenizer in a `tokenizer.json`. Raises DataError if it is damaged or of an unknown type."""
    try:
        fields = json.loads(content)
        if fields["type"] == "char":
            return CharTokenizer.from_json(content)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"tokenizer.json is damaged: {error!r}") from error
    raise DataError(f"tokenizer.json has the unknown type {fields['type']!r}, expected 'char'")


def unix_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


class CharTokenizer:
    """Use one token per character; ids follow the sorted vocabulary."""

    def __init__(self, vocab: str) -> None:
        if len(set(vocab)) != len(vocab) or not vocab:
            raise ValueError("the vocabulary of a character tokenizer must have different characters, at least one")
        if half := re.search("[\ud800-\udfff]", vocab):
            raise ValueError(f"the vocabulary has half a character, {half[0]!r}, which no text in UTF-8 has")
        self.vocab = vocab
        self._ids = {character: token for token, character in enumerate(vocab)}

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """Make a tokenizer of all characters of a text."""
        return cls("".join(sorted(set(text))))

    @classmethod
    def from_json(cls, content: bytes) -> CharTokenizer:
        vocab = json.loads(content)["vocab"]
        if not isinstance(vocab, str):
            raise TypeError(f"vocab: got {type(vocab).__name__}, expected a string")
        return cls(vocab)

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Return the smallest type of unsigned integers that has room for all token ids."""
        return np.min_scalar_type(self.vocab_size - 1)

    @property
    def example_prompt(self) -> str:
        if set(EXAMPLE) <= self._ids.keys():
            return EXAMPLE
        kinds = (str.isupper, str.isalpha, str.isalnum, lambda character: character.isprintable() and character != " ")
        return next((letter for kind in kinds for letter in self.vocab if kind(letter)), self.vocab[0])

    def encode(self, text: str, param: str = "prompt") -> list[int]:
        """Return the token ids of a text. Raises RequestError (400) with the unknown characters."""
        text = self.normalize(text)
        unknown = sorted(set(text) - self._ids.keys())
        if unknown:
            named = " ".join(map(repr, unknown[:10])) + (" and others" if len(unknown) > 10 else "")
            raise RequestError(
                f"{param} has characters that this model has never seen: {named}; "
                f"it knows {''.join(self.vocab[:200])!r}" + (" and others" if self.vocab_size > 200 else ""),
                param=param,
                code="unknown_characters",
            )
        return [self._ids[character] for character in text]

    def normalize(self, text: str) -> str:
        """Convert line ends to Unix line ends, unless the model has learnt others."""
        return text if "\r" in self._ids else unix_line_ends(text)

    def encode_array(self, text: str) -> np.ndarray:
        """Return the token ids of a text with known characters, as the smallest unsigned integers: (len(text),)."""
        codes = np.array([ord(character) for character in self.vocab])
        ids = np.zeros(codes.max() + 1, self.dtype)
        ids[codes] = np.arange(self.vocab_size)
        tokens = np.empty(len(text), ids.dtype)
        for part in _parts(text):
            tokens[part] = ids[np.frombuffer(text[part].encode("utf-32-le"), "<u4")]
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(self.vocab[token] for token in tokens)

    def to_json(self) -> bytes:
        return json.dumps({"type": "char", "vocab": self.vocab}, ensure_ascii=False).encode()


Pieces = Callable[[], Iterable[str]]  # yields a text piece by piece, anew at each call


@dataclass(frozen=True)
class TextFacts:
    """Hold what one reading of a text shows."""

    characters: int
    vocab: str
    digest: str

    @classmethod
    def of(cls, pieces: Pieces) -> TextFacts:
        count, characters, digest = 0, set[str](), hashlib.sha256()
        for piece in pieces():
            count += len(piece)
            characters.update(piece)
            _feed(digest, piece)
        return cls(count, "".join(sorted(characters)), digest.hexdigest())


class TextData:
    """A text: the first nine tenths are for training, the last tenth for validation."""

    def __init__(self, text: str | Pieces, notes: list[str] | None = None, facts: TextFacts | None = None) -> None:
        """Args:
        text: the text, or the function that yields it: a large text is never in memory as a whole.
        facts: of the text, if they are known.
        """
        pieces: Pieces = (lambda: [text]) if isinstance(text, str) else text
        facts = facts or TextFacts.of(pieces)
        self.digest, self.notes = facts.digest, notes or []
        tokenizer = CharTokenizer(facts.vocab)
        self._use(tokenizer, facts.characters, lambda: map(tokenizer.encode_array, _unchanged(pieces, facts)))

    def set_tokenizer(self, tokenizer: CharTokenizer) -> None:
        """Use the token ids of another tokenizer, that of the model from which training starts.

        Raises:
            DataError: the text has characters that the tokenizer does not know.
        """
        if tokenizer.vocab == self.tokenizer.vocab:
            return
        check_vocabulary(self.tokenizer.vocab, tokenizer)
        ids, old = tokenizer.encode_array(self.tokenizer.vocab), self._tokens
        self._use(tokenizer, len(old), lambda: (ids[old[part]] for part in _parts(old)))

    def _use(self, tokenizer: CharTokenizer, count: int, parts: Callable[[], Iterable[np.ndarray]]) -> None:
        self.tokenizer, self.info = tokenizer, TextInfo(vocab_size=tokenizer.vocab_size)
        vocabulary = hashlib.sha256(tokenizer.vocab.encode()).hexdigest()
        self._tokens = hold(f"{self.digest}-{vocabulary[:16]}", count, tokenizer.dtype, parts)
        border = count * 9 // 10
        self.train, self.val = self._tokens[:border], self._tokens[border:]

    def assets(self) -> dict[str, bytes]:
        """Return the files to store in a checkpoint: the tokenizer."""
        return {"tokenizer.json": self.tokenizer.to_json()}

    def preview_file(self, name: str, tokens: np.ndarray) -> tuple[str, bytes]:
        """Return the name and content of a file that shows token ids (n,) as text."""
        return f"{name}.txt", self.tokenizer.decode(tokens.tolist()).encode()

    def arrays(self, name: Literal["train", "val"]) -> dict[str, np.ndarray]:
        """Return all of `train` or `val`: `tokens`, unsigned integers (n,)."""
        return {"tokens": self.train if name == "train" else self.val}

    def split(self, name: Literal["train", "val"], block_size: int | None = None) -> TrainWindows | ValWindows:
        """Return windows of `block_size` tokens of `train` or `val`. Raises DataError if the text is too short."""
        if block_size is None:
            raise ValueError("a split of a text needs a block_size")
        if name == "val":
            return ValWindows(self.val, block_size)
        check_block_size(len(self.train), block_size)
        return TrainWindows(self.train, block_size)


def read_text(path: Path) -> TextData:
    """Read a text file (UTF-8) of the user.

    Raises:
        DataError: the file is missing, not a regular file, too large, too short, or not UTF-8 text.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"data.path: {shown(path)} is not a regular file")
        if status.st_size > MAX_BYTES:
            raise DataError(
                f"data.path: {shown(path)} has {status.st_size:,} bytes, the limit is {MAX_BYTES:,} (1 GiB)"
            )
        with path.open("rb") as file:
            head = file.read(SAMPLE_BYTES)
    except OSError as error:
        raise DataError(f"data.path: {shown(path)} cannot be read: {error.strerror}") from error
    if other := other_than_text(head, path):
        raise DataError(f"data.path: {shown(path)} {other}")
    pieces = partial(_read_pieces, path)
    facts = TextFacts.of(pieces)
    if facts.characters < MIN_CHARACTERS:
        raise DataError(
            f"data.path: {shown(path)} has {_characters(facts.characters)}, too few to train on; add text, at least "
            f"{MIN_CHARACTERS:,} are needed"
        )
    if len(facts.vocab) < MIN_DIFFERENT:
        raise DataError(
            f"data.path: {shown(path)} repeats one character ({facts.vocab!r}), so there is nothing to learn; a text "
            f"needs at least {MIN_DIFFERENT} different characters"
        )
    data = TextData(pieces, facts=facts)
    data.notes.append(
        f"{shown(path.name)}: {_characters(facts.characters)}, {data.info.vocab_size} different ones; "
        f"the last {len(data.val):,} are for validation"
    )
    return data


def _read_pieces(path: Path) -> Iterator[str]:
    """Yield a text of the user with Unix line ends and without byte order marks. Raises DataError."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    try:
        with path.open("rb") as file:
            while content := file.read(PART):
                if b"\0" in content:
                    raise DataError(f"data.path: {shown(path)} {HAS_NUL}")
                yield decoder.decode(content).replace(BYTE_ORDER_MARK, "")
        yield decoder.decode(b"", final=True).replace(BYTE_ORDER_MARK, "")
    except UnicodeDecodeError:
        raise DataError(f"data.path: {shown(path)} {_why_not_utf8(path)}") from None
    except OSError as error:
        raise DataError(f"data.path: {shown(path)} cannot be read: {error.strerror}") from error


def _why_not_utf8(path: Path) -> str:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError as error:
        return not_utf8(error, path)
    return "changed while it was read; start again"


def _unchanged(pieces: Pieces, facts: TextFacts) -> Iterator[str]:
    """Yield a text that was read before: its tokens may be kept under the digest of that reading.

    Raises:
        DataError: at the end, if it is another text now.
    """
    digest = hashlib.sha256()
    for piece in pieces():
        _feed(digest, piece)
        yield piece
    if digest.hexdigest() != facts.digest:
        raise DataError("data: the text changed while it was read; start again")


def _feed(digest: Any, text: str) -> None:
    for part in _parts(text):
        digest.update(text[part].encode())


def check_vocabulary(vocabulary: str, tokenizer: CharTokenizer) -> None:
    """Raise DataError if a text has characters that a tokenizer does not know."""
    if unknown := sorted(set(vocabulary) - set(tokenizer.vocab)):
        named = " ".join(map(repr, unknown[:10])) + (" and others" if len(unknown) > 10 else "")
        raise DataError(f"the text has characters that the model's tokenizer does not know: {named}")


def training_windows(characters: int, block_size: int) -> int:
    """Return the number of windows in an epoch of a training text, for any offset of the epoch."""
    return (characters - block_size) // block_size


def validation_windows(characters: int, block_size: int) -> int:
    """Return the number of windows of a validation text; the last one may be padded."""
    return (characters - 2) // block_size + 1


def check_block_size(characters: int, block_size: int) -> None:
    """Raise DataError if a training text is too short for one window."""
    if characters < 2 * block_size:
        raise DataError(
            f"the training text has {_characters(characters)}, block_size {block_size} needs at least "
            f"{2 * block_size:,}: set model.block_size to {characters // 2} or less, or add more text"
        )


def _characters(count: int) -> str:
    return "1 character" if count == 1 else f"{count:,} characters"


@dataclass(frozen=True)
class TrainWindows:
    """Give windows that do not overlap, from a different offset in each epoch; their number is always the same."""

    tokens: np.ndarray
    block_size: int

    def __len__(self) -> int:
        return training_windows(len(self.tokens), self.block_size)

    def take(self, index: np.ndarray, epoch: np.ndarray) -> dict[str, np.ndarray]:
        """Return `tokens` and the `targets` that follow them, both int64 (n, block_size); index and epoch are (n,)."""
        start = _mix(epoch) % self.block_size + index * self.block_size
        window = self.tokens[start[:, None] + np.arange(self.block_size + 1)].astype(np.int64)
        return {"tokens": window[:, :-1].copy(), "targets": window[:, 1:].copy()}


@dataclass(frozen=True)
class ValWindows:
    """Give consecutive windows from the start: every character except the first is predicted exactly once.

    The last window is padded with `targets` of -1, which losses ignore.
    """

    tokens: np.ndarray
    block_size: int

    def __len__(self) -> int:
        return validation_windows(len(self.tokens), self.block_size)

    def take(self, index: np.ndarray, epoch: np.ndarray) -> dict[str, np.ndarray]:
        """Return `tokens` and the `targets` that follow them, both int64 (n, block_size); the same in every epoch."""
        position = index[:, None] * self.block_size + np.arange(self.block_size + 1)
        inside = position < len(self.tokens)
        window = self.tokens[np.where(inside, position, 0)].astype(np.int64)
        return {
            "tokens": np.where(inside, window, 0)[:, :-1].copy(),
            "targets": np.where(inside, window, -1)[:, 1:].copy(),
        }


def _parts(text: str | np.ndarray) -> Iterator[slice]:
    """Yield the parts in which a text is converted: UTF-32 takes four bytes per character, so not all at once."""
    return (slice(start, start + PART) for start in range(0, len(text), PART))


def _mix(number: np.ndarray) -> np.ndarray:
    """Hash non-negative integers (splitmix64, G. Steele et al. 2014) to non-negative int64."""
    z = number.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)
