"""Training with the rounding that the INT8 export will do (quantization-aware finetuning, Jacob et al., 2018).

The arithmetic is that of ``quantize_numbers``: weights symmetric int8 with a scale per output channel, activations
uint8 with one scale and zero point per tensor, found in every run as ``DynamicQuantizeLinear`` finds them, embedding
tables int8 with a scale per row. Gradients pass through the rounding unchanged (Bengio et al., 2013).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from effc.errors import PreconditionError
from effc.passes.quantize_exclude import LEAST_TABLE_BYTES, LEAST_WIDTH
from effc.passes.quantize_numbers import LEAST_SCALE
from effc.passes.quantize_settings import QuantizationSection

# A product that reads one activation times another, whose outliers the export leaves in fp32.
_GATED = (("gate_proj", "up_proj", "down_proj"), ("wi_0", "wi_1", "wo"), ("w1", "w3", "w2"), ("Wi", "Wi", "Wo"))


def check_fake_quant(settings: QuantizationSection) -> None:
    """Make sure that the export will do what can be imitated.

    Raises:
        PreconditionError: naming the setting.
    """
    mode = settings.mode
    if mode != "int8":
        raise PreconditionError(
            f"Fake quantization imitates the INT8 of weights and activations, and the model is to be '{mode}'.",
            "Compile with --quant=int8, or leave recover.fake_quant out.",
        )


def quantized_layers(model: PreTrainedModel, settings: QuantizationSection) -> tuple[list[str], list[str]]:
    """Names of the linear layers and of the embedding tables that will be INT8.

    Found on modules by the rules that the export has for graph nodes: no heads, no products behind a gate, nothing
    small, nothing that the settings exclude.
    """
    names = {module: name for name, module in model.named_modules()}
    heads = _heads(model)
    gated = {module for parent in model.modules() for module in _behind_gates(parent)}
    linears, tables = [], []
    for module, name in names.items():
        if any(fnmatchcase(name, glob) or fnmatchcase(f"{name}.weight", glob) for glob in settings.exclude):
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            small = min(module.weight.shape) < LEAST_WIDTH
            if not small and module not in heads and module not in gated:
                linears.append(name)
        elif isinstance(module, nn.Embedding) and settings.embeddings:
            tied = any(module.weight is head.weight for head in heads)
            if 4 * module.weight.numel() >= LEAST_TABLE_BYTES and not tied:
                tables.append(name)
    return linears, tables


@contextmanager
def fake_quantized(model: PreTrainedModel, settings: QuantizationSection) -> Iterator[tuple[list[str], list[str]]]:
    """Within the block the layers that will be INT8 compute with rounded weights and inputs.

    Weights themselves stay unrounded floats, under the names they always had.

    Yields:
        the names of the linear layers and of the tables.
    """
    check_fake_quant(settings)
    linears, tables = quantized_layers(model, settings)
    if not linears:
        raise PreconditionError("The model has no layer that INT8 would change.", "Leave recover.fake_quant out.")
    modules = dict(model.named_modules())
    top = 63 if settings.reduce_range else 127
    patched: list[nn.Module] = []
    handles = []
    try:
        for name in linears:
            modules[name].forward = _linear(modules[name], top, settings)
            patched.append(modules[name])
        for name in tables:
            handles.append(modules[name].register_forward_hook(lambda _, __, rows: fake_quantize_rows(rows)))
        yield linears, tables
    finally:
        for module in patched:
            del module.forward
        for handle in handles:
            handle.remove()


def fake_quantize_channels(weight: torch.Tensor, top: int = 127, axis: int = 0) -> torch.Tensor:
    """A weight rounded to symmetric int8 with one scale per slice of ``axis``, in its own units."""
    weight = weight.float()
    with torch.no_grad():
        scale = (weight.abs().amax(dim=1 - axis) / top).clamp_min(LEAST_SCALE)
        zeros = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zeros, axis, -top, top)


def fake_quantize_tensor(values: torch.Tensor) -> torch.Tensor:
    """Activations rounded to uint8 with one scale and zero point, of the range that they have, widened to hold 0."""
    values = values.float()
    with torch.no_grad():
        low, high = values.amin().clamp_max(0), values.amax().clamp_min(0)
        scale = ((high - low) / 255).clamp_min(LEAST_SCALE)
        zero = torch.clamp(torch.round(-low / scale), 0, 255).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, 255)


def fake_quantize_rows(rows: torch.Tensor) -> torch.Tensor:
    """Vectors ``[..., width]`` rounded to symmetric int8 with a scale each."""
    flat = rows.float().flatten(0, -2)
    return fake_quantize_channels(flat).view(rows.shape)


def _fake_quantize_tokens(values: torch.Tensor) -> torch.Tensor:
    """Activations rounded to uint8 with a scale and zero point per token."""
    values = values.float()
    with torch.no_grad():
        low, high = values.amin(dim=-1, keepdim=True).clamp_max(0), values.amax(dim=-1, keepdim=True).clamp_min(0)
        scale = ((high - low) / 255).clamp_min(LEAST_SCALE)
        zero = torch.clamp(torch.round(-low / scale), 0, 255)
        rounded = (torch.clamp(torch.round(values / scale) + zero, 0, 255) - zero) * scale
    return values + (rounded - values).detach()


def _linear(module: Any, top: int, settings: QuantizationSection) -> Callable[[torch.Tensor], torch.Tensor]:
    by_token = getattr(settings, "activations", "tensor") == "token"
    transposed = isinstance(module, Conv1D)

    def forward(values: torch.Tensor) -> torch.Tensor:
        weight = fake_quantize_channels(module.weight, top, axis=1 if transposed else 0)
        rounded = _fake_quantize_tokens(values) if by_token else fake_quantize_tensor(values)
        return functional.linear(rounded, weight.t() if transposed else weight, module.bias)

    return forward


def _heads(model: PreTrainedModel) -> set[Any]:
    """Modules whose output is the model's: those outside its body, but for a body without a head."""
    body = getattr(model, model.base_model_prefix, model) if model.base_model_prefix else model
    inside = set(body.modules())
    heads = {module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)) and module not in inside}
    pooler = getattr(body, "pooler", None)
    if body is model and isinstance(pooler, nn.Module):
        heads |= {module for module in pooler.modules() if isinstance(module, nn.Linear)}
    return heads


def _behind_gates(parent: nn.Module) -> Sequence[nn.Module]:
    for *gate, behind in _GATED:
        found = [getattr(parent, name, None) for name in (*gate, behind)]
        if all(isinstance(module, nn.Linear) for module in found):
            return [found[-1]]  # type: ignore[list-item]
    return []
