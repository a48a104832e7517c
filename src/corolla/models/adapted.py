"""Products to which adapters add something, for some rows: each run of rows gets what its own adapter adds, and no other row changes.

Legend: T rows, n rows of a window, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from corolla.models.adapters import PRODUCTS
from corolla.models.block import Block
from corolla.models.config import Activation
from corolla.models.linear import ACTIVATE, Linear, Unfused
from corolla.types import Factors


class Blocks(Protocol):
    """An adapter as it is kept for computing."""

    @property
    def blocks(self) -> Mapping[int, Mapping[str, Factors]]:
        """What it adds in each block, by product, in the model's dtype and on its device."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class AdapterRun:
    """Rows that follow one another and have one adapter.

    `window` are rows around `rows` of a number that products are computed for: what a row gets depends on that number alone.
    """

    adapter: Blocks
    rows: slice
    window: slice


class Adapting:
    """`SpanModel.forward`'s `adapting` for a step's runs of rows.

    With `alone_alike` a row without an adapter has the same bits as in a step where nobody has one: otherwise it may differ in the
    last of them, as an activation is fused into a product where there is nothing to add before it.
    """

    def __init__(self, runs: Sequence[AdapterRun], *, alone_alike: bool) -> None:
        self._runs, self._alone_alike = runs, alone_alike

    def __call__(self, block: Block) -> Block:
        changed: dict[str, Any] = {}  # as `replace` takes them
        for product in PRODUCTS:
            adding = [(run, run.adapter.blocks[block.index][product]) for run in self._runs if product in run.adapter.blocks[block.index]]
            if adding:
                changed[product] = Adapted(getattr(block, product), adding, alone_alike=self._alone_alike)
        return replace(block, **changed) if changed else block


class Adapted(Unfused):
    """A layer, and what is added to its product."""

    def __init__(self, linear: Linear, adding: Sequence[tuple[AdapterRun, Factors]], *, alone_alike: bool) -> None:
        self._linear, self._adding, self._alone_alike = linear, adding, alone_alike

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._add(x, self._linear(x))

    def added(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self._add(x, self._linear.added(x, other))

    def activated(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        adapted = ACTIVATE[activation](self(x))
        return self._among(self._linear.activated(x, activation), adapted) if self._alone_alike else adapted

    def multiplied(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        adapted = self(x).mul_(other)
        return self._among(self._linear.multiplied(x, other), adapted) if self._alone_alike else adapted

    def widened(self) -> torch.Tensor:
        """Of the layer alone: there is no gradient through adapters."""
        return self._linear.widened()

    def _add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for run, (a_RxI, b_OxR) in self._adding:
            delta_nxO = x[run.window] @ a_RxI.t() @ b_OxR.t()
            first = run.rows.start - run.window.start
            y[run.rows] += delta_nxO[first : first + run.rows.stop - run.rows.start]
        return y

    def _among(self, alone: torch.Tensor, adapted: torch.Tensor) -> torch.Tensor:
        """The rows that have an adapter among those that have none."""
        for run, _ in self._adding:
            alone[run.rows] = adapted[run.rows]
        return alone
