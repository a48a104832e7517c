"""Examples that are said again, or nearly so, left out: the first one stays."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from corolla.data.examples import Example
from corolla.data.sampling import fingerprint
from corolla.errors import DataError, InvalidSetting

Duplicates = Literal["keep", "exact", "near"]

_PERMUTATIONS = 128  # of MinHash: the similarity is estimated within about 0.04
_SHINGLE = 3  # words


@dataclass(slots=True)
class Deduplication:
    """Leaves out examples that say the same as an earlier one: to the letter with `exact`; with `near` also those whose runs of
    three words are shared to at least about `similarity` (0 to 1, Jaccard's), by MinHash (Broder, 1997) as datasketch has it.

    Keeps some 100 bytes for an example with `exact`, a few thousand with `near`. `removed` counts.
    Raises `InvalidSetting` for a value outside its range, `DataError` where datasketch is missing.
    """

    duplicates: Duplicates = "keep"
    similarity: float = 0.8
    removed: int = 0
    _seen: set[bytes] = field(default_factory=set)
    _near: Any = None
    _minhash: Any = None
    _sketches: dict[bytes, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.duplicates not in get_args(Duplicates):
            raise InvalidSetting("duplicates", f"there is no {self.duplicates!r}; there are {', '.join(get_args(Duplicates))}")
        if not 0 < self.similarity <= 1:
            raise InvalidSetting("similarity", f"{self.similarity:g} is no share; give one above 0, to 1")
        if self.duplicates == "near":
            try:
                datasketch = importlib.import_module("datasketch")
            except ImportError:
                raise DataError("near duplicates need a library: pip install 'corolla[data]'") from None
            self._minhash = datasketch.MinHash(num_perm=_PERMUTATIONS)
            self._near = datasketch.MinHashLSH(threshold=self.similarity, num_perm=_PERMUTATIONS)

    def is_new(self, example: Example) -> bool:
        """Whether nothing before said this."""
        if self.duplicates == "keep":
            return True
        if not (new := self._is_new(example)):
            self.removed += 1
        return new

    def _is_new(self, example: Example) -> bool:
        print_ = fingerprint(example)[:16]
        if print_ in self._seen:
            return False
        self._seen.add(print_)
        if self._near is None:
            return True
        sketch = self._minhash.copy()
        sketch.update_batch(shingles(example))
        # The index finds candidates, some of them below the similarity: each is looked at.
        if any(sketch.jaccard(self._sketches[other]) >= self.similarity for other in self._near.query(sketch)):
            return False
        self._near.insert(print_, sketch)
        self._sketches[print_] = sketch
        return True


def shingles(example: Example) -> list[bytes]:
    """The runs of three words of what is said, in lower case, each once and in an order of their own."""
    words = " ".join(turn.content for turn in example.turns).lower().split()
    runs = {" ".join(words[start : start + _SHINGLE]) for start in range(max(1, len(words) - _SHINGLE + 1))}
    return sorted(run.encode(errors="surrogatepass") for run in runs)
