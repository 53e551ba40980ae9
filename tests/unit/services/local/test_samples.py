"""Test that a run's samples come from the models' own data, and that a failure to show them ends nothing."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from genmodels.data import TextData
from genmodels.data.text import CharTokenizer
from genmodels.runs.records import Status
from genmodels.runs.store import Run
from genmodels.storage import Storage
from genmodels.storage.documents import now
from services.console.curl import curl
from services.console.tables import jobs_table
from services.jobs.schemas import JobView, RunView
from services.local.platform import submit
from services.local.run_lock import RunLock
from services.local.samples import PROMPT, SampleWriter, opening
from tests.support.tiny_jobs import job, make_data, model

TEXTS = st.text(min_size=1) | st.text(alphabet="ab \n", min_size=1)


@given(TEXTS)
@example("one line without an end")
@example("马" * 5000)
@example("\n\n\n\n")
@example("\n\n \nSPEAKER:\nlight")
def test_a_prompt_is_of_the_text_itself(text: str) -> None:
    prompt = opening(text)
    assert prompt
    assert set(prompt) <= set(text)
    assert len(prompt) <= PROMPT + 1
    CharTokenizer.from_text(text).encode(prompt)


@given(TEXTS)
@example("The quick fox")
@example("'\"$`\\")
def test_a_suggested_command_is_one_that_the_model_understands(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    shown = {"id": "m", "verbs": ["complete"], "example_prompt": tokenizer.example_prompt}
    words = shlex.split(curl(shown, "http://127.0.0.1:8000")[0])
    tokenizer.encode(json.loads(words[words.index("-d") + 1])["prompt"])
    assert tokenizer.example_prompt == "The " or not set("The ") <= set(text)


def screen() -> Console:
    return Console(file=io.StringIO(), width=200, markup=False, highlight=False)


def printed(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("broken", ["endpoint", "answer", "folder", "data", "metrics"])
@pytest.mark.parametrize("family", ["vae", "minigpt"])
def test_what_cannot_be_shown_costs_a_line(
    broken: str, family: str, file_storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job("test", model(make_data(tmp_path), family, "m")).models[0]
    if broken == "folder":
        (tmp_path / "samples").write_text("a file")
    if broken == "data":
        (tmp_path / "play.txt").unlink()
        (tmp_path / "pictures").rename(tmp_path / "elsewhere")

    def answer(request: httpx.Request) -> httpx.Response:
        if broken == "endpoint":
            raise httpx.ConnectError("nothing listens there")
        if request.method == "GET":
            return httpx.Response(200, json={"verbs": ["generate"]})
        return (
            httpx.Response(400, json={"error": {"message": "no such character"}})
            if broken == "answer"
            else (httpx.Response(200, json={"data": [{"b64_json": "AAAA"}]}))
        )

    run = Run(file_storage, "test", "m")
    rows = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    lines = [json.dumps(row).encode() for row in rows]
    monkeypatch.setattr("services.local.samples.metric_lines", lambda run: 1 / 0 if broken == "metrics" else lines)
    console = screen()
    with httpx.Client(base_url="http://127.0.0.1:1", transport=httpx.MockTransport(answer)) as client:
        SampleWriter(client, console, tmp_path / "samples").write(spec, "m", run)
    warnings = [line for line in printed(console) if "not shown: " in line]
    assert 1 <= len(warnings) <= 2
    assert all(line.startswith(("  curves: ", "  samples: ")) for line in warnings)


def test_a_passage_begins_with_a_prompt_that_the_model_knows(tmp_path: Path) -> None:
    """This holds also if the text has no newline and lacks the characters of an English text."""
    data = TextData("马到成功" * 1000)
    sent: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return httpx.Response(200, text="data: [DONE]\n\n")

    with httpx.Client(base_url="http://127.0.0.1:1", transport=httpx.MockTransport(answer)) as client:
        SampleWriter(client, screen(), tmp_path)._passage("m", data)
    assert np.all(np.array(data.tokenizer.encode(sent[0]["prompt"])) >= 0)


# ---- how a run stands


@pytest.mark.parametrize(
    ("state", "phase", "step", "shown"),
    [
        ("running", "training", 50, "m running 50%"),
        ("running", "training", 100, "m running 99%"),
        ("running", "starting", 100, "m starting"),
        ("running", "evaluating", 100, "m evaluating"),
        ("running", "saving", 100, "m saving"),
        ("running", "publishing", 100, "m publishing"),
        ("publishing", "publishing", 100, "m publishing"),
        ("starting", "starting", 100, "m starting"),
    ],
)
def test_a_list_says_what_a_run_does(state: Any, phase: str, step: int, shown: str) -> None:
    run = RunView(model="m", state=state, phase=phase, step=step, max_steps=100)
    view = JobView(job="j", name="j", priority=0, state="running", submitted=now(), models=[run])
    console = screen()
    console.print(jobs_table([view]))
    assert f" {shown} " in "\n".join(printed(console))


def test_a_second_run_follows_the_first(file_storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.local.run_lock.LOOK_SECONDS", 0.0)
    spec = job("test", model(make_data(tmp_path), "vae", "m"))
    name = submit(file_storage, spec)
    run = Run(file_storage, name, "m")
    run.write_status(Status(state="queued").to("starting", "attempt 1", attempt=1), None)
    first, second = RunLock(file_storage, name), RunLock(file_storage, name)
    console = screen()
    with first.hold(["m"]) as holder:
        assert holder is None
        with second.hold(["m"]) as holder:
            assert holder is not None
            assert holder.models == ["m"]
        first.publish_endpoint(["m"], "http://127.0.0.1:8000")
        serving = second.follow(file_storage, name, spec.models, console)
        assert serving is not None
        assert serving.endpoint == "http://127.0.0.1:8000"
        with RunLock(file_storage, "another-job").hold(["m"]) as other:
            assert other is None
    assert second.follow(file_storage, name, spec.models, console) is None, "the first has ended"
    assert printed(console) == ["m: starting (attempt 1)"] * 2
    with second.hold(["m"]) as holder:
        assert holder is None
