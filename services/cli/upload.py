"""The form in which `genmodels data add` sends data to a job service."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from genmodels.errors import GenmodelsError
from services.console.output import tell


@contextmanager
def open_upload(path: Path) -> Iterator[IO[bytes]]:
    """Open a file as it is, or the pictures of a folder as a zip.

    A text is checked here before it is sent: so the error names the file, and a wrong text is not sent at all.
    """
    from genmodels.data.files import find_pictures, shown, skipped_note
    from genmodels.data.text import read_text
    from genmodels.data.unpack import is_zip

    try:
        if not path.is_dir():
            if not is_zip(path):
                read_text(path)
            with path.open("rb") as file:
                yield file
            return
        with tempfile.TemporaryFile(prefix="genmodels-data-") as file:
            pictures, skipped = find_pictures(path)
            if skipped:
                tell(f"{shown(path)}: {skipped_note(skipped)}")
            with zipfile.ZipFile(file, "w") as archive:  # without compression: pictures are compressed already
                for picture in pictures:
                    archive.write(picture, shown(picture.relative_to(path)))
            yield file
    except OSError as error:
        raise GenmodelsError(f"{shown(path)}: cannot be read: {error.strerror}") from None
