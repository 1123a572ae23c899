"""Random valid configurations train, resume and grow; invalid ones are refused by name. `make fuzz` does it with 300."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cmoe.plugins import Catalogue

from .drawn_configs import Drawer

if TYPE_CHECKING:
    from .fuzz import Range, Verdict

CONFIG: dict[str, Any] = {
    "stream": {"name": "split_digits", "limit": 2},
    "model": {"name": "mlp", "hidden": [8], "dropout": 0.5, "moe": {"experts": 2}},
    "strategy": [{"name": "naive"}],
    "trainer": {"max_steps": 2, "chunk": 1, "batch_size": 8, "log_every": 1, "threads": 1},
    "evaluation": {"batch_size": 64},
}
PLUGIN = """
from cmoe.strategies import Strategy
class Mine(Strategy):
    '''Mine.'''
    {body}
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Range]:
    from . import fuzz  # imports everything, which takes seconds

    monkeypatch.chdir(tmp_path)
    with fuzz.site_in(str(tmp_path)) as made, fuzz.quick(monkeypatch.setattr):
        yield made


def test_forty_configurations(site: Range) -> None:
    from .fuzz import campaign, table, told

    result = campaign(site, seed=0, wanted=40)
    assert result["failures"] == [], "\n".join(map(told, result["failures"]))
    assert result["passed"] == 40, table(result)
    assert result["undrawable"] == []


# -- what is drawn --------------------------------------------------------------------------------------------------


def test_the_same_seed_and_index_give_the_same_configuration() -> None:
    first, second = (Drawer(Catalogue(), 3) for _ in range(2))
    later = [second.config(i) for i in range(20)]
    assert [first.config(i) for i in reversed(range(20))] == later[::-1]
    assert Drawer(Catalogue(), 4).config(0) != later[0]


def test_every_component_is_drawn() -> None:
    from .fuzz import KINDS, parts

    drawer = Drawer(Catalogue(), 0)
    drawn = {part for i in range(600) for part in parts(drawer.config(i))}
    assert {(kind, name) for kind in KINDS for name in drawer.names(kind)} <= drawn


# -- what it notices: a test that never fails says nothing ------------------------------------------------------------


def test_a_good_configuration_passes(site: Range) -> None:
    verdict = site.judge(CONFIG)
    assert verdict.how == "passed", verdict.trace


def test_a_refusal_by_name(site: Range) -> None:
    verdict = site.judge({**CONFIG, "trainer": {"clip_norm": 1.0, "clip_value": 1.0}})
    assert (verdict.how, verdict.message.partition(" expected")[0]) == ("refused", "<python>: trainer.clip_value:")


def test_a_refusal_by_the_data(site: Range) -> None:
    verdict = site.judge({**CONFIG, "stream": {"name": "split_digits", "experiences": 3}})
    assert verdict.how == "refused late"
    assert "stream.experiences" in verdict.message


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run draws its dropout anew."""
    from cmoe import checkpoint

    monkeypatch.setattr(checkpoint, "restore_generators", lambda state: None)


def _thaw(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen expert goes on learning."""
    from cmoe.moe import MoELayer

    apply_frozen = MoELayer.apply_frozen

    def nothing_frozen(layer: MoELayer) -> None:
        apply_frozen(layer)
        layer.requires_grad_(True)

    monkeypatch.setattr(MoELayer, "apply_frozen", nothing_frozen)


def _renumber(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new expert takes the id of one that was removed."""
    from cmoe.moe import MoELayer

    structure = MoELayer.structure
    monkeypatch.setattr(MoELayer, "structure", lambda layer: structure(layer) | {"next_expert": 0})


def _lose_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A structure does not say that there are added experts."""
    from cmoe.learners import Model

    monkeypatch.setattr(Model, "load_state_dict", lambda model, state: None)


@pytest.mark.parametrize(
    ("mistake", "stage"),
    [(_forget, "resume"), (_thaw, "experts"), (_renumber, "experts"), (_lose_weights, "resume")],
)
def test_mistakes_that_are_noticed(
    site: Range, monkeypatch: pytest.MonkeyPatch, mistake: Callable[[pytest.MonkeyPatch], None], stage: str
) -> None:
    mistake(monkeypatch)
    verdict = site.judge(CONFIG, "0:0")
    assert (verdict.how, verdict.stage) == ("failed", stage), verdict.message


@pytest.mark.parametrize(
    ("body", "stage", "said"),
    [
        ("def setup(self, context): raise ValueError('no')", "train", "names a key"),
        ("def after_experience(self, segment): raise ValueError('no')", "train", "ValueError: no"),
        (
            "def losses(self, output, batch): return {'mine': output.logits.sum() * float('nan')}",
            "train",
            "loss is nan",
        ),
        ("def state_dict(self): return {'a': 1 / 0}", "train", "ZeroDivisionError"),
    ],
)
def test_failing_plugins_are_noticed(tmp_path: Path, site: Range, body: str, stage: str, said: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.py").write_text(PLUGIN.format(body=body))
    verdict: Verdict = site.judge({**CONFIG, "strategy": ["mine"], "plugins": [str(tmp_path / "mine")]})
    assert (verdict.how, verdict.stage) == ("failed", stage)
    assert said in verdict.message


def test_a_failure_can_be_run_again(site: Range, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed holds the configuration, its number, and the line that failed."""
    from cmoe.config.text import parse

    from .fuzz import campaign, told

    monkeypatch.setattr(torch.Tensor, "backward", lambda *args, **kwargs: 1 / 0)
    result = campaign(site, seed=5, wanted=1)
    assert result["failed"] == 1
    failure = result["failures"][0]
    text = told(failure)
    assert f"--only {failure['config']}" in text
    assert "ZeroDivisionError" in text
    seed, _, index = failure["config"].partition(":")
    assert parse(failure["yaml"], "failure") == Drawer(site.catalogue, int(seed)).config(int(index))
