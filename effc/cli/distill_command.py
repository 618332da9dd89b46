"""``effc distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from effc.cli.flags import common
from effc.cli.terminal import print_json, progress_bar


@click.command()
@click.argument("student", type=click.Path())
@click.argument("teacher", type=click.Path())
@click.option("--data", type=click.Path(), required=True, help="Text, .jsonl or .csv file to train on.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Checkpoint directory to make.")
@click.option("--loss", "losses", multiple=True, help="logits, hidden, embedding, ...; NAME:WEIGHT; repeatable.")
@click.option("--minutes", type=float, help="Wall time to train; 20 when no steps are given either.")
@click.option("--steps", type=int, help="Optimizer steps to train.")
@click.option("--learning-rate", type=float, help="At its highest.")
@click.option("--batch", type=int, help="Texts per device and forward pass.")
@click.option("--accumulate", type=int, help="Forward passes per optimizer step.")
@click.option("--length", type=int, help="Tokens per text.")
@click.option("--temperature", type=float, help="Of the logits loss.")
@click.option("--lora", type=int, help="Train low-rank updates of this rank, not all weights.")
@click.option("--fake-quant", is_flag=True, default=None, help="Train with the rounding of INT8.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), help="Of forward and backward pass.")
@click.option("--activations", type=click.Choice(["keep", "recompute", "offload"]), help="To fit long texts.")
@click.option("--held-out", type=int, help="Texts that the best checkpoint is chosen by.")
@click.option("--evaluate-every", type=int, help="Steps between evaluations and checkpoints.")
@click.option("--patience", type=int, help="Evaluations without improvement until training stops.")
@click.option("--seed", type=int, help="Of the order of texts.")
@click.option("--tracker", "trackers", multiple=True, help="tensorboard, wandb, ...; repeatable.")
@click.option("--task", help="Detected from STUDENT's config when not given.")
@click.option("--restart", is_flag=True, help="Begin anew where a killed run could be gone on with.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoints bring along.")
@common
def distill(student: str, teacher: str, output: Path, as_json: bool, quiet: bool, debug: bool, **options: Any) -> int:
    """Train the checkpoint STUDENT to do what TEACHER does; a killed run goes on when it is repeated."""
    from effc.compiler.distill import distill as run
    from effc.compiler.distill_record import describe

    given = {name: value for name, value in options.items() if value is not None and value != ()}
    with progress_bar(not (quiet or as_json)) as progress:
        distilled = run(student, teacher, output=output, progress=progress, **given)
    done = distilled.run
    if as_json:
        print_json({"output": str(output), "run": describe(done)})
    elif not quiet:
        for stage in done.stages:
            click.echo(f"{stage.name}: {stage.steps} steps, {stage.parameters:,} parameters trained")
        click.echo(f"Held-out loss on {done.held_out} texts: {done.before:.4f} before, {done.after:.4f} after")
        click.echo(f"Checkpoint: {output}")
    return 0
