"""Linear attention in torch: the quadratic definition, the chunked O(length) form and the recurrence for decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch

import torch

from effc.errors import PreconditionError
from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.linear import CAUSAL_CHUNK, EMPTY_STABILISER, Linear, LinearForm
from effc.plugins.reference.dispatch import attend

State = dict[str, torch.Tensor]
"""``state [batch, kv_heads, features, head_dim]``, ``normaliser [batch, kv_heads, features]`` and, for forms that have
one, ``stabiliser [batch, kv_heads]``: the former two are to be multiplied by its exponential."""


@dataclass(frozen=True)
class Features:
    """Feature maps of queries and keys.

    Attributes:
        query: ``[batch, heads, query_length, features]``, up to a positive factor per row, which cancels.
        key: ``[batch, kv_heads, key_length, features]``, to be multiplied by ``exp(exponent)``.
        exponent: ``[batch, kv_heads, key_length]``, or None for zeros.
    """

    query: torch.Tensor
    key: torch.Tensor
    exponent: torch.Tensor | None = None


@singledispatch
def feature_maps(
    form: LinearForm, query: torch.Tensor, key: torch.Tensor, scale: float, extras: Mapping[str, torch.Tensor]
) -> Features:
    """The feature maps of ``form``, see :func:`effc.plugins.reference.attend` for shapes and ``extras``."""
    raise NotImplementedError(f"There is no feature map of {type(form).__name__}.")


@feature_maps.register
def _(
    form: Linear, query: torch.Tensor, key: torch.Tensor, scale: float, extras: Mapping[str, torch.Tensor]
) -> Features:
    apply = torch.relu if form.map == "relu" else _elu_plus_one
    return Features(apply(query), apply(key))


def _elu_plus_one(x: torch.Tensor) -> torch.Tensor:
    # elu(x) + 1 would lose the digits of exp(x) where x is far below zero.
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def quadratic_attention(
    form: LinearForm,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The definition: weights ``phi(q_i) . phi(k_j)`` of the visible pairs, each row divided by its sum. O(length^2).

    Arguments and result as of :func:`effc.plugins.reference.attend`.
    """
    maps = feature_maps(form, query, key, scale, extras or {})
    groups = query.shape[1] // key.shape[1]
    weights = maps.query @ maps.key.repeat_interleave(groups, dim=1).transpose(-1, -2)
    visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    if causal:
        visible = visible.tril(key.shape[2] - query.shape[2])
    visible = visible[None, None]
    if key_mask is not None:
        visible = visible & key_mask.to(torch.bool)[:, None, None, :]
    if maps.exponent is not None:
        exponent = maps.exponent.repeat_interleave(groups, dim=1)[:, :, None, :]
        exponent = exponent.masked_fill(~visible, EMPTY_STABILISER)
        # The largest visible exponent of a row cancels.
        weights = weights * torch.exp(exponent - exponent.amax(dim=-1, keepdim=True))
    weights = weights * visible
    return _divided(weights @ value.repeat_interleave(groups, dim=1), weights.sum(dim=-1))


