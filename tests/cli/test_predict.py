"""`cmoe predict`: a finished run answers as its own evaluation did, from whatever file the inputs come."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cmoe import inputs, predict
from cmoe.api import data_of_run, extend, plan_of_run
from cmoe.assembly import make_stream
from cmoe.cli import main
from cmoe.errors import UserError
from cmoe.metrics import Record
from cmoe.restored import Restored, of_run
from cmoe.rundir import RunFolder
from cmoe.streams import transforms
from cmoe.streams.join import Joined

from .finished import VARIANTS, make


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("predict")


@pytest.fixture(scope="module")
def made(base: Path) -> dict[str, RunFolder]:
    return {}


@pytest.fixture
def run(request: pytest.FixtureRequest, base: Path, made: dict[str, RunFolder]) -> RunFolder:
    name = getattr(request, "param", "naive")
    if name not in made:
        made[name] = make(base, name)
    return made[name]


def cmoe(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    assert main.main([str(a) for a in arguments]) == code
    return capsys.readouterr()


def opened(run: RunFolder):
    plan, catalogue = plan_of_run(run)
    return make_stream(plan, catalogue, data_of_run(run))


@pytest.mark.parametrize("run", VARIANTS, indirect=True)
def test_it_answers_as_the_evaluation_did_without_the_data(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = opened(run)
    monkeypatch.setattr("cmoe.restored._opened", None)  # the data is out of reach
    restored = of_run(run)
    record = Record.load(run.rows)
    row = record.rows[record.last].columns
    compared = 0
    for experience in stream.experiences:
        column = row[experience.index]
        raw = experience.test.raw()
        if stream.language:
            text = bytes(raw[:, 1:][raw[:, 1:] != 256].to(torch.uint8).tolist())
            bits, right = restored.language(text, experience.index)
            assert column.nll is not None
            assert column.correct is not None
            assert column.tokens is not None
            assert bits == pytest.approx(column.nll.sum() / math.log(2) / column.tokens.sum(), rel=1e-5)
            assert right == column.correct.sum() / column.tokens.sum()
            compared += 1
            continue
        for task, pred, confidence in (
            (None, column.pred, column.confidence),
            (experience.index, column.task_pred, column.task_confidence),
        ):
            if pred is None or (pred < 0).all():
                continue
            assert task is not None or restored.why_task() is None
            answers = restored.classes(raw, task, top=2)
            assert [a[0][0] for a in answers] == pred.tolist()
            np.testing.assert_allclose([a[0][1] for a in answers], confidence, rtol=1e-5)
            assert all(a[0][1] >= s for a in answers for _, s in a)
            compared += 1
    assert compared >= len(stream.experiences)


@pytest.mark.parametrize("run", ["naive", "separate", "text", "bytes"], indirect=True)
def test_the_data_is_opened_where_the_run_wrote_nothing_down(run: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder(tmp_path / "mlruns" / "runs" / run.id)
    shutil.copytree(run.path, copy.path)
    facts = copy.facts()
    facts.pop("inputs")
    (copy.path / "run.json").write_text(json.dumps(facts))
    known, plain = of_run(run), of_run(copy)
    raw = opened(run).experiences[0].test.raw()[:5]
    torch.testing.assert_close(known.logits(raw, 0) if not known.stream.language else torch.tensor(known.language(b"abc", 0)),
                               plain.logits(raw, 0) if not plain.stream.language else torch.tensor(plain.language(b"abc", 0)),
                               rtol=0, atol=0)  # fmt: skip


@pytest.mark.parametrize(
    ("run", "needed"),
    [("naive", False), ("growing", False), ("topk", False), ("expand", True), ("separate", True), ("domain", False),
     ("text", False), ("bytes", False), ("bytes_expand", True), ("bytes_separate", True)],
    indirect=["run"],
)  # fmt: skip
def test_the_task_label_is_asked_for_where_it_decides(run: RunFolder, needed: bool) -> None:
    restored = of_run(run)
    names = [e.name for e in restored.stream.experiences]
    assert (restored.why_task() is not None) == needed
    if needed:
        with pytest.raises(UserError, match=rf"^--task: expected one of 0 \({re.escape(names[0])}\).*, as "):
            restored.task(None)
    else:
        assert restored.task(None) is None
    assert [restored.task(n) for n in names] == [restored.task(i) for i in range(len(names))]
    with pytest.raises(UserError, match="got '99'"):
        restored.task("99")


def write_digits(folder: Path, run: RunFolder) -> tuple[Path, torch.Tensor, torch.Tensor]:
    test = opened(run).experiences[2].test
    x, y = test.raw()[:6], test.targets()
    assert y is not None
    np.savez(folder / "digits.npz", x=x.numpy(), y=y[:6].numpy())
    return folder / "digits.npz", x, y[:6]


def test_arrays_images_and_floats_are_the_same_inputs(run: RunFolder, tmp_path: Path, capsys: Any) -> None:
    arrays, x, y = write_digits(tmp_path, run)
    restored = of_run(run)
    expected = restored.classes(x, None)
    for i, image in enumerate(x[:, 0].numpy()):
        Image.fromarray((image * (255 / 16)).round().astype("uint8")).save(tmp_path / f"{i}.png")
    np.savez(tmp_path / "flat.npz", x=x[:, 0].numpy())
    np.savez(tmp_path / "last.npz", x=x.permute(0, 2, 3, 1).numpy())
    np.savez(tmp_path / "ints.npz", x=x.numpy().astype("int64"))
    np.savez(tmp_path / "whole.npz", x=x.numpy().astype("float64"))
    np.savez(tmp_path / "scaled.npz", x=x.numpy().astype("float32") / 16)
    np.savez(tmp_path / "bright.npz", x=(x.numpy() * (255 / 16)).round().astype("uint8"))
    np.save(tmp_path / "bare.npy", x.numpy())
    folder = run.path.parent.parent
    for files in (
        [arrays],
        [tmp_path / f"{i}.png" for i in range(6)],
        *([p] for p in sorted(tmp_path.glob("*.np[zy]"))),
    ):
        out, _ = cmoe(capsys, "predict", run.id, *files, "--root", folder, "--json")
        document = json.loads(out)
        got = [[(p["id"], p["confidence"])] for p in document["predictions"]]
        assert got == expected, files
    np.savez(tmp_path / "one.npz", x=x[0].numpy(), y=y[0].numpy())
    out, _ = cmoe(capsys, "predict", run.path, tmp_path / "one.npz", "--json")
    assert len(json.loads(out)["predictions"]) == 1


def test_what_a_user_sees(run: RunFolder, tmp_path: Path, capsys: Any) -> None:
    arrays, x, y = write_digits(tmp_path, run)
    root = run.path.parent.parent
    out, err = cmoe(capsys, "predict", run.id[:-2], arrays, "--root", root, "--top", 3)
    lines = out.splitlines()
    assert lines[0].split() == ["input", "class", "id", "confidence", "is", "then"]
    assert len(lines) == 1 + 6 + 2
    right = sum(a[0][0] == t for a, t in zip(of_run(run).classes(x, None), y.tolist(), strict=True))
    assert lines[-1] == f"accuracy {100 * right / 6:.1f} % of 6 inputs"
    assert err == f"cmoe: loading run {run.id}\n"
    out, err = cmoe(capsys, "predict", run.id, arrays, "--root", root, "--task", "0+1")
    assert "6 of the inputs are of classes that task 0+1 does not have" in err
    assert "accuracy 0.0 %" in out
    Image.new("RGBA", (20, 10), (255, 255, 255, 128)).save(tmp_path / "wide.png")
    out, err = cmoe(capsys, "predict", run.id, tmp_path / "wide.png", "--root", root)
    assert "resized from 20 x 10 to 8 x 8 pixels" in err
    assert len(out.splitlines()) == 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
@pytest.mark.parametrize("kind", ["png", "webp", "tiff", "bmp"])
def test_every_kind_of_image_has_the_same_brightness(run: RunFolder, tmp_path: Path, mode: str, kind: str) -> None:
    stream = inputs.rebuild(run.facts()["inputs"])
    if mode in ("I;16", "I"):
        image = Image.fromarray(np.full((8, 8), 65535, dtype="uint16")).convert(mode)
    elif mode == "F":
        image = Image.fromarray(np.full((8, 8), 1.0, dtype="float32"))
    else:
        image = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    if mode == "F" and kind != "tiff":
        pytest.skip("no file format for floats")
    try:
        image.save(tmp_path / f"a.{kind}", **({"lossless": True} if kind == "webp" else {}))
    except (OSError, KeyError):
        pytest.skip(f"Pillow writes no {kind} of mode {mode}")
    notes: list[str] = []
    samples = predict.read(tmp_path / f"a.{kind}", stream, notes.append)
    assert samples.raw.shape == (1, 1, 8, 8)
    assert samples.raw.dtype == torch.uint8
    assert samples.raw.unique().tolist() == [16]
    assert notes == []


def test_transparency_is_black(run: RunFolder, tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "a.png")
    stream = inputs.rebuild(run.facts()["inputs"])
    assert predict.read(tmp_path / "a.png", stream, pytest.fail).raw.unique().tolist() == [0]


@pytest.mark.parametrize("run", ["text"], indirect=True)
def test_texts_by_line(run: RunFolder, tmp_path: Path, capsys: Any) -> None:
    test = opened(run).experiences[1].test
    (tmp_path / "q.txt").write_text("".join(f"book a flight {n}\n\n" for n in range(6)))
    np.savez(tmp_path / "q.npz", x=test.raw()[:6].numpy())
    answers = [
        json.loads(cmoe(capsys, "predict", run.path, tmp_path / name, "--json")[0])["predictions"]
        for name in ("q.txt", "q.npz")
    ]
    assert [(a["id"], a["confidence"]) for a in answers[0]] == [(a["id"], a["confidence"]) for a in answers[1]]
    assert answers[0][0]["input"] == "book a flight 0"
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9\n")
    assert "expected text in UTF-8, byte 3" in cmoe(capsys, "predict", run.path, tmp_path / "bad.txt", code=2)[1]
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "one text a line" in cmoe(capsys, "predict", run.path, tmp_path / "empty.txt", code=2)[1]


@pytest.mark.parametrize("run", ["bytes"], indirect=True)
def test_bits_per_byte_of_any_file(run: RunFolder, base: Path, tmp_path: Path, capsys: Any) -> None:
    out, _ = cmoe(capsys, "predict", run.path, base / "data" / "one.txt", base / "data" / "two.txt")
    lines = out.splitlines()
    assert lines[0].split("  ")[0] == "file"
    assert [float(line.split()[2]) < 9 for line in lines[1:]] == [True, True]
    out, _ = cmoe(capsys, "predict", run.path, base / "data" / "one.txt", "--json")
    found = json.loads(out)["files"][0]
    assert found["bytes"] == (base / "data" / "one.txt").stat().st_size
    (tmp_path / "empty").write_bytes(b"")
    assert "at least one byte" in cmoe(capsys, "predict", run.path, tmp_path / "empty", code=2)[1]
    (tmp_path / "zeros").write_bytes(b"\0\xff")
    cmoe(capsys, "predict", run.path, tmp_path / "zeros")


def write_bad(folder: Path) -> dict[str, tuple[Path, str]]:
    """File name -> the file and what must be said of it."""
    x = np.zeros((2, 1, 8, 8), dtype="uint8")
    arrays = {
        "nothing": ({}, "expected an array x"),
        "named": ({"images": x}, "it has images"),
        "shape": ({"x": x[:, :, :7]}, "expected shape (N, 1, 8, 8), got (2, 1, 7, 8)"),
        "none": ({"x": x[:0]}, "at least one sample"),
        "nan": ({"x": np.full((2, 1, 8, 8), np.nan)}, "finite"),
        "huge": ({"x": x.astype("int64") + 300}, "expected pixels 0..255"),
        "text": ({"x": np.array(["a", "b"])}, "expected numbers"),
        "object": ({"x": np.array([None, 1], dtype=object)}, "Python objects"),
        "few": ({"x": x, "y": np.array([1])}, "expected 2 class ids or names"),
        "high": ({"x": x, "y": np.array([1, 10])}, "expected classes 0..9, got 10"),
        "low": ({"x": x, "y": np.array([-1, 1])}, "expected classes 0..9, got -1"),
        "strange": ({"x": x, "y": np.array(["1", "one"])}, "expected names of classes, got 'one'"),
        "real": ({"x": x, "y": np.array([1.0, 2.0])}, "class ids or names"),
    }
    bad = {}
    for name, (content, message) in arrays.items():
        np.savez(folder / f"{name}.npz", **content)
        bad[name] = folder / f"{name}.npz", message
    whole = (folder / "shape.npz").read_bytes()
    files = {
        "cut.npz": (whole[: len(whole) // 2], "cannot be read"),
        "no.npz": (b"hello", "it holds Python objects"),
        "no.png": (b"hello", "cannot be read as an image"),
        "empty.png": (b"", "cannot be read as an image"),
        "note.txt": (b"hello", "cannot be read as an image"),
    }
    for name, (content, message) in files.items():
        (folder / name).write_bytes(content)
        bad[name] = folder / name, message
    Image.new("L", (64, 64)).save(folder / "good.png")
    (folder / "torn.png").write_bytes((folder / "good.png").read_bytes()[:-30])
    bad["torn.png"] = folder / "torn.png", "cannot be read as an image"
    bad["folder"] = folder, "expected a file, got a folder"
    bad["absent"] = folder / "absent.png", "no such file"
    return bad


def test_bad_files_are_one_line(run: RunFolder, tmp_path: Path, capsys: Any) -> None:
    stream = inputs.rebuild(run.facts()["inputs"])
    for name, (path, message) in write_bad(tmp_path).items():
        with pytest.raises(UserError) as caught:
            predict.read(path, stream, lambda _: None)
        assert message in str(caught.value), name
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    out, err = cmoe(capsys, "predict", run.path, tmp_path / "good.png", tmp_path / "no.png", code=2)
    assert out == ""
    assert err.splitlines()[-1].startswith(f"cmoe: {tmp_path / 'no.png'}: expected an image, .npz or .npy")


def test_wrong_arguments(run: RunFolder, tmp_path: Path, capsys: Any) -> None:
    arrays, _, _ = write_digits(tmp_path, run)
    root = run.path.parent.parent
    assert "no runs in" in cmoe(capsys, "predict", "last", arrays, "--root", tmp_path, code=2)[1]
    assert (
        "did you mean" in cmoe(capsys, "predict", run.id.replace("naive", "native"), arrays, "--root", root, code=2)[1]
    )
    assert "--top: expected" in cmoe(capsys, "predict", run.id, arrays, "--root", root, "--top", "0", code=2)[1]
    assert "did you mean '0+1'" in cmoe(capsys, "predict", run.id, arrays, "--root", root, "--task", "0-1", code=2)[1]


def test_a_run_that_is_not_finished_answers_and_says_so(run: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder(tmp_path / run.id)
    shutil.copytree(run.path, copy.path)
    copy.update(status="INTERRUPTED")
    assert "is INTERRUPTED: this is its model after 5 experiences" in of_run(copy).notes[0]
    shutil.rmtree(copy.state)
    with pytest.raises(UserError, match="has no trained model yet"):
        of_run(copy)


def test_a_natively_trained_model_is_kept_and_predicts(base: Path) -> None:
    native = make(base, "naive", strategy={"name": "avalanche"}, max_steps=0, label="native")
    check_last_row(native, of_run(native))


def check_last_row(run: RunFolder, restored: Restored) -> None:
    record = Record.load(run.rows)
    raw = opened(run).experiences[0].test.raw()
    pred = record.rows[record.last].columns[0].pred
    assert pred is not None
    assert [a[0][0] for a in restored.classes(raw, None)] == pred.tolist()


def test_an_extended_run_answers_for_its_new_task(tmp_path: Path) -> None:
    run = make(tmp_path, "naive", stream={"name": "split_digits"}, label="longer")
    before = of_run(run)
    extend(run, {"name": "split_digits", "experiences": 2})
    stream, restored = opened(run), of_run(run)
    assert len(restored.stream.experiences) == len(before.stream.experiences) + 2
    assert len(restored.stream.experiences[0].train) == 0
    record = Record.load(run.rows)
    for experience in stream.experiences:
        pred = record.rows[record.last].columns[experience.index].pred
        assert pred is not None
        assert [a[0][0] for a in restored.classes(experience.test.raw(), None)] == pred.tolist()
    # what was written down of the shorter stream would not be believed
    run.update(inputs=inputs.describe(before.stream))
    assert len(of_run(run).stream.experiences) == len(stream.experiences)


TRANSFORMS = [
    transforms.Scale(),
    transforms.Scale(16, [0.1], [0.3]),
    transforms.Flatten(),
    transforms.Rotate([0.0, 33.5, 90.0], 16),
    transforms.Permute(torch.stack([torch.randperm(64), torch.arange(64), torch.randperm(64)])),
    transforms.Augment(2, False),
    transforms.Tokens(),
]
TRANSFORMS.append(Joined([TRANSFORMS[1], TRANSFORMS[0]], [1, 2]))
TRANSFORMS.append(transforms.Chain(TRANSFORMS[4], transforms.Chain(TRANSFORMS[5], TRANSFORMS[1])))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: type(t).__name__)
def test_a_transform_is_the_same_after_json(transform: Any) -> None:
    again = inputs.transform_of(json.loads(json.dumps(inputs.transform_spec(transform))))
    x = torch.randint(0, 17, (9, 1, 8, 8), dtype=torch.uint8)
    whose = torch.arange(9) % 3
    for train in (False, True):
        before, after = (
            t(x.clone(), whose, train=train, generator=torch.Generator().manual_seed(1)) for t in (transform, again)
        )
        assert torch.equal(before, after)
    assert inputs.full_scale(again) == inputs.full_scale(transform)


def test_a_transform_of_anybody_else_is_not_written_down() -> None:
    class Mine(transforms.Scale):
        pass

    assert inputs.transform_spec(Mine()) is None
    assert inputs.transform_spec(transforms.Chain(transforms.Flatten(), Mine())) is None
