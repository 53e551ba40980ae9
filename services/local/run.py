"""`genmodels run`: train, publish and serve every model of a job on this machine, and print a summary."""

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
from rich.text import Text

from genmodels.errors import GenmodelsError, SpecError
from genmodels.keys import Keys
from genmodels.preflight.check import check_job
from genmodels.registry.references import resolve_datasets
from genmodels.runs.records import Result, Status
from genmodels.runs.store import Run
from genmodels.sizing.machine import memory_limit
from genmodels.spec.parse import job_id
from genmodels.spec.sections import JobSpec, ModelSpec
from genmodels.storage import Storage, begin_writing
from genmodels.storage.documents import now
from services.cluster.descriptors import raise_file_limit
from services.cluster.environment import ignore_output_errors
from services.cluster.logs import log_folder
from services.cluster.ports import check_port
from services.console.curl import curl
from services.console.output import console
from services.console.progress import TrainingView, clock, summary
from services.dispatch.single_run import run_to_completion
from services.gateway.pool_config import read_pools
from services.http.auth import require_keys
from services.local.devices import check_pools, gpus
from services.local.platform import LocalPlatform, submit
from services.local.run_lock import RunLock
from services.local.samples import SampleWriter, warned

Row = tuple[ModelSpec, Status, Result | None]


def quick_run(
    job: JobSpec, only: list[str], storage: Storage, port: int, exit_after: bool, no_auth: bool, pictures: Path
) -> int:
    """Run a job, and return the exit code: 0, or 1 if a model was not published.

    Args:
        only: names of the job's models to run; none means all.

    Raises:
        SpecError: `only` names a model that the job does not have, or a family does not fit its data.
        GenmodelsError: the endpoint requires a key and none exists, or the limit of open files is too low.
        DataError: a dataset is missing, damaged or too small.
        KeyboardInterrupt: Ctrl-C during training; all runs were saved and have ended.
    """
    ignore_output_errors()
    raise_file_limit()
    job = resolve_datasets(job, storage)
    screen = console()
    job, validation = _check(job, [spec.name for spec in _choose(job, only)], storage, screen)
    chosen = _choose(job, only)
    name, names = job_id(job), [spec.name for spec in chosen]
    lock = RunLock(storage, name)
    auth = not no_auth
    while True:
        with lock.hold(names) as holder:
            if holder is None:
                return _run(job, chosen, validation, storage, port, exit_after, auth, pictures, screen, lock)
        if others := sorted(set(names) - set(holder.models)) if holder.models else []:
            raise GenmodelsError(
                f"job {name} is running in process {holder.pid} with {', '.join(holder.models)}; "
                f"run {', '.join(others)} when that process has ended"
            )
        screen.print(
            f"Job {name} is already running in process {holder.pid}. This command follows it; "
            "Ctrl-C ends only this command.",
            soft_wrap=True,
        )
        serving = lock.follow(storage, name, chosen, screen)
        if serving and serving.endpoint:
            rows = [_row(storage, name, spec) for spec in chosen]
            screen.print(summary(rows, serving.endpoint, validation))
            published = [spec for spec, status, _ in rows if status.state == "succeeded"]
            _suggest(published, storage, serving.endpoint, auth, screen)
            return 0 if len(published) == len(chosen) else 1
        screen.print("The other command has ended; this command continues the job.")


def _run(
    job: JobSpec,
    chosen: list[ModelSpec],
    validation: dict[str, int],
    storage: Storage,
    port: int,
    exit_after: bool,
    auth: bool,
    pictures: Path,
    screen: Console,
    lock: RunLock,
) -> int:
    check_port(port)
    if auth:
        require_keys(storage)
    begin_writing(storage)
    name, names = submit(storage, job), [spec.name for spec in chosen]
    screen.print(Text(f"Job {name}", "bold"), Text(f": {', '.join(names)}, storage {storage.url}"), sep="")
    workers = max(model.world_sizes[0] for model in chosen)
    with LocalPlatform(storage, log_folder() / name, max(os.cpu_count() or 1, workers)) as platform:
        with screen.status("Starting Ray"):
            platform.start()
        signal.signal(signal.SIGTERM, _interrupt)
        started = now()
        rows = _train(chosen, name, platform, screen)
        published = [spec for spec, status, _ in rows if status.state == "succeeded"]
        if not published:
            screen.print(summary(rows, None, validation))
            return 1
        began = time.monotonic()
        with screen.status("Starting the endpoint"):
            endpoint = platform.serve(port, auth=auth)
        serve_seconds = time.monotonic() - began
        lock.publish_endpoint(names, endpoint)
        with _client(storage, endpoint, auth, published) as client:
            for spec in published:
                screen.rule(f"{spec.name} ({spec.family})", align="left")
                SampleWriter(client, screen, pictures / name).write(
                    spec, _served_name(spec), Run(storage, name, spec.name)
                )
        with warned(screen, "summary"):
            screen.print(summary(rows, endpoint, validation))
            trained = [row for row in rows if row[1].history[-1].time >= started]
            screen.print(_costs(trained, platform.ray_seconds, serve_seconds))
        _suggest(published, storage, endpoint, auth, screen)
        if not exit_after:
            screen.print(f"\nServing at {endpoint} until Ctrl-C.")
            _wait_for_ctrl_c()
    return 0 if len(published) == len(chosen) else 1


