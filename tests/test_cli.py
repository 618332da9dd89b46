"""The command: exit codes, one JSON object on stdout, one-paragraph errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_checkpoints


def effc(*arguments, cache, **kwargs):
    environment = os.environ | {"EFFC_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "effc.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        **kwargs,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoints.save(tmp_path_factory.mktemp("model"), "BertModel", with_tokenizer=True)


@pytest.fixture(scope="module")
def compiled(checkpoint, cache, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "artifact"
    done = effc(
        "compile",
        checkpoint,
        "--attn=local:8",
        "--quant=int8",
        "--target=onnxruntime",
        "--lengths=16,32",
        "--json",
        "-o",
        output,
        cache=cache,
    )
    assert done.returncode == 0, done.stderr
    return output, json.loads(done.stdout)


def test_compile_prints_one_object(compiled):
    output, result = compiled
    assert result["output"] == str(output)
    assert result["passes"]
    assert set(result["metrics"]) == {"verification", "benchmark"}


def test_inspect_verify_and_bench(compiled, cache, tmp_path):
    output, _ = compiled
    assert json.loads(effc("inspect", output, "--json", cache=cache).stdout)["schema_version"] == 1
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in ("the film was good", "a bad plot")))
    verified = effc("verify", output, "--data", data, "--json", cache=cache)
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["samples"] == 2
    assert effc("verify", output, "--data", data, "--max-quality-drop=0", cache=cache).returncode == 1
    benched = effc("bench", output, "--lengths=16", "--rounds=1", "--json", cache=cache)
    figures = json.loads(benched.stdout)
    assert figures["speedup"]["16"] == pytest.approx(
        figures["dense"]["16"]["cpu_ms"] / figures["compiled"]["16"]["cpu_ms"]
    )
    stored = json.loads((output / "effc.json").read_text())
    assert stored["verification"]["samples"] == 2
    assert stored["benchmark"]["lengths"] == [16]


def test_doctor_and_recipe_show(cache):
    assert json.loads(effc("doctor", "--json", cache=cache).stdout)["machine"]["architecture"]
    shown = effc("recipe", "show", cache=cache)
    assert "quantization:" in shown.stdout
    assert shown.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/such/directory", "--attn=local:8"], "no file or directory"),
        (["owner/no-such-model", "--attn=local:8"], "HF_HUB_OFFLINE"),
        (["{empty}", "--attn=local:8"], "config.json"),
        (["{model}", "--attn=local:0"], "at least 1"),
        (["{model}", "--attn=local:-3"], "at least 1"),
        (["{model}", "--attn=lokal:8"], "Did you mean 'local'?"),
        (["{model}", "--quant=int9"], "int8"),
        (["{model}", "--recipe={recipe}"], "Did you mean 'attention'?"),
        (["{truncated}", "--attn=local:8"], "model.safetensors"),
        ([], "No model is named"),
    ],
)
def test_bad_input_exits_2_in_one_paragraph(arguments, words, checkpoint, cache, tmp_path):
    import shutil

    empty, truncated, recipe = tmp_path / "empty", tmp_path / "truncated", tmp_path / "recipe.yaml"
    empty.mkdir()
    shutil.copytree(checkpoint, truncated)
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    recipe.write_text("atention: local:8\n")
    places = {"empty": empty, "truncated": truncated, "recipe": recipe, "model": checkpoint}
    output = tmp_path / "out"
    done = effc("compile", *(a.format(**places) for a in arguments), "-o", output, cache=cache)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not output.exists()


def test_unwritable_output_is_refused_before_any_work(checkpoint, cache, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for output in (file, file / "inside", "/proc/effc"):
        done = effc("compile", checkpoint, "-o", output, cache=cache)
        assert done.returncode == 2, done.stderr
        assert "Error" in done.stderr


def test_debug_shows_the_traceback(cache, tmp_path):
    done = effc("compile", tmp_path / "none", "-o", tmp_path / "out", "--debug", cache=cache)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_interrupt_exits_130_and_leaves_nothing(checkpoint, tmp_path):
    environment = os.environ | {"EFFC_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "effc.cli", "compile", str(checkpoint), "--attn=local:8", "-o", str(tmp_path / "out")],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    cache = tmp_path / "cache" / "export"
    while not cache.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    # Interrupted inside exec(), which imports do, Python ends itself by the signal after all: 130 to a shell as well.
    assert process.returncode in (130, -signal.SIGINT), errors
    assert "Traceback" not in errors and "no half-written output was left" in errors
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
