"""Run an artifact of effc where effc is not installed: ONNX Runtime, numpy and a tokenizer are enough.

python examples/plain_onnxruntime.py OUT

The attention runs in standard operators then, which model.onnx carries along; with effc installed, effc.load would take
its native kernels.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

TEXTS = ["A quiet film about two people who hardly speak.", "The screen is too dim to read outdoors."]


def main(artifact: Path) -> None:
    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(TEXTS)
    columns = {
        "input_ids": [encoding.ids for encoding in encodings],
        "attention_mask": [encoding.attention_mask for encoding in encodings],
        "token_type_ids": [encoding.type_ids for encoding in encodings],
    }

    session = onnxruntime.InferenceSession(artifact / "model.onnx", providers=["CPUExecutionProvider"])
    # Not every model reads all of them.
    feeds = {i.name: np.asarray(columns[i.name], dtype=np.int64) for i in session.get_inputs()}
    outputs = session.run(None, feeds)
    for output, value in zip(session.get_outputs(), outputs, strict=True):
        print(f"{output.name}: shape {list(value.shape)}, all finite: {bool(np.isfinite(value).all())}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
