"""JSON schemas compiled by llguidance, and whether one can be, tried in a child process.

A schema is untrusted, and no measure of its text bounds what llguidance 1.9.1 makes of it: 20
patterns in an `allOf` take 6 s and 50 take for ever, and a chain of 5,000 `$ref` overflows the
stack, which ends the process. What compiles in a child (workers/pool.py), within limits of time,
memory and stack, compiles in the server at the same cost.
"""

from __future__ import annotations

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from system import limits
from workers.child import Result

STACK = 8 << 20  # bytes
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
    """Why a matcher has given up, in one line; empty if it has not."""
    return matcher.get_error().partition("\n")[0].removeprefix(PREFIX)[:200]


def try_schema(data: bytearray) -> Result:
    """In a child: why a schema is not taken; empty if it is."""
    limits.limit_stack(STACK)
    return reason_of(compiled(data.decode(), LLTokenizer("byte"))), b""
