"""Does a model do what verification asks of it? Found out by trying, on a few tokens.

Signatures do not tell: classes swallow `position_ids`, replace a mask of single keys by their own,
count positions from the cache, look to the right, or change their logits behind lm_head. So two
ragged rows are prefilled and a tree of two branches is verified as decoding does it, with our
masks, positions and cache, and every path is compared with the bare model's forward of that path.

    rows      [a b], [c d e]            prefilled padded on the right
    tree      root -- 1                 each row has its own tokens; branches are siblings, so a
               |                        node's place among the keys is not its position
               +----- 2 -- 3

A model with recurrent layers verifies chains: of each row another part is accepted, what was
rejected is another text's, and a second chain goes on from there.

    chain     0 -- 1 -- 2 -- 3          row 0 accepts node 0, row 1 nodes 0 to 2; both go on

Three forwards (of a chain four) of at most 4 x 6 tokens each, once per target; more only where a
difference is larger than rounding usually makes one: then the model is compared with itself as
well. Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from redrafter.contracts import InputError
from redrafter.targets.adapters import probe_tokens
from redrafter.targets.cache import RowCache

_PROMPTS = (2, 3)
_WINDOW = 3  # shorter than the paths
_PARENT = (0, 0, 0, 2)
_PATHS = ((0, 1), (0, 2, 3))  # from the root to each leaf
_CHAIN = (tuple(range(len(_PARENT))),)
_ACCEPTED = (1, 3)  # of each row's first chain
# As for stored figures of a head (`redrafter.export.rounding`): several roundings to the dtype one
# after the other, sums of many terms, which are kept in float32 at least, and how many times a
# measured difference another order of the same sums may reach.
_ROUNDINGS, _SUMS, _FACTOR = 4.0, 64.0, 4.0


def check_target(target: Any) -> None:
    """Raises InputError where the model's logits, computed as decoding does, are not its own.

    Processes that share a target's weights all call it together.
    """
    tokens = _tokens(target)
    paths = _paths(target, tokens)
    with torch.inference_mode(), _short_windows(target):
        try:
            own, ours = _compare(target, tokens, paths)
        except Exception as error:  # each class has its own way to fail
            raise InputError(_refusal(target, _why_raised(target, paths, error))) from error
        finite = bool((own.isfinite().all() & ours.isfinite().all()).item())
        difference = float((own - ours).abs().max())
        if not _any(target, not finite or difference > tolerance(target, own)):
            return
        if not finite:
            raise InputError(_refusal(target, _why_not_finite(target, own)))
        measured = _own_rounding(target, paths, own)
        if not _any(target, difference > tolerance(target, own, measured)):
            return
        why = _why_wrong(target, paths, measured)
    largest = float(own.abs().max())
    raise InputError(
        _refusal(target, f"{why} (its logits, up to {largest:.3g}, are off by {difference:.2g})")
    )


def _any(target: Any, flag: bool) -> bool:
    """Of all processes that share the weights: what depends on it makes forwards, together."""
    return target.backbone.any_of(flag) if target.sharded else flag


@contextmanager
def _short_windows(target: Any) -> Iterator[None]:
    """Windows of a few tokens, so that few tokens show what the class makes of a window: whether
    it applies one, and where it ends. transformers reads them off the configuration when it makes
    a mask."""
    if target.sees_all or not any(target.windows.values()):
        yield
        return
    windows, configured = target.windows, target.config.sliding_window
    target.windows = {name: w and min(w, _WINDOW) for name, w in windows.items()}
    target.config.sliding_window = min(configured, _WINDOW)
    try:
        yield
    finally:
        target.windows, target.config.sliding_window = windows, configured


def _refusal(target: Any, why: str) -> str:
    return f"{target.name}: {type(target.model).__name__} {why}; it cannot be a target"


# ------------------------------------------------------------------------------- two ways


def _tokens(target: Any) -> Tensor:
    """(2, 7) int64: of each row a prompt of up to 3 tokens, then the tree's nodes.

    No id that a configuration gives a meaning: models treat padding and images in their own ways.
    """
    special = set(_special_ids(target.model.config.to_dict()))
    n = len(_PROMPTS) * (max(_PROMPTS) + len(_PARENT))
    known = getattr(target.model.get_input_embeddings(), "num_embeddings", target.vocab_size)
    spread = probe_tokens(min(known, target.vocab_size), n + len(special))[0].tolist()
    free = [t for t in spread if t not in special] or [0]
    picked = [free[i % len(free)] for i in range(n)]
    return torch.tensor(picked, device=target.device).view(len(_PROMPTS), -1)


def _special_ids(fields: dict[str, Any]) -> Iterator[int]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(name).endswith(("token_id", "token_index", "padding_idx")):
            found = value if isinstance(value, (list, tuple)) else [value]
            yield from (t for t in found if isinstance(t, int))


def _branches(target: Any) -> tuple[tuple[int, ...], ...]:
    return _PATHS if target.verifies == "trees" else _CHAIN


def _paths(target: Any, tokens: Tensor) -> Tensor:
    """(4, 6) or, of chains, (2, 7) int64: each row's text along each path, with any token behind a
    shorter one."""
    branches = _branches(target)
    width = max(_PROMPTS) + max(map(len, branches))
    made = []
    for row, length in zip(tokens, _PROMPTS, strict=True):
        nodes = row[max(_PROMPTS) :]
        for path in branches:
            text = torch.cat([row[:length], nodes[list(path)]])
            made.append(torch.cat([text, row[: width - len(text)]]))
    return torch.stack(made)


def _places(target: Any) -> Iterator[tuple[int, int, list[int], list[int]]]:
    """Of every path: (its place among `_paths`, row, its nodes, their positions)."""
    branches = _branches(target)
    for row, length in enumerate(_PROMPTS):
        for i, path in enumerate(branches):
            yield row * len(branches) + i, row, list(path), [length + d for d in range(len(path))]


def _compare(target: Any, tokens: Tensor, paths: Tensor) -> tuple[Tensor, Tensor]:
    """(n, V) logits each, in float32 at least: the model's own, and as decoding computes them."""
    whole = _wide(_own_logits(target, paths))
    decoded = _decoded if target.verifies == "trees" else _decoded_chains
    first, nodes = decoded(target, tokens)
    own, ours = [], []
    for i, row, path, positions in _places(target):
        own += [whole[i, [_PROMPTS[row] - 1]], whole[i, positions]]
        ours += [first[row], nodes[row, path]]
    return torch.cat(own), torch.cat(ours)


