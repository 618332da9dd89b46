"""``effc.load``: artifacts are checked, inputs completed or refused by name, outputs returned in kind."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tiny_artifacts import LAYER, VOCABULARY, WIDTH, image_artifact, make_artifact, manifest_for

import effc
from effc.compiler.artifact_files import check_files, read_manifest
from effc.compiler.compiled_model import CompiledModel
from effc.compiler.kernels import BODY, NATIVE, UNFUSED, UNKNOWN, attention_kernels, linear_kernels
from effc.compiler.manifest import AttentionLayer
from effc.compiler.session import KernelEvent
from effc.errors import EffcError, MissingDependencyError, OutputError, UsageError

IDS = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("artifact"))


@pytest.fixture(scope="module")
def model(artifact: Path) -> CompiledModel:
    return effc.load(artifact, threads=1)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """An artifact of its own for a test that changes it."""
    return make_artifact(tmp_path / "artifact")


def plain_run(artifact: Path, **feeds: np.ndarray) -> list[np.ndarray]:
    """The graph in plain onnxruntime, without effc."""
    session = onnxruntime.InferenceSession(str(artifact / "model.onnx"), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


class TestOutputs:
    def test_equal_those_of_plain_onnxruntime(self, artifact: Path, model: CompiledModel) -> None:
        mask, types = np.array([[1, 1, 1, 0], [1, 1, 1, 1]]), np.array([[0, 0, 1, 1], [0, 1, 0, 1]])
        expected = plain_run(artifact, input_ids=IDS, attention_mask=mask, token_type_ids=types)
        outputs = model(input_ids=IDS, attention_mask=mask, token_type_ids=types)
        for got, want in zip(outputs.to_tuple(), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    def test_are_reached_by_name_attribute_and_position(self, model: CompiledModel) -> None:
        outputs = model(input_ids=IDS)
        assert list(outputs) == ["last_hidden_state", "pooler_output"] == model.output_names
        assert outputs[0] is outputs["last_hidden_state"] is outputs.last_hidden_state
        assert outputs[1:] == (outputs.pooler_output,)
        assert outputs.last_hidden_state.shape == (2, 4, WIDTH)
        assert "pooler_output" in outputs and "pooler_output" in dir(outputs) and len(outputs) == 2
        with pytest.raises(AttributeError, match="logits.*last_hidden_state"):
            _ = outputs.logits
        with pytest.raises(KeyError):
            _ = outputs["logits"]

    def test_can_be_copied(self, model: CompiledModel) -> None:
        import copy

        outputs = model(input_ids=IDS)
        np.testing.assert_array_equal(copy.deepcopy(outputs).pooler_output, outputs.pooler_output)

    def test_are_torch_tensors_where_torch_went_in(self, model: CompiledModel) -> None:
        torch = pytest.importorskip("torch")
        outputs = model(input_ids=torch.tensor(IDS), attention_mask=torch.ones(2, 4, dtype=torch.bool))
        assert isinstance(outputs.last_hidden_state, torch.Tensor)
        np.testing.assert_array_equal(outputs[0].numpy(), model(input_ids=IDS)[0])


class TestInputs:
    def test_missing_mask_is_ones_and_missing_types_are_zeros(self, model: CompiledModel) -> None:
        given = model(input_ids=IDS, attention_mask=np.ones_like(IDS), token_type_ids=np.zeros_like(IDS))
        np.testing.assert_array_equal(model(input_ids=IDS)[0], given[0])
        assert not np.array_equal(model(input_ids=IDS, token_type_ids=np.ones_like(IDS))[0], given[0])

    @pytest.mark.parametrize("dtype", ["int32", "uint8", "int16"])
    def test_other_integers_are_cast(self, model: CompiledModel, dtype: str) -> None:
        np.testing.assert_array_equal(model(input_ids=IDS.astype(dtype))[0], model(input_ids=IDS)[0])

    def test_lists_and_none_are_accepted(self, model: CompiledModel) -> None:
        outputs = model(input_ids=IDS.tolist(), attention_mask=None)
        np.testing.assert_array_equal(outputs[0], model(input_ids=IDS)[0])

    def test_what_a_tokenizer_gives_beside_is_dropped(self, model: CompiledModel) -> None:
        outputs = model(input_ids=IDS, special_tokens_mask=np.ones_like(IDS), length=[4, 4])
        np.testing.assert_array_equal(outputs[0], model(input_ids=IDS)[0])

    def test_a_mask_that_hides_something_is_not_dropped(self, tmp_path: Path) -> None:
        maskless = effc.load(make_artifact(tmp_path, mask=False))
        assert "attention_mask" not in maskless.input_names
        maskless(input_ids=IDS, attention_mask=np.ones_like(IDS))
        with pytest.raises(UsageError, match="'attention_mask' hides positions.*one batch per length"):
            maskless(input_ids=IDS, attention_mask=np.array([[1, 1, 1, 0], [1, 1, 1, 1]]))

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({"input_idx": IDS}, "no input 'input_idx'.*Did you mean 'input_ids'"),
            ({"attention_mask": np.ones_like(IDS)}, r"'input_ids' is missing.*int64 \[batch, sequence\].*tokenizer"),
            ({}, "'input_ids' is missing"),
            ({"input_ids": IDS[0]}, r"1 dimensions instead of 2.*\[batch, sequence\].*\[4\].*Give a batch"),
            ({"input_ids": IDS[None, None]}, r"4 dimensions instead of 2.*\[1, 1, 2, 4\]"),
            ({"input_ids": np.zeros((2, 0), int)}, r"'input_ids' is empty.*\[2, 0\]"),
            ({"input_ids": []}, "dimensions instead of 2"),
            ({"input_ids": np.zeros((1, 65), int)}, r"too long.*\[1, 65\].*at most 64 tokens.*max_length=64"),
            ({"input_ids": IDS.astype(float)}, "wrong type: expected int64.*got float64"),
            ({"input_ids": np.array([["a", "b"]])}, "wrong type: expected int64"),
            ({"input_ids": [[1, 2], [3]]}, "rows of different lengths.*padding=True"),
            ({"input_ids": IDS + VOCABULARY}, f"value 58.*0 to {VOCABULARY - 1}.*tokenizer"),
            ({"input_ids": -IDS}, f"value -8.*0 to {VOCABULARY - 1}"),
            ({"input_ids": IDS, "attention_mask": np.ones((2, 3), int)}, "does not fit 'input_ids'.*sequence is 4"),
            ({"input_ids": IDS, "attention_mask": np.ones((1, 4), int)}, "does not fit 'input_ids'.*batch is 2"),
        ],
    )
    def test_wrong_inputs_are_refused_by_name(
        self, model: CompiledModel, inputs: dict[str, object], message: str
    ) -> None:
        with pytest.raises(UsageError, match=message):
            model(**inputs)

    def test_the_longest_length_is_taken(self, model: CompiledModel) -> None:
        assert model(input_ids=np.zeros((1, 64), int))[0].shape == (1, 64, WIDTH)

    def test_a_fixed_image_size_is_checked(self, tmp_path: Path) -> None:
        directory = image_artifact(tmp_path)
        model = effc.load(directory)
        assert model(pixel_values=np.ones((2, 3, 4, 4)))[0].shape == (2, 5, 3)  # float64 is cast
        with pytest.raises(UsageError, match=r"wrong shape: expected float32 \[batch, 3, 4, 4\].*\[2, 3, 5, 4\]"):
            model(pixel_values=np.ones((2, 3, 5, 4)))
        with pytest.raises(UsageError, match="wrong type"):
            model(pixel_values=np.ones((2, 3, 4, 4), np.uint8))

    def test_a_failure_within_onnxruntime_is_explained(self, artifact: Path) -> None:
        class Broken:
            def run(self, *_: object) -> None:
                raise RuntimeError("[ONNXRuntimeError] : 6 : FAIL : Failed to allocate memory\nat allocator.cc")

        model = effc.load(artifact)
        model.session = Broken()  # type: ignore[assignment]
        with pytest.raises(EffcError, match=r"input_ids \[2, 4\].*: FAIL : Failed to allocate memory\. If memory"):
            model(input_ids=IDS)


class TestLoad:
    def test_imports_neither_torch_nor_transformers(self, artifact: Path) -> None:
        code = (
            "import sys, effc; effc.load(sys.argv[1])(input_ids=[[1, 2]]);"
            "print([m for m in ('torch', 'transformers', 'onnx', 'onnxscript') if m in sys.modules])"
        )
        root = str(Path(effc.__file__).parents[1])
        result = subprocess.run(
            [sys.executable, "-c", code, str(artifact)], capture_output=True, text=True, check=True, cwd=root
        )
        assert result.stdout.strip() == "[]"

    def test_threads_and_session_options_are_used(self, artifact: Path) -> None:
        assert effc.load(artifact, threads=1).session.get_session_options().intra_op_num_threads == 1
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        model = effc.load(artifact, session_options=options, threads=2)
        used = model.session.get_session_options()
        assert used.intra_op_num_threads == 2
        assert used.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Without fusions the int8 product is still the node that the graph holds.
        assert model.kernels()["int8_product"] == "int8 MatMulInteger"
        assert not options.enable_profiling

    @pytest.mark.parametrize("threads", [0, -1])
    def test_threads_below_one_are_refused(self, artifact: Path, threads: int) -> None:
        with pytest.raises(UsageError, match=f"at least 1, not {threads}"):
            effc.load(artifact, threads=threads)

    def test_unknown_provider_names_the_nearest(self, artifact: Path) -> None:
        with pytest.raises(UsageError, match="CPUExecutionProvide'.*Did you mean 'CPUExecutionProvider'.*effc.gpu"):
            effc.load(artifact, providers=["CPUExecutionProvide"])

    def test_many_threads_may_call(self, model: CompiledModel) -> None:
        batches = [np.full((1, 1 + i % 5), i) for i in range(24)]
        expected = [model(input_ids=batch)[0] for batch in batches]
        got: dict[int, np.ndarray] = {}

        def work(start: int) -> None:
            for i in range(start, len(batches), 4):
                got[i] = model(input_ids=batches[i])[0]

        threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, want in enumerate(expected):
            np.testing.assert_array_equal(got[i], want)

    def test_native_library_that_does_not_load_warns_and_falls_back(
        self, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = tmp_path / "effc.so"
        broken.write_bytes(b"not a library")
        monkeypatch.setenv("EFFC_NATIVE_LIBRARY", str(broken))
        with pytest.warns(RuntimeWarning, match="cannot be loaded.*effc doctor"):
            model = effc.load(artifact)
        assert model.native_library is None
        assert model(input_ids=IDS)[0].shape == (2, 4, WIDTH)
        assert effc.load(artifact, native=False).native_library is None

    def test_a_library_that_was_asked_for_and_is_absent_is_an_error(
        self, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EFFC_NATIVE_LIBRARY", str(tmp_path / "absent.so"))
        with pytest.raises(MissingDependencyError, match=r"EFFC_NATIVE_LIBRARY names '.*absent.so'"):
            effc.load(artifact)
        monkeypatch.setenv("EFFC_NATIVE", "0")
        assert effc.load(artifact).native_library is None

    def test_native_kernels_agree_with_the_body_and_are_seen_in_the_profile(self, artifact: Path) -> None:
        native = effc.load(artifact)
        if native.native_library is None:
            pytest.skip("effc's native library is not built here")
        body = effc.load(artifact, native=False)
        assert (native.kernels()[LAYER], body.kernels()[LAYER]) == (NATIVE, BODY)
        mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
        got, want = (m(input_ids=IDS, attention_mask=mask)[0] for m in (native, body))
        # The int8 product turns a last-bit difference into a rounding step.
        np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())


class TestDamage:
    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("absent", "no artifact at '.*absent'.*effc compile"),
            ("artifact/model.onnx", "is a file.*Give the directory"),
            (".", "not an effc artifact: it has no effc.json"),
        ],
    )
    def test_what_is_no_artifact(self, damaged: Path, path: str, message: str) -> None:
        with pytest.raises(OutputError, match=message):
            effc.load(damaged.parent / path)

    def test_missing_file(self, damaged: Path) -> None:
        (damaged / "model.onnx").unlink()
        with pytest.raises(OutputError, match="lacks its file 'model.onnx'.*Compile the model again"):
            effc.load(damaged)

    def test_truncated_file(self, damaged: Path) -> None:
        content = (damaged / "model.onnx").read_bytes()
        (damaged / "model.onnx").write_bytes(content[:-100])
        with pytest.raises(OutputError, match=rf"truncated: it has {len(content) - 100:,} bytes"):
            effc.load(damaged, verify_files=False)

    def test_flipped_byte(self, damaged: Path) -> None:
        content = bytearray((damaged / "model.onnx").read_bytes())
        content[len(content) // 2] ^= 1
        (damaged / "model.onnx").write_bytes(content)
        with pytest.raises(OutputError, match="SHA-256"):
            effc.load(damaged)

    def test_other_files_do_not_keep_a_model_from_loading(self, tmp_path: Path) -> None:
        (tmp_path / "report.html").write_text("made")
        artifact = make_artifact(tmp_path)
        (tmp_path / "report.html").write_text("edited by hand")
        effc.load(artifact)
        with pytest.raises(OutputError, match=r"report.html' is changed"):
            check_files(artifact, read_manifest(artifact))

    def test_external_data_is_checked(self, tmp_path: Path) -> None:
        (tmp_path / "model.onnx.data").write_bytes(b"weights")
        artifact = make_artifact(tmp_path)
        (tmp_path / "model.onnx.data").write_bytes(b"weighty")
        with pytest.raises(OutputError, match=r"model.onnx.data' is damaged"):
            effc.load(artifact)

    def test_unreadable_manifest(self, damaged: Path) -> None:
        text = (damaged / "effc.json").read_text()
        (damaged / "effc.json").write_text(text[: len(text) // 2])
        with pytest.raises(OutputError, match="effc.json' cannot be read.*Compile the model again"):
            effc.load(damaged)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"schema_version": 2, "effc_version": "9.0"}, "effc 9.0 in format 2.*pip install --upgrade effc"),
            ({"surprise": 1}, "surprise: Extra inputs.*newer effc"),
            ({"files": {}}, "lists no model.onnx"),
            ({"inputs": 3}, "inputs: "),
        ],
    )
    def test_foreign_manifest(self, damaged: Path, change: dict[str, object], message: str) -> None:
        values = json.loads((damaged / "effc.json").read_text()) | change
        (damaged / "effc.json").write_text(json.dumps(values))
        with pytest.raises(OutputError, match=message):
            effc.load(damaged)

    def test_inputs_that_the_graph_does_not_have(self, damaged: Path) -> None:
        values = json.loads((damaged / "effc.json").read_text())
        values["inputs"] = values["inputs"][:1]
        (damaged / "effc.json").write_text(json.dumps(values))
        with pytest.raises(OutputError, match="takes input_ids, attention_mask, token_type_ids, but .* says input_ids"):
            effc.load(damaged)

    def test_model_that_onnxruntime_refuses(self, damaged: Path) -> None:
        (damaged / "model.onnx").write_bytes(b"not a graph")
        manifest = manifest_for(damaged, inputs=[], outputs=[], max_length=None)
        (damaged / "effc.json").write_text(manifest.model_dump_json())
        with pytest.raises(OutputError, match="cannot load.*made with onnxruntime 1.31.1"):
            effc.load(damaged)


class TestKernels:
    def test_of_the_standard_op_body(self, artifact: Path) -> None:
        kernels = effc.load(artifact, native=False).kernels()
        assert kernels[LAYER] == BODY
        assert kernels["float_product"] == "float MatMul"
        assert kernels["int8_product"] == "int8 DynamicQuantizeMatMul"

    def test_native_and_dense_layers_are_told_apart(self) -> None:
        layers = [layer("a", True), layer("b", False), layer("c", True), layer("d", False)]
        events = [
            event("a", "SparseAttention"),
            event("something", "MultiHeadAttention"),
            event("c", "SparseAttention"),
            event("/d/MultiHeadAttention", "MultiHeadAttention"),
        ]
        assert attention_kernels(events, layers) == {
            "a": NATIVE,
            "b": UNKNOWN,  # two fused kernels, one of them d's by name: no telling by count
            "c": NATIVE,
            "d": "onnxruntime MultiHeadAttention",
        }

    def test_inlined_bodies_are_counted(self) -> None:
        events = [
            event("_inlfunc_SparseAttention_scores", "MatMul"),
            event("_inlfunc_SparseAttention_probabilities", "Softmax"),
            event("_inlfunc_SparseAttention_token_0_scores", "MatMul"),
            event("plain", "Softmax"),
            event("linear", "MatMul"),
        ]
        layers = [layer("a", True), layer("b", False), layer("c", True)]
        assert attention_kernels(events, layers) == {"a": BODY, "b": UNFUSED, "c": BODY}
        assert attention_kernels(events, [*layers, layer("d", True)])["a"] == UNKNOWN
        assert linear_kernels(events) == {"linear": "float MatMul"}

    def test_bodies_of_unnamed_nodes_are_found_by_elimination(self) -> None:
        events = [event("MatMul_3", "MatMul"), event("Softmax_4", "Softmax"), event("b", "SparseAttention")]
        assert attention_kernels(events, [layer("a", True), layer("b", True)]) == {"a": BODY, "b": NATIVE}


def layer(name: str, rewritten: bool) -> AttentionLayer:
    return AttentionLayer(
        layer=name, source="dense", pattern="local:4", causal=False, num_heads=1, kv_heads=1, head_dim=8,
        rewritten=rewritten,
    )  # fmt: skip


def event(node: str, operator: str) -> KernelEvent:
    return KernelEvent(node, operator, "CPUExecutionProvider", "float")
