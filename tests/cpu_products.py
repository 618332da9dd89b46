"""What the CPU at hand makes of 8-bit products."""

from effc.compiler.machine import describe_machine, int8_saturates

SATURATES = int8_saturates(describe_machine().isa)
"""Weights of normal noise fill 8 bits and lose by it, so tests take 7."""
