"""A minute of what `make soak` does for twenty: servers come and go under chats, and no token is wrong."""

from __future__ import annotations

from pathlib import Path

from tests.swarm.harness import OVER_HIVEMIND
from tests.swarm.soak import MB, SoakConfig, soak

pytestmark = OVER_HIVEMIND


def test_chats_survive_churn_and_nothing_grows(tmp_path: Path) -> None:
    report = soak(tmp_path, SoakConfig(seconds=75.0, every=5.0, watch=2.5))
    report.print()
    assert report.wrong == report.failed == []
    assert report.answers > 50
    assert report.events["killed"] + report.events["left"] + report.events["hung"] >= 3
    for name in report.usage:
        memory, descriptors = report.growth(name, since=25.0)
        assert memory < 60 * MB, name
        assert descriptors < 30, name
