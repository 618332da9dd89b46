"""The one hook through which effc reaches the attention of every model that uses transformers' AttentionInterface.

``observe`` runs a model once and learns what each attention module sees; ``assign`` says what each shall compute from
then on. In eager mode the hook computes the assigned form in torch; while torch exports, it emits one ``effc::``
operator per module. The mask interface hands on the plain 2-D padding mask, so that no
length x length mask is ever built into a graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from effc.errors import PreconditionError
from effc.plugins.operator import AttentionGeometry, emit
from effc.plugins.pattern import Pattern
from effc.plugins.reference import attend
from effc.plugins.reference.softmax import distance_bias, visible_pairs
from effc.plugins.score_bias import NoDistanceBias, ScoreBias, read_score_bias
from effc.plugins.visibility import Visibility, read_mask_function, read_mask_tensor

IMPLEMENTATION = "effc"


@dataclass
class ObservedLayer:
    """One attention module as seen in a forward run.

    Attributes:
        bias: what it adds to the scores by distance, or None.
        cross: whether its keys come from another text than its queries.
        own_mask: whether the mask that it was given is the model's own make, so that padding has to be taken from the
            model's input.
    """

    name: str
    module: torch.nn.Module
    visibility: Visibility
    num_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    bias: ScoreBias | None = None
    cross: bool = False
    own_mask: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """What one attention module shall compute. ``geometry`` is None where the module keeps torch's own attention."""

    name: str
    visibility: Visibility
    geometry: AttentionGeometry | None
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Fixed extra inputs of the operator by name, such as a distance bias."""


@dataclass
class _Observation:
    names: dict[torch.nn.Module, str]
    padding: torch.Tensor | None = None
    layers: dict[torch.nn.Module, ObservedLayer] = field(default_factory=dict)
    # Keeps each mask alive as long as its id is used as a key.
    masks: dict[int, tuple[torch.Tensor, Visibility]] = field(default_factory=dict)


_plans: weakref.WeakKeyDictionary[torch.nn.Module, LayerPlan] = weakref.WeakKeyDictionary()
# For each module whose form names tokens: where they stand in the input that runs now, [batch, length] bool.
_marks: weakref.WeakKeyDictionary[torch.nn.Module, torch.Tensor] = weakref.WeakKeyDictionary()
# For each module whose model builds a mask of its own: the padding mask of the input that runs now.
_paddings: weakref.WeakKeyDictionary[torch.nn.Module, torch.Tensor | None] = weakref.WeakKeyDictionary()
_observation: _Observation | None = None

PARAMETERS = "effc_attention"
"""Name under which an attention module holds the learned parameters of its form, a ``torch.nn.ParameterDict``."""


@contextmanager
def _observing(observation: _Observation) -> Iterator[None]:
    global _observation
    _observation = observation
    try:
        yield
    finally:
        _observation = None


def observe(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> tuple[list[ObservedLayer], Any]:
    """Switch the model to effc's attention and run it once, each module still computing what it always did.

    Args:
        model: a transformers model in eval mode.
        inputs: keyword arguments of ``forward``.

    Returns:
        The attention modules that came through the hook, in execution order, and the model's outputs.

    Raises:
        PreconditionError: if the model does arithmetic on the mask that the mask interface gives it.
    """
    observation = _Observation({module: name for name, module in model.named_modules()}, inputs.get("attention_mask"))
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        with _observing(observation), torch.no_grad():
            outputs = model(**inputs)
    except RuntimeError as error:
        raise PreconditionError(
            f"{type(model).__name__} does not run with a padding mask in place of a mask of its own: {error}.",
            "Its code computes with the mask, as BEiT does with its position bias; compile another architecture.",
        ) from error
    return list(observation.layers.values()), outputs


def assign(layers: Mapping[torch.nn.Module, LayerPlan]) -> None:
    """Set what each attention module computes in eager mode and in an export."""
    _plans.update(layers)
    for module in layers:
        # Marks are made anew by every run; those of a form that a module no longer has would stay.
        _marks.pop(module, None)


def assigned(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, LayerPlan]]:
    """The attention modules of a model that have a plan, and these plans, by the modules' names."""
    return {name: (module, _plans[module]) for name, module in model.named_modules() if module in _plans}


