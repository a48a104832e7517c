"""The page for everybody: axe in both themes and at both widths, the keyboard alone, and the login where keys are needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import expect

from corolla.gateway.database import Database
from corolla.gateway.keys import Keys
from corolla.gateway.middleware import AccessConfig
from corolla.gateway.service import GatewayConfig
from tests.browser.looking import DESKTOP, PHONE, Look, answers, ask, questions, violations, wait_done
from tests.gateway.running import Running, TinySwarm, running

MARKDOWN = (
    "# Title\n\nText with `code` and a [link](https://example.org).\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
    "```python\nreturn 1  # one\n```\n\n- [x] done\n\n> said\n"
)


@pytest.fixture(scope="module")
def conversation(tiny_gateway: Running) -> str:
    with tiny_gateway.client() as client:
        made = client.post("/api/ui/conversations", json={"title": "Everything that markdown has"}).json()
        exported = client.get(f"/api/ui/conversations/{made['id']}/export").json()
        common = {"created": "2026-01-01T00:00:00Z", "stats": None}
        messages = [
            {
                "id": "q",
                "parent": None,
                "role": "user",
                "text": "hello",
                "state": "done",
                "finish": None,
                "error": None,
                "notices": [],
                **common,
            },
            *(
                {"id": state, "parent": "q", "role": "assistant", "text": MARKDOWN, "state": state, "finish": None, "error": None, **common}
                | {"notices": ["A server was lost; the answer goes on."]}
                for state in ("done", "interrupted")
            ),
        ]
        imported = client.post("/api/ui/conversations/import", json={**exported, "messages": messages, "leaf": "interrupted"})
        assert imported.status_code == 201, imported.text
        return f"/c/{imported.json()['id']}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", [{"viewport": DESKTOP}, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing(tiny_gateway: Running, conversation: str, look: Look, scheme: str, screen: dict[str, object]) -> None:
    page = look(tiny_gateway.url, color_scheme=scheme, **screen)
    page.get_by_role("heading", name="What would you like").wait_for()
    assert violations(page) == ""
    page.goto(tiny_gateway.url + conversation)
    page.locator(".hljs-keyword").wait_for()
    assert violations(page) == ""
    page.locator("header .chip").click()
    page.get_by_role("dialog").wait_for()
    assert violations(page) == ""
    page.goto(tiny_gateway.url + "/playground")
    page.get_by_role("button", name="Complete").click()
    page.locator(".token").first.focus()
    page.get_by_role("group", name="What the model weighed").wait_for()
    assert violations(page) == ""
    page.goto(tiny_gateway.url + "/swarm")
    page.get_by_role("img", name="blocks").wait_for()
    assert violations(page) == ""
    page.goto(tiny_gateway.url + "/tuning")
    page.get_by_role("heading", name="No soft prompt yet").wait_for()
    assert violations(page) == ""


def test_nothing_is_wider_than_a_phone(tiny_gateway: Running, conversation: str, look: Look) -> None:
    page = look(tiny_gateway.url, **PHONE)
    for path in ("/", conversation, "/playground", "/swarm", "/tuning"):
        page.goto(tiny_gateway.url + path)
        page.locator("#main").wait_for()
        page.wait_for_timeout(300)
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 390, path
        assert page.evaluate("[...document.querySelectorAll('#main, #main .scroll, #main .log')].every(n => n.scrollWidth <= 391)"), path


def test_a_chat_by_keyboard_alone(tiny_gateway: Running, look: Look) -> None:
    page = look(tiny_gateway.url)
    page.get_by_label("Your question").wait_for()
    page.keyboard.press("Control+Shift+o")
    page.keyboard.type("hello there")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and hello again")
    page.keyboard.press("Enter")
    wait_done(page)
    assert questions(page).first.locator(".question").inner_text() == "hello there\nand hello again"
    assert page.locator("[aria-live=polite]", has_text="The answer").count() == 1
    page.keyboard.press("ArrowUp")
    page.keyboard.type(" or goodbye")
    page.keyboard.press("Enter")
    page.get_by_text("2 / 2").wait_for()
    wait_done(page)
    page.keyboard.press("Control+k")
    expect(page.get_by_label("Search the conversations")).to_be_focused()
    page.keyboard.type("no such words")
    page.get_by_text("Nothing found.").wait_for()


def test_colours_follow_the_system_until_they_are_chosen(tiny_gateway: Running, look: Look) -> None:
    page = look(tiny_gateway.url, color_scheme="dark")
    colours = page.get_by_role("button", name="Colours")
    colours.wait_for()
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    colours.click()
    assert page.evaluate(paper) != dark
    page.reload()
    colours.wait_for()
    assert page.evaluate(paper) != dark


def test_the_login_stands_before_everything_where_keys_are_needed(tiny_model: Path, tmp_path: Path, look: Look) -> None:
    url = str(tmp_path / "keys.sqlite")
    kept = Database(url)
    key = Keys(kept).create("anna")
    kept.close()
    swarm = TinySwarm(tiny_model)
    try:
        with running(swarm, url, GatewayConfig(access=AccessConfig(open=False), drain=0.5)) as gateway:
            page = look(gateway.url)
            field = page.get_by_label("API key")
            field.fill("corolla-wrong")
            page.get_by_role("button", name="Log in").click()
            page.get_by_role("alert").filter(has_text="key").wait_for()
            assert violations(page) == ""
            field.fill(key if isinstance(key, str) else key.secret)
            page.get_by_role("button", name="Log in").click()
            ask(page, "hello")
            wait_done(page)
            page.reload()
            answers(page).first.wait_for()
            assert page.evaluate("document.cookie") == ""  # no script may read it
            page.get_by_role("button", name="Log out").click()
            field.wait_for()
    finally:
        swarm.close()
