"""Sixteen float32 lanes as one value inside Numba kernels: a type over LLVM's <16 x float>.

LLVM does not vectorise the rasteriser's loops by itself (six times slower), so the kernels name the vectors. Where
registers are narrower than 512 bits LLVM splits each operation; the results are the same to rounding.

Notation: `F` a vector of 16 floats, `M` a vector of 16 truth values, `a` a flat float32 array, `i` an element's index.
Vectors take + - * / and comparisons, with each other and with scalars, which are broadcast. Loads and stores are
unaligned and not checked against the array's end.

Arithmetic may be reordered and contracted, but NaN and infinity keep their meaning: comparisons must see bad input.

Numba caches a kernel by the content of the file it stands in, not of this one. After a change here, or of a constant
that the kernels import, delete render/__pycache__.
"""

# pyright: reportOptionalCall=false, reportArgumentType=false, reportCallIssue=false
# Numba's and llvmlite's registries have no types.
# ruff: noqa: PLR0913 (a vector's lanes are arguments)

import operator
from typing import no_type_check

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16
FAST = ("reassoc", "nsz", "arcp", "contract", "afn")

_I1, _I8, _I32, _I64, _F32 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_F = ir.VectorType(_F32, LANES)
_I = ir.VectorType(_I32, LANES)
_M = ir.VectorType(_I1, LANES)


class _Float16Lanes(types.Type):
    def __init__(self):
        super().__init__("float32x16")


class _Mask16Lanes(types.Type):
    def __init__(self):
        super().__init__("mask16")


F, M = _Float16Lanes(), _Mask16Lanes()


@register_model(_Float16Lanes)
class _FloatModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _F)


@register_model(_Mask16Lanes)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _M)


# LLVM building blocks


def _constant(value) -> ir.Constant:
    values = [float(v) for v in value] if isinstance(value, (list, tuple)) else [float(value)] * LANES
    return ir.Constant(_F, values)


def _integers(value) -> ir.Constant:
    return ir.Constant(_I, [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)] * LANES)


