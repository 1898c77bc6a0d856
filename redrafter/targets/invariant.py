"""A forward whose numbers do not depend on what else is computed with it: `target.exact invariant`.

Sums of floats depend on their order, and matrix libraries choose an order by the shape: a token
verified beside sixteen others, or in a batch of four, gets other last digits than alone, and in
bfloat16 that is often another token. Here every product has one shape:

    linear layers   in blocks of M rows, the last one padded
    attention       in blocks of M queries of one row by C keys, summed block after block; masked
                    keys have weight 0, and adding 0 is exact

so a token's numbers depend on its prefix alone, wherever in a block it stands, whatever drafted it
and whoever shares the batch. That is so where a library sums each row of such a product in the same
order whatever the others hold. M and C are therefore found, not assumed: `find_form` tries the
forms on the target itself and compares bit for bit; where none holds the target is refused.

Keys of a tree's node do not lie where they will once they are text, so this is for chains. In
float32 on a CPU our own kernels (redrafter/csrc/), where they make every step of the forward,
need no blocks: each sum goes over k = 0, 1, ..., and a node's ancestors lie in the order of its
path, so trees hold, too, at no cost. That as well is tried on the target before it is believed.
Sources: row-wise invariance of fixed-shape products, "Defeating Nondeterminism in LLM Inference"
(He et al., 2025); finding the form by trying, ours.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redrafter.contracts import InputError
from redrafter.targets.adapters import probe_tokens
from redrafter.targets.probe import prefilled, read_chain, tolerance

ATTENTION = "redrafter_invariant"  # the name by which transformers knows it
ROWS = (4, 8, 16, 32, 64)
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")
_USUAL = 16  # rows of a tile of matrix units, and of a chain of a root and 15 drafted tokens
_FACTOR = 4.0  # times what rounding usually changes logits by
_DECISIVE = 0.75  # part of its time below which other rows are taken: a noisy clock decides nothing
_COLUMNS = 64  # keys of a block of attention
_PROMPT = 170  # tokens of the probe's prompt: its text ends in another block of keys
_LENGTHS = (60, -60)  # other rows are so much longer or shorter, one after the other
_CHAINS = (2, 3, 5, 9, 17)  # new tokens of the forwards that are tried in turn
_LEVELS = 5  # of the tree that is tried
_TIMED = (1, 9)  # new tokens of the forwards that decide between forms that hold


@dataclass(frozen=True)
class Form:
    """M rows a block, C keys a block."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"blocks of {self.rows} rows, {self.columns} keys"


@dataclass(frozen=True)
class KernelForm:
    """The fused forward as it is, by kernels that sum each row alone."""

    def __str__(self) -> str:
        return "kernels that sum each row alone"


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
              attention_mask: Tensor | None, scaling: float | None = None,
              softcap: float | None = None, s_aux: Tensor | None = None,
              **options: Any) -> tuple[Tensor, None]:  # fmt: skip
    """Attention whose every product has one shape: M queries of one row by C keys.

    The blocks of keys are summed one after the other, so that a longer cache adds zeros at the end
    and moves no border. Scores and sums are kept in float32 at least.
    query: (B, heads, N, d); key, value: (B, kv heads, S, d); attention_mask: (B or 1, 1, N or 1, S)
    additive. Returns (B, N, heads, d) and, as it keeps no weights, None.
    """
    if s_aux is not None:
        raise NotImplementedError("attention sinks")
    form: Form = module.invariant_form
    n, width, dim = query.shape[2], key.shape[2], query.shape[3]
    scaling = dim**-0.5 if scaling is None else scaling
    more = -width % form.columns
    if attention_mask is None:
        attention_mask = query.new_zeros(1, 1, n, width)
    mask = attention_mask[..., :width].expand(len(query), -1, n, -1)
    if more:
        key, value = (F.pad(x, (0, 0, 0, more)) for x in (key, value))
        mask = F.pad(mask, (0, more), value=torch.finfo(mask.dtype).min)
    groups = query.shape[1] // key.shape[1]
    query, mask = (F.pad(x, (0, 0, 0, -n % form.rows)) for x in (query, mask))
    rows = []
    for b in range(len(query)):
        keys = key[b].repeat_interleave(groups, 0).split(form.columns, 1)
        values = value[b].repeat_interleave(groups, 0).split(form.columns, 1)
        rows.append(torch.cat([
            _block(
                query[b, :, i : i + form.rows].contiguous(), keys, values,
                mask[b, :, i : i + form.rows], scaling, softcap,
            )
            for i in range(0, query.shape[2], form.rows)
        ], 1))  # fmt: skip
    return torch.stack(rows)[:, :, :n].transpose(1, 2), None


