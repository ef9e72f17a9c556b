"""Window attention in Triton: the code that runs on the GPU.  Imported when it is needed, for it needs triton.

One program has a block of queries of one sample and head, and goes once through the keys that they see, as
FlashAttention-2 does (arXiv 2307.08691): running maxima, sums of exponentials and sums of weighted values.  Keys come
in tiles.  A tile that all queries of the block see, or none of them, needs no mask; one that the window's edge or the
end of a sequence cuts does.  Text tokens see every key, so they are gathered into blocks of their own.

A head is HEAD columns, a power of two, and TAIL more, a power of two filled up with zeros: 72 is 64 + 16, not 128.
Tuples: ``q`` and ``v`` are (head, tail), where a TAIL of 0 is nothing; ``kv`` is where keys and values lie and how far
apart; ``sums`` are (maximum_M, exponentials_M, values_MD, values_tail_MD); ``span`` is where a block's window moves and
how far it reaches; ``cuts`` are :func:`_cuts`.

Letters: B batch, N tokens, H heads, D head width, M queries of a block, L keys of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

_STRIDES = ("q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n")


# Not compiled anew for numbers that happen to be 1 or a multiple of 16: UNIT says what matters of them.
@triton.jit(do_not_specialize=(*_STRIDES, "heads", "tokens", "window", "lead", "tail"))
def near_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    missed_ptr: tl.tensor,
    q_b: tl.tensor,
    q_h: tl.tensor,
    q_n: tl.tensor,
    k_b: tl.tensor,
    k_h: tl.tensor,
    k_n: tl.tensor,
    v_b: tl.tensor,
    v_h: tl.tensor,
    v_n: tl.tensor,
    heads: tl.tensor,
    tokens: tl.tensor,
    window: tl.tensor,
    lead: tl.tensor,
    tail: tl.tensor,
    scale: tl.tensor,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    TEXT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> None:
    """``out`` [B, N, H, D]: attention in the window, plus ``residual`` [B, N, H, D] if there is one.

    With ``missed`` [B, N, H, D] it is full attention, and there what the window misses of it.  ``q_b`` to ``v_n`` are
    strides in units of UNIT elements, so that the compiler knows how rows are aligned.  ``scale`` is for powers of two
    and above 0; ``lead`` and ``tail`` count the text tokens before and after the image, and TEXT is whether any are.
    """
    REFRESH: tl.constexpr = missed_ptr is not None
    image = tokens - lead - tail
    text_blocks = tl.cdiv(lead + tail, BLOCK_M) if TEXT else 0
    blocks = text_blocks + tl.cdiv(image, BLOCK_M)
    part = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    sample = (tl.program_id(0) // blocks // heads).to(tl.int64)
    q_ptr += (sample * q_b + head * q_h) * UNIT
    kv = k_ptr + (sample * k_b + head * k_h) * UNIT, k_n, v_ptr + (sample * v_b + head * v_h) * UNIT, v_n

    rows_M, first, last, span, words = _queries(part, text_blocks, tokens, window, lead, tail, TEXT, BLOCK_M)
    begin, end, reach = span
    origin = begin if REFRESH else tl.maximum(begin, first - reach)
    cuts = _cuts(first, last, span, origin, BLOCK_L)
    some, whole, rest, none = cuts
    texts = tl.where(words, 0, 1) if TEXT else 0

    q = _rows(q_ptr, rows_M.to(tl.int64), q_n, end, True, UNIT, WIDTH, HEAD, TAIL)
    near = _nothing(BLOCK_M, HEAD, TAIL)
    far = _nothing(BLOCK_M, HEAD, TAIL)
    if REFRESH:
        after = tl.maximum((end - begin) // BLOCK_L - none, 0)
        outside = (origin, origin + none * BLOCK_L), (some, after)
        far = _whole_tiles(far, q, kv, scale, outside, 2, UNIT, WIDTH, HEAD, TAIL, BLOCK_L)
    near, far = _cut_tiles(
        near, far, q, kv, scale, rows_M, span, origin, cuts, tokens, lead, tail, texts,
        REFRESH, TEXT, UNIT, WIDTH, HEAD, TAIL, BLOCK_L,
    )  # fmt: skip
    counts = rest - whole, texts * (lead // BLOCK_L), texts * (tail // BLOCK_L)
    inside = (origin + whole * BLOCK_L, 0, lead + image), counts
    near = _whole_tiles(near, q, kv, scale, inside, 3 if TEXT else 1, UNIT, WIDTH, HEAD, TAIL, BLOCK_L)

    at = (sample * tokens * heads + head) * WIDTH
    step = heads * WIDTH
    if REFRESH:
        full, missed = _merged(near, far)
        _store(missed_ptr + at, rows_M, step, end, missed, WIDTH, HEAD, TAIL)
        _store(out_ptr + at, rows_M, step, end, full, WIDTH, HEAD, TAIL)
    else:
        out = _divided(near)
        if residual_ptr is not None:
            residual = _rows(residual_ptr + at, rows_M.to(tl.int64), step, end, True, 1, WIDTH, HEAD, TAIL)
            out = _added(out, residual, TAIL)
        _store(out_ptr + at, rows_M, step, end, out, WIDTH, HEAD, TAIL)


@triton.jit
def _whole_tiles(
    sums: tl.tuple,
    q: tl.tuple,
    kv: tl.tuple,
    scale: tl.tensor,
    stretches: tl.tuple,
    STRETCHES: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> tl.tuple:
    """``sums`` with tiles that no mask cuts: up to three stretches of them, where they start and how many each has."""
    starts, counts = stretches
    one = counts[0]
    two = one + counts[1] if STRETCHES > 1 else one
    for i in tl.range(0, two + counts[2] if STRETCHES > 2 else two):
        start = starts[0] + i * BLOCK_L
        if STRETCHES > 1:
            start = tl.where(i < one, start, starts[1] + (i - one) * BLOCK_L)
        if STRETCHES > 2:
            start = tl.where(i < two, start, starts[2] + (i - two) * BLOCK_L)
        s_ML, v = _tile(q, kv, start, 0, False, UNIT, WIDTH, HEAD, TAIL, BLOCK_L)
        sums = _take(sums, s_ML, v, scale, False, TAIL)
    return sums


@triton.jit
def _cut_tiles(
    near: tl.tuple,
    far: tl.tuple,
    q: tl.tuple,
    kv: tl.tuple,
    scale: tl.tensor,
    rows_M: tl.tensor,
    span: tl.tuple,
    origin: tl.tensor,
    cuts: tl.tuple,
    tokens: tl.tensor,
    lead: tl.tensor,
    tail: tl.tensor,
    texts: tl.tensor,
    REFRESH: tl.constexpr,
    TEXT: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> tl.tuple:
    """Both sums with the tiles that need a mask.

    They are cut by the window, then, in a refresh, by the end of the image if the window is not there, then by the
    ends of the text before and after it.
    """
    begin, end, reach = span
    some, whole, rest, none = cuts
    tiles = (end - begin) // BLOCK_L
    left = whole - some
    cut = left + none - rest
    ragged = cut
    if REFRESH:
        ragged += tl.where((none <= tiles) & (begin + tiles * BLOCK_L < end), 1, 0)
    led = ragged + texts * tl.where(lead % BLOCK_L > 0, 1, 0)
    for i in tl.range(0, led + texts * tl.where(tail % BLOCK_L > 0, 1, 0)):
        tile = tl.where(i < left, some + i, i - left + rest)
        start, stop, within = origin + tl.where(i < cut, tile, tiles) * BLOCK_L, end, reach
        if TEXT:
            start = tl.where(i < ragged, start, lead // BLOCK_L * BLOCK_L)
            start = tl.where(i < led, start, tokens - tail % BLOCK_L)
            stop = tl.where(i < ragged, end, tl.where(i < led, lead, tokens))
            within = tl.where(i < ragged, reach, tokens)
        s_ML, v = _tile(q, kv, start, stop, True, UNIT, WIDTH, HEAD, TAIL, BLOCK_L)
        keys_L = start + tl.arange(0, BLOCK_L)
        least_M = rows_M - within
        span_M = tl.minimum(rows_M + within, stop - 1) - least_M
        # A key before the least is a large number without a sign: one comparison for both ends.
        close_ML = (keys_L[None, :] - least_M[:, None]).to(tl.uint32) <= span_M.to(tl.uint32)[:, None]
        if REFRESH:
            s_far_ML = tl.where(close_ML | (keys_L >= stop)[None, :], float("-inf"), s_ML)
            far = _take(far, s_far_ML, v, scale, True, TAIL)
        near = _take(near, tl.where(close_ML, s_ML, float("-inf")), v, scale, True, TAIL)
    return near, far


@triton.jit
def _queries(
    part: tl.tensor,
    text_blocks: tl.tensor,
    tokens: tl.tensor,
    window: tl.tensor,
    lead: tl.tensor,
    tail: tl.tensor,
    TEXT: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> tl.tuple:
    """A block's queries, the first and the last of them, the span of their window, and whether they are text."""
    begin, end, reach = lead, tokens - tail, window
    first = begin + (part - text_blocks) * BLOCK_M
    last = tl.minimum(first + BLOCK_M, end) - 1
    rows_M = first + tl.arange(0, BLOCK_M)
    words = part < text_blocks
    if TEXT:
        index_M = part * BLOCK_M + tl.arange(0, BLOCK_M)
        rows_M = tl.where(words, tl.where(index_M < lead, index_M, index_M - lead + end), rows_M)
        first, last = tl.where(words, 0, first), tl.where(words, tokens - 1, last)
        begin, end, reach = tl.where(words, 0, begin), tl.where(words, tokens, end), tl.where(words, tokens, reach)
    return rows_M, first, last, (begin, end, reach), words


