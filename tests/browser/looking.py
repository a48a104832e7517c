"""What tests see of a page."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import ConsoleMessage, Locator, Page, Request, expect

DESKTOP = {"width": 1280, "height": 800}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
PATIENCE = 90_000.0  # milliseconds, for whatever a loaded machine does


Look = Callable[..., Page]
"""The fixture `look`: opens a page."""


class Watch:
    """Notes a page's errors and the hosts it asks."""

    def __init__(self, page: Page, url: str) -> None:
        self._host = urlsplit(url).netloc
        self._complaints: list[str] = []
        self.elsewhere: list[str] = []
        self.dialogs: list[str] = []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self._complaints.append(str(error)))
        page.on("request", self._request)
        page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))

    def _console(self, message: ConsoleMessage) -> None:
        # A status of 4xx is the page's to show; the browser writes it down all the same.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self._complaints.append(message.text)

    def _request(self, request: Request) -> None:
        if urlsplit(request.url).netloc not in (self._host, ""):
            self.elsewhere.append(request.url)

    def check(self) -> None:
        assert not self.dialogs, f"something ran: {self.dialogs}"
        assert not self.elsewhere, f"the page asked other hosts: {self.elsewhere}"
        assert not self._complaints, f"the page complained: {self._complaints}"


def ask(page: Page, text: str) -> Locator:
    """Send a question; the place of its answer, which may be empty yet."""
    page.get_by_label("Your question").fill(text)
    before = answers(page).count()
    page.get_by_role("button", name="Send").click()
    answers(page).nth(before).wait_for()
    return answers(page).nth(before)


def answers(page: Page) -> Locator:
    """The answers of the branch in view, in their order, with what can be done with each."""
    return page.locator("li[data-state]:has(article[aria-label='Answer'])")


def questions(page: Page) -> Locator:
    return page.locator("li[data-state]:has(article[aria-label='You'])")


def wait_done(page: Page, state: str = "done") -> None:
    """Until no answer is being written and the last one is in `state`."""
    page.locator(f"li[data-state='{state}']:has(article[aria-label='Answer'])").last.wait_for()
    expect(page.locator("li[data-state='writing']")).to_have_count(0, timeout=PATIENCE)


def prose(answer: Locator) -> str:
    """An answer's text as it is seen."""
    return answer.locator(".prose").inner_text() if answer.locator(".prose").count() else ""


def wait_longer(page: Page, answer: Locator, than: str) -> None:
    """Until an answer has grown well beyond what it was. Polled from here: the page's policy lets no string be run in it."""
    deadline = time.monotonic() + PATIENCE / 1000
    while len(prose(answer)) <= len(than) + 20:
        assert time.monotonic() < deadline, "the answer did not go on"
        page.wait_for_timeout(50)


def set_manner(page: Page, **settings: str) -> None:
    """Change settings of the conversation by their labels (`_` for a space)."""
    page.locator("header .chip").click()
    for label, value in settings.items():
        field = page.get_by_role("dialog").get_by_label(label.replace("_", " "), exact=False).first
        field.fill(value)
        field.press("Tab")
    page.get_by_role("button", name="Close").click()


def violations(page: Page) -> str:
    """What axe has against the page as it is now; empty when nothing."""
    found = Axe().run(page)
    return "" if found.violations_count == 0 else found.generate_report()
