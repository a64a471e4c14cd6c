"""Adapters of the parts of a fused layer, each with an A and a B of its own.

A fused layer computes several projections in one product: queries, keys and values, or gate and up.
PEFT, over a model that declares them apart, gives each of the named ones its own pair. Below each
other and in blocks they are one pair again,

    A = [A_q; A_v]  (parts x rank, inputs)        B = [B_q  0 ]  (outputs, parts x rank)
                                                      [ 0   0 ]  (rows of a part without an adapter)
                                                      [ 0  B_v]

so that all that is done with a `LoRALinear` is done with such a layer by the same code.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from errors import PhiSightError
from lora.layer import LoRALinear, drawn_pair


class Part(nn.Module):
    """A, (rank, inputs), and B, (rows of the part, rank), both float32 parameters."""

    def __init__(self, down: nn.Parameter, up: nn.Parameter) -> None:
        super().__init__()
        self.lora_A, self.lora_B = down, up


class SplitLoRALinear(LoRALinear):
    """A `LoRALinear` whose A and B are made of those of its parts, its children by name.

    Its parameters are `q_proj.lora_A`, `q_proj.lora_B` and so on; `rank` and `scaling` are those of
    each part. Dropout draws one mask for the input of the layer: its parts see the same numbers,
    where PEFT, whose parts are layers of their own, draws a mask for each.

    Args:
        base: the fused layer.
        rows: the name of every part of it and how many outputs it has, in their order.
        adapted: names of the parts that get an adapter.
        given: what else `LoRALinear` takes.

    Raises:
        PhiSightError: as there, or the layer does not have the outputs of its parts.
    """

    def __init__(
        self, base: nn.Linear, *given: Any, rows: Mapping[str, int], adapted: Collection[str]
    ) -> None:
        # Before the parameters are made, which they say the names and shapes of.
        self.rows, self.adapted = dict(rows), tuple(part for part in rows if part in adapted)
        self._joined: tuple[object, tuple[Tensor, Tensor]] | None = None
        super().__init__(base, *given)

    def add_factors(self, generator: torch.Generator | None) -> None:
        if sum(self.rows.values()) != self.out_features:
            parts = " + ".join(f"{part} {rows}" for part, rows in self.rows.items())
            raise PhiSightError(
                f"LoRA parts: a layer of {self.out_features} outputs is not {parts}; name the whole"
                " layer in --lora-targets"
            )
        for part in self.adapted:
            pair = drawn_pair(self.base, self.rank, self.rows[part], generator)
            self.add_module(part, Part(*pair))

    def parts(self) -> dict[str, Part]:
        """The adapted parts by name, in the order of their rows."""
        return {name: part for name, part in self.named_children() if isinstance(part, Part)}

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of the adapted parts."""
        return {name: (part.lora_A, part.lora_B) for name, part in self.parts().items()}

    def owned(self) -> dict[str, Tensor]:
        pairs = {
            f"{name}.{factor}": getattr(part, factor)
            for name, part in self.parts().items()
            for factor in ("lora_A", "lora_B")
        }
        return pairs | {"scaling": self.scaling}

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]  # made of parameters, not one itself
        """(parts x rank, inputs)"""
        return self.factors()[0]

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]
        """(outputs, parts x rank)"""
        return self.factors()[1]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole layer, through which gradients flow into those of its parts. Without
        a gradient they are made once for many tokens, and again when a part was changed."""
        if torch.is_grad_enabled():
            return join(self.pairs(), self.rows)
        version = self.version()
        if self._joined is None or self._joined[0] != version:
            self._joined = version, join(self.pairs(), self.rows)
        return self._joined[1]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, on {', '.join(self.adapted)}"


def join(
    pairs: Mapping[str, tuple[Tensor, Tensor]], rows: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """A and B of a fused layer from those of some of its parts; rows: see `SplitLoRALinear`."""
    some = next(iter(pairs.values()))[1]
    downs = [pairs[name][0] for name in rows if name in pairs]
    ups = [pairs[n][1] if n in pairs else some.new_zeros(count, 0) for n, count in rows.items()]
    return torch.cat(downs), torch.block_diag(*ups)