@attend.register
def _(
    form: LinearForm,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    maps = _hidden_left_out(feature_maps(form, query, key, scale, extras or {}), key_mask)
    state = initial_state(form, key.shape[0], key.shape[1], key.shape[3], query.dtype, query.device)
    if not causal:
        return _read(maps.query, _added(state, maps.key, maps.exponent, value))
    before = key.shape[2] - query.shape[2]
    earlier, new = _split(maps, before)
    state = _added(state, earlier.key, earlier.exponent, value[:, :, :before])
    return _causal(new, value[:, :, before:], state)[0]


def initial_state(
    form: LinearForm,
    batch: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> State:
    """The state before the first token."""
    shapes = form.state_shapes(kv_heads, head_dim)
    empty = {"stabiliser": EMPTY_STABILISER}
    return {
        name: torch.full((batch, *shape), empty.get(name, 0.0), dtype=dtype, device=device)
        for name, shape in shapes.items()
    }


def attend_from_state(
    form: LinearForm,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: Mapping[str, torch.Tensor],
    *,
    scale: float,
    key_mask: torch.Tensor | None = None,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, State]:
    """Causal attention of new tokens that follow those in ``state``. Two calls equal one over the joined tokens.

    Args:
        query: ``[batch, heads, length, head_dim]``, ``key`` and ``value`` ``[batch, kv_heads, length, head_dim]``: the
            new tokens alone.
        state: see :data:`State`; :func:`initial_state` for the first tokens.
        key_mask: ``[batch, length]`` bool, False hides a new token.

    Returns:
        The output, shaped like ``query``, and the state after the new tokens.
    """
    maps = _hidden_left_out(feature_maps(form, query, key, scale, extras or {}), key_mask)
    return _causal(maps, value, dict(state))


def decode_step(
    form: LinearForm,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: Mapping[str, torch.Tensor],
    *,
    scale: float,
    key_mask: torch.Tensor | None = None,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, State]:
    """The recurrence for one new token: put its key and value into the state, then read with its query.

    Arguments and result as of :func:`attend_from_state`, with ``length`` 1. O(features * head_dim) per head.
    """
    maps = _hidden_left_out(feature_maps(form, query, key, scale, extras or {}), key_mask)
    after = _added(dict(state), maps.key, maps.exponent, value)
    return _read(maps.query, after), after


def needed(extras: Mapping[str, torch.Tensor], name: str, form: AttentionForm) -> torch.Tensor:
    """One of the form's learned inputs.

    Raises:
        PreconditionError: if it is not there.
    """
    if name not in extras:
        raise PreconditionError(
            f"'{form}' needs its parameter '{name}'.", "Start from initial_parameters, or load the trained ones."
        )
    return extras[name]


def _hidden_left_out(maps: Features, key_mask: torch.Tensor | None) -> Features:
    if key_mask is None:
        return maps
    hidden = ~key_mask.to(torch.bool)[:, None, :]
    exponent = None if maps.exponent is None else maps.exponent.masked_fill(hidden, EMPTY_STABILISER)
    return Features(maps.query, maps.key.masked_fill(hidden[..., None], 0.0), exponent)


def _split(maps: Features, before: int) -> tuple[Features, Features]:
    """Keys ahead of the first query, and the rest with the queries."""
    exponents = (None, None) if maps.exponent is None else (maps.exponent[..., :before], maps.exponent[..., before:])
    return (
        Features(maps.query[:, :, :0], maps.key[:, :, :before], exponents[0]),
        Features(maps.query, maps.key[:, :, before:], exponents[1]),
    )


def _added(state: State, key: torch.Tensor, exponent: torch.Tensor | None, value: torch.Tensor) -> State:
    """The state after keys ``[batch, kv_heads, n, features]`` with their values; n may be 0."""
    if exponent is None:
        return {
            "state": state["state"] + key.transpose(-1, -2) @ value,
            "normaliser": state["normaliser"] + key.sum(dim=-2),
        }
    if key.shape[2] == 0:
        return state
    # Whatever is subtracted cancels in the ratio, so no gradient need pass through it.
    stabiliser = torch.maximum(state["stabiliser"], exponent.amax(dim=-1)).detach()
    kept = torch.exp(state["stabiliser"] - stabiliser)[..., None]
    key = key * torch.exp(exponent - stabiliser[..., None])[..., None]
    return {
        "state": state["state"] * kept[..., None] + key.transpose(-1, -2) @ value,
        "normaliser": state["normaliser"] * kept + key.sum(dim=-2),
        "stabiliser": stabiliser,
    }


def _read(query: torch.Tensor, state: State) -> torch.Tensor:
    grouped = query.unflatten(1, (state["state"].shape[1], -1))
    numerator = grouped @ state["state"][:, :, None]
    denominator = grouped @ state["normaliser"][:, :, None, :, None]
    return _divided(numerator, denominator.squeeze(-1)).flatten(1, 2)


def _causal(maps: Features, value: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
    """Chunk by chunk: pairs within the chunk directly, everything before it through the state."""
    outputs = []
    for start in range(0, maps.key.shape[2], CAUSAL_CHUNK):
        chunk = slice(start, start + CAUSAL_CHUNK)
        query = maps.query[:, :, chunk].unflatten(1, (maps.key.shape[1], -1))
        key, values = maps.key[:, :, chunk], value[:, :, chunk]
        exponent = None if maps.exponent is None else maps.exponent[:, :, chunk]
        weights = (query @ key.transpose(-1, -2)[:, :, None]).tril()
        numerator = query @ state["state"][:, :, None]
        denominator = (query @ state["normaliser"][:, :, None, :, None]).squeeze(-1)
        if exponent is not None:
            # Each row is taken relative to the largest exponent that it sees itself, never one behind it.
            largest = torch.maximum(state["stabiliser"][..., None], exponent.cummax(dim=-1).values).detach()
            decay = torch.exp((exponent[..., None, :] - largest[..., None]).tril()).tril()
            weights = weights * decay[:, :, None]
            kept = torch.exp(state["stabiliser"][..., None] - largest)[:, :, None]
            numerator, denominator = numerator * kept[..., None], denominator * kept
        numerator = numerator + weights @ values[:, :, None]
        outputs.append(_divided(numerator, denominator + weights.sum(dim=-1)).flatten(1, 2))
        state = _added(state, key, exponent, values)
    return torch.cat(outputs, dim=2), state


def _divided(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """``numerator [..., head_dim]`` by ``denominator [...]``; zeros where that is zero, with finite gradients."""
    return numerator / torch.where(denominator > 0, denominator, 1.0)[..., None]
