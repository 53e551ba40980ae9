"""Run a dispatcher on a fake Kubernetes: a template of RayJobs, the API server, the operator, and scripted drivers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from genmodels.runs.store import Run
from genmodels.storage import Storage
from services.dispatch.backends import kube_api, kube_watch
from services.dispatch.backends.base import Capacity
from services.dispatch.backends.kuberay import KubeRayBackend
from services.dispatch.backends.rayjob import KubeOptions
from services.dispatch.dispatcher import Dispatcher
from tests.support.fake_kuberay import Operator
from tests.support.fake_kubernetes import KubeApi
from tests.support.paths import ROOT
from tests.support.ray_node import until
from tests.support.scripted_cluster import state
from tests.support.scripted_drivers import Driver, Script, succeeds

POD = {"spec": {"containers": [{"name": "ray", "image": "genmodels:test", "resources": {"limits": {"cpu": "2"}}}]}}
TEMPLATE: dict[str, Any] = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"name": "any", "labels": {"app.kubernetes.io/part-of": "genmodels"}},
    "spec": {
        "rayClusterSpec": {
            "rayVersion": "2.60.0",
            "headGroupSpec": {"template": POD},
            "workerGroupSpecs": [
                {"groupName": "workers", "template": POD},
                {"groupName": "gpu-workers", "template": POD},
            ],
        }
    },
}
STATUSES: dict[str, Any] = yaml.safe_load((ROOT / "tests/k8s/fixtures/pod_statuses.yaml").read_text())


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeApi]:
    watches: list[kube_watch.JobWatch] = []
    monkeypatch.setattr(kube_api, "JobWatch", lambda *calls: watches.append(kube_watch.JobWatch(*calls)) or watches[-1])
    for wait in ("REOPEN_SECONDS", "MIN_BACKOFF", "MAX_BACKOFF"):
        monkeypatch.setattr(kube_watch, wait, 0.01)
    monkeypatch.setattr(kube_api, "REST_SECONDS", 0.0)
    monkeypatch.setattr(kube_api, "PODS_SECONDS", 0.0)
    monkeypatch.setattr(kube_api, "TIMEOUT", (2.0, 20.0))
    (tmp_path / "template.yaml").write_text(yaml.safe_dump(TEMPLATE))
    with KubeApi() as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path)))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        yield api
        for watch in watches:
            watch.stop.set()


class Platform:
    """A dispatcher on Kubernetes; the n-th attempt of a model follows its n-th script, the last one again."""

    def __init__(
        self, api: KubeApi, template: Path | str, storage: Storage, queue: str | None = None, **scripts: list[Script]
    ) -> None:
        """Args:
        template: the folder of its file, or the name of its object.
        """
        self.api, self.storage, self.scripts = api, storage, scripts
        source = (
            {"template_object": template} if isinstance(template, str) else {"template": template / "template.yaml"}
        )
        self.options = KubeOptions(**source, queue=queue)
        self.operator = Operator(api, self.driver)
        self.most = Capacity(0, 0)
        self.restart()

    def restart(self) -> None:
        """Start a new dispatcher without any state in memory."""
        self.backend = KubeRayBackend(self.storage, self.options, self.most)
        self.dispatcher = Dispatcher(self.storage, self.backend)
        self.lease_term = getattr(self, "lease_term", 0) + 1
        self.catch_up()

    def driver(self, job: dict[str, Any]) -> Any:
        name, attempt = (
            job["metadata"]["annotations"]["genmodels/run"],
            int(job["metadata"]["labels"]["genmodels/attempt"]),
        )
        run = Run(self.storage, *name.split("/"))
        scripts = self.scripts.get(run.model, [succeeds])
        return Driver(scripts[min(attempt, len(scripts)) - 1](run, attempt))

    def reconcile(self, rounds: int = 1) -> None:
        for _ in range(rounds):
            self.catch_up()
            self.dispatcher.dispatch_once(self.lease_term)
            self.operator.reconcile()
        self.catch_up()

    def poll(self, driver: Any) -> int | None:
        self.catch_up()
        code: int | None = driver.poll()
        return code

    def catch_up(self) -> None:
        """Wait until the dispatcher's watch has brought all changes, or has failed."""
        watch = self.backend.api.watch

        def is_current() -> bool:
            return watch.jobs() is not None and watch.version == str(self.api.version)

        until(lambda: is_current() or watch.failures > 0, "it catches up", 30, 0.002)

    def until(self, model: str, wanted: str, job: str, attempt: int = 1) -> Any:
        """Reconcile until the run is in this state, in this attempt or a later one."""
        for _ in range(100):
            status = state(self.storage, job, model)
            if status.state == wanted and status.attempt >= attempt:
                return status
            self.reconcile()
        pytest.fail(f"{model}: {status.state} ({status.reason}), attempt {status.attempt}")

    def reasons(self, job: str, model: str) -> list[str]:
        return [change.reason for change in state(self.storage, job, model).history]


def change_template(folder: Path, **changes: Any) -> None:
    """Write the template with a changed spec, or a changed group of workers."""
    template = copy.deepcopy(TEMPLATE)
    group = template["spec"]["rayClusterSpec"]["workerGroupSpecs"][changes.pop("at", 0)]
    group |= changes.pop("group", {})
    template["spec"] |= changes
    (folder / "template.yaml").write_text(yaml.safe_dump(template))
