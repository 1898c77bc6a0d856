"""Kernels for few rows: torch's numbers up to rounding, a row's own whatever other rows there are,
and torch's own operations where they cannot be had."""

import copy
import ctypes
import functools
import os
import pickle
import shutil
import stat
import tempfile
from functools import partial
from itertools import islice

import pytest
import torch
from models import endless, prompts, replays, settings, tiny
from torch.nn import functional as F

from redrafter import kernels, products
from redrafter.config import TargetConfig, TreeConfig
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.drafters.head import HeadDrafter
from redrafter.heads.load import load_head
from redrafter.heads.recurrent import RecurrentHead
from redrafter.kernels import HALVES, PAIRS, Panels, Sizes
from redrafter.products import PackedProduct
from redrafter.targets.fused_steps import KernelSteps, Wide
from redrafter.targets.load import load_target
from redrafter.targets.probe import prefilled

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler on this machine"
)
ROWS = (*range(1, 14), 24, 25, 50)  # of tiles of 6 and of 12
MASKED = torch.finfo(torch.float32).min


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matches(found, wanted):
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=0)


def near(found, wanted, close=1e-5):
    torch.testing.assert_close(found.double(), wanted.double(), rtol=close, atol=close)


# ------------------------------------------------------------------------------------ products


@pytest.mark.parametrize(("width", "out"), [(33, 16), (64, 50), (96, 131)])
@pytest.mark.parametrize("small", [False, True])
def test_products_are_right_and_rows_are_alone(made, width, out, small):
    matrix, bias = drawn(out, width), drawn(out)
    matrix = matrix.bfloat16().float() if small else matrix
    panels = Panels(made, matrix)
    assert panels.values.dtype == (torch.bfloat16 if small else torch.float32)
    x = drawn(max(ROWS), width, seed=1)
    every = panels(x)
    near(every, x.double() @ matrix.double().t())
    for n in ROWS:
        assert torch.equal(panels(x[:n]), every[:n])
        assert torch.equal(panels(x[-n:]), every[-n:])
    assert torch.equal(panels(x, bias), every + bias)
    residual = drawn(len(x), out, seed=2)
    assert torch.equal(panels(x, residual), every + residual)
    assert torch.equal(panels(x.view(5, 10, width)), every.view(5, 10, out))


@pytest.mark.parametrize(("width", "out"), [(33, 16), (64, 50), (97, 131)])
def test_pairs_are_products_of_rounded_rows_which_are_alone(made, width, out):
    """What a bfloat16 matrix is multiplied by where the processor has an instruction for it."""
    matrix, bias = drawn(out, width).bfloat16(), drawn(out)
    panels, x = Panels(made, matrix), drawn(max(ROWS), width, seed=1)
    assert panels.bytes == 2 and panels.kind == (PAIRS if made.pairs else HALVES)
    every = panels(x)
    near(every, (x.bfloat16() if made.pairs else x).double() @ matrix.double().t())
    for n in ROWS:
        assert torch.equal(panels(x[:n]), every[:n])
        assert torch.equal(panels(x[-n:]), every[-n:])
    assert torch.equal(panels(x, bias), every + bias)
    bad = x.clone()
    bad[3, width - 1] = torch.nan
    found = panels(bad)
    assert found[3].isnan().all() and torch.equal(found[4:], every[4:])
    assert panels(x[:0]).shape == (0, out)


def test_bfloat16_numbers_take_half_the_room_and_change_nothing(made):
    matrix, x = drawn(70, 40).bfloat16().float(), drawn(8, 40, seed=1)
    half, whole = Panels(made, matrix), Panels(made, matrix)
    assert half.bytes == 2
    other = Panels(made, torch.where(torch.arange(70)[:, None] == 69, matrix + 1e-6, matrix))
    assert other.bytes == 4  # one entry that is none
    assert torch.equal(half(x)[:, :69], other(x)[:, :69])
    assert torch.equal(half(x), whole(x))


