"""`genmodels run`: train, publish and serve every model of a job on this machine, and show what came of it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import httpx
from rich.console import Console

from genmodels.errors import SpecError
from genmodels.keys import Keys
from genmodels.pin import pin_datasets
from genmodels.precheck import check_job
from genmodels.run import Result, Run, Status, now
from genmodels.spec import JobSpec, ModelSpec
from genmodels.storage import Storage, begin_writing
from services.auth import require_keys
from services.curl import curl
from services.local import LocalPlatform, check_port, submit
from services.showcase import Showcase
from services.supervise import carry
from services.terminal import TrainingView, clock, summary

Row = tuple[ModelSpec, Status, Result | None]


def quick_run(
    job: JobSpec, only: list[str], storage: Storage, port: int, exit_after: bool, no_auth: bool, pictures: Path
) -> int:
    """The exit code: 0, or 1 if a model was not published.

    Args:
        only: names of the job's models to run; none means all.

    Raises:
        SpecError: `only` names a model that the job does not have, or a family does not fit its data.
        GenmodelsError: the endpoint would ask for a key, and there is none.
        DataError: a dataset is missing, damaged or too small.
        KeyboardInterrupt: Ctrl-C in training; everything was saved and ended.
    """
    job = pin_datasets(job, storage)
    console = Console()
    if not console.is_terminal:
        console.width = 132  # a log file has room for the table
    chosen = _choose(job, only)
    check_port(port)
    auth = not no_auth
    if auth:
        require_keys(storage, "generate")
    begin_writing(storage)
    job, validation = _check(job, [spec.name for spec in chosen], storage, console)
    chosen = _choose(job, only)
    name = submit(storage, job)
    console.print(
        f"[bold]Job {name}[/bold]: {', '.join(model.name for model in chosen)}, storage {storage.url}", highlight=False
    )
    workers = max(model.world_sizes[0] for model in chosen)
    with LocalPlatform(storage, Path(".genmodels") / "logs" / name, max(os.cpu_count() or 1, workers)) as platform:
        with console.status("Starting Ray"):
            platform.start()
        signal.signal(signal.SIGTERM, _interrupt)
        started = now()
        rows = _train(chosen, name, platform, console)
        published = [spec for spec, status, _ in rows if status.state == "succeeded"]
        if not published:
            console.print(summary(rows, None, validation))
            return 1
        began = time.monotonic()
        with console.status("Starting the endpoint"):
            endpoint = platform.serve(port, auth=auth)
        serve_seconds = time.monotonic() - began
        with (
            _own_key(storage, auth, [spec.name for spec in published]) as headers,
            httpx.Client(base_url=endpoint, timeout=120, headers=headers) as client,
        ):
            for spec in published:
                console.rule(f"{spec.name} ({spec.family})", align="left")
                Showcase(client, console, pictures / name).show(spec, _called(spec), Run(storage, name, spec.name))
            shown = [client.get(f"/v1/models/{_called(spec)}").json() for spec in published]
        console.print(summary(rows, endpoint, validation))
        console.print(
            _costs([row for row in rows if row[1].history[-1].time >= started], platform.ray_seconds, serve_seconds),
            highlight=False,
        )
        where = ", where GENMODELS_KEY is a key with the scope generate" if auth else ""
        console.print(f"\nTry, from another terminal{where}:", highlight=False)
        for model in shown:
            console.print(f"  {curl(model, endpoint, key=auth)[0]}", markup=False, highlight=False, soft_wrap=True)
        if not exit_after:
            console.print(f"\nServing at {endpoint} until Ctrl-C.", highlight=False)
            _wait_for_ctrl_c()
    return 0 if len(published) == len(chosen) else 1


def _check(job: JobSpec, chosen: list[str], storage: Storage, console: Console) -> tuple[JobSpec, dict[str, int]]:
    """Say what is wrong with any model before anything is started; the job, and the validation examples by model."""
    checked = check_job(job, storage, open_data=True, only=chosen)
    gpus = max((spec.world_sizes[0] for spec in _choose(job, chosen) if spec.scaling.use_gpu), default=0)
    if gpus > (there := _gpus() if gpus else 0):
        raise SpecError(f"scaling.use_gpu: needs {gpus} GPUs, and this machine has {there}; write use_gpu: false")
    for name in chosen:
        for note in checked.notes[name]:
            console.print(f"{name}: {note}", markup=False, highlight=False)
    return checked.job, {name: facts.validation for name, facts in checked.facts.items()}


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _choose(job: JobSpec, only: list[str]) -> list[ModelSpec]:
    names = [model.name for model in job.models]
    for name in only:
        if name not in names:
            raise SpecError(f"--only: job {job.name} has no model {name!r}; it has: {', '.join(names)}")
    return [model for model in job.models if not only or model.name in only]


@contextlib.contextmanager
def _own_key(storage: Storage, auth: bool, models: list[str]) -> Iterator[dict[str, str]]:
    """Headers with a key for the showcase, which is gone afterwards; none where none is asked for."""
    if not auth:
        yield {}
        return
    keys = Keys(storage)
    key, token = keys.create("showcase", ("generate",), tuple(models))
    try:
        yield {"authorization": f"Bearer {token}"}
    finally:
        keys.delete(key.id)


def _called(spec: ModelSpec) -> str:
    """What the endpoint calls a model."""
    return spec.name if spec.serve.alias == "production" else f"{spec.name}@{spec.serve.alias}"


def _train(chosen: list[ModelSpec], name: str, platform: LocalPlatform, console: Console) -> list[Row]:
    backend, view = platform.backend(), TrainingView(console)
    rows: list[Row] = []
    for spec in chosen:
        with view.follow(spec) as watch:
            workers = max([n for n in spec.world_sizes if n <= platform.num_cpus] or spec.world_sizes[:1])
            rows.append((spec, *carry(platform.storage, backend, name, spec.name, workers, watch)))
        _, status, _ = rows[-1]
        if status.state != "succeeded":
            console.print(
                f"[red]{spec.name}: {status.state}[/red]: {status.reason}; log: {platform.logs}", highlight=False
            )
    return rows


def _costs(rows: list[Row], ray: float, serve: float) -> str:
    """What Ray's start costs, apart from training; `rows` are the runs that were carried now."""
    results = [result for _, _, result in rows if result]
    starts, training = sum(r.startup_seconds for r in results), sum(r.training_seconds for r in results)
    parts = [f"cluster {ray:.0f} s", f"worker groups {starts:.0f} s ({len(results)} runs)", f"endpoint {serve:.0f} s"]
    return f"Training took {clock(training)} in all. Beside it Ray took to start: {', '.join(parts)}."


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _wait_for_ctrl_c() -> None:
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return
