"""What a model can be compiled for, and how that is read from its config.

Encoder-decoder models (BART, T5, Whisper) are compiled as their encoder, for feature extraction, unless ``seq2seq-lm``
is asked for: then one graph holds encoder and decoder, for a source text and the whole target text.

Importing this module imports neither torch nor transformers: the recipe needs the names only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from effc.errors import SourceModelError, UsageError
from effc.suggest import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Modality = Literal["text", "images", "audio"]


@dataclass(frozen=True)
class Task:
    """One kind of use.

    Attributes:
        name: as written in recipes and flags.
        modality: what the model reads.
        auto_class: the class of ``transformers`` that loads a checkpoint for it.
        architecture_endings: how the class names in ``config.architectures`` end that mean this task. Empty for
            feature extraction, which every model can do and which is chosen when no other task fits, and for
            ``seq2seq-lm``, which has to be asked for.
    """

    name: str
    modality: Modality
    auto_class: str
    architecture_endings: tuple[str, ...] = ()


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("feature-extraction", "text", "AutoModel"),
        Task("sequence-classification", "text", "AutoModelForSequenceClassification", ("ForSequenceClassification",)),
        Task("token-classification", "text", "AutoModelForTokenClassification", ("ForTokenClassification",)),
        Task("masked-lm", "text", "AutoModelForMaskedLM", ("ForMaskedLM", "WithLMHeadModel")),
        Task("causal-lm", "text", "AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel")),
        Task("seq2seq-lm", "text", "AutoModelForSeq2SeqLM"),
        Task("image-feature-extraction", "images", "AutoModel"),
        Task("image-classification", "images", "AutoModelForImageClassification", ("ForImageClassification",)),
        Task("audio-feature-extraction", "audio", "AutoModel"),
    )
}
TASK_NAMES = tuple(TASKS)
_FEATURES = {"text": "feature-extraction", "images": "image-feature-extraction", "audio": "audio-feature-extraction"}
_INPUT_MODALITY: dict[str, Modality] = {"input_ids": "text", "pixel_values": "images", "input_features": "audio"}


def resolve_task(config: PreTrainedConfig, requested: str | None = None) -> Task:
    """The task to compile for: ``requested`` if the model can do it, else the one its config tells of.

    Raises:
        UsageError: if ``requested`` is not a task.
        SourceModelError: if the model cannot do it, or reads something effc has no inputs for.
    """
    detected = detect_task(config, requested)
    if requested is None:
        return detected
    task = TASKS.get(requested)
    if task is None:
        raise UsageError(f"'{requested}' is not a task.", did_you_mean(requested, TASKS))
    if task != detected:
        _check_possible(config, task, detected)
    return task


def detect_task(config: PreTrainedConfig, requested: str | None = None) -> Task:
    """The task that ``config.architectures`` and the kind of input tell of; feature extraction if they tell nothing.

    Raises:
        SourceModelError: if the model reads something effc has no inputs for (several modalities, raw audio).
    """
    modality = _modality(config, requested)
    features = TASKS[_FEATURES[modality]]
    if config.is_encoder_decoder:
        return features
    for architecture in config.architectures or ():
        # Longest ending first, so that FlaubertWithLMHeadModel (masked) is not taken for a causal LMHeadModel.
        for ending, task in sorted(_endings(), key=lambda pair: -len(pair[0])):
            if architecture.endswith(ending) and task.modality == modality:
                return task
    return features


def features_of(task: Task) -> Task:
    """The feature extraction task of the same kind of input."""
    return TASKS[_FEATURES[task.modality]]


def _endings() -> list[tuple[str, Task]]:
    return [(ending, task) for task in TASKS.values() for ending in task.architecture_endings]


def _check_possible(config: PreTrainedConfig, task: Task, detected: Task) -> None:
    """Refuse a requested task that the model's kind cannot do. (Whether its head was trained shows when it loads.)"""
    import transformers

    kind = f"a '{config.model_type}' model"
    if task.modality != detected.modality:
        raise SourceModelError(
            f"The task '{task.name}' is for models that read {task.modality}, and {kind} reads {detected.modality}.",
            f"Leave --task out; effc would choose '{detected.name}'.",
        )
    if config.is_encoder_decoder and task.name != "seq2seq-lm":
        raise SourceModelError(
            f"The task '{task.name}' cannot be compiled for {kind}: of encoder-decoder models effc compiles the "
            "encoder only, or both parts for seq2seq-lm.",
            f"Use --task {detected.name} or --task seq2seq-lm, or leave --task out.",
        )
    mapping = getattr(transformers, task.auto_class)._model_mapping
    if type(config) not in mapping and task.auto_class not in (getattr(config, "auto_map", None) or {}):
        raise SourceModelError(
            f"transformers has no '{task.name}' form of {kind}.",
            f"Leave --task out; effc would choose '{detected.name}'.",
        )
    bidirectional = type(config) in transformers.AutoModelForMaskedLM._model_mapping
    if task.name == "causal-lm" and bidirectional and not getattr(config, "is_decoder", False):
        raise SourceModelError(
            f"{kind.capitalize()} reads its text in both directions, so it is no causal language model.",
            "Use --task masked-lm or --task feature-extraction, or set is_decoder in its config.json if it was trained "
            "as a decoder.",
        )


def _classifies_images(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint was trained as an image classifier (``CLIPForImageClassification``)."""
    return any(name.endswith("ForImageClassification") for name in config.architectures or ())


def _modality(config: PreTrainedConfig, requested: str | None) -> Modality:
    from transformers import MODEL_MAPPING

    # A composite config describes one model per modality; its image classifier runs the vision part alone.
    wanted = [requested] if requested else [TASKS["image-classification"].name] * _classifies_images(config)
    if wanted == ["image-classification"] and getattr(config, "vision_config", None):
        return "images"
    # With an explicit text task its text part alone is run.
    parts = [part for part in ("text_config", "vision_config", "audio_config") if getattr(config, part, None)]
    if len(parts) > 1:
        if requested == "causal-lm":
            return "text"
        raise SourceModelError(
            f"A '{config.model_type}' model combines several kinds of input ({', '.join(parts)}), and effc compiles "
            "models that read one.",
            "Save its text or vision part as a checkpoint of its own and compile that one.",
        )
    # Remote code brings its own classes, which are not in the mapping; text is by far the most frequent there.
    model_class = MODEL_MAPPING.get(type(config), None)
    main_input = getattr(model_class, "main_input_name", "input_ids")
    modality = _INPUT_MODALITY.get(main_input)
    if modality is None:
        raise SourceModelError(
            f"A '{config.model_type}' model reads '{main_input}', for which effc has no inputs yet.",
            f"effc compiles models that read {', '.join(_INPUT_MODALITY)}.",
        )
    return modality
