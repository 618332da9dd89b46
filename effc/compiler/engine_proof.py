"""What a CPU can show of the graphs that engines are built from, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from effc.compiler.inputs import ragged_inputs
from effc.compiler.metrics import deviation
from effc.compiler.source import SourceModel
from effc.errors import PassFailedError
from effc.exporters.engine_caches import MASK, PAST, PRESENT
from effc.exporters.generation_export import positions_of, takes_positions

# Prompts of the proof, longer than a usual window, and the tokens that are then taken one by one.
_PROOF_LENGTHS, _PROOF_STEPS = (300, 61), 4
# Relative; steps and the whole differ in the order of their sums only.
_FAITHFUL = 1e-3


def graph_error(reference: Path, graph: Path, inputs: Mapping[str, Any]) -> float:
    """Largest relative error of an output of a graph to that of the reference, over all tokens that are no padding.

    A graph that gives the last position only is compared there.

    Raises:
        PassFailedError: if an output is not finite.
    """
    feeds = {name: np.asarray(value) for name, value in inputs.items()}
    expected, found = _run(_session(reference), feeds), _run(_session(graph), feeds)
    real = feeds[MASK].astype(bool) if MASK in feeds else None
    worst = 0.0
    for name, value in found.items():
        if name.startswith(PRESENT):
            continue
        if not np.isfinite(value).all():
            raise PassFailedError(
                f"The output '{name}' is not finite in the engine's precision.",
                "Give --engine-precision=bf16, which has the range of fp32, or fp32.",
            )
        whole, part, kept = expected[name].astype(np.float64), value.astype(np.float64), real
        if whole.shape != part.shape:
            whole, kept = whole[:, -part.shape[1] :], None if real is None else real[:, -part.shape[1] :]
        if kept is not None and part.shape[:2] == kept.shape:
            whole, part = whole[kept], part[kept]
        worst = max(worst, float(np.linalg.norm(part - whole)) / max(float(np.linalg.norm(whole)), 1e-30))
    return worst


def step_error(
    source: SourceModel, forward: Path, prefill: Path, decode: Path, *, exact: bool, pads: bool = False
) -> float:
    """How far decoding token by token is from the forward pass: relative error of the logits.

    Args:
        forward, prefill, decode: graphs in fp32.
        exact: whether they have to agree; quantized ones round a token's neighbours differently in each.
        pads: padding in front changes nothing, see :func:`pads_in_front`. The forward pass then has it behind, because
            a graph that counts its positions itself would count it, which rotary embeddings hide from softmax alone.

    Raises:
        PassFailedError: if they do not agree, or are not finite.
    """
    limit = source.max_length or max(_PROOF_LENGTHS) + _PROOF_STEPS
    steps = min(_PROOF_STEPS, limit // 2)
    inputs = ragged_inputs(source, [min(length + steps, limit) for length in _PROOF_LENGTHS], side="left")
    ids, mask = inputs["input_ids"].numpy(), inputs[MASK].numpy()
    positions = positions_of(inputs[MASK]).numpy()
    reference = _reference(forward, ids, mask, positions, behind=pads)[:, -steps - 1 :]
    given = {"position_ids": positions} if takes_positions(source.model) else {}

    def feeds(begin: int, end: int, seen: int) -> dict[str, NDArray[Any]]:
        cut = {"input_ids": ids[:, begin:end], **{name: value[:, begin:end] for name, value in given.items()}}
        return {**cut, MASK: mask[:, :seen]}

    prompt = ids.shape[1] - steps
    outputs = _run(_session(prefill), feeds(0, prompt, prompt))
    found = [outputs["logits"][:, -1]]
    session = _session(decode)
    for place in range(prompt, ids.shape[1]):
        past = {name.replace(PRESENT, PAST, 1): value for name, value in outputs.items() if name.startswith(PRESENT)}
        outputs = _run(session, feeds(place, place + 1, place + 1) | past)
        found.append(outputs["logits"][:, -1])
    error = deviation(reference, np.stack(found, axis=1), np.ones(reference.shape[:2]), logits=True).relative_error
    if not (error <= _FAITHFUL if exact else np.isfinite(error)):
        raise PassFailedError(
            f"The decode graph is off by {error:.2g} from the forward pass.",
            "Compile with --no-generation, and report this model.",
        )
    return error


def _reference(
    forward: Path, ids: NDArray[Any], mask: NDArray[Any], positions: NDArray[Any], *, behind: bool
) -> NDArray[np.float32]:
    """Logits of the forward pass, the padding in front; ``behind``: but computed with it behind the texts."""
    order = np.argsort(mask == 0, axis=1, kind="stable") if behind else np.tile(np.arange(ids.shape[1]), (len(ids), 1))
    feeds = {"input_ids": ids, MASK: mask, "position_ids": positions}
    feeds = {name: np.take_along_axis(value, order, axis=1) for name, value in feeds.items()}
    if not _takes(forward, "position_ids"):
        del feeds["position_ids"]
    logits: NDArray[np.float32] = _run(_session(forward), feeds)["logits"]
    return np.take_along_axis(logits, np.argsort(order, axis=1)[..., None], axis=1)


def _takes(path: Path, name: str) -> bool:
    return any(value.name == name for value in _session(path).get_inputs())


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # What is compared is the graph as it stands. ONNX Runtime's fusions refuse FP8 products, and its own rounding of
    # fused INT8 ones differs.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(session: onnxruntime.InferenceSession, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    names = [value.name for value in session.get_outputs()]
    wanted = {value.name: feeds[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(None, wanted), strict=True))
