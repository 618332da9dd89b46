"""Switch a source model to effc's attention, and assign the forms that a recipe names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effc.compiler.exported import describe_layers
from effc.compiler.inputs import probe_inputs
from effc.compiler.manifest import AttentionLayer
from effc.compiler.source import SourceModel
from effc.passes.attention_settings import AttentionSection
from effc.passes.base import PassResult
from effc.passes.observed_attention import ObservedAttention
from effc.passes.rewrite_attention import RewriteAttention, describe


@dataclass(frozen=True)
class Rewritten:
    """The record of the rewrite pass and the layers it found.

    Attributes:
        unwanted: modules that should have been rewritten and could not be, with the reason.
    """

    result: PassResult[Any]
    layers: list[AttentionLayer]
    unwanted: list[tuple[str, str]]
    observed: ObservedAttention


def observe_attention(source: SourceModel) -> ObservedAttention:
    """Switch ``source.model`` to effc's attention, every module computing what it always did."""
    return ObservedAttention(source.model, probe_inputs(source), source.processor, source.max_length)


def rewrite(source: SourceModel, settings: AttentionSection, observed: ObservedAttention | None = None) -> Rewritten:
    """Assign the attention of ``source.model`` as the recipe says.

    Args:
        settings: must name a form for every layer, not a search.
        observed: the model's modules, where they have been observed already.
    """
    observed = observed or observe_attention(source)
    attention = RewriteAttention(settings, {}, observed=observed)
    result = attention.run(source.model)
    return Rewritten(result, describe_layers(describe(attention.layers)), attention.unwanted(), observed)
