from __future__ import annotations

from corolla.engine.model_runner import packed_rows


def test_few_numbers_of_rows_are_ever_computed_and_little_in_vain() -> None:
    computed = {count: packed_rows(count) for count in range(1, 257)}
    assert all(rows >= count for count, rows in computed.items())
    assert len(set(computed.values())) <= 24
    assert all(rows <= 1.25 * count for count, rows in computed.items() if count > 32)
