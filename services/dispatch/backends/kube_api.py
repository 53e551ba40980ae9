"""The few requests to Kubernetes that the dispatcher needs, by the official client: RayJobs, and whether pods are left.

They need a Role with create, list and delete for `rayjobs.ray.io` and list for `pods`, in one namespace. None
raises for an API server that is away or refuses: what cannot be known is None.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genmodels.errors import GenmodelsError
from services.dispatch.backends.rayjob import API_VERSION, MANAGED_BY, POD_LABEL, RayJob

TIMEOUT = (2.0, 5.0)  # seconds to connect, and for an answer
RETRIES = 2  # after an answer of the server's trouble (RETRIED), as its Retry-After says
RETRIED = (429, 500, 502, 503, 504)
SILENCE_SECONDS = 2.0  # after a request that was not answered, before the next one is tried
LIST_SECONDS = 0.8  # for which a list is cached: all runs of a round share one
PAGE = 200  # RayJobs in an answer
NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
RESOURCE = tuple(API_VERSION.split("/"))  # group and version

log = logging.getLogger("genmodels.kube")


class KubeApi:
    """RayJobs of the platform in one namespace.

    Raises:
        GenmodelsError: the client is not installed, or there is no configuration of a cluster.
    """

    def __init__(self, namespace: str | None = None) -> None:
        try:
            from kubernetes import client
        except ImportError:
            raise GenmodelsError(
                "--backend kuberay needs the client of Kubernetes: pip install 'genmodels[kubernetes]'"
            ) from None
        api, own = _connect()
        self.namespace = namespace or own
        self.custom, self.core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        self._listed: tuple[float, dict[str, RayJob] | None] = (-LIST_SECONDS, None)
        self._silent_until = 0.0
        self._told: set[tuple[str, int]] = set()  # what went wrong and is in the log

    def jobs(self) -> dict[str, RayJob] | None:
        """All RayJobs of the platform by name, as they were within the last second."""
        asked, known = self._listed
        if time.monotonic() - asked >= LIST_SECONDS:
            known = self._list()
            self._listed = time.monotonic(), known
        return known

    def create(self, job: RayJob) -> tuple[int, str]:
        """Status of the answer (0: none came), and what it says. 409: it is there already."""
        self._forget()
        call = self.custom.create_namespaced_custom_object
        status, said = self._ask("create", "rayjobs", lambda: call(*RESOURCE, self.namespace, "rayjobs", job))
        return status, said if isinstance(said, str) else ""

    def delete(self, name: str) -> None:
        """Ask for the end of a RayJob; it is there until its cluster and its pods have gone (foreground)."""
        self._forget()
        call = self.custom.delete_namespaced_custom_object
        self._ask(
            "delete",
            "rayjobs",
            lambda: call(*RESOURCE, self.namespace, "rayjobs", name, propagation_policy="Foreground"),
        )

    def has_pods(self, name: str) -> bool | None:
        """Whether a pod of this RayJob may still run something."""
        status, found = self._ask(
            "list",
            "pods",
            lambda: self.core.list_namespaced_pod(
                self.namespace,
                label_selector=f"{POD_LABEL}={name}",
                field_selector="status.phase!=Succeeded,status.phase!=Failed",
                limit=1,
                _request_timeout=TIMEOUT,
            ),
        )
        return bool(found.items) if status == 200 else None

    def _list(self) -> dict[str, RayJob] | None:
        """Page by page; None where one does not come (410: it took too long, and the next look begins anew)."""
        selector = ",".join(f"{key}={value}" for key, value in MANAGED_BY.items())
        found: dict[str, RayJob] = {}
        going_on = ""
        while True:
            status, page = self._ask(
                "list",
                "rayjobs",
                lambda: self.custom.list_namespaced_custom_object(
                    *RESOURCE,
                    self.namespace,
                    "rayjobs",
                    label_selector=selector,
                    limit=PAGE,
                    _continue=going_on,  # noqa: B023 (called at once)
                    _request_timeout=TIMEOUT,
                ),
            )
            if status != 200 or not isinstance(page, dict):
                return None
            found |= {job["metadata"]["name"]: job for job in page["items"]}
            going_on = page["metadata"].get("continue") or ""
            if not going_on:
                return found

    def _forget(self) -> None:
        """What was listed is out of date."""
        self._listed = (-LIST_SECONDS, None)

    def _ask(self, verb: str, resource: str, call: Callable[[], Any]) -> tuple[int, Any]:
        """Status and what came with it, an error's message where it is one; (0, "") without an answer."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        if time.monotonic() < self._silent_until:
            return 0, ""
        status, answer = 200, None
        try:
            answer = call()
        except ApiException as error:
            status, answer = error.status or 0, _message(error.body) or error.reason or ""
        except (HTTPError, OSError) as error:
            status, answer = 0, str(error)
        if status == 0:
            self._silent_until = time.monotonic() + SILENCE_SECONDS
        self._tell(verb, resource, status, answer)
        return status, answer

    def _tell(self, verb: str, resource: str, status: int, answer: Any) -> None:
        """Say once what went wrong, until it goes well again."""
        what = f"{verb} {resource}"
        if status == 200:
            self._told = {told for told in self._told if told[0] != what}
        elif (what, status) not in self._told and status not in (404, 409, 410):
            self._told.add((what, status))
            if status in (401, 403):
                log.error(
                    "Kubernetes answers %d: %s. Its Role in namespace %s needs the verb %r for %r",
                    *(status, answer, self.namespace, verb, resource),
                )
            else:
                log.warning("Kubernetes does not %s %s: %s", verb, resource, f"{status} {answer}".strip())
        elif status == 404 and verb in ("list", "create") and (what, status) not in self._told:
            self._told.add((what, status))
            log.error("Kubernetes knows no RayJobs: is the KubeRay operator installed? (%s)", answer)


def _connect() -> tuple[Any, str]:
    """A client, and the namespace it belongs to: the pod's own, else that of the kubeconfig's context."""
    from kubernetes import client, config
    from urllib3 import Retry

    configuration = client.Configuration()
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(configuration)
            namespace = NAMESPACE.read_text().strip()
        else:
            path = os.environ.get("KUBECONFIG") or None
            config.load_kube_config(path, client_configuration=configuration)
            namespace = config.list_kube_config_contexts(path)[1]["context"].get("namespace") or "default"
    except (config.ConfigException, OSError) as error:
        raise GenmodelsError(f"--backend kuberay: no Kubernetes to be found: {error}") from None
    # Only what was answered is asked again at once: who does not answer may not for long, and others are waiting.
    configuration.retries = Retry(
        RETRIES,
        connect=0,
        read=0,
        other=0,
        status_forcelist=RETRIED,
        allowed_methods=None,  # creating twice is a 409
        backoff_factor=0.2,
        retry_after_max=int(TIMEOUT[1]),
        raise_on_status=False,
    )
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # else each retry leaves a line in the log
    return client.ApiClient(configuration), namespace


def _message(body: Any) -> str:
    """What an error says, which is a `Status` in JSON where it comes from the API server."""
    try:
        return str(json.loads(body)["message"])
    except (ValueError, TypeError, KeyError):
        return ""
