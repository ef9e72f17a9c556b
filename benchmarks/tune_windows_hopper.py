"""A candidate for the tuner: windows on Hopper in Gluon, with warps that load and warps that compute.

It is :mod:`difa_fx.cuda_kernels` without text, and as FlashAttention-3 is (arXiv 2407.08608): one warp loads tiles of
keys and values, and each group of four warps has ROWS queries of the block.  A group computes the weights of a tile
while the tensor cores multiply the values of the tile before.  Stretches are (begin, least, most, end), see there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

_LEAST = gl.constexpr(-3.4028234663852886e38)


@gluon.jit
def _count(
    first: gl.tensor,
    last: gl.tensor,
    begin: gl.tensor,
    least: gl.tensor,
    most: gl.tensor,
    end: gl.tensor,
    L: gl.constexpr,
) -> gl.tuple:
    """Where a stretch's first tile starts, and how many it has."""
    start = gl.maximum(begin, first + least)
    return start, gl.cdiv(gl.maximum(gl.minimum(last + most, end) + 1 - start, 0), L)


@gluon.jit
def _load(
    k_map: gl.tensor,
    k_tail_map: gl.tensor,
    v_map: gl.tensor,
    v_tail_map: gl.tensor,
    places: gl.tuple,
    bars: gl.tuple,
    sample: gl.tensor,
    head: gl.tensor,
    first: gl.tensor,
    last: gl.tensor,
    stretch: gl.tuple,
    done: gl.tensor,
    HEAD: gl.constexpr,
    TAIL: gl.constexpr,
    L: gl.constexpr,
    STAGES: gl.constexpr,
) -> gl.tensor:
    """One stretch: keys and values of its tiles, each as soon as its place is free."""
    k_s, kt_s, v_s, vt_s = places
    k_full, k_empty, v_full, v_empty = bars
    begin, least, most, end = stretch
    start, count = _count(first, last, begin, least, most, end, L)
    for i in range(count):
        n = done + i
        b = n % STAGES
        phase = ((n // STAGES) & 1) ^ 1
        at = start + i * L
        mbarrier.wait(k_empty.index(b), phase)
        mbarrier.expect(k_full.index(b), L * (HEAD + TAIL) * 2)
        tma.async_copy_global_to_shared(k_map, [sample, head, at, 0], k_full.index(b), k_s.index(b))
        if TAIL > 0:
            tma.async_copy_global_to_shared(k_tail_map, [sample, head, at, HEAD], k_full.index(b), kt_s.index(b))
        mbarrier.wait(v_empty.index(b), phase)
        mbarrier.expect(v_full.index(b), L * (HEAD + TAIL) * 2)
        tma.async_copy_global_to_shared(v_map, [sample, head, at, 0], v_full.index(b), v_s.index(b))
        if TAIL > 0:
            tma.async_copy_global_to_shared(v_tail_map, [sample, head, at, HEAD], v_full.index(b), vt_s.index(b))
    return done + count


@gluon.jit
def _producer(
    maps: gl.tuple,
    places: gl.tuple,
    bars: gl.tuple,
    place: gl.tuple,
    reach: gl.tensor,
    end: gl.tensor,
    tokens: gl.tensor,
    REFRESH: gl.constexpr,
    HEAD: gl.constexpr,
    TAIL: gl.constexpr,
    L: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """The warp that loads."""
    k_map, k_tail_map, v_map, v_tail_map = maps
    sample, head, first, last = place
    done = _load(
        k_map,
        k_tail_map,
        v_map,
        v_tail_map,
        places,
        bars,
        sample,
        head,
        first,
        last,
        (0, -reach, reach, end - 1),
        0,
        HEAD,
        TAIL,
        L,
        STAGES,
    )
    if REFRESH:
        done = _load(
            k_map,
            k_tail_map,
            v_map,
            v_tail_map,
            places,
            bars,
            sample,
            head,
            first,
            last,
            (0, -tokens, -reach - 1, end - 1),
            done,
            HEAD,
            TAIL,
            L,
            STAGES,
        )
        done = _load(
            k_map,
            k_tail_map,
            v_map,
            v_tail_map,
            places,
            bars,
            sample,
            head,
            first,
            last,
            (0, reach + 1, tokens, end - 1),
            done,
            HEAD,
            TAIL,
            L,
            STAGES,
        )


@gluon.jit
def _flat(
    buffers: gl.tensor,
    b: gl.tensor,
    rows: gl.constexpr,
    columns: gl.constexpr,
    layout: gl.constexpr,
) -> gl.tensor:
    """A tile in shared memory, as a matrix."""
    return buffers.index(b)._reinterpret(buffers.dtype, [rows, columns], layout)


@gluon.jit
def _scores(
    q_s: gl.tensor,
    qt_s: gl.tensor,
    places: gl.tuple,
    b: gl.tensor,
    layouts: gl.constexpr,
    ROWS: gl.constexpr,
    HEAD: gl.constexpr,
    TAIL: gl.constexpr,
    L: gl.constexpr,
) -> gl.tensor:
    """Products of queries and keys, begun."""
    s_l: gl.constexpr = layouts[0]
    zeros = gl.zeros([ROWS, L], gl.float32, s_l)
    k = _flat(places[0], b, L, HEAD, layouts[3])
    s = warpgroup_mma(q_s, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if TAIL > 0:
        kt = _flat(places[1], b, L, TAIL, layouts[4])
        s = warpgroup_mma(qt_s, kt.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _mask(
    s: gl.tensor,
    rows: gl.tensor,
    at: gl.tensor,
    least: gl.tensor,
    most: gl.tensor,
    end: gl.tensor,
    s_l: gl.constexpr,
    L: gl.constexpr,
) -> gl.tensor:
    """Scores, with minus infinity where a query does not see a key."""
    keys = gl.arange(0, L, gl.SliceLayout(0, s_l))
    from_ = rows + least - at
    count = gl.maximum(gl.minimum(rows + most, end) + 1 - at - from_, 0)
    seen = (keys[None, :] - from_[:, None]).to(gl.uint32) < count.to(gl.uint32)[:, None]
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def _weights(
    s: gl.tensor,
    most_M: gl.tensor,
    total_M: gl.tensor,
    scale: gl.tensor,
) -> gl.tuple:
    """The new maxima and sums, the weights, and what is left of the old sums."""
    new = gl.maximum(most_M, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - new[:, None])
    shrink = gl.exp2(most_M - new)
    return new, total_M * shrink + gl.sum(p, 1), p, shrink


@gluon.jit
def _values(
    p: gl.tensor,
    acc: gl.tensor,
    acct: gl.tensor,
    places: gl.tuple,
    b: gl.tensor,
    layouts: gl.constexpr,
    HEAD: gl.constexpr,
    TAIL: gl.constexpr,
    L: gl.constexpr,
) -> gl.tuple:
    """Sums with a tile of values, begun."""
    v = _flat(places[2], b, L, HEAD, layouts[3])
    acc = warpgroup_mma(p, v, acc, is_async=True)
    if TAIL > 0:
        vt = _flat(places[3], b, L, TAIL, layouts[4])
        p_t = gl.convert_layout(p, gl.DotOperandLayout(0, layouts[2], 2))
        acct = warpgroup_mma(p_t, vt, acct, is_async=True)
    return acc, acct


@gluon.jit
def _take(  # noqa: PLR0915
    sums: gl.tuple,
    q_s: gl.tensor,
    qt_s: gl.tensor,
    places: gl.tuple,
    bars: gl.tuple,
    rows_all: gl.tuple,
    scale: gl.tensor,
    stretch: gl.tuple,
    done: gl.tensor,
    layouts: gl.constexpr,
    ROWS: gl.constexpr,
    HEAD: gl.constexpr,
    TAIL: gl.constexpr,
    L: gl.constexpr,
    STAGES: gl.constexpr,
) -> gl.tuple:
    """Sums with the keys of a stretch."""
    k_full, k_empty, v_full, v_empty = bars
    rows, own, first, last = rows_all
    most_M, total_M, acc, acct = sums
    begin, least, most, end = stretch
    start, count = _count(first, last, begin, least, most, end, L)
    s_l: gl.constexpr = layouts[0]
    LATER: gl.constexpr = 2 if TAIL > 0 else 1
    low = own + ROWS - 1 + least
    high = gl.minimum(own + most, end) + 1
    p_l: gl.constexpr = gl.DotOperandLayout(0, layouts[1], 2)
    p = gl.zeros([ROWS, L], q_s.dtype, p_l)
    if count > 0:
        b = done % STAGES
        mbarrier.wait(k_full.index(b), (done // STAGES) & 1)
        s = _scores(q_s, qt_s, places, b, layouts, ROWS, HEAD, TAIL, L)
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_empty.index(b), count=1)
        if (start < low) | (start + L > high):
            s = _mask(s, rows, start, least, most, end, s_l, L)
        most_M, total_M, w, shrink = _weights(s, most_M, total_M, scale)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, layouts[1]))[:, None]
        if TAIL > 0:
            acct = acct * gl.convert_layout(shrink, gl.SliceLayout(1, layouts[2]))[:, None]
        p = gl.convert_layout(w.to(q_s.dtype), p_l)
    for i in range(1, count):
        n = done + i
        b = n % STAGES
        at = start + i * L
        old = (n - 1) % STAGES
        mbarrier.wait(k_full.index(b), (n // STAGES) & 1)
        s = _scores(q_s, qt_s, places, b, layouts, ROWS, HEAD, TAIL, L)
        mbarrier.wait(v_full.index(old), ((n - 1) // STAGES) & 1)
        acc, acct = _values(p, acc, acct, places, old, layouts, HEAD, TAIL, L)
        s = warpgroup_mma_wait(LATER, [s])
        mbarrier.arrive(k_empty.index(b), count=1)
        # In both branches, for ptxas waits as early as it can in the block of instructions after them.
        if (at < low) | (at + L > high):
            s = _mask(s, rows, at, least, most, end, s_l, L)
            most_M, total_M, w, shrink = _weights(s, most_M, total_M, scale)
        else:
            most_M, total_M, w, shrink = _weights(s, most_M, total_M, scale)
        if TAIL > 0:
            acc, acct = warpgroup_mma_wait(0, [acc, acct])
            acct = acct * gl.convert_layout(shrink, gl.SliceLayout(1, layouts[2]))[:, None]
        else:
            acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(v_empty.index(old), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, layouts[1]))[:, None]
        p = gl.convert_layout(w.to(q_s.dtype), p_l)
    if count > 0:
        n = done + count - 1
        b = n % STAGES
        mbarrier.wait(v_full.index(b), (n // STAGES) & 1)
        acc, acct = _values(p, acc, acct, places, b, layouts, HEAD, TAIL, L)
        if TAIL > 0:
            acc, acct = warpgroup_mma_wait(0, [acc, acct])
        else:
            acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(v_empty.index(b), count=1)
    return (most_M, total_M, acc, acct), done + count


@gluon.jit
def _part(
    pointer: gl.tensor,
    rows: gl.tensor,
    step: gl.tensor,
    end: gl.tensor,
    column: gl.constexpr,
    COLUMNS: gl.constexpr,
    WIDTH: gl.constexpr,
    layout: gl.constexpr,
) -> gl.tuple:
    """Places of so many columns of rows, and which of them are there."""
    rows = gl.convert_layout(rows, gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    return pointer + rows.to(gl.int64)[:, None] * step + columns[None, :], (rows < end)[:, None] & (columns < WIDTH)[
        None, :
    ]


@gluon.jit
def _consumer(
    PART: gl.constexpr,
    pointers: gl.tuple,
    q_all: gl.tuple,
    places: gl.tuple,
    bars: gl.tuple,
    place: gl.tuple,
    reach: gl.tensor,
    end: gl.tensor,
    tokens: gl.tensor,
    scale: gl.tensor,
    steps: gl.tuple,
    layouts: gl.constexpr,
    REFRESH: gl.constexpr,
    ROWS: gl.constexpr,
    WIDTH: gl.constexpr,
    HEAD: gl.constexpr,
    TAIL: gl.constexpr,
    L: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Four warps that compute attention of ROWS queries."""
    q_ptr, residual_ptr, out_ptr, missed_ptr = pointers
    q_n, step = steps
    _sample, _head, first, last = place
    s_l: gl.constexpr = layouts[0]
    o_l: gl.constexpr = layouts[1]
    t_l: gl.constexpr = layouts[2]
    load_l: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    tail_l: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    own = first + PART * ROWS
    rows = own + gl.arange(0, ROWS, gl.SliceLayout(1, s_l))
    q_s = q_all[0].index(PART)
    at, there = _part(q_ptr, rows, q_n, end, 0, HEAD, WIDTH, load_l)
    q_s.store(gl.load(at, mask=there, other=0.0))
    qt_s = q_s
    if TAIL > 0:
        qt_s = q_all[1].index(PART)
        at, there = _part(q_ptr, rows, q_n, end, HEAD, TAIL, WIDTH, tail_l)
        qt_s.store(gl.load(at, mask=there, other=0.0))
    fence_async_shared()
    gl.thread_barrier()
    most_M = gl.full([ROWS], _LEAST, gl.float32, gl.SliceLayout(1, s_l))
    total_M = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, s_l))
    acc = gl.zeros([ROWS, HEAD], gl.float32, o_l)
    acct = gl.zeros([ROWS, max(TAIL, 16)], gl.float32, t_l)
    sums = (most_M, total_M, acc, acct)
    rows_all = (rows, own, first, last)
    sums, done = _take(
        sums,
        q_s,
        qt_s,
        places,
        bars,
        rows_all,
        scale,
        (0, -reach, reach, end - 1),
        0,
        layouts,
        ROWS,
        HEAD,
        TAIL,
        L,
        STAGES,
    )
    if REFRESH:
        _finish(sums, missed_ptr, None, rows, step, end, layouts, WIDTH, HEAD, TAIL)
        gl.thread_barrier()
        sums, done = _take(
            sums,
            q_s,
            qt_s,
            places,
            bars,
            rows_all,
            scale,
            (0, -tokens, -reach - 1, end - 1),
            done,
            layouts,
            ROWS,
            HEAD,
            TAIL,
            L,
            STAGES,
        )
        sums, done = _take(
            sums,
            q_s,
            qt_s,
            places,
            bars,
            rows_all,
            scale,
            (0, reach + 1, tokens, end - 1),
            done,
            layouts,
            ROWS,
            HEAD,
            TAIL,
            L,
            STAGES,
        )
        _split(
            sums,
            out_ptr,
            missed_ptr,
            rows,
            step,
            end,
            (rows - reach > 0) | (rows + reach < end - 1),
            layouts,
            WIDTH,
            HEAD,
            TAIL,
        )
    else:
        _finish(sums, out_ptr, residual_ptr, rows, step, end, layouts, WIDTH, HEAD, TAIL)


@gluon.jit
def _finish(
    sums: gl.tuple,
    out_ptr: gl.tensor,
    residual_ptr: gl.tensor,
    rows: gl.tensor,
    step: gl.tensor,
    end: gl.tensor,
    layouts: gl.constexpr,
    WIDTH: gl.constexpr,
    HEAD: gl.constexpr,
    TAIL: gl.constexpr,
) -> None:
    """Write attention, and a residual added."""
    own = 1.0 / sums[1]
    _finish_part(sums[2], own, out_ptr, residual_ptr, rows, step, end, 0, HEAD, WIDTH, layouts[1])
    if TAIL > 0:
        _finish_part(sums[3], own, out_ptr, residual_ptr, rows, step, end, HEAD, TAIL, WIDTH, layouts[2])


@gluon.jit
def _finish_part(
    values: gl.tensor,
    own: gl.tensor,
    out_ptr: gl.tensor,
    residual_ptr: gl.tensor,
    rows: gl.tensor,
    step: gl.tensor,
    end: gl.tensor,
    column: gl.constexpr,
    COLUMNS: gl.constexpr,
    WIDTH: gl.constexpr,
    layout: gl.constexpr,
) -> None:
    """Head or tail of it."""
    value = values * gl.convert_layout(own, gl.SliceLayout(1, layout))[:, None]
    at, there = _part(out_ptr, rows, step, end, column, COLUMNS, WIDTH, layout)
    if residual_ptr is not None:
        more, _ = _part(residual_ptr, rows, step, end, column, COLUMNS, WIDTH, layout)
        value += gl.load(more, mask=there, other=0.0).to(gl.float32)
    gl.store(at, value.to(out_ptr.dtype.element_ty), mask=there)


@gluon.jit
def _split(
    sums: gl.tuple,
    out_ptr: gl.tensor,
    missed_ptr: gl.tensor,
    rows: gl.tensor,
    step: gl.tensor,
    end: gl.tensor,
    some: gl.tensor,
    layouts: gl.constexpr,
    WIDTH: gl.constexpr,
    HEAD: gl.constexpr,
    TAIL: gl.constexpr,
) -> None:
    """Write full attention, and what the window misses of it."""
    own = 1.0 / sums[1]
    _split_part(sums[2], own, out_ptr, missed_ptr, rows, step, end, some, 0, HEAD, WIDTH, layouts[1])
    if TAIL > 0:
        _split_part(sums[3], own, out_ptr, missed_ptr, rows, step, end, some, HEAD, TAIL, WIDTH, layouts[2])


@gluon.jit
def _split_part(
    values: gl.tensor,
    own: gl.tensor,
    out_ptr: gl.tensor,
    missed_ptr: gl.tensor,
    rows: gl.tensor,
    step: gl.tensor,
    end: gl.tensor,
    some: gl.tensor,
    column: gl.constexpr,
    COLUMNS: gl.constexpr,
    WIDTH: gl.constexpr,
    layout: gl.constexpr,
) -> None:
    """The same thread has written to ``missed`` what it reads: the layout is the same."""
    value = values * gl.convert_layout(own, gl.SliceLayout(1, layout))[:, None]
    at, there = _part(out_ptr, rows, step, end, column, COLUMNS, WIDTH, layout)
    gl.store(at, value.to(out_ptr.dtype.element_ty), mask=there)
    at, there = _part(missed_ptr, rows, step, end, column, COLUMNS, WIDTH, layout)
    missed = value - gl.load(at, mask=there, other=0.0).to(gl.float32)
    missed = gl.where(gl.convert_layout(some, gl.SliceLayout(1, layout))[:, None], missed, 0.0)
    gl.store(at, missed.to(out_ptr.dtype.element_ty), mask=there)


@gluon.jit(do_not_specialize=("q_b", "q_h", "q_n", "heads", "tokens", "window"))
def near_hopper(  # noqa: PLR0915
    q_ptr: gl.tensor,
    k_map: gl.tensor,
    k_tail_map: gl.tensor,
    v_map: gl.tensor,
    v_tail_map: gl.tensor,
    residual_ptr: gl.tensor,
    out_ptr: gl.tensor,
    missed_ptr: gl.tensor,
    q_b: gl.tensor,
    q_h: gl.tensor,
    q_n: gl.tensor,
    heads: gl.tensor,
    tokens: gl.tensor,
    window: gl.tensor,
    scale: gl.tensor,
    WIDTH: gl.constexpr,
    HEAD: gl.constexpr,
    TAIL: gl.constexpr,
    ROWS: gl.constexpr,
    L: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    REGISTERS: gl.constexpr,
) -> None:
    """See :func:`difa_fx.cuda_kernels.near_kernel`."""
    REFRESH: gl.constexpr = missed_ptr is not None
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, L, 16])
    o_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 16])
    t_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    main_l: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    small_l: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
    layouts: gl.constexpr = (s_l, o_l, t_l, main_l, small_l)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    M: gl.constexpr = CONSUMERS * ROWS
    blocks = gl.cdiv(tokens, M)
    part = gl.program_id(0) % blocks
    head = gl.program_id(0) // blocks % heads
    sample = gl.program_id(0) // blocks // heads
    first = part * M
    last = gl.minimum(first + M, tokens) - 1
    q_ptr += sample.to(gl.int64) * q_b * 8 + head.to(gl.int64) * q_h * 8
    at = (sample.to(gl.int64) * tokens * heads + head) * WIDTH
    out_ptr += at
    if residual_ptr is not None:
        residual_ptr += at
    if missed_ptr is not None:
        missed_ptr += at

    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, L, HEAD], k_map.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, L, HEAD], v_map.layout)
    q_s = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, HEAD], main_l)
    if TAIL > 0:
        kt_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, L, TAIL], k_tail_map.layout)
        vt_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, L, TAIL], v_tail_map.layout)
        qt_s = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, TAIL], small_l)
        places = (k_s, kt_s, v_s, vt_s)
        q_all = (q_s, qt_s)
        maps = (k_map, k_tail_map, v_map, v_tail_map)
    else:
        places = (k_s, k_s, v_s, v_s)
        q_all = (q_s, q_s)
        maps = (k_map, k_map, v_map, v_map)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    bars = (k_full, k_empty, v_full, v_empty)
    place = (sample, head, first, last)
    pointers = (q_ptr, residual_ptr, out_ptr, missed_ptr)
    steps = (q_n.to(gl.int64) * 8, heads * WIDTH)
    reach = window
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (
                        0,
                        pointers,
                        q_all,
                        places,
                        bars,
                        place,
                        reach,
                        tokens,
                        tokens,
                        scale,
                        steps,
                        layouts,
                        REFRESH,
                        ROWS,
                        WIDTH,
                        HEAD,
                        TAIL,
                        L,
                        STAGES,
                    ),
                ),
                (_producer, (maps, places, bars, place, reach, tokens, tokens, REFRESH, HEAD, TAIL, L, STAGES)),
            ],
            [1],
            [24],
        )
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (
                        0,
                        pointers,
                        q_all,
                        places,
                        bars,
                        place,
                        reach,
                        tokens,
                        tokens,
                        scale,
                        steps,
                        layouts,
                        REFRESH,
                        ROWS,
                        WIDTH,
                        HEAD,
                        TAIL,
                        L,
                        STAGES,
                    ),
                ),
                (
                    _consumer,
                    (
                        1,
                        pointers,
                        q_all,
                        places,
                        bars,
                        place,
                        reach,
                        tokens,
                        tokens,
                        scale,
                        steps,
                        layouts,
                        REFRESH,
                        ROWS,
                        WIDTH,
                        HEAD,
                        TAIL,
                        L,
                        STAGES,
                    ),
                ),
                (_producer, (maps, places, bars, place, reach, tokens, tokens, REFRESH, HEAD, TAIL, L, STAGES)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (
                        0,
                        pointers,
                        q_all,
                        places,
                        bars,
                        place,
                        reach,
                        tokens,
                        tokens,
                        scale,
                        steps,
                        layouts,
                        REFRESH,
                        ROWS,
                        WIDTH,
                        HEAD,
                        TAIL,
                        L,
                        STAGES,
                    ),
                ),
                (
                    _consumer,
                    (
                        1,
                        pointers,
                        q_all,
                        places,
                        bars,
                        place,
                        reach,
                        tokens,
                        tokens,
                        scale,
                        steps,
                        layouts,
                        REFRESH,
                        ROWS,
                        WIDTH,
                        HEAD,
                        TAIL,
                        L,
                        STAGES,
                    ),
                ),
                (
                    _consumer,
                    (
                        2,
                        pointers,
                        q_all,
                        places,
                        bars,
                        place,
                        reach,
                        tokens,
                        tokens,
                        scale,
                        steps,
                        layouts,
                        REFRESH,
                        ROWS,
                        WIDTH,
                        HEAD,
                        TAIL,
                        L,
                        STAGES,
                    ),
                ),
                (_producer, (maps, places, bars, place, reach, tokens, tokens, REFRESH, HEAD, TAIL, L, STAGES)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )


def attend_hopper(
    sizes: Sequence[int], q: Any, k: Any, v: Any, residual: Any, window: int, *, refresh: bool, warm: bool = False
) -> tuple[Any, ...]:
    """The two operators without text; only compiled if ``warm``."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    rows, length, stages, consumers, launched, registers = sizes
    batch, heads, tokens, width = q.shape
    head, tail = 64, 16 if width > 64 else 0
    out, *missed = (q.new_empty((batch, tokens, heads, width)) for _ in range(1 + refresh))
    maps = []
    for tensor in (k, v):
        for columns, swizzle in ((head, 128), (tail, 32)):
            layout = gl.NVMMASharedLayout(swizzle, 16, 4)
            shape = [1, 1, length, columns]
            found = (
                TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), shape, layout) if columns else None
            )
            maps.append(found)
    grid = (batch * heads * -(-tokens // (rows * consumers)),)
    strides = [stride // 8 for stride in q.stride()[:3]]
    numbers = (*strides, heads, tokens, min(window, tokens), width**-0.5 * math.log2(math.e))
    kernel = (lambda *a, **s: near_hopper.warmup(*a, grid=grid, **s)) if warm else near_hopper[grid]
    kernel(
        q, *maps, residual, out, missed[0] if missed else None, *numbers,
        WIDTH=width, HEAD=head, TAIL=tail, ROWS=rows, L=length, STAGES=stages, CONSUMERS=consumers,
        REGISTERS=registers, num_warps=4, maxnreg=launched,
    )  # fmt: skip
    return (out, *missed)