def mark_tokens(model: PreTrainedModel, modules: Mapping[torch.nn.Module, tuple[int, ...]]) -> None:
    """Tell each module, on every run of the model, where the tokens of the given ids stand in ``input_ids``."""

    def mark(_: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named["input_ids"] if "input_ids" in named else arguments[0]
        for wanted in set(modules.values()):
            places = (ids[..., None] == torch.tensor(wanted, device=ids.device)).any(dim=-1)
            _marks.update({module: places for module, tokens in modules.items() if tokens == wanted})

    model.register_forward_pre_hook(mark, with_kwargs=True)


def mask_by_input(model: PreTrainedModel, modules: Collection[torch.nn.Module]) -> None:
    """Give each module, on every run of the model, the ``attention_mask`` of the input instead of the model's own make.

    What the model builds is then computed for nothing, and an export leaves it out.
    """

    def remember(_: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        mask = named.get("attention_mask")
        _paddings.update(dict.fromkeys(modules, mask))

    model.register_forward_pre_hook(remember, with_kwargs=True)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> torch.Tensor | None:
    """The 2-D padding mask ``[batch, length]``; while observing, one that remembers the mask function."""
    if attention_mask is not None:
        attention_mask = attention_mask[:, -kv_length:]
    if _observation is None:
        return attention_mask
    if attention_mask is None:
        attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    remembered = attention_mask.clone()
    _observation.masks[id(remembered)] = (remembered, read_mask_function(mask_function))
    return remembered


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The interface's attention: ``[batch, heads, length, head_dim]`` in, ``[batch, length, heads, head_dim]`` out."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if _observation is not None:
        layer = _observation.layers.get(module)
        if layer is None:
            layer = _observed(_observation, module, query, key, value, attention_mask, is_causal, scale, kwargs)
            _observation.layers[module] = layer
        return _torch_attention(query, key, value, attention_mask, layer.visibility, scale, kwargs), None
    plan = _plans[module]
    geometry = plan.geometry
    if geometry is None:
        return _torch_attention(query, key, value, attention_mask, plan.visibility, scale, kwargs), None
    extras = _extras(module, plan)
    attention_mask = _paddings.get(module, attention_mask)
    if torch.compiler.is_exporting():
        return emit(geometry, plan.name, query, key, value, attention_mask, extras), None
    # Bias tables were read where the model was then; it may have moved since.
    extras = {name: value.to(query.device) for name, value in extras.items()}
    if isinstance(geometry.form, Pattern):
        return _masked_attention(query, key, value, attention_mask, geometry.form, geometry.causal, scale, extras), None
    mask = None if attention_mask is None else attention_mask.to(torch.bool)
    attended = attend(
        geometry.form, query, key, value, scale=scale, causal=geometry.causal, key_mask=mask, extras=extras
    )
    return attended.transpose(1, 2), None


def _extras(module: torch.nn.Module, plan: LayerPlan) -> dict[str, torch.Tensor]:
    """All extra inputs of a module's operator by name."""
    extras = dict(plan.extras)
    if module in _marks:
        extras["marks"] = _marks[module]
    parameters = getattr(module, PARAMETERS, None)
    if parameters is not None:
        extras.update(parameters.items())
    return extras


def _masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    pattern: Pattern,
    causal: bool,
    scale: float,
    extras: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """A pattern through torch's fused attention; ``[batch, length, heads, head_dim]``."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    bias = distance_bias(query.shape[2], key.shape[2], extras)
    mask = visible = None
    if not pattern.is_dense or causal or key_mask is not None:
        visible = visible_pairs(pattern, query.shape[2], key.shape[2], causal, key_mask, extras).to(query.device)
        mask = query.new_zeros(()).masked_fill(~visible, torch.finfo(query.dtype).min)
    if bias is not None:
        bias = bias.to(query.dtype)
        # The sum of a bias and the dtype's minimum would overflow.
        mask = bias if mask is None else torch.where(mask < 0, mask, bias)
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    if visible is not None:
        # A softmax over nothing is uniform: rows that see no key are defined to be zero.
        attended = attended * visible.any(dim=-1, keepdim=True)
    return attended.transpose(1, 2)


def _observed(
    observation: _Observation,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None,
    scale: float,
    kwargs: Mapping[str, Any],
) -> ObservedLayer:
    """What the first call of a module tells of it."""
    added, own_mask = kwargs.get("position_bias"), False
    remembered = observation.masks.get(id(attention_mask))
    if remembered is not None:
        visibility = remembered[1]
    elif attention_mask is None:
        # The rule of transformers' sdpa function for modules without a mask.
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        visibility = Visibility(bool(causal) and query.shape[2] > 1)
    elif attention_mask.ndim == 4:
        own = attention_mask.expand(-1, -1, query.shape[2], -1)
        visibility, in_mask = read_mask_tensor(own, observation.padding)
        own_mask = True
        if in_mask is not None:
            added = in_mask if added is None else added + in_mask
    else:
        visibility = Visibility.unknown("it builds its own attention mask")
    cross = query.shape[2] != key.shape[2]
    reasons, bias = [], None
    if added is not None:
        try:
            bias = read_score_bias(added, visibility.causal, observation.names)
        except NoDistanceBias as reason:
            reasons.append(str(reason))
    if own_mask and bias is not None and not visibility.pattern.is_dense:
        reasons.append("it adds a bias to the scores within a window of its own")
    if kwargs.get("softcap") is not None:
        reasons.append("it caps the scores")
    if value.shape[-1] != query.shape[-1]:
        reasons.append("its values are not as wide as its keys")
    if reasons:
        reasons += [visibility.unsupported] if visibility.unsupported else []
        visibility = replace(visibility, unsupported=" and ".join(reasons))
    name = observation.names.get(module, type(module).__name__)
    heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[-1]
    return ObservedLayer(name, module, visibility, heads, kv_heads, width, float(scale), bias, cross, own_mask)


def _torch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    visibility: Visibility,
    scale: float,
    kwargs: Mapping[str, Any],
) -> torch.Tensor:
    """Attention in torch for eager runs and for modules that are left alone; ``[batch, length, heads, head_dim]``.

    Knows position bias and soft capping, so that a module that cannot be lowered still computes what it did.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    bias = _additive_mask(query, key, attention_mask, visibility)
    position_bias, softcap = kwargs.get("position_bias"), kwargs.get("softcap")
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    if softcap is None:
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    else:
        scores = torch.tanh((query @ key.transpose(-1, -2)) * (scale / softcap)) * softcap
        attended = torch.softmax(scores if bias is None else scores + bias, dim=-1) @ value
    return attended.transpose(1, 2)


def _additive_mask(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, visibility: Visibility
) -> torch.Tensor | None:
    """Zero where a pair is visible, the dtype's minimum elsewhere; None where everything is visible."""
    lowest = torch.finfo(query.dtype).min
    if attention_mask is not None and attention_mask.ndim == 4:
        if attention_mask.dtype != torch.bool:
            return attention_mask
        return torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, lowest)
    visible = None
    if visibility.causal or not visibility.pattern.is_dense:
        visible = _visible_pairs(query.shape[2], key.shape[2], visibility).to(query.device)[None, None]
    if attention_mask is not None:
        padding = attention_mask.to(torch.bool)[:, None, None, :]
        visible = padding if visible is None else visible & padding
    if visible is None:
        return None
    return torch.zeros((), dtype=query.dtype, device=query.device).masked_fill(~visible, lowest)


def _visible_pairs(query_length: int, key_length: int, visibility: Visibility) -> torch.Tensor:
    """``[query_length, key_length]`` bool. While torch exports, lengths are symbols and only intervals are written."""
    if not torch.compiler.is_exporting():
        return torch.from_numpy(visibility.pattern.mask(query_length, key_length, visibility.causal))
    distance = torch.arange(key_length)[None, :] - torch.arange(query_length)[:, None] - (key_length - query_length)
    reach = visibility.pattern.interval(visibility.causal)
    visible = distance <= 0 if visibility.causal else torch.ones_like(distance, dtype=torch.bool)
    return visible if reach is None else visible & (distance >= -reach[0]) & (distance <= reach[1])


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
