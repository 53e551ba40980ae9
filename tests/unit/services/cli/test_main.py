"""Test the commands that need no Ray, as a user types them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from genmodels import __version__, models
from genmodels.registry.store import Registry
from genmodels.storage import open_storage
from services.cli import main
from services.local.up import Options
from tests.support.published_models import publish
from tests.support.tiny_jobs import make_data, model


def genmodels(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.cli.main", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_smoke_goes_the_whole_way_for_every_family(tmp_path: Path) -> None:
    make_data(tmp_path)
    entries = [model(tmp_path, family) for family in models.names()]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"name": "test", "models": entries}))
    done = genmodels(tmp_path, "validate", "job.yaml", "--smoke")
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == "ok: job.yaml: job test, 4 models (autoencoder, gan, minigpt, vae)"
    notes, answers = lines[:4], lines[4:]
    assert notes[0] == "autoencoder: pictures: 80 pictures as grey 16 x 16"
    for family, line in zip(models.names(), answers, strict=True):
        made = "continued " if models.load(family).kind == "text" else "made a PNG of 16x16, "
        assert line.startswith(f"{family}: ok: {made}")
    assert not done.stderr
    assert not (tmp_path / ".genmodels").exists()


@pytest.mark.slow
def test_smoke_says_what_does_not_fit(tmp_path: Path) -> None:
    make_data(tmp_path)
    entry = model(tmp_path, "vae") | {"data": {"path": str(tmp_path / "play.txt")}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"name": "test", "models": [entry]}))
    done = genmodels(tmp_path, "validate", "job.yaml", "--smoke")
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: job.yaml: models[0].data: vae learns from images, but this dataset has texts; choose another\n"
    )


@pytest.mark.slow
def test_models_and_promote(tmp_path: Path) -> None:
    storage = open_storage((tmp_path / ".genmodels").as_uri())
    publish(storage, "shapes", "vae")
    listed = genmodels(tmp_path, "models")
    assert listed.returncode == 0, listed.stderr
    assert "shapes" in listed.stdout
    moved = genmodels(tmp_path, "promote", "shapes@1", "staging")
    assert moved.stdout == "shapes@staging is version 1 now\n"
    assert Registry(storage).resolve("shapes@staging").version == 1


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (
            ["promote", "nothing@1"],
            1,
            "error: no model 'nothing'; `genmodels models` or GET /v1/models lists all models\n",
        ),
        (["models", "--storage", "ftp://x"], 1, "error: storage URL 'ftp://x': must be file:///"),
        (["run", "nowhere.yaml"], 2, "error: nowhere.yaml: no such file; write the path of a job spec"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], code: int, error: str) -> None:
    done = genmodels(tmp_path, *arguments)
    assert done.returncode == code
    assert done.stderr.startswith(error)
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_the_version_is_the_packages(tmp_path: Path) -> None:
    assert genmodels(tmp_path, "--version").stdout == f"genmodels {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "completed"), [("val", "validate"), ("validate --smo", "--smoke"), ("keys cr", "create")]
)
def test_shells_complete_commands_and_options(tmp_path: Path, typed: str, completed: str) -> None:
    """Call the program as the script of `genmodels --install-completion` does."""
    words = f"genmodels {typed}"
    request = {"_GENMODELS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    command = [Path(sysconfig.get_path("scripts")) / "genmodels"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | request, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [completed]


def test_help_is_grouped_and_explains_every_option(tmp_path: Path) -> None:
    shown = genmodels(tmp_path, "--help").stdout
    groups = [line.removesuffix(":") for line in shown.splitlines() if re.fullmatch(r"[A-Z][\w ]+:", line)]
    assert groups == ["Options", *HEADINGS]
    assert not [line for line in shown.splitlines() if line.startswith("  ") and line.endswith("...")], "cut off"
    for path, command in _commands(main.app):
        assert command.help, path
        for option in command.params:
            assert getattr(option, "help", None), f"{path}: {option.name}"


HEADINGS = ["On this machine alone", "Jobs on a job service", "What is stored", "Running it for others"]


def _commands(app: typer.Typer) -> Iterator[tuple[str, Any]]:
    group: Any = typer.main.get_command(app)
    waiting = [("", group)]
    while waiting:
        path, command = waiting.pop()
        for name, inner in getattr(command, "commands", {}).items():
            waiting.append((f"{path} {name}", inner))
        if path:
            yield path, command


def test_commands_of_the_job_api_need_neither_torch_nor_ray(tmp_path: Path) -> None:
    """The commands answer at once: an unreachable service is reported within seconds, retries included."""
    program = """
        import sys
        from services.cli import main
        from services.client import http
        http.FIRST_PATIENCE_SECONDS = 0
        for arguments in ("jobs", "status x", "cancel x", "logs x", "models", "submit job.yaml"):
            sys.argv = ["genmodels", *arguments.split(), "--api", "http://127.0.0.1:9"]
            try:
                main.main()
            except SystemExit as end:
                print(end.code)
        print(*sorted({"torch", "ray", "boto3", "fastapi"} & set(sys.modules)))
    """
    (tmp_path / "job.yaml").write_text("name: x")
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["1"] * 6 + [""]
    assert [line[:58] for line in done.stderr.splitlines()] == [
        "error: no job service answers at http://127.0.0.1:9; start"
    ] * 6


def test_up_hands_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("services.local.up.up", lambda storage, options: given.extend([storage.url, options]))
    options = ["--port", "8001", "--api-port", "8081", "--metrics-port", "9", "--num-cpus", "3", "--no-auth"]
    arguments = ["genmodels", "up", "--storage", tmp_path.as_uri(), *options, "--logs", "here"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert not ended.value.code
    expected = Options(port=8001, api_port=8081, metrics_port=9, auth=False, num_cpus=3, logs=Path("here"))
    assert given == [tmp_path.as_uri(), expected]


@pytest.mark.parametrize(
    "module", ["typer", "genmodels.errors", "services.cli.options", "services.cluster.environment"]
)
def test_ctrl_c_while_the_program_is_loaded_is_no_traceback(module: str) -> None:
    program = f"""
import sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == {module!r}:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
from services.cli.main import main
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "")
