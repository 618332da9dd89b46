"""Which mode each layer is quantized to: what the recipe says by glob, what a search has chosen, else the default."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from effc.passes.quantize_settings import QuantizationSection

ELSEWHERE = "it has another mode"
"""The reason that stands for layers which another pass quantizes; never shown."""


class Schemes:
    """Answers which mode a layer has.

    Args:
        settings: the recipe's section.
        chosen: mode and reason by layer name, from a search; they count before anything else.
    """

    def __init__(self, settings: QuantizationSection, chosen: Mapping[str, tuple[str, str]] | None = None):
        self._settings = settings
        self._chosen = dict(chosen or {})

    def of(self, *names: str | None) -> tuple[str, str]:
        """Mode of the layer that goes by these names, and why it has that."""
        for name in names:
            if name in self._chosen:
                return self._chosen[name]
        if (glob := self._glob(names)) is not None:
            return self._settings.layers[glob], f"kept in fp32 by '{glob}'"
        return self._settings.base_mode, "nothing is quantized unless a glob names it"

    def asked(self, *names: str | None) -> bool:
        """Whether the recipe gives this very layer a mode, so that rules of thumb do not count."""
        return self._glob(names) is not None

    def _glob(self, names: tuple[str | None, ...]) -> str | None:
        layers = self._settings.layers
        return next((glob for glob in layers for name in names if name and fnmatchcase(name, glob)), None)
