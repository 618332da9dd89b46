"""The dense twin of an existing artifact, from the cache or made again from the source model."""

from __future__ import annotations

from pathlib import Path

from effc.compiler.cache import cache_directory
from effc.compiler.manifest import Manifest
from effc.compiler.runtime import MODEL_NAME


def dense_twin(manifest: Manifest, *, trust_remote_code: bool = False) -> Path:
    """Path of the twin's ``.onnx`` file.

    Args:
        trust_remote_code: run code that the source checkpoint brings along.

    Raises:
        SourceModelError: if it is not cached and the source model is no longer where it was, or has changed.
    """
    path = cache_directory() / "twin" / (manifest.twin_key or manifest.export_key) / MODEL_NAME
    if path.is_file():
        return path
    from effc.compiler.exported import export_key, export_now, exported_graph, twin_of
    from effc.compiler.pipeline import rewrite
    from effc.compiler.positions import repeat_positions
    from effc.compiler.recipe import build_recipe
    from effc.compiler.source import load, locate
    from effc.errors import SourceModelError
    from effc.passes.attention_settings import AttentionSection

    recipe = build_recipe(manifest.recipe, origin="effc.json")
    # Code from a checkpoint runs only where the user says so in this very call.
    spec = recipe.model.model_copy(update={"trust_remote_code": trust_remote_code})
    located = locate(spec)
    if located.fingerprint != manifest.source.fingerprint:
        raise SourceModelError(
            f"'{manifest.source.path}' has changed since the artifact was compiled.",
            "Compile it again, or benchmark on the machine that compiled it.",
        )
    source = load(located)
    repeat_positions(source, recipe.positions, manifest)
    # The twin has the source's attention, so that it does not matter which form the artifact has.
    layers = rewrite(source, AttentionSection()).layers
    exported, _ = exported_graph(source, layers)
    if manifest.compression is not None:
        # Every compression of a source model is compared with the same twin.
        manifest.twin_key = export_key(source, layers)
    return twin_of(exported, manifest.twin_key or manifest.export_key, layers, lambda: export_now(source))
