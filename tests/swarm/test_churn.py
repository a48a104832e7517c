"""A minute of what `make soak` does for twenty: servers come and go under chats, and no token is wrong."""

from __future__ import annotations

from pathlib import Path

from tests.swarm.harness import OVER_HIVEMIND
from tests.swarm.soak import EVENTS, MB, SoakConfig, soak

pytestmark = OVER_HIVEMIND


def test_chats_survive_churn_and_nothing_grows(tmp_path: Path) -> None:
    report = soak(tmp_path, SoakConfig(seconds=75.0, every=5.0, watch=2.5))
    report.print()
    assert report.verdict.wrong == report.failed == report.left == []
    assert report.answers > 50
    assert sum(report.events[event] for event in EVENTS) >= 5
    assert all(report.events[edit] for edit in ("rolled back", "regenerated", "shortened", "cancelled"))
    for name in report.usage:
        memory, descriptors = report.growth(name, since=25.0)
        assert memory < 60 * MB, name
        assert descriptors < 30, name
