"""Expose invented, changing values of every metric, as nodes, Ray and the job service do.

python -m tests.support.made_up_metrics NODES_PORT RAY_PORT JOBS_PORT
"""

from __future__ import annotations

import itertools
import random
import sys
import threading
import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from genmodels import metrics

# Realistic values of each label; a metric has series for all combinations.
VALUES = {
    "job": ("shapes-0a1b2c3d", "texts-4e5f6a7b"),
    "model": ("first", "second"),
    "family": ("vae",),
    "version": ("1", "2"),
    "role": ("model", "generator", "discriminator"),
    "part": ("kl", "reconstruction", "accuracy_real", "accuracy_fake"),
    "metric": ("val_loss", "val_kl", "val_active_units", "val_frechet", "val_frechet_floor"),
    "cause": ("succeeded", "stopped", "infrastructure"),
    "passed": ("true", "false"),
    "operation": ("get", "put"),
    "kind": ("prompt", "completion"),
    "thread": ("alias-watcher", "catalogue-reader", "dispatch", "kube-watch"),
    "route": ("/v1/completions", "/v1/images/generations"),
    "code": ("200", "429", "503"),
    "verb": ("generate", "encode"),
    "state": ("running", "queued", "succeeded"),
    "pool": ("default", "gpu"),
    "Name": ("CPU", "memory"),
    "State": ("USED", "AVAILABLE"),
    "GpuIndex": ("0",),
}
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}  # of a metric's series
OF_JOBS = [metrics.STORAGE_UP, metrics.OPEN_RUNS, metrics.QUEUE_LENGTH, metrics.QUEUE_OLDEST]
RAY = {
    "ray_node_cpu_utilization": (),
    "ray_node_mem_used": (),
    "ray_node_mem_total": (),
    "ray_node_disk_utilization_percentage": (),
    "ray_node_gpus_utilization": ("GpuIndex",),
    "ray_node_gram_used": ("GpuIndex",),
    "ray_node_gram_available": ("GpuIndex",),
    "ray_resources": ("Name", "State"),
}


def main() -> None:
    nodes_port, ray_port, jobs_port = map(int, sys.argv[1:])
    of_ray = [Gauge(name, "", labels, registry=None) for name, labels in RAY.items()]
    of_nodes = [metric for metric in metrics.ALL if metric not in OF_JOBS]
    everything: dict[int, list[Any]] = {nodes_port: of_nodes, ray_port: of_ray, jobs_port: OF_JOBS}
    for port, exposed in everything.items():
        registry = CollectorRegistry()
        for metric in exposed:
            registry.register(metric)
        start_http_server(port, "127.0.0.1", registry)
    while True:
        for metric in itertools.chain(*everything.values()):
            move(metric)
        threading.Event().wait(0.2)


def move(metric: Any) -> None:
    for labels in itertools.product(*(VALUES[name] for name in metric._labelnames)):
        series = metric.labels(*labels) if labels else metric
        if metric in (metrics.TRAINING_PROGRESS, metrics.THREAD_PROGRESS):
            series.set(time.time())
        elif isinstance(series, Gauge):
            series.set(random.uniform(0.1, 1.0))
        elif isinstance(series, Counter):
            series.inc(random.randrange(1, 9))
        elif isinstance(series, Histogram):
            series.observe(random.uniform(0.0, 2.0))


if __name__ == "__main__":
    main()
