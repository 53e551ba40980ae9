"""What happens around the models: queue, runs, storage, nodes."""

from __future__ import annotations

from boards.look import RATE, ZERO, Json, curves, dashboard, number, quantiles


def platform() -> Json:
    firing = 'sum by (alertname) (ALERTS{alertstate="firing"})'
    node = "sum by (instance) (ray_node_%s)"
    now = [
        number("Runs training", "Runs in state running.", ('max(genmodels_open_runs{state="running"})', "")),
        number(
            "Runs that wait", "For room in the cluster.", ("max(genmodels_queue_length)", ""), steps=((6, "orange"),)
        ),
        number(
            "Longest wait",
            "Of the run that waits longest; 0 if none does.",
            ("max(genmodels_queue_oldest_seconds)", ""),
            unit="s",
            steps=((1800, "orange"), (3600, "red")),
        ),
        number(
            "Storage",
            "Whether it answers the job service.",
            ("min(genmodels_storage_up)", ""),
            words={"0": ("away", "red"), "1": ("answers", "green")},
        ),
        number(
            "Age of these figures",
            "Since the job service last read runs and queue from storage.",
            ("max(genmodels_job_metrics_age_seconds)", ""),
            unit="s",
            steps=((60, "orange"), (300, "red")),
        ),
        number(
            "Alerts", "That fire now.", ('count(ALERTS{alertstate="firing"}) or vector(0)', ""), steps=((1, "red"),)
        ),
        number(
            "Targets away", "That do not answer Prometheus.", ("count(up == 0) or vector(0)", ""), steps=((1, "red"),)
        ),
    ]
    jobs = [
        curves("Open runs", "By state.", ("max by (state) (genmodels_open_runs)", "{{state}}"), stacked=True),
        curves(
            "Waiting for room",
            "How long runs had waited when they started; all so far.",
            *quantiles("genmodels_queue_wait_seconds", "", (0.5, 0.95), ever=True),
            unit="s",
        ),
        curves(
            "Attempts that ended",
            "All so far, by cause. An attempt is one start of a run's workers.",
            ("sum by (cause) (genmodels_attempts_ended_total)", "{{cause}}"),
        ),
        curves(
            "Runs that ended",
            "All so far, by state.",
            ("sum by (state) (genmodels_runs_ended_total)", "{{state}}"),
        ),
        curves(
            "Versions",
            "Published, and aliases moved to another one; all so far.",
            ("sum by (family) (genmodels_versions_published_total)", "{{family}} published"),
            ("sum by (family) (genmodels_promotions_total)", "{{family}} promoted"),
            width=8,
        ),
        curves(
            "Gates",
            "Checkpoints that passed their gate, or did not; all so far.",
            ("sum by (family, passed) (genmodels_gates_total)", "{{family}} passed: {{passed}}"),
            width=8,
        ),
        curves(
            "Alerts that fire", "See RUNBOOK.md for each.", (f"{firing} {ZERO}", "{{alertname}}"), width=8, stacked=True
        ),
    ]
    storage = [
        curves(
            "Operations",
            "On storage, a second.",
            (f"sum by (operation) (rate(genmodels_storage_seconds_count[{RATE}]))", "{{operation}}"),
            unit="ops",
            width=8,
        ),
        curves(
            "Time of an operation",
            "95th percentile, tries again included.",
            *quantiles("genmodels_storage_seconds", "", (0.95,), by="operation"),
            unit="s",
            width=8,
        ),
        curves(
            "Errors",
            "Operations that failed after all tries, a second.",
            (
                f"sum by (operation, kind) (rate(genmodels_storage_errors_total[{RATE}])) {ZERO}",
                "{{operation}} {{kind}}",
            ),
            unit="ops",
            width=8,
        ),
    ]
    nodes = [
        curves(
            "Scrapes", "1: the target answers.", ("max by (job, instance) (up)", "{{job}} {{instance}}"), limits=(0, 1)
        ),
        curves(
            "Time of a scrape",
            "Of each target.",
            ("max by (job, instance) (scrape_duration_seconds)", "{{job}} {{instance}}"),
            unit="s",
        ),
        curves(
            "CPU",
            "In use, of each node's.",
            (node % "cpu_utilization", "{{instance}}"),
            unit="percent",
            limits=(0, 100),
        ),
        curves(
            "Memory",
            "In use and all there is, of each node.",
            (node % "mem_used", "{{instance}} used"),
            (node % "mem_total", "{{instance}} all"),
            unit="bytes",
            limits=(0, None),
        ),
        curves(
            "CPUs given out",
            "What Ray has given to workers and what is free.",
            ('sum by (State) (ray_resources{Name="CPU"})', "{{State}}"),
            stacked=True,
        ),
        curves(
            "Disk",
            "In use, of each node's.",
            (node % "disk_utilization_percentage", "{{instance}}"),
            unit="percent",
            limits=(0, 100),
            alarm=90,
        ),
        curves(
            "GPU use",
            "Where there are GPUs.",
            ("sum by (instance, GpuIndex) (ray_node_gpus_utilization)", "{{instance}} {{GpuIndex}}"),
            unit="percent",
            limits=(0, 100),
        ),
        curves(
            "GPU memory of nodes",
            "In use, where there are GPUs.",
            ("sum by (instance, GpuIndex) (ray_node_gram_used)", "{{instance}} {{GpuIndex}}"),
            unit="mbytes",
            limits=(0, None),
        ),
    ]
    rows = {"Now": now, "Jobs": jobs, "Storage": storage, "Nodes": nodes}
    return dashboard("platform", "Platform", "Queue, runs, storage and nodes.", [], rows)
