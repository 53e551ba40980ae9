"""`make secrets` creates what is missing, keeps what is there, and says which."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

NAMES = {"ray_token", "grafana_password", "api_key", "s3_credentials", "s3.json"}


SCRIPT = ROOT / "docker" / "secrets.sh"


def make(folder: Path | str, cwd: Path | None = None) -> str:
    command = ["sh", str(SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_all_are_created_once(tmp_path: Path) -> None:
    first = make(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == NAMES
    before = {name: (tmp_path / name).read_bytes() for name in NAMES}
    assert all(f"created  {tmp_path / name}" in first for name in NAMES)
    (identity,) = json.loads(before["s3.json"])["identities"]
    assert identity["credentials"][0]["secretKey"] in before["s3_credentials"].decode()
    again = make(tmp_path)
    assert all(f"kept     {tmp_path / name} (was there)" in again for name in NAMES)
    assert {name: (tmp_path / name).read_bytes() for name in NAMES} == before


@pytest.mark.parametrize("content", ["[default]\naws_access_key_id = mine\n", ""])
@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_file_that_is_there_stays_as_it_is(tmp_path: Path, name: str, content: str) -> None:
    """Also an empty one. The other half of the pair of S3 keys is not invented."""
    (tmp_path / name).write_text(content)
    output = make(tmp_path)
    assert (tmp_path / name).read_text() == content
    assert f"kept     {tmp_path / name} (was there)" in output
    other = {"s3_credentials": "s3.json", "s3.json": "s3_credentials"}.get(name)
    assert {path.name for path in tmp_path.iterdir()} == NAMES - {other}
    if other is None and not content:
        assert "it is empty: delete it" in output


def test_a_link_to_nothing_is_not_overwritten(tmp_path: Path) -> None:
    """An operator for secrets may write its target later."""
    (tmp_path / "api_key").symlink_to(tmp_path / "later" / "api_key")
    make(tmp_path)
    assert (tmp_path / "api_key").is_symlink()


def test_two_at_once_make_one_pair_of_keys(tmp_path: Path) -> None:
    folder = tmp_path / "a folder's name"
    both = [subprocess.Popen(["sh", str(SCRIPT), str(folder)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    output = "".join(one.communicate(timeout=60)[0] for one in both)
    assert [one.returncode for one in both] == [0, 0]
    assert output.count("created ") == output.count("kept ") == len(NAMES)
    (identity,) = json.loads((folder / "s3.json").read_text())["identities"]
    assert identity["credentials"][0]["secretKey"] in (folder / "s3_credentials").read_text()
    assert {path.name for path in folder.iterdir()} == NAMES


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / ".new").mkdir()
    done = subprocess.run(["sh", str(SCRIPT), str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode
    assert "created" not in done.stdout


def test_the_lock_of_another_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    script = f'sleep() {{ :; }}; set -- "{tmp_path}"; . "{SCRIPT}"'  # without the waits
    done = subprocess.run(["sh", "-c", script, str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert done.returncode
    assert f"rmdir '{tmp_path / '.lock'}'" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_the_folder_is_one_of_the_caller(tmp_path: Path) -> None:
    make("mine", cwd=tmp_path)
    assert {path.name for path in (tmp_path / "mine").iterdir()} == NAMES


def test_the_guide_names_only_files_that_it_makes(tmp_path: Path) -> None:
    make(tmp_path)
    guide = (ROOT / "k8s" / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} >= set(re.findall(r"=\.secrets/(\S+)", guide)) != set()
