"""Records for a lookahead: what a drafter would have drafted at every place of known texts, what it
said of each level, and how many levels would have been accepted.

Under the seeded rule a text does not depend on what was drafted. So plain decoding makes the texts,
one teacher-forced forward gives the target's states, and the drafter is walked over every position
as if a step began there: with all its levels, at the temperature, and with the noise that it would
see. No target forward is needed for that, a batch of texts is walked together, and any policy of
stopping can be simulated exactly on the result (`policies.py`). The papers record what one
fixed policy visits (DISCO, arXiv 2405.04304); walking everywhere is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import GenerationConfig

from redrafter.contracts import Drafter, InputError, RowState, TokenTree, Truth
from redrafter.data.rows import padded_with_last
from redrafter.decode.plain import plain
from redrafter.decode.request import NOT_FINITE, Request
from redrafter.drafters.hindsight import Past
from redrafter.lookahead.context import context_features
from redrafter.targets.model import Target


@dataclass
class Text:
    """The records of one text, for each of the S positions at which a step may begin. Position s
    has answer token s as its root and may emit up to S - s more.

    tokens:   (S,) int64, the roots
    features: (S, K+1, F) float32, the drafter's at level 0..K, zeros where it says nothing
    context:  (S, C) float32, `CONTEXT_FEATURES`
    nodes:    (S, K+1) int64, nodes of the tree cut at level 0..K, the root counted and padding not
    accepted: (S,) int64, levels that are accepted of the K, or of those that the text is long
              enough for
    judged:   (S,) int64, levels that the text is long enough for, at most K
    chance:   (S, K) float32, how likely level k was to be accepted given that those before it are,
              by what the drafter had looked at (see `acceptance_chance`); nan below the first
              level that was rejected and where the text ends
    finite:   whether every token was chosen from finite scores; the text ends before one that
              would not have been
    """

    tokens: Tensor
    features: Tensor
    context: Tensor
    nodes: Tensor
    accepted: Tensor
    judged: Tensor
    chance: Tensor
    finite: bool = True


COLUMNS = ("tokens", "features", "context", "nodes", "accepted", "judged", "chance")


@torch.inference_mode()
def walk_texts(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    seeds: Sequence[int],
) -> list[Text]:
    """The records of the target's own answers to a batch of prompts, one `Text` each.

    config, seeds: as for `plain`
    Raises InputError for a drafter that writes to the target's cache or is not made anew by
    `begin` alone.
    """
    if drafter.borrows_cache or "tree_logits" in drafter.needs:
        raise InputError(
            "lookahead records: this drafter reads the target's cache or its logits at every node, "
            "which a walk over known texts has not; record a head, a smaller model or copies"
        )
    made = plain(target, prompts, config, seeds=seeds)
    walk = _Walk(target, drafter, prompts, made.tokens, Request(
        target, prompts, config, list(seeds), None, None, None, None,
    ))  # fmt: skip
    return [
        replace(text, finite=finish != NOT_FINITE)
        for text, finish in zip(walk.run(), made.finish, strict=True)
    ]


class _Walk:
    """One batch. Rows whose text has ended stay, not live."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        prompts: Sequence[Sequence[int]],
        answers: list[list[int]],
        request: Request,
    ):
        self.drafter, self.request, self.answers = drafter, request, answers
        self.n_levels = drafter.max_depth
        seqs = self.seqs = request.sequences(slack=self.n_levels + 1)
        self.start = seqs.length.clone()  # (B,) prompt tokens
        self.n_answer = torch.tensor([len(a) for a in answers], device=target.device)
        self.text = seqs.ids.clone()  # (B, M) prompt and answer
        for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            self.text[b, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        tokens = self.text[:, : max(map(len, prompts)) + max(map(len, answers))]
        states = target.states(padded_with_last(tokens, self.start + self.n_answer))
        self.prompt_hidden = None
        if "prompt_hidden" in drafter.needs:
            self.prompt_hidden = states[:, : max(map(len, prompts))]
        #: (B, A, H) states that the answer's tokens were chosen from, and the one after the last
        where = (self.start - 1)[:, None] + torch.arange(int(self.n_answer.max()) + 1)
        where = where.clamp(max=states.shape[1] - 1).to(states.device)
        self.hidden = states.gather(1, where[:, :, None].expand(-1, -1, states.shape[-1]))
        self.logits = torch.stack([target.project(row) for row in self.hidden])

    def run(self) -> list[Text]:
        drafter, seqs = self.drafter, self.seqs
        steps: list[dict[str, Tensor]] = []
        for s in range(max(1, int(self.n_answer.max()) - 1)):
            truth = self._move(s)
            if s == 0:
                drafter.begin(seqs)
            drafter.observe(truth)
            seqs.noise = self.request.noise(seqs.length.tolist(), self.n_levels + 1)
            steps.append(self._draft() | {"context": context_features(truth, seqs.temperature),
                                          "tokens": seqs.root})  # fmt: skip
        columns = {c: torch.stack([step[c] for step in steps], 1) for c in COLUMNS}
        # Behind its root, an answer's last token begins no step.
        ends = [max(0, len(answer) - 1) for answer in self.answers]
        return [Text(**{c: columns[c][b, :n] for c in COLUMNS}) for b, n in enumerate(ends)]

    def _move(self, s: int) -> Truth:
        """Token s of every answer is known now; what the target's forward told."""
        seqs = self.seqs
        live = self.n_answer > s + 1
        place = (self.start + s)[:, None]
        token = self.text.gather(1, place)
        seqs.ids.scatter_(1, place, token)
        seqs.length, seqs.live = self.start + s + 1, live
        hidden, logits = self.hidden[:, s : s + 1], self.logits[:, s : s + 1]
        before = self.prompt_hidden if s == 0 else None
        return Truth(
            token, live.long(), hidden, logits, last_logits=logits[:, 0], prompt_hidden=before
        )

    def _draft(self) -> dict[str, Tensor]:
        drafter, seqs = self.drafter, self.seqs
        drafter.start()
        told = [drafter.features() if drafter.early_features else None]
        for level in range(1, self.n_levels + 1):
            drafter.extend(level)
            told.append(drafter.features())
        zeros = torch.zeros(len(seqs.ids), len(drafter.feature_names), device=seqs.ids.device)
        features = torch.stack([zeros if f is None else f.float() for f in told], 1)
        tree = drafter.tree()
        whole = RowState(self.text, self.start + self.n_answer, self.start, seqs.live)
        right, _ = Past(tree, seqs.length, seqs.live).right(whole)
        judged = (self.n_answer - (seqs.length - self.start)).clamp(0, self.n_levels)
        accepted = torch.where(right, tree.depth, 0).amax(1)
        levels = torch.arange(self.n_levels + 1, device=tree.depth.device)
        nodes = (tree.valid[:, None] & (tree.depth[:, None] <= levels[:, None])).sum(-1)
        return {
            "features": features, "nodes": nodes, "accepted": torch.minimum(accepted, judged),
            "judged": judged, "chance": self._chance(tree, right, accepted, judged),
        }  # fmt: skip

    def _chance(self, tree: TokenTree, right: Tensor, accepted: Tensor, judged: Tensor) -> Tensor:
        """(B, K), see `Text.chance`."""
        level = torch.arange(1, self.n_levels + 1, device=accepted.device)
        tested = level <= torch.minimum(accepted[:, None] + 1, judged[:, None])
        hard = (level <= accepted[:, None]).float().masked_fill(~tested, float("nan"))
        if not self.request.sampled or self.drafter.sees_noise == "all":
            return hard
        seqs, soft = self.seqs, hard.clone()
        answered = seqs.length - self.start  # answer tokens known, so logits of the next one
        for k in range(1, self.n_levels + 1):
            at = (answered + k - 1).clamp(max=self.logits.shape[1] - 1)
            logits = self.logits[torch.arange(len(at)), at]
            now = RowState(self.text, seqs.length + k - 1, self.start, seqs.live)
            log_p = self.request.warp.rows(logits, now).log_softmax(-1)
            above = right.gather(1, tree.parent) & (tree.depth == k) & tree.valid
            noise = seqs.noise[:, k - 1] if self.drafter.sees_noise == "own" else None
            soft[:, k - 1] = acceptance_chance(log_p, tree.tokens, above, noise).float()
        return torch.where(tested, soft, hard)


def acceptance_chance(
    log_p: Tensor, tokens: Tensor, siblings: Tensor, noise: Tensor | None
) -> Tensor:
    """(B,) chance that the target's token is one of some distinct siblings.

    log_p: (B, V) the target's; tokens: (B, N) int64; siblings: (B, N) bool, which of them they are
    noise: (B, V), the drafter has seen what of it belongs to the siblings' tokens; None: it has
        seen none, and the chance is their probability
    With noise g the best sibling has m = max(log p + g), and all other tokens together, of mass
    r = 1 - p(siblings), stay below it with probability exp(-r exp(-m)). Ours.
    """
    own = log_p.gather(1, tokens).masked_fill(~siblings, float("-inf"))
    p = own.exp().sum(1)
    if noise is None:
        return p
    best = (own + noise.gather(1, tokens).to(own.dtype)).amax(1)
    chance = torch.exp(-(1 - p).clamp(min=0) * torch.exp(-best))
    return torch.where(siblings.any(1), chance, 0.0)