def _own_logits(target: Any, tokens: Tensor) -> Tensor:
    """(B, T, V), of the bare model."""
    return target.model(input_ids=tokens, use_cache=False).logits


def prefilled(
    target: Any, tokens: Tensor, prompts: Sequence[int], room: int
) -> tuple[RowCache, Tensor]:
    """A cache with prompts in it, padded on the right, and (B, 1, V) logits of their ends.

    tokens: (B, T), of which row i's prompt is the first `prompts[i]`; room: tokens that may follow
    """
    rows, width = len(prompts), max(prompts)
    length = torch.tensor(prompts, device=target.device)
    cache = target.new_cache(rows, width + room)
    position = torch.arange(width, device=target.device)[None]
    causal = position[:, :, None] >= position[:, None, :]
    cache.prepare(width, position >= length[:, None])
    first = target.forward(
        tokens[:, :width], position.expand(rows, -1), target.masks(causal, position, position),
        cache, keep=length - 1,
    )  # fmt: skip
    cache.commit(list(prompts))
    return cache, first.logits


def read_chain(target: Any, cache: RowCache, tokens: Tensor) -> Tensor:
    """(B, n, V) logits of tokens (B, n) behind each row's committed ones; commits nothing."""
    cache.prepare(tokens.shape[1])
    position = cache.length[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    keys = torch.arange(cache.width, device=tokens.device).expand(len(tokens), -1)
    masks = target.masks(keys[:, None] <= position[:, :, None], position, keys)
    return target.forward(tokens, position, masks, cache).logits


def _decoded(target: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Right-padded prefill, then the tree on its cache. tokens: (2, 7).

    Returns (2, 1, V) logits of each prompt's last token, and (2, 4, V) of the nodes.
    """
    rows, n, device = len(_PROMPTS), len(_PARENT), target.device
    cache, first = prefilled(target, tokens, _PROMPTS, n)
    length = cache.length
    cache.prepare(n)
    seen, depth = torch.eye(n, dtype=torch.bool), [0] * n
    for node, parent in enumerate(_PARENT[1:], start=1):
        seen[node] |= seen[parent]
        depth[node] = depth[parent] + 1
    position = length[:, None] + torch.tensor(depth, device=device)
    keys = torch.arange(cache.width, device=device).repeat(rows, 1)
    allowed = (keys < length[:, None])[:, None].repeat(1, n, 1)
    for row, start in enumerate(_PROMPTS):
        allowed[row, :, start : start + n] = seen.to(device)
        keys[row, start : start + n] = position[row]
    masks = target.masks(allowed, position, keys)
    out = target.forward(tokens[:, max(_PROMPTS) :], position, masks, cache)
    return _wide(first), _wide(out.logits)


def _decoded_chains(target: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """As `_decoded`, of the nodes as one chain: of the first forward over them the rows accept
    `_ACCEPTED`, behind which it reads other tokens; a second one reads the rest."""
    n, nodes = len(_PARENT), tokens[:, max(_PROMPTS) :]
    cache, first = prefilled(target, tokens, _PROMPTS, 2 * n)
    accepted = torch.tensor(_ACCEPTED, device=target.device)[:, None]
    place = torch.arange(n, device=target.device)
    drafted = torch.where(place < accepted, nodes, nodes.flip(0, 1))
    rest = nodes.gather(1, (accepted + place).clamp(max=n - 1))
    made = []
    for read, kept in ((drafted, _ACCEPTED), (rest, (0, 0))):
        made.append(_wide(read_chain(target, cache, read)))
        cache.commit([now + more for now, more in zip(cache.lengths, kept, strict=True)])
    logits = [torch.cat([a[:k], b[: n - k]]) for a, b, k in zip(*made, _ACCEPTED, strict=True)]
    return _wide(first), torch.stack(logits)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------------------------------------------- rounding


def tolerance(target: Any, own: Tensor, measured: float | None = None) -> float:
    """What rounding may change a logit by: (4 eps(dtype) + 64 eps(float32)) of the largest, or four
    times the `measured` rounding. At most half of the dtype's digits (the root of its eps) are
    believed to be rounding, times four again: in float32 a wrong soft-cap stays visible however
    badly conditioned a model is, in bfloat16 it is a quarter of the largest logit. A forward that
    leaves out the class's roundings (`FusedForward.widens`) differs by all of them: as many times
    more as the root of the number of layers, in which they add up like a random walk."""
    largest = float(own.abs().max())
    used = {p.dtype for p in target.model.parameters() if p.is_floating_point()}
    fine = torch.finfo(torch.float32).eps
    # One byte or less: how weights are stored, not what is computed in
    eps = max([fine, *(torch.finfo(t).eps for t in used if t.itemsize > 1)])
    left_out = target.fused is not None and target.fused.widens
    roundings = _ROUNDINGS * (target.n_layers**0.5 if left_out else 1)
    known = (roundings * eps + _SUMS * fine) * largest
    return known if measured is None else max(known, _FACTOR * min(measured, eps**0.5 * largest))


def _own_rounding(target: Any, paths: Tensor, own: Tensor) -> float:
    """The largest difference of two logits that are equal but for rounding: the bare model on all
    paths at once, on each alone, and token by token with its own cache."""
    largest, done = 0.0, 0
    for i, row, path, _ in _places(target):
        n, start = len(path) + 1, _PROMPTS[row] - 1
        text = paths[i : i + 1, : start + n]
        together = own[done : done + n]
        done += n
        for compute in (_own_logits, _stepwise):
            try:
                alone = _wide(compute(target, text))[0, start:]
            except Exception:  # a class whose own cache does not work: nothing is learned from it
                continue
            largest = max(largest, float((alone - together).abs().max()))
    return largest


def _stepwise(target: Any, tokens: Tensor) -> Tensor:
    """(1, T, V): the bare model's, one token at a time, as stock decoding does."""
    cache, logits = None, []
    for token in tokens[0]:
        out = target.model(input_ids=token[None, None], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


# ------------------------------------------------------------------------------- reasons


def _why_raised(target: Any, paths: Tensor, error: Exception) -> str:
    try:
        _own_logits(target, paths)
    except Exception as own:
        return f"cannot compute logits of token ids alone in {target.dtype} ({_text(own)})"
    try:
        target.project(target.backbone(input_ids=paths, use_cache=False).last_hidden_state)
    except Exception as own:
        return f"has an lm_head that does not take what its backbone gives ({_text(own)})"
    return f"does not take masks of single keys, positions and a cache of ours ({_text(error)})"


def _text(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].removesuffix(":")


def _why_not_finite(target: Any, own: Tensor) -> str:
    if bool(own.isfinite().all()):
        return "computes numbers that are not finite where a mask hides single keys"
    return (
        f"computes logits that are not finite in {target.dtype}: they overflow, or its weights are "
        "broken; take a wider target.dtype (float32, or bfloat16)"
    )


def _why_wrong(target: Any, tokens: Tensor, measured: float) -> str:
    """What a model ignores, by changing one thing at a time; the first that explains it."""
    logits = _wide(_own_logits(target, tokens))
    bound = tolerance(target, logits, measured)

    def hidden(**given: Any) -> Tensor:
        return target.backbone(input_ids=tokens, use_cache=False, **given).last_hidden_state

    def differs(a: Tensor, b: Tensor) -> bool:
        return not float((a - b).abs().max()) <= bound

    if differs(_wide(target.project(hidden())), logits):
        return "changes its logits after lm_head in a way this version does not know"
    if differs(_wide(_own_logits(target, tokens[:, :-3])), logits[:, :-3]):
        return "lets a token see what follows it (is_decoder is not set, or it is no causal LM)"
    if target.verifies == "chains":
        return "does not go on from the keys and states of a text as from the text itself"
    place = torch.arange(tokens.shape[1], device=target.device).expand_as(tokens)
    given = hidden(position_ids=place)
    if differs(_wide(target.project(given)), logits):
        return "numbers positions in its own way, not from 0"
    if torch.equal(hidden(position_ids=2 * place), given):
        return "ignores position_ids"
    itself = target.masks(place[:, :, None] == place[:, None, :], place, place)
    if torch.equal(hidden(position_ids=place, attention_mask=itself), given):
        return "ignores masks of single keys"
    everything = target.masks(place[:, :, None] >= place[:, None, :], place, place)
    if differs(_wide(target.project(hidden(attention_mask=everything))), logits):
        return "does not apply the window (sliding_window) of its configuration as others do"
    return "computes something else with masks of single keys, positions and a cache of ours"
