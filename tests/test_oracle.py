"""The oracle itself: what the contract implies without a reference, and one site computed by hand.

The cases are tested here as well: a comparison with the oracle shows nothing about a site whose
attention the output does not depend on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import CASES, CFG_CASES, Case, case, dit, relative, tensor_of, toy
from oracle import Oracle, OracleError, PlanLike, dense_attention, replaced_forward
from torch import Tensor, nn

from difa_fx.plan import CFGOrder, Method, Plan

EVERY_CASE = pytest.mark.parametrize("name", CASES)
EVERY_CFG_CASE = pytest.mark.parametrize("name", CFG_CASES)
ORDERS = pytest.mark.parametrize("order", ["cond_first", "uncond_first"])
EXACT = 1e-5


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors of a few thousand numbers only lose by threads, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plan_of(model: Case, *rows: str | Sequence[str], window: int | None = None) -> Plan:
    """A plan for ``model``; a row may be one method for every site."""
    count = len(model.sites)
    return Plan(
        steps=len(rows),
        sites=model.sites,
        methods=[[row] * count if isinstance(row, str) else list(row) for row in rows],
        window=model.tokens // 8 if window is None else window,
        cfg=model.cfg_order,
    )


def outputs(model: Case, plan: PlanLike, calls: list) -> list[Tensor]:
    """What the oracle gives for each call."""
    return [tensor_of(output) for output in Oracle(model.model, plan).run(calls)]


def plain(model: Case, call: tuple) -> Tensor:
    """What the model itself gives."""
    args, kwargs = call
    with torch.no_grad():
        return tensor_of(model.model(*args, **kwargs))


def watch(site: nn.Module, into: list[tuple[Tensor, Tensor]]) -> torch.utils.hooks.RemovableHandle:
    """Appends the site's input and output to ``into`` at every call."""
    return site.register_forward_hook(lambda _, args, y: into.append((args[0].clone(), y.clone())))


@EVERY_CASE
def test_all_full_is_the_plain_model(name: str) -> None:
    model = case(name)
    calls = model.generation(2)
    for got, call in zip(outputs(model, plan_of(model, "full", "full"), calls), calls, strict=True):
        assert relative(got, plain(model, call)) < EXACT


@EVERY_CASE
def test_window_over_all_tokens_is_full(name: str) -> None:
    model = case(name)
    calls = model.generation(2)
    got = outputs(model, plan_of(model, "full", "window", window=model.tokens), calls)
    assert relative(got[1], plain(model, calls[1])) < EXACT


@EVERY_CASE
@pytest.mark.parametrize("method", ["window", "cached"])
def test_full_then_compressed_on_the_same_input_is_full(name: str, method: str) -> None:
    model = case(name)
    calls = model.generation(1) * 2
    got = outputs(model, plan_of(model, "full", method), calls)
    assert relative(got[1], plain(model, calls[0])) < EXACT


@EVERY_CFG_CASE
@pytest.mark.parametrize("rows", [("full", "full+cfg"), ("full", "window+cfg"), ("full", "full+cfg", "window")])
def test_equal_halves_lose_nothing_by_sharing(name: str, rows: tuple[str, ...]) -> None:
    model = case(name)
    calls = model.generation(1, same_halves=True) * len(rows)
    got = outputs(model, plan_of(model, *rows), calls)
    assert relative(got[-1], plain(model, calls[0])) < EXACT


@pytest.mark.parametrize("name", [name for name in CASES if name != "digits"])  # which takes minutes
def test_every_method_at_every_site_shows_in_the_output(name: str) -> None:
    model = case(name)
    calls = model.generation(2)
    expected = plain(model, calls[1])
    for index, site in enumerate(model.sites):
        for method in Method:
            row = ["full"] * len(model.sites)
            row[index] = method.value
            if method is Method.FULL or (method.shares_cfg and model.cfg_order is None):
                continue
            if method is Method.FULL_CFG and name.startswith("pixart") and index == 0:
                continue  # captions enter after the first site: its halves are equal
            got = outputs(model, plan_of(model, "full", row), calls)
            assert relative(got[1], expected) > 3e-3, f"{method} at {site}"


