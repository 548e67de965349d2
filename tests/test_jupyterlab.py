"""The live tutorial in a real JupyterLab, driven through a real browser.

Needs Debian's chromium (`apt install chromium`) and Playwright; screenshots are kept under outputs/screenshots.
Run alone: `pytest tests/test_jupyterlab.py`, about two minutes.
"""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = Path(os.environ.get("CRAFT_LIVE_NOTEBOOK", ROOT/"nbs/tutorials/live_training.ipynb"))
SHOTS = ROOT/"outputs/screenshots"
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--no-first-run", "--disable-sync"]
DASH = ".jp-OutputArea .craft"
BOX = ".jp-OutputArea .widget-vbox"   # stays while its content is replaced four times a second


PATIENCE = 4   # times what a quiet machine needs at most: a loaded one is slow, not wrong


def until(true, what, seconds=60.0, every=0.1):
    "Poll until `true()` is truthy and return it; fail saying what was awaited."
    end = time.monotonic() + PATIENCE*seconds
    while time.monotonic() < end:
        if found := true(): return found
        time.sleep(every)
    pytest.fail(f"waited {PATIENCE*seconds:.0f} s for {what}")


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab on a free loopback port that sees a copy of the notebook; its settings are its own."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    work, settings = tmp_path/"work", tmp_path/"settings"
    work.mkdir()
    source = NOTEBOOK.read_text()
    assert "steps = 80" in source, "the tutorial's run is made longer by replacing `steps = 80`, which is not there"
    (work/NOTEBOOK.name).write_text(source.replace("steps = 80", "steps = 4000"))
    quiet = settings/"@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    env = os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(settings),
                        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path/"workspaces"), "PYTHONPATH": str(ROOT),
                        "JUPYTER_CONFIG_DIR": str(tmp_path/"config"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = open(tmp_path/"lab.log", "w")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={work}", "--ip=127.0.0.1", f"--port={port}",
         "--ServerApp.port_retries=0", "--no-browser", "--IdentityProvider.token=", "--ServerApp.allow_root=True",
         "--LabApp.expose_app_in_browser=True", "--ServerApp.disable_check_xsrf=True"], env=env, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        def up():
            assert server.poll() is None, (tmp_path/"lab.log").read_text()[-3000:]
            try: return urllib.request.urlopen(url + "/api/status", timeout=2).status == 200
            except OSError: return False
        until(up, "JupyterLab to start", 90)
        yield url, work
    finally:
        try:
            for k in (json.load(urllib.request.urlopen(url + "/api/kernels", timeout=PATIENCE*5))
                      if server.poll() is None else ()):
                urllib.request.urlopen(urllib.request.Request(f"{url}/api/kernels/{k['id']}", method="DELETE"),
                                       timeout=PATIENCE*20)
        finally:
            server.terminate()
            try: server.wait(PATIENCE*20)
            except subprocess.TimeoutExpired: server.kill(), server.wait()
            log.close()


@pytest.fixture
def page():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.fail("no chromium found on the PATH: install it (apt install chromium), or deselect this file")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        page.set_default_timeout(PATIENCE*30_000)
        page.strangers = []
        local = re.compile(r"^(https?|wss?)://127\.0\.0\.1[:/]|^(data|blob|about):")
        page.on("request", lambda r: local.match(r.url) or page.strangers.append(r.url))
        page.on("websocket", lambda w: local.match(w.url) or page.strangers.append(w.url))
        yield page
        with suppress(sync_api.Error): shoot(page, "last")   # where a failed test stood
        browser.close()


def command(page, name, **args): page.evaluate("([n, a]) => { window.jupyterapp.commands.execute(n, a) }", [name, args])
def step(page): return int(page.locator(f"{DASH} .row b").first.inner_text())
def state(page): return page.locator(f"{DASH} .state").first.inner_text().split()[-1]
def press(page, name): page.locator(".jp-OutputArea button", has_text=name).first.click()


def curve(page, name):
    "How many points a curve has on the screen."
    d = (page.locator(f"{DASH} path.{name}").first.get_attribute("d") if page.locator(f"{DASH} path.{name}").count()
         else "")
    return len(re.findall("[MLV]", d))


def open_notebook(page, url, name):
    page.goto(f"{url}/lab/tree/{name}")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=PATIENCE*60_000)
    until(lambda: page.evaluate("window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status")
          == "idle", "an idle kernel")


def scroll_to(page, mime, selector, seconds):
    "JupyterLab renders only the cells in view: go to the one with an output of this type and wait for what it shows."
    go = """(mime) => { const nb = window.jupyterapp.shell.currentWidget.content;
        const i = nb.widgets.findIndex(c => JSON.stringify(c.model.sharedModel.outputs ?? []).includes(mime));
        if (i >= 0) nb.scrollToItem(i, "center"); return i >= 0 }"""
    until(lambda: page.evaluate(go, mime) and page.locator(selector).count(),
          f"an output of type {mime} to come into view", seconds, every=1)


