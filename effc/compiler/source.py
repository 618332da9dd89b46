"""Identify and load the model to compile.

:func:`locate` is the cheap part (where the model is, which task, which fingerprint); :func:`load` brings the weights
into memory. Everything that can be wrong with a checkpoint becomes a :class:`SourceModelError` here, above all what
transformers only warns about: weights that are missing and would be random.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effc.compiler.checkpoint import fingerprint, has_structure
from effc.compiler.manifest import PositionsRecord, SourceRecord
from effc.compiler.recipe import ModelSection
from effc.compiler.source_errors import explained, quiet
from effc.compiler.source_files import Kind, find
from effc.compiler.tasks import Task, features_of, resolve_task
from effc.errors import SourceModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

# What differs between two saves of the same model.
_VOLATILE = ("transformers_version", "_name_or_path")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_PREPROCESSOR_FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class Located:
    """A model that was found and identified, not loaded.

    Attributes:
        spec: what the user asked for.
        kind: where it comes from.
        path: the directory, or the GGUF file.
        revision: the commit of a hub model.
        config: the config of the whole checkpoint (of an encoder-decoder: of both parts).
        task: what to compile it for.
        fingerprint: SHA-256 over weights, config and task, in hex. Equal only for models that compute the same.
    """

    spec: ModelSection
    kind: Kind
    path: Path
    revision: str | None
    config: PreTrainedConfig
    task: Task
    fingerprint: str

    @property
    def directory(self) -> Path:
        """The directory that transformers loads from."""
        return self.path.parent if self.kind == "gguf" else self.path

    @property
    def gguf(self) -> dict[str, str]:
        """The extra argument of ``from_pretrained`` for a GGUF file."""
        return {"gguf_file": self.path.name} if self.kind == "gguf" else {}


@dataclass
class SourceModel:
    """The model to compile, in memory.

    Attributes:
        model: in evaluation mode, fp32, on the CPU. Of an encoder-decoder: its encoder.
        config: the config of ``model``.
        processor: tokenizer, image processor or feature extractor; None if the checkpoint has none.
        max_length: positions that can be used, in tokens; None if nothing bounds them.
        parameters: number of distinct weights.
        warnings: what is unusual about the checkpoint, as full sentences.
        positions: how positions were extended and thinned out since it was loaded, None if they were not.
        weights: a hash of the weights if passes changed them since it was loaded, else None.
    """

    located: Located
    model: PreTrainedModel
    config: PreTrainedConfig
    task: Task
    processor: Any | None
    max_length: int | None
    parameters: int
    warnings: list[str] = field(default_factory=list)
    positions: PositionsRecord | None = None
    weights: str | None = None

    def record(self) -> SourceRecord:
        """The source as ``effc.json`` tells of it."""
        located = self.located
        return SourceRecord(
            path=located.spec.path or str(located.path) if located.kind == "hub" else str(located.path),
            kind=located.kind,
            revision=located.revision,
            model_type=self.config.model_type,
            architecture=type(self.model).__name__,
            task=self.task.name,
            parameters=self.parameters,
            max_length=self.max_length,
            fingerprint=located.fingerprint,
        )


def locate(spec: ModelSection) -> Located:
    """Find the model and identify it; reads its config and hashes its weights, loads nothing.

    Raises:
        UsageError, SourceModelError: see :func:`find`; also if the config or the task cannot be told.
    """
    found = find(spec)
    kind, path, revision, facts, files = found.kind, found.path, found.revision, found.facts, found.files
    config = _read_config(path, kind, spec)
    task = resolve_task(config, spec.task or (_gguf_task(config) if kind == "gguf" else None))
    # Code that a checkpoint brings along is part of what it computes.
    code = sorted(path.glob("*.py")) if kind != "gguf" and "auto_map" in facts else []
    facts = {key: value for key, value in facts.items() if key not in _VOLATILE}
    facts = {"config": facts, "kind": "gguf" if kind == "gguf" else "checkpoint", "task": task.name}
    facts["files"] = [file.name for file in (*files, *code)] if kind != "gguf" else []
    return Located(spec, kind, path, revision, config, task, fingerprint((*files, *code), facts))


def load(located: Located) -> SourceModel:
    """Load the model in fp32 on the CPU, with its tokenizer or image processor.

    Raises:
        SourceModelError: if weights are damaged, missing, of the wrong shape or not finite.
        MissingDependencyError: if reading this kind of checkpoint needs a package that is not installed.
    """
    with quiet():
        model, info = _load_weights(located)
        notes: list[str] = []
        if located.config.is_encoder_decoder and located.task.name != "seq2seq-lm":
            whole, model = model, _encoder_of(model, located)
            missing = _names_within(whole, model, info["missing_keys"])
            notes.append(f"Only the encoder of this '{located.config.model_type}' model is compiled.")
        else:
            missing = set(info["missing_keys"])
        notes += _accept_missing(model, missing, located)
        notes += _leftover_layers(info["unexpected_keys"])
        processor = _load_processor(located)
    _check_finite(model, located)
    notes += _excess_tokens(model, processor)
    if processor is None:
        notes.append("The checkpoint has no tokenizer or image processor; data files cannot be used with it.")
    model.train(False).requires_grad_(False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return SourceModel(
        located, model, model.config, located.task, processor, usable_positions(model), parameters, notes
    )


def usable_positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model can take, or None if nothing bounds them.

    RoBERTa and its kin number their positions from ``padding_idx + 1`` on, so that their tables have rows to spare.
    """
    from torch import nn

    config = model.config
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1 or model.main_input_name != "input_ids":
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return min(limit, module.num_embeddings - module.padding_idx - 1)
    return limit


