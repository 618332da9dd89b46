"""``effc doctor``: what is there, missing, broken or of no use, each with the command that helps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import effc
from effc.compiler import doctor_machine, doctor_packages, machine
from effc.compiler.doctor import diagnose
from effc.compiler.doctor_packages import TESTED, Package
from effc.compiler.doctor_report import Check, DoctorReport, render


@pytest.fixture(scope="module")
def answer() -> list[str]:
    """A report as JSON, and which of the packages looked at ended up in the process that asked."""
    code = (
        "import sys; from effc.compiler.doctor import diagnose; print(diagnose().model_dump_json());"
        "print([m for m in ('torch', 'transformers', 'onnxruntime') if m in sys.modules])"
    )
    root = Path(effc.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def report(answer: list[str]) -> DoctorReport:
    return DoctorReport.model_validate_json(answer[0])


def text_of(report: DoctorReport, width: int = 140) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    render(report, console)
    return console.export_text()


def fake_package(folder: Path, name: str, source: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)


class TestDiagnosis:
    def test_lists_everything_once_with_its_purpose(self, report: DoctorReport) -> None:
        names = [check.name for check in report.checks]
        assert len(names) == len(set(names))
        assert {
            "onnxruntime", "native kernels", "torch", "transformers", "onnx", "onnxscript", "NVIDIA GPU",
            "onnxruntime-gpu", "tensorrt", "tensorrt-lean", "tensorrt-rtx", "torch-tensorrt", "tritonserver",
            "tritonclient",
        } <= set(names)  # fmt: skip
        assert all(check.purpose for check in report.checks)
        assert all(check.command for check in report.checks if check.status in ("missing", "broken"))

    def test_versions_are_those_that_import(self, report: DoctorReport) -> None:
        import onnxruntime

        check = report["onnxruntime"]
        assert check.status == "ok" and check.version == onnxruntime.__version__
        assert check.detail == ", ".join(onnxruntime.get_available_providers())

    def test_imports_nothing_into_this_process(self, answer: list[str]) -> None:
        assert answer[1] == "[]"


class TestPackages:
    def package(self, module: str, *, needs_gpu: bool = False, probe: str = "") -> Package:
        return Package(module, module, "Run", "testing", "pip install it", probe, needs_gpu)

    def test_absent(self) -> None:
        check = doctor_packages.check_package(self.package("effc_absent"), has_gpu=False)
        assert (check.status, check.version, check.command) == ("missing", None, "pip install it")

    def test_absent_and_of_no_use_without_a_gpu(self) -> None:
        check = doctor_packages.check_package(self.package("effc_absent", needs_gpu=True), has_gpu=False)
        assert (check.status, check.detail) == ("n/a", "needs an NVIDIA GPU")
        assert (
            doctor_packages.check_package(self.package("effc_absent", needs_gpu=True), has_gpu=True).status == "missing"
        )

    def test_present_and_chatty(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_package(tmp_path, "effc_chatty", "print('hello'); __version__ = '1.2.3'")
        monkeypatch.syspath_prepend(tmp_path)
        check = doctor_packages.check_package(self.package("effc_chatty"), has_gpu=False)
        assert (check.status, check.version) == ("ok", "1.2.3")

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ("raise ImportError('libnvinfer.so.10: cannot open')", "ImportError: libnvinfer.so.10: cannot open"),
            ("import os; os.abort()", "ended with status -6"),
        ],
    )
    def test_broken(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str) -> None:
        fake_package(tmp_path, "effc_broken", source)
        monkeypatch.syspath_prepend(tmp_path)
        check = doctor_packages.check_package(self.package("effc_broken"), has_gpu=False)
        assert check.status == "broken" and reason in str(check.detail)
        # A package that only refuses to be imported without a GPU is not in need of repair.
        assert doctor_packages.check_package(self.package("effc_broken", needs_gpu=True), has_gpu=False).status == "n/a"
        assert (
            doctor_packages.check_package(self.package("effc_broken", needs_gpu=True), has_gpu=True).status == "broken"
        )

    def test_hanging(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_package(tmp_path, "effc_hanging", "import time; time.sleep(60)")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(doctor_packages, "SECONDS_PER_PROBE", 0.5)
        check = doctor_packages.check_package(self.package("effc_hanging"), has_gpu=False)
        assert (check.status, check.detail) == ("broken", "no answer within 0.5 s")

    def test_torch_and_transformers_may_be_absent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = doctor_packages.find_spec
        monkeypatch.setattr(doctor_packages, "find_spec", lambda n: None if n in ("torch", "transformers") else real(n))
        report = diagnose()
        assert report["torch"].status == report["transformers"].status == "missing"
        assert "pip install --upgrade effc   # torch, transformers" in text_of(report)


class TestNativeLibrary:
    def test_broken(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = tmp_path / "effc.so"
        broken.write_bytes(b"not a library")
        monkeypatch.setenv("EFFC_NATIVE_LIBRARY", str(broken))
        check = doctor_machine.check_native_library()
        assert check.status == "broken"
        assert str(broken) in str(check.detail) and "slower" in str(check.detail)

    def test_disabled_or_misnamed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EFFC_NATIVE", "0")
        check = doctor_machine.check_native_library()
        assert check.status == "missing" and "disabled by EFFC_NATIVE=0" in str(check.detail)
        assert check.command == "Unset that variable to use them."
        monkeypatch.setenv("EFFC_NATIVE", "1")
        monkeypatch.setenv("EFFC_NATIVE_LIBRARY", str(tmp_path / "absent"))
        assert "which is not a file" in str(doctor_machine.check_native_library().detail)


class TestGpu:
    def fake_smi(self, folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
        tool = folder / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def test_answering(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fake_smi(tmp_path, monkeypatch, "echo 'NVIDIA L4, 580.65.06, 23034 MiB, 8.9'")
        check = doctor_machine.check_gpu()
        assert (check.status, check.version, check.command) == ("ok", "driver 580.65.06", None)
        assert check.detail == "NVIDIA L4 (23034 MiB, compute capability 8.9)"

    @pytest.mark.parametrize(("devices", "status"), [(1, "broken"), (0, "n/a")])
    def test_driver_that_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int, status: str
    ) -> None:
        self.fake_smi(tmp_path, monkeypatch, "echo 'NVIDIA-SMI has failed' >&2; exit 9")
        monkeypatch.setattr(doctor_machine, "nvidia_devices", lambda: devices)
        check = doctor_machine.check_gpu()
        assert check.status == status and "NVIDIA-SMI has failed" in str(check.detail)

    @pytest.mark.parametrize(("devices", "status"), [(2, "missing"), (0, "n/a")])
    def test_no_driver(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int, status: str) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(doctor_machine, "nvidia_devices", lambda: devices)
        assert doctor_machine.check_gpu().status == status

    def test_onnxruntime_over_onnxruntime_gpu_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor_machine.metadata, "version", lambda name: "1.31.1")
        monkeypatch.setattr(
            doctor_machine, "import_package", lambda package: ({"providers": ["CPUExecutionProvider"]}, None)
        )
        check = doctor_machine.check_onnxruntime_gpu(has_gpu=True)
        assert check.status == "broken" and "onnxruntime is installed over it" in str(check.detail)
        assert "pip uninstall -y onnxruntime onnxruntime-gpu" in str(check.command)


class TestRendering:
    def test_names_every_item_and_every_command(self, report: DoctorReport) -> None:
        text = text_of(report)
        for check in report.checks:
            assert check.name in text
            if check.status in ("missing", "broken"):
                assert str(check.command) in text

    def test_other_versions_are_pointed_out(self, report: DoctorReport) -> None:
        odd = Check(
            name="torch",
            group="Compile",
            status="ok",
            version="2.9.1+cpu",
            tested="2.13",
            purpose="export",
            command="x",
        )
        assert odd.untested_version
        assert not odd.model_copy(update={"version": "2.13.1"}).untested_version
        text = text_of(report.model_copy(update={"checks": [odd]}))
        assert "2.9.1+cpu" in text and "tested with 2.13" in text
        assert "To install" not in text

    def test_narrow_terminals_keep_commands_whole(self, report: DoctorReport) -> None:
        broken = Check(name="a", group="Run", status="missing", purpose="b", command="pip install " + "x" * 80)
        assert "pip install " + "x" * 80 in text_of(report.model_copy(update={"checks": [broken]}), width=60)

    def test_tested_versions_are_those_in_the_constraints(self) -> None:
        constraints = Path(__file__).parents[1] / "constraints.txt"
        if not constraints.exists():
            pytest.skip("not run from a checkout")
        pinned = dict(
            line.split("==", 1) for line in constraints.read_text().splitlines() if "==" in line.split("#")[0]
        )
        compared = {name: version for name, version in TESTED.items() if name in pinned}
        assert compared
        for name, version in compared.items():
            assert pinned[name].split(".")[:2] == version.split(".")[:2], name


class TestMachine:
    def test_agrees_with_psutil(self) -> None:
        psutil = pytest.importorskip("psutil")
        facts = machine.describe_machine()
        assert facts.logical_cpus == psutil.cpu_count()
        if facts.physical_cores is not None:
            assert facts.physical_cores == psutil.cpu_count(logical=False)
        assert facts.memory_gib is not None
        assert facts.memory_gib <= psutil.virtual_memory().total / 2**30 + 0.01

    def test_usable_cores_follow_affinity_and_quota(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "_affinity", lambda: [0, 1, 2, 3, 4, 5, 6, 7])
        monkeypatch.setattr(machine, "_physical_cores", lambda cpus: len(cpus) // 2)
        for quota, expected in ((None, 4), (2.5, 2), (0.5, 1), (16.0, 4)):
            monkeypatch.setattr(machine, "_cpu_quota", lambda quota=quota: quota)
            assert machine.usable_cores() == expected

    @pytest.mark.parametrize(
        ("files", "quota", "memory"),
        [
            (
                {"/proc/self/cgroup": "0::/pod/me", "/sys/fs/cgroup/pod/cpu.max": "150000 100000",
                 "/sys/fs/cgroup/pod/me/cpu.max": "max 100000", "/sys/fs/cgroup/pod/me/memory.max": "1073741824"},
                1.5, 2**30,
            ),
            (
                {"/proc/self/cgroup": "3:cpu,cpuacct:/me\n2:memory:/me",
                 "/sys/fs/cgroup/cpu/me/cpu.cfs_quota_us": "300000",
                 "/sys/fs/cgroup/memory/me/memory.limit_in_bytes": "2147483648"},
                3.0, 2**31,
            ),
            ({"/proc/self/cgroup": "0::/", "/sys/fs/cgroup/cpu.max": "max 100000"}, None, 8 * 2**30),
            ({}, None, 8 * 2**30),
        ],
        ids=["v2", "v1", "unlimited", "none"],
    )  # fmt: skip
    def test_cgroup_limits(
        self, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], quota: float | None, memory: int
    ) -> None:
        files = {"/proc/meminfo": f"MemTotal: {8 * 2**20} kB", **files}
        monkeypatch.setattr(machine, "_read", lambda path: files.get(str(path)))
        assert machine._cpu_quota() == quota
        assert machine._memory_bytes() == memory

    def test_vector_units_are_read_from_the_system(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = "model name\t: Test CPU\nflags\t\t: sse avx2 avx512f avx512_vnni amx_tile\n\nflags: avx512_bf16"
        monkeypatch.setattr(machine, "_read", lambda path: text if str(path) == "/proc/cpuinfo" else None)
        assert machine._isa() == ("avx2", "avx512f", "avx512_vnni", "amx_tile")
        assert machine._cpu_name() == "Test CPU"
