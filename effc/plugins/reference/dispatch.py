"""One function for every form: what it computes, and what its learned parameters start from."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch

import torch

from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.heads import HeadForms


@singledispatch
def attend(
    form: AttentionForm,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention as ``form`` defines it; differentiable in every tensor.

    Where ``query_length < key_length`` the queries are the last ones. A row that sees no key gives zeros. What hidden
    keys (padding) hold has no influence.

    Args:
        query: ``[batch, heads, query_length, head_dim]``.
        key: ``[batch, kv_heads, key_length, head_dim]``; ``heads`` is a multiple of ``kv_heads`` (grouped queries,
            Ainslie et al., 2023).
        value: ``[batch, kv_heads, key_length, head_dim]``.
        scale: factor on the scores, usually ``head_dim ** -0.5``.
        causal: also hide keys behind the query.
        key_mask: ``[batch, key_length]`` bool, False hides a key (padding).
        extras: the form's further inputs by name, see ``form.extra_inputs``.

    Returns:
        ``[batch, heads, query_length, head_dim]`` in the dtype of ``query``.
    """
    raise NotImplementedError(f"There is no reference of {type(form).__name__}.")


@singledispatch
def initial_parameters(
    form: AttentionForm, num_heads: int, kv_heads: int, head_dim: int, seed: int
) -> dict[str, torch.Tensor]:
    """What the form's learned inputs start from, by name, in fp32; empty for forms that have none.

    ``seed`` tells layers apart, so that random features are not the same in all of them.
    """
    return {}


@attend.register
def _(
    form: HeadForms,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    output = torch.empty_like(query)
    for number, (part, heads) in enumerate(form.parts):
        rows, part_key, part_value = select_heads(heads, query, key, value)
        output[:, list(heads)] = attend(
            part,
            rows,
            part_key,
            part_value,
            scale=scale,
            causal=causal,
            key_mask=key_mask,
            extras=part_extras(extras or {}, number, heads),
        )
    return output


@initial_parameters.register
def _(form: HeadForms, num_heads: int, kv_heads: int, head_dim: int, seed: int) -> dict[str, torch.Tensor]:
    return {
        f"part{number}_{name}": tensor
        for number, (part, heads) in enumerate(form.parts)
        for name, tensor in initial_parameters(
            part, len(heads), selected_kv_heads(heads, num_heads, kv_heads), head_dim, seed
        ).items()
    }


def selected_kv_heads(heads: tuple[int, ...], num_heads: int, kv_heads: int) -> int:
    """How many key/value heads :func:`select_heads` gives for these query heads."""
    groups = num_heads // kv_heads
    wanted = sorted({head // groups for head in heads})
    whole = sorted(heads) == [kv * groups + g for kv in wanted for g in range(groups)]
    return len(wanted) if whole else len(heads)


def select_heads(
    heads: tuple[int, ...], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The queries of some heads with their keys and values, ``[batch, ..., length, head_dim]`` each.

    Keys stay grouped where whole groups are taken and are repeated for each head otherwise.
    """
    groups = query.shape[1] // key.shape[1]
    kept = selected_kv_heads(heads, query.shape[1], key.shape[1])
    kv = [head // groups for head in heads]
    if kept != len(heads):
        kv = kv[::groups]
    return query[:, list(heads)], key[:, kv], value[:, kv]


def part_extras(extras: Mapping[str, torch.Tensor], number: int, heads: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The extra inputs of one part of a :class:`HeadForms`: its own parameters, its heads' biases, the shared rest."""
    own = f"part{number}_"
    result = {}
    for name, tensor in extras.items():
        if name.startswith(own):
            result[name.removeprefix(own)] = tensor
        elif not name.startswith("part"):
            result[name] = tensor[list(heads)] if name.startswith("distance_") else tensor
    return result