def _read_config(path: Path, kind: Kind, spec: ModelSection) -> PreTrainedConfig:
    from transformers import AutoConfig

    with quiet(), explained(path):
        if kind == "gguf":
            config: PreTrainedConfig = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        else:
            config = AutoConfig.from_pretrained(path, trust_remote_code=spec.trust_remote_code)
    return config


def _gguf_task(config: PreTrainedConfig) -> str | None:
    """GGUF files name no architecture class; where the model type has a causal LM, that is what they hold."""
    from transformers import AutoModelForCausalLM

    causal = type(config) in AutoModelForCausalLM._model_mapping and not config.is_encoder_decoder
    return "causal-lm" if causal else None


def _load_weights(located: Located) -> tuple[PreTrainedModel, dict[str, Any]]:
    import torch
    import transformers

    auto_class: Any = getattr(transformers, _auto_class(located))
    arguments: dict[str, Any] = dict(located.gguf)
    if located.kind == "gguf":
        # Reading it from the file once more would take seconds. A copy, because loading marks it as quantized.
        arguments["config"] = copy.deepcopy(located.config)
    else:
        arguments["trust_remote_code"] = located.spec.trust_remote_code
    model: PreTrainedModel
    info: dict[str, Any]
    if has_structure(located.directory):
        from effc.compiler.pruned_checkpoint import load_checkpoint

        return load_checkpoint(located.directory), {"missing_keys": set(), "unexpected_keys": set()}
    with explained(located.path):
        model, info = auto_class.from_pretrained(
            located.directory, dtype=torch.float32, output_loading_info=True, weights_only=True, **arguments
        )
    if located.kind == "gguf":
        # The weights are plain fp32 by now; left in place, these would mark the model as quantized wherever it goes.
        for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
            if hasattr(owner, name):
                delattr(owner, name)
    return model, info


def _auto_class(located: Located) -> str:
    """The class to load with. A T5EncoderModel's config alone would load as T5, with a decoder of random weights."""
    architecture = (located.config.architectures or [""])[0]
    if located.task.name == "feature-extraction" and architecture.endswith("EncoderModel"):
        return "AutoModelForTextEncoding"
    return located.task.auto_class


