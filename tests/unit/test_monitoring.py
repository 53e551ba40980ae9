"""Test that alerts fire when they should, and that every dashboard panel shows what a real Prometheus scraped."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import promql_parser
import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from genmodels import metrics
from services.cluster.ports import free_ports
from tests.support import dashboard_panels, made_up_metrics
from tests.support.paths import ROOT
from tests.support.ray_node import until

PROMETHEUS, GRAFANA = ROOT / "docker/prometheus", ROOT / "docker/grafana"
RULES = sorted(PROMETHEUS.glob("rules/*.yml"))
UNIT_TESTS = sorted(PROMETHEUS.glob("tests/*.yml"))
SCHEMA = ROOT.parent / "shared/k8s/schemas-grafana/dashboard-13.2.json"
RATE_INTERVAL = "4s"  # of scrapes each second

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")),
    reason="no promtool and prometheus on the PATH: apt-get install prometheus",
)


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def rules() -> list[dict[str, Any]]:
    return [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


ALERTS = [rule["alert"] for rule in rules() if "alert" in rule]


@needs_prometheus
def test_configuration_and_rules_are_valid() -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    promtool("check", "rules", "--lint-fatal", *RULES)


@pytest.mark.slow
@needs_prometheus
@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.name)
def test_alerts_fire_where_they_should_and_nowhere_else(path: Path) -> None:
    promtool("test", "rules", path)


def test_every_alert_is_tested_both_ways() -> None:
    tests = [test for path in UNIT_TESTS for test in yaml.safe_load(path.read_text())["tests"]]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == set(ALERTS)
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == set(ALERTS)
    assert len(set(ALERTS)) == len(ALERTS)


def test_every_alert_has_its_place_in_the_runbook() -> None:
    runbook = (PROMETHEUS / "RUNBOOK.md").read_text()
    assert re.findall(r"^### (\w+)$", runbook, re.MULTILINE) == ALERTS, "in this order"
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in {"critical", "warning"}
            assert rule["annotations"].keys() == {"summary", "description", "runbook"}
            assert rule["annotations"]["runbook"] == f"docker/prometheus/RUNBOOK.md#{rule['alert'].lower()}"


def exposed(metric: MetricWrapperBase) -> set[str]:
    """Return the names of a metric's series."""
    return {f"{metric._name}{suffix}" for suffix in made_up_metrics.SUFFIXES[metric._type]}


def named(expr: str) -> set[str]:
    """Return the metrics in a query: names, or the pattern of a name."""

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, promql_parser.VectorSelector):
            patterns = [matcher.value for matcher in node.matchers.matchers if matcher.name == "__name__"]
            yield from patterns if node.name is None else [node.name]
        for name in ("expr", "lhs", "rhs", "vector_selector"):
            if (inner := getattr(node, name, None)) is not None:
                yield from walk(inner)
        for inner in getattr(node, "args", None) or []:
            yield from walk(inner)

    return set(walk(promql_parser.parse(expr)))


def test_queries_name_only_metrics_that_there_are() -> None:
    ours = set().union(*map(exposed, metrics.ALL))
    of_prometheus = {"up", "ALERTS", "scrape_duration_seconds"}
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    of_kubernetes = {"kube_statefulset_status_replicas_ready"}  # kube-state-metrics
    there = ours | of_prometheus | of_kubernetes | recorded | set(made_up_metrics.RAY)
    expressions = [query.expr for query in dashboard_panels.queries()] + [rule["expr"] for rule in rules()]
    for expr in expressions:
        names = named(expr)
        assert names, expr
        for name in names:
            assert any(re.fullmatch(name, other) for other in there), f"{name} in {expr}"
    shown = set().union(*(named(query.expr) for query in dashboard_panels.queries()))
    used = shown.union(*(named(rule["expr"]) for rule in rules()))
    unseen = [metric._name for metric in metrics.ALL if not used & exposed(metric)]
    assert unseen == ["genmodels_training_samples"], "all is shown, or alerted on; of this its rate is"


@pytest.mark.parametrize("path", dashboard_panels.DASHBOARDS, ids=lambda path: path.name)
def test_dashboards_are_what_grafana_reads(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        assert panel["title"]
        if panel["type"] not in {"row", "text"}:
            assert panel["description"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert all(target["datasource"]["uid"] == source()["uid"] for target in panel["targets"])
    if not SCHEMA.exists():
        pytest.skip(f"checked, but not against Grafana's schema: no {SCHEMA.name}")
    jsonschema.Draft7Validator(json.loads(SCHEMA.read_text())).validate(dashboard)


def source() -> dict[str, Any]:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    return source


def test_dashboards_are_as_their_code_says(tmp_path: Path) -> None:
    subprocess.run([sys.executable, GRAFANA / "dashboards.py", "--output", tmp_path], check=True)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_text() for path in dashboard_panels.DASHBOARDS}, (
        "run docker/grafana/dashboards.py"
    )


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a real Prometheus, configured as in compose, except addresses and scrape interval."""
    folder = tmp_path_factory.mktemp("prometheus")
    own = free_ports(4)
    ports = {
        name: own + i for i, name in enumerate(("prometheus", "genmodels-nodes", "genmodels-ray", "genmodels-jobs"))
    }
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(path) for path in RULES]
    for job in config["scrape_configs"]:
        job.pop("dns_sd_configs", None)
        job["static_configs"] = [{"targets": [f"127.0.0.1:{ports[job['job_name']]}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{own}"
    command = [
        "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{own}", "--log.level=warn",
    ]  # fmt: skip
    values = subprocess.Popen([sys.executable, "-m", made_up_metrics.__name__, *(str(own + i) for i in (1, 2, 3))])
    server = subprocess.Popen(command)
    try:
        until(lambda: _ready(url), "Prometheus answers")
        yield url
    finally:
        for process in (server, values):
            process.terminate()
            process.wait()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", trust_env=False).is_success
    except httpx.HTTPError:
        return False


@pytest.mark.slow
@needs_prometheus
def test_every_panel_shows_something(prometheus: str) -> None:
    queries = dashboard_panels.queries(RATE_INTERVAL)
    assert {query.dashboard for query in queries} == {"Platform", "Training", "Serving"}
    assert not dashboard_panels.silent(prometheus, queries, history=120, patience=90)
    nothing = dashboard_panels.Query("", "", "genmodels_nothing")
    assert dashboard_panels.silent(prometheus, [nothing], history=120, patience=0) == [nothing]
    with pytest.raises(ValueError, match="parse error"):
        dashboard_panels.silent(prometheus, [dashboard_panels.Query("", "", "rate(")], history=120, patience=0)


@needs_prometheus
def test_rules_evaluate_and_a_run_keeps_its_own_label_job(prometheus: str) -> None:
    def groups() -> list[dict[str, Any]]:
        return httpx.get(f"{prometheus}/api/v1/rules", trust_env=False).json()["data"]["groups"]

    def evaluated() -> bool:
        return all(rule["health"] != "unknown" for group in groups() for rule in group["rules"])

    until(evaluated, "every rule is evaluated")
    assert not [rule["lastError"] for group in groups() for rule in group["rules"] if rule["health"] != "ok"]

    def jobs() -> list[str]:
        query = {"match[]": "genmodels_training_step"}
        answer = httpx.get(f"{prometheus}/api/v1/label/job/values", params=query, trust_env=False)
        return answer.json()["data"]

    until(jobs, "a run is scraped")
    assert jobs() == list(made_up_metrics.VALUES["job"])
