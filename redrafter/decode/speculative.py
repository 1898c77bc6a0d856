"""Speculative decoding: draft, verify, accept, commit, repeat. One target forward per step for the
whole batch. Under the seeded rule, the default, the text is `plain`'s, whatever the drafter
proposes; under a ratio rule its law is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from redrafter.contracts import (
    Drafter,
    Generation,
    InputError,
    Lookahead,
    Sequences,
    StepStats,
    TokenTree,
    Truth,
    root_tree,
)
from redrafter.decode.cache import RowCache
from redrafter.decode.plain import plain
from redrafter.decode.ratio import RULES, Rule, accepting_noise, verify_ratio
from redrafter.decode.request import Emitter, Prompts, Request
from redrafter.decode.stats import StepTimer, count_step
from redrafter.decode.tree import ancestors
from redrafter.decode.verify import Verdict, choose, verify
from redrafter.target.model import Target, TargetOutput


@torch.inference_mode()
def speculative(
    target: Target,
    prompts: Prompts,
    generation_config: GenerationConfig | None = None,
    *,
    seeds: int | Sequence[int] = 0,
    drafter: Drafter | None = None,
    lookahead: Lookahead | None = None,
    rule: Rule = "seeded",
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer=None,
    attention_mask: Tensor | None = None,
) -> Generation:
    """Decode with a drafter. Same signature, result and text as `plain`.

    drafter: None drafts nothing (K = 0), which is plain decoding by the tree code
    lookahead: None always drafts `drafter.max_depth` levels
    rule: `seeded`, or for comparison one of the papers' ratio rules (`decode/ratio.py`): their text
        has plain's law but changes with the drafter. Greedy decoding is the same by all
    The other arguments are `plain`'s.
    """
    if rule not in ("seeded", *RULES):
        raise InputError(f"rule: {rule!r} is not one of seeded, {', '.join(RULES)}")
    depth = drafter.max_depth if drafter else 0
    if lookahead and not lookahead.speculates(target.device):
        made = plain(
            target, prompts, generation_config, seeds=seeds, logits_processor=logits_processor,
            stopping_criteria=stopping_criteria, streamer=streamer, attention_mask=attention_mask,
        )  # fmt: skip
        made.stats.drafted_at, made.stats.accepted_at = [0] * depth, [0] * depth
        made.stats.seconds["lookahead"] = 0.0
        made.extra["drafter"] = {}
        return made
    request = Request(
        target, prompts, generation_config, seeds,
        logits_processor, stopping_criteria, streamer, attention_mask,
    )  # fmt: skip
    emitter, timer = Emitter(request), StepTimer(request.n_rows, depth)
    seqs = request.sequences(slack=depth + 1)
    limit = torch.tensor(request.limit, device=target.device)
    watch = drafter.watch if drafter else nullcontext
    with timer("prefill"):
        with watch(True):
            cache, logits, hidden = request.prefill(seqs, slack=drafter.max_nodes if drafter else 1)
        noise = request.noise(emitter.lengths, 1)
        first = choose(request.warp.rows(logits, seqs), None if noise is None else noise[:, 0])
        for row, token in enumerate(first.tolist()):
            emitter.emit(row, [token])
        _append(seqs, first[:, None], emitter)
        seqs.cache = cache
        count = seqs.live.long()  # a row may have ended with its first token
        truth = Truth(first[:, None], count, hidden[:, None], logits[:, None], last_logits=logits)
        if drafter:
            drafter.begin(seqs)
            drafter.observe(truth)
        if lookahead:
            lookahead.begin(seqs)
            lookahead.observe(count * 0, count * 0, truth)
    needs = (drafter.needs if drafter else frozenset()) | (
        lookahead.needs if lookahead else frozenset()
    )

    while any(emitter.live):
        seqs.noise = request.noise(emitter.lengths, depth + 1)
        with timer("draft"):
            tree = _draft(drafter, lookahead, seqs, limit, timer)
            deepest = depth if tree.n_nodes > 1 else 0  # nothing drafted: nothing to walk along
            seen = ancestors(tree, deepest)
        with timer("verify"), watch(False):
            out = _forward(target, tree, seen, seqs, cache, limit)
        scores = request.warp.tree(out.logits, tree, seen, seqs)
        if rule == "seeded" or not request.sampled:
            noise = seqs.noise if seqs.noise is None else seqs.noise[:, : deepest + 1]
            verdict = verify(scores, tree, noise, seen, deepest)
        else:
            uniform = accepting_noise(seqs, tree, deepest)
            verdict = verify_ratio(scores, tree, uniform, deepest, rule)
        was_live, drafted = seqs.live, torch.where(tree.valid, tree.depth, 0).amax(1)
        _accept(verdict, drafted, tree.n_nodes, seqs, cache, emitter, timer.stats)
        truth = _truth(verdict, out, tree, seqs, needs)
        if drafter:
            with timer("draft"):
                drafter.observe(truth)
        if lookahead:
            with timer("lookahead"):
                lookahead.observe(drafted * was_live, verdict.count * was_live, truth)
    made = emitter.result(timer.stats)
    made.extra["drafter"] = drafter.report() if drafter else {}
    return made


def _draft(
    drafter: Drafter | None,
    lookahead: Lookahead | None,
    seqs: Sequences,
    limit: Tensor,
    timer: StepTimer,
) -> TokenTree:
    """Level by level until the depth or the lookahead ends it."""
    if drafter is None:
        return root_tree(seqs.root)
    depth, plan = drafter.max_depth, None
    if lookahead:
        with timer("lookahead"):
            depth, plan = _plan(lookahead, seqs, depth)
    if depth == 0 and drafter.max_depth > 0:
        return root_tree(seqs.root)
    drafter.start()
    levels = torch.zeros_like(seqs.length)  # per row, levels that the lookahead let stand
    go_on, asks = seqs.live, lookahead is not None and lookahead.level_by_level
    for level in range(0 if asks and drafter.foresees else 1, depth + 1):
        if plan is not None:
            go_on = go_on & (level <= plan)
        if level > 0:
            drafter.extend(level)
            levels += go_on
        if not asks or level == depth:
            continue
        with timer("lookahead"):
            answer = lookahead.go_on(drafter.features(lookahead.reads), level)
        if isinstance(answer, bool):
            if not answer:
                break
            continue
        go_on = go_on & answer
        # Reading the host per level would stall an accelerator; there the surplus is masked off.
        if go_on.device.type == "cpu" and not bool(go_on.any()):
            break
    tree = drafter.tree()
    # A node that could only be emitted past a row's limit is never useful.
    levels = torch.minimum(levels, limit - seqs.length)
    tree.valid = tree.valid & (tree.depth <= levels[:, None])
    return tree


def _plan(lookahead: Lookahead, seqs: Sequences, depth: int) -> tuple[int, Tensor | None]:
    """Levels that the longest-drafting row may draft, and how many each row may where they differ.
    Reads the host once where they may."""
    plan = lookahead.plan()
    if isinstance(plan, Tensor):
        planned = set(torch.where(seqs.live, plan, -1).tolist()) - {-1}
        return min(depth, max(planned)), plan if len(planned) > 1 else None
    return depth if plan is None else min(depth, plan), None


def _forward(
    target: Target,
    tree: TokenTree,
    seen: Tensor,
    seqs: Sequences,
    cache: RowCache,
    limit: Tensor,
) -> TargetOutput:
    """The step's one target forward, over every node of every row's tree."""
    cache.prepare(tree.n_nodes)
    if tree.n_nodes == 1 and target.sees_all and cache.uniform:
        position = seqs.length[:, None] - 1
        return target.forward(tree.tokens, position, target.no_mask(cache.width), cache)
    # Invalid nodes may lie past the context: any position the model has will do for them.
    position = torch.minimum(seqs.length[:, None] - 1 + tree.depth, limit[:, None] - 1)
    keys = torch.arange(cache.width, device=position.device).expand(len(position), -1)
    committed = cache.length[:, None]
    # Columns: the row's committed prefix, then its nodes, then whatever longer rows need.
    node = keys - committed
    is_node = (node >= 0) & (node < tree.n_nodes)
    node = node.clamp(0, tree.n_nodes - 1)
    on_path = seen.gather(2, node[:, None].expand(-1, tree.n_nodes, -1))
    allowed = (keys < committed)[:, None] | (on_path & is_node[:, None])
    key_position = torch.where(is_node, position.gather(1, node), keys)
    return target.forward(
        tree.tokens, position, target.masks(allowed, position, key_position), cache
    )


def _accept(
    verdict: Verdict,
    drafted: Tensor,
    n_nodes: int,
    seqs: Sequences,
    cache: RowCache,
    emitter: Emitter,
    stats: StepStats,
) -> None:
    """Emit, stop, commit. The step's one read of the host."""
    counts = torch.stack([verdict.count, drafted], 1)
    packed = torch.cat([counts, verdict.tokens, verdict.path], 1).tolist()
    width = verdict.tokens.shape[1]
    in_order = True
    stats.forwards += 1
    for row, (count, reached, *rest) in enumerate(packed):
        if emitter.finish[row] is not None:
            continue
        stats.nodes_verified += n_nodes
        kept = emitter.emit(row, rest[: count + 1])
        count_step(stats, row, reached, min(count, kept), kept)
        in_order &= rest[width : width + count + 1] == list(range(count + 1))
    _append(seqs, verdict.tokens, emitter)
    # All but the new root: a finished row's cache is never looked at again.
    cache.commit([n - 1 for n in emitter.lengths], None if in_order else verdict.path)


