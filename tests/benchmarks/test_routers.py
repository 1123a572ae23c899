"""The comparison of all routers on a tiny setting: who takes part, what is equal, what is counted. Scores are not looked at."""

from __future__ import annotations

import json

import pytest

from cmoe.moe import ROUTERS, MoELayer

TINY = ["--steps", "2", "--seeds", "2", "--repeats", "2", "--streams", "vision"]


@pytest.fixture
def document(program, tmp_path, capsys):
    """What a call prints as JSON."""

    def call(*names: str) -> dict:
        program("routers").main([*TINY, "--json", "--out", str(tmp_path), "--only", *names])
        return json.loads(capsys.readouterr().out)

    return call


def test_json_has_every_contestant_with_what_it_cost(document):
    found = document("topk", "base", "kmeans", "soft", "smear", "hash", "per_task", "ffn_active", "ffn_total")[
        "streams"
    ]["vision"]
    rows = {r["router"]: r for r in found["rows"]}
    assert rows.keys() == {"topk", "base", "kmeans", "soft", "smear", "ffn_active", "ffn_total"}
    for row in rows.values():
        assert row["seeds"] == 2
        assert 0 <= row["accuracy"] <= 100
        assert min(row[k] for k in ("active", "total", "flops", "step_ms", "step_ratio")) > 0
    assert rows["topk"]["experts_per_token"] == 2
    assert rows["base"]["experts_per_token"] == 1
    assert rows["base"]["hidden"] > 1.9 * rows["topk"]["hidden"]
    # every token meets every expert's slots: as many as there are, over the tokens of an image
    assert rows["soft"]["experts_per_token"] == pytest.approx(8 / 5)
    assert rows["soft"]["load_cv"] is None
    for name in ("base", "soft", "smear", "ffn_active"):
        assert rows[name]["active"] == pytest.approx(rows["topk"]["active"], rel=0.05), name
    assert rows["ffn_total"]["total"] == pytest.approx(rows["topk"]["total"], rel=0.05)
    assert "difference" not in rows["topk"]
    of = {(r["router"], r["seed"]): r["accuracy"] for r in found["runs"]}
    apart = [of["base", seed] - of["topk", seed] for seed in (0, 1)]
    assert rows["base"]["difference"] == pytest.approx(sum(apart) / 2)
    assert {r["seed"] for r in found["runs"]} == {0, 1}
    # the reasons are the rules' own
    assert "'hash', which needs token_ids" in found["left_out"]["hash"]
    assert "task label" in found["left_out"]["per_task"]


def test_a_finished_run_is_not_trained_again(program, tmp_path, monkeypatch, capsys):
    bench = program("routers")
    call = [*TINY, "--json", "--out", str(tmp_path), "--only", "topk", "gshard"]
    bench.main(call)
    first = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(bench.Bench, "trained", lambda *_: pytest.fail("trained again"))
    bench.main(call)
    assert json.loads(capsys.readouterr().out) == first


@pytest.mark.parametrize("setting", ["vision", "language"])
@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_has_a_size_with_which_it_is_equal(program, name, setting):
    bench = program("routers")
    dim = bench.SETTINGS[setting].dim
    wanted = bench.reference_layer(dim).parameter_counts()[1]
    for met in (None, 1.4):
        moe = bench.contestant(name, dim, met).moe
        layer = MoELayer(dim, hidden=moe["hidden"], experts=moe["experts"], router=moe["router"])
        one = sum(p.numel() for p in layer.cohorts.parameters()) / len(layer.ids)
        known = met or layer.router.experts_per_token(layer.view)
        own = layer.router.active_parameters()
        assert own + known * one == pytest.approx(wanted, rel=0.05)


def test_the_spread_tells_routers_from_seeds(program):
    bench = program("routers")

    def runs(table):
        return [{"router": n, "seed": s, "accuracy": a} for n, row in table.items() for s, a in enumerate(row)]

    # routers 10 points apart, a seed that is 5 points better for all, and noise of 1
    told = bench.spread(runs({"a": [10, 15, 11], "b": [21, 25, 20], "c": [30, 35, 31]}))
    assert told["p"] < 1e-3
    assert told["noise"] < 1.5
    alike = bench.spread(runs({"a": [10, 15, 20], "b": [15, 10, 20], "c": [20, 15, 10]}))
    assert alike["p"] > 0.3
    assert alike["least"] > 10
    assert bench.spread(runs({"a": [1], "b": [2]})) is None


def test_the_page_has_a_place_for_everything(program, document, tmp_path):
    bench = program("routers")
    found = document("topk", "dense", "hash")["streams"]
    (tmp_path / "images").mkdir()
    page = tmp_path / "routers.md"
    page.write_text(
        "before\n<!-- about -->\nobsolete\n<!-- end -->\n<!-- table vision -->\nobsolete\n<!-- end -->\nafter\n"
    )
    bench.write(tmp_path, found, "a machine.")
    text = page.read_text()
    assert "obsolete" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "a machine." in text
    assert "| topk" in text
    assert "- hash: expected a router" in text
    assert (tmp_path / "images" / "routers.png").read_bytes().startswith(b"\x89PNG")
    page.write_text("empty")
    with pytest.raises(ValueError, match="expected a line '<!-- table vision -->'"):
        bench.write(tmp_path, found, "a machine.")
