"""`LoRALinear`: a frozen linear layer plus a trainable low-rank update.

It is computed beside the layer, or, in a merge-aware training, as a part of its rounded weight: see
`lora.rounding`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from errors import PhiSightError
from lora.dropout import RowDropout
from lora.rounding import check_can_round, rounded_layer
from ops import operations_for
from ops.frozen import Once, at_once
from ops.nf4 import PanelLinear, packed_weight
from ops.straight_through import rounded_linear


def secure_four_bit(linear: bnb.nn.Linear4bit) -> None:
    """Keep a 4-bit layer away from the two CPU paths of bitsandbytes that change its weight.

    On a CPU with AVX512-BF16, `Linear4bit.forward` repacks the weight for inference the first time
    that it sees an eval-mode input without a gradient. That rounds every block scale to bfloat16,
    stops at layers whose output size is no multiple of 32, hides the weight from `dequantize_4bit`,
    and leaves a forward without a backward: an evaluation in the middle of a run would silently
    change the model and cut its gradient. So that path is switched off, layer by layer.

    On a CPU with AVX-512, dequantisation counts blocks by row although quantisation counted them
    over the whole tensor, so a row that is no whole number of blocks comes back with the scales of
    its neighbours. Such a layer is refused, on every machine: one file must mean one model.

    Raises:
        PhiSightError: the weight is repacked already, or its rows are no whole number of blocks.
    """
    weight = packed_weight(linear)
    if linear.in_features % weight.blocksize:
        raise PhiSightError(
            f"4-bit layer: {linear.in_features} inputs are not a multiple of the NF4 block size "
            f"{weight.blocksize}, which bitsandbytes dequantises wrongly on some CPUs; "
            'use a model with other sizes, or quantization "none"'
        )
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        raise PhiSightError(
            "4-bit layer: its weight has been repacked for CPU inference, which loses precision; "
            "load the base model again and do not run it before it is wrapped"
        )
    linear.support_avx512bf16_for_cpu = False


class LoRALinear(nn.Module):
    """y = base(x) + scaling * B(A(dropout(x))), scaling = alpha / rank (arXiv:2106.09685), or
    alpha / sqrt(rank) where it is rank-stabilised (arXiv:2312.03732).

    The base stays frozen and may be `nn.Linear` or `bnb.nn.Linear4bit` (QLoRA, arXiv:2305.14314);
    its gradient with respect to x flows, its weight gets none. A, B and the low-rank product are
    float32 whatever the compute dtype of the base: in bfloat16 small updates would round away.

    Attributes:
        base: the frozen layer, (…, in_features) -> (…, out_features).
        lora_A: (rank, in_features) float32 parameter, Kaiming-uniform as `nn.Linear` draws it.
        lora_B: (out_features, rank) float32 parameter, zeros: a new layer computes what base does.
        scaling: 0-dim float32 buffer, so that it is saved and restored with A and B.
        rounds: whether y = NF4(base + scaling * B A) x instead, with a 4-bit base and no dropout.

    Raises:
        PhiSightError: the base is no linear layer, is a 4-bit one that is not quantised yet or
            cannot be used safely, cannot be rounded though it should, or a number makes no adapter.
    """

    scaling: Tensor
    lora_A: Tensor
    lora_B: Tensor
    settled = False
    """whether `base` is the rounded weight already; see `settle`"""

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        dropout_key: int = 0,
        rounds: bool = False,
        rank_stabilized: bool = False,
    ) -> None:
        super().__init__()
        check_base(base)
        check_numbers(rank, alpha, dropout)
        if rounds:
            check_can_round(base, dropout)
        self.rounds = rounds
        self._rounded: tuple[object, nn.Linear] | None = None  # in a tuple: it owns no weights
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features, self.rank = base.in_features, base.out_features, rank
        self.add_factors(generator)
        scaling = torch.tensor(scaling_of(rank, alpha, rank_stabilized), device=base.weight.device)
        self.register_buffer("scaling", scaling)
        self.dropout = RowDropout(dropout, dropout_key)

    def add_factors(self, generator: torch.Generator | None) -> None:
        """Make A and B. Called once, when all else is there that they depend on."""
        self.lora_A, self.lora_B = drawn_pair(self.base, self.rank, self.out_features, generator)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A, (rank, inputs), and B, (outputs, rank), as the layer multiplies by them."""
        return self.lora_A, self.lora_B

    def owned(self) -> dict[str, Tensor]:
        """The tensors that belong to the adapter, by name: what a checkpoint holds of the layer."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B, "scaling": self.scaling}

    def forward(
        self,
        x: Tensor,
        row_keys: Sequence[int] | None = None,
        row_tokens: Sequence[int] | None = None,
        once: Once = at_once,
        answering: bool = False,
    ) -> Tensor:
        """(…, in_features) -> (…, out_features), in the dtype that the base returns.

        row_keys: what dropout draws by, one a row of (rows, length, in_features).
        row_tokens: of rows that stand one behind the other; see `RowDropout.mask`.
        once: keeps the product with the frozen weight, or knows it already; see `ops.frozen`.
        answering: see `ops.choose`.
        """
        operations, (a, b) = operations_for(x, answering), self.factors()
        if self.rounds:
            return rounded_linear(x, self.rounded(), a, b, self.scaling, operations.linear, once)
        mask, scale = self.dropout.mask(x, row_keys, row_tokens)
        return operations.adapted_linear(x, self.base, a, b, self.scaling, mask, scale, once)

    def version(self) -> tuple[tuple[int, int], ...]:
        """What changes when A, B or the scaling is changed, in place or by another tensor."""
        return tuple((tensor.data_ptr(), tensor._version) for tensor in self.owned().values())

    def rounded(self) -> nn.Linear:
        """The 4-bit layer of the rounded merged weight, where the layer rounds.

        Made when it is first asked for after A or B were changed: once an optimiser step, for all
        micro-batches of its window, their backward and what is computed again in it.
        """
        if self.settled:
            return self.base
        version = self.version()
        if self._rounded is None or self._rounded[0] != version:
            self._rounded = None  # before the next one is made: one of the two is enough
            made = rounded_layer(self.base, *self.factors(), self.scaling)
            self._rounded = version, made
        return self._rounded[1]

    def settle(self) -> None:
        """Make the rounded merged weight the base, for a model that answers and is not trained: it
        then takes the memory of a 4-bit layer once. A and B are left as a record of what it was
        made of, and change nothing any more."""
        self.base, self.settled, self._rounded = self.rounded(), True, None

    def extra_repr(self) -> str:
        rounds = ", rounded to NF4" if self.rounds else ""
        return f"rank={self.rank}, scaling={self.scaling.item():g}{rounds}"


def drawn_pair(
    base: nn.Linear, rank: int, outputs: int, generator: torch.Generator | None
) -> tuple[nn.Parameter, nn.Parameter]:
    """A, (rank, inputs), and B, (outputs, rank), on the device of `base`; see `LoRALinear`."""
    # Drawn on the generator's own device and then moved, so that one seed gives the same start on
    # every machine.
    drawn = torch.empty(rank, base.in_features, device=generator.device if generator else "cpu")
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    device = base.weight.device
    return nn.Parameter(drawn.to(device)), nn.Parameter(torch.zeros(outputs, rank, device=device))


def scaling_of(rank: int, alpha: float, rank_stabilized: bool) -> float:
    """What B A is multiplied by. With alpha / rank a larger rank learns less at each step; with
    alpha / sqrt(rank) it does not (rsLoRA, arXiv:2312.03732)."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


def check_base(base: nn.Module) -> None:
    """Raise `PhiSightError` unless `base` is a linear layer that is ready to be wrapped."""
    if not isinstance(base, nn.Linear):
        raise PhiSightError(
            f"LoRA base: {type(base).__name__} is not a linear layer; wrap nn.Linear or Linear4bit"
        )
    if isinstance(base, bnb.nn.Linear4bit) and not isinstance(base, PanelLinear):
        if packed_weight(base).quant_state is None:
            raise PhiSightError(
                "LoRA base: the 4-bit layer is not quantised yet; move it to its device first"
            )
        secure_four_bit(base)


def check_numbers(rank: int, alpha: float, dropout: float) -> None:
    """Raise `PhiSightError` for a rank, alpha or dropout that makes no adapter."""
    if rank < 1:
        raise PhiSightError(f"LoRA rank: {rank} is not a rank; give a whole number of at least 1")
    if not (math.isfinite(alpha) and alpha > 0):
        raise PhiSightError(f"LoRA alpha: {alpha} is not a scale; give a number above 0")
    if not 0 <= dropout < 1:
        raise PhiSightError(f"LoRA dropout: {dropout} is not a probability; give 0 <= dropout < 1")
