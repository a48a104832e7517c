"""The tuning page over a gateway's own data, and a conversation that begins with one of its soft prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from corolla.gateway.service import GatewayConfig
from tests.browser.looking import PATIENCE, PHONE, Look, answers, ask, prose, violations, wait_done
from tests.gateway.running import Running, TinySwarm, running
from tests.gateway.soft import make_prompt, make_record

TOKENS = 5


@pytest.fixture(scope="module")
def prompts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    make_prompt(folder / "persona", tiny_model, TOKENS, deep=True)
    make_record(folder / "persona")
    make_record(folder / "begun", status="running")
    return folder


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    swarm = TinySwarm(tiny_model)
    try:
        config = GatewayConfig(prompts=prompts, drain=0.5)
        with running(swarm, tmp_path_factory.mktemp("tuned") / "g.sqlite", config) as gateway:
            yield gateway
    finally:
        swarm.close()


def test_a_run_is_shown_and_chatted_with(tuned: Running, look: Look) -> None:
    page = look(tuned.url + "/tuning")
    run = page.get_by_role("region", name="persona")
    expect(run).to_contain_text(f"tiny · {TOKENS} tokens, deep · dialogues.txt · 40 of 40 steps")
    expect(run.get_by_role("img")).to_have_attribute(
        "aria-label", "Loss while persona was trained. Training: 3.95 at step 1, 2.00 at step 40. Held out: 2.40 at step 40."
    )
    expect(run).to_contain_text("held-out perplexity")
    run.get_by_text("Answers before and after").click()
    expect(run).to_contain_text("Who are you?")
    assert violations(page) == ""
    run.get_by_role("link", name="Chat with this one").click()
    ask(page, "hello there")
    wait_done(page)
    with tuned.client() as client:
        [made] = client.get("/api/ui/conversations").json()["conversations"]
        whole = client.get(f"/api/ui/conversations/{made['id']}").json()
    assert whole["prompt"] == "persona"
    page.locator("header .chip").click()
    expect(page.get_by_role("dialog").get_by_label("Soft prompt")).to_have_value("persona")


def test_a_run_goes_on_before_ones_eyes_until_it_has_a_prompt(tuned: Running, tiny_model: Path, prompts: Path, look: Look) -> None:
    page = look(tuned.url + "/tuning", **PHONE)
    run = page.get_by_role("region", name="begun")
    expect(run).to_contain_text("Training now")
    expect(run.get_by_role("link", name="Chat with this one")).to_have_count(0)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
    make_prompt(prompts / "begun", tiny_model, TOKENS)
    make_record(prompts / "begun")
    expect(run.get_by_role("link", name="Chat with this one")).to_be_visible(timeout=PATIENCE)
    expect(run).not_to_contain_text("Training now")


def test_what_cannot_be_used_says_why(tuned: Running, tiny_model: Path, prompts: Path, look: Look) -> None:
    make_prompt(prompts / "damaged", tiny_model, TOKENS)
    (prompts / "damaged" / "adapter_model.safetensors").write_bytes(b"nothing")
    (prompts / "damaged" / "tuning.json").write_text(
        json.dumps({"status": "failed", "error": None, "curve": [{"step": 1, "loss": float("nan")}]})
    )
    page = look(tuned.url + "/tuning")
    run = page.get_by_role("region", name="damaged")
    expect(run.locator(".problem")).to_contain_text("adapter_model.safetensors")
    expect(run.get_by_role("link", name="Chat with this one")).to_have_count(0)


def test_a_prompt_is_chosen_in_a_conversation(tuned: Running, look: Look) -> None:
    page = look(tuned.url)
    ask(page, "What is the capital of France?")
    wait_done(page)
    without = prose(answers(page).first)
    page.locator("header .chip").click()
    page.get_by_role("dialog").get_by_label("Soft prompt").select_option("persona")
    page.get_by_role("dialog").get_by_label("Sample", exact=True).uncheck()
    page.get_by_role("button", name="Close").click()
    answers(page).first.get_by_role("button", name="Another answer").click()
    page.get_by_text("2 / 2").wait_for()
    wait_done(page)
    assert prose(answers(page).first) != without
