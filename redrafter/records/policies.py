"""Any policy of stopping, simulated on the records of a drafter: what it would have emitted,
drafted and cost, without decoding anything.

Exact: under the seeded rule the text does not depend on what is drafted, and the records hold what
would have been drafted wherever a step may begin. Ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from redrafter.drafters.features import columns
from redrafter.records.make import Text


@dataclass
class Records:
    """R texts, padded to S positions; see `records.make.Text` for the columns.

    length: (R,) int64, positions of each text; room: (R, S) int64, levels that the limit of new
    tokens leaves room for (a text that ends by itself is drafted for beyond its end)
    """

    features: Tensor
    context: Tensor
    nodes: Tensor
    accepted: Tensor
    judged: Tensor
    chance: Tensor
    length: Tensor
    room: Tensor

    @classmethod
    def of(cls, texts: Sequence[Text], max_new_tokens: int) -> Records:
        def padded(name: str) -> Tensor:
            rows = [getattr(text, name) for text in texts]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

        names = ("features", "context", "nodes", "accepted", "judged", "chance")
        columns = {name: padded(name) for name in names}
        length = torch.tensor([len(text.accepted) for text in texts])
        position = torch.arange(columns["accepted"].shape[1])
        room = (max_new_tokens - 1 - position).expand_as(columns["accepted"])
        return cls(**columns, length=length, room=room)

    @property
    def n_levels(self) -> int:
        return self.nodes.shape[2] - 1

    def reading(self, known: Sequence[str], names: Sequence[str] | None) -> Records:
        """These records as one sees them who reads some features only, in that order. known: those
        here"""
        return replace(self, features=columns(self.features, known, names))


@dataclass
class Prices:
    """Seconds. start_s: of a draft besides its levels; level_s: (K,) of each level; verify_s:
    (N+1,) of a step that verifies n nodes, besides drafting (entry 0 unused)."""

    start_s: float
    level_s: Tensor
    verify_s: Tensor

    @property
    def draft_s(self) -> Tensor:
        """(K+1,) of a draft of 0..K levels."""
        draft = torch.nn.functional.pad(self.level_s.cumsum(0), (1, 0))
        draft[1:] += self.start_s
        return draft


@dataclass
class Moment:
    """What a policy may look at when a step begins, per text. features: (R, K+1, F), of which a
    decision after level g may only read levels up to g; context: (R, C); previous: (R, 2) float,
    levels that the step before drafted and accepted (0, 0 for the first); accepted: (R,), for the
    oracle alone"""

    features: Tensor
    context: Tensor
    previous: Tensor
    accepted: Tensor


@dataclass
class Visit:
    """One step of every text, (R,) each: whether the text still went on; the position; what the
    step before did (R, 2); whether a draft was begun; levels asked for; levels of the tree; of
    these accepted; nodes; tokens emitted"""

    live: Tensor
    position: Tensor
    previous: Tensor
    started: Tensor
    asked: Tensor
    levels: Tensor
    accepted: Tensor
    nodes: Tensor
    emitted: Tensor


#: -> (R,) int64, levels to draft; -1 where the drafter is not even begun
Policy = Callable[[Moment], Tensor]


@dataclass
class Simulated:
    """Per text (R,): tokens and steps of the decoding phase, levels drafted (those that a tree
    had), nodes verified, seconds by the prices."""

    tokens: Tensor
    steps: Tensor
    drafted: Tensor
    nodes: Tensor
    seconds: Tensor

    def rate(self) -> float:
        """Tokens per second, pooled."""
        return float(self.tokens.sum() / self.seconds.sum())


@torch.inference_mode()
def simulate(
    records: Records,
    policy: Policy,
    prices: Prices,
    *,
    looks: bool = False,
    visit: Callable[[Visit], None] | None = None,
) -> Simulated:
    """looks: the policy starts every draft before it decides whether there will be one
    visit: told of every step"""
    n = len(records.length)
    draft_s = prices.draft_s
    draft_s[0] = prices.start_s  # of a draft that was begun in vain
    reach = (records.nodes.diff(dim=2) > 0).sum(2)  # levels that have any node
    row = torch.arange(n)
    at = torch.zeros(n, dtype=torch.long)
    previous = torch.zeros(n, 2)
    tokens, steps, drafted, nodes = (torch.zeros(n, dtype=torch.long) for _ in range(4))
    seconds = torch.zeros(n, dtype=torch.float64)
    while bool((live := at < records.length).any()):
        place = at.clamp(max=records.accepted.shape[1] - 1)
        accepted = records.accepted[row, place]
        moment = Moment(
            records.features[row, place], records.context[row, place], previous, accepted
        )
        asked = policy(moment).clamp(max=records.n_levels)
        started = (asked > 0) | ((asked == 0) & looks)
        asked = asked.clamp(min=0)
        levels = torch.minimum(asked, records.room[row, place])
        kept = torch.minimum(levels, accepted)
        size = records.nodes[row, place, levels]
        levels = torch.minimum(levels, reach[row, place])
        emitted = torch.minimum(kept + 1, records.length - at)
        if visit:
            visit(Visit(live, place, previous, started, asked, levels, kept, size, emitted))
        # What the limit cuts off was drafted, and stays in the forward as padding.
        padded = records.nodes[row, place, asked]
        spent = torch.where(started, draft_s[asked], 0.0) + prices.verify_s[padded]
        tokens += torch.where(live, emitted, 0)
        steps += live
        drafted += torch.where(live, levels, 0)
        nodes += torch.where(live, size, 0)
        seconds += torch.where(live, spent, 0.0)
        previous = torch.stack([levels, kept], 1).float()
        at = at + torch.where(live, kept + 1, 0)
    return Simulated(tokens, steps, drafted, nodes, seconds)


def static(levels: int) -> Policy:
    return lambda moment: torch.full_like(moment.accepted, levels)


def oracle(moment: Moment) -> Tensor:
    """As many levels as will be accepted."""
    return moment.accepted


def no_prices(records: Records) -> Prices:
    """For a simulation that is only counted."""
    size = int(records.nodes.max()) + 1
    return Prices(0.0, torch.zeros(records.n_levels), torch.zeros(size))
