"""Test that the documentation is true: its generated blocks, links, paths, modules, specs and commands."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

from genmodels import models
from genmodels.data import DATASETS
from genmodels.registry.store import Registry
from genmodels.spec.parse import parse_spec
from genmodels.storage import open_storage
from services.gateway.pool_config import read_pools
from tests.support import published_models
from tests.support.paths import ROOT
from tests.support.spec_files import read_spec

DOCS = ROOT / "docs"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(DOCS.glob("*.md")),
    *(ROOT / name for name in ("k8s/README.md", "k8s/PLATFORMS.md", "docker/prometheus/RUNBOOK.md", "jobs/LOG.md")),
]
DEPLOYED = [  # files that name modules to start
    ROOT / "compose.yaml",
    *(path for folder in ("docker", "k8s") for path in (ROOT / folder).rglob("*") if path.suffix != ".png"),
]
# `genmodels/x.py`, `docs/data.md`; not `/v1/jobs/{job}` and not `jobs/<job>/spec.json`
PATH = re.compile(r"(?<![\w/.:<>-])((?:\.ci|docker|docs|genmodels|jobs|k8s|services|tests)/[\w./-]*[\w/])(?![\w<{*-])")
PLACEHOLDERS = {"jobs/x.yaml", "jobs/SPEC.yaml"}
LABELS = {"genmodels/job", "genmodels/model", "genmodels/submits-jobs"}  # of Kubernetes
DOTTED = re.compile(r"(?<![\w/.-])((?:genmodels|services)(?:\.[a-z_]+)+)(?![\w(])")
SUFFIXES = {"yaml", "yml", "sh", "json", "md", "svc"}
KUBERNETES_NAMES = {"genmodels.accelerator"}
MODULE = re.compile(r"-m[, ]+[\"']?((?:genmodels|services)(?:\.\w+)*)|[\s\"'`=]((?:genmodels|services)\.[a-z_.]+:\w+)")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([\w-]*))?\)")
RUN = "<!-- run by tests/unit/test_docs.py -->\n```bash\n"

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page; those in a quotation without its marks."""
    text = re.sub(r"^> ?", "", page.read_text(), flags=re.MULTILINE)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


def test_generated_blocks_are_current() -> None:
    generate = generator()
    placed = set()
    for page in DOCS.glob("*.md"):
        text = page.read_text()
        placed |= {name for _, name, _ in generate.BLOCK.findall(text)}
        assert generate.render(text) == text, f"{page.name} is not current: run `make docs`"
    assert placed == set(generate.BLOCKS)


def test_everything_generated_is_described() -> None:
    """A field, option or route without a description has an empty last cell."""
    generate = generator()
    for name, block in generate.BLOCKS.items():
        empty = [line for line in block().splitlines() if line.endswith("| |")]
        assert not empty, name


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in headings(target), f"{path}#{anchor}"


@every_page
def test_paths_exist(page: Path) -> None:
    named = set(PATH.findall(page.read_text())) - PLACEHOLDERS - LABELS
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


