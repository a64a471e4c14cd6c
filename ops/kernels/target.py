"""Which of the targets this machine runs, and why."""

from __future__ import annotations

import functools
import os
import platform

import llvmlite.binding

from errors import PhiSightError

SWITCH = "PHISIGHT_KERNELS"
TARGETS = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"},
    "avx2": {"avx2", "fma", "f16c"},
}
"""what a processor must have, by LLVM's names; the fastest first"""


@functools.cache
def processor_features() -> frozenset[str]:
    """What this machine's processor and operating system offer, by LLVM's names."""
    found = llvmlite.binding.get_host_cpu_features()
    return frozenset(name for name, there in found.items() if there)


@functools.cache
def choose() -> tuple[str, str]:
    """The name of the target, or "" for none, and the reason in words.

    The environment's PHISIGHT_KERNELS can ask for one by name, or for "off". Raises `PhiSightError`
    for a name that there is not, or that this machine cannot run.
    """
    asked = os.environ.get(SWITCH, "")
    if asked == "off":
        return "", f"switched off by {SWITCH}"
    if asked and asked not in TARGETS:
        raise PhiSightError(f"{SWITCH}={asked}: choose {', '.join(TARGETS)} or off")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "", f"no kernels for {platform.machine()} processors"
    for name in [asked] if asked else TARGETS:
        missing = TARGETS[name] - processor_features()
        if not missing:
            vnni = " with VNNI" if name == "avx512" and "avx512vnni" in processor_features() else ""
            return name, f"{name}{vnni}"
        if asked:
            raise PhiSightError(
                f"{SWITCH}={asked}: this processor has no {', '.join(sorted(missing))};"
                f" choose another, or unset {SWITCH}"
            )
    return "", "the processor has neither AVX2 nor AVX-512"
