"""Write a compiled model's weights as a checkpoint that transformers reads, and read such a checkpoint again.

Layers, vocabulary, feed-forward widths that are equal in all layers, and heads where the config holds their size, are
sizes that a config can say: such a checkpoint is an ordinary one. Others carry a small file besides, and
:func:`load_checkpoint` builds the model from both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

from effc.compiler.checkpoint import CONFIG_FILE, STRUCTURE_FILE, has_structure, weight_files
from effc.compiler.manifest import CheckpointRecord
from effc.compiler.source import SourceModel
from effc.compiler.structure import Structure, apply_structure, describe_structure
from effc.errors import PassFailedError, PreconditionError, SourceModelError
from effc.passes.prune_masks import add_masks

CHECKPOINT_NAME = "checkpoint"
# Relative, in fp32: the same weights in the same code.
_FAITHFUL = 1e-4


def save_checkpoint(source: SourceModel, directory: Path, probe: Mapping[str, torch.Tensor]) -> CheckpointRecord:
    """Write ``directory/checkpoint``, load it again and compare.

    The checkpoint has the model's own attention: forms of effc's are no part of it.

    Args:
        source: as it is now; its attention may be effc's.
        probe: inputs to compare on.

    Raises:
        PreconditionError: if transformers has no class for what was compiled.
        PassFailedError: if the loaded model computes something else.
    """
    model = _whole(source)
    folder = directory / CHECKPOINT_NAME
    structure = describe_structure(model)
    left_out = set(structure.left_out)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    if structure.plain:
        model.save_pretrained(folder, state_dict=weights)
    else:
        _save_as_named(model, weights, folder)
    if source.processor is not None:
        source.processor.save_pretrained(folder)
    if not structure.plain or structure.masked:
        # A plain one keeps its masks there, for whoever goes on training it; transformers does not mind the file.
        (folder / STRUCTURE_FILE).write_text(structure.model_dump_json(indent=1) + "\n", encoding="utf-8")
    loaded = type(model).from_pretrained(folder) if structure.plain else load_checkpoint(folder)
    error = _distance(source, model, loaded, probe)
    if not error <= _FAITHFUL:
        raise PassFailedError(
            f"The checkpoint of {type(model).__name__}, loaded again, gives outputs that are off by {error:.2g}.",
            "Leave --checkpoint out, and report this model.",
        )
    return CheckpointRecord(
        directory=CHECKPOINT_NAME,
        plain=structure.plain,
        architecture=type(model).__name__,
        reason=None if structure.plain else _reason(structure),
        relative_error=error,
    )


def load_checkpoint(path: str | Path) -> PreTrainedModel:
    """Load a checkpoint that effc wrote, whether transformers alone could or not.

    Args:
        path: the directory, or the artifact that holds it.

    Returns:
        the model in fp32 and evaluation mode. Zeros that pruning made are known to ``effc.passes.prune_masks``.

    Raises:
        SourceModelError: if there is no such checkpoint, or it is damaged.
    """
    folder = Path(path)
    if not has_structure(folder) and (folder / CHECKPOINT_NAME / CONFIG_FILE).is_file():
        folder = folder / CHECKPOINT_NAME
    if not (folder / CONFIG_FILE).is_file():
        raise SourceModelError(
            f"There is no checkpoint in '{folder}': it has no {CONFIG_FILE}.", "Compile with --checkpoint to get one."
        )
    config = AutoConfig.from_pretrained(folder)
    structure = _read_structure(folder, config)
    architecture: Any = getattr(transformers, structure.architecture, None)
    if not (isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)):
        raise SourceModelError(
            f"'{folder}' is of the class {structure.architecture}, which transformers does not have.",
            "Install the version of transformers that it was made with.",
        )
    if structure.plain:
        plain: PreTrainedModel = architecture.from_pretrained(folder, dtype=torch.float32)
        return _masked(plain, structure)
    model: PreTrainedModel = architecture(config)
    try:
        apply_structure(model, structure)
        weights = {name: tensor for file in weight_files(folder) for name, tensor in _tensors(file).items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise SourceModelError(
            f"The weights in '{folder}' do not fit {STRUCTURE_FILE}: {str(error).splitlines()[0]}.",
            "Write the checkpoint again.",
        ) from None
    model.tie_weights()
    tied = dict(model.all_tied_weights_keys)
    absent = [name for name in missing if name not in tied and name not in tied.values()]
    if absent or unexpected:
        raise SourceModelError(
            f"The weights in '{folder}' do not fit {STRUCTURE_FILE}: {(absent or unexpected)[0]} is "
            f"{'missing' if absent else 'unknown'}.",
            "Write the checkpoint again.",
        )
    return _masked(model, structure)


def check_savable(source: SourceModel) -> None:
    """Raises:
    PreconditionError: if transformers has no class for what is compiled.
    """
    _whole(source)


def _masked(model: PreTrainedModel, structure: Structure) -> PreTrainedModel:
    model.train(False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    add_masks(model, {name: parameters[name].data != 0 for name in structure.masked})
    return model


def _save_as_named(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Config and weights under the names they have in the model: transformers would give some of them older names."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    first: dict[int, str] = {}
    for name, tensor in weights.items():
        first.setdefault(tensor.data_ptr(), name)
    distinct = {name: weights[name].contiguous() for name in first.values()}
    save_file(distinct, folder / "model.safetensors", metadata={"format": "pt"})


def _read_structure(folder: Path, config: Any) -> Structure:
    if not has_structure(folder):
        return Structure(architecture=(config.architectures or [""])[0])
    try:
        return Structure.model_validate_json((folder / STRUCTURE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise SourceModelError(
            f"'{folder / STRUCTURE_FILE}' cannot be read: {str(error).splitlines()[0]}.", "Write the checkpoint again."
        ) from None


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    return load_file(file) if file.suffix == ".safetensors" else {}


def _whole(source: SourceModel) -> PreTrainedModel:
    """The model as a class that can be loaded by itself: an encoder alone gets the class for encoders around it."""
    model = source.model
    if hasattr(transformers, type(model).__name__):
        return model
    name = MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(model.config.model_type, "")
    encoder_class: Any = getattr(transformers, name, None)
    if encoder_class is None or not name.endswith("EncoderModel"):
        raise PreconditionError(
            f"transformers has no class for {type(model).__name__} alone, so it cannot be saved as a checkpoint.",
            "Leave --checkpoint out, or compile the whole model with --task seq2seq-lm.",
        )
    with torch.device("meta"):
        whole: PreTrainedModel = encoder_class(copy.deepcopy(model.config))
    whole.encoder = model
    whole.set_input_embeddings(model.get_input_embeddings())
    return whole


def _distance(
    source: SourceModel, model: PreTrainedModel, loaded: PreTrainedModel, probe: Mapping[str, torch.Tensor]
) -> float:
    """Relative difference of the outputs, with transformers' own attention in both."""
    own = source.model.config._attn_implementation
    source.model.set_attn_implementation(loaded.config._attn_implementation)
    try:
        with torch.no_grad():
            expected, found = model(**probe), loaded(**probe)
    finally:
        source.model.set_attn_implementation(own)
    worst = 0.0
    mask = probe.get("decoder_attention_mask", probe.get("attention_mask"))
    for name, value in expected.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            difference = found[name] - value
            if mask is not None and value.shape[:2] == mask.shape:
                difference, value = difference[mask.bool()], value[mask.bool()]
            worst = max(worst, float(difference.norm() / value.norm().clamp_min(1e-12)))
    return worst


def _reason(structure: Structure) -> str:
    if structure.low_rank:
        what = f"{len(structure.low_rank)} linear layers are products of two"
    else:
        what = f"{next(iter(structure.shapes or structure.attributes))} has a size that the config has no key for"
    return f"{what}; load it with effc.load_checkpoint"
