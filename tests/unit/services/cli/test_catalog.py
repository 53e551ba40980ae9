"""The commands on what is stored (models, promote, pull, gc, data, delete), with the same tests for both catalogs:
a storage that the command opens itself, and a job service.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from genmodels.registry import gc
from genmodels.registry.store import Registry
from genmodels.runs.jobs import Jobs
from genmodels.spec.parse import parse_spec
from genmodels.storage import Storage, open_storage
from genmodels.storage.documents import now
from tests.support.cli_service import SPEC, Command, submitted
from tests.support.published_models import publish


@pytest.fixture(params=["service", "storage"])
def where(api: str, store: Storage, request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Return options with which a command uses the service (named by GENMODELS_API) or opens its storage."""
    return () if request.param == "service" else ("--storage", store.url)


def test_models_promote_pull_and_delete(
    command: Command, store: Storage, where: tuple[str, ...], tmp_path: Path
) -> None:
    for step in (1, 2):
        publish(store, "vae", "vae", step=step, alias="production" if step == 1 else None)
    row = next(line for line in command("models", *where)[1].splitlines() if "production: 1" in line)
    assert "1, 2" in row
    assert command("promote", "vae@latest", "staging", *where)[1] == "vae@staging is version 2 now\n"
    assert Registry(store).resolve("vae@staging").version == 2
    code, out, _ = command("pull", "vae@2", *where)
    assert code == 0
    assert re.fullmatch(r"vae@2: \d+ files, [\d.]+ KiB, in vae-2\n", out)
    assert (tmp_path / "vae-2" / "config.json").read_text().startswith("{")
    files = {path.relative_to(tmp_path / "vae-2").as_posix() for path in (tmp_path / "vae-2").rglob("*.*")}
    assert files == set(Registry(store).version("vae", 2).files)
    code, _, err = command("pull", "vae@2", *where)
    assert (code, err) == (1, "error: vae-2 exists and is not empty; name a new folder\n")
    assert command("pull", "vae@7", "new", *where)[0] == 1
    assert not (tmp_path / "new").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".vae")]
    assert command("pull", "vae", "named", *where)[1].startswith("vae@1: ")

    code, _, err = command("delete", "vae@2", *where)
    assert code == 2
    assert err == "error: Delete version vae@2? There is no terminal to ask on: add --yes\n"
    assert command("delete", "vae@latest", "--yes", *where)[0] == 2
    code, _, err = command("delete", "vae@2", "--yes", *where)
    assert code == 1  # an alias names it
    command("promote", "vae@1", "staging", *where)
    assert command("delete", "vae@2", "--yes", *where)[1] == "version vae@2 is deleted\n"
    assert Registry(store).versions("vae") == [1]


def test_delete_a_job(command: Command, store: Storage, where: tuple[str, ...]) -> None:
    job = submitted(command)
    code, _, err = command("delete", job, "--yes", *where)
    assert (code, err) == (1, f"error: job {job} has not ended; cancel it first\n")
    Jobs(store).close(job, now(), {"vae-digits": "cancelled", "gan-digits": "cancelled"})
    assert command("delete", job, "--yes", *where)[1] == f"job {job} is deleted\n"
    assert not Jobs(store).exists(job)


def test_datasets(command: Command, where: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "novel.txt").write_text("It was a dark and stormy night. " * 200)
    code, out, err = command("data", "add", "novel", "novel.txt", *where)
    assert code == 0, err
    assert out.startswith("novel: 6,400 characters")
    assert err == "in a spec: data: {dataset: novel}\n"
    for name in ("cats", "dogs"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            picture = np.random.default_rng(i).integers(0, 255, (20, 20), np.uint8)
            Image.fromarray(picture).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / "notes.txt").write_text("private")
    code, out, _ = command("data", "add", "pets", "photos", "--image-size", "16", "--channels", "1", *where)
    assert code == 0
    assert out.startswith("pets: 40 pictures")
    listed = {dataset["name"]: dataset for dataset in json.loads(command("data", "list", "--json", *where)[1])}
    assert (listed["pets"]["examples"], listed["digits"]["built_in"]) == (40, True)
    table = command("data", "list", *where)[1]
    assert "6,400 characters" in table
    assert "built in" in table
    (tmp_path / "use.yaml").write_text(SPEC.replace("dataset: digits", "dataset: pets", 1))
    assert command("submit", "use.yaml")[0] == 0

    (tmp_path / "short.txt").write_text("too short")
    for arguments in (("novel", "short.txt"), ("novel", "nowhere"), ("digits", "novel.txt"), ("A b", "novel.txt")):
        code, _, err = command("data", "add", *arguments, *where)
        assert (code, err.count("\n")) == (1, 1), err
    assert command("data", "add", "pets", "photos", "--channels", "2", *where)[0] == 2
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        archive.write(tmp_path / "photos" / "cats" / "0.png", "0.png")
    assert "too few pictures" in command("data", "add", "pets", "pets.zip", *where)[2]


