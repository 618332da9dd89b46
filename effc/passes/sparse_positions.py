"""Sparse positional encodings: rows of a position table only where the pattern needs them.

A bounded pattern compares a token with its neighbours and with a few global ones. So a table needs a row for each of
the ``G`` global tokens and one cycle of ``C`` rows, ``C`` being no less than the pattern's span (left reach + right
reach + 1): no two tokens that one token sees in its window then share a row. Position ``p`` takes row

    p                        for p < G
    G + (p - G) mod C        otherwise

so that a table of ``G + C`` rows serves every length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from effc.errors import PassFailedError, PreconditionError
from effc.passes.base import Pass, PassResult
from effc.passes.position_reach import Reach, reach_of
from effc.passes.position_tables import position_tables
from effc.passes.positions_settings import PositionsSection
from effc.plugins.forms.base import AttentionForm

# Cycles are whole multiples of this, so that tables of similar patterns have the same shape.
_MULTIPLE = 64


class SparsePositions(Pass[PreTrainedModel, PreTrainedModel]):
    """Cut position tables down to global rows and one cycle.

    Args:
        settings: the recipe's ``positions`` section.
        forms: what each attention module computes and whether it only looks back, by module name.
    """

    name: ClassVar[str] = "sparse-positions"
    version: ClassVar[int] = 1

    def __init__(self, settings: PositionsSection, forms: Sequence[tuple[str, AttentionForm, bool]]):
        self.settings: PositionsSection = settings
        self._forms = forms

    def reach(self) -> Reach:
        """How far the modules look at most, all together.

        Raises:
            PreconditionError: naming a module that looks at tokens of any distance.
        """
        left = right = first = 0
        for name, form, causal in self._forms:
            reach = reach_of(form, causal)
            if reach is None:
                raise PreconditionError(
                    f"Sparse positions need patterns of bounded reach, and {name} computes '{form}'.",
                    "Use local, dilated or block terms with global:N or sinks:N, and exclude no layer; or leave "
                    "positions.sparse out.",
                )
            left, right, first = max(left, reach.left), max(right, reach.right), max(first, reach.first)
        return Reach(left, right, first)

    def rows(self) -> tuple[int, int]:
        """``(G, C)``: rows of global tokens, and rows of the cycle."""
        reach = self.reach()
        return reach.first, -(-(reach.left + reach.right + 1) // _MULTIPLE) * _MULTIPLE

    def requires(self, model: PreTrainedModel) -> None:
        """There must be a table with more rows than are needed.

        Raises:
            PreconditionError: naming what stands against it.
        """
        kind, tables = type(model).__name__, position_tables(model)
        if model.main_input_name != "input_ids" or not tables:
            raise PreconditionError(
                f"{kind} has no table of absolute text positions that could be sparse.", "Leave positions.sparse out."
            )
        rows, smallest = sum(self.rows()), min(table.positions for table in tables)
        if rows >= smallest:
            raise PreconditionError(
                f"The pattern needs {rows} rows of positions, and the table of {kind} has {smallest}.",
                "Use a narrower window, extend the positions with positions.max_length, or leave positions.sparse out.",
            )

    def run(self, model: PreTrainedModel) -> PassResult[PreTrainedModel]:
        """Cut every table, and let its module look positions up by the formula."""
        self.requires(model)
        first, cycle = self.rows()
        tables = position_tables(model)
        kept = {}
        for table in tables:
            kept[table.name] = {"rows": first + cycle, "of": table.positions}
            table.replace(lambda rows: rows[: first + cycle])
            module: Any = table.module
            bases = (_CyclicEmbedding,) if type(module) is nn.Embedding else (type(module), _CyclicEmbedding)
            module.__class__ = type(f"Cyclic{type(module).__name__}", bases, {})
            module.first_rows, module.cycle_rows, module.rows_before = first, cycle, table.offset
        formula = f"row(p) = p if p < {first} else {first} + (p - {first}) mod {cycle}"
        return PassResult(model, True, [table.name for table in tables], metrics={"kept": kept, "formula": formula})

    def ensures(self, model: PreTrainedModel) -> None:
        """Each module must take positions beyond its rows.

        Raises:
            PassFailedError: if one does not.
        """
        first, cycle = self.rows()
        for name, module in model.named_modules():
            if not isinstance(module, _CyclicEmbedding):
                continue
            ids = torch.tensor([[first, first + cycle]]) + module.rows_before
            near, far = _CyclicEmbedding.forward(module, ids)[0]
            if not torch.equal(near, far):
                raise PassFailedError(f"{name} does not repeat its rows.", "Please report this model.")


class _CyclicEmbedding(nn.Embedding):
    """Looks up positions by the formula above; rows before that of position 0 stay as they are."""

    first_rows: int
    cycle_rows: int
    rows_before: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        start = self.rows_before + self.first_rows
        return super().forward(torch.where(input < start, input, start + (input - start) % self.cycle_rows))
