"""Test that commands and child processes do not depend on the user's folder, proxies, locale, terminal or TMPDIR."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from genmodels.errors import GenmodelsError
from services.cluster.environment import (
    RAY_SOCKET,
    ROOT,
    SOCKET_BYTES,
    isolated_environment,
    private_folder,
    python,
    short_tmpdir,
)
from services.cluster.processes import removed_if_killed
from services.cluster.ray_start import cluster_environment
from tests.support.live_processes import is_alive
from tests.support.ray_node import until

PROXY = "http://127.0.0.1:9"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "grpc_proxy")
SHADOWS = ("logging", "random", "typing", "json", "torch", "numpy", "ray", "rich", "httpx", "pydantic")
# As the console script that pip makes: the user's folder is not on its import path.
SCRIPT = "import sys; sys.argv[0] = 'genmodels'; from services.cli.main import main; sys.exit(main())"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a user's folder: modules with names that children import, and a clone of this project."""
    folder = tmp_path / "my [red]plays & pictures# 100%"
    folder.mkdir()
    for name in SHADOWS:
        (folder / f"{name}.py").write_text("raise SystemExit('a module of the user was imported')")
    for package in ("genmodels/genmodels", "services"):
        (folder / package).mkdir(parents=True)
    (folder / "services" / "__init__.py").write_text("raise SystemExit('a package of the user was imported')")
    return folder


