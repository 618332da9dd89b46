"""The errors effc raises on purpose.

Each says in one paragraph what is wrong and what to do about it. The CLI prints that paragraph and exits with
``exit_code``; a traceback appears only with ``--debug``.
"""

from __future__ import annotations


class EffcError(Exception):
    """Base of every error a user can cause or cure.

    Args:
        problem: what is wrong, as a full sentence.
        remedy: what to do about it, as a full sentence. Shown right behind the problem.
    """

    exit_code = 2

    def __init__(self, problem: str, remedy: str = ""):
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem} {remedy}".strip())


class UsageError(EffcError):
    """A flag, a recipe key or a value that effc does not accept."""


class SourceModelError(EffcError):
    """The model to compile is missing, unreadable or of an unsupported kind."""


class DataError(EffcError):
    """A data file (calibration, verification) is missing or does not fit the model."""


class PreconditionError(EffcError):
    """A pass cannot run on this model, recipe or target."""


class OutputError(EffcError):
    """The artifact directory cannot be written, or cannot be read as an artifact."""


class MissingDependencyError(EffcError):
    """An optional package is needed and not installed; the remedy names the command that installs it."""


class PassFailedError(EffcError):
    """A pass raised or produced wrong numbers. Names the pass and those that ran before it."""


class RequirementError(EffcError):
    """The result was built but misses ``--require-speedup`` or ``--max-quality-drop``."""

    exit_code = 1
