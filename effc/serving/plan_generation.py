"""The model that writes text with an artifact's generating graph."""

from __future__ import annotations

from typing import Any

from effc.errors import UsageError
from effc.exporters.triton_config import TEXT, ModelConfig, Tensor
from effc.plugins import native
from effc.serving.external_data import check_external_data
from effc.serving.options import ServingOptions
from effc.serving.plan import LIBRARY_NAME, File, Opened, PlannedModel, python_files, require_tokenizer
from effc.serving.plan_text import MAX_TEXT_BYTES


def plan_generation(name: str, opened: Opened, options: ServingOptions) -> PlannedModel:
    """The model ``name``, decoupled: it answers a request with as many responses as it streams.

    Raises:
        UsageError: if an option is given that means nothing for it.
    """
    record = opened.manifest.generation
    assert record is not None
    if options.backend != "python":
        raise UsageError("Text is written by effc's own model, in the python backend.", "Leave --backend out.")
    refuse_for_text(options)
    names = {record.file, *check_external_data(opened.path / record.file)}
    files: dict[str, File] = {file: opened.path / file for file in names}
    files["tokenizer.json"] = require_tokenizer(opened)
    library = native.library_path()
    if library is not None:
        files[LIBRARY_NAME] = library
    files |= python_files(
        "writer",
        generation=record.model_dump(mode="json"),
        library=LIBRARY_NAME if library is not None else None,
        threads=options.threads,
        **text_settings(opened, options),
    )
    return PlannedModel(text_config(name, options), files)


def refuse_for_text(options: ServingOptions) -> None:
    """Refuse what means nothing for a model that writes text, whatever runs it.

    Raises:
        UsageError: naming the flag.
    """
    refused = {
        "--pooling": options.pooling,
        "--normalize": options.normalize,
        "--variant": options.variants or None,
        "--response-cache": options.response_cache or None,
        "--max-length": options.max_length,
        "--stages": options.stages,
        "--cuda-graphs": options.cuda_graphs or None,
    }
    for flag, value in refused.items():
        if value is not None:
            raise UsageError(f"{flag} means nothing for a model that writes text.", "Leave it out.")


def text_settings(opened: Opened, options: ServingOptions) -> dict[str, Any]:
    """What a model that writes text has to know, whatever runs it."""
    vocabulary = next((tensor.maximum for tensor in opened.manifest.inputs if tensor.name == "input_ids"), None)
    return {
        "max_batch": options.max_batch,
        "max_length": opened.manifest.source.max_length,
        "max_bytes": MAX_TEXT_BYTES,
        "vocabulary": None if vocabulary is None else vocabulary + 1,
    }


def text_config(name: str, options: ServingOptions) -> ModelConfig:
    """Its configuration, with the tensors of vLLM's Triton backend."""
    return ModelConfig(
        name=name,
        backend="python",
        inputs=[
            Tensor("text_input", TEXT, (1,)),
            Tensor("stream", "bool", (1,), optional=True),
            Tensor("sampling_parameters", TEXT, (1,), optional=True),
            Tensor("exclude_input_in_output", "bool", (1,), optional=True),
        ],
        outputs=[
            Tensor("text_output", TEXT, (1,)),
            Tensor("token_ids", "int64", (-1,)),
            Tensor("finish_reason", TEXT, (1,)),
        ],
        instances=options.instances,
        decoupled=True,
    )
