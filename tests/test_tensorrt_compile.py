"""A whole compile with TensorRT-RTX as its target: files, record, report, command line, and loading without a GPU."""

from __future__ import annotations

import json

import pytest
import tiny_checkpoints
from click.testing import CliRunner

import effc
from effc.cli import main
from effc.errors import MissingDependencyError, UsageError
from effc.exporters.cuda_device import device_capability

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(device_capability() is not None, reason="there is a GPU, and this is about having none"),
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    folder = tmp_path_factory.mktemp("compile")
    model = tiny_checkpoints.save_lively(folder / "m", "BertModel", hidden_size=64, intermediate_size=96)
    texts = ["the film was good", "a dull story and bad acting", "i loved the plot"] * 4
    return effc.compile(
        model,
        attention="local:8",
        quantization="int8",
        target="tensorrt_rtx",
        engine={"arch": "sm_86,sm_89", "shapes": "4x64", "plugin": False},
        calibration=texts,
        output=folder / "out",
        verify={"samples": 2},
    )


def test_engines_are_files_of_the_artifact(artifact):
    files = artifact.manifest.files
    assert {"engines/forward.sm_86.plan", "engines/forward.sm_89.plan"} < set(files)
    assert not any(name.endswith(".so") for name in files)
    record = artifact.manifest.engines
    assert record.not_run == "engines not run: no device" and record.graphs["forward"].error < 1
    for engine in record.engines:
        quantized = [name for name, kernel in engine.linears.items() if kernel == "int8 gemm"]
        assert len(quantized) == 12 and not engine.warnings
    assert artifact.manifest.benchmark is None and artifact.manifest.verification is not None


def test_the_report_and_inspect_show_them(artifact):
    page = (artifact.path / "report.html").read_text()
    assert 'id="engines"' in page and "Engines not run: no device." in page and "12 × int8 gemm" in page
    shown = CliRunner().invoke(main, ["inspect", str(artifact.path), "--json"])
    assert json.loads(shown.output)["engines"]["flavour"] == "tensorrt_rtx"


def test_without_a_gpu_the_graph_runs_and_says_why(artifact):
    with pytest.warns(RuntimeWarning, match=r"need an NVIDIA GPU \(sm_86, sm_89\).*runs on the CPU instead"):
        model = effc.load(artifact.path)
    assert model(input_ids=[[2, 5, 6, 3]]).last_hidden_state.shape == (1, 4, 64)
    with pytest.raises(MissingDependencyError, match="need an NVIDIA GPU"):
        effc.load(artifact.path, engine=True)


def test_artifacts_without_engines_have_none_to_load(artifact, tmp_path):
    manifest = json.loads((artifact.path / "effc.json").read_text())
    manifest["engines"] = None
    for name in list(manifest["files"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((artifact.path / name).read_bytes())
    (tmp_path / "effc.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="has no engines"):
        effc.load(tmp_path, engine=True)
