"""Send the dispatcher's few requests to Kubernetes by the official client: RayJobs, and their pods.

The requests need a Role with get, create, list, watch and delete for `rayjobs.ray.io` and list for `pods`, in one
namespace. No request raises if the API server is unreachable or refuses: an unknown value is None.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from genmodels.errors import GenmodelsError
from services.dispatch.backends.kube_watch import SILENCE_SECONDS, WATCH_SECONDS, JobWatch, NoAnswer
from services.dispatch.backends.pods import Pod
from services.dispatch.backends.rayjob import API_VERSION, MANAGED_BY, RayJob
from services.dispatch.backends.rayjob_pods import POD_LABEL

TIMEOUT = (2.0, 5.0)  # seconds to connect, and for an answer
RETRIES = 2  # after an answer with a status in RETRIED; the wait is that of its Retry-After
RETRIED = (429, 500, 502, 503, 504)
REST_SECONDS = 2.0  # from an unanswered request to the next request
PODS_SECONDS = 5.0  # lifetime of the list of the pods that have not started: all runs share it
PAGE = 200  # objects in an answer
NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
RESOURCE = tuple(API_VERSION.split("/"))  # group and version
SELECTOR = ",".join(f"{key}={value}" for key, value in MANAGED_BY.items())

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
        self._rayjobs = (*RESOURCE, self.namespace, "rayjobs")
        self.custom, self.core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        self.watch = JobWatch(self._list_jobs, self._open_watch)
        self._pending: tuple[float, dict[str, list[Pod]]] = (-PODS_SECONDS, {})
        self._silent_until = 0.0
        self._logged: set[tuple[str, int]] = set()  # failures already in the log: (verb and resource, status)
        self._logging = threading.Lock()  # the watch has a thread of its own

    def jobs(self) -> dict[str, RayJob] | None:
        """Return all RayJobs of the platform by name, as the watch knows them; None if they are unknown."""
        return self.watch.jobs()

    def get(self, name: str) -> tuple[int, Any]:
        """Return the answer's status, and the RayJob or the error's message."""
        return self._ask("get", "rayjobs", self.custom.get_namespaced_custom_object, *self._rayjobs, name)

    def create(self, job: RayJob) -> tuple[int, str]:
        """Create a RayJob; return the answer's status (0: no answer, 409: it exists already) and message."""
        call = self.custom.create_namespaced_custom_object
        status, message = self._ask("create", "rayjobs", call, *self._rayjobs, job)
        return status, message if isinstance(message, str) else ""

    def delete(self, name: str) -> None:
        """Request the deletion of a RayJob; it exists until its cluster and its pods are gone (foreground)."""
        call = self.custom.delete_namespaced_custom_object
        self._ask("delete", "rayjobs", call, *self._rayjobs, name, propagation_policy="Foreground")

    def has_pods(self, name: str) -> bool | None:
        """Tell whether a pod of this RayJob may still run; None if unknown."""
        pods = self._list_pods(f"{POD_LABEL}={name}", "status.phase!=Succeeded,status.phase!=Failed")
        return None if pods is None else bool(pods)

    def pending_pods(self, name: str) -> list[Pod]:
        """Return the pods of this RayJob that have not started, a few seconds old; empty if unknown.

        One list serves all runs.
        """
        listed_at, pods = self._pending
        if time.monotonic() - listed_at >= PODS_SECONDS:
            pods = {}
            for pod in self._list_pods(POD_LABEL, "status.phase=Pending") or ():
                pods.setdefault(pod["metadata"]["labels"][POD_LABEL], []).append(pod)
            self._pending = time.monotonic(), pods
        return pods.get(name, [])

    def _list_pods(self, labels: str, fields: str) -> list[Pod] | None:
        """List the pods that KubeRay made; another pod may have the label, e.g. a copy for debugging."""
        call = self.core.list_namespaced_pod
        query = {"label_selector": labels, "field_selector": fields}
        as_sent = {"_preload_content": False}  # JSON; the client's models check much
        status, pods, _ = self._list("pods", lambda **page: _json(call(self.namespace, **query, **as_sent, **page)))
        return [pod for pod in pods if _is_of_kuberay(pod)] if status == 200 else None

    def _list_jobs(self) -> tuple[list[RayJob], str]:
        call = self.custom.list_namespaced_custom_object
        status, jobs, version = self._list("rayjobs", partial(call, *self._rayjobs, label_selector=SELECTOR))
        if status != 200:
            raise NoAnswer(status)
        return jobs, version

    def _open_watch(self, version: str) -> Iterator[bytes]:
        call = partial(self.custom.list_namespaced_custom_object, *self._rayjobs, label_selector=SELECTOR, watch=True)
        query = {"resource_version": version, "allow_watch_bookmarks": True, "timeout_seconds": WATCH_SECONDS}
        raw = {"_preload_content": False, "_request_timeout": (TIMEOUT[0], SILENCE_SECONDS)}
        status, answer = self._ask("watch", "rayjobs", lambda **more: {"lines": call(**query, **more)}, **raw)
        if status != 200:
            raise NoAnswer(status)
        return _lines(answer["lines"])

    def _list(self, resource: str, call: Callable[..., Any]) -> tuple[int, list[Any], str]:
        """List page by page; return the status (410: the list took too long), the objects and the list's version."""
        items: list[Any] = []
        next_page = ""
        while True:
            status, page = self._ask("list", resource, call, limit=PAGE, _continue=next_page)
            if status != 200 or not isinstance(page.get("items"), list):
                return (0 if status == 200 else status), [], ""
            items += page["items"]
            metadata = page.get("metadata") or {}
            next_page = metadata.get("continue") or ""
            if not next_page:
                return 200, items, metadata.get("resourceVersion") or ""

    def _ask(self, verb: str, resource: str, call: Callable[..., Any], *what: Any, **query: Any) -> tuple[int, Any]:
        """Return the status, and the answer or the error's message; status 0 without an answer.

        An answer that is no JSON object, e.g. one that a proxy made or cut off, is none.
        """
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        if time.monotonic() < self._silent_until:
            return 0, ""
        status, answer = 200, None
        try:
            answer = call(*what, **{"_request_timeout": TIMEOUT, **query})
            if not isinstance(answer, dict):
                status, answer = 0, "the answer is no JSON object"
        except ApiException as error:
            status, answer = error.status or 0, _message(error.body) or error.reason or ""
        except (HTTPError, OSError, ValueError) as error:
            status, answer = 0, str(error)
        if status == 0:
            self._silent_until = time.monotonic() + REST_SECONDS
        with self._logging:
            self._log_failure(verb, resource, status, answer)
        return status, answer

    def _log_failure(self, verb: str, resource: str, status: int, answer: Any) -> None:
        """Log each failure once, until the request succeeds again."""
        request = f"{verb} {resource}"
        if status == 200:
            self._logged = {failure for failure in self._logged if failure[0] != request}
        elif (request, status) not in self._logged and status not in (404, 409, 410):
            self._logged.add((request, status))
            if status in (401, 403):
                log.error(
                    "Kubernetes answers %d: %s. Its Role in namespace %s needs the verb %r for %r",
                    *(status, answer, self.namespace, verb, resource),
                )
            else:
                log.warning("Kubernetes did not %s %s: %s", verb, resource, f"{status} {answer}".strip())
        elif status == 404 and verb in ("list", "create") and (request, status) not in self._logged:
            self._logged.add((request, status))
            log.error("Kubernetes knows no RayJobs: is the KubeRay operator installed? (%s)", answer)


