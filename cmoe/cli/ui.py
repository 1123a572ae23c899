"""`cmoe ui`: start MLflow on this machine and open the chart view of an experiment, grouped by strategy."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cmoe.cli.common import DONE, Parser, emit
from cmoe.errors import RunFailed, UserError, nearest

if TYPE_CHECKING:
    from cmoe.tracking.store import Location

HOST = "127.0.0.1"
PORTS = 100  # how many ports are tried, from the one asked for
PATIENCE = 120.0  # seconds for the server to answer


def add_arguments(parser: Parser) -> None:
    parser.add_argument("experiment", metavar="EXPERIMENT", nargs="?", help="its name; default is the newest run's")
    parser.add_argument("--port", metavar="N", type=int, default=5000, help="the first port to try; default is 5000")
    parser.add_argument("--no-browser", action="store_true", help="only print the link")
    parser.add_argument("--root", metavar="DIR", default="mlruns", help="folder of run output; default is mlruns")


def main(args: argparse.Namespace) -> int:
    from cmoe.api import server_of
    from cmoe.rundir import runs
    from cmoe.tracking.store import locate

    if not 1 <= args.port <= 65535:
        raise UserError(f"--port: expected an integer in [1, 65535], got {args.port}")
    root = Path(args.root)
    name, others, group = _experiment(root, args.experiment)
    newest = [r for r in runs(root) if r.facts().get("experiment") == name][-1:]
    location = (server_of(newest[0]) if newest else None) or locate(root)
    if not location.local and location.uri.startswith(("http://", "https://")):
        return _elsewhere(args, location, name, group)
    if location.local and not (root / "mlflow.db").exists():
        raise UserError(f"{root}/mlflow.db: not there, no run was tracked; deliver them with: cmoe sync")
    port = free_port(args.port)
    if port != args.port:
        print(f"cmoe: port {args.port} is taken, using {port}", file=sys.stderr)
    print(f"cmoe: starting MLflow on http://{HOST}:{port} (about ten seconds)", file=sys.stderr, flush=True)
    try:
        with _interruptible(), _server(root, port) as (process, log):
            link = _link(location, f"http://{HOST}:{port}", name, group)  # while the server starts
            _wait(process, log, port)
            _show(args, link, name, others)
            print("Ctrl-C stops it", file=sys.stderr, flush=True)
            code = process.wait()
            raise RunFailed(f"MLflow ended by itself with code {code} ({_last_line(log)})")
    except KeyboardInterrupt:
        print("\ncmoe: MLflow stopped", file=sys.stderr)
        return DONE


def _experiment(root: Path, wanted: str | None) -> tuple[str, list[str], str]:
    """The experiment's name, the others' names, and the parameter to group its runs by.

    Raises:
        UserError: there is no run, or no such experiment.
    """
    from cmoe.rundir import runs

    facts = [run.facts() for run in runs(root)]
    if not facts:
        raise UserError(f"no runs in {root}; start one with: cmoe run quickstart")
    names = list(dict.fromkeys(str(f.get("experiment")) for f in reversed(facts)))  # the newest first
    name = names[0] if wanted is None else wanted
    if name not in names:
        raise UserError(f"{root}: expected an experiment ({', '.join(names[:8])}), got '{name}'{nearest(name, names)}")
    own = [f for f in facts if f.get("experiment") == name]
    by_label = any(f.get("label") != f.get("strategy") for f in own)
    return name, [n for n in names if n != name], "label" if by_label else "strategy"


def _elsewhere(args: argparse.Namespace, location: Location, name: str, group: str) -> int:
    """The runs are on a tracking server, which has a UI of its own."""
    try:
        link = _link(location, location.name, name, group)
    except Exception as error:  # a server and its HTTP client fail in many ways
        raise RunFailed(f"{location.name} cannot be reached ({' '.join(str(error).split())[:200]})") from error
    _show(args, link, name, [])
    return DONE


def _link(location: Location, base: str, name: str, group: str) -> str:
    """Write the experiment's chart view; the address that opens it."""
    from cmoe.tracking import store, ui

    client = store.client(location)
    found = store.experiment(client, location, name)
    saved = ui.save_chart_view(client, found.experiment_id, (group,))
    return ui.experiment_link(base, found.experiment_id, ui.VIEW_KEY if saved else None)


def _show(args: argparse.Namespace, link: str, name: str, others: list[str]) -> None:
    emit(args, {"experiment": name, "link": link})
    print(f"{name}: {link}", flush=True)
    if others:
        print(f"other experiments: {', '.join(others[:8])}{', ...' if len(others) > 8 else ''}", flush=True)
    # without a display the standard library would start a text browser in this terminal
    display = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if display and not args.no_browser:
        import webbrowser

        webbrowser.open(link)


def free_port(first: int) -> int:
    """The first free port of this machine from `first` on.

    Raises:
        UserError: a hundred in a row are taken.
    """
    for port in range(first, min(first + PORTS, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: not hindered by old ones
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise UserError(f"--port: expected a free port, {first} to {min(first + PORTS, 65536) - 1} are taken or forbidden")


@contextmanager
def _interruptible() -> Generator[None]:
    """SIGTERM ends it like Ctrl-C, so that the server never stays behind."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def _server(root: Path, port: int) -> Generator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """MLflow in a process group of its own, so that Ctrl-C reaches it once and through us."""
    from cmoe.tracking.ui import command

    arguments, environment = command(root, port)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            arguments,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process, log
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole group: MLflow starts its web server as a child."""
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    if process.poll() is None:
        process.wait()


def _wait(process: subprocess.Popen[bytes], log: IO[bytes], port: int) -> None:
    """Until the server answers.

    Raises:
        RunFailed: it ended, or took too long.
    """
    from urllib.error import URLError
    from urllib.request import ProxyHandler, build_opener

    opener = build_opener(ProxyHandler({}))  # never through a proxy: it is this machine
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RunFailed(f"MLflow did not start ({_last_line(log)})")
        try:
            with opener.open(f"http://{HOST}:{port}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.1)
    raise RunFailed(f"MLflow did not answer within {PATIENCE:.0f} s ({_last_line(log)})")


def _last_line(log: Any) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it said nothing"
