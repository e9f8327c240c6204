"""The words that CUDA kernels are written in: loads, stores and warp operations that Numba lacks, as LLVM instructions.

A `Vocabulary` is made for a storage type and a compute capability; `compile` hands it to a body of `mask`. The kernels
on rows use `vector_intrinsics`, which builds on this module.

A warp sweeps a tile of 1,024 cells. Lane ``l`` owns word ``l`` of the tile. With ``V`` elements in 16 bytes, lane ``l``
of sweep ``s`` handles the elements from ``(32 s + l) V`` on, whose bits it fetches from lane ``s V + (l V >> 5)``.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (typed by Numba and LLVM)

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.extending import intrinsic

from ...core.checks import FLOAT16, FLOAT64
from ...core.random import NOISE_COUNTERS
from .tile import BATCH, ITEM_BYTES, LANES, TILE_CELLS, VECTOR_BYTES

I1, I8, I16, I32, I64, I128 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64, 128))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
GLOBAL = 1  # address space


def constant(number: int, type: Any = I32) -> Any:
    return ir.Constant(type, number)


class Vocabulary:
    """The words of kernels with one storage type.

    A word that `__init__` declares is emitted by the method of its name with an underscore, which gets LLVM's builder
    and the values of the arguments. ``affine`` is (a, b, c): a kept x becomes a x + b, a dropped one c.
    """

    def __init__(self, dtype: int, cc: tuple[int, int], plain: bool, counted: bool = False) -> None:
        self.dtype, self.cc, self.plain, self.counted = dtype, cc, plain, counted
        self.item_bytes = ITEM_BYTES[dtype]
        self.vector_items = VECTOR_BYTES // self.item_bytes
        self.sweeps = TILE_CELLS // (LANES * self.vector_items)
        self._item = ir.IntType(8 * self.item_bytes)
        self._computed = F64 if dtype == FLOAT64 else F32
        self._register = I64 if dtype == FLOAT64 else I32  # a vector is loaded as two or four of these
        self._registers = VECTOR_BYTES * 8 // self._register.width

        u32, u64, f32, flag, void = types.uint32, types.uint64, types.float32, types.boolean, types.void
        a = types.float64 if dtype == FLOAT64 else f32  # what elements are computed in
        register = u64 if dtype == FLOAT64 else u32
        vector, tile = (types.UniTuple(register, self._registers * sweeps) for sweeps in (1, self.sweeps))
        item = {8: u64, 4: u32, 2: types.uint16}[self.item_bytes]
        four, batch, affine = types.UniTuple(item, 4), types.UniTuple(item, BATCH), types.UniTuple(a, 3)

        self.inline = njit(inline="always")
        self.lane, self.thread, self.block = _special("laneid"), _special("tid.x"), _special("ctaid.x")
        self.block_threads, self.blocks = _special("ntid.x"), _special("nctaid.x")
        self.ones = define(u32, (u32,), operation("ctpop.i32"))
        self.plus = define(f32, (f32, f32), operation("nvvm.add.rn.f"))
        self.times = define(f32, (f32, f32), operation("nvvm.mul.rn.f"))
        self.root = define(f32, (f32,), operation("nvvm.sqrt.rn.f"))
        self.load_word, self.load_long = define(u32, (u64,), _load(I32)), define(u64, (u64,), _load(I64))
        self.store_word = define(void, (u64, u32), _store)
        self.declare(
            multiply=(u64, u64, u64),
            multiply_high=(u64, u64, u64),
            divide=(u32, u32, u32, u32),
            plane_mask=(u32, u32, u32),
            uniform=(u32, u32),
            any_lane=(flag, flag),
            sum_lanes=(u32, u32),
            add_long=(void, u64, u64),
            scale=(a, types.float64 if counted else a, u64),
            load_tile=(tile, u64),
            store_tile=(void, u64, tile, u32, affine),
            load_batch=(batch, u64, u32, u32),
            store_batch=(void, u64, u32, u32, batch, u32, affine),
            load_four=(four, u64, u64, u64),
            store_four=(void, u64, u64, u64, four, types.UniTuple(f32, 4)),
            load_vector=(vector, u64),
            store_vector=(void, u64, vector, u32, affine),
            load_item=(item, u64),
            store_item=(void, u64, item, u32, affine),
        )

    def declare(self, **signatures: tuple[Any, ...]) -> None:
        """Words by the types of their result and of their arguments."""
        for name, (returns, *parameters) in signatures.items():
            setattr(self, name, define(returns, tuple(parameters), getattr(self, f"_{name}")))

    # ---- a tile, in vectors ----

    def _load_tile(self, builder, address):
        """Vectors of this lane, at ``address`` and every 512 bytes from there: all under way before one is used."""
        vectors = [self._load_vector(builder, at) for at in self._sweep_addresses(builder, address)]
        return [register for vector in vectors for register in vector]

    def _store_tile(self, builder, address, tile, word, affine):
        registers, per, affine = parts(builder, tile), self._registers, parts(builder, affine)
        first = builder.mul(_read_special(builder, "laneid"), constant(self.vector_items))  # cell, within a sweep
        owner, shift = builder.lshr(first, constant(5)), builder.and_(first, constant(31))
        for sweep, at in enumerate(self._sweep_addresses(builder, address)):
            bits = shuffle(builder, word, builder.add(owner, constant(sweep * self.vector_items)))
            own = registers[sweep * per : (sweep + 1) * per]
            self._put_vector(builder, at, own, builder.lshr(bits, shift), affine)

    def _sweep_addresses(self, builder, address):
        return [builder.add(address, constant(s * LANES * VECTOR_BYTES, I64)) for s in range(self.sweeps)]

    # ---- element by element ----

    def _load_batch(self, builder, address, owner, end):
        """This lane's elements of a tile under the words of lane ``owner`` and on, but not from element ``end`` on."""
        return self._load_places(builder, self._batch(builder, address, owner, end))

    def _store_batch(self, builder, address, owner, end, batch, word, affine):
        affine = parts(builder, affine)
        for i, (at, inside) in enumerate(self._batch(builder, address, owner, end)):
            bits = builder.lshr(
                shuffle(builder, word, builder.add(owner, constant(i))), _read_special(builder, "laneid")
            )
            with builder.if_then(inside):
                self._put_item(builder, at, builder.extract_value(batch, i), bits, affine)

    def _batch(self, builder, address, owner, end):
        first = builder.add(builder.shl(owner, constant(5)), _read_special(builder, "laneid"))
        for i in range(BATCH):
            element = builder.add(first, constant(i * LANES))
            offset = builder.mul(builder.zext(element, I64), constant(self.item_bytes, I64))
            yield builder.add(address, offset), builder.icmp_unsigned("<", element, end)

    def _load_four(self, builder, address, first, end):
        """Element ``first``, at ``address``, ``first + 16`` and on; those from ``end`` on are not read."""
        return self._load_places(builder, self._four(builder, address, first, end))

    def _store_four(self, builder, address, first, end, four, factors):
        """Each by its own factor."""
        zero = ir.Constant(self._computed, 0)
        for i, (at, inside) in enumerate(self._four(builder, address, first, end)):
            with builder.if_then(inside):
                factor = builder.fpext(builder.extract_value(factors, i), self._computed)
                self._put_item(builder, at, builder.extract_value(four, i), constant(1), (factor, zero, zero))

    def _four(self, builder, address, first, end):
        for step in range(0, 4 * NOISE_COUNTERS, NOISE_COUNTERS):
            inside = builder.icmp_unsigned("<", builder.add(first, constant(step, I64)), end)
            yield builder.add(address, constant(step * self.item_bytes, I64)), inside

    def _load_places(self, builder, places):
        """What lies at each address that has an element."""
        items = []
        for at, inside in list(places):
            before = builder.block
            with builder.if_then(inside):
                loaded = self._load_item(builder, at)
                there = builder.block
            item = builder.phi(self._item)
            item.add_incoming(ir.Constant(self._item, 0), before)
            item.add_incoming(loaded, there)
            items.append(item)
        return items

    # ---- one vector, one element ----

    def _load_vector(self, builder, address):
        vector = ir.VectorType(self._register, self._registers)
        loaded = builder.load(_pointer(builder, address, vector), align=VECTOR_BYTES)
        return [builder.extract_element(loaded, constant(i)) for i in range(self._registers)]

    def _store_vector(self, builder, address, vector, bits, affine):
        self._put_vector(builder, address, parts(builder, vector), bits, parts(builder, affine))

    def _put_vector(self, builder, address, registers, bits, affine):
        """Elements under the low bits of ``bits``, each register holding one element or two."""
        numbers = [number for register in registers for number in self._numbers(builder, register)]
        kept = [self._affine(builder, n, self._bit(builder, bits, i), affine) for i, n in enumerate(numbers)]
        self._write_vector(builder, address, kept)

    def _load_item(self, builder, address):
        return builder.load(_pointer(builder, address, self._item), align=self.item_bytes)

    def _store_item(self, builder, address, item, bits, affine):
        self._put_item(builder, address, item, bits, parts(builder, affine))

    def _put_item(self, builder, address, item, bits, affine):
        kept = self._affine(builder, self.number_of(builder, item), self._bit(builder, bits, 0), affine)
        self.write(builder, address, [kept])

    # ---- numbers ----

    def read(self, builder, address, count):
        """The numbers that lie at an address: one, or so many in whole vectors."""
        if count == 1:
            return [self.number_of(builder, self._load_item(builder, address))]
        starts = [builder.add(address, constant(at, I64)) for at in range(0, count * self.item_bytes, VECTOR_BYTES)]
        registers = [register for at in starts for register in self._load_vector(builder, at)]
        return [number for register in registers for number in self._numbers(builder, register)]

    def write(self, builder, address, numbers):
        """Likewise."""
        if len(numbers) == 1:
            item = self.item_of(builder, numbers[0])
            builder.store(item, _pointer(builder, address, self._item), align=self.item_bytes)
            return
        for i in range(0, len(numbers), self.vector_items):
            at = builder.add(address, constant(i * self.item_bytes, I64))
            self._write_vector(builder, at, numbers[i : i + self.vector_items])

    def number_of(self, builder, item):
        """A stored element as it is computed in."""
        return self._widen(builder, item) if self.item_bytes == 2 else builder.bitcast(item, self._computed)

    def item_of(self, builder, number):
        """A number as it is stored."""
        return self._narrow(builder, number) if self.item_bytes == 2 else builder.bitcast(number, self._item)

    def _numbers(self, builder, register):
        if self.item_bytes == 2:
            return [self._widen(builder, half) for half in _halves(builder, register)]
        return [builder.bitcast(register, self._computed)]

    def _write_vector(self, builder, address, numbers):
        result = ir.Constant(ir.VectorType(self._register, self._registers), ir.Undefined)
        per = self.vector_items // self._registers
        for i in range(self._registers):
            own = numbers[i * per : (i + 1) * per]
            register = self._narrow_pair(builder, *own) if per == 2 else builder.bitcast(own[0], self._register)
            result = builder.insert_element(result, register, constant(i))
        builder.store(result, _pointer(builder, address, result.type), align=VECTOR_BYTES)

    # ---- arithmetic ----

    def _bit(self, builder, bits, i):
        return builder.icmp_unsigned("!=", builder.and_(bits, constant(1 << i)), constant(0))

    def _affine(self, builder, value, keep, affine):
        """Two roundings, as everywhere: nothing may contract them to one."""
        a, b, c = affine
        suffix = "d" if self.dtype == FLOAT64 else "f"
        kept = call(builder, f"llvm.nvvm.mul.rn.{suffix}", value.type, value, a)
        if not self.plain:
            kept = call(builder, f"llvm.nvvm.add.rn.{suffix}", value.type, kept, b)
        return builder.select(keep, kept, c)

    def _widen(self, builder, half):
        if self.dtype == FLOAT16:
            return builder.fpext(builder.bitcast(half, F16), F32)
        return builder.bitcast(builder.shl(builder.zext(half, I32), constant(16)), F32)

    def _narrow(self, builder, value):
        if self.dtype == FLOAT16:
            return builder.bitcast(builder.fptrunc(value, F16), I16)
        if self.cc >= (8, 0):
            return _assembly(builder, I16, "cvt.rn.bf16.f32 $0, $1;", "=h,f", value)
        bits = builder.bitcast(value, I32)
        odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
        rounded = builder.add(builder.add(bits, constant(0x7FFF)), odd)
        nan = builder.fcmp_unordered("uno", value, value)
        return builder.trunc(builder.lshr(builder.select(nan, constant(0x7FFF0000), rounded), constant(16)), I16)

    def _narrow_pair(self, builder, low, high):
        if self.cc >= (8, 0):
            kind = "f16x2" if self.dtype == FLOAT16 else "bf16x2"
            return _assembly(builder, I32, f"cvt.rn.{kind}.f32 $0, $2, $1;", "=r,f,f", low, high)
        low, high = (builder.zext(self._narrow(builder, value), I32) for value in (low, high))
        return builder.or_(low, builder.shl(high, constant(16)))

    def _multiply(self, builder, c, m):
        """Low 32 bits by low 32 bits, in the one instruction there is for it."""
        low = [builder.trunc(factor, I32) for factor in (c, m)]
        return _assembly(builder, I64, "mul.wide.u32 $0, $1, $2;", "=l,r,r", *low)

    def _multiply_high(self, builder, a, b):
        product = builder.mul(builder.zext(a, I128), builder.zext(b, I128))
        return builder.trunc(builder.lshr(product, constant(64, I128)), I64)

    def _scale(self, builder, a, kept_at):
        """a; counted, a by the count that lies at an address, and 0 by none."""
        if not self.counted:
            return a
        kept = builder.load(_pointer(builder, kept_at, I64), align=8)
        quotient = builder.fdiv(a, builder.uitofp(kept, F64))
        none = builder.icmp_unsigned("==", kept, constant(0, I64))
        return builder.fptrunc(builder.select(none, ir.Constant(F64, 0), quotient), self._computed)

    def _divide(self, builder, n, multiplier, shift):
        """n, below 2**31, by the extent that `reciprocal` gave the other two for."""
        product = builder.mul(builder.zext(n, I64), builder.zext(multiplier, I64))
        return builder.trunc(builder.lshr(product, builder.zext(shift, I64)), I32)

    def _plane_mask(self, builder, threshold, k):
        """Bit ``31 - k`` of the threshold, spread to a whole word."""
        return builder.ashr(builder.shl(threshold, k), constant(31))

    def _uniform(self, builder, value):
        """A number that all lanes share, in a form that tells the compiler so."""
        return shuffle(builder, value, constant(0))

    def _any_lane(self, builder, flag):
        return call(builder, "llvm.nvvm.vote.any.sync", I1, constant(-1), flag)

    def _sum_lanes(self, builder, value):
        for step in (16, 8, 4, 2, 1):
            value = builder.add(value, shuffle(builder, value, constant(step), "bfly"))
        return value

    def _add_long(self, builder, address, value):
        """To what lies there, at once."""
        builder.atomic_rmw("add", _pointer(builder, address, I64), value, "monotonic")


