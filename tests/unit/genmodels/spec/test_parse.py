from __future__ import annotations

import copy
import json
import re
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from genmodels import models
from genmodels.data import DataConfig
from genmodels.errors import SpecError
from genmodels.schema import yaml as spec_yaml
from genmodels.schema.base import Section
from genmodels.spec import json_schema, sections
from genmodels.spec import parse as parse_module
from genmodels.spec.parse import parse_spec
from genmodels.spec.sections import JobSpec


class Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML quotes values that YAML 1.1 reads as another type; `1e-4` and `0o17` are numbers only since 1.2.
    # PyYAML leaves some Unicode line breaks unescaped by default, and folds them when it reads.
    try:
        plain = isinstance(spec_yaml.scalar(text), str) and text.isprintable()
    except OverflowError:
        plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


Dumper.add_representer(str, represent_text)


def written(value: dict[str, Any]) -> bytes:
    """Write YAML that `spec_yaml.read` reads back unchanged (tuples as lists)."""
    text: str = yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    return text.encode()


FAMILY = """
from typing import Literal
from pydantic import Field, field_validator
from genmodels.family import Section, {base}

class Depth(Section):
    layers: int = 2

class Config(Section):
    width: int = Field(8, ge=1)
    heads: int = 4
    act: Literal["relu", "gelu"] = "relu"
    depth: Depth = Depth()

    @field_validator("heads")
    @classmethod
    def _divides(cls, heads, info):
        if heads and info.data.get("width", 0) % heads:
            raise ValueError(f"got {{heads}}, expected a divisor of width ({{info.data['width']}})")
        return heads

class {name}({base}):
    Config = Config
    Request = Depth
    metric_names = ("val_loss", "val_error")

{name}.__abstractmethods__ = frozenset()
"""

GOOD: dict[str, Any] = {
    "name": "shapes",
    "priority": 0,
    "models": [
        {
            "name": "pictures",
            "model": {"family": "stub_image", "width": 16, "depth": {"layers": 3}},
            "data": {"dataset": "fashion-mnist"},
            "train": {"max_steps": 3000, "batch_size": 128, "learning_rate": 1e-3, "betas": [0.9, 0.95], "seed": 0},
            "scaling": {"num_workers": 2, "use_gpu": False},
            "checkpoints": {"num_to_keep": 3},
            "serve": {"alias": "production", "gate": {"metric": "val_loss", "max": 120.0}, "pool": "default"},
        },
        {"name": "words", "model": {"family": "stub_text"}, "data": {"dataset": "tiny-shakespeare"}},
    ],
}


