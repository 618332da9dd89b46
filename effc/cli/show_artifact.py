"""What was done to an artifact, as tables and sentences."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table

from effc.cli.show_measured import show_benchmark, show_verification
from effc.compiler.manifest import Manifest


def show_changes(manifest: Manifest) -> None:
    """The passes, and what they left of weights and positions."""
    _show_passes(manifest)
    _show_compression(manifest)
    _show_positions(manifest)


def show_attention(manifest: Manifest) -> None:
    """What every attention module was and is."""
    table = Table("attention module", "was", "is", "direction", "heads", "note")
    for layer in manifest.attention:
        heads = f"{layer.num_heads}/{layer.kv_heads} x {layer.head_dim}"
        direction = "causal" if layer.causal else "bidirectional"
        table.add_row(layer.layer, layer.source, layer.pattern, direction, heads, layer.reason or "")
    Console().print(table)


def show_results(manifest: Manifest) -> None:
    """Quality and speed, what writes text, and engines."""
    show_verification(manifest.verification)
    show_benchmark(manifest.benchmark)
    _show_generation(manifest)
    _show_engines(manifest)


def _show_passes(manifest: Manifest) -> None:
    table = Table("pass", "seconds", "changed", "skipped", "error to source", title="Passes")
    for record in manifest.passes:
        worst = max((deviation.relative_error for deviation in (record.probe or {}).values()), default=None)
        seconds = "cached" if record.cached else f"{record.seconds:.1f}"
        error = "" if worst is None else f"{worst:.2g}"
        table.add_row(record.name, seconds, str(len(record.changed)), str(len(record.skipped)), error)
    Console().print(table)


def _show_compression(manifest: Manifest) -> None:
    """What pruning and factorization left, and whether that brings speed on the target."""
    from effc.compiler.report_explain import compression_sentence

    if manifest.compression is None:
        return
    click.echo("Weights: " + compression_sentence(manifest.compression, manifest.source.parameters))
    for note in manifest.compression.notes:
        click.secho("Note: ", fg="yellow", nl=False)
        click.echo(note)
    if manifest.checkpoint is not None and manifest.checkpoint.reason:
        click.echo(f"Checkpoint: {manifest.checkpoint.reason}.")


def _show_positions(manifest: Manifest) -> None:
    done = manifest.positions
    if done is None:
        return
    how = f"{done.trained} to {done.max_length} tokens ({done.method})" if done.method else f"{done.max_length} tokens"
    rows = f", {', '.join(f'{name}: {count} rows' for name, count in done.rows.items())}" if done.rows else ""
    click.echo(f"Positions: {how}{rows}" + (f", {done.formula}" if done.formula else ""))


def _show_engines(manifest: Manifest) -> None:
    """The engines, what they are made of, and that none was run."""
    built = manifest.engines
    if built is None:
        return
    for record in manifest.passes:
        for skipped in record.skipped if record.name == "engines" else ():
            click.echo(f"No prefill and decode engines: {skipped.reason}")
    table = Table("engine", "MiB", "attention", "linear layers", title=f"{built.flavour} {built.version}")
    for engine in built.engines:
        size = manifest.files[engine.file].bytes / 2**20 if engine.file in manifest.files else float("nan")
        table.add_row(engine.file, f"{size:.1f}", _counted(engine.attention), _counted(engine.linears))
    Console().print(table)
    for engine in built.engines:
        for warning in engine.warnings:
            click.echo(f"{engine.file}: {warning}", err=True)
    if built.not_run:
        click.echo(f"{built.not_run.capitalize()}.")


def _counted(kernels: dict[str, str]) -> str:
    counts: dict[str, int] = {}
    for kernel in kernels.values():
        counts[kernel] = counts.get(kernel, 0) + 1
    return "\n".join(f"{count} x {kernel}" for kernel, count in counts.items())


def _show_generation(manifest: Manifest) -> None:
    """What each layer remembers while text is written, or why none can be."""
    for record in manifest.passes:
        if record.name == "generation":
            for skipped in record.skipped:
                click.echo(f"No text can be written: {skipped.reason}")
    if manifest.generation is None:
        return
    for number, group in enumerate(manifest.generation.groups):
        count = sum(layer.group == number for layer in manifest.generation.layers)
        if group.kind == "state":
            kept = "a recurrent state of fixed size"
        elif group.recent is None:
            kept = "keys and values of every position"
        else:
            kept = f"keys and values of {group.sinks + group.recent} positions at most"
        click.echo(f"Writing text, {count} x {group.pattern}: {kept}")
