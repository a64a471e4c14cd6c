"""What of a layer is kept from its forward to its backward, and what is computed again.

A layer's products with frozen weights are nearly all of its cost; what lies between them (norms,
rotation, attention, gating, the adapters' dropout) is cheap and fills most of the memory. So there
are three settings, of which the gradients are equal to the bit. Kept for each token and layer at
Phi-3.5-mini's shape (3,072 wide, 8,192 inside), of numbers in the compute type:

    none      everything is kept                         about 55,000
    products  the layer's input and its products: 5 x 3,072 + 2 x 8,192 = 31,744
    layers    the layer's input alone: 3,072 (gradient checkpointing, arXiv:1604.06174)
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from torch import Tensor

NOTHING, PRODUCTS, LAYERS = "none", "products", "layers"


class KeptProducts:
    """The outputs of one layer's products with frozen weights, from its forward to when the layer
    is computed again. `kept` and `shape_only` are each an `ops.frozen.Once`."""

    def __init__(self) -> None:
        self._outputs: deque[Tensor] = deque()
        self._again = False  # whether the layer is computed again

    def kept(self, compute: Callable[[], Tensor]) -> Tensor:
        """The output, which is kept."""
        return self._given(compute, lambda output: output.detach())

    def shape_only(self, compute: Callable[[], Tensor]) -> Tensor:
        """The same where nothing in the layer's backward depends on the output: zeros of its shape,
        which take no memory, stand in for it when the layer is computed again."""
        return self._given(compute, lambda output: output.new_zeros(()).expand(output.shape))

    def _given(self, compute: Callable[[], Tensor], memory: Callable[[Tensor], Tensor]) -> Tensor:
        if self._again and self._outputs:  # none is left for a second backward: it computes anew
            return self._outputs.popleft()
        output = compute()
        if not self._again:
            self._outputs.append(memory(output))
        return output

    def contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Of the forward and of computing again, as `torch.utils.checkpoint` asks for them."""
        return contextlib.nullcontext(), self._computing_again()

    @contextlib.contextmanager
    def _computing_again(self) -> Iterator[None]:
        self._again = True
        yield
