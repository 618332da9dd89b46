"""The ``effc`` command: parses flags, calls the Python API, shows the result. No logic of its own.

Exit codes: 0 done, 1 a requirement is not met, 2 bad usage or input, 130 interrupted. Nothing here imports torch before
a command needs it.
"""

from __future__ import annotations

import os
import signal

import click

from effc import __version__
from effc.cli.artifact_commands import bench, compare, generate, inspect, verify
from effc.cli.attention_command import attention
from effc.cli.compile_command import compile
from effc.cli.distill_command import distill
from effc.cli.doctor_command import doctor
from effc.cli.group import ErrorGroup
from effc.cli.recipe_command import recipe
from effc.cli.serving_commands import kubernetes, load_test, serve, triton


@click.group(cls=ErrorGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="effc")
def main() -> None:
    """Compile Hugging Face Transformers to sparse attention and INT8, and measure what it brought."""
    # Libraries would write to the terminal over effc's own progress.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Not by way of SIGINT, which shells let programs in the background ignore.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


for _command in (
    compile,
    inspect,
    verify,
    bench,
    compare,
    generate,
    attention,
    distill,
    triton,
    serve,
    kubernetes,
    load_test,
    doctor,
    recipe,
):
    main.add_command(_command)
