"""The ``effc`` command: parses flags, calls the Python API, shows the result. No logic of its own.

Exit codes: 0 done, 1 a requirement is not met, 2 bad usage or input, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from effc import __version__
from effc.compiler.manifest import BenchRecord, Manifest, SpeedRecord, VerifyRecord
from effc.compiler.recipe import Recipe, build_recipe, default_output, load_recipe, merge
from effc.errors import EffcError, UsageError
from effc.passes.positions_settings import METHODS

_INTERRUPTED = 130

Command = Callable[..., Any]


class _Group(click.Group):
    """Turns errors into one paragraph on stderr and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        debug = "--debug" in sys.argv
        try:
            code = super().main(*args, **kwargs)
        except EffcError as error:
            code = _failed(error, str(error), error.exit_code, debug)
        except (click.exceptions.Abort, KeyboardInterrupt):
            click.echo("Interrupted; no half-written output was left.", err=True)
            code = _INTERRUPTED
        except click.ClickException as error:
            error.show()
            code = 2
        except (OSError, MemoryError) as error:
            text = f"{type(error).__name__}: {error}. Check the paths, free memory and disk; --debug shows more."
            code = _failed(error, text, 2, debug)
        except Exception as error:
            text = f"Unexpected {type(error).__name__}: {error}. Run again with --debug and report the trace."
            code = _failed(error, text, 2, debug)
        sys.exit(code if isinstance(code, int) else 0)


def _failed(error: BaseException, text: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    click.secho("Error: ", fg="red", bold=True, err=True, nl=False)
    click.echo(text, err=True)
    return code


def _common(command: Command) -> Command:
    """The flags that every command takes."""
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)
    command = click.option("--quiet", is_flag=True, help="Print errors only.")(command)
    return click.option("--debug", is_flag=True, help="Show the traceback of an error.")(command)


