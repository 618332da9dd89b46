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
TILE_KERNEL = re.compile(
    r"attend_tile.*?(Half|BFloat16|E4M3).*?TileShapeILi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)E"
)
LINEAR_KERNEL = re.compile(r"attend_linear(?!_).*?(Half|BFloat16).*?LinearShapeILi(\d+)E")
OTHER_KERNEL = re.compile(
    r"\d(attend_rows|merge_splits|sum_keys|add_segments|sum_keys_plainly|attend_linear_rows|step_linear)"
    r"I(f|\w*?Half|\w*?BFloat16)E"
)
E4M3_SOURCES = {32: "small", 64: "small", 96: "small", 128: "large", 256: "large"}
E4M3_ARCHITECTURES = (89, 90, 120)
"""Those with such products; the others' kernels are empty."""
LINEAR_SOURCES = {32: "small", 64: "small", 80: "medium", 96: "medium", 128: "large", 256: "large"}
SUMS = (64, "sums")
"""Key in :func:`tile_shapes` of the kernel that sums up keys, whatever the head size."""


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
    tensor_core: int  # HMMA, or QMMA of E4M3
    local_memory: int  # LDL and STL
    shape: tuple[int, ...] | None  # head_dim, warps, row blocks, keys, slots, blocks of attend_tile
    tile: tuple[int, str] | None = None  # key in tile_shapes; None: no tensor-core kernel


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
    """All kernels of an architecture; of those that are made for head sizes, these."""
    sources = [f"attention_{head_dim}.cu" for head_dim in head_sizes]
    if architecture in E4M3_ARCHITECTURES:
        sources += dict.fromkeys(
            f"attention_e4m3_{E4M3_SOURCES[size]}.cu" for size in head_sizes if size in E4M3_SOURCES
        )
    sources += dict.fromkeys(f"linear_{LINEAR_SOURCES[head_dim]}.cu" for head_dim in head_sizes)
    found = [kernel for source in sources for kernel in kernels_of(source, architecture)]
    found = [kernel for kernel in found if kernel.tile is None or kernel.tile[0] in head_sizes]
    return found + [
        kernel
        for source in ("sparse_attention.cu", "linear_attention.cu")
        for kernel in kernels_of(source, architecture)
    ]


def kernels_of(source: str, architecture: int) -> list[Kernel]:
    """The kernels of one source file."""
    found = []
    cubin, said = compiled(source, architecture)
    counts = instruction_counts(cubin)
    for part in said.split("Compiling entry function '")[1:]:
        symbol = part[: part.index("'")]
        words = counts.get(symbol, {})
        name, number, shape, tile = identified(symbol)
        found.append(
            Kernel(
                name,
                number,
                architecture,
                registers=first_number(r"Used (\d+) registers", part),
                spill_bytes=first_number(r"(\d+) bytes spill stores", part),
                stack_bytes=first_number(r"(\d+) bytes stack frame", part),
                instructions=sum(words.values()),
                tensor_core=words.get("HMMA", 0) + words.get("QMMA", 0),
                local_memory=words.get("LDL", 0) + words.get("STL", 0),
                shape=shape,
                tile=tile,
            )
        )
    return found


def identified(symbol: str) -> tuple[str, str, tuple[int, ...] | None, tuple[int, str] | None]:
    """Name, type of numbers, shape and tile of a kernel, by its mangled name."""
    if (found := TILE_KERNEL.search(symbol)) is not None:
        shape = tuple(int(size) for size in found.groups()[1:])
        variant = ("e4m3 " if found[1] == "E4M3" else "") + ("few" if shape[1] == 1 else "usual")
        return f"attend_tile {shape[0]} {variant}", found[1], shape, (shape[0], variant)
    if (found := LINEAR_KERNEL.search(symbol)) is not None:
        return f"attend_linear {found[2]}", found[1], None, (int(found[2]), "linear")
    if (found := OTHER_KERNEL.search(symbol)) is not None:
        number = next((word for word in ("BFloat16", "Half") if word in found[2]), "float")
        return found[1], number, None, SUMS if found[1] == "sum_keys" else None
    raise RuntimeError(f"{symbol} is not in the table")


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
        sources += [cuda / "schedule.cpp", cuda / "linear_schedule.cpp", PLUGINS / "pattern" / "parse.cpp"]
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
