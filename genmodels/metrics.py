"""Define all metrics of this project, each once. Values go to files in PROMETHEUS_MULTIPROC_DIR, if it is set.

An exporter on the same node reads these files (`services/node/exporter.py`), so a process that trains or serves opens
no port. Without an exporter a process keeps a few unused numbers in memory.

A metric has one of three sets of labels, and labels whose values come from short fixed lists: never a prompt, an id of
a request, or text of a user. Counters and histograms outlive the process that counts, so they have no label `job`: the
series of a job are gauges, which end with the process that trains it.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TypeAlias

from prometheus_client import Counter, Gauge, Histogram, values
from prometheus_client.metrics import MetricWrapperBase

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
RUN_LABELS = ("job", "model", "family")  # of training
VERSION_LABELS = ("model", "family", "version")  # of serving; see `version_labels`
FAMILY_LABELS = ("family",)  # of counters, which outlive a run

ALL: list[MetricWrapperBase] = []  # in the order of this file

Labels: TypeAlias = tuple[str, str, str]  # values of VERSION_LABELS


def exported() -> bool:
    """Return whether an exporter reads the metrics of this process."""
    return DIRECTORY in os.environ


def identity(pid: int) -> str | None:
    """Return `<pid>-<start time>`, which names a process uniquely, since pids are reused; None if it has ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = status.rpartition(")")[2].split()
    return None if state in "ZX" else f"{pid}-{fields[18]}"  # in clock ticks since the machine started


@cache
def _own_identity(pid: int) -> str:
    return identity(pid) or str(pid)


if exported():  # before the first metric, so that no metric continues the file of a dead process
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
    # Live: values of a dead process are dropped. Not in the default registry, since only the files are read.
    ALL.append(metric := Gauge(f"genmodels_{name}", help, labels, registry=None, multiprocess_mode=mode))  # type: ignore[arg-type]
    return metric


def _training(name: str, help: str, *more: str) -> Gauge:
    return _gauge(f"training_{name}", help, (*RUN_LABELS, *more))


# Training: written by rank 0 while it runs. `role`: "model"; in a GAN "generator" and "discriminator".
TRAINING_STEP = _training("step", "Completed optimizer steps.")
TRAINING_MAX_STEPS = _training("max_steps", "Optimizer steps of the whole run.")
TRAINING_ETA = _training("eta_seconds", "Estimated time until the last step, at the mean speed so far, in seconds.")
TRAINING_PROGRESS = _training(
    "progress_timestamp_seconds", "Unix time of the last progress of the attempt, in seconds."
)
TRAINING_WORKERS = _training("workers", "Workers that train the run now.")
TRAINING_SAMPLES = _training("samples", "Samples that all workers have processed since step 0.")
TRAINING_LOSS = _training(
    "loss", "Training loss, mean over all workers and the steps since the previous logged row.", "role"
)
TRAINING_PART = _training("part", "Other value that a loss reports, by name, e.g. kl or accuracy_real.", "role", "part")
TRAINING_VALIDATION = _training(
    "validation", "Metric of the latest evaluation on the validation data, by name, e.g. val_loss.", "metric"
)
TRAINING_LEARNING_RATE = _training("learning_rate", "Learning rate of the latest step.")
TRAINING_GRADIENT_NORM = _training("gradient_norm", "Norm of the gradient before clipping.", "role")
TRAINING_SAMPLES_PER_SECOND = _training("samples_per_second", "Samples that all workers together process per second.")
TRAINING_TOKENS_PER_SECOND = _training(
    "tokens_per_second", "Tokens that all workers together process per second; only for text models."
)
TRAINING_STEP_SECONDS = _training("step_seconds", "Mean duration of an optimizer step, in seconds.")
TRAINING_DATA_WAIT = _training(
    "data_wait_ratio", "Share of the training time that is spent waiting for data, from 0 to 1."
)
TRAINING_FLOPS = _training("flops_per_second", "Floating-point operations of forward and backward passes per second.")
TRAINING_MFU = _training(
    "mfu_ratio",
    "Model FLOPs utilization: flops_per_second divided by the speed of plain matrix products on this device.",
)
TRAINING_GPU_MEMORY = _training("gpu_memory_bytes", "Peak GPU memory that rank 0 has allocated, in bytes.")
TRAINING_CHECKPOINT_STEP = _training("checkpoint_step", "Step of the newest complete checkpoint of this attempt.")

