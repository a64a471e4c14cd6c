"""The order in which 4-bit codes lie in memory for the kernels: a permutation of bitsandbytes'.

    codes   (panels, inputs / 8, 16, 4) uint8    16 outputs x 8 inputs are 64 bytes, one cache line
    scales  (panels, blocks, 16) float32         a block is 32 or 64 inputs of one output

A panel is 16 outputs; missing ones of the last panel are zeros. The 4 bytes of an output hold its
inputs 0 to 7 so that the 16-bit words shifted right by 4 k begin with the codes of inputs 2 k and
2 k + 1:

    byte 0: inputs 0, 2     byte 1: inputs 4, 6     byte 2: inputs 1, 3     byte 3: inputs 5, 7
                                                                            (low nibble first)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PANEL = 16  # outputs
CHUNK = 8  # inputs of one output in 4 bytes
BLOCKS = (32, 64)  # inputs that share a scale
ZERO_CODE = 0x77  # two codes of the level 0


@dataclass(frozen=True, eq=False)
class PanelWeight:
    """A 4-bit weight as the kernels read it; not to be changed."""

    codes: Tensor
    scales: Tensor
    outputs: int
    block: int

    @property
    def panels(self) -> int:
        return self.codes.shape[0]

    @property
    def inputs(self) -> int:
        return self.codes.shape[1] * CHUNK

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def panels_of(packed: Tensor, scales: Tensor, outputs: int, inputs: int, block: int) -> PanelWeight:
    """bitsandbytes' codes, two a byte, (outputs * inputs / 2) uint8 in any shape, and their scales,
    (outputs * inputs / block,) float32, as a `PanelWeight`."""
    panels = -(-outputs // PANEL)
    missing = panels * PANEL - outputs
    bytes_of = packed.reshape(outputs, inputs // CHUNK, 4)  # (0, 1), (2, 3), (4, 5), (6, 7)
    scales = scales.reshape(outputs, inputs // block)
    if missing:
        filler = bytes_of.new_full((missing, *bytes_of.shape[1:]), ZERO_CODE)
        bytes_of = torch.cat([bytes_of, filler])
        scales = torch.cat([scales, scales.new_zeros(missing, scales.shape[1])])
    codes = torch.empty(panels, inputs // CHUNK, PANEL, 4, dtype=torch.uint8)
    # One output of each panel at a time, so that little memory is needed beside the two.
    by_panel = bytes_of.view(panels, PANEL, inputs // CHUNK, 4)
    for row in range(PANEL):
        a, b, c, d = by_panel[:, row].unbind(-1)  # (panels, inputs / 8) each; first input on top
        even = (a >> 4 | b & 0xF0, c >> 4 | d & 0xF0)
        odd = (a & 15 | b << 4, c & 15 | d << 4)
        codes[:, :, row] = torch.stack([*even, *odd], -1)
    panel_scales = scales.view(panels, PANEL, -1).transpose(1, 2).contiguous()
    return PanelWeight(codes, panel_scales.float(), outputs, block)


def bitsandbytes_order(weight: PanelWeight) -> tuple[Tensor, Tensor]:
    """The inverse of `panels_of`: (outputs * inputs / 2, 1) uint8 and (blocks of all,) float32."""
    codes = weight.codes.transpose(1, 2).reshape(-1, weight.inputs // CHUNK, 4)[: weight.outputs]
    even_low, even_high, odd_low, odd_high = codes.unbind(-1)
    packed = torch.stack(
        [
            even_low << 4 | odd_low & 15,
            even_low & 0xF0 | odd_low >> 4,
            even_high << 4 | odd_high & 15,
            even_high & 0xF0 | odd_high >> 4,
        ],
        -1,
    )
    scales = weight.scales.transpose(1, 2).reshape(-1, weight.scales.shape[1])[: weight.outputs]
    return packed.reshape(-1, 1), scales.reshape(-1)
