"""Window attention in Triton: the code that runs on the GPU.  Imported when it is needed, for it needs triton.

One program has a block of queries of one sample and head, and goes once through the keys that they see, as
FlashAttention-2 does (arXiv 2307.08691): running maxima, sums of exponentials and sums of weighted values.  Keys come
in tiles, all in one loop, so that its pipeline is filled once; only a tile that the window's edge or the end of a
sequence cuts is masked.  Text tokens see every key, so they are gathered into blocks of their own.

A refresh goes on from there: what the window gives is put aside, rounded as results are, and a second loop takes the
keys outside into the same sums, which are full attention then.  Tiles at the window's edge are taken twice.

A head is HEAD columns, a power of two, and TAIL more, a power of two filled up with zeros: 72 is 64 + 16, not 128.
Keys and values are loaded through tensor maps, which the memory unit of sm_90 walks by itself and which end in zeros;
without (MAPS is false) through pointers.

Tuples: ``q`` is (head, tail), where a TAIL of 0 is nothing; ``kv`` is where keys and values lie, see :func:`_tile`;
``sums`` are (maximum_M, exponentials_M, values_MD, values_tail_MD); ``rows`` are (rows_M, first, last), a block's
queries; ``span`` is where their window moves and how far it reaches; ``stretches`` are what they see, see
:func:`_take_all`.

Letters: B batch, N tokens, H heads, D head width, M queries of a block, L keys of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

_STRIDES = ("q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n")
_LEAST = tl.constexpr(-3.4028234663852886e38)
"""The maximum over no key: finite, for the difference of two infinities is not a number."""


# Not compiled anew for numbers that happen to be 1 or a multiple of 16: UNIT says what matters of them.
@triton.jit(do_not_specialize=(*_STRIDES, "heads", "tokens", "window", "lead", "tail"))
def near_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_map: tl.tensor_descriptor,
    k_tail_map: tl.tensor_descriptor,
    v_map: tl.tensor_descriptor,
    v_tail_map: tl.tensor_descriptor,
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

    With ``missed`` [B, N, H, D] it is full attention, and there what the window misses of it.  The maps are of tiles
    of keys and values [B, H, N, D], their head and their tail, or all are None.  ``q_b`` to ``v_n`` are strides in
    units of UNIT elements, so that the compiler knows how rows are aligned.  ``scale`` is for powers of two and above
    0; ``lead`` and ``tail`` count the text tokens before and after the image, and TEXT is whether any are.
    """
    MAPS: tl.constexpr = k_map is not None
    image = tokens - lead - tail
    text_blocks = tl.cdiv(lead + tail, BLOCK_M) if TEXT else 0
    blocks = text_blocks + tl.cdiv(image, BLOCK_M)
    part = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % heads
    sample = tl.program_id(0) // blocks // heads
    far_head, far_sample = head.to(tl.int64), sample.to(tl.int64)
    q_ptr += (far_sample * q_b + far_head * q_h) * UNIT
    if MAPS:
        kv = k_map, k_tail_map, v_map, v_tail_map, sample, head
    else:
        k_at, v_at = (far_sample * k_b + far_head * k_h) * UNIT, (far_sample * v_b + far_head * v_h) * UNIT
        kv = k_ptr + k_at, k_n, v_ptr + v_at, v_n, tokens, 0

    rows, span, words = _queries(part, text_blocks, tokens, window, lead, tail, TEXT, BLOCK_M)
    begin, end, reach = span
    rows_M = rows[0]
    q = _rows(q_ptr, rows_M.to(tl.int64), q_n, end, UNIT, WIDTH, HEAD, TAIL)
    seen = (begin, -reach, reach, end - 1), (0, 0, 0, 0), (0, 0, 0, 0)
    if TEXT:
        none = tl.where(words, tokens, 0)
        before, after = (none, -tokens, tokens, lead - 1), (end + none, -tokens, tokens, tokens - 1)
        seen = seen[0], before, after
    sums = _nothing(BLOCK_M, HEAD, TAIL)
    sums = _take_all(sums, q, kv, scale, rows, seen, 3 if TEXT else 1, MAPS, UNIT, WIDTH, HEAD, TAIL, BLOCK_L)
    out = _divided(sums)

    at, step = (far_sample * tokens * heads + far_head) * WIDTH, heads * WIDTH
    if missed_ptr is not None:
        _store(missed_ptr + at, rows_M, step, end, out, WIDTH, HEAD, TAIL)
        tl.debug_barrier()  # what a thread reads below another may have written, and overwrite
        outside = (begin, -tokens, -reach - 1, end - 1), (begin, reach + 1, tokens, end - 1), (0, 0, 0, 0)
        sums = _take_all(sums, q, kv, scale, rows, outside, 2, MAPS, UNIT, WIDTH, HEAD, TAIL, BLOCK_L)
        near = _rows(missed_ptr + at, rows_M.to(tl.int64), step, end, 1, WIDTH, HEAD, TAIL)
        tl.debug_barrier()
        out = _divided(sums)
        some_M1 = ((rows_M - reach > begin) | (rows_M + reach < end - 1))[:, None]
        missed = _added(out, near, -1.0, TAIL)
        missed = tl.where(some_M1, missed[0], 0.0), tl.where(some_M1, missed[1], 0.0)
        _store(missed_ptr + at, rows_M, step, end, missed, WIDTH, HEAD, TAIL)
    elif residual_ptr is not None:
        residual = _rows(residual_ptr + at, rows_M.to(tl.int64), step, end, 1, WIDTH, HEAD, TAIL)
        out = _added(out, residual, 1.0, TAIL)
    _store(out_ptr + at, rows_M, step, end, out, WIDTH, HEAD, TAIL)


