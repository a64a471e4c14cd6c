"""AdamW, learning-rate schedules, gradient clipping and float16 loss scaling, all in the open.

Everything that the next step depends on is a tensor or a plain number with a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from errors import PhiSightError

SCHEDULES = ("linear", "cosine", "constant")
MINIMUM_LOSS_SCALE = 2.0**-13


class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101), its state keyed by parameter name.

    The arithmetic and its order are those of `torch.optim.AdamW`, so results are comparable to the
    bit. A parameter without a gradient counts as one with a zero gradient: its moments decay, and
    a text-only window therefore means the same on one machine as on many.

    Args:
        named_parameters: (name, parameter) pairs, all trainable, float32, and each given once.

    Raises:
        PhiSightError: a parameter is double, frozen or not float32, or there is none.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        pairs = list(named_parameters)
        check_parameters(pairs)
        self.parameters = dict(pairs)
        self.betas, self.epsilon, self.weight_decay = betas, epsilon, weight_decay
        self.exp_avg = {name: torch.zeros_like(p.detach()) for name, p in pairs}
        self.exp_avg_sq = {name: torch.zeros_like(p.detach()) for name, p in pairs}
        self.step_count = 0

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every parameter from its `.grad`."""
        self.step_count += 1
        beta1, beta2 = self.betas
        correction1 = 1 - beta1**self.step_count
        correction2 = 1 - beta2**self.step_count
        # One call over all tensors each: an adapter is hundreds of small ones, and a loop in Python
        # would spend its time on starting kernels.
        parameters = [parameter.data for parameter in self.parameters.values()]
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters.values()
        ]
        exp_avg, exp_avg_sq = list(self.exp_avg.values()), list(self.exp_avg_sq.values())

        torch._foreach_mul_(parameters, 1 - learning_rate * self.weight_decay)
        torch._foreach_lerp_(exp_avg, gradients, 1 - beta1)
        torch._foreach_mul_(exp_avg_sq, beta2)
        torch._foreach_addcmul_(exp_avg_sq, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(exp_avg_sq)
        torch._foreach_div_(denominators, correction2**0.5)
        torch._foreach_add_(denominators, self.epsilon)
        torch._foreach_addcdiv_(parameters, exp_avg, denominators, -learning_rate / correction1)

    def zero_grad(self) -> None:
        """Drop all gradients, so that none is carried into the next window."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """ "<name>.exp_avg", "<name>.exp_avg_sq" (the live tensors) and "step" (0-dim int64)."""
        state = {"step": torch.tensor(self.step_count, dtype=torch.int64)}
        for name in self.parameters:
            state[f"{name}.exp_avg"] = self.exp_avg[name]
            state[f"{name}.exp_avg_sq"] = self.exp_avg_sq[name]
        return state

    @torch.no_grad()
    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Copy in what `state_tensors` gave out; the names must be exactly the same.

        Raises:
            PhiSightError: a tensor is missing, unexpected, or of another shape or dtype. All of
                them are named, and nothing has been changed.
        """
        own = self.state_tensors()
        problems = [f"missing {name}" for name in own if name not in state]
        problems += [f"unexpected {name}" for name in state if name not in own]
        for name in own.keys() & state.keys():
            mine, theirs = own[name], state[name]
            if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
                problems.append(
                    f"{name} is {tuple(theirs.shape)} {theirs.dtype}, "
                    f"not {tuple(mine.shape)} {mine.dtype}"
                )
        if problems:
            raise PhiSightError(
                f"optimizer state: {', '.join(sorted(problems))}; "
                "resume with the model and trainable parameters that it was saved with"
            )
        self.step_count = int(state["step"])
        for name, tensor in own.items():
            if name != "step":
                tensor.copy_(state[name])


def check_parameters(pairs: list[tuple[str, nn.Parameter]]) -> None:
    """Raise `PhiSightError` unless each parameter can be optimised and is given once."""
    if not pairs:
        raise PhiSightError("optimizer: no trainable parameters; inject LoRA or train a projector")
    names, seen = set(), set()
    for name, parameter in pairs:
        if name in names or id(parameter) in seen:
            raise PhiSightError(f"optimizer: {name} is given twice; give each parameter once")
        if not parameter.requires_grad:
            raise PhiSightError(f"optimizer: {name} is frozen; give trainable parameters only")
        if parameter.dtype != torch.float32:  # small updates would round away in 16 bits
            raise PhiSightError(f"optimizer: {name} is {parameter.dtype}; train it in float32")
        names.add(name)
        seen.add(id(parameter))


def lr_at(
    step: int, total_steps: int, warmup_fraction: float, peak: float, schedule: str = "linear"
) -> float:
    """The learning rate of the step that follows `step` finished ones: nothing to save or restore.

    It rises linearly from 0 over the first `warmup_fraction` of the steps (rounded up), and then
    falls to 0 at `total_steps` in a line or half a cosine, or stays at `peak`. "linear" equals
    transformers' `get_linear_schedule_with_warmup`, so with a warm-up the very first rate is 0.

    Raises:
        PhiSightError: the schedule is unknown.
    """
    if schedule not in SCHEDULES:
        raise PhiSightError(
            f"schedule: {schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}"
        )
    warmup_steps = math.ceil(total_steps * warmup_fraction)
    if step < warmup_steps:
        return peak * (step / warmup_steps)
    if schedule == "constant":
        return peak
    remaining = max(0, total_steps - step) / max(1, total_steps - warmup_steps)  # 1 -> 0
    if schedule == "linear":
        return peak * remaining
    return peak * 0.5 * (1 - math.cos(math.pi * remaining))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The L2 norm of all gradients as one vector: 0-dim float32, 0 where there are none."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients, in place, so that their joint norm is at most `max_norm`.

    Returns:
        The norm before clipping, a 0-dim float32 tensor. If it is not finite, the gradients are
        left as they are and the caller must not step: there is nothing to rescue by scaling.

    Raises:
        PhiSightError: `max_norm` is not above 0.
    """
    if not max_norm > 0:
        raise PhiSightError(f"gradient clipping: {max_norm} is no norm; give a number above 0")
    parameters = list(parameters)
    norm = gradient_norm(parameters)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    factor = torch.where(torch.isfinite(norm), factor, 1.0)  # without waiting for the GPU
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)
    return norm


def owner_gradient_norms(
    named_parameters: Iterable[tuple[str, nn.Parameter]], owner_of: Callable[[str], str]
) -> dict[str, Tensor]:
    """Gradient norm by owner ("lora", "image_projector", …), 0-dim float32 each, as first seen.

    Args:
        owner_of: parameter name -> owner name.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        groups.setdefault(owner_of(name), []).append(parameter)
    return {owner: gradient_norm(parameters) for owner, parameters in groups.items()}


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
