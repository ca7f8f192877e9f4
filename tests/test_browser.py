"""Lessons and explorers in a real browser: JupyterLab and Voila without a screen, driven through Chromium.

Everything runs on a copy, so that nothing here is changed. Screenshots stay in ``build/browser``. Skipped, with the reason,
where Playwright or a browser is missing; it never downloads one.

Kernels are what takes time: most of it is importing PyTorch. So JupyterLab has one for all notebooks, emptied between
them (that each runs from a fresh one is nbval's to prove), and Voila's three start while JupyterLab works.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from .test_themes import contrast, luminance

ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / "build" / "browser"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-software-rasterizer",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
#: Seconds that a page with its kernel may take; a busy machine starts PyTorch slowly.
PATIENCE_S = 150

#: Less text to work on: controls are tested here, and numbers elsewhere.
SHORTER = {
    "02_progressive_weights": ("length=256)[:12]", "length=256)[:3]"),
    "03_smooth_attention": ("length=256)[:8]", "length=256)[:2]"),
    "explorers/recipe_lab": ("length=256), 4)", "length=64), 2)"),
}
#: What saves a browser without a graphics card half of its work. No spinner turns and nothing fades; and plotly, which every
#: live figure brings along as five megabytes of text, is run once on a page and not once for every figure.
THRIFTY = """const still = new CSSStyleSheet();
still.replaceSync('*, ::before, ::after {animation: none !important; transition: none !important}');
document.adoptedStyleSheets = [still];
const create = URL.createObjectURL, revoke = URL.revokeObjectURL, plotly = {};
const large = (thing) => thing.size > 3e6 && thing.type === 'text/javascript';
URL.createObjectURL = (thing) => large(thing) ? plotly[thing.size] ??= create(thing) : create(thing);
URL.revokeObjectURL = (url) => Object.values(plotly).includes(url) || revoke(url);"""
#: Opens a notebook on the page's one kernel.
OPEN = """async (path) => {
  const app = window.jupyterapp; await app.restored;
  window.kernel ??= await app.serviceManager.kernels.startNew({name: 'python3', path: '/'}, {handleComms: false});
  const panel = await app.commands.execute('docmanager:open', {path, factory: 'Notebook', kernel: {id: window.kernel.id}});
  await panel.context.ready; await panel.sessionContext.ready; await panel.revealed;
}"""
#: Whether the open notebook's widget manager has asked the kernel for widgets that are there already. What it makes of the
#: answer and what cells make meanwhile would get into each other's way, and then a widget is not drawn. Only a renderer
#: knows the manager, and one that was made before it does not hear of it.
READY = """async () => {
  const {rendermime} = window.jupyterapp.shell.currentWidget.content;
  const renderer = rendermime.createRenderer('application/vnd.jupyter.widget-view+json');
  const manager = await Promise.race([renderer._manager.promise, new Promise((resolve) => setTimeout(resolve, 50))]);
  renderer.dispose();
  return Boolean(manager?.restoredStatus);
}"""
#: Runs all of the open notebook, and waits until there is nothing left to do.
RUN_ALL = """async () => {
  await window.jupyterapp.commands.execute('notebook:run-all-cells');
  await window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestKernelInfo();
}"""
#: Whether every cell of it has run: asked often, so no output is looked at, which would be copied.
DONE = """() => window.jupyterapp.shell.currentWidget.content.widgets
  .every((cell) => cell.model.type !== 'code' || cell.model.executionCount)"""
#: What the cells of the open notebook came to: [[execution count, tags, name of an error or null], ...].
CELLS = """() => window.jupyterapp.shell.currentWidget.content.widgets
  .filter((cell) => cell.model.type === 'code')
  .map((cell) => [cell.model.executionCount, cell.model.getMetadata('tags') ?? [],
    cell.model.sharedModel.getOutputs().filter((o) => o.output_type === 'error').map((o) => o.ename)[0] ?? null])"""
CLOSE = """async () => {
  if (window.kernel.status === 'busy') await window.kernel.interrupt();
  window.jupyterapp.shell.currentWidget.dispose();
  const code = 'import ipywidgets; ipywidgets.Widget.close_all()\\n%reset -f';
  await window.kernel.requestExecute({code, silent: true}).done;
}"""


def missing() -> str:
    """Why there is no test here, or an empty text."""
    for name in ("playwright", "jupyterlab", "voila"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    return "" if browser() else f"no browser among {', '.join(BROWSERS)}; on Debian: apt-get install chromium"


def browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(missing()), reason=missing() or "all there"),
    pytest.mark.flaky(reruns=1, only_rerun=["TimeoutError", "nothing happened"]),  # what was waited for, not what was seen
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server in a process group of its own, started at once; `address` waits until it answers."""

    def __init__(self, command: list[str], url: str, log: Path) -> None:
        self.url, self.log = url, log
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def address(self) -> str:
        """Where it is, once it is there; AssertionError with the end of its log if it does not come."""
        end = time.monotonic() + 90
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(self.url, timeout=5):
                    return self.url
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"no answer from {self.url}:\n{self.log.read_text(errors='replace')[-2000:]}")

    def ask(self) -> None:
        """Ask it to end, and the kernels that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)

    def wait(self) -> None:
        """Wait for the end; force it if it does not come."""
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(15)


@pytest.fixture(scope="module")
def servers():
    """What was started here. All are asked to end at once, since it takes each of them seconds."""
    started: list[Server] = []
    yield started
    for server in started:
        server.ask()
    for server in started:
        server.wait()


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The notebooks without their outputs, so that what is there was made here, and the data, in a folder of their own."""
    folder = tmp_path_factory.mktemp("course")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*", "__pycache__"))
    (folder / "data").symlink_to(ROOT / "data", target_is_directory=True)
    for path in (folder / "notebooks").rglob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, path)
    for name, (long, short) in SHORTER.items():
        path = folder / "notebooks" / f"{name}.ipynb"
        text = path.read_text(encoding="utf-8")
        assert long in text, name
        path.write_text(text.replace(long, short), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        program = play.chromium.launch(executable_path=browser(), args=FLAGS)
        yield program
        program.close()


@pytest.fixture(scope="module")
def lab(copy, servers):
    """JupyterLab on the copy: all cells drawn, no news, application object exposed to the page."""
    settings = copy / "settings"
    for plugin, values in {
        "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    }.items():
        path = settings / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    port, token = free_port(), secrets.token_hex(8)
    command = [sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={copy / 'notebooks'}"]
    command += [f"--LabApp.user_settings_dir={settings}", "--LabApp.expose_app_in_browser=True"]
    command += [f"--LabApp.workspaces_dir={copy / 'workspaces'}", "--ServerApp.port_retries=0"]
    server = Server(command, f"http://127.0.0.1:{port}/lab?token={token}&reset", copy / "lab.log")
    servers.append(server)
    return server


class Watched:
    """A page that remembers what it fetched from elsewhere and what it complained about."""

    def __init__(self, program, width: int = 1280) -> None:
        self.page = program.new_page(viewport={"width": width, "height": 1000})
        self.page.set_default_timeout(1000 * PATIENCE_S)
        self.page.add_init_script(THRIFTY)
        self.elsewhere: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", self._note)
        self.page.on("console", self._hear)

    def _note(self, request) -> None:
        if not request.url.startswith(("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:")):
            self.elsewhere.append(request.url)

    def _hear(self, message) -> None:
        if message.type in ("error", "warning") and "Unsatisfied version" not in message.text:
            self.complaints.append(f"{message.type}: {message.text[:300]}")

    def show(self) -> None:
        """For whoever reads about a failure: a picture, what the page complained about, and what its widgets show."""
        self.page.screenshot(path=SHOTS / "failed.png")
        print(*self.complaints[-20:], sep="\n")
        for number, output in enumerate(self.page.locator(".jp-OutputArea-output:has(.jupyter-widgets)").all()):
            print(f"widget {number}: {output.inner_text()[:300]!r}")


@pytest.fixture(scope="module")
def voila(copy, servers):
    """Voila on the explorers."""
    port = free_port()
    command = [sys.executable, "-m", "voila", "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"]
    server = Server([*command, str(copy / "notebooks" / "explorers")], f"http://127.0.0.1:{port}/", copy / "voila.log")
    servers.append(server)
    return server


@pytest.fixture(scope="module")
def boards(chromium, voila):
    """Explorer -> its page. All are opened at once, and their kernels get to work."""
    opened = {name: Watched(chromium) for name, *_ in EXPLORERS}
    for name, watched in opened.items():
        watched.page.goto(f"{voila.address()}voila/render/{name}.ipynb", wait_until="commit")
    return opened


@pytest.fixture(scope="module")
def desk(chromium, lab, boards):
    """JupyterLab's page. Asks for ``boards`` only to have them start meanwhile."""
    watched = Watched(chromium)
    watched.page.goto(lab.address())
    watched.page.wait_for_function("() => window.jupyterapp")
    return watched


def settle(page, ready) -> None:
    """Wait until ``ready()``: the page is polled, since some answers come from a model and not from the document."""
    end = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < end, "nothing happened"
        page.wait_for_timeout(200)


@contextlib.contextmanager
def run_all(desk, path: str) -> Iterator[None]:
    """Run a notebook; every cell has run, and only exercises failed. It is closed afterwards, whatever happened to it."""
    page = desk.page
    try:
        page.evaluate(OPEN, path)
        settle(page, lambda: page.evaluate(READY))
        page.evaluate(RUN_ALL)
        settle(page, lambda: page.evaluate(DONE))
        for count, tags, error in page.evaluate(CELLS):
            assert (error == "NotImplementedError") == ("exercise" in tags), f"cell {count}: {error}"
            assert error in (None, "NotImplementedError"), f"cell {count}: {error}"
        yield
    except BaseException:
        desk.show()
        raise
    finally:
        page.evaluate(CLOSE)


def press(page, element, key: str) -> None:
    """Press a key on an element, and again if it did not arrive: an application that has finished with something may put the
    focus elsewhere between the focus and the key."""
    listen = "(element) => element.addEventListener('keydown', () => { element.dataset.heard = 'yes'; }, {capture: true})"
    element.evaluate(listen)

    def heard() -> bool:
        element.press(key)
        return element.get_attribute("data-heard") == "yes"

    settle(page, heard)
    element.evaluate("(element) => { delete element.dataset.heard; }")


def at_rest(page, read) -> str:
    """What ``read()`` gives once it has not changed for a second: what a cell moved may still be on its way to a figure."""
    seen = [read()]

    def calm() -> bool:
        seen.append(read())
        return len(seen) > 5 and len(set(seen[-5:])) == 1

    settle(page, calm)
    return seen[-1]


def title(scope) -> str:
    return scope.locator(".gtitle").first.text_content()


def control(scope, label: str):
    """The control with a label."""
    return scope.locator(".widget-inline-hbox, .widget-checkbox").filter(has_text=label).first


def move(scope, label: str, value) -> None:
    """Set a control as a person does: type into a slider's number, choose from a list, tick a box, press arrow keys."""
    here = control(scope, label)
    if isinstance(value, bool):
        here.locator("input[type=checkbox]").set_checked(value)
    elif isinstance(value, str) and value.startswith("Arrow"):
        press(scope.page, here.locator(".noUi-handle"), value)
    elif isinstance(value, str):
        here.locator("select").select_option(value)
    else:
        number = here.locator(".widget-readout")
        number.click()
        number.fill(str(value))
        number.press("Enter")


#: Lesson, what to move, and what the figure's title says afterwards.
LESSONS = [
    ("02_progressive_weights", [], ""),
    ("03_smooth_attention", [], ""),
    ("08_why_w4a8kv4", [("gpu", "L40S"), ("batch", "ArrowRight")], "on L40S: 128 users"),
    ("10_kv4_kernel", [("nibble", "second"), ("code", 11)], "Code 11 in the second nibble: +3"),
]


@pytest.mark.parametrize(("name", "moves", "wanted"), LESSONS, ids=[name for name, *_ in LESSONS])
def test_a_lesson_runs_and_its_controls_move_the_figure(desk, name, moves, wanted):
    page = desk.page
    with run_all(desk, f"{name}.ipynb"):
        panel = page.locator(".jupyter-widgets.widget-vbox").filter(has=page.locator(".js-plotly-plot")).first
        panel.locator(".gtitle").first.wait_for()
        before = at_rest(page, lambda: title(panel))
        if not moves:  # any control will do: one step with the keyboard
            press(page, panel.locator(".noUi-handle").first, "ArrowRight")
        for label, value in moves:
            move(panel, label, value)
        settle(page, lambda: title(panel) != before and wanted in title(panel))
        panel.scroll_into_view_if_needed()
        page.screenshot(path=SHOTS / f"{name}.png")
        inside = page.locator(".js-plotly-plot[role=slider]").first  # a figure with a slider of its own
        stood, shown = int(inside.get_attribute("aria-valuenow")), at_rest(page, lambda: title(inside))
        press(page, inside, "ArrowLeft" if stood else "ArrowRight")
        settle(page, lambda: title(inside) != shown)
        assert abs(int(inside.get_attribute("aria-valuenow")) - stood) == 1


#: Explorer, what to move in turn, and what its figure's title says afterwards.
EXPLORERS = [
    (
        "quantiser_playground",
        [("tensor", "q_proj"), ("bits", 3), ("zero", True), ("shared", "group of 64")],
        "q_proj, layer 2, planted model: UINT3, one scale per group of 64",
    ),
    ("recipe_lab", [("smooth attention", False)], "planted model, W4A8KV4 g128: layer by layer"),
    ("serving_calculator", [("gpu", "A100"), ("model", "Llama-2-7B"), ("batch", 100)], "Llama-2-7B on one A100: 100 users"),
]
each_explorer = pytest.mark.parametrize(("name", "moves", "wanted"), EXPLORERS, ids=[name for name, *_ in EXPLORERS])


def play(page, moves, wanted: str) -> None:
    """Move the controls of the explorer on a page and wait for figure and table to follow."""
    board = page.locator(".widget-hbox").filter(has=page.locator(".qoqlab-state")).first
    board.locator(".gtitle").first.wait_for()
    table = board.locator(".qoqlab-table")
    before = table.inner_text()
    for label, value in moves:
        move(board, label, value)
    settle(page, lambda: wanted in title(board) and table.inner_text() != before)
    settle(page, lambda: board.locator(".qoqlab-state").inner_text() == "ready")


@each_explorer
def test_an_explorer_answers_in_jupyterlab(desk, name, moves, wanted):
    with run_all(desk, f"explorers/{name}.ipynb"):
        play(desk.page, moves, wanted)
        desk.page.locator(".qoqlab-state").first.scroll_into_view_if_needed()
        desk.page.screenshot(path=SHOTS / f"{name}.png")


def test_jupyterlab_needed_nothing_from_elsewhere(desk):
    assert desk.elsewhere == []


@each_explorer
def test_an_explorer_answers_in_voila(boards, name, moves, wanted):
    watched = boards[name]
    play(watched.page, moves, wanted)
    assert "import qoqlab" not in watched.page.inner_text("body"), "no code on a dashboard"
    for width in (1280, 800):
        watched.page.set_viewport_size({"width": width, "height": 1400})  # high enough for all of a narrow dashboard
        fits = f"() => document.querySelector('.main-svg').getBoundingClientRect().width <= {width}"
        watched.page.wait_for_function(fits)  # it is redrawn in the page's new width
        watched.page.screenshot(path=SHOTS / f"{name}_voila_{width}.png", full_page=True)
    # Voila's own page asks a CDN for an icon font; nothing of ours may
    assert [url for url in watched.elsewhere if "fontawesome" not in url] == []
    watched.page.close()


def colour(locator, name: str) -> str:
    """A colour that the browser computed, as ``#rrggbb``."""
    text = locator.evaluate(f"(element) => getComputedStyle(element).getPropertyValue('{name}')")
    return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", text)[:3])


def test_the_site_draws_figures_and_formulas_without_a_server_by_day_and_by_night(chromium, copy, tmp_path):
    from qoqlab import site

    lesson = "08_why_w4a8kv4"
    (tmp_path / "course").mkdir()
    shutil.copy(ROOT / "notebooks" / f"{lesson}.ipynb", tmp_path / "course")
    site.build(tmp_path / "site", tmp_path / "course")
    page = chromium.new_page(viewport={"width": 1280, "height": 1000}, color_scheme="light")
    elsewhere, complaints = [], []
    page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or elsewhere.append(r.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((tmp_path / "site" / "index.html").as_uri())
    page.get_by_text("08 · Why W4A8KV4").click()
    assert page.locator("math").first.bounding_box()["height"] > 5
    figure = page.locator("figure.plotly").nth(1)  # it has a slider of its own
    figure.scroll_into_view_if_needed()
    before = title(figure)
    figure.locator(".slider-rail-touch-rect").click()  # the middle of the rail
    settle(page, lambda: title(figure) != before)
    by_mouse, slider = title(figure), figure.get_by_role("slider")
    assert by_mouse.startswith(slider.get_attribute("aria-valuetext"))
    press(page, slider, "ArrowLeft")
    settle(page, lambda: title(figure) != by_mouse)
    assert title(figure).startswith(slider.get_attribute("aria-valuetext"))

    papers = {}
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        papers[theme] = colour(page.locator("body"), "background-color")
        for words in ("p", "h2", ".jp-InputArea-editor span"):
            assert contrast(colour(page.locator(words).first, "color"), papers[theme]) >= 4.5, f"{words}, {theme}"
        settle(
            page,
            lambda paper=papers[theme]: contrast(colour(figure.locator(".main-svg").first, "background-color"), paper) < 1.1,
        )
        for words in (".gtitle", ".xtick text", ".xtitle", ".legendtext", ".slider-label"):
            assert contrast(colour(figure.locator(words).first, "fill"), papers[theme]) >= 4.5, f"{words}, {theme}"
        page.screenshot(path=SHOTS / f"site_{theme}.png")
    assert luminance(papers["light"]) > 0.9 and luminance(papers["dark"]) < 0.05
    assert elsewhere == [] and complaints == []
    page.close()