def test_what_is_deleted_is_looked_at_first(command: Command, store: Storage, where: tuple[str, ...]) -> None:
    for what in ("nope", "nope@1", "nope@production", "vae@7", "no pe"):
        publish(store, "vae", "vae")
        code, _, err = command("delete", what, *where)
        assert (code, err.count("\n")) == (1, 1), err
        assert "no terminal" not in err
    code, _, err = command("data", "delete", "nope", *where)
    assert (code, err) == (1, "error: no dataset 'nope'; `genmodels data list` lists all datasets\n")
    assert command("delete", "vae@live", "--yes", *where)[0] == 2


def test_delete_an_alias_and_a_whole_model(command: Command, store: Storage, where: tuple[str, ...]) -> None:
    publish(store, "vae", "vae")
    job, _ = Jobs(store).submit(parse_spec(SPEC.replace("vae-digits", "vae").encode(), "spec"))
    code, _, err = command("delete", "vae@production", *where)
    assert (code, err.partition("?")[0]) == (2, "error: Delete alias vae@production, which names version 1")
    done = command("delete", "vae@production", "--yes", *where)
    assert done[:2] == (0, "alias vae@production is deleted; version 1 stays\n")
    assert Registry(store).aliases("vae") == {}
    code, _, err = command("delete", "vae", *where)
    assert code == 2
    assert re.match(
        r"error: Delete model vae \(1 version, no alias, [\d.]+ KiB\)\? The checkpoints, samples and logs", err
    )
    assert f"stay: {job}; --with-runs deletes them too" in err
    code, _, err = command("delete", "vae", "--yes", *where)
    assert (code, err) == (1, f"error: model 'vae': job {job} trains it and has not ended; cancel it first\n")
    assert Registry(store).versions("vae") == [1]
    Jobs(store).close(job, now(), {"vae": "cancelled", "gan-digits": "cancelled"})
    code, out, _ = command("delete", "vae", "--with-runs", "--yes", *where)
    assert (code, out) == (
        0,
        f"model vae is deleted. The checkpoints, samples and logs of its runs are deleted too: {job}.\n",
    )
    assert Registry(store).models() == []
    assert command("delete", "vae", "--yes", *where)[2].startswith("error: no job or model 'vae'; ")


def test_a_job_and_a_model_of_one_name(command: Command, store: Storage, where: tuple[str, ...]) -> None:
    job = submitted(command) if not where else Jobs(store).submit(parse_spec(SPEC.encode(), "spec"))[0]
    publish(store, job, "vae")
    code, _, err = command("delete", job, "--yes", *where)
    assert (code, err) == (
        2,
        f"error: {job} is a job and a model: write `genmodels delete {job} --model` for the model\n",
    )
    assert command("delete", job, "--model", "--yes", *where)[1] == f"model {job} is deleted.\n"
    assert Jobs(store).exists(job)


def test_a_dataset_is_replaced_and_deleted_only_when_that_is_meant(
    command: Command, store: Storage, where: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "novel.txt").write_text("It was a dark and stormy night. " * 200)
    (tmp_path / "other.txt").write_text("Call me Ishmael. " * 200)
    assert command("data", "add", "novel", "novel.txt", *where)[0] == 0
    assert command("data", "add", "novel", "novel.txt", *where)[0] == 0  # the same again
    code, _, err = command("data", "add", "novel", "other.txt", *where)
    assert code == 2
    assert re.match(r"error: dataset 'novel' exists with another content: 6,400 characters.* Replace it\? ", err)
    assert err.endswith("There is no terminal to ask on: add --replace\n")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for answer, code, size in ((False, 1, "6,400"), (True, 0, "3,400")):
        monkeypatch.setattr("typer.confirm", lambda question, err, answer=answer: answer)
        assert command("data", "add", "novel", "other.txt", *where)[0] == code
        assert f"{size} characters" in command("data", "list", *where)[1]
    assert command("data", "add", "novel", "novel.txt", "--replace", *where)[0] == 0
    code, out, _ = command("data", "delete", "novel", "--yes", *where)
    assert code == 0
    assert out.startswith("dataset novel is deleted. No run was trained on it.\n")
    assert store.list("datasets/novel/") == ["datasets/novel/gc-lease.json"]
    assert "novel" not in command("data", "list", *where)[1]