def test_threads_change_no_digit(made):
    if not made.threads:
        pytest.skip("this machine's torch brings no OpenMP that kernels could share")
    matrix, x = drawn(4096, 128), drawn(9, 128, seed=1)
    panels = Panels(made, matrix)
    one = panels(x)
    torch.set_num_threads(2)
    try:
        assert x.shape[0] > panels.shared and torch.equal(panels(x), one)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(made, bad):
    panels, x = Panels(made, drawn(20, 32)), drawn(3, 32)
    x[1, 5] = bad
    found = panels(x)
    assert not found[1].isfinite().any() and found[[0, 2]].isfinite().all()


@torch.inference_mode()
def test_rows_of_another_width_are_an_error(made):
    product = PackedProduct(drawn(200, 100))
    assert product.kernels is not None
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        product(drawn(2, 200))


def test_no_rows_are_no_rows(made):
    product = PackedProduct(drawn(200, 100))
    assert Panels(made, product.matrix)(drawn(0, 100)).shape == (0, 200)
    with torch.inference_mode():
        assert product(drawn(2, 0, 100)).shape == (2, 0, 200)


def test_copies_multiply_alike(made):
    product, x = PackedProduct(drawn(200, 100)), drawn(3, 100, seed=1)
    with torch.inference_mode():
        wanted = product(x)
        assert product.panels is not None
        for other in (copy.deepcopy(product), pickle.loads(pickle.dumps(product))):
            assert other.matrix is not product.matrix and torch.equal(other(x), wanted)
    assert copy.deepcopy(made) is made


@pytest.mark.parametrize("tiles", [False, True])
def test_bfloat16_is_multiplied_where_the_processor_has_no_tiles_for_it(made, monkeypatch, tiles):
    monkeypatch.setattr(products, "has_tiles", lambda: tiles)
    matrix, x, bias = drawn(200, 100).bfloat16(), drawn(3, 100, seed=1), drawn(200)
    product, wide = PackedProduct(matrix, always=True), PackedProduct(matrix.float())
    assert product.copied_bytes == (0 if tiles else matrix.nbytes)
    half = x.bfloat16()
    with torch.inference_mode():
        found = product(half, bias.bfloat16())
        if tiles:
            assert torch.equal(found, F.linear(half, matrix, bias.bfloat16()))
        else:
            same = partial(near, close=1e-5) if made.pairs else matches
            assert product.panels.bytes == 2
            same(product(x, bias), wide(half.float() if made.pairs else x, bias))
            assert torch.equal(found, product(half.float(), bias.bfloat16().float()).bfloat16())
            matrix += 1
            same(product(half).float(), PackedProduct(matrix.float())(half.float()).bfloat16())
    assert torch.equal(product(half), F.linear(half, matrix)), "where gradients may pass"


# ----------------------------------------------------------------------------------- attention


def attended(made, q, keys, values, mask, scale=0.2):
    """q (B, N, heads, d) -> (B, N, heads, d)"""
    b, n, heads, dim = q.shape
    s = Sizes(scale=scale, rows=b, queries=n)
    steps = KernelSteps(made, None, scale, Wide())
    steps.sizes = s
    return steps.attend(q, keys, values, mask).view(b, n, heads, dim)


def wanted_attention(q, keys, values, mask, scale=0.2, rounds=False):
    """rounds: scaled queries and weights, to bfloat16"""
    groups, kept = q.shape[2] // keys.shape[1], torch.bfloat16 if rounds else torch.float64
    k, v = (x.repeat_interleave(groups, 1).double() for x in (keys, values))
    q = (q * scale).to(kept).double()
    scores = q.transpose(1, 2) @ k.transpose(-1, -2) + mask.double()
    weights = (scores - scores.amax(-1, keepdim=True)).exp().to(kept).double()
    return (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (3, 1, 8), (2, 2, 80)])
