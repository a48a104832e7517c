"""The page over real processes: a gateway, a swarm of two servers, and the default model."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from corolla.models import catalog
from tests.browser.gateway_process import gateway_process
from tests.browser.looking import PATIENCE, PHONE, Look, answers, ask, prose, questions, set_manner, wait_done, wait_longer
from tests.swarm.harness import Swarm, free_port

MODEL = "smollm2"
LONG = "Tell me a long story about a lighthouse keeper, in many paragraphs."


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    with Swarm(Path(catalog.resolve(MODEL)), tmp_path_factory.mktemp("swarm"), "--threads", "1") as swarm:
        swarm.serve("0:15", "15:30")
        swarm.wait_ready()
        yield swarm


@pytest.fixture(scope="module")
def gateway(swarm: Swarm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with gateway_process(MODEL, swarm, tmp_path_factory.mktemp("gateway")) as url:
        yield url


def test_a_question_is_answered_and_kept(gateway: str, look: Look) -> None:
    page = look(gateway)
    set_manner(page, Temperature="0.01", System_prompt="Answer in one short sentence.")
    answer = ask(page, "What is the capital of France?")
    wait_done(page)
    assert "Paris" in prose(answer)
    expect(answer.locator(".numbers")).to_contain_text("tokens/s")
    expect(answer.locator(".numbers")).to_contain_text("first after")
    page.get_by_role("navigation").get_by_role("link", name="What is the capital of France?").wait_for()
    page.reload()
    answers(page).first.wait_for()
    assert "Paris" in prose(answers(page).first)


def test_stop_ends_an_answer_and_go_on_takes_it_up_again(gateway: str, look: Look) -> None:
    page = look(gateway)
    answer = ask(page, LONG)
    answer.locator(".prose").wait_for()
    page.keyboard.press("Escape")
    wait_done(page, "stopped")
    stopped = prose(answer)
    answer.get_by_role("button", name="Go on").click()
    expect(answer).to_have_attribute("data-state", "writing", timeout=PATIENCE)
    wait_longer(page, answer, stopped)
    page.get_by_role("button", name="Stop").click()
    wait_done(page, "stopped")
    assert prose(answer).startswith(stopped[:-1].rstrip("*_`# ")[:200])


def test_edits_and_other_answers_are_branches_and_none_is_lost(gateway: str, look: Look) -> None:
    page = look(gateway)
    set_manner(page, Most_tokens="12")
    ask(page, "Name a fruit.")
    wait_done(page)
    fruit = prose(answers(page).first)
    questions(page).first.hover()
    questions(page).first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the question").fill("Name a tree.")
    page.get_by_role("button", name="Ask again").click()
    expect(questions(page).first).to_contain_text("2 / 2")
    wait_done(page)
    answers(page).first.get_by_role("button", name="Another answer").click()
    expect(answers(page).first).to_contain_text("2 / 2")
    wait_done(page)
    questions(page).first.get_by_role("button", name="Branch before").click()
    expect(questions(page).first).to_contain_text("Name a fruit.")
    assert prose(answers(page).first) == fruit
    page.reload()
    expect(questions(page).first).to_contain_text("Name a fruit.")
    questions(page).first.get_by_role("button", name="Branch after").click()
    expect(questions(page).first).to_contain_text("Name a tree.")
    expect(answers(page).first).to_contain_text("2 / 2")


def test_a_reload_in_mid_answer_loses_nothing(gateway: str, look: Look) -> None:
    page = look(gateway)
    answer = ask(page, LONG)
    answer.locator(".prose").wait_for()
    before = prose(answer)
    page.reload()
    answers(page).first.wait_for()
    expect(answers(page).first).to_have_attribute("data-state", "writing")
    wait_longer(page, answers(page).first, before)
    assert prose(answers(page).first).startswith(before[:50].rstrip("*_`# "))
    page.get_by_role("button", name="Stop").click()
    wait_done(page, "stopped")


def test_a_server_killed_in_mid_answer_is_a_notice_and_the_answer_goes_on(gateway: str, swarm: Swarm, look: Look) -> None:
    page = look(gateway)
    set_manner(page, Most_tokens="300")
    answer = ask(page, LONG)
    answer.locator(".prose").wait_for()
    last = next(server for server in swarm.living if server.blocks == "15:30")
    last.kill()
    swarm.replace(last)
    answer.get_by_role("note").wait_for()
    at_the_fault = prose(answer)
    wait_done(page)
    assert len(prose(answer)) > len(at_the_fault)
    assert prose(answer).startswith(at_the_fault[:100].rstrip("*_`# "))


def test_a_gateway_that_dies_and_comes_back_in_mid_answer(swarm: Swarm, look: Look, tmp_path: Path) -> None:
    port = ("--port", str(free_port()))
    with gateway_process(MODEL, swarm, tmp_path, *port, end=signal.SIGKILL) as url:
        page = look(url)
        answer = ask(page, LONG)
        answer.locator(".prose").wait_for()
        wait_longer(page, answer, prose(answer))
        page.wait_for_timeout(1200)  # what came is kept once a second
    assert prose(answer)
    with gateway_process(MODEL, swarm, tmp_path, *port):
        expect(answer).to_have_attribute("data-state", "interrupted", timeout=PATIENCE)
        kept = prose(answer)
        assert kept
        answer.get_by_role("button", name="Go on").click()
        wait_longer(page, answer, kept)
    expect(answer).to_have_attribute("data-state", "interrupted", timeout=PATIENCE)
    assert prose(answer).startswith(kept[:50].rstrip("*_`# "))


def test_conversations_are_found_renamed_exported_imported_and_deleted(gateway: str, look: Look, tmp_path: Path) -> None:
    page = look(gateway)
    set_manner(page, Most_tokens="4")
    ask(page, "Do walruses whistle?")
    wait_done(page)
    page.get_by_role("heading", name="Do walruses whistle?").get_by_role("button").click()
    page.get_by_label("Title", exact=True).fill("On walruses")
    page.keyboard.press("Enter")
    listed = page.get_by_role("navigation").get_by_role("link", name="On walruses")
    listed.wait_for()
    page.get_by_label("Search the conversations").fill("walruses whistle")
    expect(page.locator(".found")).to_contain_text("walruses")
    with page.expect_download() as download:
        page.get_by_role("link", name="Export as JSON").click()
    file = tmp_path / "walruses.json"
    download.value.save_as(file)
    assert "Do walruses whistle?" in json.dumps(json.loads(file.read_text()))
    listed.hover()
    page.get_by_role("button", name="Delete On walruses").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_text("Nothing found.").wait_for()
    page.get_by_label("File with a conversation").set_input_files(file)
    expect(questions(page).first).to_contain_text("Do walruses whistle?")


def test_the_playground_goes_on_from_another_token(gateway: str, look: Look) -> None:
    page = look(gateway + "/playground")
    page.get_by_label("Text to go on from").fill("The capital of France is")
    page.get_by_label("Most tokens", exact=False).fill("8")
    page.get_by_role("button", name="Complete").click()
    page.get_by_text("ended by").wait_for()
    assert "Paris" in page.locator(".text").inner_text()
    tokens = page.locator(".token")
    assert tokens.count() <= 8
    tokens.nth(1).hover()
    weighed = page.get_by_role("group", name="What the model weighed").get_by_role("button")
    assert weighed.count() >= 5
    other = weighed.nth(3)
    chosen = other.locator(".mono").inner_text()
    first = tokens.first.inner_text()
    other.click()
    expect(tokens.nth(1)).to_have_text(chosen, use_inner_text=False)
    page.get_by_text("ended by").wait_for()
    assert tokens.first.inner_text() == first


def test_the_playground_s_request_runs_elsewhere(gateway: str, look: Look) -> None:
    page = look(gateway + "/playground", permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Add one").click()
    page.get_by_label("Input of example 1").fill("the sky")
    page.get_by_label("Output of example 1").fill('it\'s "blue"')
    page.get_by_label("Input", exact=True).fill("grass")
    page.get_by_label("Most tokens", exact=False).fill("4")
    page.get_by_role("button", name="Copy as Python").click()
    page.get_by_text("is in the clipboard").wait_for()
    code = page.evaluate("navigator.clipboard.readText()")
    said: list[str] = []
    exec(compile(code, "<clipboard>", "exec"), {"print": said.append})
    assert said
    assert said[0].strip()


def test_the_swarm_is_drawn_as_it_is(gateway: str, swarm: Swarm, look: Look) -> None:
    page = look(gateway + "/swarm")
    drawing = page.get_by_role("img", name="30 blocks")
    drawing.wait_for()
    assert drawing.locator("path").count() >= 30
    table = page.get_by_role("table")
    expect(table.get_by_role("row").filter(has_text="0–14")).to_have_count(1)
    expect(page.get_by_text("corolla serve smollm2 --peers")).to_be_visible()
    extra = swarm.serve("0:3")[0].wait_ready()
    expect(table.get_by_role("row").filter(has_text="0–2")).to_have_count(1, timeout=PATIENCE)
    extra.leave()
    expect(table.get_by_role("row").filter(has_text="0–2")).to_have_count(0, timeout=PATIENCE)


def test_a_chat_on_a_phone(gateway: str, look: Look) -> None:
    page = look(gateway, **PHONE)
    set_manner(page, Most_tokens="8")
    ask(page, "Say hello.")
    wait_done(page)
    page.get_by_role("button", name="Menu").tap()
    page.get_by_role("link", name="Swarm").tap()
    page.get_by_role("heading", name="Swarm", exact=True).wait_for()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
