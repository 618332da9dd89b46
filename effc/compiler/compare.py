"""Artifacts of one model side by side: quality against speed, and which of them none of the others beats at both."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath

from effc.compiler.artifact_files import read_manifest
from effc.compiler.compare_plot import pareto
from effc.compiler.manifest import BenchRecord, Manifest, Timing, VerifyRecord
from effc.compiler.report import model_bytes
from effc.compiler.report_command import command_line
from effc.compiler.report_page import milliseconds, number, page, size, times, write_page
from effc.errors import UsageError

DENSE = "dense fp32"


@dataclass(frozen=True)
class Contender:
    """One artifact.

    Attributes:
        flags: of ``effc compile``, that made it.
        speedup: CPU time of the dense twin over its own, both measured side by side.
        memory_ratio: its peak resident memory over the dense twin's.
        bytes: of the graph and its weights.
        quality_drop: in the comparison's metric, against the source model.
        on_front: no other one is faster and as good, or better and as fast.
        token_ms: CPU time of the step that writes one token, by the tokens of the text it makes, as text; empty for a
            model that does not write, or of which that was not measured.
        token_speedup: that of the dense twin over it, both measured side by side.
    """

    name: str
    flags: str
    speedup: float
    cpu_ms: float
    memory_ratio: float
    bytes: int
    quality_drop: float
    on_front: bool = False
    token_ms: dict[str, float] = field(default_factory=dict)
    token_speedup: dict[str, float] = field(default_factory=dict)

    def token(self, place: int) -> str:
        """What the token at a place of the text costs, in a cell of a table."""
        key = str(place)
        return f"{milliseconds(self.token_ms[key])}, {times(self.token_speedup[key])}" if key in self.token_ms else "–"


@dataclass(frozen=True)
class Comparison:
    """Artifacts of one model, the slowest first; the dense model in fp32 is one of them.

    Attributes:
        length, batch, threads: tokens, sequences and computing threads that speed was measured with.
        metric, data, samples: what the quality drop is, and what it was measured on.
    """

    source: str
    length: int
    batch: int
    threads: int
    metric: str
    data: str
    samples: int
    contenders: tuple[Contender, ...]

    @property
    def token_places(self) -> list[int]:
        """Places of a text at which any of the artifacts was measured writing; none where none writes."""
        return sorted({int(place) for one in self.contenders for place in one.token_ms})

    def markdown(self) -> str:
        """The table, for documents."""
        head = ["artifact", "flags", "quality drop", "speed-up", "memory", "model"]
        head += [f"token at {number(place)}" for place in self.token_places]
        rows = [
            [
                f"**{one.name}**" if one.on_front else one.name,
                _code(one.flags),
                f"{one.quality_drop:.4f}",
                times(one.speedup),
                times(one.memory_ratio),
                size(one.bytes),
                *(one.token(place) for place in self.token_places),
            ]
            for one in self.contenders
        ]
        lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
        lines.insert(1, "|---" * len(head) + "|")
        return "\n".join([*lines, "", self.caption]) + "\n"

    @property
    def caption(self) -> str:
        """What was measured, in a sentence."""
        written = "Under token at N: CPU time to write the token at that place of a text, and its speed-up. "
        return (
            f"{self.source}: quality drop is {self.metric} on {self.samples} samples; speed-up and memory are against "
            f"the dense twin at {number(self.length)} tokens, batch {self.batch}, {self.threads} threads. "
            f"{written if self.token_places else ''}In bold: no other one is both faster and better."
        )

    def json(self) -> str:
        """All figures."""
        return json.dumps(asdict(self), indent=2)

    def html(self) -> str:
        """The page: plot and table, loading nothing from anywhere."""
        return page("compare.html.j2").render(comparison=self, plot=pareto(self.contenders, self.metric))

    def save(self, path: Path) -> None:
        """Write ``.html``, ``.md``, ``.json`` or ``.svg``, by the name's ending.

        Raises:
            UsageError: if it ends in something else.
            OutputError: if it cannot be written.
        """
        texts: dict[str, Callable[[], str]] = {
            ".html": self.html,
            ".md": self.markdown,
            ".json": self.json,
            ".svg": lambda: str(pareto(self.contenders, self.metric, alone=True)),
        }
        if path.suffix not in texts:
            raise UsageError(f"'{path}' is no format for a comparison.", f"End the name in {', '.join(texts)}.")
        write_page(path, texts[path.suffix](), "comparison")


def compare(artifacts: Sequence[str | Path], length: int | None = None) -> Comparison:
    """Compare artifacts that were compiled from one model.

    Args:
        artifacts: their directories.
        length: tokens at which speed counts; the longest that all were timed at if None.

    Raises:
        UsageError: if they are not comparable: other models, other texts, or not measured.
        OutputError: if one is no artifact.
    """
    if not artifacts:
        raise UsageError("There is nothing to compare.", "Give the directories of artifacts.")
    measured = [_measured(Path(path)) for path in artifacts]
    names = [name for name, _, _, _ in measured]
    if len(set(names)) < len(names):
        names = [str(path) for path in artifacts]
    first = measured[0]
    for one in measured[1:]:
        _check_comparable(first, one)
    chosen = _length([bench for _, _, bench, _ in measured], length)
    dense = first[2].dense[chosen].cpu_ms
    written = _dense_tokens([bench for _, _, bench, _ in measured])
    size_of_dense = 4 * first[1].source.parameters
    as_fast = dict.fromkeys(written, 1.0)
    rows = [Contender(DENSE, "", 1.0, dense, 1.0, size_of_dense, 0.0, token_ms=written, token_speedup=as_fast)]
    for name, (_, manifest, bench, verified) in zip(names, measured, strict=True):
        row = Contender(
            name,
            _flags(manifest),
            bench.speedup[chosen],
            bench.compiled[chosen].cpu_ms,
            bench.memory_ratio[chosen],
            model_bytes(manifest.files),
            verified.quality_drop,
            token_ms={} if bench.decode is None else _cpu_ms(bench.decode.compiled),
            token_speedup={} if bench.decode is None else bench.decode.speedup,
        )
        rows.append(row)
    ranked = [replace(row, on_front=_undominated(row, rows)) for row in sorted(rows, key=lambda row: row.speedup)]
    bench, verified = first[2], first[3]
    source = PurePosixPath(first[1].source.path.rstrip("/")).name
    return Comparison(
        source,
        int(chosen),
        bench.batch,
        bench.threads,
        verified.quality_metric,
        verified.data,
        verified.samples,
        tuple(ranked),
    )


_Measured = tuple[str, Manifest, BenchRecord, VerifyRecord]


def _measured(path: Path) -> _Measured:
    manifest = read_manifest(path)
    if manifest.benchmark is None:
        raise UsageError(f"'{path}' was not timed.", f"Run: effc bench {path}")
    if manifest.verification is None:
        raise UsageError(f"'{path}' was not verified.", f"Run: effc verify {path} --data TEXTS")
    return path.resolve().name, manifest, manifest.benchmark, manifest.verification


def _check_comparable(one: _Measured, other: _Measured) -> None:
    (first, manifest, bench, verified), (second, manifest2, bench2, verified2) = one, other
    if manifest.source.fingerprint != manifest2.source.fingerprint:
        raise UsageError(
            f"'{first}' and '{second}' were compiled from two models.", "Compare artifacts of one model and revision."
        )
    quality = [(record.quality_metric, record.data, record.samples) for record in (verified, verified2)]
    if quality[0] != quality[1]:
        metric, data, samples = quality[1]
        raise UsageError(
            f"'{second}' was verified otherwise than '{first}': {metric} on {samples} samples of {data}.",
            f"Verify both on the same texts: effc verify DIRECTORY --data {verified.data}",
        )
    speed = [(record.batch, record.threads) for record in (bench, bench2)]
    if speed[0] != speed[1]:
        raise UsageError(
            f"'{second}' was timed with batch {bench2.batch} and {bench2.threads} threads, '{first}' with batch "
            f"{bench.batch} and {bench.threads}.",
            f"Time both alike: effc bench DIRECTORY --batch {bench.batch} --threads {bench.threads}",
        )


def _length(benches: Sequence[BenchRecord], wanted: int | None) -> str:
    common = sorted(set.intersection(*(set(bench.lengths) for bench in benches)))
    if wanted is not None and wanted not in common:
        have = ", ".join(map(str, common)) or "none"
        raise UsageError(
            f"Not all were timed at {wanted} tokens. Lengths of all: {have}.",
            f"Run `effc bench DIRECTORY --lengths {wanted}` for each, or choose another length.",
        )
    if not common:
        raise UsageError("They were timed at no common length.", "Run `effc bench DIRECTORY --lengths 512` for each.")
    return str(common[-1] if wanted is None else wanted)


def _dense_tokens(benches: Sequence[BenchRecord]) -> dict[str, float]:
    """What a token costs the dense twin, at every place at which any artifact was measured beside it."""
    found: dict[str, float] = {}
    for bench in benches:
        if bench.decode is not None:
            found = _cpu_ms(bench.decode.dense) | found
    return found


def _cpu_ms(timings: Mapping[str, Timing]) -> dict[str, float]:
    return {length: timing.cpu_ms for length, timing in timings.items()}


def _flags(manifest: Manifest) -> str:
    words = command_line(manifest.recipe, "MODEL").removeprefix("effc compile MODEL").removesuffix("-o OUT").split()
    plain = ("--attn=dense", "--quant=none", "--target=onnxruntime")
    return " ".join(word for word in words if word not in plain and not word.startswith(("--data", "--calibration")))


def _undominated(row: Contender, rows: Sequence[Contender]) -> bool:
    return not any(
        other.speedup >= row.speedup
        and other.quality_drop <= row.quality_drop
        and (other.speedup > row.speedup or other.quality_drop < row.quality_drop)
        for other in rows
    )


def _code(text: str) -> str:
    return f"`{text.replace('|', chr(92) + '|')}`" if text else ""
