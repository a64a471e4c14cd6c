"""What a process may take of the machine. Windows has no such limits: there nothing is set."""

from __future__ import annotations

import time

from system import memory

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def missing() -> str:
    """What cannot be limited on this system, in words; empty where all can."""
    if resource is None:
        return "its memory and processor time"
    return "" if memory.mapped() else "its memory"


def no_core_dumps() -> None:
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit(cpu_seconds: int, more_memory: int) -> None:
    """Let this process take so much more than it has taken, in seconds and in bytes."""
    taken = memory.mapped()
    used = int(time.process_time())
    _set(used + 1 + cpu_seconds, taken + more_memory if taken else None)


def unlimit() -> None:
    """As much as the process was started with."""
    _set(None, None)


def _set(cpu_seconds: int | None, mapped: int | None) -> None:
    if resource is None:
        return
    for kind, wanted in ((resource.RLIMIT_CPU, cpu_seconds), (resource.RLIMIT_AS, mapped)):
        _, hard = resource.getrlimit(kind)
        soft = hard if wanted is None else wanted
        if hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
        resource.setrlimit(kind, (soft, hard))


def limit_stack(size: int) -> None:
    """Let the stack grow to so many bytes, as far as that is allowed; on Windows it has the size
    that Python was built with."""
    if resource is None:
        return
    hardest = resource.getrlimit(resource.RLIMIT_STACK)[1]
    stack = size if hardest == resource.RLIM_INFINITY else min(size, hardest)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, hardest))


def raise_descriptors(wanted: int) -> int | None:
    """How many descriptors this process may have open; None for no limit. The limit is raised to
    `wanted` as far as it may be raised without rights."""
    if resource is None:  # sockets are no descriptors of the C library there
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or soft < min(wanted, hard):
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and raised > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    return None if soft == resource.RLIM_INFINITY else soft
