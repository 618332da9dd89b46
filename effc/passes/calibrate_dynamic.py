"""Fitting the scorers of ``dynamic`` attention to the attention that keys really receive.

For each key/value head the logarithm of what a key receives, relative to the mean of all keys, is fitted by ridge
regression on the key and its squared norm, in closed form. Counted is attention from queries to which the key is not
near, because near keys are exact whatever the scorer says. Only differences within one text matter to a choice, so each
text's mean is taken off first. The logarithm, because a few keys receive most of the attention and would otherwise be
all that is fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from effc.errors import DataError
from effc.passes.observed_attention import ObservedAttention
from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.content import SUMMARY_BLOCK, Dynamic
from effc.plugins.forms.heads import HeadForms
from effc.plugins.hook import IMPLEMENTATION, PARAMETERS, ObservedLayer
from effc.plugins.reference.dispatch import select_heads
from effc.plugins.reference.dynamic import importance, most_important, near_keys

# Keys that fewer queries look back to tell more of those queries than of themselves.
_FEWEST_QUERIES = 64
# Of the mean weight; what is below counts as this, so that the logarithm of nothing stays finite.
_LEAST = 1e-3


@dataclass(frozen=True)
class Fit:
    """How well one layer's scorer tells what attention its keys receive; means over its key/value heads.

    Attributes:
        explained: share of the variance of the logarithm that the regression explains on the texts it was fitted to.
        caught_before: share of the attention beyond the near blocks that the chosen tokens received before the fit.
        caught: the same with the scorers that are set now.
    """

    explained: float
    caught_before: float
    caught: float


class _Target:
    """One dynamic form of one module, of all its heads or of some."""

    def __init__(self, layer: ObservedLayer, form: Dynamic, heads: tuple[int, ...], scorer: torch.Tensor, name: str):
        self.layer, self.form, self.heads, self.scorer, self.name = layer, form, heads, scorer, name
        kv_heads, features = scorer.shape
        self.squares = torch.zeros(kv_heads, features, features, dtype=torch.float64)
        self.products = torch.zeros(kv_heads, features, 1, dtype=torch.float64)
        self.variance = torch.zeros(kv_heads, dtype=torch.float64)
        self.fitted = torch.zeros(kv_heads, features, dtype=torch.float64)
        self.explained = torch.zeros(kv_heads, dtype=torch.float64)
        self.far, self.caught_before, self.caught = (torch.zeros(kv_heads, dtype=torch.float64) for _ in range(3))

    @property
    def causal(self) -> bool:
        return self.layer.visibility.causal


_Step = Callable[[_Target, torch.Tensor, torch.Tensor, torch.Tensor], None]


def calibrate(
    observed: ObservedAttention,
    batches: Iterable[Mapping[str, Any]],
    run: Callable[[Mapping[str, Any]], Any],
    ridge: float = 1e-2,
) -> dict[str, Fit]:
    """Fit the scorers of all modules that compute ``dynamic`` now, and set them.

    The modules compute what they do in the source model meanwhile. Of several batches the last is held out: what the
    chosen tokens catch is measured on it, and a head whose fitted scorer catches less than the one it had keeps that.
    The scorers are set through ``observed``, so that they are the modules' parameters from then on.

    Args:
        observed: the model's layers; those whose form (or whose form of some heads) is ``dynamic`` are fitted.
        batches: inputs; a two-dimensional ``attention_mask`` says which tokens count where the model's attention does
            not get to see one.
        run: runs the model on one batch.
        ridge: added to the diagonal of the normal equations, after all features were brought to one scale.

    Returns:
        By layer, in execution order; of a layer with several dynamic parts the mean. Empty without dynamic layers.

    Raises:
        DataError: if no text is long enough to have keys that enough queries are not near to.
    """
    targets = _targets(observed)
    if not targets:
        return {}
    batches = list(batches)
    forms = dict(observed.forms)
    with observed.using({}), torch.no_grad():
        with _visiting(targets, _accumulate) as visit:
            for batch in batches[:-1] or batches:
                visit(batch, run)
        if not any(target.squares.any() for target in targets):
            raise DataError(
                "The texts are too short to calibrate 'dynamic' attention: all tokens are near each other.",
                f"Give texts of at least {_shortest(targets)} tokens.",
            )
        for target in targets:
            _solve(target, ridge)
        with _visiting(targets, _measure) as visit:
            visit(batches[-1], run)
    for layer in dict.fromkeys(target.layer.name for target in targets):
        own = [target for target in targets if target.layer.name == layer]
        parameters = {name: tensor.detach().clone() for name, tensor in _parameters(own[0].layer).items()}
        observed.set_parameters(layer, forms[layer], parameters | {target.name: _better(target) for target in own})
    return {target.layer.name: _fit(targets, target.layer.name) for target in targets}


def _targets(observed: ObservedAttention) -> list[_Target]:
    found = []
    for layer in observed.layers:
        form = observed.forms.get(layer.name)
        parts: tuple[tuple[AttentionForm, tuple[int, ...]], ...] = ()
        if isinstance(form, HeadForms):
            parts = form.parts
        elif form is not None:
            parts = ((form, tuple(range(layer.num_heads))),)
        for number, (part, heads) in enumerate(parts):
            if isinstance(part, Dynamic):
                name = f"part{number}_scorer" if isinstance(form, HeadForms) else "scorer"
                found.append(_Target(layer, part, heads, _parameters(layer)[name].detach().clone(), name))
    return found


def _parameters(layer: ObservedLayer) -> torch.nn.ParameterDict:
    parameters: torch.nn.ParameterDict = getattr(layer.module, PARAMETERS)
    return parameters


@contextmanager
def _visiting(targets: list[_Target], step: _Step) -> Iterator[Callable[..., None]]:
    """Within the block, ``visit(batch, run)`` runs the model and calls ``step`` with every target's queries
    ``[batch, kv_heads, groups, query_length, head_dim]``, keys ``[batch, kv_heads, key_length, head_dim]`` and which
    keys are no padding ``[batch, key_length]``.
    """
    attention = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]
    by_module: dict[torch.nn.Module, list[_Target]] = {}
    for target in targets:
        by_module.setdefault(target.layer.module, []).append(target)
    padding: torch.Tensor | None = None

    def visited(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **named: Any
    ) -> Any:
        visible = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool)
        for known in (mask, padding):
            if known is not None and known.shape == visible.shape:
                visible = known.to(torch.bool)
                break
        for target in by_module.get(module, []):
            rows, keys, _ = select_heads(target.heads, query, key, value)
            step(target, rows.unflatten(1, (keys.shape[1], -1)), keys, visible)
        return attention(module, query, key, value, mask, **named)

    def visit(batch: Mapping[str, Any], run: Callable[[Mapping[str, Any]], Any]) -> None:
        nonlocal padding
        given = batch.get("attention_mask")
        padding = None if given is None else torch.as_tensor(given)
        run(batch)

    AttentionInterface.register(IMPLEMENTATION, visited)
    try:
        yield visit
    finally:
        AttentionInterface.register(IMPLEMENTATION, attention)


def _far_weights(
    target: _Target, query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each block of queries: attention weights ``[batch, kv_heads, rows, key_length]``, mean over the group, zero
    for near keys; which keys are far ``[batch, key_length]``; which queries are no padding ``[batch, rows]``.
    """
    length, first = key.shape[2], key.shape[2] - query.shape[3]
    positions = torch.arange(length)
    for block in range(first // SUMMARY_BLOCK, -(-length // SUMMARY_BLOCK)):
        start, stop = max(block * SUMMARY_BLOCK, first), min((block + 1) * SUMMARY_BLOCK, length)
        if target.causal:
            far = positions < (block - target.form.reach) * SUMMARY_BLOCK
        else:
            far = ~near_keys(target.form, positions, block, False)
        seen = visible[:, None, None, None]
        if target.causal:
            seen = seen & (positions <= positions[start:stop, None])
        rows = query[:, :, :, start - first : stop - first]
        scores = (rows @ key[:, :, None].transpose(-1, -2) * target.layer.scale).masked_fill(~seen, -torch.inf)
        # Rows of padding may see nothing at all.
        weights = torch.softmax(scores, dim=-1).nan_to_num().mean(dim=2) * far
        yield weights * visible[:, None, start:stop, None], far & visible, visible[:, start:stop]


def _accumulate(target: _Target, query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor) -> None:
    """Add the keys of one batch to the normal equations."""
    received = torch.zeros(key.shape[:3], dtype=torch.float64)
    queries = torch.zeros(key.shape[0], key.shape[2], dtype=torch.float64)
    seen_by_last = visible.sum(dim=1, keepdim=True).double()
    seen = visible.cumsum(dim=1).double() if target.causal else seen_by_last.expand(visible.shape)
    start = key.shape[2] - query.shape[3]
    for weights, far, counted in _far_weights(target, query, key, visible):
        stop = start + weights.shape[2]
        # Relative to the mean weight of the row, or keys that are seen from short rows only would seem important.
        received += (weights.double() * seen[:, None, start:stop, None]).sum(dim=2)
        queries += far * counted.sum(dim=1, keepdim=True)
        start = stop
    features = _features(key).double()
    wanted = (received / queries.clamp_min(1)[:, None]).clamp_min(_LEAST).log()
    for row, enough in enumerate(queries >= _FEWEST_QUERIES):
        if int(enough.sum()) > 1:
            known = features[row][:, enough]
            known = known - known.mean(dim=1, keepdim=True)
            aim = wanted[row][:, enough, None]
            aim = aim - aim.mean(dim=1, keepdim=True)
            target.squares += known.transpose(1, 2) @ known
            target.products += known.transpose(1, 2) @ aim
            target.variance += aim.square().sum(dim=(1, 2))


def _features(key: torch.Tensor) -> torch.Tensor:
    """What importance is linear in: ``[..., head_dim + 1]``."""
    return torch.cat([key, key.square().sum(dim=-1, keepdim=True)], dim=-1)


def _solve(target: _Target, ridge: float) -> None:
    sizes = target.squares.diagonal(dim1=1, dim2=2).clamp_min(1e-12).sqrt()[..., None]
    normalised = target.squares / sizes / sizes.transpose(1, 2)
    damped = normalised + ridge * torch.eye(normalised.shape[-1], dtype=torch.float64)
    solution = torch.linalg.solve(damped, target.products / sizes) / sizes
    rest = target.variance - (2 * solution * target.products).sum(dim=(1, 2))
    rest = rest + (solution.transpose(1, 2) @ target.squares @ solution).flatten()
    target.explained = 1 - rest / target.variance.clamp_min(1e-12)
    target.fitted = solution[..., 0]


def _measure(target: _Target, query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor) -> None:
    """Add what the chosen tokens of one batch receive, with the scorer as it was and as it is fitted."""
    scores = [importance(key, target.scorer), importance(key, target.fitted.to(key.dtype))]
    everything = visible[:, None].expand(key.shape[:3])
    for weights, far, _ in _far_weights(target, query, key, visible):
        received = weights.double().sum(dim=2)
        among = far[:, None].expand(key.shape[:3]) if target.causal else everything
        before, after = ((received * most_important(target.form, score, among)).sum(dim=(0, 2)) for score in scores)
        target.far += received.sum(dim=(0, 2))
        target.caught_before += before
        target.caught += after


def _better(target: _Target) -> torch.Tensor:
    worse = target.caught < target.caught_before
    target.caught = torch.where(worse, target.caught_before, target.caught)
    return torch.where(worse[:, None], target.scorer, target.fitted.to(target.scorer.dtype))


def _fit(targets: list[_Target], layer: str) -> Fit:
    own = [target for target in targets if target.layer.name == layer]
    far = torch.cat([target.far for target in own]).clamp_min(1e-12)
    return Fit(
        float(torch.cat([target.explained for target in own]).mean()),
        float((torch.cat([target.caught_before for target in own]) / far).mean()),
        float((torch.cat([target.caught for target in own]) / far).mean()),
    )


def _shortest(targets: list[_Target]) -> int:
    """Tokens from which on a text has keys that enough queries are far from."""
    return min(_FEWEST_QUERIES + (target.form.reach + 1) * SUMMARY_BLOCK for target in targets)
