"""The contract every pass keeps.

A pass takes a model (a torch module or an ONNX graph), checks what must hold before, changes it, says exactly what it
changed and what it left alone and why, and checks what must hold after. The pipeline (``effc.compiler.pipeline``)
orders, times, probes and caches passes; a pass knows nothing of that.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel

Before = TypeVar("Before")
After = TypeVar("After")


@dataclass
class PassResult(Generic[After]):
    """What a pass did.

    Attributes:
        model: the changed model.
        modified: False if the pass found nothing to do.
        changed: names of modules or nodes that changed.
        skipped: ``(module or node, reason)`` of those that could have been changed and were not.
        metrics: figures worth keeping, plain JSON values.
    """

    model: After
    modified: bool
    changed: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)


class Pass(ABC, Generic[Before, After]):
    """One step of a compile.

    Attributes:
        name: as shown in progress, errors and ``effc.json``.
        version: raised when the pass's result changes, so that no stale cache entry is used.
        settings: the frozen recipe section that configures the pass.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    settings: BaseModel

    def requires(self, model: Before) -> None:
        """Check what must hold before.

        Raises:
            PreconditionError: naming the module and the reason.
        """

    @abstractmethod
    def run(self, model: Before) -> PassResult[After]:
        """Change the model (in place or not) and say what was done."""

    def ensures(self, model: After) -> None:
        """Check what must hold after.

        Raises:
            PassFailedError: if the pass broke its own promise.
        """

    def identity(self) -> str:
        """Text that is equal only for passes that do the same to the same model; part of every cache key."""
        return json.dumps([self.name, self.version, self.settings.model_dump(mode="json")], sort_keys=True)