def _spread(builder, scalar):
    first = builder.insert_element(ir.Constant(_F, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, ir.Constant(_F, ir.Undefined), _integers(0))


def _as_vector(builder, kind, value):
    """A vector, or a float or integer scalar of any width spread over the lanes."""
    if isinstance(kind, _Float16Lanes):
        return value
    if isinstance(kind, types.Float):
        return _spread(builder, value if kind.bitwidth == 32 else builder.fptrunc(value, _F32))
    return _spread(builder, builder.sitofp(value, _F32))


def _call(builder, name, *args, kind=_F):
    function_type = ir.FunctionType(kind, [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, args, fastmath=FAST)


def _pointer(context, builder, array_type, array, index, kind):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def _pick(builder, vectors, sources):
    """A vector whose lane l is element `sources[l]` of the concatenated `vectors`."""
    result = None
    for k, v in enumerate(vectors):
        lanes = [s - LANES * k if s // LANES == k else None for s in sources]
        if all(x is None for x in lanes):
            continue
        if result is None:
            result = builder.shuffle_vector(v, v, _integers([x or 0 for x in lanes]))
        else:
            mask = [l if x is None else LANES + x for l, x in enumerate(lanes)]
            result = builder.shuffle_vector(result, v, _integers(mask))
    return result


# Operators


def _is_vector_operation(args) -> bool:
    return (
        len(args) == 2
        and any(isinstance(a, _Float16Lanes) for a in args)
        and all(isinstance(a, (_Float16Lanes, types.Float, types.Integer)) for a in args)
    )


def _register(op, result, build) -> None:
    @infer_global(op)
    class Template(AbstractTemplate):
        def generic(self, args, kws):
            return signature(result, *args) if _is_vector_operation(args) else None

    def lower(context, builder, sig, args):
        return build(builder, *(_as_vector(builder, kind, a) for kind, a in zip(sig.args, args, strict=True)))

    for scalar in (types.Float, types.Integer, _Float16Lanes):
        lower_builtin(op, _Float16Lanes, scalar)(lower)
        if scalar is not _Float16Lanes:
            lower_builtin(op, scalar, _Float16Lanes)(lower)


for _op, _name in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv")):
    for _form in (_op, getattr(operator, "i" + _op.__name__)):
        _register(_form, F, lambda builder, x, y, name=_name: getattr(builder, name)(x, y, flags=FAST))
for _op, _name in ((operator.lt, "<"), (operator.le, "<="), (operator.gt, ">"), (operator.ge, ">=")):
    _register(_op, M, lambda builder, x, y, name=_name: builder.fcmp_ordered(name, x, y))


@infer_global(operator.and_)
class _And(AbstractTemplate):
    def generic(self, args, kws):
        return signature(M, M, M) if len(args) == 2 and all(isinstance(a, _Mask16Lanes) for a in args) else None


@lower_builtin(operator.and_, _Mask16Lanes, _Mask16Lanes)
def _lower_and(context, builder, sig, args):
    return builder.and_(*args)


@infer_global(operator.neg)
class _Negative(AbstractTemplate):
    def generic(self, args, kws):
        return signature(F, F) if len(args) == 1 and isinstance(args[0], _Float16Lanes) else None


@lower_builtin(operator.neg, _Float16Lanes)
def _lower_neg(context, builder, sig, args):
    return builder.fneg(args[0])


# Values


@intrinsic
@no_type_check  # Numba must compile the function itself, not a checked wrapper
def vector(typing, x):
    """F with the scalar x in every lane."""
    if isinstance(x, (types.Float, types.Integer)):
        return F(x), lambda context, builder, sig, args: _as_vector(builder, sig.args[0], args[0])


def _ramp(values):
    @intrinsic
    def ramp(typing):
        return F(), lambda context, builder, sig, args: _constant(values)

    return ramp


block_x = _ramp([k % 4 for k in range(LANES)])  # a 4x4 block of pixels, row by row
block_y = _ramp([k // 4 for k in range(LANES)])
block_rows_twice = _ramp([4 * (k % 8) for k in range(LANES)])
right_then_left = _ramp([1.0] * 8 + [-1.0] * 8)


@intrinsic
@no_type_check
def where(typing, mask, x, y):
    """Lane by lane x where the mask holds, else y; either may be a scalar."""

    def build(context, builder, sig, args):
        x, y = (_as_vector(builder, kind, a) for kind, a in zip(sig.args[1:], args[1:], strict=True))
        return builder.select(args[0], x, y)

    return F(M, x, y), build


def _extremum(comparison):
    @intrinsic
    def extremum(typing, x, y):
        def build(context, builder, sig, args):
            x, y = (_as_vector(builder, kind, a) for kind, a in zip(sig.args, args, strict=True))
            return builder.select(builder.fcmp_ordered(comparison, x, y), x, y)

        return F(x, y), build

    return extremum


minimum, maximum = _extremum("<"), _extremum(">")  # y where either is NaN, as the processor's own instruction


@intrinsic
@no_type_check
def quotient(typing, x, y):
    """x / y for finite values, by the processor's estimate and a Newton step where it has one: a third of the time."""
    flags = (*FAST, "ninf")
    return F(F, F), lambda context, builder, sig, args: builder.fdiv(*args, flags=flags)


@intrinsic
@no_type_check
def any_lane(typing, mask):
    """Whether the mask holds in some lane."""

    def build(context, builder, sig, args):
        bits = builder.bitcast(args[0], ir.IntType(LANES))
        return builder.icmp_unsigned("!=", bits, ir.Constant(ir.IntType(LANES), 0))

    return types.boolean(M), build


def _unary(name):
    @intrinsic
    def unary(typing, x):
        return F(F), lambda context, builder, sig, args: _call(builder, f"llvm.{name}.v16f32", args[0])

    return unary


vsqrt, vfloor, vceil, vabs = _unary("sqrt"), _unary("floor"), _unary("ceil"), _unary("fabs")


@intrinsic
@no_type_check
def vexp(typing, x):
    """e^x to about 1e-7, x clamped to [-87, 88]: 2^k e^r, r = x - k ln 2, by a fitted polynomial of degree 6."""

    def build(context, builder, sig, args):
        def add(a, b):
            return builder.fadd(a, b, flags=("contract",))

        def mul(a, b):
            return builder.fmul(a, b, flags=("contract",))

        low, high = _constant(-87.0), _constant(88.0)
        x = builder.select(builder.fcmp_ordered(">", args[0], low), args[0], low)
        x = builder.select(builder.fcmp_ordered("<", x, high), x, high)
        k = _call(builder, "llvm.rint.v16f32", mul(x, _constant(1.4426950408889634)))
        # ln 2 in two parts, so that r keeps its last bits. No reassociation here, or they are lost.
        r = add(add(x, mul(k, _constant(-0.693359375))), mul(k, _constant(2.12194440e-4)))
        p = _constant(1.3835813e-3)
        for c in (8.3756354e-3, 4.1668288e-2, 1.6666411e-1, 0.49999991, 1.0, 1.0):
            p = add(mul(p, r), _constant(c))
        exponent = builder.shl(builder.add(builder.fptosi(k, _I), _integers(127)), _integers(23))
        return mul(p, builder.bitcast(exponent, _F))

    return F(F), build


@intrinsic
@no_type_check
def vlog(typing, x):
    """ln x for normal x > 0 to 1e-7: x = 2^k m, m in [sqrt(1/2), sqrt 2), and the series of 2 atanh((m-1) / (m+1))."""

    def build(context, builder, sig, args):
        def add(a, b):
            return builder.fadd(a, b, flags=FAST)

        def mul(a, b):
            return builder.fmul(a, b, flags=FAST)

        sqrt_half = _integers(0x3F3504F3)
        shifted = builder.sub(builder.bitcast(args[0], _I), sqrt_half)
        k = builder.sitofp(builder.ashr(shifted, _integers(23)), _F)
        m = builder.bitcast(builder.add(builder.and_(shifted, _integers(0x7FFFFF)), sqrt_half), _F)
        s = builder.fdiv(add(m, _constant(-1)), add(m, _constant(1)), flags=FAST)
        s2 = mul(s, s)
        p = _constant(2 / 9)
        for c in (2 / 7, 2 / 5, 2 / 3, 2.0):
            p = add(mul(p, s2), _constant(c))
        return add(mul(p, s), mul(k, _constant(0.6931471805599453)))

    return F(F), build


@intrinsic
@no_type_check
def lane(typing, x, l):
    """Lane l of x, a scalar."""

    def build(context, builder, sig, args):
        return builder.extract_element(args[0], builder.trunc(args[1], _I32))

    return types.float32(F, types.intp), build


@intrinsic
@no_type_check
def lane_sum(typing, x):
    """The sum of the lanes, a scalar."""

    def build(context, builder, sig, args):
        return _call(builder, "llvm.vector.reduce.fadd.v16f32", ir.Constant(_F32, 0.0), args[0], kind=_F32)

    return types.float32(F), build


@intrinsic
@no_type_check
def lane_sums_of_8(typing, a, b, c, d, e, f, g, h):
    """F whose lanes 0..7 are the lane sums of the eight vectors; lanes 8..15 repeat them. 15 additions, not 8 x 4."""

    def build(context, builder, sig, args):
        vectors, half = list(args), LANES // 2
        while len(vectors) > 1:  # each round halves the number of vectors and the number of lanes that are one vector's
            joined = []
            for x, y in zip(vectors[::2], vectors[1::2], strict=True):
                starts = range(0, 2 * LANES, 2 * half)
                low = _pick(builder, (x, y), [s + k for s in starts for k in range(half)])
                high = _pick(builder, (x, y), [s + half + k for s in starts for k in range(half)])
                joined.append(builder.fadd(low, high, flags=FAST))
            vectors, half = joined, half // 2
        x = vectors[0]
        even, odd = [2 * k for k in range(8)] * 2, [2 * k + 1 for k in range(8)] * 2
        return builder.fadd(_pick(builder, (x,), even), _pick(builder, (x,), odd), flags=FAST)

    return F(*[F] * 8), build


# Memory


@intrinsic
@no_type_check
def load(typing, a, i):
    """F from a[i : i + 16]."""

    def build(context, builder, sig, args):
        return builder.load(_pointer(context, builder, sig.args[0], args[0], args[1], _F), align=4)

    return F(a, types.intp), build


@intrinsic
@no_type_check
def store(typing, a, i, x):
    """a[i : i + 16] = x."""

    def build(context, builder, sig, args):
        builder.store(args[2], _pointer(context, builder, sig.args[0], args[0], args[1], _F), align=4)
        return context.get_dummy_value()

    return types.void(a, types.intp, F), build


@intrinsic
@no_type_check
def load_scalar(typing, a, i):
    """F with a[i] in every lane."""

    def build(context, builder, sig, args):
        return _spread(builder, builder.load(_pointer(context, builder, sig.args[0], args[0], args[1], _F32), align=4))

    return F(a, types.intp), build


def _load_rows(width):
    @intrinsic
    def load_rows(typing, a, i):
        def build(context, builder, sig, args):
            offsets = [builder.add(args[1], ir.Constant(_I64, LANES * k)) for k in range(width)]
            pointers = [_pointer(context, builder, sig.args[0], args[0], o, _F) for o in offsets]
            raw = [builder.load(p, align=4) for p in pointers]
            columns = [_pick(builder, raw, [l * width + j for l in range(LANES)]) for j in range(width)]
            return context.make_tuple(builder, sig.return_type, columns)

        return types.UniTuple(F, width)(a, types.intp), build

    return load_rows


def _store_rows(width):
    @intrinsic
    def store_rows(typing, a, i, columns):
        def build(context, builder, sig, args):
            columns = [builder.extract_value(args[2], j) for j in range(width)]
            for k in range(width):
                flat = range(LANES * k, LANES * (k + 1))
                row = _pick(builder, columns, [LANES * (f % width) + f // width for f in flat])
                offset = builder.add(args[1], ir.Constant(_I64, LANES * k))
                builder.store(row, _pointer(context, builder, sig.args[0], args[0], offset, _F), align=4)
            return context.get_dummy_value()

        return types.void(a, types.intp, types.UniTuple(F, width)), build

    return store_rows


# 16 rows of 2 (3, 4, 16) floats from a[i] on <-> a tuple of 2 (3, 4, 16) columns
load_rows_of_3, load_rows_of_4 = _load_rows(3), _load_rows(4)
store_rows_of_2, store_rows_of_3, store_rows_of_4 = _store_rows(2), _store_rows(3), _store_rows(4)


def _transposed(builder, vectors):
    for half in (8, 4, 2, 1):  # butterflies: swap the off-diagonal quarters of ever smaller squares
        result = list(vectors)
        for k in range(LANES):
            if k & half:
                continue
            x, y = vectors[k], vectors[k | half]
            low = [l if not l & half else LANES + (l ^ half) for l in range(LANES)]
            high = [l | half if not l & half else LANES + l for l in range(LANES)]
            result[k] = _pick(builder, (x, y), low)
            result[k | half] = _pick(builder, (x, y), high)
        vectors = result
    return vectors


@intrinsic
@no_type_check
def load_rows_of_16(typing, a, i):
    """A tuple of 16 columns from the 16 x 16 floats at a[i]."""

    def build(context, builder, sig, args):
        offsets = [builder.add(args[1], ir.Constant(_I64, LANES * k)) for k in range(LANES)]
        rows = [builder.load(_pointer(context, builder, sig.args[0], args[0], o, _F), align=4) for o in offsets]
        return context.make_tuple(builder, sig.return_type, _transposed(builder, rows))

    return types.UniTuple(F, LANES)(a, types.intp), build


@intrinsic
@no_type_check
def store_rows_of_16(typing, a, i, columns):
    """16 rows of 16 floats from a[i] on, row l holding lane l of every column."""

    def build(context, builder, sig, args):
        rows = _transposed(builder, [builder.extract_value(args[2], k) for k in range(LANES)])
        for k, row in enumerate(rows):
            offset = builder.add(args[1], ir.Constant(_I64, LANES * k))
            builder.store(row, _pointer(context, builder, sig.args[0], args[0], offset, _F), align=4)
        return context.get_dummy_value()

    return types.void(a, types.intp, types.UniTuple(F, LANES)), build


_QUARTER = ir.VectorType(_F32, 4)


@intrinsic
@no_type_check
def load_block(typing, a, i, stride):
    """F from a 4 x 4 block of an image: four floats at each of a[i], a[i + stride], ..."""

    def build(context, builder, sig, args):
        index, rows = args[1], []
        for _ in range(4):
            rows.append(builder.load(_pointer(context, builder, sig.args[0], args[0], index, _QUARTER), align=4))
            index = builder.add(index, args[2])
        eight = ir.Constant(ir.VectorType(_I32, 8), list(range(8)))
        top, bottom = builder.shuffle_vector(rows[0], rows[1], eight), builder.shuffle_vector(rows[2], rows[3], eight)
        return builder.shuffle_vector(top, bottom, _integers(list(range(LANES))))

    return F(a, types.intp, types.intp), build


@intrinsic
@no_type_check
def gather_block(typing, a, i, stride_y, stride_x):
    """F from a 4 x 4 block of an image whose neighbouring pixels lie `stride_x` apart."""

    def build(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        result, row = ir.Constant(_F, ir.Undefined), args[1]
        for r in range(4):
            index = row
            for k in range(4):
                value = builder.load(builder.gep(data, [index]), align=4)
                result = builder.insert_element(result, value, ir.Constant(_I32, 4 * r + k))
                index = builder.add(index, args[3])
            row = builder.add(row, args[2])
        return result

    return F(a, types.intp, types.intp, types.intp), build


@intrinsic
@no_type_check
def store_block(typing, a, i, stride, x):
    """The reverse of load_block."""

    def build(context, builder, sig, args):
        index = args[1]
        for r in range(4):
            four = ir.Constant(ir.VectorType(_I32, 4), [4 * r + k for k in range(4)])
            row = builder.shuffle_vector(args[3], args[3], four)
            builder.store(row, _pointer(context, builder, sig.args[0], args[0], index, _QUARTER), align=4)
            index = builder.add(index, args[2])
        return context.get_dummy_value()

    return types.void(a, types.intp, types.intp, F), build


@intrinsic
@no_type_check
def prefetch(typing, a, i):
    """Ask for the cache line of a[i]."""

    def build(context, builder, sig, args):
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], _I8)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, ir.Constant(_I32, 0), ir.Constant(_I32, 3), ir.Constant(_I32, 1)])
        return context.get_dummy_value()

    return types.void(a, types.intp), build


# Bits and threads


@intrinsic
@no_type_check
def trailing_zeros(typing, x):
    """How many zero bits x has below its lowest one; x must not be 0."""
    return types.uint64(types.uint64), lambda context, builder, sig, args: builder.cttz(args[0], ir.Constant(_I1, 1))


@intrinsic
@no_type_check
def row_bits(typing, edges, ok):
    """uint64 of 8 x 8 bits: bit 8 r + c is set where edges[8 + r] < c + 1 and c < edges[r]; columns c are 1 wide.

    So lanes 0..7 hold the right edges of eight rows and lanes 8..15 the left ones; rows where `ok` fails are empty.
    """

    def build(context, builder, sig, args):
        edges, ok = args
        eight = ir.VectorType(_I32, 8)
        # The first column right of an edge: ceil for right edges (the row ends before it), floor for left ones.
        right = ir.Constant(_M, [True] * 8 + [False] * 8)
        edges = builder.select(
            right, _call(builder, "llvm.ceil.v16f32", edges), _call(builder, "llvm.floor.v16f32", edges)
        )
        edges = builder.select(builder.fcmp_ordered(">", edges, _constant(0)), edges, _constant(0))
        edges = builder.select(builder.fcmp_ordered("<", edges, _constant(8)), edges, _constant(8))
        bits = builder.select(ok, builder.shl(_integers(1), builder.fptosi(edges, _I)), _integers(0))
        end = builder.shuffle_vector(bits, bits, ir.Constant(eight, list(range(8))))
        first = builder.shuffle_vector(bits, bits, ir.Constant(eight, list(range(8, 16))))
        zero = ir.Constant(eight, [0] * 8)
        rows = builder.select(builder.icmp_signed(">", end, first), builder.sub(end, first), zero)
        return builder.bitcast(builder.trunc(rows, ir.VectorType(_I8, 8)), _I64)

    return types.uint64(F, M), build
