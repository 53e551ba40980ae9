"""Test the playground in headless Chromium with a gateway in this process, and its routes without a browser."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from genmodels.checkpoint import CheckpointRef
from genmodels.data.images import png
from genmodels.engine.history import MAX_ROWS, MAX_STEPS, reader
from genmodels.family import EvaluationMetric, EvaluationResult
from genmodels.keys import Keys
from genmodels.registry.store import Registry
from genmodels.runs.store import Run
from genmodels.runs.thinning import ThinnedHistories, thinned
from genmodels.storage import Storage, open_storage
from services.gateway.model_host import ModelHost
from services.gateway.playground import FOLDER, TYPES
from services.gateway.routes import create_app
from services.http.listing import Listing, ModelsQuery
from tests.support import published_models
from tests.support.asgi_client import ask, refused
from tests.support.asgi_server import served
from tests.support.browser import CHROMIUM, Page, browser
from tests.support.published_models import IMAGES, publish
from tests.support.run_parts import write_metrics

JOB = "test-00000000"
STEPS = range(10, 210, 10)


def train(storage: Storage, model: str, text: bool = False) -> None:
    """Write the objects of a run: an attempt, its curves, its samples."""
    run = Run(storage, JOB, model)
    run.start_attempt(1, None, 1)
    rows: list[dict[str, Any]] = [
        {"step": step, "loss": 3 * math.exp(-step / 80) + 0.4, "learning_rate": 0.001, "seconds": step / 10}
        for step in STEPS
    ]
    for row in rows[4::5]:
        row |= {"val_loss": row["loss"] + 0.2, "val_psnr": 12 + row["step"] / 40}
    rows[2]["grad_norm"] = float("nan")
    write_metrics(run, 1, rows)
    for step in STEPS[4::5]:
        if text:
            run.write_sample(1, step, "sample.txt", f"What is learnt at step {step}.\n".encode())
        else:
            pixels = np.random.default_rng(step).random((1, 32, 64))
            run.write_sample(1, step, "samples.png", png(pixels * step / 200))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Publish a model of each family, one with a second version, and the objects of two of their runs."""
    storage = open_storage(tmp_path_factory.mktemp("models").as_uri())
    publish(storage, "play", "minigpt")
    version = publish(storage, "shapes", "vae", latent_dim=20)
    publish(storage, "shapes", "vae", step=2, alias="next", latent_dim=20)
    publish(storage, "clean", "autoencoder", alias=None)
    publish(storage, "forger", "gan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published_models, "IMAGES", IMAGES.model_copy(update={"num_classes": 3}))
        publish(storage, "classes", "gan", conditional=True)
    measure = EvaluationMetric(value=23.125, unit="dB", baselines={"PCA, 20 components": 19.25})
    result = EvaluationResult(metrics={"psnr": measure}, notes={"images_seen": 640, "noise_std": [0.3, 0.15]})
    Registry(storage).record_evaluation(version, result, thorough=False, seconds=1, publication=True)
    train(storage, "shapes")
    train(storage, "play", text=True)
    return storage


@pytest.fixture(scope="module")
def app(models: Storage) -> Any:
    return create_app(ModelHost(models.url))


# The routes, without a browser


def files() -> list[Path]:
    return [path for path in FOLDER.iterdir() if path.suffix in TYPES]


def test_the_page_and_its_files_are_open_and_alike_for_all(app: Any) -> None:
    page = ask(app, "GET", "/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for name in re.findall(r'(?:href|src)="(playground/[^"]+)"', page.text):
        assert ask(app, "GET", f"/{name}").status_code == 200
    for file in files():
        response = ask(app, "GET", f"/playground/{file.name}")
        assert response.content == file.read_bytes()
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        again = ask(app, "GET", f"/playground/{file.name}", headers={"if-none-match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert ask(app, "GET", "/playground/app.js").headers["content-type"] == "text/javascript; charset=utf-8"


@pytest.mark.parametrize("name", ["nothing.js", "%2e%2e%2fpage.py", "..%2fpage.py", "__init__.py", "app.js%00"])
def test_there_are_no_other_files(app: Any, name: str) -> None:
    refused(ask(app, "GET", f"/playground/{name}"), 404)


def test_nothing_is_had_from_elsewhere_and_nothing_is_inline() -> None:
    for file in files():
        content = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "//cdn" not in content
        assert not re.search(r"https?://", content), file.name
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src=)", page)


def test_a_history(app: Any) -> None:
    history = ask(app, "GET", "/v1/models/shapes/history").json()
    assert (history["model"], history["job"], history["step"]) == ("shapes@1", JOB, 1)
    assert [row["step"] for row in history["data"]] == list(STEPS)
    assert history["data"][2]["grad_norm"] == "nan"
    assert history["samples"] == [{"step": step, "files": ["samples.png"]} for step in (50, 100, 150, 200)]
    sample = ask(app, "GET", "/v1/models/shapes@next/samples/100/samples.png")
    assert sample.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(sample.content)).size[0] >= 64
    text = ask(app, "GET", "/v1/models/play/samples/50/sample.txt")
    assert (text.headers["content-type"], text.text) == ("text/plain; charset=utf-8", "What is learnt at step 50.\n")
    assert text.headers["x-content-type-options"] == "nosniff"


def test_a_run_that_is_gone_has_an_empty_history(app: Any) -> None:
    history = ask(app, "GET", "/v1/models/forger/history").json()
    assert (history["data"], history["samples"]) == ([], [])


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("nothing/history", 404),
        ("shapes/samples/51/samples.png", 404),
        ("shapes/samples/50/other.png", 404),
        ("shapes/samples/50/samples.json", 400),
        ("shapes/samples/50/..%2f..%2fstart.json", 404),
        ("shapes/samples/50/%2e%2e", 400),
        ("shapes/samples/-1/samples.png", 400),
        ("shapes/samples/x/samples.png", 400),
        ("nothing/samples/50/samples.png", 404),
    ],
)
def test_what_is_not_there_is_refused(app: Any, path: str, status: int) -> None:
    refused(ask(app, "GET", f"/v1/models/{path}"), status)


def test_a_history_follows_the_chain_and_is_bounded(file_storage: Storage) -> None:
    version = publish(file_storage, "long", "vae")
    run = Run(file_storage, JOB, "long")
    run.start_attempt(1, None, 1)
    rows = [{"step": step, "loss": 1.0} | ({"val_loss": 2.0} if step % 100 == 0 else {}) for step in range(1, 5001)]
    write_metrics(run, 1, rows)
    for step in range(1, 301):
        run.write_sample(1, step, "samples.png", b"first")
    run.start_attempt(2, CheckpointRef(attempt=1, step=4000), 1)
    write_metrics(run, 2, [{"step": 4001, "loss": 7.0}])
    history = reader(file_storage, ThinnedHistories(), version)()
    assert len(history.rows) == MAX_ROWS
    assert [row["step"] for row in history.rows if "val_loss" in row] == list(range(100, 4001, 100))
    assert (history.rows[0]["step"], history.rows[-1]) == (1, {"step": 4001, "loss": 7.0})
    assert len(history.samples) == MAX_STEPS
    assert {1, 300} <= set(history.samples)


def test_thinning_keeps_both_ends() -> None:
    assert thinned(range(3), 5) == [0, 1, 2]
    assert thinned(range(101), 5) == [0, 25, 50, 75, 100]


# In a browser


@dataclass(frozen=True)
class Site:
    page: Page
    url: str

    def open(self, place: str) -> None:
        self.page.open(f"{self.url}/#{place}")
        self.page.until(f"location.hash === '#{place}' && document.querySelector('[aria-selected=true]')?.offsetWidth")

    def post(self, path: str, body: Any) -> Any:
        return httpx.post(self.url + path, json=body).raise_for_status().json()

    def pictures(self, panel: str) -> list[str]:
        """Return the base64 of the pictures shown, without their type."""
        sources = self.page.js(f"[...document.querySelectorAll('#{panel} [data-shown] img')].map(image => image.src)")
        return [source.partition(",")[2] for source in sources]

    def b64(self, answer: Any) -> list[str]:
        return [item["b64_json"] for item in answer["data"]]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture(scope="module")
def open_site(tab: Page, app: Any) -> Iterator[Site]:
    with served(app) as url:
        yield Site(tab, url)


@pytest.fixture
def site(open_site: Site) -> Iterator[Site]:
    """Serve without keys; check after each test that the browser's console has no error."""
    open_site.page.size(1280)
    open_site.page.complaints.clear()
    yield open_site
    assert open_site.page.js("document.getElementById('alert').textContent") == ""
    assert open_site.page.complaints == []


def test_without_keys_none_is_asked_for_and_all_models_are_there(site: Site) -> None:
    site.page.open(f"{site.url}/")
    site.page.until("document.querySelector('#tabs').offsetWidth")
    assert site.page.js("document.querySelector('#key').hidden")
    options = site.page.js("[...document.querySelectorAll('[name=model] option')].map(option => option.value)")
    assert sorted(options) == ["classes", "clean", "forger", "play", "shapes"]


def test_all_pages_of_models_are_there(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Listing.page
    pages: list[str] = []

    def page(self: Listing, catalogue: Any, query: ModelsQuery, may_use: Any) -> bytes:
        pages.append(query.after)
        return whole(self, catalogue, query.model_copy(update={"limit": 2}), may_use)

    monkeypatch.setattr(Listing, "page", page)
    site.open("shapes/images")  # on the last page
    options = site.page.js("[...document.querySelectorAll('[name=model] option')].map(option => option.value)")
    assert options == ["classes", "clean", "forger", "play", "shapes"]
    assert pages == ["", "clean@1", "play"]


def test_text_streams_and_equals_the_answer_of_its_seed(site: Site) -> None:
    site.open("play/text")
    settings = {"prompt": "To be, ", "max_tokens": 60, "seed": 7, "temperature": 1.1, "top_k": 30, "top_p": 0.95}
    settings |= {"min_p": 0.01, "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1}
    for name, value in settings.items():
        site.page.fill(f"#text [name={name}]", value)
    site.page.click("#text [type=submit]")
    rate = site.page.until("document.querySelector('#text [data-rate]').textContent.match(/tokens\\/s/)?.input")
    assert rate.startswith("60 tokens, ")
    expected = site.post("/v1/completions", {"model": "play", **settings})["choices"][0]["text"]
    assert site.page.js("document.querySelector('#text [data-output]').textContent") == expected
    assert len(expected) == 60
    command = site.page.js("document.querySelector('#text .curl pre').textContent")
    assert command.startswith(f"curl -sN {site.url}/v1/completions ")
    stop = expected[20:23]
    site.page.fill("#text [name=stop]", stop.replace("\n", "\\n"))
    site.page.click("#text [type=submit]")
    site.page.until("document.querySelector('#text [data-rate]').textContent.includes('stop text')")
    assert site.page.js("document.querySelector('#text [data-output]').textContent") == expected[: expected.find(stop)]


def test_the_stop_button_ends_a_stream(site: Site) -> None:
    site.open("play/text")
    site.page.fill("#text [name=prompt]", "On and on")
    site.page.fill("#text [name=max_tokens]", 4096)
    site.page.click("#text [type=submit]")
    site.page.until("document.querySelector('#text [data-output]').textContent.length")
    site.page.click("#text [data-stop]")
    rate = site.page.until("document.querySelector('#text [data-rate]').textContent.match(/^Stopped after/)?.input")
    length = site.page.js("document.querySelector('#text [data-output]').textContent.length")
    assert rate == f"Stopped after {length} characters"
    assert 0 < length < 4096
    assert site.page.js("document.querySelector('#text [data-stop]').disabled")


def test_a_grid_of_pictures_is_that_of_its_seed(site: Site) -> None:
    site.open("shapes@2/images")
    site.page.until("document.querySelectorAll('#images img').length === 16")
    for name, value in {"n": 6, "seed": 11, "temperature": 0.5}.items():
        site.page.fill(f"#images [name={name}]", value)
    site.page.click("#images [type=submit]")
    site.page.until("document.querySelectorAll('#images img').length === 6")
    body = {"model": "shapes@2", "prompt": "", "n": 6, "seed": 11, "temperature": 0.5}
    assert site.pictures("images") == site.b64(site.post("/v1/images/generations", body))
    assert site.page.js("document.querySelector('#images [data-seed]').textContent").startswith("Seed 11 ")
    link = site.page.js("document.querySelector('#images a').download")
    assert link == "shapes@2-seed-11-1.png"


def test_a_seed_is_shown_and_can_be_kept(site: Site) -> None:
    site.open("forger/images")
    site.page.until("document.querySelectorAll('#images img').length === 16")
    before = site.pictures("images")
    seed = int(site.page.js("document.querySelector('#images [data-seed]').textContent").split()[1])
    site.page.click("#images [data-seed] button")
    assert int(site.page.js("document.querySelector('#images [name=seed]').value")) == seed
    body = {"model": "forger", "prompt": "", "n": 16, "seed": seed}
    assert before == site.b64(site.post("/v1/images/generations", body))


def test_a_class_is_chosen(site: Site) -> None:
    site.open("classes/images")
    site.page.until("document.querySelectorAll('#images img').length === 16")
    labels = site.page.js("[...document.querySelectorAll('#images [name=label] option')].map(one => one.textContent)")
    assert labels == ["any", "0", "1", "2"]
    for name, value in {"n": 2, "seed": 1, "label": 0}.items():
        site.page.fill(f"#images [name={name}]", value)
    site.page.click("#images [type=submit]")
    site.page.until("document.querySelectorAll('#images img').length === 2")
    body = {"model": "classes", "prompt": "", "n": 2, "seed": 1, "label": 0}
    assert site.pictures("images") == site.b64(site.post("/v1/images/generations", body))
    site.open("classes/latent")
    site.page.until("document.querySelectorAll('#latent [data-sliders] label').length === 11")
    assert (
        site.page.js("document.querySelector('#latent [data-sliders] label:last-child span').textContent") == "class 2"
    )


def test_a_slider_moves_the_picture(site: Site) -> None:
    site.open("shapes/latent")
    site.page.until("document.querySelector('#latent img')")
    assert site.page.js("document.querySelectorAll('#latent [data-sliders] input').length") == 16
    site.page.click("#latent [data-more]")
    assert site.page.js("document.querySelectorAll('#latent [data-sliders] input').length") == 20
    assert site.page.js("document.querySelector('#latent [data-more]').hidden")
    site.page.click("#latent [data-zero]")
    zero = site.b64(site.post("/v1/models/shapes/decode", {"latents": [[0.0] * 20]}))
    site.page.until(f"document.querySelector('#latent img').src.endsWith({zero[0]!r})")
    moved = site.b64(site.post("/v1/models/shapes/decode", {"latents": [[2.0] + [0.0] * 19]}))
    assert moved != zero
    before = site.page.js("performance.getEntriesByName(document.URL.split('#')[0] + 'v1/models/shapes/decode').length")
    for value in np.linspace(0, 2, 50):  # far faster than answers arrive
        site.page.fill("#latent [data-sliders] input", value)
    site.page.until(f"document.querySelector('#latent img').src.endsWith({moved[0]!r})")
    after = site.page.js("performance.getEntriesByName(document.URL.split('#')[0] + 'v1/models/shapes/decode').length")
    assert after - before <= 50


def test_only_the_newest_place_of_a_slider_is_asked_for(site: Site) -> None:
    site.open("shapes/latent")
    site.page.until("document.querySelector('#latent img')")
    values = site.page.js(
        """(async () => {
            const { newest } = await import('/playground/dom.js');
            const values = [];
            let answer;
            const follow = newest((value) => (values.push(value), new Promise((resolve) => (answer = resolve))));
            const whole = follow(0);
            for (let value = 1; value <= 9; value++) follow(value);
            answer();
            await new Promise((resolve) => setTimeout(resolve));
            answer();
            await whole;
            return values;
        })()"""
    )
    assert values == [0, 9]


def test_a_latent_starts_from_a_picture(site: Site, tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).random((1, 16, 16))
    picture = tmp_path / "mine.png"
    Image.fromarray((pixels[0] * 255).astype(np.uint8)).save(picture)
    site.open("shapes/latent")
    site.page.until("document.querySelector('#latent img')")
    site.page.upload("#latent [type=file]", picture)
    site.page.until("document.querySelector('#latent [data-status]').textContent === 'From mine.png'")
    image = base64.b64encode(picture.read_bytes()).decode()
    latent = site.post("/v1/models/shapes/encode", {"images": [image]})["latents"][0]
    shown = site.page.js("[...document.querySelectorAll('#latent [data-sliders] input')].map(one => Number(one.value))")
    assert shown == pytest.approx(latent[:16], abs=0.02)  # the browser's grey may be off by one of 255


def test_noise_is_where_a_model_without_an_encoder_starts(site: Site) -> None:
    site.open("forger/latent")
    site.page.until("document.querySelector('#latent img')")
    assert site.page.js("document.querySelector('#latent [data-upload]').hidden")
    values = site.page.js(
        "[...document.querySelectorAll('#latent [data-sliders] input')].map(one => Number(one.value))"
    )
    assert len(values) == 8
    assert 0.2 < np.std(values) < 3


def test_an_interpolation_between_two_seeds(site: Site) -> None:
    site.open("clean@1/interpolate")
    site.page.until("document.querySelectorAll('#interpolate img').length === 8")
    for name, value in {"start": 5, "end": 6, "steps": 4}.items():
        site.page.fill(f"#interpolate [name={name}]", value)
    site.page.click("#interpolate [type=submit]")
    site.page.until("document.querySelectorAll('#interpolate img').length === 4")
    body = {"start": 5, "end": 6, "steps": 4}
    assert site.pictures("interpolate") == site.b64(site.post("/v1/models/clean@1/interpolate", body))


def test_a_drawing_is_denoised(site: Site) -> None:
    site.open("clean@1/denoise")
    site.page.until("document.querySelector('#denoise [data-shown] img')")
    site.page.click("#denoise [data-clear]")
    assert site.pictures("denoise") == []
    box = site.page.js(
        "document.querySelector('[data-drawing]').scrollIntoView(), "
        "(({x, y}) => [x, y])(document.querySelector('[data-drawing]').getBoundingClientRect())"
    )
    for kind, x, y in [("mousePressed", 40, 40), ("mouseMoved", 120, 120), ("mouseReleased", 200, 60)]:
        place = {"x": box[0] + x, "y": box[1] + y, "button": "left", "buttons": 1, "clickCount": 1}
        site.page.call("Input.dispatchMouseEvent", type=kind, **place)
    site.page.until("document.querySelector('#denoise [data-shown] img')")
    sent = site.page.js("document.querySelector('[data-noisy]').toDataURL().split(',')[1]")
    with Image.open(io.BytesIO(base64.b64decode(sent))) as image:
        assert image.size == (IMAGES.width, IMAGES.height)
        assert np.asarray(image.convert("L")).std() > 20
    assert site.pictures("denoise") == site.b64(site.post("/v1/models/clean@1/denoise", {"images": [sent]}))
    site.page.fill("#denoise [name=noise]", 0)
    site.page.until(f"document.querySelector('[data-noisy]').toDataURL().split(',')[1] !== {sent!r}")
    site.page.until("document.querySelector('#denoise output').textContent === '0.00'")


def test_a_picture_is_uploaded_and_denoised(site: Site, tmp_path: Path) -> None:
    picture = tmp_path / "photo.png"
    Image.fromarray((np.random.default_rng(0).random((40, 90, 3)) * 255).astype(np.uint8)).save(picture)
    site.open("clean@1/denoise")
    site.page.until("document.querySelector('#denoise [data-shown] img')")
    site.page.click("#denoise [data-clear]")
    site.page.upload("#denoise [type=file]", picture)
    site.page.until("document.querySelector('#denoise [data-shown] img')")
    sent = site.page.js("document.querySelector('[data-noisy]').toDataURL().split(',')[1]")
    assert site.pictures("denoise") == site.b64(site.post("/v1/models/clean@1/denoise", {"images": [sent]}))


def test_curves_and_samples_of_a_run(site: Site) -> None:
    site.open("shapes/training")
    site.page.until("document.querySelectorAll('#training svg').length")
    names = site.page.js("[...document.querySelectorAll('#training .charts .key')].map(key => key.textContent)")
    assert names == ["loss", "val_loss", "val_psnr", "learning_rate"]
    labels = site.page.js("[...document.querySelectorAll('#training svg')].map(one => one.ariaLabel)")
    assert labels[1] == "val_psnr from 13.25 at step 50 to 17 at step 200"
    header = site.page.js("[...document.querySelectorAll('#training th')].map(cell => cell.textContent)")
    assert header[:2] == ["step", "loss"]
    assert site.page.js("document.querySelectorAll('#training tbody tr').length") == len(STEPS)
    site.page.until("document.querySelector('#training .gallery img')?.alt === 'samples at step 200'")
    site.page.fill("#training [name=at]", 0)
    site.page.until("document.querySelector('#training .gallery img')?.alt === 'samples at step 50'")
    site.open("play/training")
    site.page.until(
        "document.querySelector('#training .gallery pre')?.textContent === 'What is learnt at step 200.\\n'"
    )


def test_metrics_are_shown_with_their_baselines(site: Site) -> None:
    site.open("shapes/images")
    site.page.until("document.querySelector('#about').textContent.includes('23.13 dB (PCA, 20 components: 19.25)')")
    about = site.page.js("document.querySelector('#about').textContent")
    assert "images seen: 640; noise std: 0.3, 0.15" in about


def test_a_version_is_typed_and_a_missing_version_is_an_error(site: Site) -> None:
    site.open("shapes/images")
    site.page.fill("#choice [name=version]", "next", "change")
    site.page.until("document.querySelector('#about').textContent.includes('shapes@2')")
    site.page.fill("#choice [name=version]", "99", "change")
    alert = site.page.until("document.querySelector('#alert').textContent")
    assert "shapes" in alert
    assert "99" in alert
    assert site.page.js("document.querySelector('#alert').getAttribute('role')") == "alert"
    site.page.fill("#choice [name=version]", "", "change")
    site.page.until("document.querySelector('#tabs').offsetWidth")


def test_tabs_follow_the_arrow_keys(site: Site) -> None:
    site.open("clean@1/images")
    site.page.js("document.querySelector('#tab-images').focus()")
    site.page.press("ArrowRight")
    assert site.page.js("document.activeElement.id") == "tab-latent"
    assert not site.page.js("document.querySelector('#latent').hidden")
    site.page.press("End")
    assert site.page.js("document.activeElement.id") == "tab-training"
    site.page.press("ArrowRight")
    assert site.page.js("document.activeElement.id") == "tab-images"
    assert site.page.js("[...document.querySelectorAll('[role=tab]')].filter(tab => tab.tabIndex === 0).length") == 1


PANELS = ["play/text", "shapes/images", "shapes/latent", "shapes/interpolate", "clean@1/denoise", "shapes/training"]


@pytest.mark.parametrize("place", PANELS)
def test_every_panel_fits_a_phone_and_every_field_has_a_name(site: Site, place: str) -> None:
    site.page.size(360, 780)
    site.open(place)
    site.page.until(f"document.querySelector('#{place.split('/')[1]}').innerText.length")
    assert site.page.js("document.documentElement.scrollWidth") <= 360
    wide = "[...document.querySelectorAll('main > *')].filter(one => one.getBoundingClientRect().right > 360.5).length"
    assert site.page.js(wide) == 0
    site.page.call("Accessibility.enable")
    tree = site.page.call("Accessibility.getFullAXTree")["nodes"]
    fields = {"textbox", "combobox", "slider", "spinbutton", "button", "tab", "link", "image", "img"}
    controls = [node for node in tree if not node["ignored"] and node["role"]["value"] in fields]
    unnamed = [node["role"]["value"] for node in controls if not node.get("name", {}).get("value", "").strip()]
    assert len(controls) > 5
    assert unnamed == []


# With keys


@pytest.fixture
def locked(tab: Page, models: Storage) -> Iterator[tuple[Site, str]]:
    _, token = Keys(models).create("player", ("generate",), ("shapes",))
    with served(create_app(ModelHost(models.url), hosts=None, keys=Keys(models))) as url:
        tab.size(1280)
        tab.complaints.clear()
        yield Site(tab, url), token
        assert tab.complaints == []


def test_a_key_is_asked_for_kept_in_the_tab_alone_and_forgotten(locked: tuple[Site, str]) -> None:
    site, token = locked
    page = site.page
    page.open(f"{site.url}/")
    page.until("document.querySelector('#key').offsetWidth")
    assert page.js("document.querySelector('#alert').textContent") == ""
    assert page.js("document.activeElement.name") == "key"
    page.fill("#key [name=key]", "gm_00000000_" + "x" * 43)
    page.click("#key button")
    page.until("document.querySelector('#alert').textContent === 'this key is unknown or was revoked'")
    assert page.js("sessionStorage.length") == 0
    page.fill("#key [name=key]", token)
    page.click("#key button")
    page.until("document.querySelectorAll('#images img').length === 16")
    assert page.js("document.querySelector('#alert').textContent") == ""
    assert page.js("Object.values(sessionStorage)") == [token]
    assert page.js("localStorage.length + document.cookie.length") == 0
    assert token not in page.js("document.documentElement.outerHTML")
    assert page.js("[...document.querySelectorAll('[name=model] option')].map(option => option.value)") == ["shapes"]
    assert "$GENMODELS_KEY" in page.js("document.querySelector('#images .curl pre').textContent")
    page.open(f"{site.url}/")
    page.until("document.querySelector('#tabs').offsetWidth")
    page.click("#forget")
    page.until("document.querySelector('#key').offsetWidth")
    assert page.js("sessionStorage.length") == 0
    assert page.js("document.querySelector('#choice').hidden && document.querySelector('#images').hidden")


def test_a_limited_key_reads_only_histories_of_its_models(models: Storage) -> None:
    _, token = Keys(models).create("other", ("generate",), ("other-",))
    app = create_app(ModelHost(models.url), hosts=None, keys=Keys(models))
    for path in ("history", "samples/50/samples.png"):
        refused(ask(app, "GET", f"/v1/models/shapes/{path}"), 401)
        refused(ask(app, "GET", f"/v1/models/shapes/{path}", headers={"authorization": f"Bearer {token}"}), 403)
    assert Registry(models).resolve("shapes").version == 1
