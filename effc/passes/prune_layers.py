"""Remove whole transformer layers: those that change their input least, or whose absence changes the output least.

``similarity`` is the block influence of ShortGPT (Men et al., 2024), one minus the mean cosine between a layer's input
and output, from one run. ``output`` removes one layer after the other, each time the one without which the model's
output on the calibration texts changes least; it takes a run per layer and step, and sees what layers do together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from effc.errors import PassFailedError, PreconditionError
from effc.passes.base import Pass, PassResult
from effc.passes.prune_calibration import Calibration, real_rows
from effc.passes.prune_config import DECODER_LAYER_KEYS, LAYER_KEYS, adopt, inner_configs, resized
from effc.passes.prune_settings import PruneStep
from effc.passes.prune_structure import LayerList, layer_lists, selected

# Lists in a config with one entry per layer.
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


class PruneLayers(Pass[PreTrainedModel, PreTrainedModel]):
    """Remove ``settings.share`` of the layers of every stack.

    Args:
        settings: the entry of the recipe's ``prune`` list.
        probe: inputs that the shorter model must run on.
        calibration: what to measure on.
    """

    name: ClassVar[str] = "prune-layers"
    version: ClassVar[int] = 1

    def __init__(self, settings: PruneStep, probe: Mapping[str, torch.Tensor], calibration: Calibration) -> None:
        self.settings: PruneStep = settings
        self._probe, self._calibration = dict(probe), calibration

    def requires(self, model: PreTrainedModel) -> None:
        """There must be a list of layers, long enough that the share is at least one of them.

        Raises:
            PreconditionError: saying what stands against it.
            UsageError: if a glob matches no layer.
        """
        stacks = layer_lists(model)
        if not stacks:
            raise PreconditionError(
                f"{type(model).__name__} has no list of layers that could be shortened.",
                f"Leave {self.settings.text} out.",
            )
        share = self.settings.share
        assert share is not None
        most = max(len(stack.layers) for stack in stacks)
        if round(share * most) < 1:
            raise PreconditionError(
                f"{share:g} of {most} layers is none.", f"Ask for at least {0.5 / most:.2g}, which is one layer."
            )
        self._candidates(stacks)

    def run(self, model: PreTrainedModel) -> PassResult[PreTrainedModel]:
        """Remove layers, in place."""
        self.requires(model)
        stacks = layer_lists(model)
        before = sum(parameter.numel() for parameter in model.parameters())
        candidates, skipped = self._candidates(stacks)
        worth: dict[str, float] = {}
        removed: list[str] = []
        for stack in stacks:
            names = [name for name in candidates if name.startswith(f"{stack.name}.")]
            assert self.settings.share is not None
            count = min(len(names), round(self.settings.share * len(stack.layers)), len(stack.layers) - 1)
            if self.settings.criterion == "output":
                gone, found = self._least_missed(model, stack, names, count)
            else:
                found = self._influence(model, names)
                gone = sorted(names, key=lambda name: found[name])[:count]
            worth |= found
            removed += gone
            _remove(model, stack, {int(name.rpartition(".")[2]) for name in gone})
        metrics: dict[str, Any] = {
            "parameters_before": before,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "layers": {stack.name: len(stack.layers) for stack in layer_lists(model)},
            "criterion": "output" if self.settings.criterion == "output" else "similarity",
            "calibration": self._calibration.data,
            "worth": worth,
        }
        return PassResult(model, bool(removed), removed, skipped, metrics)

    def ensures(self, model: PreTrainedModel) -> None:
        """The model must run with the layers that are left.

        Raises:
            PassFailedError: if it does not.
        """
        try:
            with torch.no_grad():
                model(**self._probe)
        except (RuntimeError, IndexError, ValueError, KeyError) as error:
            raise PassFailedError(
                f"{type(model).__name__} does not run with fewer layers: {str(error).splitlines()[0]}.",
                f"Leave {self.settings.text} out, and report this model.",
            ) from error

    def _candidates(self, stacks: list[LayerList]) -> tuple[list[str], list[tuple[str, str]]]:
        """Layers that may go, and the others with the reason."""
        known = [f"{stack.name}.{number}" for stack in stacks for number in range(len(stack.layers))]
        chosen = selected(known, self.settings.include, self.settings.exclude)
        skipped = [(name, "not chosen by include and exclude") for name in known if name not in chosen]
        for stack in stacks:
            usual = {name for name, _ in stack.layers[-1].named_parameters()}
            for number, layer in enumerate(stack.layers):
                name = f"{stack.name}.{number}"
                if name in chosen and {parameter for parameter, _ in layer.named_parameters()} != usual:
                    chosen.remove(name)
                    skipped.append((name, "it has other weights than the layers around it"))
        return chosen, skipped

    def _influence(self, model: PreTrainedModel, names: list[str]) -> dict[str, float]:
        """One minus the mean cosine between input and output, by layer."""
        sums = dict.fromkeys(names, 0.0)
        tokens = dict.fromkeys(names, 0)
        masks: list[torch.Tensor] = []

        def hook_of(name: str) -> Any:
            def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
                given = arguments[0] if arguments else named["hidden_states"]
                made = output if isinstance(output, torch.Tensor) else output[0]
                cosine = torch.nn.functional.cosine_similarity(real_rows(given, masks), real_rows(made, masks), dim=-1)
                sums[name] += float(cosine.double().sum())
                tokens[name] += len(cosine)

            return hook

        handles = [model.get_submodule(name).register_forward_hook(hook_of(name), with_kwargs=True) for name in names]
        try:
            for batch in self._calibration.batches:
                masks[:] = [value.bool() for key, value in batch.items() if key.endswith("attention_mask")]
                self._calibration.outputs(batch)
        finally:
            for handle in handles:
                handle.remove()
        return {name: 1 - sums[name] / max(1, tokens[name]) for name in names}

    def _least_missed(
        self, model: PreTrainedModel, stack: LayerList, names: list[str], count: int
    ) -> tuple[list[str], dict[str, float]]:
        """The layers to remove one after the other, and what the output lost by each when it went."""
        reference = [self._rows(batch) for batch in self._calibration.batches]
        gone: list[str] = []
        worth: dict[str, float] = {}
        for _ in range(count):
            tried = {}
            for name in names:
                if name not in gone:
                    with _without(model, [*gone, name]):
                        tried[name] = self._change(reference)
            best = min(tried, key=lambda name: tried[name])
            gone.append(best)
            worth = {**tried, **{name: worth[name] for name in gone if name in worth}}
        return gone, worth

    def _change(self, reference: list[torch.Tensor]) -> float:
        """Squared relative change of the output, mean over the tokens."""
        changes = []
        for batch, expected in zip(self._calibration.batches, reference, strict=True):
            difference = self._rows(batch) - expected
            changes.append(difference.square().sum(-1) / expected.square().sum(-1).clamp_min(1e-12))
        return float(torch.cat(changes).mean())

    def _rows(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        outputs = self._calibration.outputs(batch)
        output = outputs["logits"] if outputs.get("logits") is not None else outputs["last_hidden_state"]
        mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
        return real_rows(output, [] if mask is None else [mask.bool()])


class _Passing(nn.Module):
    """Stands in for a layer and hands its input on, in the form in which the layer returns it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        output = self.__dict__["layer"](*arguments, **named)
        given = arguments[0] if arguments else named["hidden_states"]
        return given if isinstance(output, torch.Tensor) else (given, *output[1:])


