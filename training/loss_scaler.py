"""Dynamic loss scaling for training in float16."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from errors import PhiSightError

MINIMUM_LOSS_SCALE = 2.0**-13


class LossScaler:
    """Dynamic loss scaling for float16 (arXiv:1710.03740); with `enabled=False` the scale is 1.

    Small gradients underflow in float16, so the loss is multiplied by `scale` before the backward
    and the gradients divided by it after. A step whose gradients are not finite is skipped by the
    caller and halves the scale; `growth_interval` good steps in a row double it.

        scaler.scale_loss(loss).backward(); scaler.unscale_gradients(parameters)
        good = bool(torch.isfinite(clip_gradients(parameters, max_norm)))
        if good: optimizer.step(learning_rate)
        scaler.update(good)
    """

    def __init__(
        self,
        enabled: bool,
        initial_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        self.enabled = enabled
        self.scale = initial_scale if enabled else 1.0
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.growth_interval = growth_interval
        self.growth_tracker = 0

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss to call `backward` on."""
        return loss * self.scale if self.enabled else loss

    @torch.no_grad()
    def unscale_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide all gradients by the scale, in place: once, after the last backward of a step."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.enabled and gradients:
            torch._foreach_mul_(gradients, 1.0 / self.scale)

    def update(self, gradients_were_finite: bool) -> None:
        """Adapt the scale after a step that was made (True) or skipped (False).

        Raises:
            PhiSightError: the scale has fallen so far that the cause cannot be the scale.
        """
        if not self.enabled:
            return
        if not gradients_were_finite:
            self.scale *= self.backoff_factor
            self.growth_tracker = 0
            if self.scale < MINIMUM_LOSS_SCALE:
                raise PhiSightError(
                    "loss scaler: gradients stay non-finite at any scale, training has diverged; "
                    "resume an earlier checkpoint with a lower learning rate"
                )
            return
        self.growth_tracker += 1
        if self.growth_tracker == self.growth_interval:
            grown = self.scale * self.growth_factor
            if grown <= torch.finfo(torch.float32).max:  # the loss is float32
                self.scale = grown
            self.growth_tracker = 0

    def state_dict(self) -> dict[str, float | int | bool]:
        """Plain numbers for JSON; everything that the next `update` depends on."""
        return {
            "enabled": self.enabled,
            "scale": self.scale,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "growth_tracker": self.growth_tracker,
        }

    def load_state_dict(self, state: Mapping[str, float | int | bool]) -> None:
        """Take over what `state_dict` gave out.

        Raises:
            PhiSightError: keys are missing or unexpected, or the state is of a run in another mode.
        """
        if state.keys() != self.state_dict().keys():
            raise PhiSightError(
                f"loss scaler state: it has {', '.join(sorted(state))}, not "
                f"{', '.join(sorted(self.state_dict()))}; resume a checkpoint of this version"
            )
        if state["enabled"] != self.enabled:
            raise PhiSightError(
                f"loss scaler state: enabled was {state['enabled']} and is {self.enabled}; "
                "resume with the compute dtype of the saved run"
            )
        for name, value in state.items():
            setattr(self, name, value)
