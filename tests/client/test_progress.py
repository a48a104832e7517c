from __future__ import annotations

import pytest

from corolla.client.progress import Progress, Standstill
from corolla.messages import Whereabouts

KNOWN = 40  # tokens of the prompt


def asked(progress: Progress, now: float, **said: tuple[int, int]) -> Standstill | None:
    """One round of questions: tokens cached and rows pending at servers a and b."""
    progress.ask(now)
    for peer, (cached, pending) in said.items():
        progress.record(peer, Whereabouts("s", 1, cached, pending), KNOWN)
    return progress.conclude(("a", "b"), now)


@pytest.fixture
def progress() -> Progress:
    return Progress(0.0, 0.0)


def test_the_first_round_says_nothing(progress: Progress) -> None:
    assert asked(progress, 1.0, a=(0, 0), b=(0, 0)) is None


def test_a_prompt_that_is_cached_further_gets_on(progress: Progress) -> None:
    for done in range(0, KNOWN, 10):
        assert asked(progress, 1.0, a=(done, KNOWN - done), b=(0, 0)) is None


def test_who_works_on_it_and_who_does_not(progress: Progress) -> None:
    asked(progress, 1.0, a=(40, 0), b=(0, 5))
    assert asked(progress, 2.0, a=(40, 0), b=(0, 5)) == Standstill(("b",), {"a": (40, 0), "b": (0, 5)})
    assert asked(progress, 3.0, a=(40, 0), b=(0, 0)) == Standstill((), {"a": (40, 0), "b": (0, 0)})


def test_who_says_nothing_is_taken_for_one_that_works(progress: Progress) -> None:
    asked(progress, 1.0, a=(40, 0))
    standstill = asked(progress, 2.0, a=(40, 0))
    assert standstill is not None
    assert standstill.working == ("b",)


@pytest.mark.parametrize("cached", [(41, 400, 4000), (20, 0, 20)])
def test_what_is_more_than_there_is_or_was_there_before_is_no_progress(progress: Progress, cached: tuple[int, ...]) -> None:
    rounds = [asked(progress, float(at), a=(40, 0), b=(done, 1)) for at, done in enumerate(cached)]
    assert rounds[-1] is not None


def test_after_progress_it_begins_anew(progress: Progress) -> None:
    asked(progress, 1.0, a=(0, 1), b=(0, 1))
    progress.restart(2.0)
    assert asked(progress, 3.0, a=(0, 1), b=(0, 1)) is None
    assert (progress.moved, progress.asked) == (3.0, None)
