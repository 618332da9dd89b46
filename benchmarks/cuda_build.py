"""Compiling the CUDA kernels with nvcc and reading what came out. Needs nvcc, g++ and no device."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PLUGINS = Path(__file__).resolve().parents[1] / "cpp_plugins"
HEAD_SIZES = (32, 64, 80, 96, 128, 256)
ARCHITECTURES = (80, 86, 89, 90, 120)
TILE_KERNEL = re.compile(r"attend_tile.*?(Half|BFloat16).*?TileShapeILi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)E")
OTHER_KERNEL = re.compile(r"(attend_rows|merge_splits)I(f|\w*?Half|\w*?BFloat16)E")


@dataclass(frozen=True)
class Kernel:
    """One kernel as the compiler left it."""

    name: str  # as in the table
    number: str
    architecture: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    instructions: int
    tensor_core: int  # HMMA
    local_memory: int  # LDL and STL
    shape: tuple[int, ...] | None  # head_dim, warps, row blocks, keys, slots, blocks; None: no tensor-core kernel


def missing_tools() -> str | None:
    """What stands against compiling here, or None."""
    for tool in ("nvcc", "g++"):
        if shutil.which(tool) is None:
            return f"{tool} is not in PATH"
    if disassembler() is None:
        return "nvdisasm is not there: pip install nvidia-cuda-nvdisasm"
    return None


def disassembler() -> str | None:
    found = shutil.which("nvdisasm")
    if found is None and (spec := importlib.util.find_spec("nvidia")) is not None:
        for folder in spec.submodule_search_locations or []:
            found = next((str(path) for path in Path(folder).glob("*/bin/nvdisasm")), found)
    return found


@cache
def build_folder(emulator: bool) -> Path:
    """A folder that is kept as long as the sources stay the same, those of the emulator included or not."""
    folders = ("cuda", "pattern", *(["cuda/emulator"] if emulator else []))
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (PLUGINS / folder).glob("*.*")):
        digest.update(path.name.encode() + path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"effc-cuda-{os.getuid()}-{digest.hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    return folder


def run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compiled(source: str, architecture: int) -> tuple[Path, str]:
    """The cubin of one source file, and what ptxas said about it."""
    cubin = build_folder(emulator=False) / f"{Path(source).stem}_{architecture}.cubin"
    log = cubin.with_suffix(".log")
    if not log.exists():
        options = ("-std=c++17", "-O3", f"-arch=sm_{architecture}", "--resource-usage", f"-I{PLUGINS}")
        said = run("nvcc", *options, "-cubin", PLUGINS / "cuda" / source, "-o", cubin)
        log.write_text(said)
    return cubin, log.read_text()


def instruction_counts(cubin: Path) -> dict[str, dict[str, int]]:
    """Instructions by their first word, for every function."""
    counts: dict[str, dict[str, int]] = {}
    function: dict[str, int] = {}
    tool = disassembler()
    assert tool is not None
    for line in run(tool, "-c", cubin).splitlines():
        if line.startswith(".text."):
            function = counts.setdefault(line[len(".text.") :].rstrip(":"), {})
        elif (word := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", line)) is not None:
            function[word[1]] = function.get(word[1], 0) + 1
    return counts


def kernels(architecture: int, head_sizes: tuple[int, ...] = HEAD_SIZES) -> list[Kernel]:
    """All kernels of an architecture."""
    found = []
    for source in (*(f"attention_{head_dim}.cu" for head_dim in head_sizes), "sparse_attention.cu"):
        cubin, said = compiled(source, architecture)
        counts = instruction_counts(cubin)
        for part in said.split("Compiling entry function '")[1:]:
            symbol = part[: part.index("'")]
            words = counts.get(symbol, {})
            tile, other = TILE_KERNEL.search(symbol), OTHER_KERNEL.search(symbol)
            if tile is not None:
                shape = tuple(int(size) for size in tile.groups()[1:])
                name = f"attend_tile {shape[0]} {'few' if shape[1] == 1 else 'usual'}"
                number = tile[1]
            elif other is not None:
                shape, name = None, other[1]
                number = next((word for word in ("BFloat16", "Half") if word in other[2]), "float")
            else:
                raise RuntimeError(f"{symbol} is not in the table")
            found.append(
                Kernel(
                    name,
                    number,
                    architecture,
                    registers=first_number(r"Used (\d+) registers", part),
                    spill_bytes=first_number(r"(\d+) bytes spill stores", part),
                    stack_bytes=first_number(r"(\d+) bytes stack frame", part),
                    instructions=sum(words.values()),
                    tensor_core=words.get("HMMA", 0),
                    local_memory=words.get("LDL", 0) + words.get("STL", 0),
                    shape=shape,
                )
            )
    return found


def first_number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"ptxas does not say {pattern}")
    return int(found[1])


@cache
def program(name: str) -> Path:
    """A small C++ program of the project, compiled: ``effc_cuda_count`` or ``cuda_occupancy``."""
    path = build_folder(emulator=True) / name
    if path.exists():
        return path
    if name == "effc_cuda_count":
        cuda = PLUGINS / "cuda"
        sources = [cuda / "emulator" / f for f in ("count_work.cpp", "scheduler.cpp", "warp_work.cpp")]
        sources += [cuda / "schedule.cpp", PLUGINS / "pattern" / "parse.cpp"]
        run("g++", "-std=c++17", "-O1", "-march=native", f"-I{PLUGINS}", *sources, "-o", path)
    else:
        # By nvcc, which knows where the toolkit's headers are.
        run("nvcc", "-std=c++17", Path(__file__).with_name(f"{name}.cpp"), "-o", path)
    return path


@cache
def tile_shapes() -> dict[tuple[int, str], dict[str, Any]]:
    """The tile shapes as C++ has them, by head size and variant."""
    rows = [json.loads(line) for line in run(program("effc_cuda_count"), "tiles").splitlines()]
    return {(row["head_dim"], row["variant"]): row for row in rows}


def work(pattern: str, causal: bool, sizes: tuple[int, ...], multiprocessors: int = 1) -> dict[str, int]:
    """Exact counts of a problem; ``sizes`` are batch, q_len, kv_len, num_heads, kv_num_heads, head_dim."""
    words = (pattern, str(int(causal)), *map(str, sizes), str(multiprocessors))
    counted: dict[str, int] = json.loads(run(program("effc_cuda_count"), "work", *words))
    return counted


def blocks_per_multiprocessor(architecture: int, registers: int, threads: int, shared_bytes: int) -> int:
    """What fits, by NVIDIA's occupancy calculator."""
    words = (architecture, registers, threads, shared_bytes)
    return int(run(program("cuda_occupancy"), *map(str, words)))
