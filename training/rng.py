"""The state of every random generator, as plain tensors."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy
import torch
from torch import Tensor

from errors import PhiSightError, key_problems


def rng_state(extra_generators: Mapping[str, torch.Generator] | None = None) -> dict[str, Tensor]:
    """Every random generator as plain CPU tensors: python, numpy, torch CPU, the CUDA device in
    use, and the named ones. int64 but for one float64 each of python and numpy, and torch's uint8
    states."""
    version, words, gauss_next = random.getstate()
    kind, keys, position, has_gauss, cached = numpy.random.get_state()
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
        "numpy.keys": torch.from_numpy(keys.astype(numpy.int64)),  # (624,)
        "numpy.position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy.cached_gaussian": torch.tensor([cached], dtype=torch.float64),
        "torch.cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # the card of this process
        state["torch.cuda"] = torch.cuda.get_rng_state()
    return state | {
        f"generator.{name}": generator.get_state()
        for name, generator in (extra_generators or {}).items()
    }


def set_rng_state(
    state: Mapping[str, Tensor], extra_generators: Mapping[str, torch.Generator] | None = None
) -> None:
    """Put every generator back, exactly. Raises PhiSightError, with nothing changed, when the names
    or shapes are not those of this machine (say, another number of CUDA devices)."""
    here = rng_state(extra_generators)
    problems = key_problems("", set(here), set(state)) or [
        f"{name} is {state[name].dtype} {tuple(state[name].shape)}, not {mine.dtype} "
        f"{tuple(mine.shape)}"
        for name, mine in here.items()
        if state[name].dtype != mine.dtype
        or (name != "python.gauss_next" and state[name].shape != mine.shape)
    ]
    if problems:
        raise PhiSightError(
            f"rng: {'; '.join(problems)}; resume with the devices and generators "
            "that the run was saved with"
        )
    position, has_gauss = state["numpy.position"].tolist()
    gauss = state["python.gauss_next"].tolist()
    keys = state["numpy.keys"].numpy().astype(numpy.uint32)
    try:
        random.setstate((3, tuple(state["python.words"].tolist()), gauss[0] if gauss else None))
        numpy.random.set_state(
            ("MT19937", keys, position, has_gauss, state["numpy.cached_gaussian"].item())
        )
        torch.set_rng_state(state["torch.cpu"])
        if "torch.cuda" in state:
            torch.cuda.set_rng_state(state["torch.cuda"])
        for name, generator in (extra_generators or {}).items():
            generator.set_state(state[f"generator.{name}"])
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise PhiSightError(
            f"rng: the saved state is not one ({error}); use another checkpoint"
        ) from error
