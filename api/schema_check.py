"""Whether a JSON schema can be compiled, tried in a process of its own that may fail or be ended.

A schema is untrusted, and no measure of its text bounds what llguidance 1.9.1 makes of it: 20
patterns in an `allOf` take 6 s and 50 take for ever, and a chain of 5,000 `$ref` overflows the
stack, which ends the process. What compiles here, within limits of time and memory, compiles in the
server at the same cost. This file is run as a program, and imports nothing that takes time.
"""

from __future__ import annotations

import resource
import subprocess
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

PROCESSOR_SECONDS, MEMORY, STACK = 2, 1 << 30, 8 << 20
PATIENCE = 30.0  # seconds that a busy machine may take for it
# A Phi begins what it says by a token with a space in front, which its decoder leaves out.
GRAMMAR = 'start: " "? body\nbody: %json '
PREFIX = "at 2(7): failed to compile JSON schema: "  # of llguidance's errors, by that grammar


def compiled(schema: str, tokens: LLTokenizer) -> LLMatcher:
    """What goes through JSON of a schema token by token; look at its `is_error`."""
    limits = LLParserLimits(
        initial_lexer_fuel=1_000_000,  # 60 ms
        step_lexer_fuel=20_000,  # of a token: 2 ms
        step_max_items=50_000,  # of a token: 3 ms
        max_lexer_states=5000,  # 2 KB each
        max_grammar_size=100_000,  # symbols
        verbose_errors=False,  # they tell the schema
    )
    return LLMatcher(tokens, GRAMMAR + schema, log_level=0, limits=limits)


def reason_of(matcher: LLMatcher) -> str:
    """Why a matcher has given up, in one line."""
    reason = matcher.get_error().partition("\n")[0] or "no token is left"
    return reason.removeprefix(PREFIX)[:200]


def fault_of(schema: str) -> str:
    """Why a schema cannot be compiled; empty if it can."""
    try:
        tried = subprocess.run(
            [sys.executable, "-I", __file__],
            input=schema.encode(),
            capture_output=True,
            timeout=PATIENCE,
            env={},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "it takes too long"
    if tried.returncode:
        return "it takes too much time or memory"
    return tried.stdout.decode(errors="replace")


def main() -> None:
    for limit, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, PROCESSOR_SECONDS),
        (resource.RLIMIT_STACK, STACK),
        (resource.RLIMIT_CORE, 0),
    ):
        hardest = resource.getrlimit(limit)[1]
        most = most if hardest == resource.RLIM_INFINITY else min(most, hardest)
        resource.setrlimit(limit, (most, most))
    matcher = compiled(sys.stdin.buffer.read().decode(), LLTokenizer("byte"))
    sys.stdout.buffer.write(reason_of(matcher).encode() if matcher.is_error() else b"")


if __name__ == "__main__":
    main()
