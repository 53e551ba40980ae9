"""Serve a Kubernetes API with RayJobs and pods over real HTTP.

It checks new objects against the schema of the RayJob CRD (KubeRay 1.7.0), and does what an API server does with
names, labels, the status subresource, finalizers, foreground deletion, pages of a list, watches, tokens and roles.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jsonschema
import yaml

from tests.support.paths import ROOT

NAMESPACE, TOKEN = "genmodels", "the-token"
SCHEMA = ROOT / "tests/k8s/schemas" / "ray.io_v1_RayJob.json"
PATH = re.compile(
    rf"/(?:apis/ray\.io/v1|api/v1)/namespaces/{NAMESPACE}/(?P<resource>rayjobs|pods)(?:/(?P<name>[^/]+))?"
)
ROLE = {("rayjobs", verb) for verb in ("get", "create", "list", "watch", "delete")} | {("pods", "list")}
Object = dict[str, Any]


class Refused(Exception):
    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code}
        self.body |= {"message": message, "metadata": {}}
        self.code = code


class KubeApi:
    """Serve from `with` on.

    Attributes:
        jobs, pods: all objects, by name.
        role: (resource, verb) pairs that the token's account may use.
        ill: statuses of the next responses, in place of what the requests ask for.
        away: whether connections are closed without an answer.
        damaged: the body of all responses, in place of the answer.
        lost: whether the response to the next request is lost after the request was carried out.
        silent: whether watches send nothing more, and do not end.
        oldest: a watch from a version before this one is refused with status 410.
        requests: "VERB resource" of every request that came.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, Object] = {}
        self.pods: dict[str, Object] = {}
        self.role = set(ROLE)
        self.ill: list[int] = []
        self.away = self.lost = self.expired = self.silent = False
        self.damaged: bytes | None = None
        self.requests: list[str] = []
        self.version = self.oldest = 0
        self.events: list[tuple[int, str, Object]] = []  # version, type and object of each change of a RayJob
        self.dropped = 0  # times that all watches were cut off
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.valid = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # one packet for each response

            def do(self) -> None:
                api.handle(self)

            do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = do

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    def __enter__(self) -> KubeApi:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.drop_watches()
        self.server.shutdown()
        self.server.server_close()

    def kubeconfig(self, folder: Path, token: str = TOKEN) -> Path:
        """Write a kubeconfig file for this server; return its path."""
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{self.server.server_port}"}}],
            "users": [{"name": "jobs", "user": {"token": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "here", "user": "jobs", "namespace": NAMESPACE}}],
            "current-context": "c",
        }
        (folder / "kubeconfig").write_text(yaml.safe_dump(document))
        return folder / "kubeconfig"

    # Requests

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        length = int(request.headers.get("content-length") or 0)
        body = json.loads(request.rfile.read(length)) if length else None
        with self.lock:
            if self.away:
                request.close_connection = True
                return
            try:
                code, answer = self._answer(request, body)
                if "stream" in answer and self.damaged is None:
                    answer["stream"]()
                    return
            except Refused as refused:
                code, answer = refused.code, refused.body
            if self.lost:
                self.lost, request.close_connection = False, True
                return
        data = json.dumps(answer).encode() if self.damaged is None else self.damaged
        request.send_response(code)
        request.send_header("content-type", "application/json")
        request.send_header("content-length", str(len(data)))
        if code in (429, 503):
            request.send_header("retry-after", "0")
        request.end_headers()
        request.wfile.write(data)

    def _answer(self, request: BaseHTTPRequestHandler, body: Object | None) -> tuple[int, Object]:
        parts = urlsplit(request.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        match = PATH.fullmatch(parts.path)
        if match is None:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        resource, name = match["resource"], match["name"]
        verb = {"POST": "create", "DELETE": "delete", "GET": "get" if name else "list"}[request.command]
        verb = "watch" if "watch" in query else verb
        self.requests.append(f"{verb} {resource}")
        if self.ill:
            raise Refused(self.ill.pop(0), "TooManyRequests", "the server is ill")
        if (request.headers.get("authorization") or "").casefold() != f"bearer {TOKEN}":
            raise Refused(401, "Unauthorized", "Unauthorized")
        if (resource, verb) not in self.role:
            raise Refused(403, "Forbidden", f"{resource} is forbidden: the account cannot {verb} resource {resource!r}")
        if verb == "create":
            assert body is not None
            return 201, self._create(body)
        if verb == "watch":
            if int(query["resourceVersion"]) < self.oldest:
                raise Refused(410, "Expired", f"too old resource version: {query['resourceVersion']} ({self.oldest})")
            return 200, {"stream": lambda: self._stream(request, query)}
        if verb == "list":
            return 200, self._list(self.jobs if resource == "rayjobs" else self.pods, query)
        if name not in self.jobs:
            raise Refused(404, "NotFound", f"rayjobs.ray.io {name!r} not found")
        if verb == "delete":
            self.delete(name, (body or {}).get("propagationPolicy") or query.get("propagationPolicy") or "Background")
        return 200, self.jobs.get(name, {"kind": "Status", "status": "Success"})

    def _create(self, body: Object) -> Object:
        job = copy.deepcopy(body)
        errors = list(self.valid.iter_errors(job))
        problem = errors[0].message if errors else check_labels(job)
        if problem:
            raise Refused(422, "Invalid", f"RayJob.ray.io is invalid: {problem}")
        meta = job["metadata"]
        if meta["name"] in self.jobs:
            raise Refused(409, "AlreadyExists", f"rayjobs.ray.io {meta['name']!r} already exists")
        job.pop("status", None)  # a subresource
        meta |= {"uid": str(uuid.uuid4()), "namespace": NAMESPACE, "generation": 1}
        meta["creationTimestamp"] = "2026-01-01T00:00:00Z"
        self.jobs[meta["name"]] = job
        self.touch(job)
        return job

    def _list(self, objects: dict[str, Object], query: dict[str, str]) -> Object:
        phases = re.findall(r"status\.phase(!?=)(\w+)", query.get("fieldSelector", ""))
        items = [
            each
            for _, each in sorted(objects.items())
            if _is_selected(each, query)
            and all((each["status"]["phase"] == phase) == (sign == "=") for sign, phase in phases)
        ]
        begin, limit = int(query.get("continue") or 0), int(query.get("limit") or len(items) or 1)
        if begin and self.expired:
            raise Refused(410, "Expired", "the provided continue parameter is too old")
        more = str(begin + limit) if begin + limit < len(items) else ""
        meta = {"resourceVersion": str(self.version), "continue": more}
        return {"kind": "List", "apiVersion": "v1", "metadata": meta, "items": items[begin : begin + limit]}

    # Watches

    def _stream(self, request: BaseHTTPRequestHandler, query: dict[str, str]) -> None:
        """Send all changes after a version as they happen, a bookmark, and the end after `timeoutSeconds`."""
        request.send_response(200)
        request.send_header("content-type", "application/json")
        request.send_header("transfer-encoding", "chunked")
        request.end_headers()
        version, dropped = int(query["resourceVersion"]), self.dropped
        end = time.monotonic() + int(query["timeoutSeconds"])
        while not self.away and self.dropped == dropped:
            if not self.silent:
                lines = [_event(kind, job, at, query) for at, kind, job in self.events if at > version]
                version = max(version, self.version)
                over = time.monotonic() >= end
                lines += [_event("BOOKMARK", {}, version, query)] if over else []
                _send(request, lines, over)
                if over:
                    return
            self.changed.wait(0.05)
        request.close_connection = True  # in the middle of the answer

    def drop_watches(self) -> None:
        with self.changed:
            self.dropped += 1
            self.changed.notify_all()

    def _publish(self, kind: str, job: Object) -> None:
        self.version += 1
        job["metadata"]["resourceVersion"] = str(self.version)
        self.events.append((self.version, kind, copy.deepcopy(job)))
        self.changed.notify_all()

    # The actions of a controller

    def touch(self, job: Object) -> None:
        with self.changed:
            self._publish("MODIFIED" if "resourceVersion" in job["metadata"] else "ADDED", job)

    def delete(self, name: str, policy: str = "Background") -> None:
        meta = self.jobs[name]["metadata"]
        if policy == "Foreground" and "foregroundDeletion" not in meta.setdefault("finalizers", []):
            meta["finalizers"].append("foregroundDeletion")
        meta.setdefault("deletionTimestamp", "2026-01-01T00:00:01Z")
        self.collect(name)

    def collect(self, name: str) -> None:
        """Collect garbage: an object under foreground deletion waits for the objects that it owns."""
        meta = self.jobs[name]["metadata"]
        finalizers = meta.get("finalizers") or []
        if "foregroundDeletion" in finalizers and not self.pods_of(name):
            finalizers.remove("foregroundDeletion")
        self.touch(self.jobs[name])
        if "deletionTimestamp" in meta and not finalizers:
            with self.changed:
                self._publish("DELETED", self.jobs.pop(name))

    def pods_of(self, name: str) -> list[str]:
        return [pod for pod, each in self.pods.items() if each["metadata"]["labels"].get("genmodels/rayjob") == name]

    def status(self, name: str, **status: Any) -> None:
        job = self.jobs[name]
        job["status"] = {**job.get("status", {}), **status}
        self.touch(job)


def _is_selected(each: Object, query: dict[str, str]) -> bool:
    labels = [label.partition("=") for label in query.get("labelSelector", "").split(",") if label]
    return all(_has_label(each, key, value if sign else None) for key, sign, value in labels)


def _event(kind: str, job: Object, version: int, query: dict[str, str]) -> bytes:
    """Return a line of a watch; a change of an object that the watch does not select is a bookmark."""
    if kind == "BOOKMARK" or not _is_selected(job, query):
        kind, job = "BOOKMARK", {"kind": "RayJob", "metadata": {"resourceVersion": str(version)}}
    return json.dumps({"type": kind, "object": job}).encode() + b"\n"


def _send(request: BaseHTTPRequestHandler, lines: list[bytes], last: bool) -> None:
    chunks = [b"%x\r\n%s\r\n" % (len(line), line) for line in lines] + ([b"0\r\n\r\n"] if last else [])
    with contextlib.suppress(OSError):  # the client is gone
        request.wfile.write(b"".join(chunks))
        request.wfile.flush()


def _has_label(each: Object, key: str, value: str | None) -> bool:
    labels = each["metadata"].get("labels", {})
    return key in labels and value in (None, labels[key])


def check_labels(job: Object) -> str:
    """Return the API server's error about names and labels; "" if none."""
    templates = [group["template"] for group in groups_of(job["spec"])]
    for each in (job["metadata"], *(template.get("metadata", {}) for template in templates)):
        for key, value in each.get("labels", {}).items():
            if not re.fullmatch(r"([a-z0-9.-]+/)?[A-Za-z0-9][-A-Za-z0-9_.]{0,62}", key):
                return f"label {key!r} is no label"
            if len(value) > 63 or not re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?", value):
                return f"the value of label {key!r} must be at most 63 characters"
    return ""


def groups_of(spec: Object) -> list[Object]:
    cluster = spec.get("rayClusterSpec") or {}
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]] if cluster else []
