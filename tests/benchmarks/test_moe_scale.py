"""The benchmark of many and of frozen experts on tiny shapes. Times are not looked at."""

from __future__ import annotations

import json

import pytest

TINY = ["--repeats", "2", "--experts", "4", "8", "--shape", "32,8,16,2", "--frozen", "10,40,8,16,2"]


def test_json_rows_and_figure(program, tmp_path, capsys):
    figure = tmp_path / "scale.png"
    program("moe_scale").main([*TINY, "--json", "--figure", str(figure)])
    document = json.loads(capsys.readouterr().out)
    assert figure.read_bytes().startswith(b"\x89PNG")
    small, large = document["rows"]
    assert (small["experts"], large["experts"]) == (4, 8)
    assert large["weights_mb"] == pytest.approx(2 * small["weights_mb"])
    for r in document["rows"]:
        assert r["weights_mb"] == pytest.approx(3 * 4 * r["experts"] * 2 * 8 * 16 / 1e6)
        assert r["moved_mb"] > r["weights_mb"]
        assert r["memory_ms"] == pytest.approx(r["moved_mb"] / r["gb_per_s"])
        assert r["products_ms"] == pytest.approx(r["gflop"] / r["gflop_per_s"] * 1e3)
        assert min(r["cmoe_ms"], r["balanced_ms"], r["peak_mib"]) > 0


def test_frozen_experts_are_frozen_and_the_bars_are_at_90_percent(program, capsys):
    program("moe_scale").main([*TINY, "--json"])
    rows = json.loads(capsys.readouterr().out)["frozen"]
    assert [r["frozen"] for r in rows] == [0.0, 0.5, 0.9, 1.0] * 2
    per_expert = 8 * 16 + 16 + 16 * 8 + 8 + 8  # both maps with biases, and the router's column
    assert [r["trained_parameters"] for r in rows[:4]] == [n * per_expert for n in (10, 5, 1, 0)]
    barred = {r["what"]: r for r in rows if r["bar"] is not None}
    assert {what: (r["frozen"], r["bar"]) for what, r in barred.items()} == {
        "forward + backward": (0.9, 0.8),
        "forward + backward + Adam": (0.9, 0.6),
    }
    for r in barred.values():
        none = next(q for q in rows if q["what"] == r["what"] and not q["frozen"])
        assert r["ratio"] == pytest.approx(r["ms"] / none["ms"])
        assert r["ok"] == (r["ratio"] <= r["bar"])


def test_the_tables(program, capsys):
    program("moe_scale").main(TINY)
    out = capsys.readouterr().out
    assert "| experts | cmoe ms |" in out
    assert "10, 40, 8, 16, 2:" in out
    assert "forward + backward + Adam" in out


@pytest.mark.parametrize("experts", [["1"], ["7"]])
def test_experts_that_do_not_divide_are_refused(program, experts, capsys):
    with pytest.raises(SystemExit):
        program("moe_scale").main(["--shape", "32,8,16,2", "--experts", *experts])
    assert "divisors of T·K = 64" in capsys.readouterr().err
