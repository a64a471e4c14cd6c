"""The state of every random generator, as plain tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from errors import PhiSightError, key_problems
from tensors import mismatches
from training.ranks import Ranks


def seed_generators(seed: int) -> None:
    """Seed every generator that a checkpoint holds, so that two runs of one seed start alike."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class DeviceGenerator:
    """torch's own generator of a device that is no CPU, by the functions of its module."""

    in_use: bool
    get: Callable[[], Tensor]
    """its state on the CPU, uint8"""
    set: Callable[[Tensor], None]


def device_generators(device: torch.device | None) -> dict[str, DeviceGenerator]:
    """Name in `rng.safetensors` -> the generator, for a run that computes on a device. A Mac always
    has that of its GPU, which a run on its CPU does not draw from."""
    cuda, mps = torch.cuda, torch.mps
    used = cuda.is_available() and cuda.is_initialized()
    on_mps = device is not None and device.type == "mps"
    return {
        "torch.cuda": DeviceGenerator(used, cuda.get_rng_state, cuda.set_rng_state),  # of this card
        "torch.mps": DeviceGenerator(on_mps, mps.get_rng_state, mps.set_rng_state),
    }


def rng_state(device: torch.device | None = None) -> dict[str, Tensor]:
    """Every random generator as plain CPU tensors: python, numpy, torch CPU, the CUDA device in use
    and, if a run computes on `device`, Apple's GPU. int64 but for one float64 each of python and
    numpy, and torch's uint8 states."""
    version, words, gauss_next = random.getstate()
    of_numpy = numpy.random.get_state(legacy=False)
    kind, mersenne = of_numpy["bit_generator"], of_numpy["state"]
    if version != 3 or kind != "MT19937":
        raise PhiSightError(
            f"rng: python state version {version} and numpy generator {kind} are "
            "not ones that can be saved; use Python 3's and numpy's own"
        )
    state = {
        "python.words": torch.tensor(words, dtype=torch.int64),  # (625,)
        "python.gauss_next": torch.tensor(
            [] if gauss_next is None else [gauss_next], dtype=torch.float64
        ),  # (0,) or (1,)
        "numpy.keys": torch.from_numpy(mersenne["key"].astype(numpy.int64)),  # (624,)
        "numpy.position": torch.tensor([mersenne["pos"], of_numpy["has_gauss"]], dtype=torch.int64),
        "numpy.cached_gaussian": torch.tensor([of_numpy["gauss"]], dtype=torch.float64),
        "torch.cpu": torch.get_rng_state(),
    }
    used = {name: one for name, one in device_generators(device).items() if one.in_use}
    return state | {name: one.get().cpu() for name, one in used.items()}


def set_rng_state(state: Mapping[str, Tensor], device: torch.device | None = None) -> None:
    """Put every generator back, exactly. Raises PhiSightError, with nothing changed, when the names
    or shapes are not those of this machine (say, another number of CUDA devices)."""
    here = rng_state(device)
    problems = key_problems("", set(here), set(state))
    if not problems:  # a Gaussian may wait in one of them and not in the other
        waiting = here["python.gauss_next"].new_empty(state["python.gauss_next"].shape)
        problems = mismatches(here | {"python.gauss_next": waiting}, state)
    if problems:
        raise PhiSightError(
            f"rng: {'; '.join(problems)}; resume with the devices and generators "
            "that the run was saved with"
        )
    position, has_gauss = state["numpy.position"].tolist()
    gauss = state["python.gauss_next"].tolist()
    words = state["numpy.keys"].numpy()
    keys = words.astype(numpy.uint32)
    try:
        # What the libraries do not ask: numpy would read behind its words, or draw a NaN.
        gaussians = (*gauss, state["numpy.cached_gaussian"].item())
        if not (0 <= position <= len(words) and has_gauss in (0, 1) and (keys == words).all()):
            raise ValueError("numpy's place or words are out of range")
        if state["python.gauss_next"].dim() != 1 or len(gauss) > 1:
            raise ValueError("more than one Gaussian waits")
        if not all(map(math.isfinite, gaussians)):
            raise ValueError("a Gaussian that waits is not finite")
        random.setstate((3, tuple(state["python.words"].tolist()), gauss[0] if gauss else None))
        numpy.random.set_state(
            ("MT19937", keys, position, has_gauss, state["numpy.cached_gaussian"].item())
        )
        torch.set_rng_state(state["torch.cpu"])
        for name, generator in device_generators(device).items():
            if name in state:
                generator.set(state[name])
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise PhiSightError(
            f"rng: the saved state is not one ({error}); use another checkpoint"
        ) from error


def merged_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The random state of every process as a checkpoint holds them: those after the first have
    their number in the name."""
    return dict(states[0]) | {
        f"rank{rank}.{name}": tensor
        for rank, state in enumerate(states[1:], start=1)
        for name, tensor in state.items()
    }


def state_of_rank(merged: Mapping[str, Tensor], world_size: int, ranks: Ranks) -> dict[str, Tensor]:
    """This process's part of `merged_states`, which `world_size` processes gave; the first one's
    where there are more or fewer now."""
    prefix = f"rank{ranks.rank}." if ranks.rank and ranks.size == world_size else ""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in merged.items()
        if name.startswith(prefix or ("python.", "numpy.", "torch."))
    }