def _connect() -> tuple[Any, str]:
    """Return a client and its namespace: the pod's own, else that of the kubeconfig's context."""
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
        raise GenmodelsError(f"--backend kuberay: no Kubernetes cluster is configured: {error}") from None
    # Only an answered request is retried at once: a silent server may stay silent, and other runs wait for this thread.
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


def _lines(response: Any) -> Iterator[bytes]:
    """Return the lines of an answer as they come; a lost connection only ends them."""
    from urllib3.exceptions import HTTPError, ReadTimeoutError

    try:
        yield from response
    except ReadTimeoutError:
        log.warning("a watch of the RayJobs was silent for %.0f s: it is opened again", SILENCE_SECONDS)
    except (HTTPError, OSError) as error:
        log.debug("a watch of the RayJobs ended: %s", error)
    finally:
        response.close()


def _json(response: Any) -> Any:
    return json.loads(response.data)


def _is_of_kuberay(pod: Pod) -> bool:
    owners = pod["metadata"].get("ownerReferences") or ()
    return any(owner["kind"] == "RayCluster" for owner in owners)


def _message(body: Any) -> str:
    """Return the message of an error; the API server sends a `Status` in JSON."""
    try:
        return str(json.loads(body)["message"])
    except (ValueError, TypeError, KeyError):
        return ""
