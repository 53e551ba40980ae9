"""Samples of a published model, requested over HTTP as any client would: a streamed text, or pictures."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.text import Text

from genmodels.data import ImageData, TextData, decode_image, grid, open_dataset, png
from genmodels.errors import GenmodelsError
from genmodels.evals.images import evenly_spaced
from genmodels.family import ImageInfo
from genmodels.runs.metric_rows import metric_lines
from genmodels.runs.store import Run
from genmodels.runs.thinning import decoded, thinned_rows
from genmodels.spec.sections import ModelSpec
from services.local.plots import draw

SAMPLES, COLUMNS, ROWS = 64, 10, 8
PASSAGE_TOKENS = 600
CURVE_ROWS = 2000  # of metrics that training curves show
PROMPT = 80  # largest number of characters of a passage's prompt


class SampleWriter:
    """Requests samples of published models from the endpoint, prints texts, and writes pictures to a folder."""

    def __init__(self, client: httpx.Client, console: Console, folder: Path) -> None:
        self.client, self.console, self.folder = client, console, folder

    def write(self, spec: ModelSpec, name: str, run: Run) -> None:
        """Show each verb of a model, and its training curves. A sample that fails prints one line of warning.

        Args:
            name: the model's name at the endpoint.
        """
        with warned(self.console, "curves"):
            if curves := draw(spec, decoded(thinned_rows(metric_lines(run), CURVE_ROWS))):
                self._keep(spec, "curves", curves)
        with warned(self.console, "samples"):
            model = self._get(f"/v1/models/{name}")
            dataset = open_dataset(spec.data, run.storage)
            if isinstance(dataset, TextData):
                self._passage(name, dataset)
                return
            for what, picture in self._pictures(name, set(model["verbs"]), dataset):
                self._keep(spec, what, picture)

    def _keep(self, spec: ModelSpec, what: str, picture: bytes) -> None:
        path = self.folder / f"{spec.name}-{what}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
        self.console.print(f"  {what}: {path}", soft_wrap=True)

    def _passage(self, name: str, dataset: TextData) -> None:
        prompt = opening(dataset.tokenizer.decode(dataset.val[:5000].tolist()))
        body = {"model": name, "prompt": prompt, "max_tokens": PASSAGE_TOKENS, "seed": 1, "stream": True}
        self.console.out(prompt, end="", style="bold", highlight=False)
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            _check(response)
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if not line.startswith("data: ") or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise GenmodelsError(f"{name}: the stream ended with: {event['error']['message']}")
                self.console.out("".join(choice["text"] for choice in event["choices"]), end="", highlight=False)
        self.console.print()

    def _pictures(self, name: str, verbs: set[str], dataset: ImageData) -> Iterator[tuple[str, bytes]]:
        info = dataset.info
        body = {"model": name, "n": SAMPLES, "seed": 1, "grid": True}
        yield "samples", base64.b64decode(self._post("/v1/images/generations", body)["data"][0]["b64_json"])
        split = dataset.split("val")
        index = evenly_spaced(len(split), 2 * COLUMNS)
        originals = split.take(index, np.zeros_like(index))["images"]
        if "reconstruct" in verbs:
            yield "reconstructions", _rows(originals, self._images(name, "reconstruct", originals, info))
        if "denoise" in verbs:
            noise = np.random.default_rng(1).normal(0, 0.3, originals.shape)
            noisy = np.clip(originals + noise, 0, 1).astype(np.float32)
            yield "denoised", _rows(originals, noisy, self._images(name, "denoise", noisy, info))
        if "interpolate" in verbs:
            yield "interpolation", self._interpolation(name, originals if "encode" in verbs else None, info)

    def _images(self, name: str, verb: str, images: np.ndarray, info: ImageInfo) -> np.ndarray:
        body = {"images": [base64.b64encode(png(image)).decode() for image in images]}
        return _decoded(self._post(f"/v1/models/{name}/{verb}", body), info)

    def _interpolation(self, name: str, images: np.ndarray | None, info: ImageInfo) -> bytes:
        """Draw a row for each pair of ends: two real images if the model can encode images, else two seeds."""
        rows = []
        for row in range(ROWS):
            start, end = row, row + ROWS
            ends: dict[str, Any] = {"start": start, "end": end}
            if images is not None:
                pair = images[start % len(images)], images[end % len(images)]
                ends = {side: base64.b64encode(png(image)).decode() for side, image in zip(ends, pair, strict=True)}
            rows.append(_decoded(self._post(f"/v1/models/{name}/interpolate", {**ends, "steps": COLUMNS}), info))
        return png(grid(np.concatenate(rows), COLUMNS))

    def _get(self, path: str) -> Any:
        response = self.client.get(path)
        _check(response)
        return response.json()

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        response = self.client.post(path, json=body)
        _check(response)
        return response.json()


@contextlib.contextmanager
def warned(console: Console, what: str) -> Iterator[None]:
    """Print one line if a display fails: it must not end the training or the serving of a model."""
    try:
        yield
    except Exception as error:
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        reason = next(iter(message.splitlines()), "") or type(error).__name__
        console.print(Text(f"  {what}: not shown: {reason}", "yellow"), soft_wrap=True)


def opening(text: str) -> str:
    """Return a prompt from a text, unchanged: the line after the first blank line, or else the first words.

    The first lines are avoided because the text may begin in the middle of a sentence.
    """
    line, newline, _ = [*text.split("\n\n"), text][1].partition("\n")
    if newline and line.strip() and len(line) <= PROMPT:
        return line + newline
    start = text.strip()[:PROMPT] or text[:PROMPT]
    return start.rpartition(" ")[0] or start


def _check(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    raise GenmodelsError(f"{response.request.url.path} answered {response.status_code}: {message}")


def _decoded(answer: dict[str, Any], info: ImageInfo) -> np.ndarray:
    return np.stack([decode_image(base64.b64decode(image["b64_json"]), info) for image in answer["data"]])


def _rows(*kinds: np.ndarray) -> bytes:
    """Draw a grid with alternating rows: ten images of the first kind, the same ten of the second, and so on."""
    blocks = [kind[first : first + COLUMNS] for first in range(0, len(kinds[0]), COLUMNS) for kind in kinds]
    return png(grid(np.concatenate(blocks), COLUMNS))
