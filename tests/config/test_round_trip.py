"""Whatever configuration is valid, its plan survives being written and read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmoe.config import load
from cmoe.config.plan import Plan
from cmoe.config.text import dump, parse
from cmoe.errors import UserError
from cmoe.plugins import Catalogue

from .conftest import TOY

texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="$\\"), max_size=12)
finite = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | finite | texts
plain = st.recursive(scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(texts, x, max_size=3), max_leaves=8)


def some(**options: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=options)


router = st.just("topk") | some(k=st.integers(1, 4), switch=st.floats(0, 9)).map(lambda o: {"name": "topk", **o})
strategies = st.lists(st.sampled_from(["naive", "replay", "lwf", "online_ewc"]), min_size=1, max_size=3, unique=True)
configs = st.fixed_dictionaries(
    {
        "stream": some(
            size=st.integers(1, 10**9), rate=st.floats(1e-300, 1e300), ratio=st.floats(0, 1), word=texts, note=st.none() | texts,
            flag=st.booleans(), mode=st.sampled_from(["slow", "fast"]), sizes=st.lists(st.integers(), max_size=3),
            pair=st.tuples(st.integers(), finite), table=st.dictionaries(texts, finite, max_size=3),
            mixed=st.just("auto") | st.lists(st.integers(1, 5)), router=st.none() | router, anything=plain,
            scenario=st.sampled_from(["class", "task"]),
        ).map(lambda o: {"name": "toy", **o}),
    },
    optional={
        "seed": st.integers(0, 2**31), "experiment": texts.filter(str.strip), "label": st.none() | texts,
        "strategy": strategies | st.integers(1, 10**6).map(lambda n: {"name": "replay", "size": n}),
        "model": some(
            hidden=st.lists(st.integers(1, 9), min_size=1, max_size=3), head=st.sampled_from(["shared", "growing", "auto"]),
            moe=st.none() | some(experts=st.integers(1, 9), router=router, layers=st.just("all") | st.lists(st.integers(0, 3))),
        ),
        "optimizer": st.sampled_from(["sgd", "adam"]) | st.floats(1e-9, 10).map(lambda lr: {"name": "adamw", "lr": lr}),
        "trainer": some(epochs=st.integers(1, 99), clip_norm=st.floats(0, 1e9)),
    },
)  # fmt: skip


def message(action: Callable[[], object]) -> str:
    """The user error that an action ends in, or nothing; any other exception goes through."""
    try:
        action()
    except UserError as e:
        return str(e)
    return ""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "toy.py").write_text(TOY)
    return Catalogue([folder])


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs)
def test_plans_round_trip(shared: Catalogue, config: dict[str, Any]) -> None:
    plan = load.read(config, [], shared)
    data = plan.to_dict()
    for again in (
        Plan.from_dict(data, shared),
        Plan.from_dict(json.loads(json.dumps(data)), shared),
        Plan.from_dict(parse(dump(data), "x"), shared),
    ):
        assert again == plan
        assert again.hash == plan.hash
        assert list(again.to_dict()) == list(data)
    data["stream"]["size"] = -1  # a copy: the plan does not change
    assert plan.stream["size"] != -1


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    config=st.dictionaries(
        st.sampled_from(["stream", "model", "strategy", "trainer", "seed", "plugins", "extends", "x"]), plain
    )
)
def test_anything_else_is_a_user_error(shared: Catalogue, config: dict[str, Any]) -> None:
    assert "\n" not in message(lambda: load.read({"stream": "toy", **config}, [], shared))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(max_size=60) | st.text("stream: {}[]&*!|>'\"%@`-?#,\n\t \\0ab", max_size=60))
def test_any_text_is_a_value_or_a_user_error(text: str) -> None:
    assert "\n" not in message(lambda: parse(text, "x"))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(plain)
def test_yaml_is_read_as_it_was_written(value: Any) -> None:
    assert parse(dump(value), "x") == value
