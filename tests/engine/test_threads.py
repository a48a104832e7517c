"""Teams of OpenMP threads: what is computed on a thread that ends leaves none."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from corolla.engine.adapters import AdapterStore
from corolla.engine.prompts import PromptStore
from corolla.engine.threads import GoOn, on_passing_thread
from corolla.models.adapters import digest_of, joined_digest
from corolla.models.span import load_span
from corolla.types import AdapterPart, Factors, PromptName, PromptPart, Span
from tests.models import tiny

LARGE = 1_000_000  # values; torch spreads an operation on as many over its threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_what_it_returns() -> None:
    assert on_passing_thread(lambda go_on: threading.current_thread().name) == "corolla-passing"


def test_what_it_raises() -> None:
    with pytest.raises(ValueError, match="of the work"):
        on_passing_thread(lambda go_on: int("of the work"))


def test_who_interrupts_waits_for_its_end() -> None:
    began, ended = threading.Event(), threading.Event()

    def work(go_on: GoOn) -> None:
        began.set()
        try:
            while True:
                go_on()
        finally:
            ended.set()

    def interrupt() -> None:
        began.wait()
        os.kill(os.getpid(), signal.SIGINT)  # to the process, as a terminal does

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        on_passing_thread(work)
    assert ended.is_set()


def test_no_thread_is_left() -> None:
    before = threads()
    during = on_passing_thread(lambda go_on: (torch.ones(LARGE).exp(), threads())[1])
    assert len(during - before) >= 2, "the work had no team, so nothing is shown"
    deadline = time.monotonic() + 5.0
    while threads() & during - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads() & during - before


def test_what_clients_send_is_looked_through_without_a_team(tmp_path: Path) -> None:
    """Prompts and adapters on a thread that receives them; both are converted where they are computed with."""
    model = load_span(tiny.save("llama", tmp_path), dtype="bfloat16")
    prompts, adapters, names = PromptStore(model), AdapterStore(model), list[str]()
    name, width = PromptName("p", 1000, deep=True), model.arch.hidden
    outputs, inputs = model.arch.products["up"]
    block = {"up": Factors(torch.ones(2000, inputs), torch.ones(outputs, 2000))}
    digests = (digest_of(block),) * 4
    received = PromptPart(name, Span(0, 4), torch.ones(1000, width), torch.ones(4, 1000, width))
    during: set[int] = set()

    def receive() -> None:
        prompts.put("c", received)
        names.append(joined_digest(digests))
        adapters.put("c", AdapterPart(names[0], Span(0, 4), (block,) * 4, digests))
        during.update(threads())

    before = threads()
    thread = threading.Thread(target=receive)
    thread.start()
    thread.join()
    assert len(during - before) == 1
    part, kept = prompts.find("c", name, Span(1, 3), with_input=True), adapters.find(names[0], Span(0, 4))
    assert part is not None
    assert part.deep is not None
    assert kept is not None
    assert {part.deep.dtype, kept.blocks[3]["up"].a.dtype} == {torch.bfloat16}
    assert torch.equal(part.deep.float(), torch.ones(2, 1000, width))


def threads() -> set[int]:
    """This process's by id: those of other tests may end meanwhile."""
    return {thread.id for thread in psutil.Process().threads()}
