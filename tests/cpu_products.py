"""What the CPU at hand makes of 8-bit products."""

from effc.compiler.machine import describe_machine

_EXACT = {"avx_vnni", "avx512_vnni", "amx_int8"}
_ISA = set(describe_machine().isa)

SATURATES = "avx2" in _ISA and not _ISA & _EXACT
"""Pairs of products are added in 16 bits. Weights of normal noise fill 8 bits and lose by it, so tests take 7."""
