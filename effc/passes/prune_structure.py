"""Where the attention heads and the feed-forward neurons of a model are: which weights make them and which read them.

Architectures name their projections in a handful of ways, listed here; nothing else about a family is assumed. That a
module was understood is proved by running the model, see ``effc.passes.prune_channels``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from effc.errors import PreconditionError, UsageError
from effc.suggest import nearest

_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
# One projection whose rows are all queries, then all keys, then all values.
_FUSED = ("Wqkv", "qkv_proj", "c_attn", "qkv")
_ATTENTION_OUTPUTS = ("o_proj", "out_proj", "out_lin", "o", "Wo", "c_proj", "dense")
_HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
# What makes the neurons (several where they are gated), what reads them, and how many the first holds of each.
_FEED_FORWARDS: tuple[tuple[tuple[str, ...], str, int], ...] = (
    (("gate_proj", "up_proj"), "down_proj", 1),
    (("up_proj",), "down_proj", 1),
    (("gate_up_proj",), "down_proj", 2),
    (("wi_0", "wi_1"), "wo", 1),
    (("wi",), "wo", 1),
    (("Wi",), "Wo", 2),
    (("fc1",), "fc2", 1),
    (("lin1",), "lin2", 1),
    (("c_fc",), "c_proj", 1),
    (("intermediate.dense",), "output.dense", 1),
    (("intermediate_dense",), "output_dense", 1),
)


@dataclass(frozen=True)
class Rows:
    """Rows of a weight ``[out, in]``: ``parts`` blocks of ``channels`` rows, one behind the other."""

    name: str
    channels: int
    parts: int = 1


@dataclass(frozen=True)
class AttentionParts:
    """The projections of an attention module.

    Attributes:
        name: the module that holds the projections.
        query, key, value: where their rows are; of a fused projection all are the same weight, ``fused`` is True.
        output: the linear layer that reads the heads.
        heads, kv_heads, head_dim: sizes now.
        bias: the embedding that adds a bias by distance, one column a head, or None.
    """

    name: str
    query: str
    key: str
    value: str
    output: str
    heads: int
    kv_heads: int
    head_dim: int
    fused: bool = False
    bias: str | None = None

    @property
    def groups(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class FeedForwardParts:
    """A feed-forward network: the layers that make its neurons, and the one that reads them."""

    name: str
    producers: tuple[Rows, ...]
    output: str
    neurons: int


@dataclass(frozen=True)
class LayerList:
    """The transformer layers of one stack: a module list whose members are alike."""

    name: str
    layers: nn.ModuleList


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer in either of the forms that transformers uses; None of any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def layer_lists(model: nn.Module) -> list[LayerList]:
    """The stacks of transformer layers, the outermost module lists that hold attention or feed-forward networks."""
    found: list[LayerList] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other.name}.") for other in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            first = module[0]
            if any(linear_sizes(part) for part in first.modules()) and any(_attentions(first, "")):
                found.append(LayerList(name, module))
    return found


def attention_parts(model: nn.Module) -> list[AttentionParts]:
    """Every attention module of the model whose projections are understood, in the order of the modules."""
    return list(_attentions(model, ""))


def feed_forward_parts(model: nn.Module) -> list[FeedForwardParts]:
    """Every feed-forward network of the transformer layers that is understood, in the order of the modules."""
    prefixes = tuple(f"{stack.name}." for stack in layer_lists(model))
    found = []
    for name, module in model.named_modules():
        if not f"{name}.".startswith(prefixes):
            continue
        parts = next((parts for form in _FEED_FORWARDS if (parts := _feed_forward(module, name, *form))), None)
        if parts is not None:
            found.append(parts)
    return found


def layer_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside transformer layers, by name; embeddings and heads are none of them."""
    prefixes = tuple(f"{stack.name}." for stack in layer_lists(model))
    return {
        name: module for name, module in model.named_modules() if name.startswith(prefixes) and linear_sizes(module)
    }


def check_linears(model: nn.Module, include: Sequence[str], exclude: Sequence[str], option: str) -> None:
    """Check that there are linear layers inside transformer layers, and that each glob matches one.

    Raises:
        PreconditionError: naming the ``option`` to leave out.
        UsageError: naming the glob.
    """
    linears = layer_linears(model)
    if not linears:
        raise PreconditionError(
            f"{type(model).__name__} has no linear layers in transformer layers that effc knows.",
            f"Leave {option} out.",
        )
    selected(linears, include, exclude)


