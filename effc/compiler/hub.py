"""Fetch a checkpoint from the Hugging Face hub, or find it in the hub's local cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from effc.compiler.checkpoint import CONFIG_FILE
from effc.errors import SourceModelError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Everything that describes the model or its tokenizer; weights are chosen apart, and examples and exports left.
_DESCRIPTION = ("*.json", "*.txt", "*.model", "*.py", "*.jinja", "*.tiktoken")
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def is_hub_name(text: str) -> bool:
    """Whether ``text`` has the form of a hub name: ``name`` or ``owner/name``."""
    return _NAME.fullmatch(text) is not None and ".." not in text and not text.endswith(".gguf")


def download(name: str, revision: str | None) -> tuple[Path, str]:
    """Bring the files that effc needs into the hub's cache.

    The token comes from the environment (``HF_TOKEN``) or ``hf auth login``; ``HF_HUB_OFFLINE=1`` reads the cache only.

    Returns:
        The directory, and the commit it is a snapshot of.

    Raises:
        SourceModelError: if the model does not exist, is gated, or can neither be reached nor found in the cache.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub import errors as hub_errors

    # The hub's errors derive from the base error of its HTTP client, a package that changes from version to version.
    client_error: Any = hub_errors.HfHubHTTPError.__mro__[1]
    refusals = (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError, hub_errors.HFValidationError)
    at = f" at revision '{revision}'" if revision else ""
    files: list[str] | None = None
    trouble = "the hub is switched off by HF_HUB_OFFLINE"
    try:
        with _silent():
            if not constants.HF_HUB_OFFLINE:
                try:
                    info = HfApi().model_info(name, revision=revision)
                    files = _wanted([file.rfilename for file in info.siblings or ()])
                except refusals:
                    raise
                except (client_error, OSError) as error:
                    # The cache may still have it.
                    trouble = f"{constants.ENDPOINT} cannot be reached ({_first_line(error)})"
            if files is None:
                directory = _cached(name, revision)
            else:
                directory = Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except hub_errors.GatedRepoError:
        raise SourceModelError(
            f"The model '{name}' is gated: its owner grants access on request.",
            f"Accept its terms at {constants.ENDPOINT}/{name} and set HF_TOKEN to a token of that account.",
        ) from None
    except hub_errors.RepositoryNotFoundError:
        raise SourceModelError(
            f"There is no model '{name}' on {constants.ENDPOINT} that you may read, and no local directory of that "
            "name.",
            "Check the spelling; for a private model set HF_TOKEN.",
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise SourceModelError(
            f"The model '{name}' has no revision '{revision}'.", "Give a branch, tag or commit that exists."
        ) from None
    except hub_errors.HFValidationError as error:
        raise SourceModelError(
            f"'{name}' is neither a local path nor a hub name: {_first_line(error)}.", "Check the path of the model."
        ) from None
    except (client_error, OSError) as error:
        raise SourceModelError(
            f"The model '{name}'{at} could not be downloaded: {_first_line(error)}.", "Try again later."
        ) from None
    if directory is None:
        remedy = "Unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "Check the network and HTTPS_PROXY"
        raise SourceModelError(
            f"There is no local directory '{name}', the model '{name}'{at} is not in the local hub cache, and "
            f"{trouble}.",
            f"{remedy}, or give the path of a local directory.",
        )
    return directory, directory.name


@contextmanager
def _silent() -> Iterator[None]:
    """No progress bars and no log lines from the hub's client."""
    import huggingface_hub

    utils: Any = huggingface_hub.utils

    verbosity, hidden = utils.logging.get_verbosity(), utils.are_progress_bars_disabled()
    utils.logging.set_verbosity_error()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if not hidden:
            utils.enable_progress_bars()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")


def _cached(name: str, revision: str | None) -> Path | None:
    """The directory of a model that was fetched before, or None.

    Not ``snapshot_download(local_files_only=True)``, which demands the files that were left on the hub, too.
    """
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, CONFIG_FILE, revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _wanted(files: list[str]) -> list[str]:
    """The names to fetch: descriptions and one form of the weights, safetensors before pickles."""
    top = [name for name in files if "/" not in name]
    weights: list[str] = []
    for pattern in _WEIGHTS:
        weights = weights or [name for name in top if fnmatch(name, pattern)]
    return [name for name in top if any(fnmatch(name, pattern) for pattern in _DESCRIPTION)] + weights