@triton.jit
def _take_all(
    sums: tl.tuple,
    q: tl.tuple,
    kv: tl.tuple,
    scale: tl.tensor,
    rows: tl.tuple,
    stretches: tl.tuple,
    STRETCHES: tl.constexpr,
    MAPS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> tl.tuple:
    """``sums`` with the keys of up to three stretches, each (begin, least, most, end).

    Query n sees the keys from ``begin`` and n + ``least`` on, up to n + ``most`` and ``end``, all of them included.
    """
    rows_M, first, last = rows
    start, count = _tiles(first, last, stretches[0], BLOCK_L)
    if STRETCHES > 1:
        second, more = _tiles(first, last, stretches[1], BLOCK_L)
        one = count
        count += more
    if STRETCHES > 2:
        third, more = _tiles(first, last, stretches[2], BLOCK_L)
        two = count
        count += more
    for i in tl.range(0, count):
        at = start + i * BLOCK_L
        _, least, most, end = stretches[0]
        if STRETCHES > 1:
            other = i >= one
            at = tl.where(other, second + (i - one) * BLOCK_L, at)
            least, most = tl.where(other, stretches[1][1], least), tl.where(other, stretches[1][2], most)
            end = tl.where(other, stretches[1][3], end)
        if STRETCHES > 2:
            other = i >= two
            at = tl.where(other, third + (i - two) * BLOCK_L, at)
            least, most = tl.where(other, stretches[2][1], least), tl.where(other, stretches[2][2], most)
            end = tl.where(other, stretches[2][3], end)
        s_ML, v = _tile(q, kv, at, MAPS, UNIT, WIDTH, HEAD, TAIL, BLOCK_L)
        if (at < last + least) | (at + BLOCK_L > tl.minimum(first + most, end) + 1):
            s_ML = _masked(s_ML, rows_M, at, least, most, end, BLOCK_L)
        sums = _take(sums, s_ML, v, scale, TAIL)
    return sums


@triton.jit
def _tiles(first: tl.tensor, last: tl.tensor, stretch: tl.tuple, BLOCK_L: tl.constexpr) -> tl.tuple:
    """Where a stretch's first tile starts, and how many it has."""
    begin, least, most, end = stretch
    start = tl.maximum(begin, first + least)
    return start, tl.cdiv(tl.maximum(tl.minimum(last + most, end) + 1 - start, 0), BLOCK_L)


@triton.jit
def _masked(
    s_ML: tl.tensor,
    rows_M: tl.tensor,
    at: tl.tensor,
    least: tl.tensor,
    most: tl.tensor,
    end: tl.tensor,
    BLOCK_L: tl.constexpr,
) -> tl.tensor:
    """Scores, with minus infinity where a query does not see a key."""
    from_M = rows_M + least - at
    count_M = tl.maximum(tl.minimum(rows_M + most, end) + 1 - at - from_M, 0)
    # A key before the first is a large number without a sign: one comparison for both ends.
    seen_ML = (tl.arange(0, BLOCK_L)[None, :] - from_M[:, None]).to(tl.uint32) < count_M.to(tl.uint32)[:, None]
    return tl.where(seen_ML, s_ML, float("-inf"))


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
    """A block's queries with the first and the last of them, the span of their window, and whether they are text."""
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
    return (rows_M, first, last), (begin, end, reach), words


@triton.jit
def _rows(
    at_ptr: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    stop: tl.tensor,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
) -> tl.tuple:
    """Head and tail of rows, with zeros after the last column and from row ``stop`` on."""
    places = at_ptr + rows[:, None] * (stride * UNIT)
    there = (rows < stop)[:, None]
    columns = tl.arange(0, HEAD)[None, :]
    main = tl.load(places + columns, mask=there & (columns < WIDTH), other=0.0)
    extra = main
    if TAIL > 0:
        columns = HEAD + tl.arange(0, TAIL)[None, :]
        extra = tl.load(places + columns, mask=there & (columns < WIDTH), other=0.0)
    return main, extra


@triton.jit
def _mapped(
    main_map: tl.tensor_descriptor,
    tail_map: tl.tensor_descriptor,
    kv: tl.tuple,
    start: tl.tensor,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> tl.tuple:
    """Head and tail of a tile of keys or values."""
    main = tl.reshape(main_map.load([kv[4], kv[5], start, 0]), [BLOCK_L, HEAD])
    extra = main
    if TAIL > 0:
        extra = tl.reshape(tail_map.load([kv[4], kv[5], start, HEAD]), [BLOCK_L, TAIL])
    return main, extra


@triton.jit
def _tile(
    q: tl.tuple,
    kv: tl.tuple,
    start: tl.tensor,
    MAPS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> tl.tuple:
    """Scores of the tile of keys at ``start``, not scaled yet, and its values.

    ``kv`` is four maps, the sample and the head; or pointers and strides of keys and values, and the number of tokens.
    """
    if MAPS:
        k = _mapped(kv[0], kv[1], kv, start, HEAD, TAIL, BLOCK_L)
    else:
        keys_L, far = tl.arange(0, BLOCK_L), start.to(tl.int64)
        k = _rows(kv[0] + far * kv[1] * UNIT, keys_L, kv[1], kv[4] - start, UNIT, WIDTH, HEAD, TAIL)
    s_ML = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
    if TAIL > 0:
        s_ML = tl.dot(q[1], tl.trans(k[1]), acc=s_ML, input_precision="ieee")
    if MAPS:
        v = _mapped(kv[2], kv[3], kv, start, HEAD, TAIL, BLOCK_L)
    else:
        v = _rows(kv[2] + far * kv[3] * UNIT, keys_L, kv[3], kv[4] - start, UNIT, WIDTH, HEAD, TAIL)
    return s_ML, v


@triton.jit
def _nothing(BLOCK_M: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr) -> tl.tuple:
    """Sums over no key."""
    most_M, total_M = tl.full([BLOCK_M], _LEAST, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    return most_M, total_M, tl.zeros([BLOCK_M, HEAD], tl.float32), tl.zeros([BLOCK_M, max(TAIL, 1)], tl.float32)


@triton.jit
def _take(sums: tl.tuple, s_ML: tl.tensor, v: tl.tuple, scale: tl.tensor, TAIL: tl.constexpr) -> tl.tuple:
    """``sums`` with a tile of keys more; a score of minus infinity is a key that is not seen."""
    most_M, total_M, values_MD, values_tail_MD = sums
    new_M = tl.maximum(most_M, tl.max(s_ML, 1) * scale)
    p_ML = tl.exp2(s_ML * scale - new_M[:, None])
    shrink_M = tl.exp2(most_M - new_M)
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
def _added(out: tl.tuple, more: tl.tuple, SIGN: tl.constexpr, TAIL: tl.constexpr) -> tl.tuple:
    """Head to head and tail to tail, or one less the other."""
    extra = out[1]
    if TAIL > 0:
        extra += SIGN * more[1].to(tl.float32)
    return out[0] + SIGN * more[0].to(tl.float32), extra


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
