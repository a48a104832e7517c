import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from corolla.engine.page_pool import PagePool, PageTable

TOKENS = list(range(100, 112))


def filled(pool: PagePool, tokens: list[int], adapter: str = "") -> PageTable:
    """A table that holds `tokens`, published, as the engine would fill it."""
    table = pool.open(adapter)
    have = pool.match(table, tokens)
    assert pool.reserve(table, len(tokens))
    pool.advance(table, len(tokens) - have)
    pool.publish(table, tokens, len(tokens))
    pool.check_integrity()
    return table


def test_pages_follow_the_length() -> None:
    pool = PagePool(num_pages=4, page_size=4)
    table = pool.open()
    assert (table.pages, table.first_slot_if_contiguous, table.slots(0, 0)) == ([], None, [])
    assert pool.reserve(table, 5)
    assert len(table.pages) == 2
    assert pool.free_pages == 2
    assert pool.reserve(table, 3)
    assert len(table.pages) == 2


def test_a_prefix_is_shared() -> None:
    pool = PagePool(num_pages=8, page_size=4)
    first = filled(pool, TOKENS)
    second = pool.open()
    assert pool.match(second, [*TOKENS[:8], 7, 7, 7, 7]) == second.length == 8
    assert second.pages == first.pages[:2]
    assert pool.free_pages == 5


def test_a_prefix_is_found_after_its_session_closed() -> None:
    pool = PagePool(num_pages=4, page_size=4)
    pool.free(filled(pool, TOKENS))
    assert pool.free_pages == 4
    assert pool.match(pool.open(), [*TOKENS, 7]) == 12
    assert pool.free_pages == 1


def test_at_least_one_token_is_left_to_compute() -> None:
    pool = PagePool(num_pages=8, page_size=4)
    filled(pool, TOKENS)
    assert pool.match(pool.open(), TOKENS) == 8
    assert pool.match(pool.open(), TOKENS[:4]) == 0
    assert pool.match(pool.open(), TOKENS[:5]) == 4
    assert pool.match(pool.open(), []) == 0


def test_adapters_and_earlier_tokens_tell_pages_apart() -> None:
    pool = PagePool(num_pages=8, page_size=4)
    filled(pool, TOKENS, adapter="a")
    assert pool.match(pool.open("b"), TOKENS) == 0
    assert pool.match(pool.open("a"), [1, *TOKENS[1:]]) == 0
    assert pool.match(pool.open("a"), TOKENS) == 8


def test_a_page_that_is_not_published_is_not_found() -> None:
    pool = PagePool(num_pages=8, page_size=4)
    table = pool.open()
    pool.reserve(table, 12)
    pool.advance(table, 12)
    pool.publish(table, TOKENS, 7)
    assert pool.match(pool.open(), TOKENS) == 4


def test_the_first_writer_of_a_page_wins() -> None:
    pool = PagePool(num_pages=8, page_size=4)
    tables = [pool.open(), pool.open()]
    for table in tables:
        pool.reserve(table, 4)
        pool.advance(table, 4)
    for table in tables:
        pool.publish(table, TOKENS, 4)
        pool.check_integrity()
    third = pool.open()
    pool.match(third, TOKENS)
    assert third.pages == tables[0].pages != tables[1].pages


def test_a_cut_inside_a_shared_page_copies_it() -> None:
    pool = PagePool(num_pages=8, page_size=4)
    first = filled(pool, TOKENS)
    second = pool.open()
    pool.match(second, TOKENS)
    [(source, copy)] = pool.truncate(second, 6)
    assert source == first.pages[1]
    assert second.pages == [first.pages[0], copy]
    assert copy not in first.pages
    assert second.length == 6
    pool.check_integrity()


def test_a_cut_inside_a_shared_page_of_a_full_pool_goes_to_the_page_start() -> None:
    pool = PagePool(num_pages=3, page_size=4)
    first = filled(pool, TOKENS)
    second = pool.open()
    pool.match(second, TOKENS)
    assert pool.truncate(second, 6) == []
    assert (second.pages, second.length) == (first.pages[:1], 4)
    pool.check_integrity()


def test_a_cut_inside_an_own_page_hides_it_from_others() -> None:
    pool = PagePool(num_pages=8, page_size=4)
    table = filled(pool, TOKENS)
    assert pool.truncate(table, 6) == []
    pool.check_integrity()
    assert pool.match(pool.open(), TOKENS) == 4


def test_a_full_pool_refuses_and_changes_nothing() -> None:
    pool = PagePool(num_pages=3, page_size=4)
    filled(pool, TOKENS[:8])
    table = pool.open()
    assert not pool.reserve(table, 5)
    assert (table.pages, pool.free_pages) == ([], 1)
    assert pool.reserve(table, 4)


