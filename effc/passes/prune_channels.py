"""What pruning heads and pruning feed-forward neurons have in common: units that one linear layer reads.

A unit is removed in two steps. First the weights that read it become zero (and the others are fitted to make up for it,
where there is calibration data), then the matrices shrink. Both must give the same model; that proves for every
architecture that its code was understood.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from effc.errors import PassFailedError, PreconditionError
from effc.passes.base import Pass, PassResult
from effc.passes.prune_calibration import Calibration, check_texts
from effc.passes.prune_settings import PruneStep
from effc.passes.prune_slice import forget_inputs, weight_of
from effc.passes.prune_structure import selected

# Relative, in fp32; sums of fewer terms are rounded differently.
_FAITHFUL = 1e-3


@dataclass(frozen=True)
class Site:
    """A place where units can be removed.

    Attributes:
        name: as globs and reports name it.
        reader: the linear layer that reads the units.
        units: how many there are.
        width: neighbouring inputs of the reader that are one unit.
        multiple: the number that stays is a multiple of this.
        tied: sites that must lose the same units share this name.
    """

    name: str
    reader: str
    units: int
    width: int
    multiple: int = 1
    tied: str | None = None

    def inputs(self, kept: Sequence[int]) -> torch.Tensor:
        """The reader's inputs that belong to the units ``kept``."""
        return (torch.tensor(list(kept))[:, None] * self.width + torch.arange(self.width)).flatten()

    def remaining(self, share: float) -> int:
        """Units that stay when ``share`` of them go."""
        kept = round(self.units * (1 - share) / self.multiple) * self.multiple
        return min(self.units, max(self.multiple, kept))