def command(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    words = [sys.executable, "-P", "-c", SCRIPT, *arguments]
    return subprocess.run(words, cwd=folder, env={**os.environ, **variables}, capture_output=True, timeout=60)


@pytest.mark.parametrize("module", ["cluster.reaper", "gateway.deploy"])
def test_processes_import_nothing_of_the_users_folder(module: str, folder: Path) -> None:
    arguments = [sys.executable, "-c", "print('--port')"] if module == "cluster.reaper" else ["--help"]
    variables = {**os.environ, **isolated_environment({**os.environ, "PYTHONPATH": f":.:{folder / 'mine'}:"})}
    reader, writer = os.pipe()  # an open input, whose end would end a reaper
    try:
        done = subprocess.run(
            python(module, *arguments), cwd=folder, env=variables, stdin=reader, capture_output=True, text=True
        )
    finally:
        os.close(reader)
        os.close(writer)
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout
    assert "of the user" not in done.stdout + done.stderr


def test_one_place_starts_every_python() -> None:
    places = {path.name for path in (ROOT / "services").rglob("*.py") if "sys.executable" in path.read_text()}
    assert places == {"environment.py"}


def test_what_children_start_imports_nothing_of_it_either(folder: Path) -> None:
    """Ray's own processes know only the environment; a plain Python stands for them."""
    variables = {**os.environ, **isolated_environment(os.environ)}
    program = [sys.executable, "-c", "import logging, random, genmodels.errors, services.cluster.reaper"]
    done = subprocess.run(program, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


HOSTILE: dict[str, dict[str, str]] = {
    "proxies": dict.fromkeys(PROXIES, PROXY) | {"NO_PROXY": ""},
    "latin-1": {"PYTHONIOENCODING": "latin-1", "LC_ALL": "C"},
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "narrow": {"COLUMNS": "1", "TERM": "dumb", "NO_COLOR": "1"},
    "no width": {"COLUMNS": "0", "LINES": "0", "TERM": ""},
    "folders": {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere", "TMPDIR": "/tmp/" + "x" * 99},
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_commands_work_in_any_environment(hostile: str, folder: Path) -> None:
    storage = folder / "störe [bold]x[/bold] :smile:"
    done = command(folder, "keys", "create", "ann", "--storage", storage.as_uri(), **HOSTILE[hostile])
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert (storage / "keys").is_dir()  # by its own name, in any locale


def test_everything_at_once(folder: Path) -> None:
    variables = {name: value for some in HOSTILE.values() for name, value in some.items()}
    done = command(folder, "models", **variables)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_commands_work_with_closed_streams(closed: str, tmp_path: Path) -> None:
    """No opened file gets the descriptor of a stream, so the output goes into no other file."""
    program = "keys create ann --storage " + (tmp_path / "s").as_uri()
    words = ["bash", "-c", f'exec "{sys.executable}" -P -c "$0" {program} {closed}', SCRIPT]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (key,) = (tmp_path / "s" / "keys").iterdir()
    assert key.read_bytes().startswith(b"{")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "line"),
    [
        ("schema > /dev/full", "error: the output cannot be written: No space left on device"),
        ("--help > /dev/full", "error: the output cannot be written: No space left on device"),
        (
            "rmdir",
            "error: the current folder is gone; change to another one, or name a storage: --storage",
        ),
    ],
    ids=["schema to a full disk", "help to a full disk", "a folder that is gone"],
)
def test_what_a_command_cannot_use_is_told_in_one_line(program: str, line: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    here = f'"{sys.executable}" -P -c "$0"'
    script = f"rmdir $PWD; {here} models" if program == "rmdir" else f"{here} {program}"
    done = subprocess.run(["bash", "-c", script, SCRIPT], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines() == [line]
    assert done.returncode in (1, 2)


@pytest.mark.parametrize("broken", ["closed pipe", "full disk"])
def test_a_command_outlives_its_output(broken: str, tmp_path: Path) -> None:
    program = """
    import sys
    from services.cluster.environment import ignore_output_errors, isolate_process
    from services.console.output import console
    isolate_process()
    ignore_output_errors()
    screen = console()
    for i in range(10_000):
        print("line", i, flush=True)
        screen.print("[red]line", i)
    open("done", "w").close()
    """
    where = "/dev/full" if broken == "full disk" else "/dev/null"
    with open(where, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)],
            cwd=tmp_path,
            stdout=output if broken == "full disk" else subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    if process.stdout:
        process.stdout.close()
    assert process.stderr
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0, errors
    assert errors == b""
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_a_console_prints_names_as_they_are(encoding: str, tmp_path: Path) -> None:
    program = """
    from rich.table import Table
    from services.cluster.environment import isolate_process
    from services.console.output import console
    isolate_process()
    name = "a[red]b[/x] :smile: \\u2026 \\u9a6c \\udcff"
    screen = console()
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    screen.print(name)
    screen.rule(name)
    screen.print(table)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding).count("a[red]b[/x] :smile:") == 5


def test_proxies_are_for_other_machines() -> None:
    changes = isolated_environment({"no_proxy": "a.example, 10.0.0.0/8", "NO_PROXY": "b.example"})
    assert changes["no_proxy"] == changes["NO_PROXY"] == "a.example,10.0.0.0/8,b.example,127.0.0.1,localhost,::1"


def test_grpc_of_this_machine_knows_no_proxy() -> None:
    """Connect as Serve's proxy and replicas do."""
    program = """
    import os
    from concurrent.futures import ThreadPoolExecutor
    import grpc
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    grpc.channel_ready_future(grpc.insecure_channel(f"127.0.0.1:{port}")).result(20)
    print("ready", flush=True)
    os._exit(0)
    """
    hostile = {**os.environ, **dict.fromkeys(PROXIES, PROXY)}
    words = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(
        words, env={**hostile, **isolated_environment(hostile)}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "ready\n", done.stderr


def test_folders_of_the_environment_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes = isolated_environment({"GENMODELS_DATA": "data", "XDG_CACHE_HOME": "", "HOME": "/root"})
    assert changes["GENMODELS_DATA"] == str(tmp_path / "data")
    assert "XDG_CACHE_HOME" not in changes
    assert changes["HOME"] == "/root"


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("path", ["x" * 104, "relative", "/nowhere/at/all", "/proc"])
def test_rays_sockets_fit_whatever_the_temporary_folder(
    name: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = path if path.startswith("/") or path == "relative" else str(tmp_path / path)
    if path.startswith(str(tmp_path)):
        Path(path).mkdir()
    monkeypatch.setenv(name, path)
    with private_folder() as folder:
        assert len(os.fsencode(folder / RAY_SOCKET)) <= SOCKET_BYTES
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


@pytest.mark.parametrize("length", [75, 76, 104, 200])
def test_children_can_make_sockets_in_a_long_temporary_folder(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's forkserver, which Ray's dashboard uses, listens in TMPDIR."""
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('forkserver').Process(target=print, args=('made',))\n"
        "    process.start(), process.join()\n"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as base, private_folder() as folder:
        long = Path(base) / ("x" * (length - len(base) - 1))
        long.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(long))
        environment = {**os.environ, "TMPDIR": str(long)} | short_tmpdir(folder)
        output = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
        assert (output.stdout, output.stderr) == ("made\n", "")
        assert os.path.samefile(environment["TMPDIR"], long)
        assert (environment["TMPDIR"] == str(long)) is (length == 75)


def test_no_folder_for_sockets_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    with pytest.raises(GenmodelsError, match="RAY_TMPDIR"), private_folder():
        pass


@pytest.fixture
def killed_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "gm-1"
    folder.mkdir()
    (folder / "token").write_text("secret")
    (folder / "token").chmod(0o400)
    return folder


def test_the_folder_of_a_killed_process_goes(killed_folder: Path, tmp_path: Path) -> None:
    """The token goes with the folder. While the process lives, the folder outlives the command."""
    program = f"""
    import os, time
    from pathlib import Path
    from services.cluster.processes import ManagedProcess
    words = ["bash", "-c", "echo $$ >> pids; sleep 0.2; [ -e again ] || (touch again; exit 1) && sleep 1000"]
    folder = Path({str(killed_folder)!r})
    process = ManagedProcess("ray", words, Path("log"), lambda: True, "", os.environ, temporary=folder)
    while True:
        process.poll(lambda line: None)
        time.sleep(0.05)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path)
    pids = until(
        lambda: (tmp_path / "pids").exists() and len(w := (tmp_path / "pids").read_text().split()) == 2 and w,
        "the command was started again",
        30,
    )
    assert (killed_folder / "token").exists()
    process.kill()
    process.wait()
    until(lambda: not killed_folder.exists(), "the folder is gone", 15)
    assert not any(is_alive(int(pid)) for pid in pids)


def test_a_folder_that_no_command_uses_goes_with_its_process_too(killed_folder: Path, tmp_path: Path) -> None:
    program = f"""
    import time
    from pathlib import Path
    from services.cluster.processes import removed_if_killed
    with removed_if_killed(Path({str(killed_folder)!r})):
        Path("ready").touch()
        time.sleep(1000)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path)
    until((tmp_path / "ready").exists, "the process is ready", 30)
    assert (killed_folder / "token").exists()
    process.kill()
    process.wait()
    until(lambda: not killed_folder.exists(), "the folder is gone", 15)


def test_a_folder_stays_while_its_process_decides(killed_folder: Path) -> None:
    with removed_if_killed(killed_folder):
        pass
    assert (killed_folder / "token").exists()


def test_uv_changes_nothing_in_workers() -> None:
    """Without this, Ray starts each worker of a command under `uv run` with uv, in a copy of the working directory."""
    program = "from ray._private import ray_constants; print(ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV)"
    environment = {**os.environ, **cluster_environment()}
    output = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert output.stdout == "False\n"
