"""Triton kernels whose PTX a compiler that we did not write decides: what the emulator is checked with from outside.

Matrices are row-major. A stride that is passed as the constant 1 lets the compiler use wide copies.
"""

# Triton reads these functions' annotations and bodies itself.
import triton
import triton.language as tl


@triton.jit
def matmul(
    a, b, c, rows, columns, depth, a_row, a_depth, b_depth, b_column,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c (rows, columns) = a (rows, depth) · b (depth, columns), both with any strides."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, depth, BLOCK_DEPTH):
        across = first + tl.arange(0, BLOCK_DEPTH)[None, :]
        down = first + tl.arange(0, BLOCK_DEPTH)[:, None]
        left = tl.load(a + row * a_row + across * a_depth, mask=(row < rows) & (across < depth), other=0.0)
        right = tl.load(b + down * b_depth + column * b_column, mask=(down < depth) & (column < columns), other=0.0)
        product = tl.dot(left, right, product, input_precision=PRECISION)
    tl.store(c + row * columns + column, product, mask=(row < rows) & (column < columns))


@triton.jit
def matmul_by_tma(
    a, b, c, depth, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The same with tensor maps; a transposed operand lies as (depth, rows) or (columns, depth)."""
    row = tl.program_id(0) * BLOCK_ROWS
    column = tl.program_id(1) * BLOCK_COLUMNS
    product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, depth, BLOCK_DEPTH):
        left = a.load([first, row]).T if A_TRANSPOSED else a.load([row, first])
        right = b.load([column, first]).T if B_TRANSPOSED else b.load([first, column])
        product = tl.dot(left, right, product)
    c.store([row, column], product.to(c.dtype))


@triton.jit
def copy_by_tma(source, target, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    row = tl.program_id(0) * BLOCK_ROWS
    column = tl.program_id(1) * BLOCK_COLUMNS
    target.store([row, column], source.load([row, column]))


@triton.jit
def add_by_tma(source, total, BLOCK_ROWS: tl.constexpr):
    total.atomic_add([0, 0], source.load([tl.program_id(0) * BLOCK_ROWS, 0]))


@triton.jit
def softmax(x, y, n, BLOCK: tl.constexpr):
    """Rows of n values."""
    column = tl.arange(0, BLOCK)
    values = tl.load(x + tl.program_id(0) * n + column, mask=column < n, other=-float("inf"))
    powers = tl.exp(values - tl.max(values, 0))
    tl.store(y + tl.program_id(0) * n + column, powers / tl.sum(powers, 0), mask=column < n)


@triton.jit
def _absorb(scores, values, out, total, maximum):
    """One step of a running softmax; scores in base 2."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    powers = tl.exp2(scores - new_maximum[:, None])
    factor = tl.exp2(maximum - new_maximum)
    out = tl.dot(powers.to(values.dtype), values, out * factor[:, None])
    return out, total * factor + tl.sum(powers, 1), new_maximum


@triton.jit
def attention(
    q, k, v, out, lse, tokens, scale_log2,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Heads of (tokens, CHANNELS); lse in base 2."""
    head = tl.program_id(1) * tokens
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    channel = tl.arange(0, CHANNELS)
    here = (head + query)[:, None] * CHANNELS + channel[None, :]
    r_q = tl.load(q + here, mask=query[:, None] < tokens, other=0.0)
    maximum = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    r_out = tl.zeros((QUERIES, CHANNELS), tl.float32)
    end = tl.minimum(tokens, (tl.program_id(0) + 1) * QUERIES) if CAUSAL else tokens
    for first in range(0, end, KEYS):
        key = first + tl.arange(0, KEYS)
        there = (head + key)[:, None] * CHANNELS + channel[None, :]
        r_k = tl.load(k + there, mask=key[:, None] < tokens, other=0.0)
        r_v = tl.load(v + there, mask=key[:, None] < tokens, other=0.0)
        counts = key[None, :] < tokens
        if CAUSAL:
            counts = counts & (key[None, :] <= query[:, None])
        scores = tl.where(counts, tl.dot(r_q, tl.trans(r_k)) * scale_log2, -float("inf"))
        r_out, total, maximum = _absorb(scores, r_v, r_out, total, maximum)
    r_out = r_out / total[:, None]
    tl.store(out + here, r_out.to(out.dtype.element_ty), mask=query[:, None] < tokens)
    tl.store(lse + head + query, maximum + tl.log2(total), mask=query < tokens)


@triton.jit
def attention_by_tma(
    q, k, v, out, tokens, scale_log2, QUERIES: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Heads of whole blocks of tokens, below each other."""
    first_row = tl.program_id(1) * tokens
    row = first_row + tl.program_id(0) * QUERIES
    r_q = q.load([row, 0])
    maximum = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    r_out = tl.zeros((QUERIES, CHANNELS), tl.float32)
    for first in range(0, tokens, KEYS):
        scores = tl.dot(r_q, k.load([first_row + first, 0]).T) * scale_log2
        r_out, total, maximum = _absorb(scores, v.load([first_row + first, 0]), r_out, total, maximum)
    out.store([row, 0], (r_out / total[:, None]).to(out.dtype))


@triton.jit
def atomics(x, bin_of, sums, counts, total, largest, smallest_bin, n, BLOCK: tl.constexpr):
    """Histogram, sum and extremes."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    where = tl.load(bin_of + i, mask=i < n, other=1 << 20)
    tl.atomic_add(sums + where, value, mask=i < n)
    tl.atomic_add(counts + where, 1, mask=i < n)
    tl.atomic_add(total, tl.sum(value, 0))
    tl.atomic_max(largest, tl.max(value, 0))
    tl.atomic_min(smallest_bin, tl.min(where, 0))


@triton.jit
def compare_and_swap(locks, winners, BLOCK: tl.constexpr):
    """The first of the programs to find its lock open takes it."""
    mine = tl.program_id(0) % BLOCK
    found = tl.atomic_cas(locks + mine, 0, 1, sem="acq_rel")
    if found == 0:
        tl.atomic_add(winners + mine, 1, sem="relaxed")


@triton.jit
def reductions(x, column_sums, row_maxima, row_arguments, running, ordered, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    place = row[:, None] * COLUMNS + column[None, :]
    values = tl.load(x + place)
    tl.store(column_sums + column, tl.sum(values, 0))
    tl.store(row_maxima + row, tl.max(values, 1))
    tl.store(row_arguments + row, tl.argmax(values, 1))
    tl.store(running + place, tl.cumsum(values, 1))
    tl.store(ordered + place, tl.sort(values))


@triton.jit
def transpose(x, y, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (row[:, None] < ROWS) & (column[None, :] < COLUMNS)
    values = tl.load(x + row[:, None] * COLUMNS + column[None, :], mask=there)
    back = (row[None, :] < ROWS) & (column[:, None] < COLUMNS)
    tl.store(y + column[:, None] * ROWS + row[None, :], tl.trans(values), mask=back)


@triton.jit
def functions(x, y, BLOCK: tl.constexpr):
    """One row of results per function."""
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    size = tl.abs(value)
    tl.store(y + i, tl.exp(value))
    tl.store(y + BLOCK + i, tl.log(size + 1.0))
    tl.store(y + 2 * BLOCK + i, tl.sqrt(size))
    tl.store(y + 3 * BLOCK + i, tl.rsqrt(size + 1.0))
    tl.store(y + 4 * BLOCK + i, tl.erf(value))
    tl.store(y + 5 * BLOCK + i, tl.floor(value))
    tl.store(y + 6 * BLOCK + i, tl.sigmoid(value))
    tl.store(y + 7 * BLOCK + i, 1.0 / (size + 1.0))


@triton.jit
def random_bits(y, seed, BLOCK: tl.constexpr):
    """Philox with ten rounds, the first of its four words."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.randint(seed, i))


@triton.jit
def conversions(x, half, bfloat, byte, quotient, remainder, wide, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    whole = value.to(tl.int32)
    tl.store(half + i, value.to(tl.float16))
    tl.store(bfloat + i, value.to(tl.bfloat16))
    tl.store(byte + i, whole.to(tl.int8))
    tl.store(quotient + i, whole // 7)
    tl.store(remainder + i, whole % 7)
    tl.store(wide + i, whole.to(tl.int64) * 0x100000001)


@triton.jit
def double_division(x, y, z, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(z + i, tl.load(x + i) / tl.load(y + i))
