from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import genmodels.spec.parse
from genmodels.errors import DataError
from tests.support.cli_runner import Run, run, type_in
from tests.support.paths import ROOT

__all__ = ["run"]

GOOD = """\
name: study
models:
  - name: tiny
    model: {family: minigpt, n_embd: 64, n_head: 4}
    data: {path: my.txt}
    train: {learning_rate: 1e-4}
"""


def test_a_sound_spec_is_summed_up(run: Run, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(GOOD + GOOD[GOOD.index("  - name") :].replace("tiny", "small"))
    (tmp_path / "my.txt").write_text("Call me Ishmael.\n" * 1000)
    note = "my.txt: 17,000 characters, 11 different ones; the last 1,700 are for validation"
    summed_up = f"ok: job.yaml: job study, 2 models (minigpt, minigpt)\ntiny: {note}\nsmall: {note}\n"
    assert run("validate", "job.yaml") == (0, summed_up, [])


def test_a_model_that_this_machine_cannot_train_is_told(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The spec may be for larger machines, so it is not refused."""
    monkeypatch.setattr("genmodels.sizing.machine.memory_limit", lambda: 2**20)
    (tmp_path / "job.yaml").write_text(GOOD)
    (tmp_path / "my.txt").write_text("Call me Ishmael.\n" * 1000)
    code, out, errors = run("validate", "job.yaml")
    assert (code, errors) == (0, [])
    assert "\ntiny: this machine cannot train it: model.n_" in out
    assert "of memory to train (weights, " in out


def test_a_dash_reads_the_spec_from_standard_input(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors name the standard input, and paths in the spec are relative to the working folder."""
    (tmp_path / "my.txt").write_text("Call me Ishmael.\n" * 1000)
    type_in(monkeypatch, GOOD)
    code, out, errors = run("validate", "-")
    assert (code, errors) == (0, [])
    assert out.startswith("ok: standard input: job study, 1 model (minigpt)\n")
    type_in(monkeypatch, GOOD.replace("1e-4", "fast"))
    code, out, errors = run("validate", "-")
    assert (code, out, len(errors)) == (2, "", 1)
    assert errors[0].startswith("error: standard input:6: models[0].train.learning_rate: ")
    type_in(monkeypatch, "#" * 70_000)
    assert run("validate", "-")[2] == [
        "error: standard input: larger than 64 KiB, which no job spec needs; check that it is the right file"
    ]
    type_in(monkeypatch, GOOD.replace("1e-4", "fast"))
    code, out, errors = run("run", "-")
    assert (code, out, errors[0].partition(": models")[0]) == (2, "", "error: standard input:6")


def test_everything_that_is_wrong_is_told_of_all_models(run: Run, tmp_path: Path) -> None:
    entry = GOOD[GOOD.index("  - name") :]
    (tmp_path / "short.txt").write_text("Call me Ishmael.\n" * 150)
    (tmp_path / "job.yaml").write_text(
        GOOD
        + entry.replace("tiny", "small")
        .replace("my.txt", "short.txt")
        .replace("n_head: 4", "n_head: 4, block_size: 4000")
        + entry.replace("tiny", "large").replace("my.txt", "short.txt").replace("1e-4", "1e-4, batch_size: 64")
    )
    code, out, errors = run("validate", "job.yaml")
    assert (code, out) == (2, "")
    assert [error.partition(": ")[2] for error in errors] == [
        f"job.yaml: models[0].data.path: {tmp_path}/my.txt does not exist (in {tmp_path}): "
        "name a text file or a folder of pictures",
        "job.yaml: models[1].model.block_size: the training text has 2,295 characters, block_size 4000 needs at least "
        "8,000: set model.block_size to 1147 or less, or add more text",
        "job.yaml: models[2].train.batch_size: got 64, expected at most the number of training examples, 16; "
        "write 16 or less, or leave it out",
    ]


def test_each_problem_is_one_line_and_the_exit_code_2(run: Run, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(GOOD.replace("1e-4", "fast").replace("name: tiny", "name: ../tiny"))
    assert run("validate", "job.yaml") == (
        2,
        "",
        [
            "error: job.yaml:3: models[0].name: got '../tiny', expected at most 63 lower-case letters, digits and '-', "
            "with no '-' at the ends; write e.g. tiny",
            "error: job.yaml:6: models[0].train.learning_rate: got 'fast', expected a number; write e.g. 0.001",
        ],
    )


def test_a_path_that_is_no_readable_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("validate", "jobs/x.yaml")[::2] == (
        2,
        ["error: jobs/x.yaml: no such file; write the path of a job spec, e.g. jobs/quickstart.yaml"],
    )
    assert run("validate", ".")[::2] == (2, ["error: .: a directory; write the path of a job spec in it"])
    (tmp_path / "big.yaml").write_bytes(b"name: x\n" * 1_250_000)
    assert run("validate", "big.yaml")[::2] == (
        2,
        ["error: big.yaml: larger than 64 KiB, which no job spec needs; check that it is the right file"],
    )
    assert run("validate", "/dev/zero")[0] == 2
    (code, _, errors) = run("validate", "x" * 300)
    assert (code, len(errors)) == (2, 1)
    assert "cannot be read: File name too long" in errors[0]

    opens = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "big.yaml":
            raise PermissionError(13, "Permission denied")
        return opens(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert run("validate", "big.yaml")[::2] == (2, ["error: big.yaml: cannot be read: Permission denied"])


@pytest.mark.parametrize("arguments", [(), ("data",), ("keys",)])
def test_without_arguments_the_help_is_shown(run: Run, arguments: tuple[str, ...]) -> None:
    code, _, errors = run(*arguments)
    assert code == 2
    assert errors[0].startswith("Usage: genmodels")
    assert len(errors) > 5


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        ("validate", 2, "missing argument 'SPEC'; `genmodels validate --help` shows the usage"),
        ("validate a b", 2, "got unexpected extra argument(s) (b); `genmodels validate --help` shows the usage"),
        (
            "validat x",
            2,
            "no such command 'validat'. Did you mean 'validate', 'evaluate'? `genmodels --help` shows the usage",
        ),
        ("data add x", 2, "missing argument 'PATH'; `genmodels data add --help` shows the usage"),
        ("jobs --limit 0", 2, "invalid value for '--limit': "),
        ("jobs --state x", 2, "invalid value for '--state': 'x' is not one of"),
        ("jobs --limit", 2, "option '--limit' requires an argument"),
        ("schema --x", 2, "no such option: --x; `genmodels schema --help` shows the usage"),
        ("data add Meu_coração x", 1, "dataset name: got 'Meu_coração', expected at most 63 lower-case letters"),
        ("models --storage /data/x", 1, "storage URL '/data/x': write the folder as file:///data/x"),
        ("models --storage C:\\data", 1, "storage URL 'C:\\\\data': must be file:///absolute/folder"),
        ("models --storage s3:/bucket", 1, "storage URL 's3:/bucket': must be file:///absolute/folder"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_one_line(run: Run, arguments: str, code: int, error: str) -> None:
    exit_code, out, errors = run(*arguments.split())
    assert (exit_code, out, len(errors)) == (code, "", 1)
    assert errors[0].startswith(f"error: {error}")


@pytest.mark.parametrize(("error", "code"), [(DataError("no data"), 1), (KeyboardInterrupt(), 130)])
def test_other_ends(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, code: int) -> None:
    (tmp_path / "job.yaml").write_text(GOOD)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(genmodels.spec.parse, "parse_spec", fail)
    assert run("validate", "job.yaml")[::2] == (code, ["error: no data"] if code == 1 else [])


def test_schema_is_json_with_a_choice_of_families(run: Run) -> None:
    code, out, errors = run("schema")
    assert (code, errors) == (0, [])
    schema = json.loads(out)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    families = [
        choice["properties"]["family"]["const"]
        for choice in schema["$defs"]["ModelSpec"]["properties"]["model"]["oneOf"]
    ]
    assert "minigpt" in families
    assert families == sorted(families)


def test_errors_that_the_outline_shows_are_reported_within_a_second_and_without_torch(tmp_path: Path) -> None:
    """Check in a fresh process: bytes, YAML, keys, names, an unknown family or dataset, and contradicting sections."""
    mistakes = {
        "bytes": GOOD.encode("utf-16"),
        "yaml": b"a: [",
        "bomb": b"a: &a [x]\nb: [*a, *a]",
        "brackets": b"[" * 60_000,
        "twice": GOOD.encode() + b"name: b\n",
        "key": GOOD.replace("train:", "trian:").encode(),
        "family": GOOD.replace("minigpt", "mingpt").encode(),
        "dataset": GOOD.replace("path: my.txt", "dataset: tiny").encode(),
        "batch": GOOD.replace("{learning", "{accumulation_steps: 3, learning").encode(),
    }
    for name, data in mistakes.items():
        (tmp_path / name).write_bytes(data)
    program = """
        import sys, time
        from services.cli import main
        for name in sys.argv[1:]:
            sys.argv = ["genmodels", "validate", name]
            try:
                main.main()
            except SystemExit as end:
                print(name, end.code)
        print("loaded", *sorted({"torch", "ray"} & set(sys.modules)))
        print(time.process_time())
    """
    command = [sys.executable, "-c", textwrap.dedent(program), *mistakes]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    *lines, loaded, seconds = done.stdout.splitlines()
    assert lines == [f"{name} 2" for name in mistakes]
    assert loaded == "loaded"
    assert len(done.stderr.splitlines()) == len(mistakes) + 2, done.stderr  # the bomb holds an anchor and two aliases
    assert float(seconds) < 1.5  # all nine together, with what they import


@pytest.mark.parametrize(
    "arguments", [["validate", "jobs/quickstart.yaml"], ["schema"], ["--help"], ["--version"]], ids=" ".join
)
def test_a_check_imports_neither_torch_nor_ray(arguments: list[str], tmp_path: Path) -> None:
    program = f"""
        import atexit, sys
        heavy = {{"torch", "ray", "fastapi", "sklearn"}}
        atexit.register(lambda: print(*sorted(heavy & sys.modules.keys()), file=sys.stderr))
        from services.cli.main import main
        sys.argv = ["genmodels", *{arguments}]
        main()
    """
    environment = os.environ | {"GENMODELS_STORAGE": tmp_path.as_uri()}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "\n")
    assert done.stdout
