"""Let a model take longer texts than it was trained for, without training.

Tables of absolute positions get more rows: the trained ones over and over (``tile``, as Longformer was started from
RoBERTa, Beltagy et al., 2020), or stretched linearly (``interpolate``, Position Interpolation, Chen et al., 2023).
Tiling leaves every text of the old length as it was; interpolation changes all of them. Rotary embeddings turn slower:
``rope-linear`` (Chen et al., 2023), ``rope-dynamic`` (NTK-aware, by the length of each input) or ``rope-yarn`` (Peng
et al., 2023), all by transformers' own formulas.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from effc.errors import PassFailedError, PreconditionError
from effc.passes.base import Pass, PassResult
from effc.passes.position_tables import PositionTable, is_sinusoidal, position_tables, resize_buffers
from effc.passes.positions_settings import PositionsSection
from effc.passes.rotary_scaling import rotary_modules, scale_rotary

_FOR_TABLES = ("interpolate", "tile")


class ExtendPositions(Pass[PreTrainedModel, PreTrainedModel]):
    """Extend positions to ``settings.max_length`` tokens; the model's config says so afterwards.

    Args:
        settings: the recipe's ``positions`` section, with a length.
        widest: the furthest distance that any attention module will see, None if it grows with the text.
    """

    name: ClassVar[str] = "extend-positions"
    version: ClassVar[int] = 1

    def __init__(self, settings: PositionsSection, widest: int | None = None):
        self.settings: PositionsSection = settings
        self._widest = widest
        self._trained = 0

    def requires(self, model: PreTrainedModel) -> None:
        """There must be positions to extend, fewer than asked for, and the method must be one for their kind.

        Raises:
            PreconditionError: naming what stands against it.
        """
        kind, wanted = type(model).__name__, self.settings.max_length
        assert wanted is not None
        if model.main_input_name != "input_ids":
            raise PreconditionError(
                f"{kind} reads no text, and its positions are places in an image or a recording of fixed size.",
                "Leave positions.max_length out.",
            )
        tables, rotary = position_tables(model), rotary_modules(model)
        if not tables and not rotary:
            why = "has neither a position table nor rotary embeddings; biases by distance reach any length as they are"
            if any(is_sinusoidal(module) for module in model.modules()):
                why = "computes its positions by a fixed sinusoidal formula, so that there is no table to extend"
            raise PreconditionError(f"{kind} {why}.", "Leave positions.max_length out.")
        method = self.settings.method
        if method != "auto" and (method in _FOR_TABLES) != bool(tables):
            have = "a table of absolute positions" if tables else "rotary embeddings"
            fitting = "interpolate or tile" if tables else "rope-linear, rope-dynamic or rope-yarn"
            raise PreconditionError(
                f"'{method}' does not extend the positions of {kind}, which has {have}.", f"Use {fitting}, or auto."
            )
        current = trained_positions(model)
        if wanted <= current:
            raise PreconditionError(
                f"{kind} already takes {current} tokens, so it cannot be extended to {wanted}.",
                f"Give a length above {current}, or leave positions.max_length out.",
            )

    def run(self, model: PreTrainedModel) -> PassResult[PreTrainedModel]:
        """Extend tables or rotary embeddings, and what follows from their length."""
        self.requires(model)
        old, new = trained_positions(model), self.settings.max_length
        assert new is not None
        self._trained = old
        tables = position_tables(model)
        method = self._method(bool(tables), old)
        metrics: dict[str, Any] = {"from": old, "to": new, "method": method}
        if tables:
            for table in tables:
                _extend(table, new, method)
            model.config.max_position_embeddings += new - old
            changed = [table.name for table in tables]
            metrics["rows"] = {table.name: table.positions for table in tables}
        else:
            changed = scale_rotary(model, old, new, method)
            metrics["factor"] = new / old
        changed += resize_buffers(model, old, new)
        return PassResult(model, True, changed, metrics=metrics)

    def ensures(self, model: PreTrainedModel) -> None:
        """The model must run just beyond its old length. (With rotary embeddings nothing bounds it.)

        Raises:
            PassFailedError: if something else in the model has the old length.
        """
        if not position_tables(model):
            return
        padding = getattr(model.config, "pad_token_id", None)
        ids = torch.full((1, self._trained + 1), 1 if padding == 0 else 0)
        targets = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        try:
            with torch.no_grad():
                model(input_ids=ids, **targets)
        except (IndexError, RuntimeError, ValueError) as error:
            raise PassFailedError(
                f"{type(model).__name__} does not run at {self._trained + 1} tokens with extended positions: {error}.",
                "Something else in this architecture has the old length; please report it.",
            ) from error

    def _method(self, has_table: bool, trained: int) -> str:
        if self.settings.method != "auto":
            return self.settings.method
        if has_table:
            return "tile"
        return "rope-unscaled" if self._widest is not None and self._widest < trained else "rope-yarn"


def trained_positions(model: PreTrainedModel) -> int:
    """How many tokens the model was made for."""
    tables = position_tables(model)
    if tables:
        return min(table.positions for table in tables)
    return int(model.config.max_position_embeddings)


def _extend(table: PositionTable, length: int, method: str) -> None:
    if method == "tile":
        table.replace(lambda rows: rows[torch.arange(length) % len(rows)])
        return

    def stretched(rows: torch.Tensor) -> torch.Tensor:
        # First and last position keep their rows.
        return torch.nn.functional.interpolate(rows.T[None], size=length, mode="linear", align_corners=True)[0].T

    table.replace(stretched)
