"""The page in Chromium, timed: from nothing to its first paint, and from a click on Send to the first words of the answer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

_PATIENCE = 60_000.0  # milliseconds
_TYPING = 1000.0  # milliseconds
_PAINTED = "() => performance.getEntriesByName('first-contentful-paint').map(entry => entry.startTime)[0] ?? 0"
_FIRST_WORDS = """() => new Promise(resolve => {
  const began = performance.now()
  const look = new MutationObserver(() => {
    if (!document.querySelector("article[aria-label='Answer'] .prose")?.textContent.trim()) return
    look.disconnect()
    resolve(performance.now() - began)
  })
  look.observe(document.body, {subtree: true, childList: true, characterData: true})
  document.querySelector("button[aria-label='Send']").click()
})"""


class Page:
    """A gateway's page; every figure is taken in a browser context of its own, with nothing cached."""

    def __init__(self, browser: Browser, url: str) -> None:
        self._browser, self._url = browser, url

    def first_paint(self) -> float:
        """Seconds from the navigation to the first contentful paint."""
        context = self._browser.new_context()
        try:
            page = context.new_page()
            page.goto(self._url)
            page.get_by_label("Your question").wait_for(timeout=_PATIENCE)
            return float(page.evaluate(_PAINTED)) / 1000
        finally:
            context.close()

    def first_words(self, question: str) -> float:
        """Seconds from a click on Send to the answer's first words on the page; the answer is stopped then.

        The click comes a second after the page has loaded, as nobody types faster: what a page that loads takes is the first paint's.
        """
        context = self._browser.new_context()
        try:
            page = context.new_page()
            page.goto(self._url)
            page.get_by_label("Your question").fill(question, timeout=_PATIENCE)
            page.wait_for_load_state("networkidle", timeout=_PATIENCE)
            page.wait_for_timeout(_TYPING)
            seconds = float(page.evaluate(_FIRST_WORDS)) / 1000
            page.keyboard.press("Escape")
            page.locator("li[data-state='stopped'], li[data-state='done']:has(article[aria-label='Answer'])").last.wait_for(
                timeout=_PATIENCE
            )
            return seconds
        finally:
            context.close()


@contextmanager
def page_of(url: str) -> Iterator[Page]:
    """Raises `SystemExit` where there is no Chromium."""
    found = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
    if found is None:
        raise SystemExit("there is no Chromium: apt-get install chromium, or leave the page out with --no-page")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        try:
            yield Page(browser, url)
        finally:
            browser.close()