def define(returns: Any, parameters: tuple[Any, ...], body: Callable[..., Any]) -> Any:
    """An intrinsic; ``body(builder, *values)`` emits it and returns its value, a list for a tuple."""
    return define_in_context(returns, parameters, lambda context, builder, *values: body(builder, *values))


def define_in_context(returns: Any, parameters: tuple[Any, ...], body: Callable[..., Any]) -> Any:
    """The same for a body that gets Numba's context first."""

    def codegen(context, builder, signature, arguments):
        result = body(context, builder, *arguments)
        if result is None:
            return context.get_dummy_value()
        return context.make_tuple(builder, returns, result) if isinstance(returns, types.UniTuple) else result

    def word(typingctx, *arguments):
        return returns(*parameters), codegen

    # Numba binds arguments to names and refuses to collect them.
    names = ("typingctx", *(f"p{i}" for i in range(len(parameters))))
    word.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    return intrinsic(word)


def _special(name: str) -> Any:
    """A special register, as uint32."""
    return define(types.uint32, (), lambda builder: _read_special(builder, name))


def _read_special(builder, name):
    return call(builder, f"llvm.nvvm.read.ptx.sreg.{name}", I32)


def parts(builder, value):
    """The elements of a tuple."""
    return [builder.extract_value(value, i) for i in range(value.type.count)]


