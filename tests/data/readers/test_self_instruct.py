"""Self-Instruct's tasks."""

from __future__ import annotations

from pathlib import Path

from data.readers.writing import a, examples, q, records


def test_self_instruct_has_an_example_for_each_instance(tmp_path: Path) -> None:
    value = {"instruction": "Double it.", "instances": [{"input": "2", "output": "4"}, {"input": "", "output": "What?"}]}
    first, second = examples(records(tmp_path / "seeds.jsonl", value))
    assert first.turns == (q("Double it.\n2"), a("4"))
    assert second.turns == (q("Double it."), a("What?"))
