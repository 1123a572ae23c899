"""The MLflow UI in a real browser: the link of `cmoe ui` shows the experiment's runs, grouped charts and heat maps.

Drives headless Chromium over the DevTools protocol. Skips only where Chromium is not installed.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import cmoe
from cmoe.tracking import store, ui

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
STRATEGIES = {
    "naive": {"strategy": "naive"},
    "replay": {"strategy": {"name": "replay", "size": 50}},
    "expand": {"strategy": "expand", "model": {"moe": {"experts": 1, "router": "task_table"}}},
}
SEEDS = (0, 1)
PATIENCE = 90.0  # seconds for anything to appear: the machine may be busy


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment with three strategies and two seeds."""
    folder = tmp_path_factory.mktemp("ui")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for variant in STRATEGIES.values():
            for seed in SEEDS:
                cmoe.run(
                    {
                        "experiment": "browser",
                        "seed": seed,
                        "stream": {"name": "split_digits", "scenario": "task", "experiences": 2},
                        "optimizer": {"name": "adam", "lr": 0.01},
                        "trainer": {"max_steps": 8, "batch_size": 16, "log_every": 4},
                        "tracking": {"root": str(folder / "mlruns")},
                        **variant,
                        "model": {"name": "mlp", "hidden": [32], **variant.get("model", {})},
                    }
                )
    return folder / "mlruns"


@pytest.fixture
def link(root: Path) -> Iterator[str]:
    """The link that `cmoe ui` prints; Ctrl-C ends it with exit code 0."""
    command = [
        sys.executable,
        "-m",
        "cmoe.cli.main",
        "ui",
        "browser",
        "--no-browser",
        "--root",
        str(root),
        "--port",
        "21000",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # the signal that ends a hanging start also ends the reading below
    watchdog = threading.Timer(PATIENCE, process.terminate)
    watchdog.start()
    assert process.stdout is not None
    line = process.stdout.readline()
    watchdog.cancel()
    try:
        assert line.startswith("browser: http://127.0.0.1:"), process.communicate(timeout=30)[1]
        yield line.split()[1]
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert err.splitlines()[-1] == "cmoe: MLflow stopped"


class Page:
    """One tab, spoken to over the DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, pictures: Path) -> None:
        self.socket, self.pictures, self.number = socket, pictures, 0

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's result; events in between are dropped."""
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            answer = await self.socket.receive_json(timeout=PATIENCE)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str, what: str) -> Any:
        """Wait until the expression is true; returns its value."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            value = await self.evaluate(expression)
            if value:
                return value
            await asyncio.sleep(0.1)
        await self.shoot("timeout")
        text = await self.evaluate("document.body.innerText")
        pytest.fail(f"{what} did not appear; {self.pictures}/timeout.png; the page says: {text[:1500]}")

    async def open(self, address: str) -> None:
        """Go to an address. Only the part behind '#' may differ, which alone would load nothing anew."""
        await self.call("Page.navigate", url="about:blank")
        await self.call("Page.navigate", url=address)

    async def shoot(self, name: str) -> None:
        """Save a screenshot."""
        data = await self.call("Page.captureScreenshot", format="png")
        (self.pictures / f"{name}.png").write_bytes(base64.b64decode(data["data"]))


@asynccontextmanager
async def browser(pictures: Path) -> AsyncIterator[Page]:
    """A headless Chromium with a profile of its own."""
    assert CHROMIUM is not None
    profile = pictures / "profile"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--no-proxy-server", "--hide-scrollbars"]
    process = subprocess.Popen(
        [CHROMIUM, *flags, "--window-size=1600,1100", "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        port_file, end = profile / "DevToolsActivePort", time.monotonic() + PATIENCE
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert process.poll() is None, "chromium ended by itself"
            assert time.monotonic() < end, "chromium opened no debugging port"
            await asyncio.sleep(0.05)
        port = port_file.read_text().splitlines()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = [t for t in json.loads(await answer.text()) if t["type"] == "page"]
            async with session.ws_connect(tabs[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket, pictures)
                await page.call("Page.enable")
                yield page
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def heat_map(root: Path, base: str) -> str:
    """The address of the heat map of one run."""
    location = store.locate(root)
    client = store.client(location)
    experiment = client.get_experiment_by_name("browser")
    assert experiment is not None
    run = client.search_runs([experiment.experiment_id], "params.strategy = 'expand'")[0]
    return ui.artifact_link(base, experiment.experiment_id, run.info.run_id, "figures/matrix_task_il.png")


# what is drawn, not what is in memory
DRAWN = "document.querySelectorAll('.js-plotly-plot .scatterlayer .trace path.js-line').length"
PICTURE = (
    "[...document.querySelectorAll('img')].filter(i => i.complete && i.naturalWidth > 300).map(i => i.naturalWidth)"
)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_the_ui_shows_runs_charts_and_heat_maps(root: Path, link: str, tmp_path: Path) -> None:
    asyncio.run(look(root, link, tmp_path))


async def look(root: Path, link: str, pictures: Path) -> None:
    """All that must be seen."""
    names = [p.name for p in (root / "runs").iterdir()]
    assert len(names) == len(STRATEGIES) * len(SEEDS)
    async with browser(pictures) as page:
        await page.open(link)
        await page.until(f"{DRAWN} >= {len(STRATEGIES)} && {DRAWN}", "a line for each strategy")
        for word in [*names, *(f"Group: {strategy}" for strategy in STRATEGIES), "Group by: strategy", "Comparison"]:
            await page.until(f"document.body.innerText.includes({word!r})", repr(word))
        for strategy in STRATEGIES:
            line = f"{strategy} (task_il/acc_macro)"
            await page.until(f"document.body.innerText.includes({line!r})", f"the line {line!r}")
        await page.shoot("charts")
        await page.open(heat_map(root, link.partition("/#")[0]))
        await page.until(f"({PICTURE}).length && {PICTURE}", "the heat map")
        await page.shoot("heatmap")
