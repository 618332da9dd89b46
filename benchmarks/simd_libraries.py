"""The CPU kernels with the vector operations of Highway and xsimd in place of intrinsics, side by side.

    python benchmarks/simd_libraries.py --highway /usr/include --xsimd FOLDER

Each argument is a folder that holds the library's headers: Debian has Highway's in libhwy-dev; xsimd has to be release
13 or newer, whose headers lie in the wheel of pythran, for example. The native library is built from this checkout with
cpu/simd_avx512.hpp as it is, and with the file of the same functions in benchmarks/simd_libraries/; nothing else
differs. Only the turning of 16 x 16 blocks stays as it is in all of them: neither library has it. Times are those of
benchmarks/cpu_kernels.py: process CPU time, in turns, median / quietest round.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from cpu_kernels import measure, pair
from kernel_contestants import Shape, exact_precision, ours

ROOT = Path(__file__).resolve().parents[1]
# Both libraries want to hear of every extension that comes with AVX-512.
_MORE = "-DHWY_COMPILE_ONLY_STATIC;-mavx512cd;-mbmi;-mbmi2;-mlzcnt;-mf16c;-maes;-mpclmul"
VARIANTS = Path(__file__).resolve().parent / "simd_libraries"


def build(folder: Path, library: str | None, headers: Path | None) -> Path:
    """The native library, with the vector operations of ``library`` or effc's own."""
    source = folder / "source"
    source.mkdir(parents=True)
    shutil.copytree(ROOT / "cpp_plugins", source / "cpp_plugins")
    shutil.copy(ROOT / "CMakeLists.txt", source)
    if library is not None:
        kernels = source / "cpp_plugins" / "cpu"
        own = (kernels / "simd_avx512.hpp").read_text(encoding="utf-8")
        found = re.search(r"( +// to\[c\]\[r\] = .*?)};\n\n}  // namespace", own, re.DOTALL)
        assert found is not None
        (kernels / "transpose_avx512.inc").write_text(found[1], encoding="utf-8")
        shutil.copy(VARIANTS / f"simd_{library}.hpp", kernels)
        # The files for bfloat16 go on with intrinsics: they are part of the library and not measured.
        _replace(kernels / "attention_avx512.cpp", "simd_avx512.hpp", f"simd_{library}.hpp")
        _replace(source / "CMakeLists.txt", '"-mavx512f;', f'"{_MORE};-isystem{headers};-mavx512f;')
    commands = [
        ["cmake", "-S", str(source), "-B", str(folder / "build"), "-DCMAKE_BUILD_TYPE=Release"],
        ["cmake", "--build", str(folder / "build"), "--target", "effc_cpu", "-j", "2"],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{library or 'intrinsics'} does not build:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return folder / "build" / "libeffc_cpu.so"


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--highway", type=Path, help="folder that holds hwy/highway.h")
    parser.add_argument("--xsimd", type=Path, help="folder that holds xsimd/xsimd.hpp")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    exact_precision()
    with tempfile.TemporaryDirectory() as folder:
        libraries = {"intrinsics": build(Path(folder) / "intrinsics", None, None)}
        for name in ("highway", "xsimd"):
            headers = getattr(arguments, name)
            if headers is not None:
                libraries[name] = build(Path(folder) / name, name, headers.resolve())
        print("local:256, 12 heads x 64, ms of CPU time per thread and times intrinsics (median / quietest)")
        for length in arguments.lengths:
            shape = Shape("local:256", False, length, length, 12, 12, 64)
            contestants = {name: ours(shape, arguments.threads, library=path) for name, path in libraries.items()}
            measured = measure(contestants, arguments.threads, arguments.rounds)
            for name in libraries:
                times = pair(measured.times(name, "intrinsics"), ".3f")
                print(
                    f"{length:>6} keys  {name:>10}  {pair(measured.milliseconds(name), '.2f'):>15}  {times}x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