def _check(job: JobSpec, chosen: list[str], storage: Storage, screen: Console) -> tuple[JobSpec, dict[str, int]]:
    """Check all models before anything starts; return the job, and the number of validation examples by model."""
    check_pools(pools := read_pools())
    memory = dict.fromkeys(("cpus", "gpus"), memory_limit())
    checked = check_job(job, storage, open_data=True, only=chosen, pools=pools.memory, worker_memory=memory)
    needed = max((spec.world_sizes[0] for spec in _choose(job, chosen) if spec.scaling.use_gpu), default=0)
    if needed > (there := gpus() if needed else 0):
        raise SpecError(f"scaling.use_gpu: needs {needed} GPUs, and this machine has {there}; write use_gpu: false")
    for name in chosen:
        for note in checked.notes[name]:
            screen.print(f"{name}: {note}", soft_wrap=True)
    return checked.job, {name: facts.validation for name, facts in checked.facts.items()}


def _row(storage: Storage, job: str, spec: ModelSpec) -> Row:
    run = Run(storage, job, spec.name)
    status, _ = run.status()
    return spec, status, run.result(status.attempt) if status.attempt else None


def _suggest(published: list[ModelSpec], storage: Storage, endpoint: str, auth: bool, screen: Console) -> None:
    """Print a command for each model, built from the endpoint's description of the model."""
    where = ", where GENMODELS_KEY is a key with the scope generate" if auth else ""
    screen.print(f"\nTry, from another terminal{where}:")
    with warned(screen, "commands"), _client(storage, endpoint, auth, published) as client:
        for spec in published:
            model = client.get(f"/v1/models/{_served_name(spec)}").raise_for_status().json()
            screen.print(f"  {curl(model, endpoint, key=auth)[0]}", soft_wrap=True)


def _choose(job: JobSpec, only: list[str]) -> list[ModelSpec]:
    names = [model.name for model in job.models]
    for name in only:
        if name not in names:
            raise SpecError(f"--only: job {job.name} has no model {name!r}; it has: {', '.join(names)}")
    return [model for model in job.models if not only or model.name in only]


@contextlib.contextmanager
def _client(storage: Storage, endpoint: str, auth: bool, models: list[ModelSpec]) -> Iterator[httpx.Client]:
    """Yield a client of the endpoint; if the endpoint requires a key, the client has one that is deleted afterwards."""
    with contextlib.ExitStack() as stack:
        headers = {}
        if auth:
            keys = Keys(storage)
            key, token = keys.create("samples", ("generate",), tuple(spec.name for spec in models))
            stack.callback(keys.delete, key.id)
            headers = {"authorization": f"Bearer {token}"}
        # no proxy: the endpoint is on this machine
        yield stack.enter_context(httpx.Client(base_url=endpoint, timeout=120, headers=headers, trust_env=False))


def _served_name(spec: ModelSpec) -> str:
    """Return a model's name at the endpoint."""
    return spec.name if spec.serve.alias == "production" else f"{spec.name}@{spec.serve.alias}"


def _train(chosen: list[ModelSpec], name: str, platform: LocalPlatform, screen: Console) -> list[Row]:
    backend, view = platform.backend(), TrainingView(screen)
    rows: list[Row] = []
    try:
        for spec in chosen:
            with view.follow(spec) as watch:
                workers = max([n for n in spec.world_sizes if n <= platform.num_cpus] or spec.world_sizes[:1])
                rows.append((spec, *run_to_completion(platform.storage, backend, name, spec.name, workers, watch)))
            _, status, _ = rows[-1]
            if status.state != "succeeded":
                reason = f": {status.reason}; log: {platform.logs}"
                screen.print(Text(f"{spec.name}: {status.state}", "red"), Text(reason), sep="")
    finally:
        backend.end_idle()  # what follows may need its memory
    return rows


def _costs(rows: list[Row], ray: float, serve: float) -> str:
    """Describe the time that starting Ray took, apart from training; `rows` are the runs of this command."""
    results = [result for _, _, result in rows if result]
    starts, training = sum(r.startup_seconds for r in results), sum(r.training_seconds for r in results)
    count = "1 run" if len(results) == 1 else f"{len(results)} runs"
    parts = [f"cluster {ray:.0f} s", f"worker groups {starts:.0f} s ({count})", f"endpoint {serve:.0f} s"]
    return f"Training took {clock(training)} in all. Starting Ray took: {', '.join(parts)}."


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _wait_for_ctrl_c() -> None:
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return