def selected(names: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Those of ``names`` that a recipe's globs choose.

    Raises:
        UsageError: if a glob matches none of them.
    """
    known = list(names)
    for glob in (*include, *exclude):
        if not any(_matches(name, glob) for name in known):
            near = nearest(glob, known)
            hint = f"Did you mean '{near}'?" if near else f"There are, for example: {', '.join(known[:3])}."
            raise UsageError(f"'{glob}' matches no module that could be pruned.", hint)
    return [
        name
        for name in known
        if (not include or any(_matches(name, glob) for glob in include))
        and not any(_matches(name, glob) for glob in exclude)
    ]


def _matches(name: str, glob: str) -> bool:
    """Whether ``glob`` fits the whole name, or names a module around it."""
    return fnmatchcase(name, glob) or fnmatchcase(name, f"{glob}.*") or fnmatchcase(name, f"*.{glob}")


def _attentions(root: nn.Module, prefix: str) -> Iterator[AttentionParts]:
    parents: dict[str, nn.Module] = {prefix: root}
    for name, module in root.named_modules(prefix=prefix):
        parents[name] = module
        parts = _attention(module, name, parents.get(name.rpartition(".")[0]))
        if parts is not None:
            yield parts


def _attention(module: nn.Module, name: str, parent: nn.Module | None) -> AttentionParts | None:
    head_dim = next((value for key in _HEAD_SIZES if isinstance(value := getattr(module, key, None), int)), None)
    output = _output_of(module, name, parent)
    if head_dim is None or output is None:
        return None
    bias = f"{name}.relative_attention_bias" if _child(module, "relative_attention_bias") is not None else None
    for names in _SEPARATE:
        children = [_child(module, child) for child in names]
        sizes = [linear_sizes(child) if child is not None else None for child in children]
        if all(size is not None for size in sizes):
            query, key, value = (size[1] for size in sizes if size is not None)
            if query % head_dim or key % head_dim or key != value or query % key:
                return None
            q, k, v = (f"{name}.{child}" for child in names)
            return AttentionParts(name, q, k, v, output, query // head_dim, key // head_dim, head_dim, bias=bias)
    for fused in _FUSED:
        child = _child(module, fused)
        size = linear_sizes(child) if child is not None else None
        reads = linear_sizes(_at(module, name, parent, output))
        if size is None or reads is None:
            continue
        query, both = reads[0], size[1] - reads[0]
        if query % head_dim or both <= 0 or both % (2 * head_dim) or query % (both // 2):
            return None
        q, heads, kv_heads = f"{name}.{fused}", query // head_dim, both // 2 // head_dim
        return AttentionParts(name, q, q, q, output, heads, kv_heads, head_dim, True, bias)
    return None


def _output_of(module: nn.Module, name: str, parent: nn.Module | None) -> str | None:
    for child in _ATTENTION_OUTPUTS:
        found = _child(module, child)
        if found is not None and linear_sizes(found):
            return f"{name}.{child}"
    # BERT and its kin: attention.self computes, attention.output projects.
    beside = None if parent is None else _child(parent, "output.dense")
    if beside is not None and linear_sizes(beside) and parent is not module:
        above = name.rpartition(".")[0]
        return f"{above}.output.dense" if above else "output.dense"
    return None


def _at(module: nn.Module, name: str, parent: nn.Module | None, path: str) -> nn.Module:
    """The module at the full ``path``, which lies in ``module`` or beside it."""
    if path.startswith(f"{name}."):
        return module.get_submodule(path[len(name) + 1 :])
    assert parent is not None
    return parent.get_submodule("output.dense")


def _feed_forward(
    module: nn.Module, name: str, producers: tuple[str, ...], output: str, factor: int
) -> FeedForwardParts | None:
    reader = _child(module, output)
    makers = [_child(module, child) for child in producers]
    sizes = [linear_sizes(maker) if maker is not None else None for maker in makers]
    reads = linear_sizes(reader) if reader is not None else None
    if reads is None or any(size is None or size[1] != factor * reads[0] for size in sizes):
        return None
    rows = tuple(Rows(f"{name}.{child}", reads[0], factor) for child in producers)
    return FeedForwardParts(name, rows, f"{name}.{output}", reads[0])


def _child(module: nn.Module, path: str) -> Any | None:
    for part in path.split("."):
        child = module._modules.get(part)
        if child is None:
            return None
        module = child
    return module
