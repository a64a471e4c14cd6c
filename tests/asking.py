"""A watch over tensors: who asks one on a GPU for its value waits for all that was begun before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
ASKING = {  # the value itself, or a shape that depends on it
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
    aten.bincount,
}
BY_INDEX = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


READING = {Tensor.tolist, Tensor.numpy, Tensor.cpu}  # of a CPU tensor no operation is begun


@contextmanager
def nobody_asks() -> Iterator[None]:
    """Raises AssertionError where something within would make the host wait for a GPU."""
    with _NoReading(), _NoAsking():
        yield


class _NoReading(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        assert function not in READING, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


class _NoAsking(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        packet = function.overloadpacket
        by_mask = packet in BY_INDEX and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        )
        assert packet not in ASKING and not by_mask, f"{function} waits for the device"
        if packet is aten.repeat_interleave:
            assert (kwargs or {}).get("output_size") is not None, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))
