"""AdamW in the open: all that its next step depends on is a tensor or a number with a name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from errors import PhiSightError
from tensors import copy_into


def same_for_all(learning_rate: float, name: str) -> float:
    """The `rate_of` of an optimizer whose parameters all have the learning rate of the step."""
    return learning_rate


class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101), its state keyed by parameter name.

    The arithmetic and its order are those of `torch.optim.AdamW`, so results are comparable to the
    bit. A parameter without a gradient counts as one with a zero gradient: its moments decay, and
    a text-only window therefore means the same on one machine as on many.

    Args:
        named_parameters: (name, parameter) pairs, all trainable, float32, and each given once.
        rate_of: (learning rate of a step, name) -> the rate of that parameter in it, which stands
            for the learning rate in the weight decay too, as in a group of parameters of torch's.

    Raises:
        PhiSightError: a parameter is double, frozen or not float32, or there is none.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        rate_of: Callable[[float, str], float] = same_for_all,
    ) -> None:
        pairs = list(named_parameters)
        check_parameters(pairs)
        self.parameters = dict(pairs)
        self.betas, self.epsilon, self.weight_decay = betas, epsilon, weight_decay
        self.rate_of = rate_of
        self.exp_avg = {name: torch.zeros_like(p.detach()) for name, p in pairs}
        self.exp_avg_sq = {name: torch.zeros_like(p.detach()) for name, p in pairs}
        self.step_count = 0

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every parameter from its `.grad`, each at its own rate of this step."""
        self.step_count += 1
        groups: dict[float, list[str]] = {}
        for name in self.parameters:
            groups.setdefault(self.rate_of(learning_rate, name), []).append(name)
        for rate, names in groups.items():
            self.update(names, rate)

    def update(self, names: list[str], rate: float) -> None:
        """The step of the parameters of one rate."""
        beta1, beta2 = self.betas
        correction1 = 1 - beta1**self.step_count
        correction2 = 1 - beta2**self.step_count
        # One call over the tensors each: an adapter is hundreds of small ones, and a loop in Python
        # would spend its time on starting kernels.
        # Not `.data`, which hides from a parameter that it was changed: see `LoRALinear.rounded`.
        given = [self.parameters[name] for name in names]
        parameters = [parameter.detach() for parameter in given]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in given]
        exp_avg = [self.exp_avg[name] for name in names]
        exp_avg_sq = [self.exp_avg_sq[name] for name in names]

        torch._foreach_mul_(parameters, 1 - rate * self.weight_decay)
        torch._foreach_lerp_(exp_avg, gradients, 1 - beta1)
        torch._foreach_mul_(exp_avg_sq, beta2)
        torch._foreach_addcmul_(exp_avg_sq, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(exp_avg_sq)
        torch._foreach_div_(denominators, correction2**0.5)
        torch._foreach_add_(denominators, self.epsilon)
        torch._foreach_addcdiv_(parameters, exp_avg, denominators, -rate / correction1)

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
        copy_into(
            own,
            state,
            "optimizer state",
            "resume with the model and trainable parameters that it was saved with",
        )
        self.step_count = int(own["step"])


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
