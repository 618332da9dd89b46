"""Quality of an artifact at lengths that its source model was not made for.

The untouched model cannot run there. What can be told apart is what the artifact's attention, sparse positions and
quantization cost: the reference is the source model in torch, dense and in fp32, with positions extended alike. What
the extension itself costs shows only on data with labels, or in the comparison up to the source model's own length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from effc.compiler.data import Sample, random_batches, tokenize
from effc.compiler.inputs import input_names
from effc.compiler.manifest import ExtendedRecord, Manifest
from effc.compiler.positions import repeat_positions
from effc.compiler.source import SourceModel
from effc.compiler.verify import choose_quality, compare, torch_runner
from effc.compiler.verify_vocabulary import OwnTokens, with_left_tokens
from effc.passes.positions_settings import PositionsSection

if TYPE_CHECKING:
    from effc.compiler.compiled_model import CompiledModel

REFERENCE = "the source model in torch, dense, with positions extended alike"
# Dense attention over long texts takes long, so few are compared.
_SAMPLES = 4


def reaches_beyond(manifest: Manifest, source: SourceModel) -> bool:
    """Whether an artifact takes longer texts than its source model, loaded untouched, does."""
    done = manifest.positions
    if done is None or done.max_length is None or source.max_length is None:
        return False
    return done.max_length > source.max_length


def verify_extended(
    source: SourceModel,
    compiled: CompiledModel,
    texts: Sequence[Sample] | None,
    seed: int,
    source_ids: Sequence[int] | None = None,
) -> ExtendedRecord | None:
    """Compare at the longest length that the texts give; None if no text is longer than the source model takes.

    Args:
        source: loaded untouched; its positions are extended here.
        texts: random tokens of the artifact's full length if None.
        source_ids: the source's id of each token, where the vocabulary was pruned; ``texts`` hold those alone.
    """
    manifest, trained = compiled.manifest, source.max_length or 0
    repeat_positions(source, PositionsSection.model_validate(manifest.recipe["positions"]), manifest, thin=False)
    limit = source.max_length
    assert limit is not None
    batches: list[Mapping[str, NDArray[Any]]]
    if texts is None:
        drawn: Iterable[Mapping[str, NDArray[Any]]] = random_batches(source, _SAMPLES // 2, limit, 1, seed)
        batches = list(drawn if source_ids is None else with_left_tokens(drawn, source, source_ids))
    else:
        longest = sorted(texts, key=lambda sample: -len(sample.text))[:_SAMPLES]
        found: Iterable[Mapping[str, NDArray[Any]]] = tokenize(
            longest, source.processor, limit, 1, "np", input_names(source)
        )
        batches = [batch for batch in found if batch["input_ids"].shape[1] > trained]
        if source_ids is not None:
            batches = [batch for batch in batches if np.isin(batch["input_ids"], source_ids).all()]
    if not batches:
        return None
    quality = choose_quality(source, None, limit, seed)
    own = None if source_ids is None else OwnTokens(source_ids)
    result = compare(torch_runner(source), lambda batch: compiled(**batch), batches, quality, own=own)
    length = max(int(np.shape(batch["input_ids"])[1]) for batch in batches)
    return ExtendedRecord(
        reference=REFERENCE,
        length=length,
        samples=result.samples,
        outputs=result.outputs,
        quality_drop=result.score.drop,
    )