@pytest.mark.parametrize("n", [1, 7, 60])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_attention_is_right(made, heads, kv_heads, dim, n, kept):
    keys = 83
    store = drawn(2, 2, kv_heads, 90, dim, seed=1).to(kept)  # of which the first keys are used
    k, v = store[0][:, :, :keys], store[1][:, :, :keys]
    q = drawn(2, n, heads + 1, dim)[:, :, :heads]  # heads of something else lie behind
    seen = torch.rand((2, 1, n, keys), generator=torch.Generator().manual_seed(2)) < 0.6
    seen[..., 3] = True
    mask = torch.zeros(seen.shape).masked_fill(~seen, MASKED)
    rounds = made.pairs and kept is torch.bfloat16
    close = 1e-3 if rounds else 1e-5  # a weight between two bfloat16 may fall to either side
    for own in (mask, mask[:1, :, :1]):
        found, wanted = attended(made, q, k, v, own), wanted_attention(q, k, v, own, rounds=rounds)
        near(found, wanted, close)
        assert (found - wanted).abs().median() < 1e-6


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_keys_that_are_masked_might_lie_anywhere_or_not_at_all(made, kept):
    """Which is why a tree's node has, bit for bit, what its path alone would have."""
    dim, places = made.panel, torch.tensor([0, 2, 3, 7, 20, 33, 34])
    q = drawn(1, 5, 4, dim, seed=2)
    k, v, wide_k, wide_v = (
        drawn(1, 2, n, dim, seed=i).to(kept) for i, n in enumerate((7, 7, 40, 40))
    )
    alone = attended(made, q, k, v, torch.zeros(1, 1, 1, 7))
    wide_k[:, :, places], wide_v[:, :, places] = k, v
    mask = torch.full((1, 1, 1, 40), MASKED)
    mask[..., places] = 0
    assert torch.equal(attended(made, q, wide_k, wide_v, mask), alone)
    for i in range(5):  # and however many queries there are
        assert torch.equal(
            attended(made, q[:, i : i + 1], k, v, mask[..., places])[0, 0], alone[0, i]
        )


@pytest.mark.parametrize("window", [9, 83])
def test_only_keys_between_the_first_and_the_last_that_are_seen_are_read(made, window):
    """Before a text's own and beyond a window there may be anything: it weighs nothing."""
    n, keys = 60, 83
    q, k, v = drawn(2, n, 4, 32), drawn(2, 2, keys, 32, seed=1), drawn(2, 2, keys, 32, seed=2)
    place, at = torch.arange(n)[:, None] + torch.tensor([20, 3])[:, None, None], torch.arange(keys)
    seen = ((at <= place) & (at > place - window))[:, None]
    mask = torch.zeros(seen.shape).masked_fill(~seen, MASKED)
    found = attended(made, q, k, v, mask)
    near(found, wanted_attention(q, k, v, mask))
    for i in (0, 17, 59):
        one = attended(made, q[:, i : i + 1].contiguous(), k, v, mask[:, :, i : i + 1])
        assert torch.equal(one[:, 0], found[:, i])
    if window == 9:
        k[1, :, 63:], v[1, :, 63:] = float("nan"), float("nan")
        assert torch.equal(attended(made, q, k, v, mask)[:, :40], found[:, :40])


def test_sums_of_many_small_weights_are_right(made):
    keys = 40_000
    q, k, v = drawn(1, 2, 2, 8), drawn(1, 1, keys, 8, seed=1), drawn(1, 1, keys, 8, seed=2)
    mask = torch.zeros(1, 1, 1, keys)
    near(attended(made, q, k, v, mask, 3.0), wanted_attention(q, k, v, mask, 3.0), 1e-4)


def test_a_query_that_may_see_nothing_is_zero_and_what_is_not_a_number_is_seen(made):
    dim = made.panel
    q, k, v = drawn(1, 2, 1, dim), drawn(1, 1, 9, dim), drawn(1, 1, 9, dim)
    mask = torch.zeros(1, 1, 2, 9)
    mask[:, :, 0] = MASKED
    assert torch.equal(attended(made, q, k, v, mask)[0, 0], torch.zeros(1, dim))
    q[0, 1, 0, 0] = float("nan")
    assert attended(made, q, k, v, mask)[0, 1].isnan().all()


# -------------------------------------------------------------------------- what goes row by row


