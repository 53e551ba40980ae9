"""make test-cluster: install the platform on a real cluster, train, generate, evict a serving pod, and remove it all.

    KUBECONFIG=FILE make test-cluster [OVERLAY=k8s/overlays/kind] [SECRETS=FOLDER]

The cluster needs what k8s/README.md names: KubeRay, a network plugin, a StorageClass, and the image of the overlay. The
namespace must not exist yet, because it is deleted at the end. SECRETS is a folder of `make secrets`, with the
credentials of the bucket; without it all secrets are new, as an overlay with a store of its own needs them. Prints each
step, and at the end "N passed, M failed"; without KUBECONFIG it says why nothing was run, and exits with 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from genmodels.runs.records import ENDED
from services.client.jobs import Client
from services.cluster.ports import free_ports
from tests.support.manifests import kubectl
from tests.support.paths import ROOT
from tests.support.proof import Check, run_checks, until

READY_SECONDS, STEP_SECONDS, DELETE_SECONDS = 1200, 900, 600
SPEC = {
    "name": "cluster",
    "models": [
        {
            "name": "cluster-digits",
            "model": {"family": "vae", "latent_dim": 8, "width": 8},
            "data": {"dataset": "digits"},
            "train": {"max_steps": 200, "batch_size": 32, "learning_rate": 3e-3},
        }
    ],
}
PICTURES = {"model": "cluster-digits", "n": 2, "seed": 3}


class Failed(Exception):
    """A step did not end as it should."""


@dataclass
class Cluster:
    """An overlay on the cluster that KUBECONFIG names."""

    overlay: Path
    namespace: str = field(init=False)

    def __post_init__(self) -> None:
        manifests = yaml.safe_load_all(self("kustomize", str(self.overlay)))
        (self.namespace,) = [m["metadata"]["name"] for m in manifests if m["kind"] == "Namespace"]

    def __call__(self, *arguments: str, stdin: str | None = None, seconds: float = 120.0) -> str:
        command = [kubectl(), *arguments]
        try:
            done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"kubectl {' '.join(arguments)}: not within {seconds:g} s") from None
        if done.returncode:
            raise Failed(f"kubectl {' '.join(arguments)}: {done.stderr.strip()[-2000:]}")
        return done.stdout

    def here(self, *arguments: str, stdin: str | None = None, seconds: float = 120.0) -> str:
        return self("-n", self.namespace, *arguments, stdin=stdin, seconds=seconds)

    def exists(self) -> bool:
        return bool(self("get", "namespace", self.namespace, "--ignore-not-found", "-o", "name").strip())

    def pods(self, component: str) -> list[str]:
        """Return the names of a component's pods that are ready and stay."""
        selector = f"app.kubernetes.io/component={component}"
        listed = json.loads(self.here("get", "pods", "-l", selector, "-o", "json"))["items"]
        return [pod["metadata"]["name"] for pod in listed if _is_ready(pod)]

    @contextlib.contextmanager
    def forwarded(self, service: str, port: int) -> Iterator[str]:
        """Yield a URL that leads to one of a service's pods."""
        local = free_ports(1)
        command = [kubectl(), "-n", self.namespace, "port-forward", f"service/{service}", f"{local}:{port}"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield f"http://127.0.0.1:{local}"
        finally:
            process.terminate()
            process.wait()

    def remove(self) -> None:
        """Delete the overlay; the RayService first, so that KubeRay can clear its part of Redis."""
        self.here("delete", "rayjobs,rayservices", "--all", f"--timeout={DELETE_SECONDS}s", seconds=DELETE_SECONDS + 30)
        delete = ["delete", "-k", str(self.overlay), "--ignore-not-found", f"--timeout={DELETE_SECONDS}s"]
        self(*delete, seconds=DELETE_SECONDS + 30)

    def state(self) -> str:
        return self.here("get", "pods,rayservices,rayjobs,events", "-o", "wide")


def _is_ready(pod: dict[str, Any]) -> bool:
    conditions = {condition["type"]: condition["status"] for condition in pod["status"].get("conditions", ())}
    return conditions.get("Ready") == "True" and "deletionTimestamp" not in pod["metadata"]


class Proof:
    """Run the steps in order. Each needs those before it, so the first failure is the last step."""

    def __init__(self, cluster: Cluster, secrets: Path) -> None:
        self.cluster, self.secrets = cluster, secrets

    def steps(self) -> list[tuple[str, Check]]:
        return [
            ("secrets are created", self.has_secrets),
            ("the overlay is applied, and the job service runs", self.applies),
            ("serving is ready", self.is_ready),
            ("a job is trained and published", self.trains),
            ("the model answers", self.generates),
            ("a serving pod is evicted, and the model answers again", self.loses_a_host),
        ]

    @property
    def key(self) -> str:
        return (self.secrets / "api_key").read_text().strip()

    def has_secrets(self) -> None:
        subprocess.run(["sh", str(ROOT / "docker" / "secrets.sh"), str(self.secrets)], check=True, capture_output=True)
        if not (self.secrets / "redis").exists():
            (self.secrets / "redis").write_text(os.urandom(32).hex())
        self.cluster("create", "namespace", self.cluster.namespace)
        for name, key, file in (
            ("genmodels-s3", "credentials", "s3_credentials"),
            ("genmodels-first-key", "api_key", "api_key"),
            ("genmodels-ray-token", "auth_token", "ray_token"),
            ("genmodels-redis", "password", "redis"),
            ("genmodels-store", "s3.json", "s3.json"),
        ):
            content = f"--from-file={key}={self.secrets / file}"
            self.cluster.here("create", "secret", "generic", name, content)

    def applies(self) -> None:
        self.cluster("apply", "--server-side", "--force-conflicts", "-k", str(self.cluster.overlay))
        rollout = ["rollout", "status", "deployment/genmodels-jobs", f"--timeout={STEP_SECONDS}s"]
        self.cluster.here(*rollout, seconds=STEP_SECONDS + 30)

    def is_ready(self) -> None:
        wait = ["wait", "rayservice/genmodels", "--for=condition=Ready", f"--timeout={READY_SECONDS}s"]
        self.cluster.here(*wait, seconds=READY_SECONDS + 30)

    def trains(self) -> str:
        with self.cluster.forwarded("genmodels-jobs", 8080) as url:
            client = Client(url, self.key)
            spec = json.dumps(SPEC).encode()
            job = until(lambda: client.submit(spec).job, "the job service takes a job", STEP_SECONDS)
            ended = until(lambda: _ended(client, job), "the job has ended", STEP_SECONDS)
        assert ended == "succeeded", f"the run of {job} has {ended}"
        return str(job)

    def generates(self) -> None:
        with self.cluster.forwarded("genmodels-serve-svc", 8000) as url:
            until(lambda: self.draws(url), "the model draws pictures", STEP_SECONDS)

    def draws(self, url: str) -> bool:
        headers = {"authorization": f"Bearer {self.key}"}
        answer = httpx.post(f"{url}/v1/images/generations", json=PICTURES, headers=headers, timeout=60, trust_env=False)
        return answer.status_code == 200 and len(answer.json()["data"]) == PICTURES["n"]

    def loses_a_host(self) -> str:
        """Evict a pod as a drain does; with one host there is a gap, which ends."""
        before = self.cluster.pods("hosts")
        pod = {"name": before[0], "namespace": self.cluster.namespace}
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": pod}
        way = f"/api/v1/namespaces/{self.cluster.namespace}/pods/{before[0]}/eviction"
        self.cluster("create", "--raw", way, "-f", "-", stdin=json.dumps(body))
        until(lambda: self.replaced(before), "another pod is ready", STEP_SECONDS)
        self.generates()
        return before[0]

    def replaced(self, before: list[str]) -> bool:
        now = self.cluster.pods("hosts")
        return before[0] not in now and len(now) >= len(before)


def _ended(client: Client, job: str) -> str | None:
    (run,) = client.job(job).models
    return run.state if run.state in ENDED else None


def main() -> int:
    if not os.environ.get("KUBECONFIG"):
        print("skipped: KUBECONFIG is not set, so no cluster is used; KUBECONFIG=FILE make test-cluster uses one")
        return 0
    cluster = Cluster(ROOT / (sys.argv[1] if len(sys.argv) > 1 else "k8s/overlays/kind"))
    if cluster.exists():
        print(f"the namespace {cluster.namespace} exists: this test makes it, and deletes it at the end")
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        secrets = Path(os.environ.get("SECRETS") or scratch)
        try:
            passed = run_checks(Proof(cluster, secrets).steps(), cluster.state)
        finally:
            cluster.remove()
    return 0 if passed and not cluster.exists() else 1


if __name__ == "__main__":
    sys.exit(main())