@pytest.fixture(autouse=True, scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Add two families that load quickly, one for pictures and one for text, to the real families."""
    folder = tmp_path_factory.mktemp("families")
    (folder / "stub_image.py").write_text(FAMILY.format(name="StubImage", base="ImageFamily"))
    (folder / "stub_text.py").write_text(FAMILY.format(name="StubText", base="TextFamily"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "__path__", [*models.__path__, str(folder)])
        yield
    for name in ("stub_image", "stub_text"):
        sys.modules.pop(f"genmodels.models.{name}", None)
        vars(models).pop(name, None)


def good(**changes: Any) -> dict[str, Any]:
    """Return the valid spec with changes at paths, as `models__0__train__seed=1`; `...` removes the key."""
    tree = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("__")]
        target: Any = tree
        for part in parents:
            target = target.setdefault(part, {}) if isinstance(target, dict) else target[part]
        if value is ...:
            del target[last]
        else:
            target[last] = value
    return tree


def parse(tree: Any) -> JobSpec:
    return parse_spec(json.dumps(tree).encode(), "job.yaml", Path("/jobs"))


def problems(document: Any) -> list[str]:
    """Return the error messages of an invalid document, without `job.yaml:<line>: `."""
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    with pytest.raises(SpecError) as caught:
        parse_spec(data, "job.yaml", Path("/jobs"))
    assert_plain(caught.value)
    return [re.sub(r"^job\.yaml(:\d+)?: ", "", problem) for problem in caught.value.problems]


def assert_plain(error: SpecError) -> None:
    for problem in error.problems:
        assert problem.isprintable()
        assert len(problem) < 500
        assert not re.search(r"Input should|[Pp]ydantic|https?://|Traceback|type=", problem), problem


# valid specs


def test_a_good_spec_is_read_and_its_defaults_filled_in() -> None:
    job = parse(GOOD)
    assert [model.family for model in job.models] == ["stub_image", "stub_text"]
    assert job.models[0].model.model_dump() == {"width": 16, "heads": 4, "act": "relu", "depth": {"layers": 3}}
    assert job.models[0].train.betas == (0.9, 0.95)
    assert job.models[0].serve.gate is not None
    assert job.models[0].serve.gate.max == 120.0
    words = job.models[1]
    assert (words.train.max_steps, words.scaling.num_workers, words.checkpoints.num_to_keep) == (1000, 1, 3)
    assert (words.serve.alias, words.serve.pool, words.serve.gate) == ("production", "default", None)


def test_yaml_and_json_give_the_same_spec() -> None:
    assert parse_spec(written(GOOD), "job.yaml") == parse(GOOD)
    assert parse_spec(json.dumps(GOOD, indent="\t").encode(), "job.json") == parse(GOOD)


def test_tabs_separate_in_yaml_wherever_spaces_do() -> None:
    text: str = yaml.safe_dump(GOOD, sort_keys=False)
    tabbed = re.sub("(?<=[:,]) ", "\t", text).replace("\n", "\t\n \t\n\t# a comment\n")
    assert tabbed.count(":\t") > 20
    assert parse_spec(tabbed.encode(), "job.yaml") == parse(GOOD)


def test_a_relative_path_is_relative_to_the_spec_and_needs_one() -> None:
    tree = good(models__1__data={"path": "texts/../my.txt"})
    assert parse(tree).models[1].data.path == "/jobs/my.txt"
    assert parse(good(models__1__data={"path": "/x/my.txt"})).models[1].data.path == "/x/my.txt"
    with pytest.raises(
        SpecError, match=r"models\[1\]\.data\.path: got 'texts/\.\./my\.txt', expected an absolute path"
    ):
        parse_spec(json.dumps(tree).encode(), "body", None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("+.5", 0.5),
        ("1.", 1.0),
        ("-0", 0),
        ("010", 10),
        ("0o17", 15),
        ("0xff", 255),
        ("no", "no"),
        ("on", "on"),
        ("True", True),
        ("~", None),
        ("1_000", "1_000"),
        ("-.NaN", "-.NaN"),
        ("12:30:45", "12:30:45"),
        ("2026-01-01", "2026-01-01"),
        ("0b1", "0b1"),
        ("'1'", "1"),
        ("=", "="),
        ("<<", "<<"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    result = spec_yaml.read(f"a: {text}".encode(), "x").value["a"]
    assert result == value
    assert type(result) is type(value)


def test_1e_4_is_a_number_of_the_spec() -> None:
    data = written(GOOD).replace(b"0.001", b"1e-4")
    assert parse_spec(data, "job.yaml").models[0].train.learning_rate == 1e-4


# errors: bytes and YAML


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty; write a job spec"),
        (b"# nothing", "empty; write a job spec"),
        (b"- a", "expected a mapping with the keys"),
        (b"name", "expected a mapping with the keys"),
        (b"a: 1\n---\nb: 2", "job.yaml:2: a second document begins here"),
        (b"a: 1\nb: 2\na: 3", "job.yaml:3: the key 'a' is repeated, first in line 1; keep one"),
        (b"a: &x 1", "job.yaml:1: the anchor &x is not allowed"),
        (b"a: 1\nb: *x", "job.yaml:2: the alias *x is not allowed"),
        (b"base: {a: 1}\nb:\n  <<: *base", "job.yaml:3: the alias *base is not allowed"),
        (b"a: !!python/object/apply:os.system [ls]", "the tag '!!python/object/apply:os.system' is not allowed"),
        (b"!local {a: 1}", "the tag '!local' is not allowed"),
        (b"1: a", "the key 1 is not text"),
        (b"? [a, b]\n: c", "is not text"),
        (b"a: .inf", "'.inf' is not allowed; write a finite number"),
        (b"a: .nan", "'.nan' is not allowed; write a finite number"),
        (b"a: 1e999", "the number '1e999' is too large"),
        (b"a: " + b"9" * 50_000, "is too large"),
        (b"a: 0x" + b"f" * 50, "is too large"),
        (b"a: " + b"[" * 60_000, "nested more than 32 deep"),
        (b"- " * 30_000, "nested more than 32 deep"),
        (b"".join(b" " * i + b"a:\n" for i in range(300)), "nested more than 32 deep"),
        (b"[" * 200_000, "larger than 64 KiB"),
        (b"a: b\0", "a NUL byte"),
        (b"a: \x07", "the character U+0007"),
        (b"a: \xff", "the byte 0xff is not UTF-8"),
        ("name: x".encode("utf-16"), "UTF-16; save it as UTF-8"),
        (b"a:\n\tb: 1", "use spaces instead of tabs"),
        (b"\ta: 1", "use spaces instead of tabs"),
        (b"a:\n  b: 1\n\tc: 1", "job.yaml:3: not valid YAML"),
        (b"a:\n-\tb: 1", "job.yaml:2: not valid YAML: mapping values are not allowed here; use spaces"),
        (b"a: b\tc", "use spaces instead of tabs"),
        (b"\t" * 60_000 + b"a: 1", "use spaces instead of tabs"),
        (b"a: b: c", "job.yaml:1: not valid YAML"),
        (b"a: 'b", "not valid YAML"),
        (b"a: [1", "not valid YAML"),
        (b'a: "\\ud83d"', "half of a surrogate pair"),
        (b'a: "\\UFFFFFFFF"', "out of range"),
        (b"%YAML 1." + b"9" * 5000 + b"\n---\na: 1", "out of range"),
    ],
)
def test_hostile_yaml_is_one_clear_line(data: bytes, message: str) -> None:
    start = time.process_time()
    with pytest.raises(SpecError) as caught:
        parse_spec(data, "job.yaml")
    assert time.process_time() - start < 1
    assert len(caught.value.problems) == 1
    assert message in str(caught.value)
    assert_plain(caught.value)


def test_a_billion_laughs_end_at_the_first_anchor() -> None:
    levels = [b"a0: &a0 [lol]"] + [b"a%d: &a%d [%s]" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 10)]
    result = problems(b"\n".join(levels))
    assert result[0].startswith("the anchor &a0 is not allowed")
    assert len(result) == spec_yaml.MAX_ERRORS


# errors: fields


SECTIONS: dict[str, type[Section]] = {  # every section of a model, and the places of its keys
    "data": DataConfig,
    "train": sections.TrainConfig,
    "scaling": sections.ScalingConfig,
    "checkpoints": sections.CheckpointConfig,
    "serve": sections.ServeConfig,
    "serve.gate": sections.Gate,
    "scaling.num_workers": sections.WorkerRange,
}


def known_fields() -> dict[str, set[str]]:
    """Return the sections that have a key, by key; those of the stub family included."""
    fields = {path: [*section.model_fields] for path, section in SECTIONS.items()}
    fields |= {"model": ["width", "heads", "act", "depth"], "model.depth": ["layers"]}
    result: dict[str, set[str]] = {}
    for path, names in fields.items():
        for name in names:
            result.setdefault(name, set()).add(path)
    return result


def test_a_key_in_the_wrong_section_is_sent_to_the_right_one() -> None:
    """Test every key of every section in every other section and at the top, unless it is similar to a key there."""
    homes, sent = known_fields(), 0
    for key, paths in homes.items():
        for at in ("train", "data", "scaling", "checkpoints", "serve", "serve.gate", "model", ""):
            if at in paths or (at == "scaling" and key in SECTIONS["scaling.num_workers"].model_fields):
                continue
            where = "__".join(filter(None, ["models__0", *at.split(".")])) + f"__{key}"
            message = next(problem for problem in problems(good(**{where: 1})) if f".{key}: " in problem)
            if "did you mean" in message:
                continue
            assert re.search(r"it belongs under (.*)", message), message
            named = set(re.findall(r"'([\w.]+)'", message.partition("under ")[2]))
            assert named <= paths or {f"{at}.{name}" for name in named} <= paths, message  # from the top, or from there
            assert named, message
            sent += 1
    assert sent > 200


@pytest.mark.parametrize("key", ["dropout", "block_size", "n_layer"])
def test_a_setting_of_the_family_belongs_under_model(key: str) -> None:
    changes = {"models__0__model": {"family": "minigpt"}, f"models__0__train__{key}": 1}
    assert f"models[0].train.{key}: unknown key; it belongs under 'model'" in problems(good(**changes))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("meu-coração", "meu-coracao"),
        ("Ünïcode Straße", "unicode-strasse"),
        ("smørrebrød_æ", "smorrebrod-ae"),
        ("Łódź 2024", "lodz-2024"),
        ("ﬁne", "fine"),
        ("--x--", "x"),
        ("a" * 80, "a" * 63),
        ("模型", ""),
    ],
)
def test_a_name_that_is_no_label_is_spelt_in_latin_letters(name: str, near: str) -> None:
    (message,) = problems(good(name=name))
    assert message.endswith(f"; write e.g. {near}" if near else "with no '-' at the ends")


@pytest.mark.parametrize("value", [0, 2, 4, "1", "grey"])
def test_choices_that_are_numbers_are_listed(value: object) -> None:
    (message,) = problems(good(models__0__data={"path": "photos", "channels": value}))
    assert "expected one of 1, 3" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nmae": 1}, "nmae: unknown key; did you mean 'name'?"),
        ({"models__1__modle": {}}, "models[1].modle: unknown key; did you mean 'model'?"),
        ({"models__1__batch_size": 4}, "models[1].batch_size: unknown key; it belongs under 'train'"),
        (
            {"models__0__train__lerning_rate": 1},
            "models[0].train.lerning_rate: unknown key; did you mean 'learning_rate'?",
        ),
        ({"models__0__model__widht": 1}, "models[0].model.widht: unknown key; did you mean 'width'?"),
        ({"models__0__model__depth__layer": 1}, "models[0].model.depth.layer: unknown key; did you mean 'layers'?"),
        ({"models__0__serve__gate__foo": 1}, "models[0].serve.gate.foo: unknown key; known here: metric, max, min"),
        (
            {"models__0__scaling__bad\nkey": 1},
            r"models[0].scaling['bad\nkey']: unknown key; known here: num_workers, use_gpu",
        ),
        ({"name": ...}, "name: missing; add it (name of the job"),
        ({"models": ...}, "models: missing"),
        ({"models": []}, "models: got 0 entries, expected at least 1"),
        ({"models": {}}, "models: got a mapping, expected a list"),
        ({"models__0": 3}, "models[0]: got 3, expected a mapping"),
        ({"models__0__data": ...}, "models[0].data: missing"),
        ({"models__0__train": None}, "models[0].train: got nothing, expected a mapping"),
        ({"models__0__train__learning_rate": "fast"}, "got 'fast', expected a number; write e.g. 0.001"),
        ({"models__0__train__learning_rate": 0}, "got 0, expected a number greater than 0"),
        ({"models__0__train__max_steps": True}, "max_steps: got true, expected a whole number; write e.g. 1000"),
        ({"models__0__train__max_steps": 1e3}, "max_steps: got 1000.0, expected a whole number; write 1000"),
        ({"models__0__train__max_steps": 1.5}, "max_steps: got 1.5, expected a whole number"),
        ({"models__0__train__max_steps": "10"}, "max_steps: got '10', expected a whole number"),
        ({"models__0__train__seed": -1}, "seed: got -1, expected a whole number at least 0"),
        ({"models__0__train__schedule": "cosin"}, "expected one of constant, linear, cosine; did you mean 'cosine'?"),
        ({"models__0__train__compile": "no"}, "compile: got 'no', expected true or false; write e.g. false"),
        ({"models__0__train__ema": 1.0}, "ema: got 1.0, expected a number less than 1"),
        ({"models__0__train__betas": [0.9]}, "models[0].train.betas[1]: missing"),
        ({"models__0__train__betas": 0.9}, "models[0].train.betas: got 0.9, expected a list"),
        (
            {"models__0__train__warmup_steps": 3000},
            "warmup_steps: got 3000, expected less than max_steps (3000); write e.g. 300",
        ),
        (
            {"models__0__train__batch_size": 127},
            "batch_size: got 127, expected a multiple of 2 (scaling.num_workers 2 x accumul",
        ),
        ({"models__0__train__batch_size": 127}, "write 126 or 128"),
        (
            {"models__0__scaling__num_workers": 200},
            "got 128, expected a multiple of 200 (scaling.num_workers 200 x accumulation_",
        ),
        ({"models__0__scaling__num_workers": 200}, "; write 200"),
        ({"models__0__scaling__num_workers": 1025}, "num_workers: got 1025, expected a whole number at most 1024"),
        (
            {"models__0__scaling__num_workers": "2"},
            "num_workers: got '2', expected a whole number, e.g. 2, or a range, e.g. {min: 1, max: 4}",
        ),
        (
            {"models__0__scaling__num_workers": {"min": 1}},
            "num_workers.max: missing; add it (largest number of workers",
        ),
        (
            {"models__0__scaling__num_workers": {"min": 0, "max": 4}},
            "num_workers.min: got 0, expected a whole number at",
        ),
        (
            {"models__0__scaling__num_workers": {"min": 4, "max": 2}},
            "num_workers.max: got 2, expected at least min (4)",
        ),
        (
            {"models__0__scaling__num_workers": {"min": 1, "max": 4, "mid": 2}},
            "num_workers.mid: unknown key; did you mean 'min'?",
        ),
        (
            {"models__0__scaling__num_workers": {"min": 3, "max": 4}},
            "num_workers.min: got 3, expected a divisor of 128 (batch_size 128); write 2 or 4",
        ),
        (
            {"models__0__scaling__num_workers": {"min": 1, "max": 300}},
            "num_workers.max: got 300, expected a divisor of 128 (batch_size 128); write 128",
        ),
        (
            {"models__0__scaling__num_workers": {"min": 1, "max": 5}, "models__0__train__accumulation_steps": 4},
            "num_workers.max: got 5, expected a divisor of 32 (batch_size 128 / accumulation_steps 4); write 4 or 8",
        ),
        (
            {"models__0__scaling__num_workers": {"min": 1, "max": 4}, "models__0__train__accumulation_steps": 3},
            "batch_size: got 128, expected a multiple of 3 (accumulation_steps 3); write 126 or 129",
        ),
        ({"models__0__train__init_from": "../x@1"}, "init_from: got '../x@1', expected a version or a checkpoint: "),
        (
            {"models__0__train__init_from": "vae@job:3"},
            "init_from: got 'vae@job:3', expected a version or a checkpoint",
        ),
        (
            {"models__0__data__sha256": "0" * 64},
            "`sha256` is for a dataset that was added with `genmodels data add`: remove it",
        ),
        ({"models__0__data__sha256": "../.."}, "sha256: got '../..', expected text of the form ^[0-9a-f]{64}$"),
        ({"models__0__checkpoints__num_to_keep": 1}, "num_to_keep: got 1, expected a whole number at least 2"),
        ({"models__0__model": "vae"}, "models[0].model: got 'vae', expected a mapping, e.g. {family: "),
        ({"models__0__model__family": ...}, "models[0].model.family: missing; write one of "),
        ({"models__0__model__family": "stub_imag"}, "models[0].model.family: got 'stub_imag', expected one of "),
        ({"models__0__model__family": "stub_imag"}, "; did you mean 'stub_image'?"),
        ({"models__0__model__family": ["../x"]}, "models[0].model.family: got a list"),
        ({"models__0__model__heads": 3}, "models[0].model.heads: got 3, expected a divisor of width (16)"),
        (
            {"models__0__model__act": "relo"},
            "models[0].model.act: got 'relo', expected one of relu, gelu; did you mean 'relu'?",
        ),
        ({"models__0__model__width": 0}, "models[0].model.width: got 0, expected a whole number at least 1"),
        ({"models__0__data__dataset": "fashion_mnist"}, "models[0].data.dataset: unknown dataset 'fashion_mnist'"),
        ({"models__0__data__dataset": "fashion_mnist"}, "did you mean fashion-mnist?"),
        ({"models__0__data": {}}, "models[0].data: "),
        ({"models__0__data": {"path": "a\0b"}}, "the character U+0000 is escaped here; remove it"),
        (
            {"models__1__data__dataset": "mnist"},
            "got 'mnist', a dataset of images, but stub_text learns from texts; write one of ",
        ),
        ({"models__1__name": "pictures"}, "models[1].name: got 'pictures', which models[0] already has"),
        (
            {"models__0__serve__gate": {"metric": "val_loss"}},
            "models[0].serve.gate: got neither max nor min; write one",
        ),
        ({"models__0__serve__gate__min": 1}, "models[0].serve.gate: got both max and min; write one"),
        (
            {"models__0__serve__gate__metric": "val_los"},
            "got 'val_los', expected one of val_loss, val_error; did you mean 'val_lo",
        ),
        ({"models__0__serve__alias": "latest"}, "models[0].serve.alias: got 'latest', which is reserved"),
        ({"models__0__serve__alias": "live"}, "models[0].serve.alias: got 'live', which is reserved"),
        ({"models__0__serve__alias": "7"}, "models[0].serve.alias: got '7', which is reserved"),
        ({"models__0__serve__alias": "step-5"}, "models[0].serve.alias: got 'step-5', which is reserved"),
        ({"models__0__serve__pool": "a b"}, "models[0].serve.pool: got 'a b', expected at most 63"),
    ],
)
def test_a_wrong_field_is_named_with_its_remedy(changes: dict[str, Any], message: str) -> None:
    result = problems(good(**changes))
    assert len(result) == 1, result
    assert message in result[0]


@pytest.mark.parametrize("name", ["a.b", "a/b", "..", "", "-a", "a-", "A", "a\n", "ä", "a" * 64, "/etc/passwd"])
def test_names_are_dns_labels(name: str) -> None:
    for path in ("name", "models__0__name"):
        (result,) = problems(good(**{path: name}))
        assert "lower-case letters, digits and '-'" in result


def test_a_name_that_reads_as_a_number_must_be_quoted() -> None:
    assert (
        problems(written(good()).replace(b"name: shapes", b"name: 1e-4"))[0]
        == "name: got 0.0001, expected text; put it in quotes"
    )
    job = parse(good(name="1e-4", models__0__name="0o17"))
    assert parse_module.load_stored(parse_module.dump(job)) == job


def test_all_problems_are_told_at_once_with_their_lines_and_the_families_own_after_them() -> None:
    data = textwrap.dedent(
        """\
        name: Shapes
        models:
          - name: a
            model: {family: stub_image, width: wide}
            data: {dataset: digits}
            train:
              batch_size: 0
              lerning_rate: 1
          - name: b
            model: {family: stub}
            data: {}
        """
    ).encode()
    with pytest.raises(SpecError) as caught:
        parse_spec(data, "job.yaml")
    assert [re.match(r"job\.yaml:\d+: [^:]+", problem)[0] for problem in caught.value.problems] == [
        "job.yaml:1: name",
        "job.yaml:7: models[0].train.batch_size",
        "job.yaml:8: models[0].train.lerning_rate",
        "job.yaml:10: models[1].model.family",
        "job.yaml:11: models[1].data",
    ]
    sound = data.replace(b"Shapes", b"shapes").replace(b": 0", b": 8").replace(b"lerning", b"learning")
    sound = sound.replace(b"stub}", b"stub_text, heads: x}").replace(b"{}", b"{dataset: shakespeare}")
    with pytest.raises(SpecError) as caught:
        parse_spec(sound, "job.yaml")
    assert [problem.split(",")[0] for problem in caught.value.problems] == [
        "job.yaml:4: models[0].model.width: got 'wide'",
        "job.yaml:10: models[1].model.heads: got 'x'",
    ]


def test_of_very_many_problems_the_first_are_told_quickly() -> None:
    start = time.process_time()
    result = problems(b"".join(b"k%d: [a, b]\n" % i for i in range(4000)))
    assert len(result) == 21
    assert result[-1] == "and 3982 more"
    assert time.process_time() - start < 1


# elastic workers, uploaded datasets, `init_from`


def test_an_elastic_run_names_the_sizes_it_may_have() -> None:
    def sizes(**changes: Any) -> list[int]:
        job = parse(good(**changes))
        assert parse_module.load_stored(parse_module.dump(job)) == job
        return job.models[0].world_sizes

    assert sizes() == [2]
    assert sizes(models__0__scaling={"num_workers": {"min": 1, "max": 8}}) == [1, 2, 4, 8]
    elastic = {"num_workers": {"min": 2, "max": 6}}
    assert sizes(models__0__scaling=elastic, models__0__train={"batch_size": 24}) == [2, 3, 4, 6]
    halves = {"batch_size": 24, "accumulation_steps": 2}
    assert sizes(models__0__scaling=elastic, models__0__train=halves) == [2, 3, 4, 6]
    halves["accumulation_steps"] = 4
    assert sizes(models__0__scaling=elastic, models__0__train=halves) == [2, 3, 6]
    scaling = sections.ScalingConfig(**elastic)
    assert (scaling.min_workers, scaling.max_workers) == (2, 6)
    assert (sections.ScalingConfig().min_workers, sections.ScalingConfig().max_workers) == (1, 1)


def test_an_added_dataset_is_known_where_the_storage_is() -> None:
    tree = good(models__0__data={"dataset": "mine"}, models__1__data={"dataset": "plays", "sha256": "a" * 64})
    result = problems(tree)
    assert "unknown dataset 'mine'" in result[0]
    assert "Your own data: `path`, or `genmodels data add NAME FILE|FOLDER`" in result[0]
    data = json.dumps(tree).encode()
    job = parse_spec(data, "job.yaml", datasets={"mine": "image", "plays": "text"})
    assert [model.data.is_added for model in job.models] == [True, True]
    assert parse_module.load_stored(parse_module.dump(job)) == job
    with pytest.raises(
        SpecError, match=r"got 'mine', a dataset of texts, but stub_image learns .*; write one of .*plays"
    ):
        parse_spec(data, "job.yaml", datasets={"mine": "text", "plays": "image"})
    with pytest.raises(SpecError, match=r"unknown dataset 'plais', did you mean plays\?"):
        parse_spec(data.replace(b"plays", b"plais"), "job.yaml", datasets={"mine": "image", "plays": "text"})
    with pytest.raises(SpecError, match="dataset"):
        parse_module.load_stored(json.dumps(good(models__0__data={"dataset": "../mine"})).encode())


def test_what_comes_over_the_network_names_no_files(tmp_path: Path) -> None:
    for path in (str(tmp_path), "photos", "~/photos"):
        data = json.dumps(good(models__0__data={"path": path, "image_size": 64})).encode()
        with pytest.raises(SpecError, match=r"models\[0\].data.path: .*genmodels data add NAME FILE\|FOLDER") as caught:
            parse_spec(data, "body", paths=False)
        assert len(caught.value.problems) == 1
    with pytest.raises(SpecError, match=r"Your own data: `genmodels data add"):
        parse_spec(json.dumps(good(models__0__data={"dataset": "mine"})).encode(), "body", paths=False)


@pytest.mark.parametrize(
    "name", ["vae", "vae@3", "vae@production", "vae@latest", "vae@live", "vae@step-500", "vae@shapes-0a1b2c3d:step-500"]
)
def test_training_starts_from_any_version_or_checkpoint(name: str) -> None:
    job = parse(good(models__0__train={"init_from": name}))
    assert job.models[0].train.init_from == name
    assert parse_module.load_stored(parse_module.dump(job)) == job


@pytest.mark.parametrize(
    "name", ["", "@3", "vae@", "Vae@3", "vae@-3", "vae@a/b", "vae@:step-5", "vae@job:step-", "a@b@c", "vae\n"]
)
def test_a_wrong_start_is_refused(name: str) -> None:
    assert "init_from: got " in problems(good(models__0__train={"init_from": name}))[0]


# stored specs


def test_dump_and_both_readers_round_trip() -> None:
    job = parse(GOOD)
    for back in (
        parse_module.load_stored(parse_module.dump(job)),
        parse_spec(parse_module.dump(job), "x"),
        JobSpec.model_validate(job.model_dump()),
    ):
        assert back == job
        assert back.models[0].family == "stub_image"
    assert parse_module.dump(parse_module.load_stored(parse_module.dump(job))) == parse_module.dump(job)


def test_stored_specs_may_hold_keys_of_a_newer_release_at_any_depth() -> None:
    tree = good(
        new=1,
        models__0__new={"a": 1},
        models__0__model__new=1,
        models__0__model__depth__new=1,
        models__0__train__new=1,
        models__0__serve__gate__new=1,
    )
    assert parse_module.load_stored(json.dumps(tree).encode()) == parse(GOOD)
    assert len(problems(tree)) == 4  # the outline; what is the family's own is seen after it


def test_stored_specs_are_not_judged_again_across_sections() -> None:
    tree = good(models__0__train__batch_size=127, models__0__serve__gate__metric="gone")
    assert parse_module.load_stored(json.dumps(tree).encode()).models[0].train.batch_size == 127
    with pytest.raises(SpecError, match="stored spec:1: models: missing"):
        parse_module.load_stored(b'{"name": "x"}')


def test_the_largest_spec_a_person_can_write_is_read_back() -> None:
    model = {"model": {"family": "stub_image"}, "data": {"path": "/" + "x" * 200 + "/" + "x" * 200}}
    job = parse({"name": "many", "models": [{"name": f"m{i}", **model} for i in range(100)]})
    assert len(parse_module.dump(job)) > spec_yaml.MAX_BYTES
    assert parse_module.load_stored(parse_module.dump(job)) == job
    assert "got 101 entries, expected at most 100" in problems(good(models=[{}] * 101))[-1]


def test_digest_is_of_the_meaning() -> None:
    job = parse(GOOD)
    backwards = json.loads(json.dumps(GOOD), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert parse_module.digest(parse(backwards)) == parse_module.digest(job)
    assert parse_module.digest(parse(good(models__1__scaling={"num_workers": 1}))) == parse_module.digest(
        job
    )  # the default, written out
    assert parse_module.digest(parse(good(models__0__train__learning_rate=2e-3))) != parse_module.digest(job)
    assert parse_module.digest(
        parse(good(models__1__model__family="stub_image", models__1__data__dataset="mnist"))
    ) != parse_module.digest(job)
    assert re.fullmatch("[0-9a-f]{64}", parse_module.digest(job))
    assert parse_module.job_id(job) == f"shapes-{parse_module.digest(job)[:8]}"


def test_model_digest_depends_on_that_model_alone() -> None:
    job, other = parse(GOOD), parse(good(name="other", models__1__train={"seed": 1}))
    assert parse_module.model_digest(job.models[0]) == parse_module.model_digest(other.models[0])
    assert parse_module.model_digest(job.models[1]) != parse_module.model_digest(other.models[1])


# the schema


def test_schema_accepts_good_specs_and_refuses_wrong_ones() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(GOOD)
    assert validator.is_valid(good(models__0__scaling__num_workers={"min": 1, "max": 2}))
    assert validator.is_valid(good(models__0__train__init_from="vae@shapes-0a1b2c3d:step-500"))
    assert validator.is_valid(json.loads(json.dumps(parse(GOOD).model_dump())))
    for invalid in (
        good(nmae=1),
        good(name="A"),
        good(models__0__model__family="stub"),
        good(models__0__model__family=...),
        good(models__0__model__widht=1),
        good(models__0__model__depth__layers="x"),
        good(models__0__train__ema=1),
        good(models__0__scaling__num_workers=0),
        good(models__0__scaling__num_workers={"min": 1}),
        good(models__0__train__init_from="../x"),
        good(models__0__data__dataset="../x"),
    ):
        assert not validator.is_valid(invalid)


def test_every_field_of_the_schema_is_described() -> None:
    definitions = json_schema.json_schema()["$defs"]
    for name in ("ModelSpec", "TrainConfig", "ScalingConfig", "WorkerRange", "CheckpointConfig", "ServeConfig", "Gate"):
        bare = [
            key
            for key, field in definitions[name]["properties"].items()
            if "description" not in field and "$ref" not in field
        ]
        assert not set(bare) - {"optimizer", "learning_rate", "betas", "weight_decay"}, (
            name
        )  # the optimizer's, in family.py


# the real families


def test_every_family_is_found_by_its_file_name_and_has_defaults() -> None:
    for name in models.names():
        family = models.load(name)
        assert family.family_name() == name
        assert family.kind in ("image", "text")
        assert family.metric_names
        family.Config()
        family.Request()


def test_an_unknown_family_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        SpecError, match=r"model\.family: got 'stub_txt', expected one of .*; did you mean 'stub_text'\?"
    ):
        models.load("stub_txt")


def test_heads_must_share_the_width_of_a_minigpt() -> None:
    model = {"family": "minigpt", "n_embd": 65, "n_head": 4}
    (result,) = problems(good(models__1__model=model))
    assert result.startswith("models[1].model.n_embd: ")
    assert "65" in result
    assert "n_head" in result
    assert "64" in result


# arbitrary input


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300) | st.text(alphabet="ab:-[]{},&*!?#|>'\"%@` \n\t\\0u1.e", max_size=60).map(str.encode))
def test_random_bytes_never_crash(data: bytes) -> None:
    try:
        parse_spec(data, "job.yaml")
    except SpecError as error:
        assert_plain(error)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from(["vae", "1e-4", "..", "step-1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PLACES = sorted(
    ["name", "priority", "models", "models__0", "models__0__new", "models__1__train", "models__1__model__new"]
    + [f"models__0__{key}" for key in GOOD["models"][0]]
    + [
        f"models__0__{section}__{key}"
        for section in ("model", "data", "train", "scaling", "serve")
        for key in GOOD["models"][0][section]
    ]
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(PLACES), JSON)
def test_a_random_value_anywhere_is_taken_or_refused_in_words(place: str, value: Any) -> None:
    try:
        job = parse(good(**{place: value}))
    except SpecError as error:
        assert_plain(error)
    else:
        assert parse_module.load_stored(parse_module.dump(job)) == job


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=12), JSON, min_size=1, max_size=4))
def test_json_with_tabs_is_read_as_json_without(value: dict[str, Any]) -> None:
    def result(text: str) -> Any:
        try:
            return spec_yaml.read(text.encode(), "x").value
        except SpecError as error:
            return re.sub(r"x:\d+: ", "", str(error))

    assert result("\t" + json.dumps(value, indent="\t", separators=("\t,\t", "\t:\t")) + "\t\n") == result(
        json.dumps(value)
    )


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=12), JSON, min_size=1, max_size=4))
def test_yaml_written_is_read_back(value: dict[str, Any]) -> None:
    back, refusal = None, ""
    try:
        back = spec_yaml.read(written(value), "x").value
    except SpecError as error:
        refusal = str(error)
    if back is None:  # only for values that no spec can have
        assert re.search(r"finite|too large|surrogate|U\+0000", refusal)
        return
    assert back == value
    assert json.dumps(back) == json.dumps(value)  # 1 and 1.0 and true are equal, but not the same