@triton.jit
def _cuts(first: tl.tensor, last: tl.tensor, span: tl.tuple, origin: tl.tensor, BLOCK_L: tl.constexpr) -> tl.tuple:
    """Tiles from ``origin`` on: of [some, none) queries see something, of [whole, rest) all queries everything."""
    begin, end, reach = span
    some = (tl.maximum(begin, first - reach) - origin) // BLOCK_L
    none = tl.cdiv(tl.minimum(end, last + reach + 1) - origin, BLOCK_L)
    whole = tl.minimum(tl.cdiv(tl.maximum(begin, last - reach) - origin, BLOCK_L), none)
    rest = tl.maximum((tl.minimum(end, first + reach + 1) - origin) // BLOCK_L, whole)
    return some, whole, rest, none


@triton.jit
def _rows(
    at_ptr: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    stop: tl.tensor,
    CUT: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
) -> tl.tuple:
    """Head and tail of rows, with zeros after the last column and, if CUT, from row ``stop`` on."""
    places = at_ptr + rows[:, None] * (stride * UNIT)
    columns = tl.arange(0, HEAD)[None, :]
    there = (rows < stop)[:, None]
    if CUT:
        main = tl.load(places + columns, mask=there & (columns < WIDTH), other=0.0)
    elif HEAD > WIDTH:
        main = tl.load(places + columns, mask=columns < WIDTH, other=0.0)
    else:
        main = tl.load(places + columns)
    extra = main
    if TAIL > 0:
        columns = HEAD + tl.arange(0, TAIL)[None, :]
        if CUT:
            extra = tl.load(places + columns, mask=there & (columns < WIDTH), other=0.0)
        elif HEAD + TAIL > WIDTH:
            extra = tl.load(places + columns, mask=columns < WIDTH, other=0.0)
        else:
            extra = tl.load(places + columns)
    return main, extra


@triton.jit
def _tile(
    q: tl.tuple,
    kv: tl.tuple,
    start: tl.tensor,
    stop: tl.tensor,
    CUT: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> tl.tuple:
    """Scores of the tile of keys at ``start``, not scaled yet, and its values; zeros from ``stop`` on if CUT."""
    k_ptr, k_n, v_ptr, v_n = kv
    keys_L = tl.arange(0, BLOCK_L)
    far = start.to(tl.int64)
    k = _rows(k_ptr + far * k_n * UNIT, keys_L, k_n, stop - start, CUT, UNIT, WIDTH, HEAD, TAIL)
    s_ML = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
    if TAIL > 0:
        s_ML = tl.dot(q[1], tl.trans(k[1]), acc=s_ML, input_precision="ieee")
    return s_ML, _rows(v_ptr + far * v_n * UNIT, keys_L, v_n, stop - start, CUT, UNIT, WIDTH, HEAD, TAIL)


@triton.jit
def _nothing(BLOCK_M: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr) -> tl.tuple:
    """Sums over no key."""
    most_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    return most_M, total_M, tl.zeros([BLOCK_M, HEAD], tl.float32), tl.zeros([BLOCK_M, max(TAIL, 1)], tl.float32)


@triton.jit
def _take(
    sums: tl.tuple, s_ML: tl.tensor, v: tl.tuple, scale: tl.tensor, CUT: tl.constexpr, TAIL: tl.constexpr
) -> tl.tuple:
    """``sums`` with a tile of keys more; if CUT, a score of minus infinity is a key that is not seen."""
    most_M, total_M, values_MD, values_tail_MD = sums
    new_M = tl.maximum(most_M, tl.max(s_ML, 1) * scale)
    base_M = new_M
    if CUT:  # a query that has seen nothing so far
        base_M = tl.where(new_M == float("-inf"), 0.0, new_M)
    p_ML = tl.exp2(s_ML * scale - base_M[:, None])
    shrink_M = tl.exp2(most_M - base_M)
    total_M = total_M * shrink_M + tl.sum(p_ML, 1)
    p_ML = p_ML.to(v[0].dtype)
    values_MD = tl.dot(p_ML, v[0], acc=values_MD * shrink_M[:, None], input_precision="ieee")
    if TAIL > 0:
        values_tail_MD = tl.dot(p_ML, v[1], acc=values_tail_MD * shrink_M[:, None], input_precision="ieee")
    return new_M, total_M, values_MD, values_tail_MD


@triton.jit
def _divided(sums: tl.tuple) -> tl.tuple:
    """Attention, head and tail."""
    own_M1 = (1.0 / sums[1])[:, None]
    return sums[2] * own_M1, sums[3] * own_M1


@triton.jit
def _added(out: tl.tuple, more: tl.tuple, TAIL: tl.constexpr) -> tl.tuple:
    """Head to head and tail to tail."""
    extra = out[1]
    if TAIL > 0:
        extra += more[1]
    return out[0] + more[0], extra


@triton.jit
def _merged(near: tl.tuple, far: tl.tuple) -> tl.tuple:
    """Full attention, and what the window misses of it: nothing where no key is outside."""
    most_M = tl.maximum(near[0], far[0])
    a_M, b_M = tl.exp2(near[0] - most_M), tl.exp2(far[0] - most_M)
    rest_M = b_M * far[1]
    total_M = a_M * near[1] + rest_M
    weight_M1, share_M1 = (b_M / total_M)[:, None], (rest_M / total_M)[:, None]
    within = _divided(near)
    missed = far[2] * weight_M1 - within[0] * share_M1, far[3] * weight_M1 - within[1] * share_M1
    return (within[0] + missed[0], within[1] + missed[1]), missed


@triton.jit
def _store(
    at_ptr: tl.tensor,
    rows_M: tl.tensor,
    stride: tl.tensor,
    stop: tl.tensor,
    values: tl.tuple,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
) -> None:
    """Rows before ``stop``, head and tail."""
    places = at_ptr + rows_M.to(tl.int64)[:, None] * stride
    there = (rows_M < stop)[:, None]
    columns = tl.arange(0, HEAD)[None, :]
    tl.store(places + columns, values[0], mask=there & (columns < WIDTH))
    if TAIL > 0:
        columns = HEAD + tl.arange(0, TAIL)[None, :]
        tl.store(places + columns, values[1], mask=there & (columns < WIDTH))