@pytest.mark.parametrize(("width", "dim"), [(96, 64), (41, 10)])
def test_norms_gates_and_rotations_are_right_and_rows_are_alone(made, width, dim):
    x, weight = drawn(13, width), drawn(width, seed=1)
    y = made.rms_norm(x, weight, 1e-5)
    near(y, F.rms_norm(x.double(), (width,), weight.double(), 1e-5))
    z = made.silu_gated(4 * drawn(13, 2 * width, seed=2))
    gate, up = (4 * drawn(13, 2 * width, seed=2)).double().chunk(2, -1)
    near(z, F.silu(gate) * up)
    for i in range(13):
        assert torch.equal(made.rms_norm(x[i : i + 1], weight, 1e-5)[0], y[i])
    heads = 3
    qk, cos, sin = drawn(13, (heads + 1) * dim), drawn(20, dim, seed=3), drawn(20, dim, seed=4)
    place = torch.randint(20, (13,), generator=torch.Generator().manual_seed(5))
    found = made.rotate(qk, place, cos, sin, heads, dim).view(13, heads, dim)
    part = qk.view(13, heads + 1, dim)[:, :heads].double()
    near(found, part * cos[place][:, None] + part.roll(dim // 2, -1) * sin[place][:, None])


def test_rows_may_lie_apart(made):
    x = drawn(6, 96)
    norm, gates = made.rms_norm(x[:, 32:64], torch.ones(32), 1e-5), made.silu_gated(x[:, 32:64])
    near(norm, F.rms_norm(x[:, 32:64].double(), (32,), eps=1e-5))
    near(gates, F.silu(x[:, 32:48].double()) * x[:, 48:64])


def test_a_position_without_a_rotation_is_an_error(made):
    qk, cos, sin = drawn(2, 16), drawn(5, 16), drawn(5, 16)
    for place in ([0, 5], [-1, 0]):
        with pytest.raises(IndexError, match="not all among 5"):
            made.rotate(qk, torch.tensor(place), cos, sin, 1, 16)


@pytest.mark.parametrize("far", [-1e4, -100.0, -3.0, 0.0, 3.0, 60.0, 1e4])
def test_gates_hold_far_from_zero(made, far):
    x = torch.full((1, 2 * made.panel), far)
    near(made.silu_gated(x), F.silu(x.double()[:, : made.panel]) * far, 1e-4)


# ------------------------------------------------------------------------------------ decoding


#: a family, of which queries may share all keys, and what its weights are kept in
WIDE = {
    "llama": ({}, "float32"),
    "qwen3": (dict(num_key_value_heads=1), "float32"),
    "qwen2": (dict(num_key_value_heads=2), "bfloat16"),
}


@pytest.fixture(scope="module", params=WIDE)
def wide(request, tmp_path_factory):
    """A target whose every step is a kernel's."""
    place, (changes, dtype) = tmp_path_factory.mktemp(request.param), WIDE[request.param]
    tiny.__wrapped__(request.param, **changes).model.float().save_pretrained(place)
    target = load_target(TargetConfig(path=str(place), device="cpu", dtype=dtype))
    if products.kernels is None:
        pytest.skip("no kernels could be made on this machine")
    if dtype == "bfloat16" and products.has_tiles():
        pytest.skip("this CPU multiplies tiles of bfloat16 itself")
    assert target.fused.own_steps is not None and target.fused.widens == (dtype == "bfloat16")
    return target


@pytest.mark.parametrize("draft", ["half", "chain", "often"])
def test_scores_of_drafted_text_are_plains_bit_for_bit(wide, draft, monkeypatch):
    """In float32: alone and token by token, or in trees beside other rows."""
    rows, config, seeds = prompts()[:3], settings(do_sample=True), [3, 4, 5]
    wanted = [plain(wide, [r], config, seeds=s) for r, s in zip(rows, seeds, strict=True)]
    drafter = replays(endless(wide, rows, config, seeds))[draft]
    chosen: dict[tuple[int, ...], list] = {}
    real = type(wide).project

    def project(self, hidden):
        out = real(self, hidden)
        for h, logits in zip(hidden.flatten(0, -2), out.flatten(0, -2), strict=True):
            chosen.setdefault(tuple(h[:4].tolist()), []).append((h.clone(), logits.clone()))
        return out

    monkeypatch.setattr(type(wide), "project", project)
    alone = [plain(wide, [r], config, seeds=s) for r, s in zip(rows, seeds, strict=True)]
    once, n = dict(chosen), len(chosen)
    assert [a.tokens for a in alone] == [w.tokens for w in wanted]
    chosen.clear()
    made = speculative(wide, rows, config, seeds=seeds, drafter=drafter)
    assert made.tokens == [w.tokens[0] for w in wanted] and made.stats.tokens_per_step > 1
    # Every hidden state that plain decoding met was met again, with the same scores.
    for key, ((h, logits), *_) in once.items():
        assert any(torch.equal(h, a) and torch.equal(logits, b) for a, b in chosen.get(key, []))
    assert n > 10


def test_a_head_in_half_precision_drafts_in_one_call_a_level_whatever_the_target(wide, tmp_path):
    head = RecurrentHead.for_target(wide, output="target")
    head.bfloat16().save_pretrained(tmp_path)
    head, rows, config = load_head(tmp_path, wide), prompts()[:2], settings(max_new_tokens=8)
    drafter = HeadDrafter(head, wide, TreeConfig(width=3, depth=3))
    made = speculative(wide, rows, config, drafter=drafter)
    assert head.dtype == torch.float32 and head._ready is not None
    assert made.tokens == plain(wide, rows, config).tokens


def test_weights_that_change_are_packed_anew(wide):
    layer = wide.fused.layers[0]
    x = drawn(3, 32)
    with torch.inference_mode():
        before = layer.down(drawn(3, 48))
    wide.model.model.layers[0].mlp.down_proj.weight.data.mul_(2)  # without a trace
    wide.new_cache(1, 8)
    with torch.inference_mode():
        assert torch.equal(layer.down(drawn(3, 48)), 2 * before)
    with torch.no_grad():
        wide.model.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    assert wide.fused.untouched
    with torch.inference_mode():
        assert torch.equal(layer.down(drawn(3, 48)), before)
    assert x.isfinite().all()


@torch.inference_mode()
def test_vectors_that_change_are_read_anew(wide):
    """Of a bfloat16 target the kernels read float32 copies of norms and biases."""
    named, text = dict(wide.model.model.layers[0].named_parameters()), torch.tensor([[5, 6, 7]])
    before = prefilled(wide, text, [3], 4)[1]
    biases = [part for part in named if part.endswith("q_proj.bias")]  # of some families
    for vector in (named[part] for part in ("input_layernorm.weight", *biases)):
        kept = vector.detach().clone()
        vector.data += 1  # without a trace
        changed = prefilled(wide, text, [3], 4)[1]
        vector.data.copy_(kept)
        assert not torch.equal(changed, before)
        assert torch.equal(prefilled(wide, text, [3], 4)[1], before)


@torch.inference_mode()
def test_what_does_not_fit_is_an_error_and_forwards_do_not_share_their_sizes(wide):
    steps, cache, tokens = wide.fused.own_steps, wide.new_cache(2, 8), torch.ones(2, 3).long()
    cache.prepare(3)
    place, mask = torch.arange(3).expand(2, 3), torch.zeros(2, 1, 3, 3)
    first = steps.begin(tokens, place, mask, cache)
    steps.begin(tokens[:1], place[:1], mask[:1], cache)
    assert (first.sizes.rows, first.sizes.queries) == (2, 3)
    for places, masks, why in (
        (place[:1], mask, "positions"),
        (place.int(), mask, "positions"),
        (place, mask[..., :2], "3 keys"),
        (place, {"": torch.zeros(3, 1, 3, 3)}, "a mask of"),
        (place, mask.double(), "not in float32 or bfloat16"),
        (place, mask.transpose(2, 3), "keys lie apart"),
    ):
        with pytest.raises(ValueError, match=why):
            wide.forward(tokens, places, masks, cache)


# ------------------------------------------------------------------------ where they come from


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """As in a process that has loaded none yet, with an empty cache folder; compiled quickly."""
    monkeypatch.setattr(kernels, "_FLAGS", ("-O0", *kernels._FLAGS[1:]))
    monkeypatch.setattr(kernels, "_TUNED", ((),))
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path / "cache"))
    load = functools.cache(kernels.load.__wrapped__)  # what this process has loaded stays loaded
    for module in (kernels, products):
        monkeypatch.setattr(module, "load", load)
    return tmp_path / "cache"