@pytest.mark.parametrize("name", ["a b.txt", "caf\udce9.txt"])
def test_what_is_wrong_with_a_text_names_the_file(api: str, command: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"caf\xe9 " * 1000)
    code, _, err = command("data", "add", "novel", name)
    assert (code, err.count("\n")) == (1, 1)
    assert "iconv -f WINDOWS-1252 -t UTF-8 'a b.txt' >" in err or "caf%E9.txt" in err


@dataclass
class Garbage:
    """The result of `genmodels.registry.gc.gc`, with two items to remove."""

    storage: Storage
    items: list[SimpleNamespace]

    def carry_out(self) -> None:
        for item in self.items:
            self.storage.delete(item.key)


def collect(storage: Storage, everything: bool) -> Garbage:
    whys = {"junk/a": "an upload that never ended", "junk/b": "an upload that never ended", "junk/c": "no version"}
    there = [SimpleNamespace(key=key, bytes=1024**2, why=why) for key, why in whys.items() if storage.exists(key)]
    return Garbage(storage, there)


def test_gc_says_first_what_it_would_free(
    command: Command, store: Storage, monkeypatch: pytest.MonkeyPatch, where: tuple[str, ...]
) -> None:
    monkeypatch.setattr(gc, "gc", collect)
    assert command("gc", *where)[1] == "there is nothing to remove\n"
    for name in "abc":
        store.put(f"junk/{name}", b"")
    code, out, err = command("gc", *where)
    assert code == 2
    assert err == "error: Remove 3 items, 3 MiB? There is no terminal to ask on: add --yes\n"
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "MiB" in line]
    assert rows == [["2", "2 MiB", "an upload that never ended"], ["1", "1 MiB", "no version"]]
    code, out, err = command("gc", "--dry-run", *where)
    assert (code, out.splitlines()[-1], err) == (0, "would remove 3 items, 3 MiB", "")
    assert command("gc", "--dry-run", "--yes", *where)[0] == 0
    assert len(store.list("junk/")) == 3
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for answer, code, remaining in (("n\n", 0, 3), ("y\n", 0, 0)):
        monkeypatch.setattr("typer.confirm", lambda question, err, answer=answer: answer == "y\n")
        assert command("gc", *where)[0] == code
        assert len(store.list("junk/")) == remaining


def test_the_same_without_a_service(command: Command, tmp_path: Path) -> None:
    """Without --api the commands on stored objects open the storage, here the folder .genmodels."""
    store = open_storage((tmp_path / ".genmodels").as_uri())
    publish(store, "vae", "vae")
    (tmp_path / "novel.txt").write_text("It was a dark and stormy night. " * 200)
    assert command("pull", "vae@latest", "here")[0] == 0
    assert (tmp_path / "here" / "model.safetensors").is_file()
    assert command("data", "add", "novel", "novel.txt")[0] == 0
    assert "novel" in command("data", "list")[1]
    code, _, err = command("delete", "vae@1", "--yes")
    assert code == 1
    code, _, err = command("delete", "shapes-01234567", "--yes")
    listed = "`genmodels models` and `genmodels jobs` list all of them"
    assert err == f"error: no job or model 'shapes-01234567'; {listed}\n"


def test_a_storage_that_is_typed_outdoes_a_service_of_the_environment(
    api: str, command: Command, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, "vae", "vae")
    assert "vae" in command("models")[1]
    assert "vae" not in command("models", "--storage", "file:///nowhere-at-all")[1]
    monkeypatch.setenv("GENMODELS_STORAGE", "file:///nowhere-at-all")
    assert "vae" in command("models")[1]
