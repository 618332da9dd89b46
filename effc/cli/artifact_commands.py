"""``effc inspect``, ``verify``, ``bench``, ``compare`` and ``generate``: what can be done with an artifact."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from effc.cli.flags import common, parse_lengths
from effc.cli.show_artifact import show_attention, show_changes, show_results
from effc.cli.show_measured import show_benchmark, show_comparison, show_verification
from effc.cli.terminal import plain, print_json, progress_bar
from effc.errors import UsageError


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@common
def inspect(artifact: Path, as_json: bool, quiet: bool, debug: bool) -> int:
    """Show what an artifact is and what was done to it."""
    from effc.compiler.artifact_files import check_files, read_manifest

    manifest = read_manifest(artifact)
    check_files(artifact, manifest)
    if as_json:
        print_json(plain(manifest))
    elif not quiet:
        source = manifest.source
        click.echo(f"{source.architecture} ({source.task}), {source.parameters:,} parameters, from {source.path}")
        click.echo(f"effc {manifest.effc_version}, target {manifest.target}, {manifest.created:%Y-%m-%d %H:%M} UTC")
        show_changes(manifest)
        show_attention(manifest)
        show_results(manifest)
    return 0


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(), help="Text, .jsonl or .csv file; labels give the task's own metric.")
@click.option("--samples", type=int, help="Samples to compare at most.")
@click.option("--max-length", type=int, help="Tokens per sample.")
@click.option("--source", type=click.Path(), help="Where the source model is now, if it was moved.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoint brings along.")
@click.option("--max-quality-drop", type=float, help="Exit 1 above this quality drop.")
@common
def verify(
    artifact: Path, max_quality_drop: float | None, as_json: bool, quiet: bool, debug: bool, **options: Any
) -> int:
    """Compare an artifact with its untouched source model."""
    from effc.compiler.artifact import remeasured
    from effc.compiler.verify import verify as run

    with progress_bar(not (quiet or as_json)) as progress:
        told = None if progress is None else lambda done, total: progress("samples", done, total)
        record = run(artifact, progress=told, **options)
    remeasured(artifact, verification=record)
    if as_json:
        print_json(plain(record))
    elif not quiet:
        show_verification(record)
    if max_quality_drop is not None and not record.quality_drop <= max_quality_drop:
        click.echo(f"Not met: the quality drop is {record.quality_drop:.4f}, above {max_quality_drop:g}.", err=True)
        return 1
    return 0


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--lengths", help="Tokens per sequence, e.g. 512,1024,2048,4096.")
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences per run.")
@click.option("--rounds", type=int, default=3, show_default=True, help="How often the two take turns per length.")
@click.option("--threads", type=int, help="Computing threads of each; all usable cores when not given.")
@click.option("--no-native", is_flag=True, help="Run the standard-operator bodies, not effc's native kernels.")
@click.option("--no-decode", is_flag=True, help="Do not measure what a token costs that the model writes.")
@click.option("--require-speedup", type=float, help="Exit 1 below this speed-up at the longest length.")
@click.option(
    "--require-decode-speedup", type=float, help="Exit 1 below this speed-up per token written, at the longest length."
)
@common
def bench(
    artifact: Path,
    lengths: str | None,
    no_native: bool,
    no_decode: bool,
    require_speedup: float | None,
    require_decode_speedup: float | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> int:
    """Time an artifact against the dense twin of its model, side by side."""
    from effc.compiler.artifact import remeasured
    from effc.compiler.bench import bench as run
    from effc.compiler.bench_ratios import unmet_speed

    if no_decode and require_decode_speedup is not None:
        raise UsageError("A minimum speed-up per token is required but not measured.", "Leave --no-decode out.")
    with progress_bar(not (quiet or as_json)) as progress:
        record = run(
            artifact,
            lengths=parse_lengths(lengths),
            native=not no_native,
            decode=not no_decode,
            progress=progress,
            **options,
        )
    remeasured(artifact, benchmark=record)
    if as_json:
        print_json(plain(record))
    elif not quiet:
        show_benchmark(record)
    unmet = list(unmet_speed(record, require_speedup, require_decode_speedup))
    if unmet:
        click.echo(f"Not met: {' '.join(unmet)}", err=True)
    return 1 if unmet else 0


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--length", type=int, help="Tokens at which speed counts; the longest that all were timed at by default.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write .html, .md, .json or .svg (the plot) too.")
@common
def compare(
    artifacts: tuple[Path, ...], length: int | None, output: Path | None, as_json: bool, quiet: bool, debug: bool
) -> int:
    """Set artifacts of one model side by side: quality against speed, and which of them no other one beats."""
    from effc.compiler.compare import compare as run

    comparison = run(artifacts, length)
    if output is not None:
        comparison.save(output)
    if as_json:
        print_json(asdict(comparison))
    elif not quiet:
        show_comparison(comparison)
    return 0


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text to write on from; - reads it from standard input.")
@click.option("--chat", is_flag=True, help="Put the prompt into the tokenizer's chat template.")
@click.option("--max-new-tokens", type=int, help="Tokens to write at most; up to 256 when not given.")
@click.option("--temperature", type=float, help="Draw tokens; the most likely one each time when not given.")
@click.option("--top-k", type=int, help="Draw from the most likely tokens only.")
@click.option("--top-p", type=float, help="Draw from the most likely tokens of this probability together.")
@click.option("--repetition-penalty", type=float, help="Above 1, tokens that are there already become less likely.")
@click.option("--seed", type=int, help="Equal seeds draw equal tokens.")
@click.option("--threads", type=int, help="Computing threads; all usable cores when not given.")
@common
def generate(
    artifact: Path,
    prompt: str,
    chat: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> int:
    """Write text with a compiled causal language model."""
    from effc.compiler.generation_text import write_text
    from effc.compiler.runtime import load

    given = {name: value for name, value in options.items() if value is not None}
    text = sys.stdin.read() if prompt == "-" else prompt
    told = None if as_json else lambda piece: click.echo(piece, nl=False)
    written = write_text(load(artifact, threads=threads, engine=False), text, chat=chat, told=told, **given)
    if as_json:
        print_json(asdict(written))
        return 0
    click.echo()
    if not quiet:
        speed = "" if written.tokens_per_s is None else f", then {written.tokens_per_s:.1f} tokens/s"
        click.echo(
            f"{written.prompt_tokens} + {written.new_tokens} tokens, first after {written.first_token_s:.2f} s{speed}",
            err=True,
        )
    return 0