def _encoder_of(model: PreTrainedModel, located: Located) -> PreTrainedModel:
    encoder: PreTrainedModel = model.get_encoder()
    if encoder is model:
        raise SourceModelError(
            f"The encoder of this '{located.config.model_type}' model could not be found.",
            "Save its encoder as a checkpoint of its own and compile that one.",
        )
    # Changed in place: the attention modules share this object, and must go on seeing later changes to it.
    encoder.config.is_encoder_decoder = False
    return encoder


def _names_within(whole: nn.Module, part: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of ``names`` (of weights of ``whole``) that ``part`` uses, too."""
    used = {id(tensor) for tensor in (*part.parameters(), *part.buffers())}
    tensors = dict(whole.named_parameters(remove_duplicate=False)) | dict(whole.named_buffers(remove_duplicate=False))
    return {name for name in names if name in tensors and id(tensors[name]) in used}


def _accept_missing(model: PreTrainedModel, missing: set[str], located: Located) -> list[str]:
    """Refuse weights that are missing, but for a pooler that can be left out; returns notes on what was left out."""
    if not missing:
        return []
    if all(name.startswith("pooler.") for name in missing) and getattr(model, "pooler", None) is not None:
        # What add_pooling_layer=False does. The pooler was never trained, so its output would be noise.
        model.pooler = None  # type: ignore[assignment]
        return ["The checkpoint has no weights for the pooler, so pooler_output is left out."]
    examples = _some(sorted(missing))
    layers = [name for name in missing if re.search(r"\.\d+\.", name)]
    if layers:
        raise SourceModelError(
            f"{len(missing)} tensors that the config of '{located.path}' asks for are not in its weights: {examples}. "
            "They would be random.",
            "Check that config.json belongs to these weights, and download the checkpoint in full.",
        )
    raise SourceModelError(
        f"'{located.path}' has no trained weights for the task '{located.task.name}': {examples} would be random.",
        f"Fine-tune it for this task first, or compile its body with --task {features_of(located.task).name}.",
    )


def _leftover_layers(unexpected: Iterable[str]) -> list[str]:
    """A note on layers that the checkpoint has and the model does not; a head for another task is nothing unusual."""
    layers = sorted(name for name in unexpected if re.search(r"\.\d+\.", name))
    return [f"{len(layers)} tensors of the checkpoint are not used by the model: {_some(layers)}."] if layers else []


def _excess_tokens(model: PreTrainedModel, tokenizer: Any | None) -> list[str]:
    """A note where the tokenizer can produce ids beyond the embedding table."""
    table: Any = model.get_input_embeddings() if hasattr(tokenizer, "all_special_ids") else None
    if tokenizer is None or table is None or len(tokenizer) <= len(table.weight):
        return []
    return [f"The tokenizer knows {len(tokenizer)} tokens and the model {len(table.weight)}; the others would fail."]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _check_finite(model: nn.Module, located: Located) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise SourceModelError(
                f"The weights in '{located.path}' hold values that are not finite, first in '{name}'.",
                "The file is damaged or the training diverged; use another checkpoint.",
            )


def _load_processor(located: Located) -> Any | None:
    """Tokenizer, image processor or feature extractor; None if the checkpoint has no files for one.

    The files are looked for first, because transformers makes up an empty tokenizer where there are none.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    directory = located.directory
    loader: Any = {"text": AutoTokenizer, "images": AutoImageProcessor, "audio": AutoFeatureExtractor}
    loader = loader[located.task.modality]
    with explained(directory, "tokenizer or preprocessor"):
        if located.kind == "gguf":
            return loader.from_pretrained(directory, **located.gguf)
        files = _TOKENIZER_FILES if located.task.modality == "text" else (_PREPROCESSOR_FILE,)
        if not any((directory / name).is_file() for name in files):
            return None
        return loader.from_pretrained(directory, trust_remote_code=located.spec.trust_remote_code)
