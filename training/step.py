"""One optimiser step: forward, backward, clip, update."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.collate import Batch
from errors import PhiSightError
from model.vlm import VisionLanguageModel, owner_of
from tensors import sha256_of, widest
from training.gradients import clip_gradients, owner_gradient_norms
from training.loss_scaler import LossScaler
from training.optimizer import AdamW
from training.ranks import Ranks


class Diverged(PhiSightError):
    """The loss of a step or its gradient is not finite; nothing was updated."""

    def __init__(self, loss: float, gradient_norm: float) -> None:
        self.loss, self.gradient_norm = loss, gradient_norm
        super().__init__(
            f"step: the gradient norm is {gradient_norm}, the loss {loss};"
            " training has diverged: resume an earlier checkpoint with a lower --learning-rate"
        )


@dataclass(frozen=True)
class StepResult:
    """The numbers of one optimiser step, all of them over the batches of all processes."""

    loss_sum: float
    """cross-entropy in nats, summed over the supervised tokens"""
    supervised_tokens: int
    tokens: int
    places: int
    """tokens and padding"""
    gradient_norm: float
    """before clipping"""
    gradient_norms: dict[str, float]
    """the same by owner of the weights ("lora", "projector")"""
    skipped: bool
    """whether float16 overflowed, so that nothing was updated"""
    update_norms: dict[str, float] | None
    """how far each owner's weights moved, where that was measured"""


def train_step(
    model: nn.Module,
    optimizer: AdamW,
    scaler: LossScaler,
    batches: Sequence[Batch],
    learning_rate: float,
    max_norm: float,
    measure_updates: bool = False,
    ranks: Ranks = Ranks(),
) -> StepResult:
    """One optimiser step over an accumulation window, of which this process has its `batches`.

    Every micro-batch's summed loss is divided by the supervised tokens of the whole window on all
    processes, so that the gradient does not depend on how the window was cut.

    Raises:
        Diverged: the loss or its gradient is not finite, and no loss scale is to blame.
    """
    parameters = optimizer.parameters
    supervised, tokens, places = count_tokens(batches, ranks)
    summed_loss = add_gradients(model, scaler, batches, supervised)
    ranks.sum_gradients(parameters.values())
    [loss_sum] = ranks.sum_numbers(summed_loss.item())

    scaler.unscale_gradients(parameters.values())
    gradient_norms = owner_gradient_norms(parameters.items(), owner_of)
    gradient_norm = clip_gradients(parameters.values(), max_norm).item()
    finite = gradient_norm < float("inf")  # False for NaN too
    if not finite and not scaler.enabled:
        raise Diverged(loss_sum / max(supervised, 1), gradient_norm)
    before = copy_of(parameters) if measure_updates else {}
    if finite:
        optimizer.step(learning_rate)
    scaler.update(finite)
    optimizer.zero_grad()
    return StepResult(
        loss_sum=loss_sum,
        supervised_tokens=supervised,
        tokens=tokens,
        places=places,
        gradient_norm=gradient_norm,
        gradient_norms={owner: norm.item() for owner, norm in gradient_norms.items()},
        skipped=not finite,
        update_norms=owner_update_norms(before, parameters) if measure_updates else None,
    )


def add_gradients(
    model: nn.Module, scaler: LossScaler, batches: Sequence[Batch], supervised: int
) -> Tensor:
    """The accumulation window: add every micro-batch's gradient of its loss over `supervised`.

    Nothing here asks a tensor for its value, so that a GPU always has work waiting: whoever asks
    waits for all that was begun before, and meanwhile nothing new is begun.

    Returns:
        The sum of the losses, 0-dim float64 (float32 on Apple's GPU) on their device.
    """
    device = next(model.parameters()).device
    loss_sum = torch.zeros((), dtype=widest(device), device=device)
    for batch in batches:
        loss, _ = model(batch)  # summed over the supervised tokens: 0-dim float32
        # Without one supervised token the sum and its gradient are 0. Without a picture no trained
        # weight takes part where the projector is trained alone: its gradient is 0 as well.
        if loss.requires_grad:
            scaler.scale_loss(loss / max(supervised, 1)).backward()
        loss_sum += loss.detach()
    return loss_sum


def count_tokens(batches: Sequence[Batch], ranks: Ranks) -> tuple[int, int, int]:
    """Supervised tokens, tokens, and tokens with padding, in the batches of all processes."""
    supervised, tokens, places = ranks.sum_numbers(
        sum(batch.supervised_tokens for batch in batches),
        sum(batch.tokens for batch in batches),
        sum(batch.input_ids.numel() for batch in batches),
    )
    return int(supervised), int(tokens), int(places)


def copy_of(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def trained_digests(model: VisionLanguageModel) -> dict[str, str]:
    """Owner -> a digest of all its weights that are trained; owners with none are left out."""
    return {
        owner: hashlib.sha256("".join(hashes).encode()).hexdigest()
        for owner, parameters in model.owners().items()
        if (hashes := [sha256_of(p.detach().cpu()) for _, p in parameters if p.requires_grad])
    }


def owner_update_norms(before: dict[str, Tensor], now: dict[str, nn.Parameter]) -> dict[str, float]:
    """How far each owner's weights moved: the L2 norm of the change."""
    squares: dict[str, float] = {}
    for name, old in before.items():
        change = (now[name].detach() - old).square().sum().item()
        squares[owner_of(name)] = squares.get(owner_of(name), 0.0) + change
    return {owner: total**0.5 for owner, total in squares.items()}
