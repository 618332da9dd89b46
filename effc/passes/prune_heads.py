"""Remove attention heads; the projections around them shrink.

With grouped queries a key/value head goes together with all queries that read it, so that the groups stay equal. Where
all queries share one key/value head, single query heads go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from effc.passes.prune_channels import PruneChannels, Site
from effc.passes.prune_config import HEAD_KEYS, KV_HEAD_KEYS, adopt, inner_configs, resized
from effc.passes.prune_slice import keep_inputs, keep_outputs, weight_of
from effc.passes.prune_structure import AttentionParts, attention_parts

# What attention modules and configs may remember of their sizes.
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_WIDTHS = ("all_head_size", "inner_dim", "split_size", "embed_dim", "hidden_size")
_HEAD_SIZE_KEYS = ("head_dim", "d_kv")


class PruneHeads(PruneChannels):
    """Remove ``settings.share`` of the heads of every layer (or of all layers together: ``uniform: false``)."""

    name: ClassVar[str] = "prune-heads"
    version: ClassVar[int] = 1
    unit = "heads"

    def sites(self, model: PreTrainedModel) -> tuple[list[Site], list[tuple[str, str]]]:
        """Attention modules whose heads can be told apart."""
        found, skipped = [], []
        parts = attention_parts(model)
        biased = {_stack_and_kind(attention.name) for attention in parts if attention.bias}
        stacks = {stack for stack, _ in biased}
        for attention in parts:
            if reason := _across_heads(model, attention):
                skipped.append((attention.name, reason))
                continue
            place = _stack_and_kind(attention.name)
            tied = "/".join(place) if place[0] in stacks else None
            width = attention.head_dim * (1 if attention.kv_heads == 1 else attention.groups)
            units = attention.heads * attention.head_dim // width
            found.append(Site(attention.name, attention.output, units, width, tied=tied))
        return found, skipped

    def weights_of(self, model: PreTrainedModel, site: Site) -> torch.Tensor:
        """Sums of squares of the rows that make the values; of query heads with shared values, of the queries."""
        attention = next(parts for parts in attention_parts(model) if parts.name == site.name)
        query, _, value = _rows(attention, list(range(site.units)))
        rows, name = (query, attention.query) if attention.kv_heads == 1 else (value, attention.value)
        squares = weight_of(model.get_submodule(name))[rows].double().square().sum(1)
        per_unit: torch.Tensor = squares.unflatten(0, (site.units, -1)).sum(-1)
        return per_unit

    def shrink(self, model: PreTrainedModel, kept: Mapping[str, list[int]]) -> None:
        """Take the heads out of the four projections, and of a bias by distance that belongs to them."""
        sizes: set[tuple[int, int, int, int, int]] = set()
        for attention in attention_parts(model):
            if attention.name not in kept:
                continue
            stays = kept[attention.name]
            query, key, value = _rows(attention, stays)
            if attention.fused:
                keep_outputs(model.get_submodule(attention.query), torch.cat((query, key, value)))
            else:
                for name, rows in ((attention.query, query), (attention.key, key), (attention.value, value)):
                    keep_outputs(model.get_submodule(name), rows)
            first = _rows(attention, stays)[0]
            keep_inputs(model.get_submodule(attention.output), first)
            if attention.bias:
                _keep_columns(model.get_submodule(attention.bias), first[:: attention.head_dim] // attention.head_dim)
            heads = len(first) // attention.head_dim
            kv_heads = attention.kv_heads if attention.kv_heads == 1 else len(stays)
            _tell(model.get_submodule(attention.name), attention, heads, kv_heads)
            sizes.add((attention.heads, heads, attention.kv_heads, kv_heads, attention.head_dim))
        _tell_config(model, sizes)


def _rows(attention: AttentionParts, kept: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of the query, key and value projections that the units ``kept`` need; of a fused one, rows of that."""
    size, units = attention.head_dim, torch.tensor(kept)
    alone = attention.kv_heads == 1
    width = size if alone else size * attention.groups
    query = (units[:, None] * width + torch.arange(width)).flatten()
    key = torch.arange(size) if alone else (units[:, None] * size + torch.arange(size)).flatten()
    if not attention.fused:
        return query, key, key
    return query, attention.heads * size + key, (attention.heads + attention.kv_heads) * size + key


def _across_heads(model: PreTrainedModel, attention: AttentionParts) -> str | None:
    """Why heads cannot be taken apart: weights that belong to all of them, such as a norm over their whole width."""
    module = model.get_submodule(attention.name)
    known = {attention.query, attention.key, attention.value, attention.output, attention.bias}
    widths = {attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim}
    for name, parameter in module.named_parameters():
        owner = f"{attention.name}.{name}".rpartition(".")[0]
        if owner in known:
            continue
        if "norm" in name and parameter.ndim == 1 and len(parameter) in widths and len(parameter) != attention.head_dim:
            inside = owner.rpartition(".")[0] == attention.name and not name.startswith(("layer_norm", "LayerNorm"))
            if inside and name.split(".")[0] in ("q_norm", "k_norm", "query_norm", "key_norm"):
                return f"its {name.split('.')[0]} spans all heads, so that none can go without changing the others"
        if parameter.ndim == 1 and len(parameter) == attention.heads and name in ("sinks", "sink"):
            return "it has a learned sink for each head"
    return None


def _stack_and_kind(name: str) -> tuple[str, str]:
    """Of ``encoder.block.3.layer.0.SelfAttention``: the stack, and what follows the layer's number."""
    match = re.match(r"(.*?)\.?\d+\.(.*)", name)
    return (match[1], match[2]) if match else ("", name)


def _keep_columns(table: nn.Module, kept: torch.Tensor) -> None:
    assert isinstance(table, nn.Embedding)
    table.weight = nn.Parameter(table.weight.data[:, kept].clone(), requires_grad=table.weight.requires_grad)
    table.embedding_dim = len(kept)


def _tell(module: nn.Module, attention: AttentionParts, heads: int, kv_heads: int) -> None:
    """Let an attention module's own numbers say what it has now."""
    width = attention.heads * attention.head_dim
    for names, old, new in (
        (_HEADS, attention.heads, heads),
        (_KV_HEADS, attention.kv_heads, kv_heads),
        (_WIDTHS, width, heads * attention.head_dim),
    ):
        for name in names:
            if vars(module).get(name) == old:
                setattr(module, name, new)
    if "num_key_value_groups" in vars(module):
        vars(module)["num_key_value_groups"] = heads // kv_heads


def _tell_config(model: PreTrainedModel, sizes: set[tuple[int, int, int, int, int]]) -> None:
    """Only where the config holds the size of a head can it say another number of heads; elsewhere that would be
    another size.
    """
    for old, new, old_kv, new_kv, head_dim in sizes:
        edits = resized(model.config, HEAD_KEYS, old, new) | resized(model.config, KV_HEAD_KEYS, old_kv, new_kv)
        if not any(getattr(model.config, key, None) == head_dim for key in _HEAD_SIZE_KEYS):
            edits["head_dim"] = head_dim
        if adopt(model, edits):
            for config in inner_configs(model):
                for key, value in edits.items():
                    if hasattr(config, key):
                        setattr(config, key, value)
