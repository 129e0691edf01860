"""Every page of the built book in a real browser: errors, foreign requests, sideways scrolling."""

from __future__ import annotations

import functools
import http.server
import re
import shutil
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
SKIPPED = {"genindex", "search", "webpack-macros"}
PAGES = [
    page.relative_to(HTML).as_posix()
    for page in sorted(HTML.rglob("*.html"))
    if page.stem not in SKIPPED and not {"_static", "_sources"} & set(page.parts)
    and page != HTML / "index.html"  # only sends the reader on to the first page
]  # fmt: skip

pytestmark = [
    pytest.mark.skipif(not PAGES, reason="the book is not built (make book)"),
    pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(BROWSERS)}"),
]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    handler = functools.partial(QuietHandler, directory=str(HTML))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    flags = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync",
             "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
             "--use-gl=angle",
             "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]  # fmt: skip
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=BROWSER, args=flags)
        yield chromium
        chromium.close()


VIEWERS = """() => [...document.querySelectorAll('[id^="3dmolviewer"] canvas')].map(canvas => {
  const copy = document.createElement('canvas');
  copy.width = copy.height = 64;
  const context = copy.getContext('2d');
  context.drawImage(canvas, 0, 0, 64, 64);
  const pixels = context.getImageData(0, 0, 64, 64).data;
  return new Set(new Uint32Array(pixels.buffer)).size;
})"""


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_pages(address, browser, scheme, width):
    """Loaded at one width, then also looked at in the other."""
    problems = []
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, is_mobile=width < 600
    )
    context.add_init_script(f"localStorage.setItem('mode', '{scheme}')")
    page = context.new_page()
    name = ""

    def on_request(request):
        if not request.url.startswith((address, "data:", "blob:")):
            problems.append(f"{name}: request to {request.url}")

    def on_console(message):
        if message.type == "error":
            problems.append(f"{name}: console: {message.text}")

    page.on("request", on_request)
    page.on("console", on_console)
    page.on("pageerror", lambda error: problems.append(f"{name}: {error}"))
    for name in PAGES:
        page.goto(f"{address}/{name}", wait_until="load")
        viewers = page.locator('[id^="3dmolviewer"]').count()
        if viewers:
            page.wait_for_function(
                f"document.querySelectorAll('[id^=\"3dmolviewer\"] canvas').length >= {viewers}",
                timeout=30_000,
            )
            page.wait_for_timeout(1500)
            for index, colours in enumerate(page.evaluate(VIEWERS)):
                if colours < 2:
                    problems.append(f"{name}: 3-D view {index} is blank")
        if page.locator("span.math, div.math").count():
            page.wait_for_function("document.querySelector('mjx-container') !== null")
        if page.locator("mjx-merror").count():
            problems.append(f"{name}: a formula is wrong")
        for shown in (width, 1280 + 390 - width):
            page.set_viewport_size({"width": shown, "height": 900})
            wide = page.evaluate("document.documentElement.scrollWidth")
            if wide > shown:
                problems.append(f"{name}: {wide} px wide in a window of {shown} px")
        page.set_viewport_size({"width": width, "height": 900})
    context.close()
    assert not problems, "\n".join(problems)


def test_first_page_is_found():
    text = (HTML / "index.html").read_text()
    assert (HTML / re.search(r"url=([^\s\"]+)", text)[1]).is_file()
