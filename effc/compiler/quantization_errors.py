"""What quantizing each layer alone changes in a model's output, of all layers from one run.

The graph has every layer in fp32 and quantized side by side and says what quantizing changes in the layer's own output,
``d``. Torch says how the model's output answers: with ``g`` the gradient of a random direction of the output,
``E[(g . d)^2]`` is the square of what ``d`` changes in the output, to first order. For predictions that is twice their
Kullback-Leibler divergence, by the Fisher information, whose use for quantization is that of Optimal Brain Surgeon
(Hassibi and Stork, 1993), HAWQ (Dong et al., 2019) and the method ``gradient`` of NVIDIA ModelOpt's auto_quantize.

To run the whole model for each layer would take as many runs as there are layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray

from effc.compiler.calibration_text import CalibrationText
from effc.compiler.inputs import example_inputs
from effc.compiler.layer_places import Place, find_places
from effc.compiler.source import SourceModel
from effc.passes.prune_calibration import OUTPUTS, output_direction, real_rows, token_masks
from effc.passes.quantize_calibrate import session_with_outputs
from effc.passes.quantize_replace import Beside

Array = NDArray[Any]

KL, CHANGE = "Kullback-Leibler divergence of the predictions, nats", "squared relative change of the output"
# Inputs on which graph and torch are compared: enough rows for layers that see one row of each sample.
_SAMPLES, _LENGTH = 8, 16
# Random directions of a batch's output together, so that few rows of output are estimated as well as many.
_DIRECTIONS = 256


@dataclass
class LayerErrors:
    """By how much quantizing a layer alone changes the output, per row.

    Attributes:
        name: what the figures are, :data:`KL` or :data:`CHANGE`.
        errors: by layer; those that no module of the torch model computes are missing.
    """

    name: str = CHANGE
    errors: dict[str, float] = field(default_factory=dict)


def layer_errors(
    source: SourceModel, model: ir.Model, beside: Beside, texts: CalibrationText, tell: Callable[[str], None]
) -> LayerErrors:
    """Estimate the error of every layer.

    Args:
        source: its model is what the graph was exported from.
        model: a graph whose layers have their quantized forms ``beside`` them.
        tell: told of every batch.
    """
    values = [value for layer in beside.layers for value in (layer.output, layer.change)]
    with session_with_outputs(model, values) as session:
        places = zip(beside.layers, _places(source, session, beside), strict=True)
        found = [(layer, place) for layer, place in places if place is not None]
        if not found:
            return LayerErrors()
        sums = _Sums(source, [layer.name for layer, _ in found])
        for number, batch in enumerate(texts.batches, 1):
            tell(f"sensitivity, batch {number} of {len(texts.batches)}")
            arrays = _run(session, [str(layer.change.name) for layer, _ in found], batch)
            rows = zip(found, arrays, strict=True)
            sums.add(batch, [_Change(layer.name, place, torch.from_numpy(array)) for (layer, place), array in rows])
    return sums.result()


def error_name(outputs: Mapping[str, Any]) -> str:
    """What errors are of a model with these outputs."""
    name = next(name for name in OUTPUTS if outputs.get(name) is not None)
    return KL if name == "logits" and outputs[name].shape[-1] > 1 else CHANGE


def measured_error(expected: Mapping[str, Array], actual: Mapping[str, Array], batch: Mapping[str, Any]) -> float:
    """The same of a batch's outputs as they are, see :class:`LayerErrors`."""
    name = next(name for name in OUTPUTS if name in expected)
    masks = token_masks(_tensors(batch))
    before, after = (real_rows(torch.from_numpy(outputs[name]), masks) for outputs in (expected, actual))
    if error_name(expected) == KL:
        wanted, found = before.log_softmax(dim=-1), after.log_softmax(dim=-1)
        return float(torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True))
    return float(((after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-6)).square().mean())


