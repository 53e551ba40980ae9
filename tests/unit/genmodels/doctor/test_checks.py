"""Test `genmodels doctor`: its problems, its remedies, and that nothing ends it with a traceback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from genmodels.doctor import checks as doctor
from genmodels.doctor import inventory
from genmodels.doctor.checks import Check, examine
from genmodels.errors import StorageUnavailable
from genmodels.keys import Keys
from genmodels.storage import Storage, open_storage
from genmodels.storage.base import CONDITIONS_NEEDED, MAX_GET_BYTES
from genmodels.storage.marker import MARKER
from services.cli.main import app
from tests.support.asgi_client import ask
from tests.support.asgi_server import served
from tests.support.job_service import Service

COMMAND = CliRunner()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide this machine's own state from the checks."""
    monkeypatch.setattr(doctor, "PORTS", {})
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "RAY_AUTH_TOKEN_PATH", "GENMODELS_SECRETS"):
        monkeypatch.delenv(name, raising=False)


def report(url: str) -> dict[str, Check]:
    return {check.name: check for check in examine(url)}


def run(*arguments: str) -> tuple[int, str]:
    done = COMMAND.invoke(app, ["doctor", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_a_sound_storage_is_ok(storage: Storage) -> None:
    Keys(storage).create("alice", ("submit",))
    checks = report(storage.url)
    assert {checks[name].state for name in ("storage", "stored objects", "clock", "scratch")} == {"ok"}
    assert checks["stored objects"].text == "1 documents, none damaged"
    assert not checks["storage"].remedy


def test_damaged_and_stray_objects_are_named_with_what_to_do(file_storage: Storage) -> None:
    Keys(file_storage).create("alice", ("submit",))
    file_storage.put("keys/0123abcd.json", b"")
    file_storage.put("models/m/aliases/production.json", b'{"version": 3, "history": []}')
    for stray in ("keys/backup.txt", "open/.DS_Store", "models/\u2028/aliases/x.json", "jobs/a.swp"):
        file_storage.put(stray, b"")
    code, output = run("--storage", file_storage.url)
    assert code == 1
    assert "problem  damaged object   keys/0123abcd.json: it is empty. delete it and make another key" in output
    assert "models/m/aliases/production.json: version 3 is missing. set it anew: genmodels promote" in output
    assert "warning  unknown files" in output
    assert "and 1 more" in output
    code, output = run("--storage", file_storage.url, "--json")
    checks = json.loads(output)
    assert code == 1
    assert {"name", "state", "text", "remedy"} == set(checks[0])
    assert all(check["remedy"] for check in checks if check["state"] != "ok")


def test_an_object_that_cannot_be_read_hides_no_other(file_storage: Storage, tmp_path: Path) -> None:
    file_storage.put("keys/0123abcd.json", b"")
    folder = tmp_path / "storage" / "keys"
    (folder / "11111111.json").symlink_to("11111111.json")
    os.mkfifo(folder / "22222222.json")
    (folder / "33333333.json").symlink_to("/dev/zero")
    with open(folder / "44444444.json", "wb") as file:
        file.truncate(MAX_GET_BYTES + 1)
    code, output = run("--storage", file_storage.url)
    assert code == 1
    named = [line for line in output.splitlines() if line.startswith("problem  damaged object")]
    for key in ("0123abcd", "11111111", "22222222", "33333333", "44444444"):
        assert sum(f"keys/{key}.json" in line for line in named) == 1
    assert Keys(file_storage).list() == []


@pytest.mark.parametrize("where", ["", ".storage"])
def test_a_file_in_place_of_the_folder_is_named(where: str, tmp_path: Path) -> None:
    root = tmp_path / "here"
    if where:
        root.mkdir()
    (root / where).write_text("")
    code, output = run("--storage", root.as_uri())
    assert code == 1
    assert f"{root / where} is a file, but a storage must be a folder" in output
    assert "If-None-Match" not in output


def test_another_format_is_told_of_a_bucket_too(s3_storage: Storage) -> None:
    s3_storage.put(MARKER, b'{"id": "x", "format": 1}')
    assert "is written in format 1" in report(s3_storage.url)["storage"].text


@pytest.mark.parametrize("url", ["nonsense", "s3://nowhere-0000/x", "file:///proc/1/no/such", "file:///dev/null/x"])
def test_a_storage_that_cannot_be_used_is_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    code, output = run("--storage", url)
    assert "Traceback" not in output
    if url.startswith("file"):
        return  # an empty storage; the check of the disk says whether it is writable
    assert code == 1
    assert sum(line.startswith("problem  storage ") for line in output.splitlines()) == 1


def test_nothing_that_goes_wrong_within_a_check_ends_it(file_storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RecursionError

    def away(*_: Any) -> Any:
        raise StorageUnavailable("the store went away")

    for name in ("_versions", "_disks", "_secrets", "_clock"):
        monkeypatch.setattr(doctor, name, broken)
    monkeypatch.setattr(doctor, "take_inventory", away)
    checks = report(file_storage.url)
    assert checks["stored objects"].text == "the store went away"
    assert {checks[name].state for name in ("versions", "disk", "secrets", "clock")} == {"problem"}
    assert checks["storage"].state == "ok"


def test_conditional_puts_are_asked_of_the_store(file_storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    from genmodels import storage as module
    from genmodels.errors import StorageError

    def ignored(_: Storage) -> None:
        raise StorageError(f"puts over what is there; {CONDITIONS_NEEDED}")

    monkeypatch.setattr(module, "probe_conditional_puts", ignored, raising=False)
    check = report(file_storage.url)["conditional puts"]
    assert (check.state, check.text) == ("problem", f"puts over what is there; {CONDITIONS_NEEDED}")
    assert "If-None-Match" in check.remedy


@pytest.mark.parametrize(("skew", "state"), [(0.0, "ok"), (-60.0, "warning"), (60.0, "warning"), (3600.0, "problem")])
def test_clocks_that_differ(file_storage: Storage, monkeypatch: pytest.MonkeyPatch, skew: float, state: str) -> None:
    real = time.time
    Keys(file_storage).create("alice", ("submit",))

    class Clock:
        time = staticmethod(lambda: real() + skew)

    monkeypatch.setattr(doctor, "time", Clock)
    check = report(file_storage.url)["clock"]
    assert check.state == state
    if skew:
        assert ("ahead" if skew > 0 else "behind") in check.text


@pytest.mark.parametrize(
    ("free", "inodes", "files", "state"),
    [
        (10**12, 10**6, 10**7, "ok"),
        (10**9, 10**6, 10**7, "warning"),
        (10**12, 5000, 10**7, "warning"),
        (10**12, 3, 10**7, "problem"),
        (10**6, 10**6, 10**7, "problem"),
        (10**12, 0, 0, "ok"),  # a file system without a limit of inodes
    ],
)
def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, inodes: int, files: int, state: str) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_favail=inodes, f_files=files))
    assert doctor._disk("scratch", tmp_path / "not" / "there", "x").state == state


def test_versions_are_compared_with_the_pins() -> None:
    from packaging.requirements import Requirement

    assert doctor._version(Requirement("pydantic>=2")).state == "ok"
    mismatch = doctor._version(Requirement("pydantic<2"))
    assert (mismatch.state, mismatch.remedy) == ("problem", 'pip install "pydantic<2"')
    assert doctor._version(Requirement("no-such-package==1")).state == "problem"


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def test_ports_are_free_ours_or_others(file_storage: Storage) -> None:
    service = Service(file_storage)
    assert ask(service.app, "GET", "/healthz").status_code == 200
    with served(service.app) as url:
        (ours,) = doctor._port(port_of(url), "job service")
    (free,) = doctor._port(port_of(url), "job service")
    assert (ours.state, ours.text) == ("ok", "genmodels answers (job service)")
    assert (free.state, free.text) == ("ok", "free (job service)")
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.1)
        doctor_seconds = doctor.ANSWER_SECONDS
        doctor.ANSWER_SECONDS = 0.1
        try:
            (taken,) = doctor._port(other.getsockname()[1], "gateway")
        finally:
            doctor.ANSWER_SECONDS = doctor_seconds
    assert taken.state == "warning"
    assert "another program" in taken.text


