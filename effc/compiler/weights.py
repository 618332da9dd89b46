"""Telling a source model whose weights were changed from the one that was loaded."""

from __future__ import annotations

import hashlib

import torch

from effc.compiler.source import SourceModel


def note_changed_weights(source: SourceModel) -> None:
    """Call after anything that changes weights or shapes of ``source.model``: caches go by ``source.weights``."""
    source.weights = weights_digest(source.model)


def weights_digest(model: torch.nn.Module) -> str:
    """A hash of names, shapes and values of all weights and buffers, in hex."""
    content = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = tensor.detach().cpu().contiguous()
        content.update(f"{name}:{tuple(values.shape)}:{values.dtype}".encode())
        content.update(values.flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()
