"""Every metric of this project's own, named once. Series go to files in PROMETHEUS_MULTIPROC_DIR, where that is set.

An exporter on the same node reads those files (`services/node/exporter.py`); so a process that trains or serves opens
no port, and one without an exporter keeps a few numbers in memory that nobody asks for.

Three sets of labels, and nothing else but values from short fixed lists: never a prompt, an id of a request, or text
that somebody wrote. Counters and histograms outlive the process that counted, so they carry no job: a job's series
are gauges, which end with the process that trains it.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TypeAlias

from prometheus_client import Counter, Gauge, Histogram, values
from prometheus_client.metrics import MetricWrapperBase

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
RUN_LABELS = ("job", "model", "family")  # of what trains
VERSION_LABELS = ("model", "family", "version")  # of what answers; see `version_labels`
FAMILY_LABELS = ("family",)  # of what is counted beyond a run's end

ALL: list[MetricWrapperBase] = []  # in the order of this file

Labels: TypeAlias = tuple[str, str, str]  # values of VERSION_LABELS


def exported() -> bool:
    """Whether an exporter reads what this process counts."""
    return DIRECTORY in os.environ


def identity(pid: int) -> str | None:
    """Names a process for good, as `<pid>-<start>`, for a pid alone is given again; None if it has ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = status.rpartition(")")[2].split()
    return None if state in "ZX" else f"{pid}-{fields[18]}"  # in clock ticks since the machine started


@cache
def _own_identity(pid: int) -> str:
    return identity(pid) or str(pid)


if exported():  # before the first metric: none goes on with the file of a dead process
    values.ValueClass = values.MultiProcessValue(lambda: _own_identity(os.getpid()))

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_LONG_SECONDS = (0.1, 0.5, 1.0, 5.0, 15.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 4 * 3600.0)
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32)


def _counter(name: str, help: str, labels: tuple[str, ...]) -> Counter:
    ALL.append(metric := Counter(f"genmodels_{name}", help, labels, registry=None))
    return metric


def _histogram(name: str, help: str, labels: tuple[str, ...], buckets: tuple[float, ...] = _SECONDS) -> Histogram:
    ALL.append(metric := Histogram(f"genmodels_{name}", help, labels, buckets=buckets, registry=None))
    return metric


def _gauge(name: str, help: str, labels: tuple[str, ...], mode: str = "livemostrecent") -> Gauge:
    # Live: a dead process's values are dropped. Not in the default registry: they are read from the files alone.
    ALL.append(metric := Gauge(f"genmodels_{name}", help, labels, registry=None, multiprocess_mode=mode))  # type: ignore[arg-type]
    return metric


def _training(name: str, help: str, *more: str) -> Gauge:
    return _gauge(f"training_{name}", help, (*RUN_LABELS, *more))


# Training: of rank 0, as long as it runs. `role`: "model", or a GAN's "generator" and "discriminator".
TRAINING_STEP = _training("step", "Optimizer steps done.")
TRAINING_MAX_STEPS = _training("max_steps", "Optimizer steps that the run will take in all.")
TRAINING_ETA = _training("eta_seconds", "Seconds left until the last step, at the speed so far.")
TRAINING_PROGRESS = _training("progress_timestamp_seconds", "Unix time of the attempt's last progress.")
TRAINING_WORKERS = _training("workers", "Workers in the run's group.")
TRAINING_SAMPLES = _training("samples", "Samples seen by all workers together since step 0.")
TRAINING_LOSS = _training("loss", "Loss, the mean over all workers and the steps since the last row.", "role")
TRAINING_PART = _training("part", "Any other value that a loss reports, by name (kl, accuracy_real).", "role", "part")
TRAINING_VALIDATION = _training("validation", "Metric of the latest evaluation, e.g. val_loss.", "metric")
TRAINING_LEARNING_RATE = _training("learning_rate", "Learning rate of the latest step.")
TRAINING_GRADIENT_NORM = _training("gradient_norm", "Norm of the gradient before clipping.", "role")
TRAINING_SAMPLES_PER_SECOND = _training("samples_per_second", "Samples a second, all workers together.")
TRAINING_TOKENS_PER_SECOND = _training(
    "tokens_per_second", "Tokens a second, all workers together; only for text models."
)
TRAINING_STEP_SECONDS = _training("step_seconds", "Duration of an optimizer step, in seconds.")
TRAINING_DATA_WAIT = _training("data_wait_ratio", "Share of the time in which steps wait for data.")
TRAINING_FLOPS = _training("flops_per_second", "Floating point operations a second of forward and backward passes.")
TRAINING_MFU = _training("mfu_ratio", "flops_per_second divided by the speed of plain matrix products on this device.")
TRAINING_GPU_MEMORY = _training("gpu_memory_bytes", "Largest GPU memory that rank 0 had allocated.")
TRAINING_CHECKPOINT_STEP = _training("checkpoint_step", "Step of the newest complete checkpoint of this attempt.")

# Checkpoints: counted by rank 0.
CHECKPOINT_SECONDS = _histogram(
    "checkpoint_seconds", "Seconds from a snapshot to its manifest in storage.", FAMILY_LABELS, _LONG_SECONDS
)
CHECKPOINT_STALL_SECONDS = _histogram(
    "checkpoint_stall_seconds", "Seconds for which a save delayed the training steps.", FAMILY_LABELS
)
CHECKPOINT_BYTES = _counter("checkpoint_bytes_total", "Bytes of the checkpoints written to storage.", FAMILY_LABELS)
CHECKPOINT_FAILURES = _counter(
    "checkpoint_failures_total", "Uploads that the store did not accept at once and that were retried.", FAMILY_LABELS
)