def operation(name: str) -> Callable[..., Any]:
    """An intrinsic of LLVM's whose result and arguments are of one type."""
    return lambda builder, *values: call(builder, f"llvm.{name}", values[0].type, *values)


def _load(type: Any) -> Callable[..., Any]:
    def load(builder, address):
        return builder.load(_pointer(builder, address, type), align=type.width // 8)

    return load


def _store(builder, address, value):
    builder.store(value, _pointer(builder, address, value.type), align=value.type.width // 8)


def _pointer(builder, address, type):
    return builder.inttoptr(address, ir.PointerType(type, GLOBAL))


def _halves(builder, register):
    return builder.trunc(register, I16), builder.trunc(builder.lshr(register, constant(16)), I16)


def shuffle(builder, word, lane, mode="idx"):
    """The word that another lane holds: ``lane`` is its number, or, "bfly", what it differs in."""
    return call(builder, f"llvm.nvvm.shfl.sync.{mode}.i32", I32, constant(-1), word, lane, constant(LANES - 1))


def call(builder, name, returns, *arguments):
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(returns, [argument.type for argument in arguments]), name
    )
    return builder.call(function, arguments)


def _assembly(builder, returns, text, constraints, *arguments):
    kind = ir.FunctionType(returns, [argument.type for argument in arguments])
    return builder.call(ir.InlineAsm(kind, text, constraints), arguments)
