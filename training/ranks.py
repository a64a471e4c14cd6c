"""The processes of one run, as torchrun starts them; without it, this process is all of them.

What is summed over ranks is summed in one flat collective that every rank joins in every step,
whatever its share of the rows holds: no rank waits for a tensor that another one does not have.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed
from torch import Tensor, nn

from errors import PhiSightError

# A rank that dies is noticed at once, as its connections close. This is for one that hangs, and
# must be longer than one works while the others wait: rank 0 reads every picture for its hash, and
# the last shard of the feature store may take `SHARD_SECONDS` and more.
PATIENCE = datetime.timedelta(hours=6)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """`rank` of `size` processes. Rank 0 is the only one that writes and speaks."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share_of(self, rows: Sequence[Item]) -> Sequence[Item]:
        """This rank's rows of a step: every `size`-th. All shares together are the rows."""
        return rows[self.rank :: self.size]

    def any_of(self, *flags: bool) -> list[bool]:
        """For each flag: has any rank raised it? All ranks get the same answer."""
        return [raised > 0 for raised in self.sum_numbers(*flags)]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each `.grad`, None being zeros, by its sum over all ranks. One collective."""
        if self.size == 1:
            return
        parameters = list(parameters)
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        )
        with _naming_the_cause(self.rank):
            torch.distributed.all_reduce(flat)
        for parameter, summed in zip(parameters, flat.split([p.numel() for p in parameters])):
            parameter.grad = summed.view_as(parameter)

    def sum_numbers(self, *numbers: float) -> list[float]:
        """Each number summed over all ranks, in float64."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=_device())
        with _naming_the_cause(self.rank):
            torch.distributed.all_reduce(total)
        return total.tolist()

    def gather(self, state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Every rank's named CPU tensors, in the order of the ranks."""
        if self.size == 1:
            return [state]
        return [
            safetensors.torch.load(data)
            for data in self._gather_bytes(safetensors.torch.save(state))
        ]

    def from_first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, a JSON value, on every rank; its `PhiSightError` too."""
        if self.size == 1:
            return work()
        outcome: dict[str, Any] = {}
        if self.is_first:
            try:
                outcome["value"] = work()
            except PhiSightError as error:
                outcome["error"] = str(error)
        outcome = self.exchange(outcome)[0]
        if "error" in outcome:
            raise PhiSightError(outcome["error"])
        return outcome["value"]

    def exchange(self, value: Any) -> list[Any]:
        """The JSON value of every rank, in the order of the ranks, on all of them."""
        if self.size == 1:
            return [value]
        return [json.loads(data) for data in self._gather_bytes(json.dumps(value).encode())]

    def _gather_bytes(self, data: bytes) -> list[bytes]:
        """As tensors, and not with torch's collectives for objects: those unpickle."""
        device = _device()
        length = torch.tensor([len(data)], device=device)
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        with _naming_the_cause(self.rank):
            torch.distributed.all_gather(lengths, length)
            longest = max(int(each) for each in lengths)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            parts = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in lengths]
            torch.distributed.all_gather(parts, padded.to(device))
        return [bytes(part[: int(each)].cpu().numpy()) for part, each in zip(parts, lengths)]


@contextmanager
def joined(device_name: str) -> Iterator[Ranks]:
    """Join the other processes that torchrun started, and leave them on the way out.

    Raises:
        PhiSightError: torchrun's variables are incomplete, the others cannot be reached, or could
            not be after a restart.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    if device_name == "mps":
        raise PhiSightError(
            "--device mps: torch sums no gradients of several processes there; use --device cpu, or"
            " start one process"
        )
    _need_a_store_of_each_start()
    on_gpu = device_name != "cpu" and torch.cuda.is_available()
    try:
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise PhiSightError(
            f"torchrun: the processes did not find each other ({error}); start them"
            " with torchrun --nproc-per-node N -- train.py ..."
        ) from error
    try:
        yield Ranks(torch.distributed.get_rank(), size)
        # Together: a process that ended while others still closed their connections was at times
        # aborted by its communication threads ("terminate called without an active exception").
        with _naming_the_cause(torch.distributed.get_rank()):
            torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def _need_a_store_of_each_start() -> None:
    """Refuse torchrun's restarts where the processes meet in a store that its agent keeps.

    It holds the addresses of the processes before the restart: who is sooner reads those, and both
    wait for each other (seen with torch 2.13; issue 135712 of pytorch/pytorch tells of it).
    """
    kept_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if kept_by_agent and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise PhiSightError(
            "torchrun --max-restarts: the processes would look for those of before the restart,"
            " and wait for hours; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, and"
            " --rdzv-backend c10d"
        )


def _device() -> torch.device:
    return torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")


@contextmanager
def _naming_the_cause(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's DistBackendError is one
        raise PhiSightError(
            f"rank {rank}: another process of the run is gone or hangs"
            f" ({str(error).splitlines()[0]}); see what it said, then resume with"
            " --resume"
        ) from error
