"""Vector code inside functions that numba compiles: written as LLVM's instructions, without a
compiler at run time.

`compiled_in_place` makes of a Python function that writes LLVM IR an operation that compiled code
can call. Addresses are plain integers (intp), so no array is boxed or counted on the way. The width
is that of the processor: `LANES` outputs of 32 bits at a time.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
POSIX = sys.platform != "win32"


def compiled_in_place(
    arguments: Sequence[types.Type], returned: types.Type
) -> Callable[[Callable[..., ir.Value | None]], Any]:
    """Decorate `write(builder, *values)`, which writes LLVM IR, to make it callable in compiled
    code with `arguments`; what it returns is of the type `returned` (None: the integer 0)."""

    def decorate(write: Callable[..., ir.Value | None]) -> Any:
        def typed(*_: types.Type) -> tuple[Any, Callable[..., ir.Value]]:
            def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
                result = write(builder, *values)
                return ir.Constant(I64, 0) if result is None else result

            return returned(*arguments), generate

        def resolve(typing_context: Any, *given: types.Type) -> Any:
            return typed(*given)

        # numba counts the parameters by the signature, which is that of the IR's values here.
        names = ["typing_context", *list(inspect.signature(write).parameters)[1:]]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        resolve.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, kind) for name in names]
        )
        functools.update_wrapper(resolve, write, assigned=("__name__", "__doc__", "__module__"))
        del resolve.__wrapped__  # type: ignore[attr-defined]
        return intrinsic(resolve)

    return decorate


# Parts of IR ----------------------------------------------------------------------------------


def vector(element: ir.Type, count: int) -> ir.VectorType:
    return ir.VectorType(element, count)


def constant(element: ir.Type, values: Sequence[float]) -> ir.Constant:
    return ir.Constant(vector(element, len(values)), list(values))


def pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.inttoptr(address, kind.as_pointer())


def load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, align: int = 1) -> ir.Value:
    value = builder.load(pointer(builder, address, kind))
    value.align = align
    return value


def store(builder: ir.IRBuilder, address: ir.Value, value: ir.Value, align: int = 1) -> None:
    builder.store(value, pointer(builder, address, value.type)).align = align


def offset(builder: ir.IRBuilder, address: ir.Value, amount: int | ir.Value) -> ir.Value:
    if isinstance(amount, int):
        return builder.add(address, ir.Constant(I64, amount)) if amount else address
    return builder.add(address, amount)


def broadcast(builder: ir.IRBuilder, scalar: ir.Value, count: int) -> ir.Value:
    """A vector that holds `scalar` in every place."""
    kind = vector(scalar.type, count)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, first, constant(I32, [0] * count))


def call(
    builder: ir.IRBuilder, name: str, returned: ir.Type, values: Sequence[ir.Value]
) -> ir.Value:
    """A call of one of LLVM's own functions, or of one in the C library."""
    kind = ir.FunctionType(returned, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def fused_multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c, rounded once, of vectors of float32."""
    return call(builder, f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])


# Operations for compiled code -----------------------------------------------------------------


@compiled_in_place((types.intp, types.int64), types.int64)
def take(builder: ir.IRBuilder, address: ir.Value, count: ir.Value) -> ir.Value:
    """Add `count` to the int64 at `address`; what it was before, to this thread alone."""
    return builder.atomic_rmw("add", pointer(builder, address, I64), count, "monotonic")


@compiled_in_place((types.intp, types.int64), types.int64)
def arrive(builder: ir.IRBuilder, address: ir.Value, count: ir.Value) -> ir.Value:
    """As `take`; what this thread wrote before is seen by those who see the new number."""
    return builder.atomic_rmw("add", pointer(builder, address, I64), count, "acq_rel")


@compiled_in_place((types.intp,), types.int64)
def observe(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The int64 at `address`, and all that was written before it was."""
    return builder.load_atomic(pointer(builder, address, I64), "acquire", 8)


@compiled_in_place((types.intp, types.int64), types.int64)
def publish(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    """Write an int64 after all that was written before."""
    builder.store_atomic(value, pointer(builder, address, I64), "release", 8)


@compiled_in_place((), types.int64)
def pause(builder: ir.IRBuilder) -> None:
    """Tell the processor that this thread waits in a loop."""
    call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])


@compiled_in_place((), types.int64)
def give_way(builder: ir.IRBuilder) -> None:
    """Let other programs have this core, if any of them wants it."""
    if POSIX:
        call(builder, "sched_yield", I32, [])


@compiled_in_place((types.intp,), types.float32)
def float_at(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return load(builder, address, F32, 4)


@compiled_in_place((types.intp, types.float32), types.int64)
def put_float(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    store(builder, address, value, 4)
