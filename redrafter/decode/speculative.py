"""Speculative decoding: draft, verify, accept, commit, repeat. One target forward per step for the
whole batch. Under the seeded rule, the default, the text is `plain`'s, whatever the drafter
proposes; under a ratio rule its law is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from redrafter.contracts import (
    AllLevels,
    Drafter,
    Generation,
    InputError,
    Lookahead,
    NoDraft,
    RowState,
    TokenTree,
    Truth,
    root_tree,
)
from redrafter.decode.plain import plain
from redrafter.decode.ratio import RULES, Rule, accepting_noise, verify_ratio
from redrafter.decode.request import Emitter, Prompts, Request
from redrafter.decode.stats import StepTimer, count_step
from redrafter.decode.tree import ancestors, best_path
from redrafter.decode.turns import turn_of
from redrafter.decode.verify import Verdict, choose_scored, to_host, verify
from redrafter.targets.model import Target, TargetOutput


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
    drafter, lookahead = drafter or NoDraft(), lookahead or AllLevels()
    asked = dict(
        seeds=seeds, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
        streamer=streamer, attention_mask=attention_mask,
    )  # fmt: skip
    if not lookahead.speculates(target.device):
        made = plain(target, prompts, generation_config, **asked)
        depth = drafter.max_depth
        made.stats.drafted_at, made.stats.accepted_at = [0] * depth, [0] * depth
        made.stats.matched_at = [0] * depth
        made.stats.seconds["lookahead"] = 0.0
        made.extra["drafter"] = {}
        return made
    request = Request(target, prompts, generation_config, **asked)
    with turn_of(drafter, lookahead):
        return speculative_loop(request, drafter, lookahead, rule)


def speculative_loop(
    request: Request, drafter: Drafter, lookahead: Lookahead, rule: Rule
) -> Generation:
    """The loop. What its parts do stands below.

    seen: (B, N, N) bool, each node and its ancestors; told: what the step's one read gave the host
    """
    state = _Decoding(request, drafter, rule)
    seqs, emitter, timer = state.seqs, state.emitter, state.timer
    needs = drafter.needs | lookahead.needs
    with timer("prefill"):
        with drafter.watch(True):
            truth = state.prefill(needs)
        nothing = torch.zeros_like(seqs.length)
        drafter.begin(seqs)
        drafter.observe(truth)
        lookahead.begin(seqs)
        lookahead.observe(nothing, nothing, truth)

    while any(emitter.live):
        with timer("draft"):
            state.draw_noise()
            tree = _draft(drafter, lookahead, state)
            seen = ancestors(tree, state.deepest(tree))
        with timer("verify"), drafter.watch(False):
            out = state.forward(tree, seen)
        drafted = torch.where(tree.valid, tree.depth, 0).amax(1)
        verdict, told = state.verify(out, tree, seen, drafted)
        in_order = state.accept(told, tree.n_nodes)
        state.commit(verdict, in_order)
        truth = _truth(verdict, out, tree, seqs, needs, told)
        with timer("draft"):
            drafter.observe(truth)
        with timer("lookahead"):
            lookahead.observe(drafted, verdict.count, truth)

    made = emitter.result(timer.stats)
    made.extra["drafter"] = drafter.report()
    return made


def _draft(drafter: Drafter, lookahead: Lookahead, state: _Decoding) -> TokenTree:
    """Level by level until the depth or the lookahead ends it."""
    seqs, timer = state.seqs, state.timer
    with timer("lookahead"):
        depth, plan = _plan(lookahead, seqs, drafter.max_depth)
    if depth == 0:
        return root_tree(seqs.root)
    drafter.start()
    go_on, asks = seqs.live, lookahead.level_by_level
    levels: Tensor | None = None  # (B,), those that the lookahead let stand; None: all
    if asks or plan is not None:
        levels = torch.zeros_like(seqs.length)
    for level in range(0 if asks and drafter.early_features else 1, depth + 1):
        if plan is not None:
            go_on = go_on & (level <= plan)
        if level > 0:
            drafter.extend(level)
            if levels is not None:
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
    tree = best_path(drafter.tree(), depth) if state.narrows else drafter.tree()
    # A node that could only be emitted past a row's limit is never useful; of a row that is not
    # live none is.
    useful = state.limit - seqs.length
    useful = torch.where(seqs.live, useful, 0) if levels is None else useful.minimum(levels)
    tree.valid = tree.valid & (tree.depth <= useful[:, None])
    return tree


def _plan(lookahead: Lookahead, seqs: RowState, depth: int) -> tuple[int, Tensor | None]:
    """Levels that the longest-drafting row may draft, and how many each row may where they differ.
    Reads the host once where they may."""
    plan = lookahead.plan()
    if isinstance(plan, Tensor):
        planned = set(torch.where(seqs.live, plan, -1).tolist()) - {-1}
        return min(depth, max(planned)), plan if len(planned) > 1 else None
    return depth if plan is None else min(depth, plan), None


class _Decoding:
    """What a generation knows of itself, and the parts of its steps."""

    def __init__(self, request: Request, drafter: Drafter, rule: Rule):
        self.request, self.target, self.rule = request, request.target, rule
        self.depth, self.slack = drafter.max_depth, drafter.max_nodes
        self.emitter = Emitter(request)
        self.timer = StepTimer(request.n_rows, self.depth)
        self.seqs = request.sequences(slack=self.depth + 1)
        self.limit = torch.tensor(request.limit, device=self.target.device)
        #: whether only a path of the drafter's trees can be verified
        self.narrows = self.target.verifies == "chains" and not drafter.one_path
        if self.narrows and rule != "seeded" and request.sampled:
            raise InputError(
                f"rule: {rule} needs all that was drawn, and on {self.target.name} only one path "
                "can be verified: take a drafter of width 1, or rule seeded"
            )

    def prefill(self, needs: frozenset[str]) -> Truth:
        """The prompts, and every row's first token."""
        seqs, emitter, request = self.seqs, self.emitter, self.request
        whole = "prompt_hidden" in needs
        self.cache, logits, hidden = request.prefill(seqs, self.slack, whole)
        noise = request.noise(emitter.lengths, 1)
        noise = None if noise is None else noise[:, 0]
        first, best = choose_scored(request.warp.rows(logits, seqs), noise)
        for row, token in enumerate(to_host(first, best)):
            emitter.emit(row, token)
        self._append(first[:, None])
        seqs.cache = self.cache
        count = seqs.live.long()  # a row may have ended with its first token
        truth = Truth(first[:, None], count, hidden, logits[:, None], last_logits=logits)
        if whole:
            row = torch.arange(len(hidden), device=hidden.device)
            truth.hidden = hidden[row, seqs.prompt_length - 1][:, None]
            truth.prompt_hidden = hidden
        return truth

    def draw_noise(self) -> None:
        self.seqs.noise = self.request.noise(self.emitter.lengths, self.depth + 1)

    def deepest(self, tree: TokenTree) -> int:
        return self.depth if tree.n_nodes > 1 else 0  # nothing drafted: nothing to walk along

    def forward(self, tree: TokenTree, seen: Tensor) -> TargetOutput:
        """The step's one target forward, over every node of every row's tree."""
        target, cache, length = self.target, self.cache, self.seqs.length
        cache.prepare(tree.n_nodes)
        if tree.n_nodes == 1 and target.sees_all and cache.uniform:
            position = length[:, None] - 1
            return target.forward(tree.tokens, position, target.no_mask(cache.width), cache)
        # Invalid nodes may lie past the context: any position the model has will do for them.
        position = torch.minimum(length[:, None] - 1 + tree.depth, self.limit[:, None] - 1)
        keys = torch.arange(cache.width, device=position.device).expand(len(position), -1)
        committed = cache.length[:, None]
        # Columns: the row's committed prefix, then its nodes, then whatever longer rows need.
        node = keys - committed
        is_node = (node >= 0) & (node < tree.n_nodes)
        node = node.clamp(0, tree.n_nodes - 1)
        on_path = seen.gather(2, node[:, None].expand(-1, tree.n_nodes, -1))
        allowed = (keys < committed)[:, None] | (on_path & is_node[:, None])
        key_position = torch.where(is_node, position.gather(1, node), keys)
        masks = target.masks(allowed, position, key_position)
        return target.forward(tree.tokens, position, masks, cache)

    def verify(
        self, out: TargetOutput, tree: TokenTree, seen: Tensor, drafted: Tensor
    ) -> tuple[Verdict, list[list[int]]]:
        """The verdict, and per row what the host is told, in the step's one read: accepted and
        drafted levels (B,), then the verdict's tokens and path."""
        verdict, told = self._judge(out, tree, seen, drafted)
        spoilt = [
            row[0] < 0 and live for row, live in zip(told, self.emitter.live, strict=True)
        ]  # fmt: skip
        if any(spoilt) and tree.n_nodes > 1:
            self._forward_alone(torch.tensor(spoilt, device=drafted.device), out)
            verdict, told = self._judge(out, tree, seen, drafted)
        if any(row[0] < 0 for row in told):
            verdict.count = verdict.count.clamp(min=0)
        return verdict, told

    def _judge(
        self, out: TargetOutput, tree: TokenTree, seen: Tensor, drafted: Tensor
    ) -> tuple[Verdict, list[list[int]]]:
        seqs, deepest = self.seqs, self.deepest(tree)
        scores = self.request.warp.tree(out.logits, tree, seen, seqs)
        if self.rule == "seeded" or not self.request.sampled:
            noise = None if seqs.noise is None else seqs.noise[:, : deepest + 1]
            verdict = verify(scores, tree, noise, seen, deepest)
        else:
            uniform = accepting_noise(seqs, tree, deepest)
            verdict = verify_ratio(scores, tree, uniform, deepest, self.rule)
        counts = torch.stack([verdict.count, drafted], 1)
        return verdict, torch.cat([counts, verdict.tokens, verdict.path], 1).tolist()

    def _forward_alone(self, rows: Tensor, out: TargetOutput) -> None:
        """Take the root's numbers from a forward without the drafted nodes. rows: (B,) bool

        A node whose keys or values are not finite spoils every other that it is masked from: a
        weight of 0 times nan is nan. So where a root is not finite, what was drafted may be why.
        By a ratio rule the draws still stand, and only those below the root can be tested.
        """
        self.cache.clear(rows)
        root = root_tree(self.seqs.root)
        with self.cache.aside(rows):
            again = self.forward(root, ancestors(root, 0))
        out.logits = out.logits.masked_fill(rows[:, None, None], float("nan"))
        for own, alone in ((out.logits, again.logits), (out.hidden, again.hidden)):
            own[:, 0] = torch.where(rows[:, None], alone[:, 0], own[:, 0])
        self.timer.stats.forwards += 1
        self.timer.stats.nodes_verified += sum(self.emitter.live)

    def accept(self, told: list[list[int]], n_nodes: int) -> bool:
        """Emit and stop. Returns whether every row's accepted nodes are its first ones."""
        emitter, stats = self.emitter, self.timer.stats
        in_order = True
        stats.forwards += 1
        for row, (count, reached, *rest) in enumerate(told):
            if emitter.finish[row] is not None:
                continue
            stats.nodes_verified += n_nodes
            kept = emitter.emit(row, rest[: count + 1])
            count_step(stats, row, reached, count, kept)
            path = rest[len(rest) // 2 :]
            in_order &= path[: count + 1] == list(range(count + 1))
        return in_order

    def commit(self, verdict: Verdict, in_order: bool) -> None:
        """What was accepted becomes text."""
        self._append(verdict.tokens)
        # All but the new root: a finished row's cache is never looked at again.
        lengths = [n - 1 for n in self.emitter.lengths]
        self.cache.commit(lengths, None if in_order else verdict.path)

    def _append(self, tokens: Tensor) -> None:
        """Write (B, K+1) tokens behind every row (what lies past its new length is stale)."""
        seqs, device = self.seqs, tokens.device
        where = seqs.length[:, None] + torch.arange(tokens.shape[1], device=device)
        seqs.ids.scatter_(1, where, tokens)
        seqs.lengths = self.emitter.lengths
        seqs.length = torch.tensor(seqs.lengths, device=device)
        seqs.alive = self.emitter.live
        seqs.live = torch.tensor(seqs.alive, device=device)


def _truth(
    verdict: Verdict,
    out: TargetOutput,
    tree: TokenTree,
    seqs: RowState,
    needs: frozenset[str],
    told: list[list[int]],
) -> Truth:
    """told: what the host was told, see `_Decoding.verify`"""

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
        [row[2 : row[0] + 3] if on else [] for row, on in zip(told, seqs.live_rows(), strict=True)],
    )
