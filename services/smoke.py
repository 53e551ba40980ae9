"""`genmodels validate --smoke`: the whole way in small, from two training steps to one answer of the loaded version."""

from __future__ import annotations

import tempfile
from pathlib import Path

from genmodels import checkpoint
from genmodels.attempt import run_attempt
from genmodels.data import TextData, open_dataset
from genmodels.engine import images, loaded, text
from genmodels.registry import Registry
from genmodels.run import Run
from genmodels.spec import JobSpec, ModelSpec
from genmodels.storage import open_storage
from genmodels.train import Group
from services.local import submit

STEPS = 2


def smoke(spec: ModelSpec) -> str:
    """Try a model of a job in this process, without Ray; a line on what it answered.

    Raises:
        GenmodelsError: what went wrong.
    """
    short = {"max_steps": STEPS, "warmup_steps": 0, "eval_every": STEPS, "save_every": STEPS, "log_every": 1}
    small = spec.model_copy(update={"train": spec.train.model_copy(update=short)})
    with tempfile.TemporaryDirectory(prefix="genmodels-smoke-") as folder:
        storage = open_storage(Path(folder).as_uri())
        job = submit(storage, JobSpec(name="smoke", models=[small]))
        run_attempt(storage, job, spec.name, 1, Group())
        run = Run(storage, job, spec.name)
        (place,) = run.checkpoints()
        registry = Registry(storage)
        with checkpoint.scratch_folder() as scratch:
            manifest = checkpoint.fetch(storage, run.checkpoint_prefix(place), Path(scratch))
            version = registry.publish(run, place, manifest, Path(scratch), None)
        return _answer(loaded.load(registry, version), spec)


def _answer(model: loaded.Loaded, spec: ModelSpec) -> str:
    dataset = open_dataset(spec.data)
    if isinstance(dataset, TextData):
        prompt = dataset.tokenizer.decode(dataset.val[:1].tolist())
        request = text.CompletionRequest.model_validate({"prompt": prompt, "max_tokens": 8, "seed": 0})
        return f"continued {prompt!r} with {''.join(piece.text for piece in text.complete(model, request))!r}"
    answer = images.answer(model, images.GenerateRequest(n=1, seed=0))
    height, width = dataset.info.height, dataset.info.width
    return f"made a PNG of {width}x{height}, {len(answer.images[0])} bytes"