# Checkpoints: counted by rank 0 of each run.
CHECKPOINT_SECONDS = _histogram(
    "checkpoint_seconds",
    "Time from the snapshot in memory to the manifest in storage, in seconds.",
    FAMILY_LABELS,
    _LONG_SECONDS,
)
CHECKPOINT_STALL_SECONDS = _histogram(
    "checkpoint_stall_seconds", "Time for which saving a checkpoint delayed training, in seconds.", FAMILY_LABELS
)
CHECKPOINT_BYTES = _counter("checkpoint_bytes_total", "Bytes of checkpoints written to storage.", FAMILY_LABELS)
CHECKPOINT_FAILURES = _counter(
    "checkpoint_failures_total", "Uploads of checkpoints that failed at first and were retried.", FAMILY_LABELS
)

# Jobs: counted by the dispatcher. `cause`: `Result.cause`, or the outcome if it has no cause.
ATTEMPTS = _counter("attempts_ended_total", "Attempts that ended, by cause.", ("cause",))
RUNS_ENDED = _counter("runs_ended_total", "Runs that ended, by state.", ("state",))
QUEUE_WAIT_SECONDS = _histogram(
    "queue_wait_seconds",
    "Time from queued to starting, each time a run is queued, in seconds.",
    (),
    _LONG_SECONDS,
)

# Computed by the job service from storage, at each scrape.
STORAGE_UP = _gauge("storage_up", "1 if the storage answers the job service, else 0.", ())
OPEN_RUNS = _gauge("open_runs", "Runs of open jobs, by state.", ("state",))
QUEUE_LENGTH = _gauge("queue_length", "Runs that wait for free resources in the cluster.", ())
JOB_METRICS_AGE = _gauge(
    "job_metrics_age_seconds", "Age of the values of open_runs, queue_length and queue_oldest_seconds, in seconds.", ()
)
QUEUE_OLDEST = _gauge(
    "queue_oldest_seconds", "Longest time that a run has waited in the queue, in seconds; 0 if the queue is empty.", ()
)

# Registry: counted by the process that publishes, promotes or checks a gate.
PUBLISHED = _counter("versions_published_total", "Versions published to the registry.", FAMILY_LABELS)
PROMOTED = _counter("promotions_total", "Moves of aliases to another version.", FAMILY_LABELS)
GATES = _counter(
    "gates_total", "Checkpoints checked by a gate, by result (passed: True or False).", ("family", "passed")
)

# Storage. `operation`: get, put, list, delete, exists, upload, download; `kind`: StorageUnavailable (no answer) or
# StorageError (refused). A missing object and a failed condition are answers, not errors.
STORAGE_SECONDS = _histogram(
    "storage_seconds", "Duration of an operation on storage, with its retries, in seconds.", ("operation",)
)
STORAGE_BYTES = _counter(
    "storage_bytes_total", "Bytes of objects read from and written to storage, by operation.", ("operation",)
)
STORAGE_ERRORS = _counter(
    "storage_errors_total", "Failed operations on storage, by operation and kind of error.", ("operation", "kind")
)

# `kind`: `Document.object_kind`. An object that stays damaged is counted at each read.
DAMAGED = _counter("damaged_objects_total", "Reads of damaged objects in storage, by kind of object.", ("kind",))

