"""The position-based forms and their named unions as the user writes them."""

from __future__ import annotations

from collections.abc import Callable

from effc.errors import UsageError
from effc.plugins.forms.base import parameters, whole_number
from effc.plugins.forms.entry import FormEntry, Parse
from effc.plugins.forms.terms import (
    Block,
    Dense,
    Dilated,
    Global,
    GlobalTokens,
    Local,
    Random,
    Sinks,
    Strided,
    Term,
)

TOKEN_NAMES = ("cls", "sep", "bos", "eos", "mask", "pad", "unk")
DEFAULT_WINDOW = 256
_POSITIONS = "position-based, joined by |"
_UNIONS = "named unions"


def _numbers(defaults: tuple[int, ...], make: Callable[..., tuple[Term, ...]], minimum: int = 1) -> Parse:
    def parse(text: str, arguments: list[str], syntax: str) -> tuple[Term, ...]:
        return make(*parameters(text, arguments, syntax, defaults, minimum))

    return parse


def _parse_dense(text: str, arguments: list[str], syntax: str) -> tuple[Term, ...]:
    parameters(text, arguments, syntax, ())
    return (Dense(),)


def _parse_local(text: str, arguments: list[str], syntax: str) -> tuple[Term, ...]:
    if len(arguments) == 2:
        left, right = (whole_number(text, argument, syntax, 0) for argument in arguments)
        return (Local(left, right),)
    return (Local(*parameters(text, arguments, syntax, (DEFAULT_WINDOW,))),)


def _parse_block(text: str, arguments: list[str], syntax: str) -> tuple[Term, ...]:
    if len(arguments) > 2:
        parameters(text, arguments, syntax, (64, 1))
    block = whole_number(text, arguments[0], syntax) if arguments else 64
    # The bare name takes BigBird's window; a block size alone means blocks without neighbours.
    neighbours = 0 if len(arguments) == 1 else 1
    return (Block(block, whole_number(text, arguments[1], syntax, 0) if len(arguments) == 2 else neighbours),)


def _parse_random(text: str, arguments: list[str], syntax: str) -> tuple[Term, ...]:
    parameters(text, arguments, syntax, (3, 0), 0)
    count = whole_number(text, arguments[0], syntax) if arguments else 3
    return (Random(count, whole_number(text, arguments[1], syntax, 0) if len(arguments) == 2 else 0),)


def _parse_global(text: str, arguments: list[str], syntax: str) -> tuple[Term, ...]:
    if len(arguments) == 1 and not arguments[0].lstrip("-").isdigit():
        tokens: list[int | str] = []
        for name in arguments[0].split("+"):
            if name.startswith("#"):
                tokens.append(whole_number(text, name[1:], syntax, 0))
            elif name in TOKEN_NAMES:
                tokens.append(name)
            else:
                raise UsageError(
                    f"'{name}' in '{text}' is neither a number of tokens nor a token.",
                    f"Write global:1, global:#102 (a token id) or one of {', '.join(TOKEN_NAMES)}, joined by '+'.",
                )
        return (GlobalTokens(tuple(sorted(set(tokens), key=str))),)
    return (Global(*parameters(text, arguments, syntax, (1,))),)


POSITION_FORMS: dict[str, FormEntry] = {
    "dense": FormEntry("dense", "ordinary attention: every key", _POSITIONS, _parse_dense, "Vaswani et al., 2017"),
    "local": FormEntry(
        "local[:WINDOW] or local:LEFT:RIGHT",
        f"sliding window of WINDOW positions in all ({DEFAULT_WINDOW}), or LEFT before and RIGHT after the query",
        _POSITIONS,
        _parse_local,
        "Longformer, Beltagy et al., 2020",
    ),
    "dilated": FormEntry(
        "dilated[:WINDOW[:DILATION]]",
        "window of WINDOW positions (128), every DILATION-th one (4)",
        _POSITIONS,
        _numbers((128, 4), lambda window, dilation: (Dilated(window, dilation),)),
        "Longformer, Beltagy et al., 2020",
    ),
    "block": FormEntry(
        "block[:SIZE[:NEIGHBOURS]]",
        "blocks of SIZE tokens (64) that see themselves and NEIGHBOURS blocks on either side (0; bare name: 1)",
        _POSITIONS,
        _parse_block,
        "Blockwise attention, Qiu et al., 2020",
    ),
    "strided": FormEntry(
        "strided[:STRIDE]",
        "every STRIDE-th key, counted from the query (64)",
        _POSITIONS,
        _numbers((64,), lambda stride: (Strided(stride),)),
        "Sparse Transformer, Child et al., 2019",
    ),
    "random": FormEntry(
        "random[:COUNT[:SEED]]",
        "COUNT scattered key blocks of 64 (3) for every block of 64 queries, drawn from SEED (0)",
        _POSITIONS,
        _parse_random,
        "BigBird, Zaheer et al., 2020",
    ),
    "global": FormEntry(
        "global[:COUNT] or global:TOKEN[+TOKEN]",
        "the first COUNT tokens (1), or the tokens named (cls, sep, #102), see and are seen by all",
        _POSITIONS,
        _parse_global,
        "Longformer, Beltagy et al., 2020",
    ),
    "sinks": FormEntry(
        "sinks[:COUNT]",
        "the first COUNT keys (4) are seen by all",
        _POSITIONS,
        _numbers((4,), lambda count: (Sinks(count),)),
        "StreamingLLM, Xiao et al., 2023",
    ),
    "longformer": FormEntry(
        "longformer[:WINDOW[:GLOBAL]]",
        "local:WINDOW (512) | global:GLOBAL (1)",
        _UNIONS,
        _numbers((512, 1), lambda window, count: (Local(window), Global(count))),
        "Longformer, Beltagy et al., 2020",
    ),
    "bigbird": FormEntry(
        "bigbird[:BLOCK[:RANDOM[:GLOBAL]]]",
        "block:BLOCK:1 (64) | random:RANDOM (3) | global:GLOBAL (64)",
        _UNIONS,
        _numbers((64, 3, 64), lambda block, random, count: (Block(block, 1), Random(random), Global(count))),
        "BigBird, Zaheer et al., 2020",
    ),
    "lsg": FormEntry(
        "lsg[:BLOCK[:SPARSITY[:GLOBAL]]]",
        "block:BLOCK:1 (128) | dilated:BLOCK:SPARSITY (4) | global:GLOBAL (1)",
        _UNIONS,
        _numbers((128, 4, 1), lambda block, step, count: (Block(block, 1), Dilated(block, step), Global(count))),
        "LSG attention, Condevaux and Harispe, 2022",
    ),
    "streaming": FormEntry(
        "streaming[:WINDOW[:SINKS]]",
        "local:WINDOW (1024) | sinks:SINKS (4)",
        _UNIONS,
        _numbers((1024, 4), lambda window, count: (Local(window), Sinks(count))),
        "StreamingLLM, Xiao et al., 2023",
    ),
    "a-shape": FormEntry(
        "a-shape[:WINDOW[:SINKS]]",
        "local:WINDOW (1024) | sinks:SINKS (128)",
        _UNIONS,
        _numbers((1024, 128), lambda window, count: (Local(window), Sinks(count))),
        "MInference, Jiang et al., 2024",
    ),
}