@EVERY_CASE
def test_output_depends_on_every_site(name: str) -> None:
    model = case(name)
    call = model.generation(1)[0]
    expected = plain(model, call)
    for path in model.sites:
        site = model.model.get_submodule(path)

        def silent(*args: object, own=site.forward, **kwargs: object) -> Tensor:
            nothing = mock.Mock(side_effect=lambda q, *_, **__: torch.zeros_like(q))
            with mock.patch.object(F, "scaled_dot_product_attention", nothing):
                y = own(*args, **kwargs)
            assert nothing.call_count == 1
            return y

        with replaced_forward(site, silent):
            assert relative(plain(model, call), expected) > 1e-3, path


@EVERY_CASE
def test_case_is_what_it_says(name: str) -> None:
    model = case(name)
    calls = model.generation(1)
    oracle = Oracle(model.model, plan_of(model, "full"))
    oracle.run(calls)
    assert {r.shape[2] for r in oracle.residuals.values()} == {model.tokens}
    paths = {path for path, _ in model.model.named_modules()}
    assert paths.issuperset(model.rejected)
    latents = calls[0][0][0]
    assert latents.shape[0] == model.batch
    assert (model.cfg_order is not None) == (name in CFG_CASES)
    if model.cfg_order is not None:
        first, second = latents.chunk(2)
        assert first.equal(second)
        assert relative(*plain(model, calls[0]).chunk(2)) > 1e-2


def test_inputs_are_seeded_and_differ_between_steps() -> None:
    model = case("toy_mask_bias")
    for again, other in zip(model.generation(2), model.generation(2), strict=True):
        assert all(a.equal(b) for a, b in zip(again[0], other[0], strict=True))
    first, second = model.generation(2, afresh=True)
    assert not any(a.equal(b) for a, b in zip(first[0], second[0], strict=True))


def test_cached_does_not_see_the_new_input() -> None:
    model = case("dit")
    seen: list[tuple[Tensor, Tensor]] = []
    with watch(model.model.get_submodule(model.sites[1]), seen):
        got = outputs(model, plan_of(model, "full", "cached"), model.generation(2))
    (x0, y0), (x1, y1) = seen
    assert y1.equal(y0)
    assert relative(x1, x0) > 0.1
    assert relative(got[1], got[0]) > 0.1  # by the residual stream, the gate and the MLP


@ORDERS
def test_shared_half_is_the_conditional_one(order: CFGOrder) -> None:
    model = dit(cfg_order=order)
    site = model.model.get_submodule(model.sites[1])
    seen: list[tuple[Tensor, Tensor]] = []
    with watch(site, seen):
        outputs(model, plan_of(model, "full", "full+cfg"), model.generation(2))
    x, y = seen[1]
    cond = 0 if order == "cond_first" else 1
    expected = site(x.chunk(2)[cond]).detach()
    assert relative(y.chunk(2)[0], expected) < EXACT
    assert y.chunk(2)[0].equal(y.chunk(2)[1])
    assert relative(y.chunk(2)[0], site(x.chunk(2)[1 - cond]).detach()) > 1e-2


