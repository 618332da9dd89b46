"""Which modules of effc a model needs inside a server, found by reading their imports.

A server has no effc. The modules that run there are copied beside the model, so that it runs what was tested.
"""

from __future__ import annotations

import ast
from pathlib import Path

from effc.errors import EffcError

_PACKAGE = Path(__file__).resolve().parents[1]
_BACKEND = "effc.serving.backend"
LIBRARY = "lib"
"""Folder of a model version that holds the copied modules."""

PACKAGES_VARIABLE = "EFFC_PACKAGES"
"""Names a folder in which the server's models find packages that pip installed there (``--target``)."""

SERVER_PACKAGES = ("numpy", "onnxruntime", "tokenizers", "triton_python_backend_utils")
"""What may be imported inside a server beside the standard library."""


def model_files(kind: str) -> dict[str, bytes]:
    """``model.py`` and the modules that it needs, by path inside the version's directory.

    Args:
        kind: name of a module of ``effc.serving.backend`` without ``_model``: ``forward``, ``tokens``, ...
    """
    entry = f"{_BACKEND}.{kind}_model"
    files = {
        f"{LIBRARY}/{path.relative_to(_PACKAGE.parent).as_posix()}": path.read_bytes()
        for path in modules_of(entry).values()
    }
    main = f"""import os
import sys
from pathlib import Path

# What is read from a repository is hashed; nothing is to be written into it.
sys.dont_write_bytecode = True
# Triton's Python looks neither at PYTHONPATH nor into a user's own packages.
sys.path[:0] = [path for path in (os.environ.get("{PACKAGES_VARIABLE}"),) if path]
sys.path.insert(0, str(Path(__file__).resolve().parent / "{LIBRARY}"))

from {entry} import TritonPythonModel  # noqa: E402

__all__ = ["TritonPythonModel"]
"""
    # Triton's Python writes the bytecode of model.py before that can tell it not to. It cannot where a file of that
    # name is in the way of the directory.
    return {"model.py": main.encode(), "__pycache__": b"", **files}


def modules_of(entry: str) -> dict[str, Path]:
    """The module ``entry`` and all modules of effc that importing it imports, with their files.

    Raises:
        EffcError: if one of them imports what a server does not have.
    """
    import sys

    found: dict[str, Path] = {}
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = path = _file_of(name)
        # Packages run their __init__ first.
        waiting += [parent for parent in [name.rpartition(".")[0]] if parent]
        for imported in _imports(ast.parse(path.read_text(encoding="utf-8"))):
            top = imported.partition(".")[0]
            if top == "effc":
                waiting.append(imported)
            elif top not in sys.stdlib_module_names and top not in SERVER_PACKAGES:
                raise EffcError(f"'{name}' imports '{top}', which a server does not have.", "Report this.")
    return found


def _imports(tree: ast.Module) -> set[str]:
    """Modules that are imported when the file is, which leaves out those inside functions and for type checkers."""
    names: set[str] = set()
    for statement in tree.body:
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            names.add(statement.module)
            names |= {
                f"{statement.module}.{alias.name}"
                for alias in statement.names
                if _exists(f"{statement.module}.{alias.name}")
            }
    return names


def _exists(name: str) -> bool:
    base = _PACKAGE.parent / Path(*name.split("."))
    return name.startswith("effc.") and (base.with_suffix(".py").is_file() or (base / "__init__.py").is_file())


def _file_of(name: str) -> Path:
    base = _PACKAGE.parent / Path(*name.split("."))
    return base / "__init__.py" if (base / "__init__.py").is_file() else base.with_suffix(".py")
