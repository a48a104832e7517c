"""Who holds which page of the KV cache: bookkeeping only, no tensors.

A page is `page_size` consecutive positions of one session. A full page may be published under a hash of
(adapter, every token up to its end), and then whoever sends the same beginning shares it instead of computing it.
What keeps the bytes right: a page is written only by the one table that holds it, and only while it is unpublished.
"""

from __future__ import annotations

import re
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from weakref import WeakSet


@dataclass(slots=True, eq=False, weakref_slot=True)
class PageTable:
    """The pages of one session, in order of position; made by `PagePool.open` and changed by the pool alone."""

    page_size: int
    adapter: str
    pages: list[int] = field(default_factory=list)
    length: int = 0  # positions in use; the pages may hold more
    digests: list[bytes] = field(default_factory=list)  # of the leading full pages whose tokens were published or matched
    breaks: int = 0  # places where a page id does not follow the one before

    @property
    def capacity(self) -> int:
        """Positions that the pages can hold."""
        return len(self.pages) * self.page_size

    @property
    def first_slot_if_contiguous(self) -> int | None:
        """The slot of position 0 when the page ids are consecutive (so slots `[first, first + length)` are the session), else `None`."""
        return self.pages[0] * self.page_size if self.pages and not self.breaks else None

    def slots(self, start: int, end: int) -> list[int]:
        """The flat indices `page * page_size + offset` of positions `[start, end)`, which must be reserved."""
        assert 0 <= start <= end <= self.capacity, f"positions {start}:{end} are outside the {self.capacity} reserved"
        first = self.first_slot_if_contiguous
        if first is not None:
            return list(range(first + start, first + end))
        size = self.page_size
        return [self.pages[position // size] * size + position % size for position in range(start, end)]

    def push(self, page: int) -> None:
        self.breaks += bool(self.pages) and page != self.pages[-1] + 1
        self.pages.append(page)

    def pop(self) -> int:
        page = self.pages.pop()
        self.breaks -= bool(self.pages) and page != self.pages[-1] + 1
        return page


class PagePool:
    """`num_pages` pages of `page_size` positions, shared by the tables it opened.

    A page that no table holds is free; if it is published it stays findable until it is reused. Free pages that hold
    nothing findable go first, then the least recently freed, of one table the last page first, because the earlier
    pages of a conversation are of use without the later ones and not the other way round.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        assert num_pages > 0, "a pool needs at least one page"
        assert page_size > 0, "a page needs at least one position"
        self.num_pages = num_pages
        self.page_size = page_size
        self._holders = [0] * num_pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))  # the first is reused first
        # 1 for a free page that is not published: a copy of what the fields around say, in a form that finds runs quickly.
        self._blank = bytearray(b"\1" * num_pages)
        self._digest_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._tables: WeakSet[PageTable] = WeakSet()

    @property
    def free_pages(self) -> int:
        """Pages that no table holds, findable ones included."""
        return len(self._free)

    def open(self, adapter: str = "") -> PageTable:
        """An empty table for one session; pages are shared only between tables of the same adapter."""
        table = PageTable(self.page_size, adapter)
        self._tables.add(table)
        return table

    def match(self, table: PageTable, tokens: Sequence[int]) -> int:
        """Share the longest run of published pages that hold the beginning of `tokens`; returns the position reached.

        The table must be empty. At least one token is left to compute, for its logits.
        """
        assert not table.pages, "only an empty table can be matched"
        for index in range((len(tokens) - 1) // self.page_size):
            digest = self._next_digest(table, tokens, index)
            page = self._page_of.get(digest)
            if page is None:
                break
            self._free.pop(page, None)
            self._holders[page] += 1
            table.push(page)
            table.digests.append(digest)
        table.length = table.capacity
        return table.length

    def reserve(self, table: PageTable, length: int) -> bool:
        """Make the table able to hold positions below `length`; `False`, and nothing changed, if too few pages are free."""
        needed = -(-length // self.page_size) - len(table.pages)
        if needed > len(self._free):
            return False
        for remaining in range(needed, 0, -1):
            table.push(self._take(self._next(table, remaining)))
        return True

    def advance(self, table: PageTable, count: int) -> None:
        """`count` more positions of the table are in use; they must be reserved."""
        assert 0 <= count <= table.capacity - table.length, f"{table.length} + {count} positions exceed the {table.capacity} reserved"
        table.length += count

    def truncate(self, table: PageTable, length: int) -> list[tuple[int, int]]:
        """Keep the positions below `length` and give the later pages back; returns the pages to copy as (from, to).

        When the last page kept is cut inside and others hold it too, the table gets a page of its own, to which the
        caller must copy the bytes before the next forward. When no page is free for that, the table is cut at the
        page's start instead: read `table.length`.
        """
        assert 0 <= length <= table.length, f"cannot truncate {table.length} positions to {length}"
        size = self.page_size
        while table.capacity - size >= length and table.pages:
            self._release(table.pop())
        del table.digests[length // size :]
        table.length = length
        if length % size == 0:
            return []
        page = table.pages[-1]
        if self._holders[page] == 1:
            self._unpublish(page)
            return []
        table.pop()
        self._release(page)
        if not self._free:
            table.length = table.capacity
            return []
        copy = self._take(self._place(1))
        table.push(copy)
        return [(page, copy)]

    def publish(self, table: PageTable, tokens: Sequence[int], length: int) -> None:
        """Positions below `length` are computed and hold `tokens`: let others find the full pages among them.

        The first writer wins: a page with the same tokens as a published one stays its table's own. Only pages that
        became full since the last call are hashed.
        """
        assert length <= min(table.length, len(tokens)), f"{length} positions are not all in use and known"
        for index in range(len(table.digests), length // self.page_size):
            digest = self._next_digest(table, tokens, index)
            table.digests.append(digest)
            if digest not in self._page_of:
                page = table.pages[index]
                self._page_of[digest] = page
                self._digest_of[page] = digest

    def free(self, table: PageTable) -> None:
        """Give all pages back; the table is empty then and may be used again."""
        self.truncate(table, 0)

    def check_integrity(self) -> None:
        """Raises `AssertionError` naming the invariant that does not hold; for tests and idle moments."""
        holders = [0] * self.num_pages
        for table in self._tables:
            assert len(set(table.pages)) == len(table.pages), f"a table holds a page twice: {table.pages}"
            assert 0 <= table.length <= table.capacity, f"a table uses {table.length} of {table.capacity} positions"
            full = table.length // self.page_size
            assert len(table.digests) <= full, "a table has digests of pages that are not full"
            breaks = sum(after != before + 1 for before, after in zip(table.pages, table.pages[1:], strict=False))
            assert table.breaks == breaks, f"a table counts {table.breaks} breaks and has {breaks}"
            for index, page in enumerate(table.pages):
                holders[page] += 1
                writable = index >= full
                assert not (writable and page in self._digest_of), f"page {page} is published and may still be written"
                digest = self._digest_of.get(page)
                assert digest is None or digest == table.digests[index], f"page {page} is published under another hash than its table's"
        assert holders == self._holders, "the counts of holders differ from the tables"
        for page, count in enumerate(holders):
            assert (count == 0) == (page in self._free), (
                f"page {page} has {count} holders and is {'' if page in self._free else 'not '}free"
            )
            assert count <= 1 or page in self._digest_of, f"page {page} is shared and not published"
            blank = count == 0 and page not in self._digest_of
            assert self._blank[page] == blank, f"page {page} is marked wrongly in the map of blank pages"
        assert all(0 <= page < self.num_pages for page in self._free), "the free list names a page outside the pool"
        assert {digest: page for page, digest in self._digest_of.items()} == self._page_of, "the two sides of the hash index differ"
        assert len(self._digest_of) == len(self._page_of), "two pages are published under one hash"

    def _next_digest(self, table: PageTable, tokens: Sequence[int], index: int) -> bytes:
        """The hash of (adapter, tokens up to the end of page `index`), of which the table knows the page before.

        A collision would show one user another's cache, so it is cryptographic.
        """
        parent = table.digests[index - 1] if index else blake2b(table.adapter.encode()).digest()
        of_page = array("q", tokens[index * self.page_size : (index + 1) * self.page_size])
        return blake2b(of_page.tobytes() + parent, digest_size=16).digest()

    def _next(self, table: PageTable, count: int) -> int:
        """The free page to take for a table that wants `count` more: the one that follows its last, unless somebody's tokens are found
        in that one while other pages are blank."""
        follower = table.pages[-1] + 1 if table.pages else self.num_pages
        if follower < self.num_pages and (self._blank[follower] or (follower in self._free and b"\1" not in self._blank)):
            return follower
        return self._place(count)

    def _place(self, count: int) -> int:
        """The free page where a new run of `count` pages best starts."""
        runs = re.finditer(rb"\x01+", self._blank)
        longest = max(runs, key=lambda run: run.end() - run.start(), default=None)
        if longest is not None:
            start, end = longest.span()
            # Whoever holds the page before the run will want to grow into it: leave it half.
            return max(start, min((start + end) // 2, end - count)) if start and self._holders[start - 1] else start
        # Pages of one table are reused from its last to its first, so the run around the next one lies before it.
        place = next(iter(self._free))
        for _ in range(count - 1):
            if place - 1 not in self._free:
                break
            place -= 1
        return place

    def _take(self, page: int) -> int:
        del self._free[page]
        self._unpublish(page)
        self._blank[page] = 0
        self._holders[page] = 1
        return page

    def _release(self, page: int) -> None:
        self._holders[page] -= 1
        if self._holders[page] == 0:
            self._free[page] = None
            if page not in self._digest_of:
                self._free.move_to_end(page, last=False)
                self._blank[page] = 1

    def _unpublish(self, page: int) -> None:
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]