# Background threads that run as long as their process. `thread`: "alias-watcher" (of model hosts), "catalogue-reader"
# (of the gateway), "dispatch" or "kube-watch" (of the job service); failures also of "lease", "catalogue", "commands",
# "copy-log", "ship-log", "decode" and "export".
THREAD_PROGRESS = _gauge(
    "thread_progress_timestamp_seconds",
    "Unix time at which a background thread last completed a round or one object of a round, in seconds.",
    ("thread",),
    "livemin",
)
THREAD_FAILURES = _counter(
    "thread_failures_total", "Rounds of background threads that ended with an unexpected error, by thread.", ("thread",)
)

# Requests: counted by the gateway. The labels are empty for requests that name no existing model.
REQUESTS = _counter(
    "requests_total", "Answered requests, by route and HTTP status code.", (*VERSION_LABELS, "route", "code")
)
REQUEST_SECONDS = _histogram(
    "request_seconds", "Time from the request to the end of its answer, in seconds.", (*VERSION_LABELS, "route")
)
# Pools that were scaled to zero: counted by the gateway, which lets few requests wait for the first host.
POOL_WAITING = _gauge("pool_waiting_requests", "Requests that wait for the first host of a pool.", ("pool",), "livesum")
POOL_WAIT_SECONDS = _histogram(
    "pool_wait_seconds",
    "Time that a request has waited for the first host of a pool, in seconds.",
    ("pool",),
    _LONG_SECONDS,
)

# Model hosts.
FIRST_TOKEN_SECONDS = _histogram(
    "time_to_first_token_seconds",
    "Time from the request at the model host to the first token of its answer, in seconds.",
    VERSION_LABELS,
)
BETWEEN_TOKENS_SECONDS = _histogram(
    "time_between_tokens_seconds", "Time between two consecutive tokens of one text, in seconds.", VERSION_LABELS
)
TOKENS = _counter(
    "tokens_total", "Tokens read (kind: prompt) and generated (kind: completion).", (*VERSION_LABELS, "kind")
)
IMAGES = _counter("images_total", "Images and latents in answers, by verb.", (*VERSION_LABELS, "verb"))
BATCH_SIZE = _histogram(
    "batch_size", "Texts in one decoding step, or rows in one batch of an image model.", VERSION_LABELS, _ROWS
)
WAITING = _gauge(
    "waiting_requests",
    "Texts that wait for a slot of the key-value cache, or image requests that wait for a batch.",
    VERSION_LABELS,
    "livesum",
)
KV_SLOTS = _gauge(
    "kv_slots",
    "Slots of the key-value cache, by state: all slots or used slots.",
    (*VERSION_LABELS, "state"),
    "livesum",
)
LOADED_BYTES = _gauge("loaded_bytes", "Memory that a loaded version takes, in bytes.", VERSION_LABELS, "livesum")
ACTIVE = _gauge(
    "version_active",
    "Model hosts that have this version in memory and answer requests to an alias with it.",
    VERSION_LABELS,
    "livesum",
)
EVALUATION_METRIC = _gauge(
    "version_evaluation_metric",
    "Result of the newest evaluation of a served version, by name of the metric.",
    (*VERSION_LABELS, "metric"),
)
LOAD_SECONDS = _histogram(
    "version_load_seconds", "Time to download, verify and warm up a version, in seconds.", FAMILY_LABELS, _LONG_SECONDS
)
SWAPPED = _counter("versions_swapped_total", "Versions that replaced an older version on a model host.", VERSION_LABELS)
REFUSED = _counter(
    "versions_refused_total",
    "Versions that a model host refused: damaged, or not fit to be served.",
    VERSION_LABELS,
)


def version_labels(name: str, family: str) -> Labels:
    """Return the values of VERSION_LABELS for an exact name such as `shapes@3`.

    All checkpoints of a model share one value: a run may save thousands, and a series ends only with its process.
    """
    model, _, version = name.partition("@")
    return model, family, version if version.isdecimal() else "checkpoint"
