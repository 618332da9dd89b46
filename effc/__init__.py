"""effc compiles Hugging Face Transformers to sparse attention and INT8, and proves what it did.

>>> artifact = effc.compile("path/to/model", attention="local:256", quantization="int8", output="out")
>>> model = effc.load("out")
>>> outputs = model(**tokenizer(texts, return_tensors="np", padding=True))

Importing the package is cheap, and :func:`load` needs neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effc.compiler.attention_mass import attention_mass as attention_mass
    from effc.compiler.attention_pictures import attention_forms as attention_forms
    from effc.compiler.attention_pictures import attention_picture as attention_picture
    from effc.compiler.attention_search import search_attention as search_attention
    from effc.compiler.bench import bench as bench
    from effc.compiler.compare import Comparison as Comparison
    from effc.compiler.compare import compare as compare
    from effc.compiler.compiled_model import CompiledModel as CompiledModel
    from effc.compiler.distill import Distilled as Distilled
    from effc.compiler.distill import distill as distill
    from effc.compiler.pipeline import Artifact as Artifact
    from effc.compiler.pipeline import compile as compile
    from effc.compiler.pruned_checkpoint import load_checkpoint as load_checkpoint
    from effc.compiler.runtime import load as load
    from effc.compiler.verify import verify as verify
    from effc.plugins.native import native_library as native_library
    from effc.serving.load_test import load_test as load_test
    from effc.serving.options import ServingOptions as ServingOptions
    from effc.serving.repository import write_repository as write_repository
    from effc.serving.serve import serve as serve

__version__ = "0.1.0"

_EXPORTS = {
    "Artifact": "effc.compiler.pipeline",
    "compile": "effc.compiler.pipeline",
    "compare": "effc.compiler.compare",
    "Comparison": "effc.compiler.compare",
    "distill": "effc.compiler.distill",
    "Distilled": "effc.compiler.distill",
    "load_checkpoint": "effc.compiler.pruned_checkpoint",
    "CompiledModel": "effc.compiler.compiled_model",
    "load": "effc.compiler.runtime",
    "attention_forms": "effc.compiler.attention_pictures",
    "attention_mass": "effc.compiler.attention_mass",
    "attention_picture": "effc.compiler.attention_pictures",
    "search_attention": "effc.compiler.attention_search",
    "verify": "effc.compiler.verify",
    "bench": "effc.compiler.bench",
    "native_library": "effc.plugins.native",
    "load_test": "effc.serving.load_test",
    "ServingOptions": "effc.serving.options",
    "write_repository": "effc.serving.repository",
    "serve": "effc.serving.serve",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that a deployment that only loads never imports torch."""
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'effc' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(module), name)