@contextmanager
def _progress(show: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A rich progress bar on stderr, or nothing."""
    if not show:
        yield None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False, default=str))


def _plain(record: Any) -> Any:
    """JSON values of a record; infinities become text."""
    return json.loads(record.model_dump_json())


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="effc")
def main() -> None:
    """Compile Hugging Face Transformers to sparse attention and INT8, and measure what it brought."""
    # Libraries would write to the terminal over effc's own progress.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Not by way of SIGINT, which shells let programs in the background ignore.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@main.command()
@click.argument("model", required=False)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Artifact directory to make; <model name>.effc by default."
)
@click.option("--attn", help="Form of every layer (local:256) or of some (0-3=dense,4-*=local:256), auto:0.02, duo.")
@click.option("--attn-exclude", multiple=True, help="Glob of attention modules that stay as they are; repeatable.")
@click.option("--force", is_flag=True, default=None, help="Accept forms that need training, untrained.")
@click.option("--allow-partial", is_flag=True, default=None, help="Exit 0 even if some layers cannot be rewritten.")
@click.option("--max-length", type=int, help="Extend the model to texts of this many tokens.")
@click.option(
    "--positions",
    multiple=True,
    help=f"How to extend: {', '.join(METHODS)}; or sparse, for few table rows; repeatable.",
)
@click.option(
    "--prune",
    multiple=True,
    help="heads:0.25, ffn:0.25, layers:0.25, vocab:FILE, 2:4, magnitude:0.5; repeatable, see docs/pruning.md.",
)
@click.option("--low-rank", help="Factorize linear layers: 0.5 (share of parameters), rank:64 or energy:0.95.")
@click.option(
    "--recover",
    is_flag=False,
    flag_value="default",
    metavar="[BUDGET]",
    help="Train the rewritten model to do what MODEL does: 20m, 1.5h or 500 (steps); 20m when no budget is given.",
)
@click.option("--recover-data", type=click.Path(), help="Text, .jsonl or .csv file to train on.")
@click.option("--recover-loss", multiple=True, help="logits, hidden, embedding, attention, ...; :WEIGHT; repeatable.")
@click.option("--recover-lora", type=int, help="Train low-rank updates of this rank, not all weights.")
@click.option("--recover-fake-quant", is_flag=True, default=None, help="Train with the rounding of --quant=int8.")
@click.option("--quant", help="int8, int8-weights, int4-weights, fp8, fp16, bf16, none, or auto:0.01.")
@click.option("--quant-layer", multiple=True, help="GLOB=MODE for layers of their own; first match counts; repeatable.")
@click.option("--quant-smoothing", help="SmoothQuant for int8: auto, or an alpha such as 0.5.")
@click.option("--quant-activations", help="Scales of INT8 inputs: tensor or token.")
@click.option("--quant-attention", help="Round queries, keys and values in front of attention: int8 or fp8.")
@click.option("--quant-kv-cache", help="What generate() keeps keys and values in: fp32, fp16 or int8.")
@click.option("--quant-weights", help="How int4-weights and int8-weights round: rtn, awq or gptq.")
@click.option("--quant-exclude", multiple=True, help="Glob of layers that stay in fp32; repeatable.")
@click.option("--calibration", type=click.Path(), help="Text, .jsonl, .csv or hf:NAME for quantization and pruning.")
@click.option("--target", help="What the artifact runs on: onnxruntime, tensorrt_rtx, tensorrt or torch_tensorrt.")
@click.option("--arch", help="GPUs to build engines for, e.g. sm_89,sm_120; this machine's when not given.")
@click.option("--shapes", help="Shapes to tune engines for, e.g. 1x128,4x1024,8x4096: batch x length.")
@click.option("--engine-precision", help="What an engine computes in besides INT8 and FP8: fp16, bf16 or fp32.")
@click.option("--no-plugin", is_flag=True, help="Build engines of standard operators, without effc's plugin.")
@click.option("--tensor-parallel", type=int, help="GPUs that compute every layer together, an engine for each.")
@click.option("--embed-plugin", is_flag=True, default=None, help="Put the plugin library into the engine's file.")
@click.option("--task", help="Detected from the config when not given.")
@click.option("--revision", help="Hub branch, tag or commit.")
@click.option("--trust-remote-code", is_flag=True, default=None, help="Run code that the checkpoint brings along.")
@click.option("--recipe", type=click.Path(), help="Recipe file; flags override it.")
@click.option("--data", type=click.Path(), help="Text, .jsonl or .csv file to verify quality on.")
@click.option("--lengths", help="Lengths to benchmark, e.g. 512,1024.")
@click.option("--no-bench", is_flag=True, help="Do not measure speed.")
@click.option("--no-generation", is_flag=True, help="Do not make the graph that writes text (causal models only).")
@click.option("--checkpoint", is_flag=True, default=None, help="Also write OUT/checkpoint for transformers.")
@click.option("--require-speedup", type=float, help="Exit 1 below this speed-up at the longest length.")
@click.option(
    "--require-decode-speedup", type=float, help="Exit 1 below this speed-up per token written, at the longest length."
)
@click.option("--max-quality-drop", type=float, help="Exit 1 above this quality drop.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is already there.")
@_common
def compile(output: Path | None, overwrite: bool, as_json: bool, quiet: bool, debug: bool, **flags: Any) -> int:
    """Compile MODEL (a local directory, a GGUF file or a hub name)."""
    from effc.compiler.artifact import check_output
    from effc.compiler.engine_check import check_engine
    from effc.compiler.source import find

    recipe = _recipe(flags)
    output = output or default_output(recipe)
    # Before the pipeline, because that imports torch and transformers: a mistyped path should not take seconds to tell.
    check_output(output, overwrite)
    check_engine(recipe)
    find(recipe.model)
    from effc.compiler.pipeline import run

    with _progress(not (quiet or as_json)) as progress:
        artifact = run(recipe, output, overwrite=overwrite, progress=progress)
    manifest = artifact.manifest
    if as_json:
        _print_json(
            {
                "output": str(artifact.path),
                "passes": [_plain(record) for record in manifest.passes],
                "metrics": {
                    "verification": manifest.verification and _plain(manifest.verification),
                    "benchmark": manifest.benchmark and _plain(manifest.benchmark),
                },
                "attention": [_plain(layer) for layer in manifest.attention],
                "engines": manifest.engines and _plain(manifest.engines),
                "unmet": list(artifact.unmet),
            }
        )
    elif not quiet:
        _show_passes(manifest)
        _show_compression(manifest)
        _show_positions(manifest)
        _show_verification(manifest.verification)
        _show_benchmark(manifest.benchmark)
        _show_generation(manifest)
        _show_engines(manifest)
        click.echo(f"Artifact: {artifact.path}\nReport:   {artifact.path / 'report.html'}")
    for sentence in artifact.unmet:
        click.secho("Not met: ", fg="yellow", bold=True, err=True, nl=False)
        click.echo(sentence, err=True)
    return 1 if artifact.unmet else 0


def _recipe(flags: dict[str, Any]) -> Recipe:
    """The recipe file with the given flags on top."""
    over: dict[str, Any] = {}

    def put(value: Any, *keys: str) -> None:
        if value is None or value == ():
            return
        section = over
        for key in keys[:-1]:
            section = section.setdefault(key, {})
        section[keys[-1]] = list(value) if isinstance(value, tuple) else value

    put(flags["model"], "model", "path")
    put(flags["task"], "model", "task")
    put(flags["revision"], "model", "revision")
    put(flags["trust_remote_code"], "model", "trust_remote_code")
    put(flags["attn"], "attention", "pattern")
    put(flags["attn_exclude"], "attention", "exclude")
    put(flags["force"], "attention", "force")
    put(flags["allow_partial"], "attention", "allow_partial")
    put(flags["max_length"], "positions", "max_length")
    for value in flags["positions"]:
        put(True if value == "sparse" else value, "positions", "sparse" if value == "sparse" else "method")
    put(flags["prune"], "prune")
    put(flags["low_rank"], "low_rank")
    if flags["recover"] == "default":
        put(True, "recover", "enabled")
    else:
        put(flags["recover"], "recover", "budget")
    put(flags["recover_data"], "recover", "data")
    put(flags["recover_loss"], "recover", "losses")
    put(flags["recover_lora"], "recover", "lora")
    put(flags["recover_fake_quant"], "recover", "fake_quant")
    put(flags["quant"], "quantization", "mode")
    put(_pairs(flags["quant_layer"]), "quantization", "layers")
    put(flags["quant_smoothing"], "quantization", "smoothing")
    put(flags["quant_activations"], "quantization", "activations")
    put(flags["quant_weights"], "quantization", "weights", "method")
    put(flags["quant_attention"], "quantization", "attention")
    put(flags["quant_kv_cache"], "quantization", "kv_cache")
    put(flags["quant_exclude"], "quantization", "exclude")
    put(flags["calibration"], "quantization", "calibration", "data")
    put(flags["target"], "target")
    put(flags["arch"], "engine", "arch")
    put(flags["shapes"], "engine", "shapes")
    put(flags["engine_precision"], "engine", "precision")
    put(False if flags["no_plugin"] else None, "engine", "plugin")
    put(flags["tensor_parallel"], "engine", "tensor_parallel")
    put(flags["embed_plugin"], "engine", "embed_plugin")
    put(flags["data"], "verify", "data")
    put(_lengths(flags["lengths"]), "bench", "lengths")
    put(False if flags["no_bench"] else None, "bench", "enabled")
    put(False if flags["no_generation"] else None, "generation", "enabled")
    put(flags["checkpoint"], "checkpoint", "enabled")
    put(flags["require_speedup"], "require", "min_speedup")
    put(flags["require_decode_speedup"], "require", "min_decode_speedup")
    put(flags["max_quality_drop"], "require", "max_quality_drop")
    base = load_recipe(flags["recipe"]) if flags["recipe"] else {}
    return build_recipe(merge(base, over), origin=flags["recipe"] or "the flags")


def _pairs(texts: tuple[str, ...]) -> dict[str, str] | None:
    if wrong := [text for text in texts if "=" not in text]:
        raise UsageError(f"'{wrong[0]}' is not GLOB=MODE.", "Write, for example, --quant-layer 'lm_head=int8-weights'.")
    return dict(text.rsplit("=", 1) for text in texts) or None


def _lengths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"'{text}' is not a list of lengths.", "Write, for example, --lengths 512,1024.") from None


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@_common
def inspect(artifact: Path, as_json: bool, quiet: bool, debug: bool) -> int:
    """Show what an artifact is and what was done to it."""
    from effc.compiler.runtime import check_files, read_manifest

    manifest = read_manifest(artifact)
    check_files(artifact, manifest)
    if as_json:
        _print_json(_plain(manifest))
    elif not quiet:
        source = manifest.source
        click.echo(f"{source.architecture} ({source.task}), {source.parameters:,} parameters, from {source.path}")
        click.echo(f"effc {manifest.effc_version}, target {manifest.target}, {manifest.created:%Y-%m-%d %H:%M} UTC")
        _show_passes(manifest)
        _show_compression(manifest)
        _show_positions(manifest)
        table = Table("attention module", "was", "is", "direction", "heads", "note")
        for layer in manifest.attention:
            heads = f"{layer.num_heads}/{layer.kv_heads} x {layer.head_dim}"
            direction = "causal" if layer.causal else "bidirectional"
            table.add_row(layer.layer, layer.source, layer.pattern, direction, heads, layer.reason or "")
        Console().print(table)
        _show_verification(manifest.verification)
        _show_benchmark(manifest.benchmark)
        _show_generation(manifest)
        _show_engines(manifest)
    return 0


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(), help="Text, .jsonl or .csv file; labels give the task's own metric.")
@click.option("--samples", type=int, help="Samples to compare at most.")
@click.option("--max-length", type=int, help="Tokens per sample.")
@click.option("--source", type=click.Path(), help="Where the source model is now, if it was moved.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoint brings along.")
@click.option("--max-quality-drop", type=float, help="Exit 1 above this quality drop.")
@_common
def verify(
    artifact: Path, max_quality_drop: float | None, as_json: bool, quiet: bool, debug: bool, **options: Any
) -> int:
    """Compare an artifact with its untouched source model."""
    from effc.compiler.pipeline import remeasured
    from effc.compiler.verify import verify as run

    with _progress(not (quiet or as_json)) as progress:
        told = None if progress is None else lambda done, total: progress("samples", done, total)
        record = run(artifact, progress=told, **options)
    remeasured(artifact, verification=record)
    if as_json:
        _print_json(_plain(record))
    elif not quiet:
        _show_verification(record)
    if max_quality_drop is not None and not record.quality_drop <= max_quality_drop:
        click.echo(f"Not met: the quality drop is {record.quality_drop:.4f}, above {max_quality_drop:g}.", err=True)
        return 1
    return 0


@main.command()
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
@_common
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
    from effc.compiler.bench import bench as run
    from effc.compiler.bench_ratios import unmet_speed
    from effc.compiler.pipeline import remeasured

    if no_decode and require_decode_speedup is not None:
        raise UsageError("A minimum speed-up per token is required but not measured.", "Leave --no-decode out.")
    with _progress(not (quiet or as_json)) as progress:
        record = run(
            artifact,
            lengths=_lengths(lengths),
            native=not no_native,
            decode=not no_decode,
            progress=progress,
            **options,
        )
    remeasured(artifact, benchmark=record)
    if as_json:
        _print_json(_plain(record))
    elif not quiet:
        _show_benchmark(record)
    unmet = list(unmet_speed(record, require_speedup, require_decode_speedup))
    if unmet:
        click.echo(f"Not met: {' '.join(unmet)}", err=True)
    return 1 if unmet else 0


@main.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--length", type=int, help="Tokens at which speed counts; the longest that all were timed at by default.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write .html, .md, .json or .svg (the plot) too.")
@_common
def compare(
    artifacts: tuple[Path, ...], length: int | None, output: Path | None, as_json: bool, quiet: bool, debug: bool
) -> int:
    """Set artifacts of one model side by side: quality against speed, and which of them no other one beats."""
    from effc.compiler.compare import compare as run

    comparison = run(artifacts, length)
    if output is not None:
        comparison.save(output)
    if as_json:
        _print_json(asdict(comparison))
    elif not quiet:
        _show_comparison(comparison)
    return 0


@main.command()
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
@_common
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
    from dataclasses import asdict

    from effc.compiler.generation_text import write_text
    from effc.compiler.runtime import load

    given = {name: value for name, value in options.items() if value is not None}
    text = sys.stdin.read() if prompt == "-" else prompt
    told = None if as_json else lambda piece: click.echo(piece, nl=False)
    written = write_text(load(artifact, threads=threads, engine=False), text, chat=chat, told=told, **given)
    if as_json:
        _print_json(asdict(written))
        return 0
    click.echo()
    if not quiet:
        speed = "" if written.tokens_per_s is None else f", then {written.tokens_per_s:.1f} tokens/s"
        click.echo(
            f"{written.prompt_tokens} + {written.new_tokens} tokens, first after {written.first_token_s:.2f} s{speed}",
            err=True,
        )
    return 0


@main.command()
@click.argument("subject", required=False, metavar="[PATTERN or MODEL]")
@click.option("--list", "list_forms", is_flag=True, help="List every form, its parameters and its source.")
@click.option("--length", type=int, help="Tokens to draw a pattern at; 64 when not given.")
@click.option("--causal", is_flag=True, help="Draw a pattern as a decoder sees it.")
@click.option("--head-dim", type=int, help="Numbers per head that a pattern's cost is counted for; 64 when not given.")
@click.option("--text", type=click.Path(), help="Text, .jsonl or .csv file to run MODEL on.")
@click.option("--samples", type=int, help="Texts to run MODEL on; 8 when not given.")
@click.option("--max-length", type=int, help="Tokens per text; 512 when not given.")
@click.option("--candidates", help="Patterns whose share of MODEL's attention is counted: local:128,local:256|sinks:4.")
@click.option("--task", help="MODEL's task; detected from the config when not given.")
@click.option("--revision", help="Hub branch, tag or commit of MODEL.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that MODEL brings along.")
@click.option("--save", type=click.Path(path_type=Path), help="Write the picture to this .png, .svg or .pdf.")
@_common
def attention(
    subject: str | None,
    list_forms: bool,
    save: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> int:
    """Draw an attention PATTERN with its cost, or measure where a MODEL's attention goes on --text."""
    from effc.compiler.attention_show import show_forms, show_mass, show_picture

    given = {name: value for name, value in options.items() if value is not None and value is not False}
    if list_forms:
        _refuse_options(given | ({"save": save} if save else {}), (), "with --list")
        if as_json:
            from effc.compiler.attention_pictures import attention_forms

            _print_json(attention_forms())
        elif not quiet:
            show_forms(Console())
        return 0
    if subject is None:
        raise UsageError(
            "There is nothing to show.", "Give a pattern such as local:256, a model with --text, or --list."
        )
    if "text" not in given:
        _refuse_options(given, ("length", "causal", "head_dim"), "for a pattern (a model also needs --text)")
        from effc.compiler.attention_pictures import draw

        picture = draw(subject, **given)
        if save:
            picture.save(save)
        if as_json:
            _print_json(picture.as_json())
        elif not quiet:
            show_picture(picture, Console())
        return 0
    _refuse_options(given, tuple(set(options) - {"length", "causal", "head_dim"}), "for a model")
    from effc.compiler.attention_mass import attention_mass

    if "candidates" in given:
        given["candidates"] = [part.strip() for part in given["candidates"].split(",")]
    with _progress(not (quiet or as_json)) as progress:
        mass = attention_mass(subject, progress=progress, **given)
    if save:
        mass.save(save)
    if as_json:
        _print_json(mass.as_json())
    elif not quiet:
        show_mass(mass, Console())
    return 0


def _refuse_options(given: dict[str, Any], known: tuple[str, ...], why: str) -> None:
    """An option that has no meaning here is an error, not ignored."""
    for name in given:
        if name not in known:
            raise UsageError(f"--{name.replace('_', '-')} means nothing {why}.", "Leave it out.")


@main.command()
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
@_common
def distill(student: str, teacher: str, output: Path, as_json: bool, quiet: bool, debug: bool, **options: Any) -> int:
    """Train the checkpoint STUDENT to do what TEACHER does; a killed run goes on when it is repeated."""
    from effc.compiler.distill import distill as run
    from effc.compiler.distill_record import describe

    given = {name: value for name, value in options.items() if value is not None and value != ()}
    with _progress(not (quiet or as_json)) as progress:
        distilled = run(student, teacher, output=output, progress=progress, **given)
    done = distilled.run
    if as_json:
        _print_json({"output": str(output), "run": describe(done)})
    elif not quiet:
        for stage in done.stages:
            click.echo(f"{stage.name}: {stage.steps} steps, {stage.parameters:,} parameters trained")
        click.echo(f"Held-out loss on {done.held_out} texts: {done.before:.4f} before, {done.after:.4f} after")
        click.echo(f"Checkpoint: {output}")
    return 0


def _serving_options(command: Command) -> Command:
    """The flags that say how an artifact is served."""
    for option in (
        click.option("--name", help="Of the model that clients ask; the artifact's directory name when not given."),
        click.option("--max-batch", type=int, default=8, show_default=True, help="Rows of one run, or texts at once."),
        click.option("--instances", default="auto", show_default=True, help="Copies: cpu:2, gpu, gpu:0,1."),
        click.option("--batch-delay-us", type=int, default=500, show_default=True, help="Wait for others that long."),
        click.option("--backend", default="auto", show_default=True, help="python, onnxruntime, or tensorrt: engines."),
        click.option("--threads", type=int, help="Computing threads of one instance; its share of the cores else."),
        click.option("--response-cache", is_flag=True, help="Let the server answer repeated requests from its cache."),
        click.option("--max-length", type=int, help="Tokens of a text; what the model takes when not given."),
        click.option("--truncate/--refuse-long", default=True, help="Cut longer texts, or refuse them."),
        click.option("--pooling", help="mean, cls, max or last; as the model's files say when not given."),
        click.option("--normalize/--no-normalize", default=None, help="Embeddings of length 1."),
        click.option("--variant", multiple=True, help="NAME=OTHER_ARTIFACT of the same model, chosen by length."),
        click.option("--latency-budget-ms", type=float, help="Take the best variant that answers within this time."),
        click.option("--stages", help="Split the graph into N models in a row; gpu:0,1 puts one on each of these."),
        click.option("--engines", multiple=True, type=click.Path(path_type=Path), help="Engines for other GPUs."),
        click.option("--server-tensorrt", help="The server's version of TensorRT, to be checked against the engines'."),
        click.option("--cuda-graphs", help="Shapes to capture CUDA graphs for: 1x128,8x128."),
    ):
        command = option(command)
    return command


def _serving(flags: dict[str, Any]) -> Any:
    """The options that these flags say."""
    from effc.exporters.triton_config import Instances
    from effc.serving.options import ServingOptions, parse_stages

    variants = {}
    for text in flags.pop("variant"):
        name, found, path = text.partition("=")
        if not found:
            raise UsageError(f"'{text}' names no variant.", "Write, for example, --variant dense=other.effc.")
        variants[name] = Path(path)
    stages, instances = parse_stages(flags.pop("stages"), Instances.parse(flags["instances"]))
    graphs = tuple(text for text in (flags.pop("cuda_graphs") or "").split(",") if text)
    return ServingOptions(
        **{**flags, "variants": variants, "instances": instances, "stages": stages, "cuda_graphs": graphs}
    )


@main.command()
@click.argument("artifact", required=False, type=click.Path(path_type=Path))
@click.option("--repository", type=click.Path(path_type=Path), required=True, help="Model repository, made if new.")
@click.option("--keep", type=int, default=2, show_default=True, help="Newest versions that a server loads.")
@click.option("--use-version", help="With --name and no artifact: serve this version only, or 'newest' again.")
@click.option("--check", is_flag=True, help="With no artifact: compare the repository's files with their hashes.")
@_serving_options
@_common
def triton(
    artifact: Path | None,
    repository: Path,
    use_version: str | None,
    check: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **flags: Any,
) -> int:
    """Write a Triton model repository for ARTIFACT; a model that is there gets a new version."""
    from effc.serving.launch import LAUNCH_NAME
    from effc.serving.repository import check_repository, use_version_text, write_repository

    if (artifact is None) == (use_version is None and not check) or (use_version is not None and check):
        raise UsageError("Give one of an artifact, --use-version and --check.", "See: effc triton --help.")
    if artifact is None:
        models = check_repository(repository) if check else use_version_text(repository, flags["name"], use_version)
        if as_json:
            _print_json({"repository": str(repository), "models": models})
        elif not quiet:
            click.echo(f"{'Unchanged' if check else 'To be loaded again'}: {', '.join(models)}")
        return 0
    done = write_repository(artifact, repository, _serving(flags))
    if as_json:
        _print_json(vars(done))
    elif not quiet:
        click.echo(f"{done.name}, version {done.version}: {', '.join(done.models)}")
        click.echo(f"Start a server: {done.repository / LAUNCH_NAME}")
    for note in done.notes if not (quiet or as_json) else ():
        click.echo(note, err=True)
    return 0


@main.command()
@click.argument("artifact", required=False, type=click.Path(path_type=Path))
@click.option("--repository", type=click.Path(path_type=Path), help="Keep the model repository here.")
@click.option("--address", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 is everywhere.")
@click.option("--http-port", type=int, default=8000, show_default=True)
@click.option("--grpc-port", type=int, default=8001, show_default=True)
@click.option("--metrics-port", type=int, default=8002, show_default=True)
@click.option("--install-server", is_flag=True, help="Set up the packaged Triton server (CPU, 70 MB) if there is none.")
@_serving_options
@_common
def serve(
    artifact: Path | None,
    repository: Path | None,
    address: str,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    install_server: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **flags: Any,
) -> int:
    """Run a Triton server on ARTIFACT until Ctrl-C or SIGTERM."""
    from effc.serving.packaged import install_packaged_server
    from effc.serving.serve import serve as run
    from effc.serving.server import Ports

    if artifact is None and not install_server:
        raise UsageError("There is nothing to serve.", "Give an artifact, or --install-server.")
    options = _serving(flags)
    if install_server:
        install_packaged_server(None if quiet else lambda text: click.echo(text, err=True))
    if artifact is None:
        return 0
    ports = Ports(http_port, grpc_port, metrics_port)
    with run(artifact, options, repository=repository, ports=ports, address=address) as serving:
        if as_json:
            found = {"http": serving.server.http, "grpc": serving.server.grpc, "metrics": serving.server.metrics}
            _print_json({"name": serving.name, "pid": serving.server.pid, **found})
        elif not quiet:
            click.echo(f"{serving.name} is ready: http {serving.server.http}, grpc {serving.server.grpc}")
            click.echo(f"\n{serving.curl}\n\n{serving.python}")
        for note in serving.notes:
            click.echo(note, err=True)
        sys.stdout.flush()
        try:
            status = serving.run(lambda text: click.echo(text, err=True))
        except KeyboardInterrupt:
            return 0
        click.echo(f"The server ended by itself with status {status}:\n{serving.server.complaints()}", err=True)
        return 1


@main.command()
@click.argument("uri", required=False)
@click.option("--values", type=click.Path(path_type=Path), help="YAML file, laid out like a Helm chart's values.")
@click.option("--show-values", is_flag=True, help="Print every value with its default.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the manifest here; printed otherwise.")
@_common
def kubernetes(
    uri: str | None,
    values: Path | None,
    show_values: bool,
    output: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> int:
    """Write Kubernetes objects that serve a repository from object storage, s3://BUCKET/PATH for one."""
    from effc.serving.kubernetes import describe_values, manifest, read_values

    if show_values:
        click.echo(describe_values(), nl=False)
        return 0
    settings = read_values(uri, values)
    text = manifest(settings)
    if output is not None:
        output.write_text(text, encoding="utf-8")
    if as_json:
        _print_json({"values": _plain(settings), "manifest": text})
    elif output is None:
        click.echo(text, nl=False)
    elif not quiet:
        click.echo(f"{output}: copy the repository to {settings.storage.uri}, then kubectl apply -f {output}")
    return 0


@main.command("load-test")
@click.argument("url")
@click.option("--model", help="Which one to ask; the only one that takes text when not given.")
@click.option("--data", type=click.Path(), help="Text, .jsonl or .csv file whose texts are sent.")
@click.option("--requests", type=int, default=200, show_default=True)
@click.option("--concurrency", type=int, default=4, show_default=True, help="Clients that send one after another.")
@click.option("--rate", type=float, help="Requests per second that come by themselves, instead.")
@click.option("--max-tokens", type=int, default=32, show_default=True, help="For models that write text.")
@click.option("--timeout-s", type=float, default=60, show_default=True, help="For one answer.")
@click.option("--seed", type=int, default=0, show_default=True, help="Equal seeds send equal texts.")
@click.option("--save", type=click.Path(path_type=Path), help="Write a plot to this .png, .svg or .pdf.")
@click.option("--perf-analyzer/--no-perf-analyzer", default=None, help="NVIDIA's tool sends; so for tensor models.")
@_common
def load_test(url: str, save: Path | None, as_json: bool, quiet: bool, debug: bool, **options: Any) -> int:
    """Send texts to a model that is served at URL and measure; exit 1 if a request failed."""
    from effc.serving.load_test import load_test as run

    with _progress(not (quiet or as_json)) as progress:
        result = run(url, progress=progress, **options)
    if save:
        from effc.serving.load_plot import save_plot

        save_plot(result, save)
    if as_json:
        _print_json(result.to_json())
    elif not quiet:
        from effc.serving.load_show import show_load

        show_load(result, Console())
    return 1 if result.failed else 0


@main.command()
@_common
def doctor(as_json: bool, quiet: bool, debug: bool) -> int:
    """Say what this machine can do, and how to install what is missing."""
    from effc.compiler.doctor import diagnose, render

    report = diagnose()
    if as_json:
        _print_json(_plain(report))
    elif not quiet:
        render(report, Console())
    return 0


@main.group()
def recipe() -> None:
    """Work with recipes."""


@recipe.command()
@click.argument("path", required=False, type=click.Path())
@_common
def show(path: str | None, as_json: bool, quiet: bool, debug: bool) -> int:
    """Print the full recipe with defaults, or that of a recipe file."""
    whole = build_recipe(load_recipe(path) if path else {}, origin=path or "the recipe")
    if as_json:
        _print_json(_plain(whole))
    elif not quiet:
        click.echo(whole.to_yaml(), nl=False)
    return 0


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
    from effc.compiler.report import compression_sentence

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


def _show_verification(record: VerifyRecord | None) -> None:
    if record is None:
        return
    table = Table("output", "relative error", "cosine", "top-1 agreement", title=f"Quality on {record.data}")
    for name, deviation in record.outputs.items():
        top1 = "" if deviation.top1_agreement is None else f"{deviation.top1_agreement:.4f}"
        table.add_row(name, f"{deviation.relative_error:.4f}", f"{deviation.cosine:.4f}", top1)
    console = Console()
    console.print(table)
    console.print(f"Quality drop ({record.quality_metric}): {record.quality_drop:.4f}, {record.samples} samples")
    if record.extended is not None:
        beyond = record.extended
        console.print(
            f"At {beyond.length} tokens, to {beyond.reference}: {beyond.quality_drop:.4f}, {beyond.samples} samples"
        )


def _show_benchmark(record: BenchRecord | None) -> None:
    if record is None:
        return
    _show_speed(record, f"CPU time against {record.dense_form}")
    if record.decode is not None:
        _show_speed(record.decode, f"CPU time to write the token at that place, against {record.decode.dense_form}")
    if record.not_written is not None:
        click.echo(f"Writing was not measured: {record.not_written}")


def _show_speed(record: SpeedRecord, title: str) -> None:
    table = Table("tokens", "dense ms", "compiled ms", "speed-up", "memory", title=title)
    for length in map(str, record.lengths):
        table.add_row(
            length,
            f"{record.dense[length].cpu_ms:.1f}",
            f"{record.compiled[length].cpu_ms:.1f}",
            f"{record.speedup[length]:.2f}x",
            f"{record.memory_ratio[length]:.2f}x",
        )
    Console().print(table)


def _show_comparison(comparison: Any) -> None:
    table = Table("artifact", "flags", "quality drop", "speed-up", "memory", "MB", title=comparison.source)
    for one in comparison.contenders:
        figures = [f"{one.speedup:.2f}x", f"{one.memory_ratio:.2f}x", f"{one.bytes / 1e6:.0f}"]
        table.add_row(one.name, one.flags, f"{one.quality_drop:.4f}", *figures, style="bold" if one.on_front else None)
    Console().print(table)
    click.echo(comparison.caption)


if __name__ == "__main__":
    main()
