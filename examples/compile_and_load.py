"""Compile a text encoder with effc, run it, and compare its embeddings with the source model's.

python examples/compile_and_load.py MODEL [OUT]

MODEL is a checkpoint directory or a hub name. OUT, where the artifact is written, must not hold anything yet; the
default is a temporary directory.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

import effc

TEXTS = [
    "A quiet film about two people who hardly speak, and it says more than most.",
    "The battery lasts two days, but the screen is too dim to read outdoors.",
    "Sparse attention looks at the neighbourhood of a word instead of at the whole text. " * 20,
]


def pooled(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean over real tokens: [batch, length, size] and [batch, length] to [batch, size] of length 1."""
    mean = (hidden * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def main(model: str, output: str) -> None:
    artifact = effc.compile(model, attention="local:64", quantization="int8", output=output)
    print(f"compiled to {artifact.path}")

    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(TEXTS, return_tensors="np", padding=True, truncation=True)
    mask = inputs["attention_mask"]

    compiled = effc.load(output)
    ours = pooled(compiled(**inputs).last_hidden_state, mask)

    source = AutoModel.from_pretrained(model).eval()
    with torch.no_grad():
        hidden = source(**tokenizer(TEXTS, return_tensors="pt", padding=True, truncation=True)).last_hidden_state
    theirs = pooled(hidden.numpy(), mask)

    for text, cosine in zip(TEXTS, (ours * theirs).sum(axis=1), strict=True):
        print(f"cosine to the source model {cosine:.4f}   {text[:60]}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    if len(sys.argv) == 3:
        main(sys.argv[1], sys.argv[2])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(sys.argv[1], str(Path(folder) / "artifact"))
