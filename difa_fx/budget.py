"""The plan of least error that a number of seconds allows, from what each choice costs at each site.

The sites share nothing but the budget.  With a price on a second (a Lagrange multiplier) each site is a problem of
its own, and a small one: what a step reads is fixed by the last refresh and the last computed step, so a dynamic
program over those is exact.  The price is found by intersecting tangents of the dual function, which also gives a lower
bound on any plan's error.  At the best price two plans remain, one within the budget and one beyond it.  The first is
then bettered as long as the budget holds: with columns of the other prices tried, and then cell by cell.

This module imports no torch.  Letters: S sites, T steps, c the kind of a refresh (0 ``full``, 1 ``full+cfg``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from difa_fx.errors import CalibrationError
from difa_fx.plan_words import Method
from difa_fx.site_costs import LARGEST, Array, SiteCosts, as_amount, wrong_costs

__all__ = ["Choice", "SiteCosts", "choose", "least_seconds", "plan_seconds"]

Codes: TypeAlias = NDArray[np.int8]

_METHODS: Final = tuple(Method)
_FULL, _WINDOW, _CACHED, _FULL_CFG, _WINDOW_CFG = range(len(_METHODS))
#: Prices tried at most.  The search ends by itself when no plan lies below the line through the two that remain.
_PRICES: Final = 60
#: Times that each cell is tried with each method.  Little is left to win by then: it matters where there are few sites.
_ROUNDS: Final = 4
#: Relative rounding that a sum of seconds may be off by.
_ROUNDING: Final = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Methods for a budget.

    Attributes:
        methods: one row per step, one method per site in it.
        seconds: what they cost.
        error: the sum of their errors.
        bound: no choice within the budget has a smaller error than this.
    """

    methods: tuple[tuple[Method, ...], ...]
    seconds: float
    error: float
    bound: float

    @property
    def gap(self) -> float:
        """How much smaller the least possible error may be."""
        return self.error - self.bound


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """A column of methods for each site, and what each costs: ``[S, T]`` and twice ``[S]``."""

    codes: Codes
    site_seconds: Array
    site_errors: Array

    @property
    def seconds(self) -> float:
        return math.fsum(self.site_seconds)

    @property
    def error(self) -> float:
        return math.fsum(self.site_errors)


def least_seconds(sites: Sequence[SiteCosts]) -> float:
    """What the cheapest methods cost; no budget can be smaller.

    Raises:
        CalibrationError: there are no sites, or they differ in their number of steps.
    """
    return _Problem(sites).solve(error=0.0, second=1.0).seconds


def choose(sites: Sequence[SiteCosts], *, budget_seconds: float) -> Choice:
    """Methods of little error whose seconds, up to rounding, are at most ``budget_seconds``.

    The first step is ``full`` everywhere.  The error is within ``gap`` of the least possible one: should it be larger
    than under a smaller budget, then by the gap at most.

    Raises:
        CalibrationError: no methods are that cheap, or the arguments are wrong.
    """
    problem = _Problem(sites)
    limit = as_amount(budget_seconds, "budget_seconds", least=-LARGEST) * (1 + _ROUNDING)
    full = problem.price(np.full((len(sites), problem.steps), _FULL, dtype=np.int8))
    if full.seconds <= limit:
        return problem.choice(full, 0.0)
    cheapest = problem.solve(error=0.0, second=1.0)
    if cheapest.seconds > limit:
        raise CalibrationError(
            "no plan is as cheap as the budget asks",
            where="budget_seconds",
            got=f"{budget_seconds:.6g} s",
            allowed=f"{cheapest.seconds:.6g} s or more; all sites full take {full.seconds:.6g} s",
            todo="raise the budget, or allow methods that save more, such as cached or a smaller window",
        )
    tried, bound = _search(problem, cheapest, full, limit)
    best = min((one for one in tried if one.seconds <= limit), key=lambda one: one.error)
    best = _improve(best, tried, limit)
    for _ in range(_ROUNDS):
        best, before = _improve(best, problem.neighbours(best), limit), best
        if best.error == before.error:
            break
    return problem.choice(best, min(bound, best.error))