@pytest.mark.parametrize("path", [*PAGES, *DEPLOYED], ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_exist(path: Path) -> None:
    for command, reference in MODULE.findall(path.read_text() if path.is_file() else ""):
        module, _, name = (command or reference).partition(":")
        assert importlib.util.find_spec(module), module
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # importing Ray Serve defines settings in ways that pydantic warns of
            assert not name or hasattr(importlib.import_module(module), name), reference


def test_the_module_pattern_matches_every_form() -> None:
    commands = {command for path in DEPLOYED if path.is_file() for command, _ in MODULE.findall(path.read_text())}
    assert len(commands - {""}) > 3


@pytest.mark.parametrize("path", [*PAGES, *DEPLOYED], ids=lambda path: str(path.relative_to(ROOT)))
def test_dotted_names_exist(path: Path) -> None:
    """Names such as `services.gateway.proxy.proxy_middlewares`, in settings and in prose."""
    text = path.read_text() if path.is_file() else ""
    names = {name for name in DOTTED.findall(text) if name.rpartition(".")[2] not in SUFFIXES} - KUBERNETES_NAMES
    for name in sorted(names):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pkgutil.resolve_name(name)


SPECS = [
    pytest.param(page.name, block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(blocks(page, "yaml"))
    if not block.startswith(("apiVersion:", "patches:", "pools:"))  # kustomize's own; tests/k8s builds it
]


@pytest.mark.parametrize(("page", "block"), SPECS)
def test_specs_shown_are_valid(page: str, block: str) -> None:
    parse_spec(block.encode(), page, ROOT)


def test_the_pools_shown_are_valid(tmp_path: Path) -> None:
    (block,) = blocks(DOCS / "pools.md", "yaml")
    (tmp_path / "pools.yaml").write_text(block)
    assert [pool.name for pool in read_pools(tmp_path / "pools.yaml").pools] == ["default", "gpu"]


@pytest.mark.parametrize("line", (DOCS / "cli.md").read_text().partition(RUN)[2].partition("```")[0].splitlines())
def test_quick_commands_run(line: str, tmp_path: Path) -> None:
    program, *arguments = line.split()
    assert program == "genmodels"
    storage = {"GENMODELS_STORAGE": tmp_path.as_uri()}
    command = [sys.executable, "-m", "services.cli.main", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **storage})
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not done.stderr


def test_a_pulled_version_is_loaded_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_models, "VOCABULARY", published_models.VOCABULARY + ":")
    storage = open_storage((tmp_path / "storage").as_uri())
    version = published_models.publish(storage, "study-1", "minigpt")
    Registry(storage).fetch(version, tmp_path / "study-1-1")
    code, translated = (loading_code(ROOT / page) for page in ("README.md", "docs/pt.md"))
    assert code == translated
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 200


def loading_code(page: Path) -> str:
    """Return the page's block that loads a model, without comments."""
    (code,) = [block for block in blocks(page, "python") if "load_family" in block]
    return re.sub("  #.*", "", code)


def test_every_metric_and_measure_is_in_the_glossary_with_its_direction() -> None:
    rows = [line.split("|") for line in (DOCS / "glossary.md").read_text().splitlines()]
    directions = {
        name: row[4].strip() for row in rows if len(row) == 7 for name in re.findall("`([a-z_0-9]+)`", row[1])
    }
    for family in map(models.load, models.names()):
        assert {*family.metric_names, *family.evaluation_names} <= set(directions), family.family_name()
    assert set(directions.values()) <= {"lower", "higher", "neither"}


def test_every_dataset_and_shipped_spec_is_listed() -> None:
    assert all(f"| `{name}` |" in (DOCS / "data.md").read_text() for name in DATASETS)
    listed = (DOCS / "job-spec.md").read_text()
    assert all(f"| `{path.name}` |" in listed for path in (ROOT / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_specs_are_valid_and_say_what_they_take(path: Path) -> None:
    read_spec(path)
    assert path.read_text().startswith("# ")


def test_results_trains_and_measures_every_model_that_needs_no_gpu(tmp_path: Path) -> None:
    """Run `make results` with a substitute for genmodels that records its arguments."""
    program, record = tmp_path / "bin" / "genmodels", tmp_path / "asked"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {record}\n')
    program.chmod(0o755)
    for done in (".ready", ".ready-dev"):
        (tmp_path / done).touch()
    subprocess.run(["make", "results", f"VENV={tmp_path}"], cwd=ROOT, check=True, capture_output=True)
    lines = record.read_text().splitlines()
    specs = {path.name: read_spec(path).models for path in (ROOT / "jobs").glob("*.yaml")}
    wanted = {name: [entry.name for entry in entries if not entry.scaling.use_gpu] for name, entries in specs.items()}
    assert {line.split()[1]: re.findall(r"--only (\S+)", line) for line in lines if line.startswith("run ")} == {
        f"jobs/{name}": models for name, models in wanted.items() if models
    }
    measured = [line.split()[1] for line in lines if line.startswith("evaluate ")]
    assert sorted(measured) == sorted(name for names in wanted.values() for name in names)
