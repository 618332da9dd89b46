"""Which form each attention module of one model gets, and whether the module can compute it."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from effc.errors import PreconditionError
from effc.passes.attention_settings import LAYER_RANGE, AttentionSection
from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.heads import HeadForms
from effc.plugins.forms.registry import parse_form
from effc.plugins.forms.terms import GlobalTokens, Local
from effc.plugins.hook import ObservedLayer
from effc.plugins.pattern import Pattern, union
from effc.suggest import did_you_mean


def forms_of_layers(settings: AttentionSection, names: list[str]) -> dict[str, AttentionForm]:
    """The form that the section asks for, by module name, in execution order.

    Args:
        names: the attention modules in execution order; their places are the layer numbers.

    Raises:
        PreconditionError: if an entry of ``layers`` matches no module, or numbers one that the model does not have.
        ValueError: if ``pattern`` leaves the choice to a search that has not been made.
    """
    forms = dict.fromkeys(names, _form_of_all(settings))
    for key, text in settings.layers.items():
        form = parse_form(text)
        forms.update(dict.fromkeys(matching_layers(key, names), form))
    return forms


def _form_of_all(settings: AttentionSection) -> AttentionForm:
    request = settings.request
    if not isinstance(request, AttentionForm):
        raise ValueError(f"'{request}' has to be resolved into forms first")
    return request


def matching_layers(key: str, names: list[str]) -> list[str]:
    """The modules that ``0-3``, ``4-*``, ``5``, a module's name or a glob of names means.

    Raises:
        PreconditionError: if there is none.
    """
    last = len(names) - 1
    numbers = LAYER_RANGE.match(key)
    if numbers is None:
        found = [name for name in names if fnmatchcase(name, key)]
        if not found:
            raise PreconditionError(f"'{key}' matches no attention module.", did_you_mean(key, names))
        return found
    first = int(numbers[1])
    end = last if numbers[2] == "*" else int(numbers[2] or first)
    if not first <= end <= last:
        raise PreconditionError(
            f"There are no layers {key}: the model's {len(names)} attention modules are numbered 0 to {last}.",
            f"Write a range within 0-{last}, such as 0-{last} or {min(first, last)}-*.",
        )
    return names[first : end + 1]


def check_form(form: AttentionForm, layer: ObservedLayer) -> None:
    """Make sure that a module can compute a form.

    Raises:
        PreconditionError: naming the layer and forms that it can compute.
    """
    if isinstance(form, HeadForms):
        if form.heads != layer.num_heads:
            raise PreconditionError(
                f"'{form}' names heads 0 to {form.heads - 1}, but {layer.name} has {layer.num_heads} heads.",
                f"Give each of the heads 0 to {layer.num_heads - 1} one form.",
            )
        for part, _ in form.parts:
            check_form(part, layer)
        return
    if layer.visibility.causal and not getattr(form, "supports_causal", True):
        raise PreconditionError(
            f"{layer.name} is causal, and '{form}' has no causal form.",
            "Use one that has: local:256|sinks:4, block:64:1, linear:elu, ...",
        )
    if layer.bias is not None and not set(layer.bias.extras()) <= set(form.extra_inputs):
        raise PreconditionError(
            f"{layer.name} adds a {layer.bias} to its scores, which '{form}' cannot take into account.",
            "Use a position-based pattern such as global:1|local:256, or leave the layer dense.",
        )


def check_length(form: AttentionForm, layer: ObservedLayer, max_length: int | None) -> None:
    """Make sure that a form with a fixed maximum length reaches as far as the model does.

    Raises:
        PreconditionError: naming the layer and both lengths.
    """
    if isinstance(form, HeadForms):
        for part, _ in form.parts:
            check_length(part, layer, max_length)
    elif form.max_length is not None and max_length is not None and form.max_length < max_length:
        raise PreconditionError(
            f"'{form}' takes {form.max_length} tokens at most, but the model takes {max_length} ({layer.name}).",
            f"Give it the model's length, for example linformer:256:{max_length}.",
        )


def with_token_ids(form: AttentionForm, processor: Any | None) -> AttentionForm:
    """Replace the names of tokens (``global:sep``) by their ids.

    Args:
        processor: the model's tokenizer, or None.

    Raises:
        PreconditionError: if there is no tokenizer, or it has no such token.
    """
    if isinstance(form, HeadForms):
        return HeadForms(tuple((with_token_ids(part, processor), heads) for part, heads in form.parts))
    if not isinstance(form, Pattern) or not any(isinstance(token, str) for token in form.tokens):
        return form
    ids = tuple(sorted({_token_id(token, form, processor) for token in form.tokens}))
    return union(tuple(GlobalTokens(ids) if isinstance(term, GlobalTokens) else term for term in form.terms))


def _token_id(token: int | str, form: Pattern, processor: Any | None) -> int:
    if isinstance(token, int):
        return token
    if processor is None or not hasattr(processor, "convert_tokens_to_ids"):
        raise PreconditionError(
            f"'{form}' names the token '{token}', and the model has no tokenizer to look it up in.",
            "Give the token's id, for example global:#102, or put the tokenizer's files beside the model.",
        )
    found = getattr(processor, f"{token}_token_id", None)
    if found is None:
        names = [name.removesuffix("_token") for name in processor.special_tokens_map if name.endswith("_token")]
        raise PreconditionError(
            f"'{form}' names the token '{token}', which the model's tokenizer does not have.",
            f"Use one that it has ({', '.join(names) or 'none'}), or a token's id such as global:#102.",
        )
    return int(found)


def marked_tokens(form: AttentionForm) -> tuple[int, ...]:
    """Ids of the tokens whose positions the form must be told, in every head that asks for any."""
    if isinstance(form, HeadForms):
        sets = {marked_tokens(part) for part, _ in form.parts} - {()}
        if len(sets) > 1:
            raise PreconditionError(
                f"'{form}' names different global tokens for different heads.", "Name the same tokens for all of them."
            )
        return next(iter(sets), ())
    return tuple(token for token in form.tokens if isinstance(token, int)) if isinstance(form, Pattern) else ()


def narrower(own: Pattern, wanted: AttentionForm, causal: bool) -> bool:
    """Whether a module keeps its own window: it lies inside the wanted form, or no window is wanted at all."""
    inner = own.interval(causal)
    if inner is None:
        return False
    if not isinstance(wanted, Pattern) or wanted.is_dense:
        return True
    reaches = [term.reach(causal) for term in wanted.terms if isinstance(term, Local)]
    return any(inner[0] <= left and inner[1] <= right for left, right in reaches)


def within_own_window(own: Pattern, wanted: AttentionForm, causal: bool) -> AttentionForm:
    """What a module computes that is asked for ``wanted``: for each head its own window where that is narrower."""
    if isinstance(wanted, HeadForms):
        return merged_heads([(within_own_window(own, part, causal), heads) for part, heads in wanted.parts])
    return own if narrower(own, wanted, causal) else wanted


def merged_heads(parts: Iterable[tuple[AttentionForm, tuple[int, ...]]]) -> AttentionForm:
    """A per-head form with one part for each distinct form; the form itself where all heads compute the same."""
    heads: dict[AttentionForm, list[int]] = {}
    for form, numbers in parts:
        heads.setdefault(form, []).extend(numbers)
    if len(heads) == 1:
        return next(iter(heads))
    return HeadForms(tuple((form, tuple(sorted(numbers))) for form, numbers in heads.items()))