def plan_seconds(sites: Sequence[SiteCosts], methods: Sequence[Sequence[Method]]) -> float:
    """What given methods cost; one row per step, one method per site in it.

    Raises:
        CalibrationError: a site cannot do one of them, the first step is not full, or there are too many or too few.
    """
    problem = _Problem(sites)
    rows = [tuple(row) for row in methods]
    if len(rows) != problem.steps or any(len(row) != len(sites) for row in rows):
        raise wrong_costs("methods", "another size", f"{problem.steps} rows of {len(sites)} methods")
    for t, row in enumerate(rows):
        for s, (method, site) in enumerate(zip(row, sites, strict=True)):
            if method not in site.seconds or (t == 0 and method is not Method.FULL):
                raise wrong_costs(f"methods[{t}][{s}]", str(method), "full" if t == 0 else list(site.seconds))
    return problem.price(np.array([[_METHODS.index(m) for m in row] for row in rows], dtype=np.int8).T).seconds


def _search(problem: _Problem, within: _Columns, beyond: _Columns, limit: float) -> tuple[list[_Columns], float]:
    """The plans that are best at some price of a second, around the price that the limit sets; and the dual bound.

    The line through a plan within the limit and one beyond it gives the next price.  A plan below that line takes the
    place of one of the two; if there is none, the price is the best one.
    """
    tried, bound = [within, beyond], 0.0
    for _ in range(_PRICES):
        saved, spent = within.error - beyond.error, beyond.seconds - within.seconds
        price = saved / spent if saved > 0 else 0.0
        if not 1 / LARGEST < price < LARGEST:
            break
        found = problem.solve(error=1.0, second=price)
        cost, line = found.error + price * found.seconds, within.error + price * within.seconds
        bound = max(bound, cost - price * limit)
        if cost >= line * (1 - _ROUNDING):
            break
        tried.append(found)
        within, beyond = (found, beyond) if found.seconds <= limit else (within, found)
    return tried, bound


def _improve(best: _Columns, tried: Sequence[_Columns], limit: float) -> _Columns:
    """``best`` with columns of the others as long as the limit holds, most error saved per second first."""
    codes_KST = np.stack([one.codes for one in tried])
    seconds_KS = np.stack([one.site_seconds for one in tried])
    errors_KS = np.stack([one.site_errors for one in tried])
    codes_ST, seconds_S, errors_S = best.codes.copy(), best.site_seconds.copy(), best.site_errors.copy()
    while True:
        saved_KS, spent_KS = errors_S - errors_KS, seconds_KS - seconds_S
        fits_KS = (saved_KS > 0) & (spent_KS <= limit - math.fsum(seconds_S))
        if not fits_KS.any():
            return _Columns(codes_ST, seconds_S, errors_S)
        with np.errstate(divide="ignore", over="ignore"):
            rate_KS = np.where(fits_KS, saved_KS, -1.0) / np.maximum(spent_KS, 0.0)
        k, s = np.unravel_index(rate_KS.argmax(), rate_KS.shape)
        codes_ST[s], seconds_S[s], errors_S[s] = codes_KST[k, s], seconds_KS[k, s], errors_KS[k, s]


