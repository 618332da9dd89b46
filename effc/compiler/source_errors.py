"""What transformers and its readers say of a checkpoint, as errors that name a remedy, and otherwise nothing."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from effc.compiler.checkpoint import damaged
from effc.errors import EffcError, MissingDependencyError, SourceModelError


@contextmanager
def explained(path: Path, what: str = "model") -> Iterator[None]:
    """Turn what transformers, torch, safetensors and gguf raise into errors that name the remedy."""
    import pickle
    import struct

    from safetensors import SafetensorError

    try:
        yield
    except EffcError:
        raise
    except ImportError as error:
        package = error.name or ("gguf" if path.suffix == ".gguf" else None)
        raise MissingDependencyError(
            f"Reading the {what} in '{path}' needs a package that is not installed: "
            f"{' '.join(str(error).split())[:300]}",
            f"Install it: pip install {package}" if package else "Install the package that this names with pip.",
        ) from error
    except (SafetensorError, pickle.UnpicklingError, EOFError, struct.error) as error:
        if "weights only load failed" in str(error).lower():
            raise SourceModelError(
                f"The weights in '{path}' are a pickle that holds more than tensors; reading it could run any code.",
                "Use a checkpoint in safetensors format.",
            ) from error
        raise damaged(path, error) from error
    except (ValueError, OSError, RuntimeError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _explain(error, path, what) from error


def _explain(error: Exception, path: Path, what: str) -> SourceModelError:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return SourceModelError(
            f"The model in '{path}' needs code of its own, which the checkpoint brings along.",
            "Read that code, and if you trust it, pass --trust-remote-code.",
        )
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        kind = re.search(r"model type `([^`]*)`", text)
        name = f"model type '{kind[1]}'" if kind else "model type"
        return SourceModelError(
            f"The installed transformers does not know the {name} of '{path}'.",
            "Check config.json; if the model is newer than your transformers, upgrade that with pip.",
        )
    if "ignore_mismatched_sizes" in text or "size mismatch" in text:
        return SourceModelError(
            f"The weights in '{path}' have other shapes than its config.json says.",
            "Check that config.json belongs to these weights.",
        )
    if path.suffix == ".gguf" and "is not supported yet" not in text:
        return damaged(path, error)
    if isinstance(error, RuntimeError) and "PytorchStreamReader" in text:
        return damaged(path, error)
    return SourceModelError(
        f"transformers could not read the {what} in '{path}': {text[:400].rstrip('.')}.",
        "Check that it is a complete transformers checkpoint; --debug shows the whole error.",
    )


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, log lines or warnings: what matters is raised or kept in ``SourceModel.warnings``."""
    import transformers
    from transformers import modeling_gguf_pytorch_utils

    logging: Any = transformers.utils.logging
    gguf: Any = modeling_gguf_pytorch_utils

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    # Its bar is tqdm's own, which transformers' switch does not reach.
    gguf_bar, gguf.tqdm = gguf.tqdm, partial(gguf.tqdm, disable=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        gguf.tqdm = gguf_bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
