"""Remove neurons of feed-forward networks; the matrices on both sides of them shrink."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from effc.passes.prune_channels import PruneChannels, Site
from effc.passes.prune_config import FFN_KEYS, adopt, inner_configs, resized
from effc.passes.prune_slice import keep_inputs, keep_outputs, weight_of
from effc.passes.prune_structure import feed_forward_parts

# Kernels compute 16 columns at a time; a width in between costs as much as the next multiple.
_MULTIPLE = 16
_SMALLEST_ROUNDED = 128


class PruneFeedForward(PruneChannels):
    """Remove ``settings.share`` of the neurons of every feed-forward network (or of all together: ``uniform: false``).

    A gated network loses the same neurons in the gate and beside it.
    """

    name: ClassVar[str] = "prune-ffn"
    version: ClassVar[int] = 1
    unit = "neurons"

    def sites(self, model: PreTrainedModel) -> tuple[list[Site], list[tuple[str, str]]]:
        """Every feed-forward network; none is left alone."""
        found = []
        for parts in feed_forward_parts(model):
            fine = parts.neurons >= _SMALLEST_ROUNDED and parts.neurons % _MULTIPLE == 0
            found.append(Site(parts.name, parts.output, parts.neurons, 1, _MULTIPLE if fine else 1))
        return found, []

    def weights_of(self, model: PreTrainedModel, site: Site) -> torch.Tensor:
        """Sums of squares of the rows that make each neuron; the product over gate and value where there are two."""
        parts = next(parts for parts in feed_forward_parts(model) if parts.name == site.name)
        result = torch.ones(parts.neurons, dtype=torch.float64)
        for producer in parts.producers:
            rows = weight_of(model.get_submodule(producer.name)).double().square().sum(1)
            result *= rows.unflatten(0, (producer.parts, producer.channels)).prod(0)
        return result

    def shrink(self, model: PreTrainedModel, kept: Mapping[str, list[int]]) -> None:
        """Take the neurons out of the layers that make them and of the one that reads them."""
        sizes: dict[str, tuple[int, int]] = {}
        for parts in feed_forward_parts(model):
            if parts.name not in kept:
                continue
            stays = torch.tensor(kept[parts.name])
            for producer in parts.producers:
                offsets = producer.channels * torch.arange(producer.parts)
                keep_outputs(model.get_submodule(producer.name), (offsets[:, None] + stays).flatten())
            keep_inputs(model.get_submodule(parts.output), stays)
            own = vars(model.get_submodule(parts.name))
            own.update({key: len(stays) for key in FFN_KEYS if own.get(key) == parts.neurons})
            sizes[parts.name] = (parts.neurons, len(stays))
        for old, new in set(sizes.values()):
            edits = resized(model.config, FFN_KEYS, old, new)
            if not edits and getattr(model.config, "n_inner", 0) is None:
                edits = {"n_inner": new}
            if adopt(model, edits):
                for config in inner_configs(model):
                    for key, value in resized(config, FFN_KEYS, old, new).items():
                        setattr(config, key, value)
