"""Read and write the objects between the dispatcher and the job API: the queue, and notifications of new commands.

dispatcher/queue.json                            the queued runs in order; written by the dispatcher alone
dispatcher/notifications/<job>/<model>/<random>  a run has new commands; one listing finds all such runs
"""

from __future__ import annotations

import contextlib
import secrets

from pydantic import Field

from genmodels.errors import DamagedObject, KeyNotFound
from genmodels.storage import Document, Storage, load_document, write_document

NOTIFICATIONS, QUEUE = "dispatcher/notifications/", "dispatcher/queue.json"


class QueuedRun(Document):
    job: str
    model: str
    reason: str  # why it waits


class Queue(Document):
    """The queued runs in their order, and the capacity of the cluster. The dispatcher writes it for the job API."""

    object_kind = "queue"
    remedy = "nothing: the dispatcher writes it again within a minute"

    time: str = ""
    capacity: dict[str, int] | None = None  # cpus and gpus; None: unknown or unlimited
    worker_memory: dict[str, int] = Field(default_factory=dict)  # see `services.dispatch.backends.base.Capacity`
    queue: list[QueuedRun] = Field(default_factory=list)


def write_queue(storage: Storage, queue: Queue) -> None:
    write_document(storage, QUEUE, queue.model_dump(mode="json"))


def read_queue(storage: Storage) -> Queue:
    """Return the queue as the dispatcher has written it last; empty if it is missing or damaged."""
    with contextlib.suppress(KeyNotFound, DamagedObject):
        return load_document(storage, QUEUE, Queue)[0]
    return Queue()


def notify(storage: Storage, job: str, model: str) -> None:
    """Have the dispatcher read a run's new commands. Send the command first."""
    # Each notification has its own key: a dispatcher that deletes one late deletes no newer one.
    storage.put(f"{NOTIFICATIONS}{job}/{model}/{secrets.token_hex(4)}", b"")


def notifications(storage: Storage) -> list[tuple[str, str, str]]:
    """Return (job, model, id) of each notification that is not deleted yet."""
    names = (key.removeprefix(NOTIFICATIONS).split("/") for key in storage.list(NOTIFICATIONS))
    return [(name[0], name[1], name[2]) for name in names if len(name) == 3]


def delete_notification(storage: Storage, job: str, model: str, notification: str) -> None:
    storage.delete(f"{NOTIFICATIONS}{job}/{model}/{notification}")
