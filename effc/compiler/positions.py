"""Extend and thin out the positions of a source model, and keep what the rest of the compile needs to know of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effc.compiler.manifest import AttentionLayer, Manifest, PositionsRecord
from effc.compiler.source import SourceModel
from effc.passes.attention_settings import AttentionSection
from effc.passes.base import PassResult
from effc.passes.extend_positions import ExtendPositions
from effc.passes.position_reach import reach_of
from effc.passes.positions_settings import PositionsSection
from effc.passes.sparse_positions import SparsePositions
from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.registry import parse_form


def extend_positions(
    source: SourceModel, settings: PositionsSection, attention: AttentionSection | None = None
) -> PassResult[Any]:
    """Let ``source`` take ``settings.max_length`` tokens: model, tokenizer and all that is said of it.

    Args:
        attention: what will be asked of the attention, None if it stays dense.

    Raises:
        PreconditionError, PassFailedError: see :class:`ExtendPositions`.
    """
    step = ExtendPositions(settings, None if attention is None else _widest(attention))
    result = step.run(source.model)
    step.ensures(source.model)
    found = result.metrics
    if source.processor is not None:
        source.processor.model_max_length = settings.max_length
    source.positions = PositionsRecord(
        trained=found["from"], max_length=found["to"], method=found["method"], rows=found.get("rows", {})
    )
    source.max_length = settings.max_length
    _recount(source)
    return result


def thin_positions(
    source: SourceModel, settings: PositionsSection, layers: Sequence[AttentionLayer]
) -> PassResult[Any]:
    """Cut position tables down to what the attention of ``layers`` needs.

    Raises:
        PreconditionError, PassFailedError: see :class:`SparsePositions`.
    """
    step = SparsePositions(settings, [(layer.layer, parse_form(layer.pattern), layer.causal) for layer in layers])
    result = step.run(source.model)
    step.ensures(source.model)
    before = source.positions or PositionsRecord(trained=source.max_length, max_length=source.max_length)
    rows = {name: kept["rows"] for name, kept in result.metrics["kept"].items()}
    source.positions = before.model_copy(update={"rows": rows, "formula": result.metrics["formula"]})
    _recount(source)
    return result


def repeat_positions(source: SourceModel, settings: PositionsSection, manifest: Manifest, thin: bool = True) -> None:
    """Change the positions of a source model, loaded anew, as they were changed for an artifact.

    Args:
        settings: those of the artifact's recipe.
        thin: False leaves tables whole that are sparse in the artifact.
    """
    done = manifest.positions
    if done is None:
        return
    if done.method is not None:
        extend_positions(source, settings.model_copy(update={"method": done.method}))
    if thin and done.formula is not None:
        thin_positions(source, settings, manifest.attention)


def _recount(source: SourceModel) -> None:
    source.parameters = sum(parameter.numel() for parameter in source.model.parameters())


def _widest(attention: AttentionSection) -> int | None:
    """The furthest distance that any layer will see, None if that grows with the text or is not known yet."""
    forms = [attention.request, *(parse_form(text) for text in attention.layers.values())]
    if attention.exclude or not all(isinstance(form, AttentionForm) for form in forms):
        return None
    reaches = [reach_of(form, causal) for form in forms if isinstance(form, AttentionForm) for causal in (False, True)]
    distances = [None if reach is None else reach.distance for reach in reaches]
    known = [distance for distance in distances if distance is not None]
    return max(known) if len(known) == len(distances) else None