def test_sessions_that_grow_in_turn_stay_contiguous() -> None:
    pool = PagePool(num_pages=16, page_size=2)
    tables = [pool.open() for _ in range(4)]
    for length in range(1, 9):
        for table in tables:
            assert pool.reserve(table, length)
            pool.check_integrity()
    assert all(table.first_slot_if_contiguous is not None for table in tables)
    assert pool.free_pages == 0


def test_slots_of_scattered_pages() -> None:
    pool = PagePool(num_pages=3, page_size=2)
    tables = [pool.open() for _ in range(3)]
    for table in tables:
        pool.reserve(table, 2)
    first, _, last = sorted(tables, key=lambda table: table.pages)
    assert last.first_slot_if_contiguous == 4
    pool.free(first)
    pool.reserve(last, 4)
    assert last.pages == [2, 0]
    assert last.first_slot_if_contiguous is None
    assert last.slots(1, 4) == [5, 0, 1]
    pool.truncate(last, 0)
    pool.check_integrity()


def test_the_least_recently_freed_is_reused_first() -> None:
    pool = PagePool(num_pages=4, page_size=2)
    old, new = filled(pool, [1, 1, 2, 2]), filled(pool, [3, 3, 4, 4])
    pool.free(old)
    pool.free(new)
    pool.reserve(pool.open(), 2)  # takes the last page of the old one
    assert pool.match(pool.open(), [1, 1, 2, 2, 5]) == 2
    assert pool.match(pool.open(), [3, 3, 4, 4, 5]) == 4


def test_pages_that_hold_nothing_are_reused_before_findable_ones() -> None:
    pool = PagePool(num_pages=4, page_size=2)
    cached, other = filled(pool, [1, 1, 2, 2]), pool.open()
    pool.reserve(other, 4)
    pool.free(cached)
    pool.free(other)
    pool.reserve(pool.open(), 4)
    assert pool.match(pool.open(), [1, 1, 2, 2, 5]) == 4


def test_a_session_grows_past_a_findable_page_while_others_are_blank() -> None:
    pool = PagePool(num_pages=16, page_size=2)
    shared = filled(pool, [1, 1, 2, 2, 3, 3])
    pool.free(shared)
    table = pool.open()
    pool.match(table, [1, 1, 2, 2, 5, 5])
    pool.reserve(table, 10)
    pool.check_integrity()
    assert table.breaks == 1
    assert pool.match(pool.open(), [1, 1, 2, 2, 3, 3, 5]) == 6


def test_findable_pages_go_where_no_blank_ones_are_left() -> None:
    pool = PagePool(num_pages=8, page_size=2)
    tables = [filled(pool, [n, n]) for n in range(8)]
    for table in tables[::2]:
        pool.truncate(table, 1)
        pool.free(table)  # four blank pages, none beside another
    pool.free(tables[1])
    pool.reserve(pool.open(), 8)
    found = pool.open()
    assert pool.match(found, [1, 1, 5]) == 2
    pool.free(found)
    pool.reserve(pool.open(), 2)
    assert pool.match(pool.open(), [1, 1, 5]) == 0


def test_a_run_of_findable_pages_is_reused_in_one_piece() -> None:
    pool = PagePool(num_pages=4, page_size=2)
    pool.free(filled(pool, [1, 1, 2, 2, 3, 3, 4, 4]))
    table = pool.open()
    pool.reserve(table, 6)
    assert table.first_slot_if_contiguous == 2


def test_misuse_is_refused() -> None:
    pool = PagePool(num_pages=4, page_size=4)
    table = filled(pool, TOKENS)
    with pytest.raises(AssertionError, match="only an empty table"):
        pool.match(table, TOKENS)
    with pytest.raises(AssertionError, match="exceed the 12 reserved"):
        pool.advance(table, 1)
    with pytest.raises(AssertionError, match="outside the 12 reserved"):
        table.slots(0, 13)
    with pytest.raises(AssertionError, match="cannot truncate"):
        pool.truncate(table, 13)
    with pytest.raises(AssertionError, match="not all in use"):
        pool.publish(table, [*TOKENS, 1], 13)


def test_check_integrity_names_what_is_broken() -> None:
    pool = PagePool(num_pages=4, page_size=4)
    table = filled(pool, TOKENS)
    table.pages[0], kept = table.pages[1], table.pages[0]
    with pytest.raises(AssertionError, match="holds a page twice"):
        pool.check_integrity()
    table.pages[0] = kept
    pool.check_integrity()
    pool._holders[kept] += 1
    with pytest.raises(AssertionError, match="counts of holders"):
        pool.check_integrity()