# Jobs: counted where the dispatcher is. `cause`: as in `Result.cause`, or the outcome where it has none.
ATTEMPTS = _counter("attempts_ended_total", "Attempts of runs that ended, by cause.", ("cause",))
RUNS_ENDED = _counter("runs_ended_total", "Runs that ended, by state.", ("state",))
QUEUE_WAIT_SECONDS = _histogram(
    "queue_wait_seconds", "Seconds from queued to starting, each time a run is queued.", (), _LONG_SECONDS
)

# Told by the job service, from what is in storage, at each scrape.
STORAGE_UP = _gauge("storage_up", "1 if the storage answered the job service, else 0.", ())
OPEN_RUNS = _gauge("open_runs", "Runs of open jobs, by state.", ("state",))
QUEUE_LENGTH = _gauge("queue_length", "Runs that wait for room in the cluster.", ())
FIGURES_AGE = _gauge("job_figures_age_seconds", "Age of the figures of open runs and of the queue, in seconds.", ())
QUEUE_OLDEST = _gauge(
    "queue_oldest_seconds", "Longest time that a run has waited in the queue, in seconds; 0 if the queue is empty.", ()
)

# Registry: counted by who publishes, promotes or judges.
PUBLISHED = _counter("versions_published_total", "Versions put into the registry.", FAMILY_LABELS)
PROMOTED = _counter("promotions_total", "Aliases that were moved to another version.", FAMILY_LABELS)
GATES = _counter("gates_total", "Checkpoints that were checked by a gate.", ("family", "passed"))

# Storage. `operation`: get, put, list, delete, exists, upload, download; `kind`: StorageUnavailable (no answer) or
# StorageError (refused). That an object is not there, or not the one expected, is an answer.
STORAGE_SECONDS = _histogram("storage_seconds", "Seconds of an operation on storage, with its retries.", ("operation",))
STORAGE_ERRORS = _counter("storage_errors_total", "Operations on storage that failed.", ("operation", "kind"))

# By kind of object, as `Document.kind` names it. An object that stays damaged is counted at each read.
DAMAGED = _counter("damaged_objects_total", "Reads of a damaged object in storage, by kind.", ("kind",))

# Background threads that live as long as their process. `thread`: "alias-watcher" (of model hosts) or "dispatch" (of
# the job service); failures also of "lease", "commands", "copy-log", "ship-log", "decode" and "export".
THREAD_PROGRESS = _gauge(
    "thread_progress_timestamp_seconds",
    "Unix time at which a background thread last completed a round, or one object of a round.",
    ("thread",),
    "livemin",
)
THREAD_FAILURES = _counter(
    "thread_failures_total", "Rounds of background threads that ended with an unexpected error.", ("thread",)
)

# Requests: counted by the gateway. Of requests that named no model that there is, its labels are empty.
REQUESTS = _counter("requests_total", "Requests answered, by route and status.", (*VERSION_LABELS, "route", "code"))
REQUEST_SECONDS = _histogram(
    "request_seconds", "Seconds from a request to the end of its answer.", (*VERSION_LABELS, "route")
)

# Model hosts.
FIRST_TOKEN_SECONDS = _histogram(
    "time_to_first_token_seconds", "Seconds from a request at the model host to its first token.", VERSION_LABELS
)
BETWEEN_TOKENS_SECONDS = _histogram(
    "time_between_tokens_seconds", "Seconds between two tokens of one text.", VERSION_LABELS
)
TOKENS = _counter("tokens_total", "Tokens read (prompt) and generated (completion).", (*VERSION_LABELS, "kind"))
IMAGES = _counter("images_total", "Pictures and latents in answers, by verb.", (*VERSION_LABELS, "verb"))
BATCH_SIZE = _histogram(
    "batch_size", "Texts in a decoding step, or rows in a batch of an image model.", VERSION_LABELS, _ROWS
)
WAITING = _gauge(
    "waiting_requests",
    "Texts that wait for a slot, or image requests that wait for a batch.",
    VERSION_LABELS,
    "livesum",
)
KV_SLOTS = _gauge(
    "kv_slots", "Slots of the key-value cache: all slots and used slots.", (*VERSION_LABELS, "state"), "livesum"
)
LOADED_BYTES = _gauge("loaded_bytes", "Memory of a loaded version, in bytes.", VERSION_LABELS, "livesum")
ACTIVE = _gauge("version_active", "Model hosts in which an alias points at this version.", VERSION_LABELS, "livesum")
EVALUATION_METRIC = _gauge(
    "version_evaluation_metric",
    "Result of a served version's newest evaluation, by name of the metric.",
    (*VERSION_LABELS, "metric"),
)
LOAD_SECONDS = _histogram(
    "version_load_seconds", "Seconds to fetch, verify and warm up a version.", FAMILY_LABELS, _LONG_SECONDS
)
SWAPPED = _counter("versions_swapped_total", "Versions that replaced an older version.", VERSION_LABELS)
REFUSED = _counter(
    "versions_refused_total", "Versions that were refused: damaged, or not fit to be served.", VERSION_LABELS
)


def version_labels(name: str, family: str) -> Labels:
    """Values of VERSION_LABELS for what `name` means exactly, as in `shapes@3`.

    All checkpoints of a model's runs are one: a run may save thousands, and a series ends only with its process.
    """
    model, _, version = name.partition("@")
    return model, family, version if version.isdecimal() else "checkpoint"
