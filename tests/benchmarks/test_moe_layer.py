"""The layer's benchmark on tiny shapes: who takes part, what is counted, what is refused. Times are not looked at."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

TINY = ["--repeats", "2", "--patience", "1000"]


def test_json_has_every_contestant_and_bar(program, capsys):
    program("moe_layer").main([*TINY, "--json", "--shapes", "4,64,16,24,2", "--paths", "loop"])
    document = json.loads(capsys.readouterr().out)
    assert "torch" in document["machine"]
    for dtype in ("float32", "bfloat16"):
        rows = [r for r in document["rows"] if r["dtype"] == dtype]
        assert [r["contestant"] for r in rows if r["ffn"] == "gelu"] == [
            "cmoe", "balanced", "dense", "cmoe loop", "st-moe-pytorch"]  # fmt: skip
        assert [r["contestant"] for r in rows if r["ffn"] == "swiglu"] == [
            "cmoe", "balanced", "dense", "cmoe loop",
            "transformers eager", "transformers batched_mm", "transformers grouped_mm"]  # fmt: skip
        for r in rows:
            assert "left_out" not in r, r
            assert min(r[k] for k in ("ms", "to_balanced", "peak_mib", "gflop", "moved_mb")) > 0
            assert r["shape"] == [4, 64, 16, 24, 2]
        bars = [b for b in document["bars"] if b["dtype"] == dtype]
        whats = [b["what"].split(" eager")[0].split(" batched_mm")[0].split(" grouped_mm")[0] for b in bars]
        assert whats == [
            "time over the balanced product", "speed over st-moe-pytorch",
            "time over the balanced product", "time over transformers"]  # fmt: skip
    of = {(r["dtype"], r["ffn"], r["contestant"]): r for r in document["rows"]}
    for b in document["bars"]:
        own = of[b["dtype"], b["ffn"], "cmoe"]["ms"]
        peer = b["what"].split(" over ")[1].replace("the balanced product", "balanced")
        theirs = of[b["dtype"], b["ffn"], peer]["ms"]
        assert b["ratio"] == pytest.approx(theirs / own if b["bar"] == ">= 2" else own / theirs)
        limit = float(b["bar"].split()[1])
        assert b["ok"] == (b["ratio"] >= limit if b["bar"].startswith(">=") else b["ratio"] <= limit)


def test_the_table_says_who_was_left_out_and_why(program, capsys):
    program("moe_layer").main([*TINY, "--shapes", "4,32,8,16,1", "--dtypes", "float32", "--memory", "0.00001"])
    out = capsys.readouterr().out
    assert "st-moe-pytorch left out: takes at least two experts per token" in out
    assert "transformers batched_mm left out: would copy" in out
    assert "| 4, 32, 8, 16, 1 | float32 | swiglu |" in out
    assert "<= 1.2" in out


def test_what_would_take_too_long_is_left_out_and_named(program, capsys):
    program("moe_layer").main([*TINY, "--shapes", "4,32,8,16,2", "--dtypes", "float32", "--at-most", "0", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert [(r["ffn"], r["contestant"]) for r in document["rows"]] == [("gelu", "all"), ("swiglu", "all")]
    assert all("more than --at-most 0 s" in r["left_out"] for r in document["rows"])
    assert document["bars"] == []


@pytest.mark.parametrize("gated", [False, True])
def test_flops_are_those_that_torch_counts(program, gated):
    bench = program("moe_layer")
    s = bench.Shape(4, 64, 16, 24, 2)
    x = torch.randn(s.tokens, s.dim)
    layer = bench.our_layer(s, gated, x, "loop")
    runs = {"balanced": bench.balanced(s, gated, x), "dense": bench.dense(s, gated, x)}
    if gated:
        for kind in ("eager", "batched_mm"):
            runs[kind] = bench.transformers(s, x, layer, kind, 1.0)
    else:
        runs["st-moe-pytorch"] = bench.st_moe(s, x)
    for name, run in runs.items():
        with FlopCounterMode(display=False) as counter:
            run()
        assert run.flops == pytest.approx(counter.get_total_flops(), rel=0.02), name


def test_two_things_that_differ_are_not_timed(program):
    bench = program("moe_layer")
    s = bench.Shape(4, 32, 8, 16, 2)
    x = torch.randn(s.tokens, s.dim)
    layer = bench.our_layer(s, True, x)
    other = bench.transformers(s, x, layer, "eager", 1.0)
    bench.same("transformers", layer, other, x)
    with torch.no_grad():
        other.parameters[0].neg_()
    with pytest.raises(RuntimeError, match="transformers: outputs differ from ours by"):
        bench.same("transformers", layer, other, x)


def test_a_pass_makes_every_gradient_anew(program):
    bench = program("moe_layer")
    s = bench.Shape(4, 64, 8, 16, 2)
    x = torch.randn(s.tokens, s.dim)
    layer = bench.our_layer(s, False, x)
    layer.freeze([0])
    run = bench.cmoe(layer, s, False, x)
    run()
    first = [p.grad.clone() for p in run.parameters]
    run()
    assert all(torch.equal(p.grad, g) for p, g in zip(run.parameters, first, strict=True))
    assert len(run.parameters) < len(list(layer.parameters()))
    run.clear()
    assert run.x.grad is None


@pytest.mark.parametrize("text", ["64,2048", "a,b,c,d,e", "4,64,16,24,8", "3,64,16,24,2"])
def test_a_wrong_shape_is_refused(program, text, capsys):
    with pytest.raises(SystemExit) as refused:
        program("moe_layer").main(["--shapes", text])
    assert refused.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("name", ["moe_layer", "moe_scale"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_benchmark_says_so(program, name, capsys):
    with pytest.raises(SystemExit):
        program(name).main(["--device", "cuda"])
    assert "no GPU" in capsys.readouterr().err