class Session:
    def __init__(self, table: PageTable) -> None:
        self.table = table
        self.tokens: list[int] = []  # in use


class Pages(RuleBasedStateMachine):
    """The pool against plain lists of tokens: every table always reads back exactly what its session computed.

    `memory` is what the runner keeps: at each slot, the (adapter, tokens so far) that the KV there was computed from.
    """

    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(num_pages=7, page_size=3)
        self.memory: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.live: list[Session] = []

    def write(self, session: Session, tokens: list[int]) -> bool:
        """One step of the engine: reserve, compute, advance; as it should be when the pool is full."""
        table, start, end = session.table, len(session.tokens), len(session.tokens) + len(tokens)
        before = (list(table.pages), self.pool.free_pages)
        more_pages = -(-end // 3) - len(table.pages)
        reserved = self.pool.reserve(table, end)
        assert reserved == (more_pages <= before[1])
        if not reserved:
            assert before == (table.pages, self.pool.free_pages)
            return False
        session.tokens += tokens
        for position, slot in zip(range(start, end), table.slots(start, end), strict=True):
            self.memory[slot] = (table.adapter, tuple(session.tokens[: position + 1]))
        self.pool.advance(table, end - start)
        return True

    def start(self, adapter: str, tokens: list[int]) -> Session:
        session = Session(self.pool.open(adapter))
        reached = self.pool.match(session.table, tokens)
        assert reached % 3 == 0
        assert reached < max(len(tokens), 1)
        session.tokens = tokens[:reached]
        self.write(session, tokens[reached:])
        self.live.append(session)
        return session

    @rule(target=sessions, adapter=st.sampled_from(["", "a"]), tokens=st.lists(st.integers(0, 1), max_size=10))
    def opens(self, adapter: str, tokens: list[int]) -> Session:
        return self.start(adapter, tokens)

    @rule(target=sessions, session=sessions, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def opens_with_the_beginning_of_another(self, session: Session, tokens: list[int]) -> Session:
        return self.start(session.table.adapter, session.tokens + tokens)

    @rule(session=sessions, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=7))
    def steps(self, session: Session, tokens: list[int]) -> None:
        self.write(session, tokens)

    @rule(session=sessions, data=st.data())
    def publishes(self, session: Session, data: st.DataObject) -> None:
        length = data.draw(st.integers(0, len(session.tokens)))
        self.pool.publish(session.table, session.tokens, length)
        for index in range(length // 3):  # whoever sends these tokens now finds at least as many pages from the start
            fresh = self.pool.open(session.table.adapter)
            beginning = session.tokens[: index * 3 + 3]
            found = self.pool.match(fresh, [*beginning, 2])
            assert len(session.table.digests) * 3 >= len(beginning)
            assert self.read(fresh, found) == [(fresh.adapter, tuple(beginning[: i + 1])) for i in range(found)]
            self.pool.free(fresh)

    @rule(session=sessions, data=st.data())
    def truncates(self, session: Session, data: st.DataObject) -> None:
        length = data.draw(st.integers(0, len(session.tokens)))
        copies = self.pool.truncate(session.table, length)
        assert len(copies) <= 1
        for source, copy in copies:
            for offset in range(3):
                self.memory[copy * 3 + offset] = self.memory[source * 3 + offset]
        reached = session.table.length
        assert reached in (length, length // 3 * 3)
        assert reached == length or (not copies and self.pool.free_pages == 0)
        del session.tokens[reached:]
        assert session.table.capacity - reached < 3

    @rule(target=sessions, session=consumes(sessions), keep=st.booleans())
    def frees(self, session: Session, keep: bool) -> object:
        self.pool.free(session.table)
        assert (session.table.pages, session.table.length) == ([], 0)
        session.tokens = []
        if keep:  # an evicted session: its table is used again
            return session
        self.live.remove(session)
        return multiple()

    def read(self, table: PageTable, end: int) -> list[tuple[str, tuple[int, ...]]]:
        return [self.memory[slot] for slot in table.slots(0, end)]

    @invariant()
    def every_table_reads_back_its_own_tokens(self) -> None:
        self.pool.check_integrity()
        held: set[int] = set()
        for session in self.live:
            table = session.table
            assert table.length == len(session.tokens)
            assert self.read(table, table.length) == [(table.adapter, tuple(session.tokens[: i + 1])) for i in range(table.length)]
            first = table.first_slot_if_contiguous
            scattered = [page * 3 + offset for page in table.pages for offset in range(3)]
            assert table.slots(0, table.capacity) == scattered
            assert (first is not None) == bool(scattered and scattered == list(range(scattered[0], scattered[0] + len(scattered))))
            held.update(table.pages)
        assert self.pool.free_pages == 7 - len(held)


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