def _append(seqs: Sequences, tokens: Tensor, emitter: Emitter) -> None:
    """Write (B, K+1) tokens behind every row (what lies past its new length is stale)."""
    live = torch.tensor(emitter.live, device=tokens.device)
    where = seqs.length[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    seqs.ids.scatter_(1, where, tokens)
    seqs.length = torch.tensor(emitter.lengths, device=tokens.device)
    seqs.live = live


def _truth(
    verdict: Verdict, out: TargetOutput, tree: TokenTree, seqs: Sequences, needs: frozenset[str]
) -> Truth:
    def along(x: Tensor, nodes: Tensor) -> Tensor:
        if tree.n_nodes == 1:
            return x
        row = torch.arange(len(x), device=x.device)[:, None]
        return x[row, nodes]  # copies whole rows, where gather looks up every element

    last = None
    if "last_logits" in needs:
        last = along(out.logits, verdict.path.gather(1, verdict.count[:, None]))[:, 0]

    return Truth(
        verdict.tokens,
        torch.where(seqs.live, verdict.count + 1, 0),
        along(out.hidden, verdict.path) if "hidden" in needs else None,
        along(out.logits, verdict.path) if "logits" in needs else None,
        tree,
        out.logits if "tree_logits" in needs else None,
        last,
    )