@needs_compiler
def test_they_are_compiled_once_and_anew_where_the_file_is_broken(anew, monkeypatch):
    assert kernels.load() is not None
    (kept,) = anew.glob("*.so")
    whole, compiled = kept.read_bytes(), []
    real = kernels._compiled
    monkeypatch.setattr(kernels, "_compiled", lambda kept: (compiled.append(kept), real(kept))[1])
    kernels.load.cache_clear()
    assert kernels.load() is not None and not compiled
    kept.unlink()  # what is loaded stays as it is
    kept.write_bytes(whole[:100])
    kernels.load.cache_clear()
    assert kernels.load() is not None and compiled == [kept]
    assert len(kept.read_bytes()) == len(whole)
    digest = kept.with_suffix(".sha256")
    said = digest.read_bytes()
    digest.write_bytes(b"\xff")
    assert kernels._key() in kept.name and not kernels._is_whole(kept)
    digest.write_bytes(said)
    assert kernels._is_whole(kept)
    if os.getuid() == 0:  # whose files are anybody's
        os.chown(kept, 1, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: -1)
    assert not kernels._is_whole(kept)
    monkeypatch.setattr(kernels, "_FLAGS", ("-O1",))
    assert kernels._key() not in kept.name


def test_each_of_their_files_is_part_of_what_they_are_kept_as(monkeypatch, tmp_path):
    sources = shutil.copytree(kernels.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(kernels, "SOURCES", sources)
    keys = [kernels._key()]
    for file in sorted(sources.iterdir()):
        file.write_text(file.read_text() + "\n")
        keys.append(kernels._key())
    assert len(keys) > 2 and len(set(keys)) == len(keys)


def test_whatever_is_the_default_they_are_tried_alike(made):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert kernels.is_right(made)
    finally:
        torch.set_default_dtype(torch.float32)


@needs_compiler
def test_a_compiler_may_have_arguments_and_a_folder_any_name(anew, monkeypatch, tmp_path):
    folder = tmp_path / "{0} {made}"
    folder.mkdir()
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("CC", f"{compiler} -DWIDTH=4")
    assert kernels.load().panel == 8


def test_without_a_place_to_make_them_there_are_none(anew, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert kernels.load() is None


@needs_compiler
@pytest.mark.parametrize(("part", "fault"), [
    ("sum[r][p][1] += b * w1;", "sum[r][p][1] += b * w0;"),
    ("N: block(N, 1, kind, x,", "N: block(N, 1, kind, x + (N == 5),"),  # so many rows alone
    ("block(N, TOGETHER(N), kind, x,", "block(N, TOGETHER(N), kind, x + (N == 2),"),  # together
    ("N: block(N, TOGETHER(N), kind, x,", "N: block(N, TOGETHER(N), kind, x + (kind < FLOATS),"),
    ("g + groups * (per - 1);", "g;"),  # what is left over
    ("(uint32_t)half << 16", "(uint32_t)half << 15"),  # bfloat16 keys
    ("+= *(const vec *)(mask + j)", "+= 0"),
    ("long begin = 0, end = s->keys;", "long begin = 0, end = s->keys - 3;"),
    ("while (begin < seen.begin && own[begin] <= MASKED)", "while (begin < seen.begin)"),
    ("sum / width + eps", "sum + eps"),
    ("exponential(-x) + 1.0f", "exponential(x) + 1.0f"),
    ("row / around->each", "row"),
    ("onto + row * around->out", "onto + around->out"),
    ("(x[i] - less) + more;", "x[i] + more;"),
    ("b[i] * c[half + i] +", "b[i] * c[i] +"),
])  # fmt: skip
def test_what_computes_something_else_is_not_used(part, fault, anew, monkeypatch, tmp_path):
    wrong = shutil.copytree(kernels.SOURCES, tmp_path / "csrc")
    (file,) = (file for file in wrong.iterdir() if part in file.read_text())
    file.write_text(file.read_text().replace(part, fault))
    monkeypatch.setattr(kernels, "SOURCES", wrong)
    every = kernels._commands  # of which the others would make the same again
    monkeypatch.setattr(kernels, "_commands", lambda *given: islice(every(*given), 1))
    tried, right = [], kernels.is_right
    monkeypatch.setattr(kernels, "is_right", lambda made: (tried.append(made), right(made))[1])
    assert kernels.load() is None and not anew.exists()
    assert tried, "it was compiled"


@needs_compiler
@pytest.mark.parametrize(("part", "fault"), [
    ("_mm512_loadu_ps(x + WIDTH)", "_mm512_loadu_ps(x)"),  # the second half of them
    ("to[whole / PANEL] = round_pairs(last)", "to[whole / PANEL] = (bits){0}"),
    ("paired.in = (s->in + 1) / 2", "paired.in = s->in / 2"),  # an odd width
    ("job.in = pairs ? (keys + 1) / 2", "job.in = pairs ? keys / 2"),  # an odd number of keys
    ("pairs[i] << 16 | pairs[i] >> 16", "pairs[i]"),  # each of two keys by the other's weight
    # A processor that adds the lower halves first: a hidden key changes the order of a sum.
    ("(__m512bh)(__m512i)a, (__m512bh)(__m512i)w)", "UPSIDE_DOWN(a), UPSIDE_DOWN(w))"),
])  # fmt: skip
def test_pairs_of_something_else_are_not_used(made, part, fault, anew, monkeypatch, tmp_path):
    if not made.pairs:
        pytest.skip("this processor does not multiply bfloat16 in pairs")
    turned = "-DUPSIDE_DOWN(x)=(__m512bh)_mm512_rol_epi32((__m512i)x,16)"
    monkeypatch.setattr(kernels, "_TUNED", (("-march=native", turned),))
    test_what_computes_something_else_is_not_used(part, fault, anew, monkeypatch, tmp_path)


@pytest.mark.parametrize("how", ["off", "no compiler", "one that fails"])
def test_without_them_torchs_own_operations_stay(anew, how, monkeypatch, tmp_path):
    monkeypatch.setattr(products, "kernels", None)
    if how == "off":
        monkeypatch.setenv("REDRAFTER_KERNELS", "off")
    elif how == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        fails = tmp_path / "cc"
        fails.write_text("#!/bin/sh\nexit 1\n")
        fails.chmod(fails.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
        monkeypatch.setenv("CC", str(fails))
    products.use_kernels(torch.device("cpu"))
    assert products.kernels is None
    product, x = PackedProduct(drawn(64, 32)), drawn(3, 32)
    with torch.inference_mode():
        torch.testing.assert_close(product(x), F.linear(x, product.matrix))
    assert product.panels is None


@needs_compiler
def test_vectors_of_other_processors_compute_the_same(made, tmp_path, monkeypatch):
    """Sixteen floats each, which this processor's are made of."""
    width = 8 if made.panel == 32 else 16
    monkeypatch.setattr(kernels, "_FLAGS", (*kernels._FLAGS, f"-DWIDTH={width}"))
    other = kernels._compiled(tmp_path / "kept.so")
    assert other is not None and other.panel == 2 * width
    matrix, x = drawn(100, 64), drawn(9, 64, seed=1)
    assert torch.equal(Panels(other, matrix)(x), Panels(made, matrix)(x))


def test_sizes_are_the_sources():
    """The structure that attention.c reads: longs, a float and an int, in its order."""
    text = (kernels.SOURCES / "attention.c").read_text()
    text = text.split("struct sizes {", 1)[1].split("};", 1)[0]
    lines = [line.split("/*")[0].strip() for line in text.splitlines()]
    names = [
        name.strip(" ;") for line in lines if line.startswith(("long ", "float ", "int "))
        for name in line.split(" ", 1)[1].split(",")
    ]  # fmt: skip
    assert names == [name for name, _ in Sizes._fields_]
    assert ctypes.sizeof(Sizes) >= 15 * ctypes.sizeof(ctypes.c_long) + 4


def test_another_device_compiles_none(monkeypatch):
    monkeypatch.setattr(products, "load", lambda: pytest.fail("compiled for nothing"))
    products.use_kernels(torch.device("meta"))
