"""Build the dashboard of the platform: queue, runs, storage, nodes."""

from __future__ import annotations

from boards.look import RATE, ZERO, Json, curves, dashboard, number, quantiles


def platform() -> Json:
    firing = 'sum by (alertname) (ALERTS{alertstate="firing"})'
    node = "sum by (instance) (ray_node_%s)"
    now = [
        number("Runs training", "Runs in state running.", ('max(genmodels_open_runs{state="running"})', "")),
        number(
            "Runs waiting",
            "Runs that wait for free resources in the cluster.",
            ("max(genmodels_queue_length)", ""),
            steps=((6, "orange"),),
        ),
        number(
            "Longest wait",
            "Longest time a run has waited in the queue; 0 if none waits.",
            ("max(genmodels_queue_oldest_seconds)", ""),
            unit="s",
            steps=((1800, "orange"), (3600, "red")),
        ),
        number(
            "Storage",
            "Whether the storage answers the job service.",
            ("min(genmodels_storage_up)", ""),
            words={"0": ("unavailable", "red"), "1": ("answers", "green")},
        ),
        number(
            "Age of these values",
            "Time since the job service last read runs and queue from storage.",
            ("max(genmodels_job_metrics_age_seconds)", ""),
            unit="s",
            steps=((60, "orange"), (300, "red")),
        ),
        number(
            "Alerts",
            "Alerts that fire now.",
            ('count(ALERTS{alertstate="firing"}) or vector(0)', ""),
            steps=((1, "red"),),
        ),
        number(
            "Targets down",
            "Targets that do not answer Prometheus.",
            ('count(up{job=~"genmodels-.+"} == 0) or vector(0)', ""),
            steps=((1, "red"),),
        ),
    ]
    jobs = [
        curves(
            "Open runs",
            "Number of open runs, by state.",
            ("max by (state) (genmodels_open_runs)", "{{state}}"),
            stacked=True,
        ),
        curves(
            "Time in the queue",
            "Time that runs had waited when they started; median and 95th percentile of all so far.",
            *quantiles("genmodels_queue_wait_seconds", "", (0.5, 0.95), ever=True),
            unit="s",
        ),
        curves(
            "Attempts that ended",
            "Total by cause. An attempt is one start of a run's workers.",
            ("sum by (cause) (genmodels_attempts_ended_total)", "{{cause}}"),
        ),
        curves(
            "Runs that ended",
            "Total by state.",
            ("sum by (state) (genmodels_runs_ended_total)", "{{state}}"),
        ),
        curves(
            "Versions",
            "Total of published versions, and of aliases moved to another version.",
            ("sum by (family) (genmodels_versions_published_total)", "{{family}} published"),
            ("sum by (family) (genmodels_promotions_total)", "{{family}} promoted"),
            width=8,
        ),
        curves(
            "Gates",
            "Total of checkpoints that passed or failed their gate.",
            ("sum by (family, passed) (genmodels_gates_total)", "{{family}} passed: {{passed}}"),
            width=8,
        ),
        curves(
            "Alerts that fire",
            "RUNBOOK.md describes each alert.",
            (f"{firing} {ZERO}", "{{alertname}}"),
            width=8,
            stacked=True,
        ),
    ]
    storage = [
        curves(
            "Operations",
            "Storage operations per second.",
            (f"sum by (operation) (rate(genmodels_storage_seconds_count[{RATE}]))", "{{operation}}"),
            unit="ops",
            width=6,
        ),
        curves(
            "Bytes",
            "Bytes of objects read and written per second.",
            (f"sum by (operation) (rate(genmodels_storage_bytes_total[{RATE}]))", "{{operation}}"),
            unit="Bps",
            width=6,
        ),
        curves(
            "Duration of an operation",
            "95th percentile, retries included.",
            *quantiles("genmodels_storage_seconds", "", (0.95,), by="operation"),
            unit="s",
            width=6,
        ),
        curves(
            "Errors",
            "Operations per second that failed after all retries.",
            (
                f"sum by (operation, kind) (rate(genmodels_storage_errors_total[{RATE}])) {ZERO}",
                "{{operation}} {{kind}}",
            ),
            unit="ops",
            width=6,
        ),
    ]
    nodes = [
        curves(
            "Scrapes",
            "1: the target answers.",
            ('max by (job, instance) (up{job=~"genmodels-.+"})', "{{job}} {{instance}}"),
            limits=(0, 1),
        ),
        curves(
            "Duration of a scrape",
            "Duration for each target.",
            ("max by (job, instance) (scrape_duration_seconds)", "{{job}} {{instance}}"),
            unit="s",
        ),
        curves(
            "CPU",
            "CPU utilization of each node.",
            (node % "cpu_utilization", "{{instance}}"),
            unit="percent",
            limits=(0, 100),
        ),
        curves(
            "Memory",
            "Memory in use and total memory of each node.",
            (node % "mem_used", "{{instance}} used"),
            (node % "mem_total", "{{instance}} total"),
            unit="bytes",
            limits=(0, None),
        ),
        curves(
            "Allocated CPUs",
            "CPUs that Ray has allocated to workers, and free CPUs.",
            ('sum by (State) (ray_resources{Name="CPU"})', "{{State}}"),
            stacked=True,
        ),
        curves(
            "Disk",
            "Share of each node's disk in use.",
            (node % "disk_utilization_percentage", "{{instance}}"),
            unit="percent",
            limits=(0, 100),
            alarm=90,
        ),
        curves(
            "GPU utilization",
            "Utilization of each GPU; empty on nodes without GPUs.",
            ("sum by (instance, GpuIndex) (ray_node_gpus_utilization)", "{{instance}} {{GpuIndex}}"),
            unit="percent",
            limits=(0, 100),
        ),
        curves(
            "GPU memory of nodes",
            "Memory in use of each GPU; empty on nodes without GPUs.",
            ("sum by (instance, GpuIndex) (ray_node_gram_used)", "{{instance}} {{GpuIndex}}"),
            unit="mbytes",
            limits=(0, None),
        ),
    ]
    rows = {"Now": now, "Jobs": jobs, "Storage": storage, "Nodes": nodes}
    return dashboard("platform", "Platform", "Queue, runs, storage and nodes.", [], rows)
