"""Find the runs that train on an added dataset, from the index `dataset-users/`.

An earlier release wrote no such index. The first call on its storage reads the spec of each job once, writes the index,
and then this mark; a job that a process of that release submits afterwards is missed.

dataset-users/.complete         every job that existed before is in the index
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from genmodels.errors import GenmodelsError, StorageError
from genmodels.runs.job_index import AT_ONCE, JOB_ID, user_keys
from genmodels.runs.jobs import Jobs
from genmodels.spec.sections import JobSpec, ModelSpec
from genmodels.storage import Storage, list_names

COMPLETE = "dataset-users/.complete"


def dataset_users(storage: Storage, name: str) -> list[tuple[str, ModelSpec]]:
    """Return the models that are trained on an added dataset, each with its job."""
    if not storage.exists(COMPLETE):
        _index_all(storage)
    specs = _specs(storage, list_names(storage, f"dataset-users/{name}/", JOB_ID))
    return [(job, model) for job, spec in specs for model in spec.models if model.data.dataset == name]


def _index_all(storage: Storage) -> None:
    for job, spec in _specs(storage, storage.folders("jobs/")):
        for key in user_keys(job, spec):
            storage.put(key, b"")
    storage.put(COMPLETE, b"")


def _specs(storage: Storage, jobs: list[str]) -> list[tuple[str, JobSpec]]:
    """Return the specs that can be read."""

    def read(job: str) -> JobSpec | None:
        try:
            return Jobs(storage).spec(job)
        except StorageError:
            raise
        except GenmodelsError:
            return None

    with ThreadPoolExecutor(AT_ONCE) as threads:
        specs = zip(jobs, threads.map(read, jobs), strict=True)
        return [(job, spec) for job, spec in specs if spec]
