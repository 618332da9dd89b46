"""The model that writes text with an artifact's prefill and decode engines.

It runs in the python backend and runs the engines itself, through torch and TensorRT's own Python package. Triton's
tensorrt backend would run each of them as a model; but then the caches of every text, which are most of what a step
reads, would pass through the server twice for every token, and TensorRT-RTX's engines could not be run at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from effc.compiler.engine_choice import runs_in
from effc.compiler.engine_records import Engine, Engines, most_rows
from effc.compiler.manifest import EngineRecord, EnginesRecord
from effc.errors import UsageError
from effc.exporters.tensorrt_flavours import FLAVOURS
from effc.serving.backend.version import sha256
from effc.serving.options import ServingOptions
from effc.serving.plan import File, Opened, Plan, PlannedModel, open_artifact, python_files, require_tokenizer
from effc.serving.plan_engines import differ
from effc.serving.plan_generation import refuse_for_text, text_config, text_settings

_GRAPHS = ("prefill", "decode")


def plan_engine_writer(name: str, opened: Opened, options: ServingOptions) -> Plan:
    """The model ``name``, decoupled, with the engines of all artifacts that are given.

    Raises:
        UsageError: if artifacts or options do not fit each other.
        OutputError: if an artifact is damaged, or has no tokenizer.
    """
    refuse_for_text(options)
    artifacts = [opened, *(open_artifact(path) for path in options.engines)]
    for other in artifacts[1:]:
        _check_alike(opened, other)
    record = _record(opened)
    if options.server_tensorrt is not None and not runs_in(
        record.version, options.server_tensorrt, record.version_compatible
    ):
        raise UsageError(
            f"The engines were built with {FLAVOURS[record.flavour].name} {record.version}, and the server has "
            f"{options.server_tensorrt}.",
            f"Install theirs in the server: pip install {requirement(record)}.",
        )
    files: dict[str, File] = {"tokenizer.json": require_tokenizer(opened)}
    engines = [_add_files(one, files) for one in artifacts]
    files |= python_files(
        "engine_writer",
        engines=[entry.to_json() for entry in engines],
        ends=record.eos_token_ids,
        **text_settings(opened, options),
    )
    return Plan(
        name,
        opened.manifest.source.task,
        (PlannedModel(text_config(name, options), files),),
        tuple(_notes(artifacts, engines, options)),
        packages=("numpy", "tokenizers", "torch", requirement(record)),
    )


def requirement(record: EnginesRecord) -> str:
    """What pip has to install for engines to run."""
    package = FLAVOURS[record.flavour].package
    if not record.version[:1].isdecimal():
        return package
    if record.version_compatible:
        return f"{package}>={record.version},<{int(record.version.partition('.')[0]) + 1}"
    return f"{package}=={record.version}"


def _record(opened: Opened) -> EnginesRecord:
    record = opened.manifest.engines
    if record is None or not record.writes:
        raise UsageError(
            f"'{opened.path}' has no engines that write text.", "Compile a causal language model, or leave it out."
        )
    return record


def _add_files(opened: Opened, files: dict[str, File]) -> Engines:
    """Add an artifact's engines and library to the files, and say what they are called there."""
    record = _record(opened)
    kept = [engine for engine in record.engines if engine.graph in _GRAPHS]
    named = [(f"{engine.graph}.{engine.arch}.plan", engine) for engine in kept]
    for file, engine in named:
        if file in files:
            raise UsageError(f"Two artifacts hold an engine for {engine.arch}.", "Give one for each GPU.")
        files[file] = opened.path / engine.file
    plugin = None if record.plugin is None else _library(opened.path / record.plugin, kept, files)
    return Engines(
        record.flavour,
        record.version,
        record.version_compatible,
        plugin,
        record.plugin_embedded,
        [Engine(file, engine.graph, engine.arch, engine.profiles) for file, engine in named],
        record.graphs["decode"].pads if "decode" in record.graphs else False,
    )


def _library(path: Path, engines: Sequence[EngineRecord], files: dict[str, File]) -> str:
    """The name of a plugin library; one that was copied already is used again."""
    for name, file in files.items():
        if name.endswith(path.suffix) and isinstance(file, Path) and sha256(file) == sha256(path):
            return name
    name = f"{path.stem}.{min(engine.arch for engine in engines)}{path.suffix}"
    files[name] = path
    return name


def _notes(artifacts: Sequence[Opened], engines: Sequence[Engines], options: ServingOptions) -> list[str]:
    notes = []
    if differ(artifacts):
        notes.append("The artifacts were not compiled alike, so answers differ with the GPU.")
    decode = next(engine for engine in engines[0].engines if engine.graph == "decode")
    most = most_rows(decode, 1)
    if most < options.max_batch:
        notes.append(
            f"The engines take at most {most} texts in one run, so further ones in progress are run in turns. Compile "
            f"with --shapes {options.max_batch}xLENGTH to run all {options.max_batch} at once."
        )
    elif not all(entry.pads for entry in engines):
        notes.append(
            "This model's attention counts positions from the beginning of a text, so only texts of one length share a "
            "run of the engines."
        )
    return notes


def _check_alike(main: Opened, other: Opened) -> None:
    ours, theirs = _record(main), _record(other)
    if other.manifest.source.fingerprint != main.manifest.source.fingerprint:
        raise UsageError(f"'{other.path}' was compiled from another model than '{main.path}'.", "Leave it out.")
    version = (ours.flavour, ours.version, ours.version_compatible)
    same = {
        "TensorRT": version == (theirs.flavour, theirs.version, theirs.version_compatible),
        "profiles": _profiles(ours) == _profiles(theirs),
    }
    for what, alike in same.items():
        if not alike:
            raise UsageError(
                f"The engines of '{other.path}' have other {what} than those of '{main.path}'.",
                "Compile both alike, with the same --shapes and the same version of TensorRT.",
            )


def _profiles(record: EnginesRecord) -> dict[str, object]:
    return {engine.graph: engine.profiles for engine in record.engines}
