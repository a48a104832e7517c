"""Chromium, as Debian packages it, driven by Playwright.

Every page of a test is watched: what it asks of other hosts and what it complains of fails the test.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

import corolla
from tests.browser.looking import DESKTOP, PATIENCE, Look, Watch
from tests.gateway.running import Running, TinySwarm, make_model, running

STATIC = Path(corolla.__file__).parent / "gateway" / "static" / "index.html"
_LONGEST = 600.0  # seconds for one test, on a loaded machine
_NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")  # not "session": while it lives an event loop runs on this thread, and other packages' tests need their own
def browser() -> Iterator[Browser]:
    found = next((path for path in map(shutil.which, _NAMES) if path), None)
    if found is None and os.environ.get("CI"):
        pytest.fail("CI is set and there is no Chromium: apt-get install chromium")
    if found is None:
        pytest.skip("there is no Chromium on this machine: apt-get install chromium")
    assert STATIC.exists(), "the page is not built: pip install -e . builds it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """Some of what Playwright does has no deadline of its own: a browser that hangs is killed, and the test fails."""
    timer = threading.Timer(_LONGEST, _kill_browsers)
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()


def _kill_browsers() -> None:
    faulthandler.dump_traceback()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.name().startswith(("chrom", "node", "google-chrome")):  # and Playwright's own process
                child.kill()


@pytest.fixture
def look(browser: Browser) -> Iterator[Look]:
    """`look(url, **context)`: a page of a context of its own that shows `url`; a context may be given as `within`."""
    watches: list[Watch] = []
    contexts: list[BrowserContext] = []

    def open_page(url: str, *, within: BrowserContext | None = None, **options: Any) -> Page:
        context = within or browser.new_context(**{"viewport": DESKTOP, **options})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        watches.append(Watch(page, url))
        page.goto(url)
        return page

    try:
        yield open_page
    finally:
        for context in contexts:
            context.close()
    for watch in watches:
        watch.check()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_gateway(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway within this process over a model that answers noise: for what does not depend on answers."""
    swarm = TinySwarm(tiny_model)
    try:
        with running(swarm, tmp_path_factory.mktemp("gateway") / "gateway.sqlite") as gateway:
            yield gateway
    finally:
        swarm.close()
