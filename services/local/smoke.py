"""`genmodels validate --smoke`: every stage in small, from two training steps to one answer of the loaded version."""

from __future__ import annotations

import tempfile
from pathlib import Path

from genmodels import checkpoint
from genmodels.data import open_dataset, resolve_data
from genmodels.engine import loader
from genmodels.engine.warmup import warm_up
from genmodels.registry.references import of_version
from genmodels.registry.store import Registry
from genmodels.runs.store import Run
from genmodels.spec.parse import dump
from genmodels.spec.sections import JobSpec, ModelSpec
from genmodels.storage import Storage, open_storage
from genmodels.training.attempt import run_attempt
from genmodels.training.group import Group

STEPS = 2


def smoke(spec: ModelSpec, storage: Storage | None = None) -> str:
    """Train, publish and load a model in this process, without Ray and from scratch; describe its answer in one line.

    Args:
        storage: read for an added dataset; nothing is written to it.

    Raises:
        GenmodelsError: a stage failed.
    """
    short = {"max_steps": STEPS, "warmup_steps": 0, "eval_every": STEPS, "save_every": STEPS, "log_every": 1}
    data = resolve_data(spec.data, storage) if storage else spec.data
    open_dataset(data, storage)  # an added dataset is in the cache from now on
    train = spec.train.model_copy(update={**short, "init_from": None})
    small = spec.model_copy(update={"train": train, "data": data})
    with tempfile.TemporaryDirectory(prefix="genmodels-smoke-") as folder:
        scratch_storage = open_storage(Path(folder).as_uri())
        scratch_storage.put("jobs/smoke/spec.json", dump(JobSpec(name="smoke", models=[small])))
        run_attempt(scratch_storage, "smoke", spec.name, 1, Group())
        run = Run(scratch_storage, "smoke", spec.name)
        (ref,) = run.checkpoints()
        registry = Registry(scratch_storage)
        with checkpoint.scratch_folder() as scratch:
            manifest = checkpoint.fetch(scratch_storage, run.checkpoint_prefix(ref), Path(scratch))
            version = registry.publish(run, ref, manifest, Path(scratch), None)
        return warm_up(loader.load(scratch_storage, of_version(registry, version)))
