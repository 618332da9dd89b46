"""The dense twins of an existing artifact, from the cache or made again from the source model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from effc.compiler.artifact_files import MODEL_NAME
from effc.compiler.cache import cache_directory
from effc.compiler.manifest import AttentionLayer, Manifest

if TYPE_CHECKING:
    from effc.compiler.source import SourceModel


def dense_twin(manifest: Manifest, *, trust_remote_code: bool = False) -> Path:
    """Path of the twin's ``.onnx`` file.

    Args:
        trust_remote_code: run code that the source checkpoint brings along.

    Raises:
        SourceModelError: if it is not cached and the source model is no longer where it was, or has changed.
    """
    path = cache_directory() / "twin" / _key(manifest) / MODEL_NAME
    if path.is_file():
        return path
    from effc.compiler.exported import export_now, exported_graph, twin_of

    source, layers = _source_again(manifest, trust_remote_code)
    exported, _ = exported_graph(source, layers)
    return twin_of(exported, _key(manifest), layers, lambda: export_now(source))


def dense_decode_twin(manifest: Manifest, *, trust_remote_code: bool = False) -> Path:
    """Path of the ``.onnx`` file of a twin that takes one token, see :mod:`effc.exporters.decode_twin`.

    Args:
        trust_remote_code: as above.

    Raises:
        PreconditionError: if ONNX Runtime's kernel does not know the source model's attention.
        SourceModelError: as above.
    """
    from effc.compiler.exported import decode_twin_of, exported_graph
    from effc.compiler.generation_build import forward_graph

    check_decode(manifest)
    path = cache_directory() / "decode-twin" / _key(manifest) / MODEL_NAME
    if path.is_file():
        return path
    source, layers = _source_again(manifest, trust_remote_code)
    exported, _ = exported_graph(source, layers)
    return decode_twin_of(forward_graph(source, layers, exported)[0], _key(manifest), layers)


def check_decode(manifest: Manifest) -> None:
    """Whether there can be a twin that takes one token, before the source model is loaded.

    Raises:
        PreconditionError: if there cannot.
    """
    from effc.exporters.decode_twin import check_attention

    groups = [] if manifest.generation is None else manifest.generation.groups
    check_attention({layer.source for layer in manifest.attention}, any(group.distance for group in groups))


def _key(manifest: Manifest) -> str:
    return manifest.twin_key or manifest.export_key


def _source_again(manifest: Manifest, trust_remote_code: bool) -> tuple[SourceModel, list[AttentionLayer]]:
    """The source model with its own attention, so that it does not matter which form the artifact has."""
    from effc.compiler.exported import export_key
    from effc.compiler.positions import repeat_positions
    from effc.compiler.recipe import build_recipe
    from effc.compiler.rewrite import rewrite
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
    layers = rewrite(source, AttentionSection()).layers
    if manifest.compression is not None:
        # Every compression of a source model is compared with the same twin.
        manifest.twin_key = export_key(source, layers)
    return source, layers
