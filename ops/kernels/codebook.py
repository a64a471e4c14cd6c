"""The 16 levels of NF4 (QLoRA, arXiv:2305.14314) as integers, and what rounding them may cost.

A product of a block is summed in 32-bit integers: levels of 12 bits and a sign times activations of
13 bits and a sign, 64 of which cannot overflow. That sum is exact in any order, so a result depends
neither on how many rows are computed together nor on the width of the processor's vectors.
"""

from __future__ import annotations

import numpy

# As bitsandbytes orders them.
NF4 = numpy.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
MOST_LEVEL = 4095
MOST_ACTIVATION = 8191
"""64 times their product is under 2**31"""


def _finest_scale() -> int:
    """The scale, at most `MOST_LEVEL`, at which rounding moves the levels the least."""

    def error(scale: int) -> float:
        return float(numpy.abs(numpy.rint(NF4 * scale) / scale - NF4).max())

    return min(range(int(0.9 * MOST_LEVEL), MOST_LEVEL + 1), key=error)


LEVEL_SCALE = _finest_scale()
LEVELS = [int(level) for level in numpy.rint(NF4 * LEVEL_SCALE)]
LEVEL_ERROR = float(numpy.abs(numpy.array(LEVELS) / LEVEL_SCALE - NF4).max())
ACTIVATION_ERROR = 0.5 / MOST_ACTIVATION
ERROR_BOUND = LEVEL_ERROR + ACTIVATION_ERROR + LEVEL_ERROR * ACTIVATION_ERROR
"""of one product of a weight and an activation, as a part of the largest weight times the largest
activation of its block; float32's own rounding of the sum over blocks comes on top"""