def by_hand(site: nn.Module, x_BND: Tensor, window: int) -> tuple[np.ndarray, np.ndarray]:
    """A(Px) and W(Px) of a plain toy's site, [B, N, D], one query at a time."""

    def project(linear: nn.Linear) -> np.ndarray:
        weight, bias = (p.detach().double().numpy() for p in (linear.weight, linear.bias))
        return x_BND.double().numpy() @ weight.T + bias

    q, k, v = (project(linear) for linear in (site.to_q, site.to_k, site.to_v))
    full, windowed = np.zeros_like(q), np.zeros_like(q)
    batch, tokens, width = q.shape
    for b, i, h in np.ndindex(batch, tokens, site.heads):
        lanes = slice(h * width // site.heads, (h + 1) * width // site.heads)
        scores = k[b, :, lanes] @ q[b, i, lanes] / np.sqrt(width / site.heads)
        for out, keys in (
            (full, range(tokens)),
            (windowed, range(max(0, i - window), min(tokens, i + window + 1))),
        ):
            weights = np.exp(scores[list(keys)])
            out[b, i, lanes] = weights / weights.sum() @ v[b, list(keys), lanes]
    return full, windowed


HAND = [
    ("full", "window"),
    ("full", "window+cfg"),
    ("full", "full+cfg", "window"),
    ("full", "full+cfg", "window+cfg"),
    ("full", "window", "window+cfg"),
    ("full", "window+cfg", "cached"),
]


@ORDERS
@pytest.mark.parametrize("methods", HAND, ids=" ".join)
def test_site_by_hand(methods: tuple[str, ...], order: CFGOrder) -> None:
    model = toy(blocks=1, width=8, tokens=6, batch=4, cfg_order=order)
    site = model.model.get_submodule("blocks.0.attn")
    seen: list[tuple[Tensor, Tensor]] = []
    with watch(site, seen):
        outputs(model, plan_of(model, *methods, window=1), model.generation(len(methods)))

    cond = slice(0, 2) if order == "cond_first" else slice(2, 4)
    weight, bias = (p.detach().double().numpy() for p in (site.to_out.weight, site.to_out.bias))
    y = r = np.zeros(())
    for method, (x, got) in zip(methods, seen, strict=True):
        full, windowed = by_hand(site, x, window=1)
        twice = (lambda a: np.concatenate([a[cond], a[cond]])) if "+" in method else (lambda a: a)
        if method.startswith("full"):
            r = twice(full - windowed)
            y = twice(full) @ weight.T + bias
        elif method.startswith("window"):
            y = twice(windowed + r) @ weight.T + bias
        np.testing.assert_allclose(got.numpy(), y, rtol=0, atol=1e-5)
    assert abs(full - windowed).max() > 1e-2


@pytest.mark.parametrize("kind", [None, "bool", "float"])
def test_dense_attention_is_torchs(kind: str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 12, 8, generator=generator)
    bias = torch.randn(2, 1, 12, 12, generator=generator)
    mask = {None: None, "bool": bias > 0, "float": bias}[kind]
    for scale in (None, 0.3):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        assert relative(dense_attention(q, k, v, mask, scale=scale), expected) < EXACT
    near = (torch.arange(12)[:, None] - torch.arange(12)).abs() <= 2
    banded = near if kind is None else (bias > 0) & near if kind == "bool" else None
    banded = bias.masked_fill(~near, -torch.inf) if banded is None else banded
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=banded)
    assert relative(dense_attention(q, k, v, mask, window=2), expected) < EXACT


def test_row_without_keys_gives_zeros() -> None:
    q, k, v = torch.ones(3, 1, 1, 6, 4)
    real = torch.tensor([True, True, True, False, False, False])
    got = dense_attention(q, k, v, real.view(1, 1, 1, 6), window=1)
    torch.testing.assert_close(got[0, 0, :, 0], torch.tensor([1.0, 1, 1, 1, 0, 0]))


def test_run_starts_clean_and_repeats() -> None:
    model = case("toy_three_blocks")
    rows = ["full"] * 3, ["window", "cached", "full+cfg"], ["cached", "window+cfg", "window"]
    plan, calls = plan_of(model, *rows), model.generation(3)
    oracle = Oracle(model.model, plan)
    once = [tensor_of(output) for output in oracle.run(calls)]
    oracle(0, *calls[1][0])  # a generation that stops half-way
    again = [tensor_of(output) for output in oracle.run(calls)]
    assert all(a.equal(b) for a, b in zip(once, again, strict=True))
    oracle.reset()
    assert not oracle.outputs
    assert not oracle.residuals


def test_model_is_restored() -> None:
    model, own = case("dit"), F.scaled_dot_product_attention
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    plan = plan_of(model, "full", "full+cfg")
    outputs(model, plan, model.generation(2))
    with pytest.raises(OracleError, match="no conditional half"):
        Oracle(model.model, plan)(1, torch.ones(3, 4, 8, 8), torch.ones(3), torch.ones(3).long())
    assert F.scaled_dot_product_attention is own
    assert not any("forward" in module.__dict__ for module in model.model.modules())
    assert all(value.equal(before[key]) for key, value in model.model.state_dict().items())


def test_what_cannot_be_followed_is_refused() -> None:
    model = case("toy_one_block")
    ((args, _),) = model.generation(1)
    plan = mock.Mock(sites=("blocks.0.attn",), methods=[["fast"]], window=4, cfg=None)
    with pytest.raises(OracleError, match="unknown method 'fast'"):
        Oracle(model.model, plan)(0, *args)
    plan.sites, plan.methods = ("blocks.0.attn.to_q",), [["full"]]
    with pytest.raises(OracleError, match="0 attentions instead of one"):
        Oracle(model.model, plan)(0, *args)
    with pytest.raises(OracleError, match="step 1 of a plan of 1 steps"):
        Oracle(model.model, plan)(1, *args)


def test_twenty_eight_layers() -> None:
    model = dit(layers=28, width=16, heads=2, sample_size=4)
    (call,) = model.generation(1)
    (got,) = outputs(model, plan_of(model, "full"), [call])
    assert relative(got, plain(model, call)) < EXACT