def _block(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor, scaling: float,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """(heads, M, d) of queries (heads, M, d) over blocks of keys (heads, C, d); mask: (1, M, S)."""
    columns = keys[0].shape[1]
    scores = [query @ k.contiguous().transpose(1, 2) for k in keys]
    wide = torch.promote_types(query.dtype, torch.float32)
    largest = torch.full((), -torch.inf, dtype=wide, device=query.device)
    for i, own in enumerate(scores):
        own = own.to(wide) * scaling
        if softcap is not None:
            own = torch.tanh(own / softcap) * softcap
        scores[i] = own + mask[..., i * columns : (i + 1) * columns].to(wide)
        largest = torch.maximum(largest, scores[i].amax(-1, keepdim=True))  # exact in any order
    total = summed = 0.0
    for own, v in zip(scores, values, strict=True):
        weight = torch.exp(own - largest)
        total = total + weight.sum(-1, keepdim=True)
        summed = summed + (weight.to(v.dtype) @ v.contiguous()).to(wide)
    return (summed / total).to(query.dtype)


def in_blocks(compute: Callable[[Tensor], Tensor], rows: int, x: Tensor) -> Tensor:
    """`compute` of (..., H), `rows` of its rows at a time, the last block padded with zeros."""
    flat = x.reshape(-1, x.shape[-1])
    n = len(flat)
    flat = F.pad(flat, (0, 0, 0, -n % rows))
    # Copies begin at an address of their own: libraries look at alignment, too.
    blocks = [flat] if len(flat) == rows else [block.clone() for block in flat.split(rows)]
    made = torch.cat([compute(block) for block in blocks])[:n]
    return made.view(*x.shape[:-1], made.shape[-1])


def make_invariant(target: Any) -> Form | KernelForm:
    """Change how the target's model computes: not at all where kernels make every step and that
    holds, else in the form that `find_form` finds.

    Raises InputError where its class has no eager attention of transformers' kind or no form holds.
    """
    if target.fused is not None and target.fused.own_steps is not None:
        target.invariant = KernelForm()
        if difference(target) is None:
            return target.invariant
    target.fused = target.invariant = None
    register()
    if target.has_states:
        raise InputError(_refusal(target, "its layers keep states"))
    layers = [m for m in target.model.modules() if type(m).__name__.endswith("Attention")]
    modules = {type(m).__module__ for m in layers}
    if not layers or not all(hasattr(sys.modules[m], "eager_attention_forward") for m in modules):
        raise InputError(_refusal(target, "its class brings attention of its own"))
    ids = probe_tokens(target.vocab_size, _fitting(target)).to(target.device)
    with torch.inference_mode():
        usual = target.project(target.states(ids))
    target.model.set_attn_implementation(ATTENTION)
    target.lm_product = None  # packed for every shape alike; the lm_head is one of the products
    products = list(_parts(target))
    whole = [m.forward for m in products]

    def use(form: Form) -> None:
        for module in layers:
            module.invariant_form = form
        for module, compute in zip(products, whole, strict=True):
            module.forward = partial(in_blocks, compute, form.rows)

    try:
        form = find_form(target, use)
        use(form)
        with torch.inference_mode():
            off = float((target.project(target.states(ids)) - usual).abs().max())
    except InputError:
        raise
    except Exception as error:  # each class has its own way to fail
        raise InputError(_refusal(target, f"{type(error).__name__}: {error}")) from error
    if not off <= _FACTOR * tolerance(target, usual.float()):
        raise InputError(_refusal(target, f"its attention is of another kind: logits off by {off}"))
    target.invariant, target.verifies = form, "chains"
    return form


def _parts(target: Any) -> Iterator[nn.Module]:
    """What is computed in blocks: products, and activations, whose last digits depend on where in
    a tensor a number lies (torch's silu has another form for what fills no whole vectors)."""
    from transformers.pytorch_utils import Conv1D

    for module in [*target.model.modules(), target.wide_head]:
        activates = type(module).__module__ in _ACTIVATIONS and not any(module.parameters())
        if isinstance(module, (nn.Linear, Conv1D)) or activates:
            yield module


def register() -> None:
    """Make the attention known to transformers, by name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)


# ------------------------------------------------------------------------------ which form


def find_form(
    target: Any,
    use: Callable[[Form], None],
    rows: Iterable[int] = ROWS,
) -> Form:
    """The cheapest form in which the target's logits are equal bit for bit however they are
    computed. use: makes the target compute in a form. Raises InputError where there is none."""
    seconds: dict[Form, float] = {}
    for form in (Form(m, _COLUMNS) for m in rows):
        use(form)
        seconds[form] = _seconds(target) * (_DECISIVE if form.rows == _USUAL else 1.0)
    differ = []
    for form in sorted(seconds, key=seconds.__getitem__):
        use(form)
        why = difference(target)
        if why is None:
            return form
        differ.append(f"{form}: {why}")
    raise InputError(
        _refusal(target, f"no form of its products gives equal numbers ({'; '.join(differ)})")
    )


@torch.inference_mode()
def difference(target: Any) -> str | None:
    """What changes the logits of a text by at least a bit; None: nothing that was tried.

    Tried, against the text alone and one token at a time: chains of several lengths, each after a
    wrong one that is dropped, the prompt read in other pieces, other rows of other lengths in the
    batch, longer and shorter ones, in each place, the whole text at once without a cache, and where
    trees are to hold, the text as a path through one.
    """
    prompt, new = _fitting(target) - sum(_CHAINS), sum(_CHAINS)
    ids = probe_tokens(target.vocab_size, 3 * (prompt + new + max(_LENGTHS))).view(3, -1)
    text, others = ids[0].to(target.device), ids[1:].to(target.device)
    alone = _decode(target, [text], [prompt], [1] * new)[0]
    if not torch.equal(_decode(target, [text], [prompt], _CHAINS)[0], alone):
        return "several tokens at once"
    again = _decode(target, [text], [5], (prompt - 5, *reversed(_CHAINS)))[0]
    if not torch.equal(again[-new:], alone[-new:]):
        return "a prompt read in other pieces"
    for place in range(3):
        rows = [*others[:place], text, *others[place:]]
        lengths = [max(1, prompt + more) for more in _LENGTHS]
        lengths.insert(place, prompt)
        if not torch.equal(_decode(target, rows, lengths, _CHAINS)[place], alone):
            return "other rows in the batch"
    trees = isinstance(target.invariant, KernelForm)
    if trees and not torch.equal(_decode_tree(target, text, prompt), alone[: _LEVELS + 3]):
        return "a tree"
    text = text[: prompt + new]
    whole = target.project(target.states(text[None]))[0, prompt - 1 :]
    return None if torch.equal(whole, alone) else "the whole text at once"


def _fitting(target: Any) -> int:
    """Tokens of the probe's text: of a target with a short context fewer."""
    most = target.max_positions or 1 << 30
    return min(_PROMPT + sum(_CHAINS), most - max(_LENGTHS) - max(_CHAINS))


def _decode(
    target: Any, rows: list[Tensor], prompts: list[int], steps: Sequence[int]
) -> list[Tensor]:
    """Of each row, (1 + sum of steps, V) logits: of its prompt's last token, then of the text in
    chains of so many tokens. Before each longer chain a wrong one is read and dropped."""
    tokens = torch.stack(rows)
    cache, first = prefilled(target, tokens, prompts, sum(steps) + max(steps))
    found = [first]
    for n in steps:
        where = cache.length[:, None] + torch.arange(n, device=target.device)
        right = tokens.gather(1, where.clamp(max=tokens.shape[1] - 1))
        if n > 1:
            read_chain(target, cache, right.flip(1))
        found.append(read_chain(target, cache, right))
        cache.commit([length + n for length in cache.lengths])
    return list(torch.cat(found, 1))


def _decode_tree(target: Any, text: Tensor, prompt: int) -> Tensor:
    """(3 + _LEVELS, V) logits as `_decode` gives them: of the prompt's last token, of the text as a
    path through a tree of two more children a level, on either side of the text's, and of the token
    after it, once the path is committed."""
    cache, first = prefilled(target, text[None], [prompt], 3 * _LEVELS + 2)
    n, device = 3 * _LEVELS + 1, text.device
    path = torch.tensor([0, *range(2, n, 3)], device=device)  # the root, the middle of each level
    level = torch.tensor([0, *(1 + i // 3 for i in range(n - 1))], device=device)
    tokens = text[prompt + level].flip(0)  # wrong ones, beside the path
    tokens[path] = text[prompt + level[path]]
    seen = torch.eye(n, dtype=torch.bool, device=device)
    for node in range(1, n):
        seen[node, path[: level[node]]] = True
    cache.prepare(n)
    before = torch.ones(n, prompt, dtype=torch.bool, device=device)
    position = prompt + level[None]
    keys = torch.cat([torch.arange(prompt, device=device)[None], position], 1)
    masks = target.masks(torch.cat([before, seen], 1)[None], position, keys)
    nodes = target.forward(tokens[None], position, masks, cache).logits[0, path]
    cache.commit([prompt + len(path)], path[None])
    after = read_chain(target, cache, text[None, prompt + len(path)][None])
    return torch.cat([first[0], nodes, after[0]])


def _seconds(target: Any) -> float:
    """Of a plain step and one that verifies a chain, the quickest of three."""
    ids = probe_tokens(target.vocab_size, 64)[0].to(target.device)
    total = 0.0
    for n in _TIMED:
        times = []
        for _ in range(3):
            cache = target.new_cache(1, 64)
            begin = time.perf_counter()
            float(read_chain(target, cache, ids[None, :n])[0, 0, 0])  # until it is there
            times.append(time.perf_counter() - begin)
        total += min(times)
    return total


def _refusal(target: Any, why: str) -> str:
    return (
        f"target.exact invariant: {target.name} on {target.device} in {target.dtype}: {why}; leave "
        "it at reported, where differences are shown and explained"
    )