def test_a_service_that_is_not_well_is_a_problem(file_storage: Storage) -> None:
    service = Service(file_storage, stalled=lambda: "the thread 'dispatch' has made no progress for 400 s")
    with served(service.app) as url:
        (check,) = doctor._port(port_of(url), "job service")
    assert (check.state, check.text) == ("problem", "the thread 'dispatch' has made no progress for 400 s")


def test_files_with_secrets_that_others_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secrets").mkdir()
    for name, mode in (("open", 0o644), ("closed", 0o600)):
        (tmp_path / "secrets" / name).write_text("secret")
        (tmp_path / "secrets" / name).chmod(mode)
    monkeypatch.setenv("GENMODELS_SECRETS", str(tmp_path / "secrets"))
    (check,) = doctor._secrets()
    assert check.state == "warning"
    assert check.remedy == f"chmod 600 {tmp_path / 'secrets' / 'open'}"
    (tmp_path / "secrets" / "open").chmod(0o400)
    (check,) = doctor._secrets()
    assert check.state == "ok"


def test_an_inventory_knows_every_object_that_a_service_leaves(file_storage: Storage) -> None:
    service = Service(file_storage)
    job = service.submit("m")
    service.move(job, "m", "failed")
    result = inventory.take_inventory(open_storage(file_storage.url))
    assert (result.damages, result.strays) == ([], [])
    assert result.documents >= 4