class PruneChannels(Pass[PreTrainedModel, PreTrainedModel]):
    """Base of the passes that remove units.

    Args:
        settings: the entry of the recipe's ``prune`` list.
        probe: inputs that the shrunk model is compared on with the one whose weights are zero.
        calibration: texts to measure on; None goes by the weights alone.
    """

    unit: str
    """What one unit is, in the plural."""

    def __init__(
        self, settings: PruneStep, probe: Mapping[str, torch.Tensor], calibration: Calibration | None = None
    ) -> None:
        self.settings: PruneStep = settings
        self._probe, self._calibration = dict(probe), calibration
        self._error = 0.0

    @abstractmethod
    def sites(self, model: PreTrainedModel) -> tuple[list[Site], list[tuple[str, str]]]:
        """Where units are, and modules that are left alone with the reason."""

    @abstractmethod
    def weights_of(self, model: PreTrainedModel, site: Site) -> torch.Tensor:
        """A unit's weights before the reader as one number each: sums of squares, ``[units]``."""

    @abstractmethod
    def shrink(self, model: PreTrainedModel, kept: Mapping[str, list[int]]) -> None:
        """Take all units but ``kept`` (by site) out of the matrices, and let config and attributes know."""

    def requires(self, model: PreTrainedModel) -> None:
        """There must be units, and few enough must be asked for.

        Raises:
            PreconditionError: saying what stands against it.
            UsageError: if a glob matches nothing.
        """
        sites, skipped = self.sites(model)
        kind = type(model).__name__
        if not sites:
            reason = skipped[0][1] if skipped else "its layers have none, or names that effc does not know"
            raise PreconditionError(
                f"No {self.unit} of {kind} can be removed: {reason}.",
                f"Leave {self.settings.text} out.",
            )
        if self.settings.criterion in ("activation", "taylor"):
            check_texts(self._calibration, f"The criterion '{self.settings.criterion}'", "magnitude")
        chosen = self._chosen(sites)
        assert self.settings.share is not None
        if all(site.remaining(self.settings.share) == site.units for site in chosen):
            least = min((site.multiple / site.units for site in chosen if site.units > site.multiple), default=None)
            most = max(site.units for site in chosen)
            remedy = f"One step is {least:.3g}; ask for more than half of that." if least else "Leave it out."
            raise PreconditionError(
                f"{self.settings.share:g} of {most} {self.unit} per layer is none, in steps of {chosen[0].multiple}.",
                remedy,
            )

    def run(self, model: PreTrainedModel) -> PassResult[PreTrainedModel]:
        """Remove units, in place."""
        self.requires(model)
        sites, skipped = self.sites(model)
        chosen = self._chosen(sites)
        names = {site.name for site in chosen}
        skipped += [(site.name, "not chosen by include and exclude") for site in sites if site.name not in names]
        before = sum(parameter.numel() for parameter in model.parameters())
        kept = self._choose(model, chosen)
        shrunk = [site for site in chosen if len(kept[site.name]) < site.units]
        self._forget(model, shrunk, kept)
        reference = self._outputs(model)
        self.shrink(model, {site.name: kept[site.name] for site in shrunk})
        self._error = self._distance(model, reference)
        total = sum(site.units for site in chosen)
        metrics: dict[str, Any] = {
            "parameters_before": before,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "share": 1 - sum(len(kept[site.name]) for site in chosen) / total,
            self.unit: {site.name: f"{len(kept[site.name])} of {site.units}" for site in chosen},
            "criterion": self._criterion(),
            "calibration": None if self._calibration is None else self._calibration.data,
            "reconstructed": self._reconstructs(),
            "shrinking_error": self._error,
        }
        changed = [site.name for site in shrunk]
        skipped += [(site.name, "nothing to remove") for site in chosen if len(kept[site.name]) == site.units]
        return PassResult(model, bool(changed), changed, skipped, metrics)

    def ensures(self, model: PreTrainedModel) -> None:
        """The shrunk matrices must compute what the zeroed ones did.

        Raises:
            PassFailedError: if they do not.
        """
        if not self._error <= _FAITHFUL:
            raise PassFailedError(
                f"{type(model).__name__} without these {self.unit} is off by {self._error:.2g} from the same model "
                "with their weights at zero, so its code uses them in a way that effc does not know.",
                f"Leave {self.settings.text} out, and report this model.",
            )

    def _chosen(self, sites: Sequence[Site]) -> list[Site]:
        names = selected([site.name for site in sites], self.settings.include, self.settings.exclude)
        chosen = [site for site in sites if site.name in names]
        ties = {site.tied for site in chosen if site.tied}
        left = [site.name for site in sites if site.tied in ties and site.name not in names]
        if left:
            raise PreconditionError(
                f"{left[0]} shares a bias by distance with layers that are to be pruned, and must lose the same.",
                "Leave include and exclude out for this model.",
            )
        return chosen

    def _criterion(self) -> str:
        if self.settings.criterion != "auto":
            return self.settings.criterion
        return "magnitude" if self._calibration is None else "taylor"

    def _reconstructs(self) -> bool:
        return self.settings.reconstruct and self._calibration is not None

    def _choose(self, model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, list[int]]:
        """The units that stay, by site."""
        scores = self._scores(model, sites)
        for tie in {site.tied for site in sites if site.tied}:
            together = [site.name for site in sites if site.tied == tie]
            total = torch.stack([scores[name] / scores[name].sum() for name in together]).sum(0)
            scores.update(dict.fromkeys(together, total))
        share = self.settings.share
        assert share is not None
        if self.settings.uniform:
            counts = {site.name: site.remaining(share) for site in sites}
        else:
            counts = _over_all(sites, scores, share)
        return {
            site.name: sorted(scores[site.name].argsort(descending=True, stable=True)[: counts[site.name]].tolist())
            for site in sites
        }

    def _scores(self, model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        """What each unit is worth, ``[units]`` by site."""
        criterion = self._criterion()
        if criterion == "magnitude":
            return {site.name: self._read(model, site) * self.weights_of(model, site) for site in sites}
        assert self._calibration is not None
        measured: dict[str, torch.Tensor] = {}
        for stage in self._calibration.stages([site.reader for site in sites], 1):
            measured |= {reader: statistics.norms.square() for reader, statistics in stage.items()}
        passed_on = {site.name: self._read(model, site, measured[site.reader]) for site in sites}
        if criterion == "activation":
            return passed_on
        owed = self._calibration.owed({site.reader: site.width for site in sites})
        # A norm behind the unit saturates on a massive activation, so that its gradient says nothing of it
        # (Sun et al., 2024). Its share of what the reader makes of its inputs does.
        return {
            site.name: owed[site.reader]
            + owed[site.reader].sum() * passed_on[site.name] / passed_on[site.name].sum().clamp_min(1e-30)
            for site in sites
        }

    def _read(self, model: PreTrainedModel, site: Site, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Squares of the weights that read each unit, with ``scale`` by input, ``[units]``."""
        squares = weight_of(model.get_submodule(site.reader)).double().square().sum(0) * scale
        summed: torch.Tensor = squares.unflatten(0, (-1, site.width)).sum(-1)
        return summed

    def _forget(self, model: PreTrainedModel, sites: Sequence[Site], kept: Mapping[str, list[int]]) -> None:
        """Let the readers do without the units that go."""
        if not self._reconstructs():
            for site in sites:
                forget_inputs(model.get_submodule(site.reader), site.inputs(kept[site.name]), None)
            return
        assert self._calibration is not None
        by_reader = {site.reader: site for site in sites}
        for measured in self._calibration.stages(by_reader):
            for reader, statistics in measured.items():
                site = by_reader[reader]
                forget_inputs(model.get_submodule(reader), site.inputs(kept[site.name]), statistics)

    def _outputs(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            outputs = model(**self._probe)
        return {
            name: value
            for name, value in outputs.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }

    def _distance(self, model: PreTrainedModel, reference: Mapping[str, torch.Tensor]) -> float:
        try:
            found = self._outputs(model)
        except (RuntimeError, IndexError, ValueError) as error:
            raise PassFailedError(
                f"{type(model).__name__} does not run with fewer {self.unit}: {str(error).splitlines()[0]}.",
                f"Leave {self.settings.text} out, and report this model.",
            ) from error
        mask = self._probe.get("decoder_attention_mask", self._probe.get("attention_mask"))
        worst = 0.0
        for name, expected in reference.items():
            difference = found[name] - expected
            if mask is not None and expected.shape[:2] == mask.shape:
                difference, expected = difference[mask.bool()], expected[mask.bool()]
            worst = max(worst, float(difference.norm() / expected.norm().clamp_min(1e-12)))
        return worst


def _over_all(sites: Sequence[Site], scores: Mapping[str, torch.Tensor], share: float) -> dict[str, int]:
    """How many units of each site stay where the least important of all sites together go."""
    floor = {site.name: min(site.units, site.multiple) for site in sites}
    ranked = sorted(
        (float(value), site.name)
        for site in sites
        for value in scores[site.name].sort(descending=True).values[floor[site.name] :]
    )
    counts = {site.name: site.units for site in sites}
    for _, name in ranked[: round(share * sum(counts.values()))]:
        counts[name] -= 1
    widths = {site.name: site.multiple for site in sites}
    return {name: max(floor[name], round(count / widths[name]) * widths[name]) for name, count in counts.items()}