class _without:
    """Within the block, layers hand on their input. They still run, because some return more than hidden states."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self._places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
        self._layers: list[Any] = []

    def __enter__(self) -> None:
        for parent, number in self._places:
            layer = parent._modules[number]
            assert layer is not None
            self._layers.append(layer)
            parent._modules[number] = _Passing(layer)

    def __exit__(self, *_: object) -> None:
        for (parent, number), layer in zip(self._places, self._layers, strict=True):
            parent._modules[number] = layer


def _remove(model: PreTrainedModel, stack: LayerList, gone: set[int]) -> None:
    """Take layers out of a stack; numbers that the others know of themselves, and the config, follow."""
    old = len(stack.layers)
    kept = [number for number in range(old) if number not in gone]
    layers = nn.ModuleList(stack.layers[number] for number in kept)
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if vars(module).get("layer_idx") is not None:
                vars(module)["layer_idx"] = number
    parent, _, name = stack.name.rpartition(".")
    setattr(model.get_submodule(parent), name, layers)
    decoder = model.config.is_encoder_decoder and "decoder" in stack.name.split(".")
    keys = DECODER_LAYER_KEYS if decoder else LAYER_KEYS
    for config in (model.config, *inner_configs(model)):
        edits: dict[str, Any] = {**resized(config, keys, old, len(layers))}
        for key in _PER_LAYER:
            values = getattr(config, key, None)
            if isinstance(values, (list, tuple)) and len(values) == old:
                edits[key] = [values[number] for number in kept]
        if config is model.config:
            adopt(model, edits)
        elif config is getattr(model.get_submodule(parent.rpartition(".")[0] or parent), "config", None) or not decoder:
            for key, value in edits.items():
                setattr(config, key, value)
