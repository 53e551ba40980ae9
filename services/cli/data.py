"""TODO"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from genmodels.errors import DatasetExists, GenmodelsError, SpecError
from services.cli.options import AsJson, MaybeApi, StorageUrl, agreed, service, storage
from services.console.output import console, print_json, tell

if TYPE_CHECKING:
    pass


data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@data_app.command("add")
def data_add(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Name of the dataset in specs: `data: {dataset: NAME}`.", show_default=False
        ),
    ],
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A text file, a folder of pictures, or a zip of a folder.", show_default=False
        ),
    ],
    image_size: Annotated[
        int | None, typer.Option(help="Side of the square pictures, in pixels; default: 32.", show_default=False)
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(
            help="Channels: 1 (grey) or 3 (colour); default: 1 if every picture is grey, else 3.", show_default=False
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a dataset of this name without asking.")] = False,
    storage_url: StorageUrl = None,
    api: MaybeApi = None,
) -> None:
    """Add a text or pictures to the storage, after a check. Specs name the dataset on every machine."""
    if channels not in (None, 1, 3):
        raise SpecError(f"--channels: got {channels}, expected 1 (grey) or 3 (colour)")
    remote = service(context, api)

    def add(replace: bool) -> dict[str, Any]:
        if remote is None:
            from genmodels.data import uploads

            store = storage(storage_url)
            added, _ = uploads.add(store, name, path, image_size, channels, replace=replace)  # type: ignore[arg-type]
            return added.model_dump(mode="json")
        with _streamable(path) as file, console(stderr=True).status("Sending"):
            return remote.add_dataset(name, file, replace=replace, image_size=image_size, channels=channels)

    with remote or nullcontext():
        try:
            dataset = add(replace)
        except DatasetExists as error:
            question = f"{error}. Replace it? Jobs that were submitted keep what they had."
            if not agreed(question, False, "--replace"):
                raise typer.Abort from None
            dataset = add(True)
    print(f"{name}: {'; '.join(dataset['notes'])}")
    tell(f"in a spec: data: {{dataset: {name}}}")


@data_app.command("list")
def data_list(
    context: typer.Context, storage_url: StorageUrl = None, api: MaybeApi = None, as_json: AsJson = False
) -> None:
    """List the datasets that a spec may name: built-in and added."""
    from services.console.tables import datasets_table

    remote = service(context, api)
    if remote is None:
        from genmodels.data import DATASETS, uploads

        built_in = [{"name": s.name, "kind": s.kind, "what": s.what, "built_in": True} for s in DATASETS.values()]
        added = uploads.catalog(storage(storage_url))
        found = [*built_in, *({**dataset.model_dump(mode="json"), "built_in": False} for dataset in added)]
    else:
        with remote:
            found = remote.datasets()
    if as_json:
        print_json(found)
    else:
        console().print(datasets_table(found))


@contextmanager
def _streamable(path: Path) -> Iterator[IO[bytes]]:
    """A file as it is, a folder's pictures as a zip: the form in which data travels.

    A text is checked here first: what is said of it names the file, and nothing is sent in vain.
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
            with zipfile.ZipFile(file, "w") as archive:  # pictures are packed already
                for picture in pictures:
                    archive.write(picture, shown(picture.relative_to(path)))
            yield file
    except OSError as error:
        raise GenmodelsError(f"{shown(path)}: cannot be read: {error.strerror}") from None
