"""Where an ONNX file says that its weights lie: a file of foreign origin may point anywhere."""

from __future__ import annotations

from pathlib import Path

from effc.errors import OutputError
from effc.serving.backend.version import inside


def check_external_data(model: Path) -> set[str]:
    """The names of the files that hold a graph's weights, all of them beside it.

    Raises:
        OutputError: if the graph is no ONNX file, or names a file outside its directory or one that is not there.
    """
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.external_data_helper import ExternalDataInfo, _get_all_tensors, uses_external_data

    try:
        graph = onnx.load(model, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise OutputError(f"'{model}' is no ONNX file: {error}.", "Compile the model again.") from None
    names = {ExternalDataInfo(tensor).location for tensor in _get_all_tensors(graph) if uses_external_data(tensor)}
    for name in names:
        if not inside(model.parent, name).is_file():
            raise OutputError(f"'{model}' reads its weights from '{name}', which is not there.", "Copy all files.")
    return names
