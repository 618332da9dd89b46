"""``effc compile``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from effc.cli.compile_recipe import recipe_of
from effc.cli.flags import common
from effc.cli.show_artifact import show_changes, show_results
from effc.cli.terminal import plain, print_json, progress_bar
from effc.compiler.recipe import default_output
from effc.passes.positions_settings import METHODS


@click.command()
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
@common
def compile(output: Path | None, overwrite: bool, as_json: bool, quiet: bool, debug: bool, **flags: Any) -> int:
    """Compile MODEL (a local directory, a GGUF file or a hub name)."""
    from effc.compiler.artifact import check_output
    from effc.compiler.engine_check import check_engine
    from effc.compiler.source_files import find

    recipe = recipe_of(flags)
    output = output or default_output(recipe)
    # Before the pipeline, because that imports torch and transformers: a mistyped path should not take seconds to tell.
    check_output(output, overwrite)
    check_engine(recipe)
    find(recipe.model)
    from effc.compiler.pipeline import run

    with progress_bar(not (quiet or as_json)) as progress:
        artifact = run(recipe, output, overwrite=overwrite, progress=progress)
    manifest = artifact.manifest
    if as_json:
        print_json(
            {
                "output": str(artifact.path),
                "passes": [plain(record) for record in manifest.passes],
                "metrics": {
                    "verification": manifest.verification and plain(manifest.verification),
                    "benchmark": manifest.benchmark and plain(manifest.benchmark),
                },
                "attention": [plain(layer) for layer in manifest.attention],
                "engines": manifest.engines and plain(manifest.engines),
                "unmet": list(artifact.unmet),
            }
        )
    elif not quiet:
        show_changes(manifest)
        show_results(manifest)
        click.echo(f"Artifact: {artifact.path}\nReport:   {artifact.path / 'report.html'}")
    for sentence in artifact.unmet:
        click.secho("Not met: ", fg="yellow", bold=True, err=True, nl=False)
        click.echo(sentence, err=True)
    return 1 if artifact.unmet else 0