class _Problem:
    """The costs of all sites in arrays, and the dynamic program over them.

    A step that uses a method that is not possible takes infinitely long.
    """

    def __init__(self, sites: Sequence[SiteCosts]) -> None:
        lengths = sorted({site.steps for site in sites})
        if len(lengths) != 1:
            raise wrong_costs("sites", f"sites of {lengths or 'no'} steps", "at least one site, all of the same steps")
        self.steps = steps = lengths[0]
        self.seconds_SM = np.array([[site.seconds.get(m, math.inf) for m in _METHODS] for site in sites])
        self.refresh_Sc = np.array([[site.refresh_seconds, site.refresh_cfg_seconds] for site in sites])
        self.cached_STT = np.stack([site.cached for site in sites])
        self.window_STT = np.stack([site.window for site in sites])
        self.cfg_ST = np.stack([site.cfg for site in sites])
        # [a, b]: what is reused after step a and before step b, as if the output of a were exact.
        self.reuse_STb = np.zeros((len(sites), steps, steps + 1))
        self.reuse_STb[:, :, 1:] = self.cached_STT.cumsum(axis=1).swapaxes(1, 2)
        reused_Tb = np.maximum(np.arange(steps + 1) - np.arange(steps)[:, None] - 1, 0)
        self.idle_STb = np.zeros_like(self.reuse_STb)
        idle_S11 = self.seconds_SM[:, _CACHED, None, None]
        np.multiply(idle_S11, reused_Tb, out=self.idle_STb, where=reused_Tb > 0)
        # [r, c, a]: error of a window at step a with the residual of a refresh of kind c at step r.
        self.drift_SrcT = np.repeat(self.window_STT.swapaxes(1, 2)[:, :, None], 2, axis=2)
        self.drift_SrcT[:, :, 1] += self.cfg_ST[:, :, None]

    def solve(self, *, error: float, second: float) -> _Columns:
        """The methods whose error and seconds, so weighted, cost least; ``second`` is above 0.

        A window step's half, ``window`` or ``window+cfg``, matters only until the next computed step, so it is chosen
        with the stretch of cached steps behind it.  What is left to remember is the last refresh and the last window.
        """
        sites, steps = self.cfg_ST.shape
        each_S, age_T = np.arange(sites), np.arange(steps)
        after_STb = error * self.reuse_STb + second * self.idle_STb
        node_bScT = self._windows(error, second, after_STb)
        drift_SrcT = error * self.drift_SrcT
        hold_Src = np.stack([np.zeros_like(self.cfg_ST), error * self.cfg_ST], axis=-1)
        refresh_S1c = second * self.refresh_Sc[:, None]
        begin_Sc = second * self.seconds_SM[:, [_FULL, _FULL_CFG]]
        start_Src = np.full((sites, steps, 2), math.inf)
        start_Src[:, 0, 0] = begin_Sc[:, 0]
        # [r, c, a]: cost up to now if the last refresh is r and the last computed step the window a.
        open_SrcT = np.full((sites, steps, 2, steps), math.inf)
        before_SrcT = np.zeros((sites, steps, 2, steps), dtype=np.int32)
        last = np.zeros((3, sites, steps + 1), dtype=np.int32)
        # Everything before step b is paid; b computes, or is the end.  All refreshes r before it come here directly or
        # through their best last window a.
        for b in range(1, steps + 1):
            r_11 = age_T[:b, None]
            direct_Src = start_Src[:, :b] + hold_Src[:, :b] * (b - r_11) + after_STb[:, :b, b, None]
            now_SrcT = open_SrcT[:, :b, :, :b]
            now_SrcT += drift_SrcT[:, :b, :, :b]
            ways_SrcT = now_SrcT + node_bScT[b][:, None, :, :b]
            a_Src = ways_SrcT.argmin(axis=-1)
            through_Src = np.take_along_axis(ways_SrcT, a_Src[..., None], axis=-1)[..., 0]
            best_Sr = np.minimum(direct_Src, through_Src).reshape(sites, -1)
            pick_S = best_Sr.argmin(axis=-1)
            from_Sr = np.where(direct_Src <= through_Src, r_11, a_Src).reshape(sites, -1)
            last[:, :, b] = pick_S // 2, pick_S % 2, from_Sr[each_S, pick_S]
            if b < steps:
                start_Src[:, b] = best_Sr[each_S, pick_S, None] + begin_Sc
                paid_Src = direct_Src + refresh_S1c
                open_SrcT[:, :b, :, b] = np.minimum(paid_Src, through_Src)
                before_SrcT[:, :b, :, b] = np.where(paid_Src <= through_Src, r_11, a_Src)
        return self.price(self._walk_back(last, before_SrcT, error / second))

    def _windows(self, error: float, second: float, after_STb: Array) -> Array:
        """``[b, c, a]``: what a window at step a and reuse of it up to step b cost, besides its drift."""
        whole_S11, half_S11 = (second * self.seconds_SM[:, m, None, None] for m in (_WINDOW, _WINDOW_CFG))
        steps = np.arange(self.steps + 1)
        shared_STb = error * self.cfg_ST[..., None] * (steps - steps[:-1, None])
        # A residual of one half is shared by both already, so that the other half of the window adds no error.
        node_cSTb = np.stack([np.minimum(whole_S11, half_S11 + shared_STb), np.zeros_like(shared_STb)])
        node_cSTb[1] += np.minimum(whole_S11, half_S11)
        return np.ascontiguousarray((node_cSTb + after_STb).transpose(3, 1, 0, 2))

    def _walk_back(self, last: NDArray[np.int32], before_SrcT: NDArray[np.int32], worth: float) -> Codes:
        """The methods that :meth:`solve` found, from the last step to the first; an error is ``worth`` seconds."""
        codes_ST = np.full(self.cfg_ST.shape, _CACHED, dtype=np.int8)
        for s, codes_T in enumerate(codes_ST):
            whole, half = self.seconds_SM[s, [_WINDOW, _WINDOW_CFG]].tolist()
            refresh = self.steps
            while refresh > 0:
                until = refresh
                refresh, kind, window = last[:, s, until].tolist()
                while window != refresh:
                    shared = 0.0 if kind else worth * self.cfg_ST[s, window] * (until - window)
                    codes_T[window] = _WINDOW if whole <= half + shared else _WINDOW_CFG
                    until, window = window, int(before_SrcT[s, refresh, kind, window])
                codes_T[refresh] = _FULL_CFG if kind else _FULL
        return codes_ST

    def price(self, codes_NT: Codes, s: NDArray[np.intp] | None = None) -> _Columns:
        """What given methods cost, each column at site ``s``; by default one column a site."""
        s = np.arange(len(codes_NT)) if s is None else s
        seconds, total, output, residual = self.seconds_SM[s[:, None], codes_NT].sum(axis=1), *np.zeros((3, len(s)))
        output_at, residual_at, kind = np.zeros((3, len(s)), dtype=np.intp)
        paid = np.zeros(len(s), dtype=bool)
        for t, code in enumerate(codes_NT.T):
            windowed, refreshes = np.isin(code, (_WINDOW, _WINDOW_CFG)), np.isin(code, (_FULL, _FULL_CFG))
            shares = (code == _FULL_CFG) | ((code == _WINDOW_CFG) & (kind == 0))
            shared = np.where(shares, self.cfg_ST[s, t], 0.0)
            window = self.window_STT[s, t, residual_at] + residual + shared
            reused = self.cached_STT[s, t, output_at] + output
            error = np.select([refreshes, windowed], [shared, window], reused)
            total = total + error
            seconds += np.where(windowed & ~paid, self.refresh_Sc[s, kind], 0.0)
            paid = (paid | windowed) & ~refreshes
            output_at = np.where(code == _CACHED, output_at, t)
            output = np.where(code == _CACHED, output, error)
            residual_at = np.where(refreshes, t, residual_at)
            residual = np.where(refreshes, error, residual)
            kind = np.where(refreshes, code == _FULL_CFG, kind)
        return _Columns(codes_NT, seconds, total)

    def neighbours(self, columns: _Columns) -> list[_Columns]:
        """``columns`` with one cell changed at each site: for every method and every step but the first."""
        sites, steps = columns.codes.shape
        changes = [(t, code) for t in range(1, steps) for code in range(len(_METHODS))]
        codes_KST = np.tile(columns.codes, (len(changes), 1, 1))
        for codes_ST, (t, code) in zip(codes_KST, changes, strict=True):
            codes_ST[:, t] = code
        priced = self.price(codes_KST.reshape(-1, steps), np.tile(np.arange(sites), len(changes)))
        seconds_KS, errors_KS = priced.site_seconds.reshape(-1, sites), priced.site_errors.reshape(-1, sites)
        return [_Columns(*parts) for parts in zip(codes_KST, seconds_KS, errors_KS, strict=True)]

    def choice(self, columns: _Columns, bound: float) -> Choice:
        """``columns`` as methods."""
        rows = tuple(tuple(_METHODS[code] for code in row) for row in columns.codes.T.tolist())
        return Choice(methods=rows, seconds=columns.seconds, error=columns.error, bound=bound)