def scroll_to_dashboard(page, seconds):
    scroll_to(page, "widget-view", f"{DASH} .state", seconds)
    page.locator(BOX).first.scroll_into_view_if_needed()


def shoot(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    if page.locator(BOX).count(): page.locator(BOX).first.scroll_into_view_if_needed()
    page.screenshot(path=SHOTS/f"{name}.png")


@pytest.mark.timeout(1500, method="thread")   # a signal cannot end what waits inside the browser's own event loop
def test_tutorial_live(lab, page):
    url, work = lab
    open_notebook(page, url, NOTEBOOK.name)
    scroll_to(page, "image/png", ".jp-RenderedImage img", 30)   # as it was saved: the picture, no kernel that knows it
    assert page.locator(".jp-OutputArea .craft").count() == 0
    shoot(page, "saved")
    command(page, "notebook:run-all-cells")
    scroll_to_dashboard(page, 240)
    log = until(lambda: next(iter(work.rglob("metrics.jsonl")), None), "metrics.jsonl")

    # curves grow while a later cell runs
    first = until(lambda: min(curve(page, n) for n in ("lambda", "violation", "cosine")) > 1
                  and [curve(page, n) for n in ("lambda", "violation", "cosine")], "three curves")
    until(lambda: all(curve(page, n) > k for n, k in zip(("lambda", "violation", "cosine"), first)),
          "the curves to grow")
    assert (page.locator(".jp-InputPrompt", has_text="[*]").count()
            > 0), "no later cell was running while the curves grew"
    page.wait_for_timeout(3000)
    shoot(page, "live_light")

    # Pause holds the steps, Step takes one, Resume goes on
    press(page, "Pause")
    until(lambda: state(page) == "paused", "the state paused", 10)
    until(lambda: step(page) == (page.wait_for_timeout(1000), step(page))[1], "the step under way to end", 20)
    held = step(page)
    page.wait_for_timeout(1500)
    assert step(page) == held, "steps went on while paused"
    press(page, "Step")
    until(lambda: step(page) == held + 1, "one single step", 20)
    press(page, "Resume")
    until(lambda: step(page) > held + 3, "steps after Resume", 20)

    # a tighter budget: a mark, a control row in the log, and λ climbs faster than it did
    handle = page.locator(f".jp-OutputArea .noUi-handle").first
    handle.focus()
    for _ in range(8): page.keyboard.press("ArrowLeft")
    until(lambda: page.locator(f"{DASH} .mark").count() > 0, "the mark of the change", 20)
    at = step(page)
    until(lambda: step(page) > at + 15, "steps under the new budget", 40)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    # eight keys may reach the run one by one
    changes = [r for r in rows if r.get("event") == "control" and r["name"] == "epsilon_scale"]
    assert changes[-1]["new"] < 1
    eps = {r["step"]: r["epsilon"] for r in rows if "event" not in r}
    lam = {r["step"]: r["lambda"] for r in rows if "event" not in r}
    s, n = changes[0]["step"], max(lam)
    assert eps[n] < .8*eps[max(1, s - 1)]
    assert ((lam[n] - lam[s])/(n - s)
            > (lam[s] - lam[max(1, s - 15)])/min(15, s - 1)), "λ did not answer the tighter budget"

    # dark, and half as wide
    command(page, "apputils:change-theme", theme="JupyterLab Dark")
    page.wait_for_timeout(1500)
    box = page.locator(BOX).first.bounding_box()
    page.mouse.move(box["x"] + .3*box["width"], box["y"] + .7*box["height"])
    page.wait_for_timeout(600)
    assert "violation" in page.locator(f"{DASH} .over > i:hover > b").first.inner_text()
    shoot(page, "live_dark_hover")
    page.set_viewport_size(dict(width=720, height=1000))
    page.wait_for_timeout(800)
    shoot(page, "live_dark_half")
    page.set_viewport_size(dict(width=1280, height=1000))
    command(page, "apputils:change-theme", theme="JupyterLab Light")

    # a reload in the middle: still to be seen, still to be stopped
    command(page, "docmanager:save")
    page.wait_for_timeout(1500)
    before = step(page)
    page.reload()
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=PATIENCE*60_000)
    until(lambda: page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status")
          == "idle", "the kernel's answer")
    scroll_to_dashboard(page, 60)
    until(lambda: step(page) > before, "the dashboard to go on after the reload", 30)
    shoot(page, "after_reload")
    press(page, "Stop")
    until(lambda: state(page) == "stopped", "the run to stop", 30)
    end = until(lambda: [r for r in map(json.loads, log.read_text().splitlines()) if r.get("event") == "end"],
                "the end row")
    assert end[-1]["reason"] == "stopped"
    until((log.parent/"metrics.png").exists, "the picture beside the log", 30)
    shoot(page, "stopped")

    assert page.strangers == []