class _Sums:
    """Squares of what changes of layers change in the output, over batches."""

    def __init__(self, source: SourceModel, layers: Iterable[str]):
        self._model = source.model
        takes_cache = "use_cache" in inspect.signature(source.model.forward).parameters
        self._extra = {"use_cache": False} if takes_cache else {}
        self._generator = torch.Generator().manual_seed(0)
        # What the output does not depend on changes nothing in it.
        self._squares = dict.fromkeys(layers, 0.0)
        self._rows, self._name = 0, CHANGE

    def add(self, batch: Mapping[str, Any], changes: list[_Change]) -> None:
        """Add a batch and what layers add to their outputs on it."""
        inputs = _tensors(batch)
        masks = token_masks(inputs)

        def take(change: _Change, gradient: torch.Tensor) -> None:
            rows = change.rows.reshape(-1, change.rows.shape[-1])
            part = gradient.reshape(-1, gradient.shape[-1])[:, change.place.start :][:, : rows.shape[1]]
            answer = (part * rows * change.place.factor).sum(dim=-1)
            self._squares[change.layer] += float(answer.double().square().sum())

        with _gradients(self._model, changes, take), torch.enable_grad():
            outputs = self._model(**inputs, **self._extra, return_dict=True)
            name = next(name for name in OUTPUTS if outputs.get(name) is not None)
            rows = max(1, len(real_rows(outputs[name], masks)))
            self._name = error_name(outputs)
            draws = -(-_DIRECTIONS // rows) if outputs[name].requires_grad else 0
            for draw in range(draws):
                direction = output_direction(name, outputs[name], masks, self._generator)
                direction.backward(retain_graph=draw < draws - 1)
        self._rows += rows * max(1, draws)

    def result(self) -> LayerErrors:
        """The errors over all batches."""
        # The Fisher information counts the divergence twice.
        share = (0.5 if self._name == KL else 1.0) / self._rows
        errors = {name: share * squares for name, squares in self._squares.items()}
        return LayerErrors(self._name, errors)


@dataclass(frozen=True)
class _Change:
    """What quantizing adds to the output of a layer: ``rows [..., width]``, as the graph computes it."""

    layer: str
    place: Place
    rows: torch.Tensor


@contextmanager
def _gradients(
    model: torch.nn.Module, changes: Iterable[_Change], take: Callable[[_Change, torch.Tensor], None]
) -> Iterator[None]:
    """Hands the gradient at each place to ``take`` as soon as it is known, so that not all are held at a time."""
    listening: dict[str, dict[int, list[_Change]]] = {}
    for change in changes:
        listening.setdefault(change.place.module, {}).setdefault(change.place.call, []).append(change)
    counts = dict.fromkeys(listening, 0)

    def hook_of(name: str) -> Callable[..., Any]:
        def hook(_: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
            # No parameter asks for gradients, so the first place has to. A copy may be changed in place behind it.
            output = output if output.requires_grad else output.detach().requires_grad_(True).clone()
            for change in listening[name].get(counts[name], []):
                output.register_hook(lambda gradient, change=change: take(change, gradient))
            counts[name] += 1
            return output

        return hook

    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [model.get_submodule(name).register_forward_hook(hook_of(name)) for name in listening]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()


def _places(source: SourceModel, session: onnxruntime.InferenceSession, beside: Beside) -> list[Place | None]:
    """Where torch computes each layer."""
    length = min(_LENGTH, source.max_length or _LENGTH)
    inputs = example_inputs(source, batch=_SAMPLES, length=length)
    outputs = _run(session, [str(layer.output.name) for layer in beside.layers], inputs)
    layers = [(layer.name, torch.from_numpy(output)) for layer, output in zip(beside.layers, outputs, strict=True)]
    return find_places(source.model, lambda: source.model(**inputs), layers)


def _tensors(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(np.ascontiguousarray(value)) for name, value in batch.items()}


def _run(session: onnxruntime.InferenceSession, names: list[str], batch: Mapping[str, Any]) -> list[Array]:
    # Asked for nothing, a session returns everything.
    feeds = {value.name: np.asarray(batch[value.name]) for value in session.get_inputs()}
    return list(session.run(names, feeds)) if names else []
