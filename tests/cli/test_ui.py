"""`cmoe ui` without MLflow itself: names, ports, what fails, and that nothing stays behind (see also test_ui_browser)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from cmoe.cli import main, ui
from cmoe.errors import UserError
from cmoe.tracking import ui as tracking_ui


def write_run(root: Path, experiment: str, label: str, strategy: str, created: str = "2026-01-01") -> None:
    folder = root / "runs" / f"{experiment}-{label}"
    folder.mkdir(parents=True)
    facts = {"run_id": folder.name, "experiment": experiment, "label": label, "strategy": strategy, "created": created}
    (folder / "run.json").write_text(json.dumps(facts))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_run(tmp_path, "digits", "naive", "naive", "2026-01-01")
    write_run(tmp_path, "digits", "replay", "replay", "2026-01-02")
    write_run(tmp_path, "sizes", "er-200", "replay", "2026-01-04")
    write_run(tmp_path, "text", "naive", "naive", "2026-01-03")
    return tmp_path


def test_the_newest_experiment_and_how_it_is_grouped(root: Path) -> None:
    assert ui._experiment(root, None) == ("sizes", ["text", "digits"], "label")
    assert ui._experiment(root, "digits") == ("digits", ["sizes", "text"], "strategy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit"], "expected an experiment (sizes, text, digits), got 'digit' (did you mean 'digits'?)"),
        (["--port", "0"], "--port: expected an integer in [1, 65535], got 0"),
        (["--port", "x"], "invalid int value: 'x'"),
        (["digits"], "mlflow.db: not there"),
        (["--no-browse"], "did you mean '--no-browser'"),
    ],
)
def test_wrong_input(root: Path, arguments: list[str], message: str, capsys: Any) -> None:
    assert main.main(["ui", "--root", str(root), *arguments]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert message in err


def test_no_runs(tmp_path: Path, capsys: Any) -> None:
    assert main.main(["ui", "--root", str(tmp_path)]) == 2
    assert "no runs in" in capsys.readouterr().err


def test_a_taken_port_gives_the_next_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < ui.free_port(port) < port + ui.PORTS
    with pytest.raises(UserError, match="expected a free port"):
        ui.free_port(65536)


def test_a_server_elsewhere_has_its_own_ui(root: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main.main(["ui", "--root", str(root)]) == 1
    assert "http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err
    monkeypatch.setattr(ui, "_link", lambda location, base, name, group: f"{base}/#/{name}/{group}")
    assert main.main(["ui", "--root", str(root), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"experiment": "sizes", "link": "http://127.0.0.1:9/#/sizes/label"}


def test_mlflow_that_does_not_start_is_one_line(root: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "mlflow.db").touch()
    monkeypatch.setattr(ui, "_link", lambda *_: "link")
    monkeypatch.setattr(
        tracking_ui, "command", lambda *_: ([sys.executable, "-c", "import sys; sys.exit('line\\nno such thing')"], {})
    )
    assert main.main(["ui", "--root", str(root), "--no-browser"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "cmoe: MLflow did not start (no such thing)"


STAND_IN = """
import http.server, os, subprocess, sys
class Always(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *a): pass
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[2], "w").write(f"{os.getpid()} {child.pid}")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Always).serve_forever()
"""

PROGRAM = """
import sys
from cmoe.cli import main, ui
from cmoe.tracking import ui as tracking_ui
ui._link = lambda *_: "the link"
tracking_ui.command = lambda root, port: ([sys.executable, "-c", {stand_in!r}, str(port), {pids!r}], None)
sys.exit(main.main(["ui", "digits", "--root", {root!r}, "--no-browser", "--port", {port!r}]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_is_a_normal_end_and_leaves_nothing(root: Path, tmp_path: Path, number: int) -> None:
    (root / "mlflow.db").touch()
    pids = tmp_path / "pids"
    text = PROGRAM.format(
        stand_in=textwrap.dedent(STAND_IN), pids=str(pids), root=str(root), port=str(ui.free_port(20000))
    )
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "digits: the link\n"
    assert process.stdout.readline() == "other experiments: sizes, text\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out == ""
    assert err.splitlines()[-1] == "cmoe: MLflow stopped"
    assert "Traceback" not in err
    for pid in map(int, pids.read_text().split()):
        assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether a process still runs; one that waits to be collected does not."""
    try:
        os.kill(pid, 0)
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
