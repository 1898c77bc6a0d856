"""DISCO: a small trained network decides how many levels are drafted.

The paper's classifier says after each drafted token how likely it is to be accepted, and drafting
goes on while that exceeds a threshold (arXiv 2405.04304). Here one network, asked after level g
(0: nothing is drafted yet), gives for every level j of the draft

    P_j = P(at least j levels are accepted | what is known after level g),

as a product of the chances that each level is accepted given the one before it. The paper's rule
reads P_g; the rule from costs reads the P_j still to come: with lambda tokens per second achieved
and s_j seconds that level j adds to drafting and verifying, go on iff for some n > g

    sum_{j = g+1 .. n} (P_j - lambda s_j) > 0.

For n = g + 1 alone that is the marginal rule; looking further ahead matters where the first level
carries costs that the later ones share. What more will be known after the next level is worth
something too, most of all before the first one, and the sum does not count it: so the lambda before
the first level and the one after it are chosen by what they achieve on validation records. Asked
once, before anything is drafted, the same network gives the n that maximises the sum. The rule and
the network's form are ours.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from redrafter.contracts import Drafter, InputError, Lookahead, RowState, Truth
from redrafter.files import plain_values, write_json, write_tensors
from redrafter.lookahead.context import CONTEXT_FEATURES, context_features

FORMAT = 2  # 1 read the target's distribution as well
CONFIG, WEIGHTS = "config.json", "model.safetensors"
Rule = Literal["cost", "threshold"]
When = Literal["level", "step"]
_RANGE, _GRID, _HALVINGS = 8.0, 257, 20  # of a bar: standard deviations, points, refinements
#: of the step before: levels drafted and accepted, as shares of K
PREVIOUS_FEATURES = ("previous_drafted", "previous_accepted")


@dataclass(frozen=True)
class DiscoConfig:
    """Everything that a classifier is valid for, and what its decisions are made from.

    drafter: `Drafter.identity()` of the drafter it was trained for; target: fingerprint
    feature_names: those of the drafter's that it reads; n_levels: K; hidden: width of the network
    context: whether it reads `CONTEXT_FEATURES` too
    temperature: of the records it was trained on
    threshold: of the paper's rule
    rate: lambda, tokens per second, of the rule after the first level; first_rate: before it;
        step_rate: of the rule that is asked once per step; start_rate: of whether to look at all
    added_s: seconds that level 1..K adds; start_s: that looking costs, of a drafter with early
        features
    device: where these seconds were measured; trained_on: what the records say of themselves
    """

    drafter: dict[str, Any]
    target: str
    feature_names: tuple[str, ...]
    n_levels: int
    hidden: int = 32
    context: bool = False
    temperature: float = 0.0
    threshold: float = 0.5
    rate: float = 0.0
    first_rate: float = 0.0
    step_rate: float = 0.0
    start_rate: float = 0.0
    added_s: tuple[float, ...] = ()
    start_s: float = 0.0
    device: dict[str, Any] = field(default_factory=dict)
    trained_on: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*self.feature_names, *CONTEXT_FEATURES * self.context, *PREVIOUS_FEATURES)

    def prices(self, when: When) -> tuple[Tensor, Tensor, Tensor]:
        """(K,) each, lambda s_j: what level j costs in tokens before the first level, after it,
        and before a drafter with early features has begun."""
        added = torch.tensor(self.added_s)
        first = added * (self.first_rate if when == "level" else self.step_rate)
        return first, added * self.rate, begun_s(added, self.start_s) * self.start_rate


def begun_s(added: Tensor, start_s: float) -> Tensor:
    """(K,) seconds that each level adds where the drafter is still to be begun."""
    return added + nn.functional.pad(added.new_tensor([start_s]), (0, len(added) - 1))


class Disco(nn.Module):
    """The network: standardised inputs and the level (one-hot) -> ReLU layer -> K log-chances.

    mean, std: (I,) of the inputs, buffers
    """

    def __init__(self, config: DiscoConfig):
        super().__init__()
        self.config = config
        n = len(config.inputs)
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("std", torch.ones(n))
        self.inputs = nn.Linear(n, config.hidden)
        self.level = nn.Embedding(config.n_levels + 2, config.hidden)
        self.output = nn.Linear(config.hidden, config.n_levels)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """x: (..., I) inputs; level: (...) int64, levels drafted so far, K + 1 before the drafter
        has begun (its features are then zeros). Returns (..., K) logits of the chance that level j
        is accepted given that level j - 1 is."""
        own = self.inputs((x - self.mean) / self.std)
        return self.output(torch.relu(own + self.level(level)))

    def log_p(self, x: Tensor, level: Tensor) -> Tensor:
        """(..., K) log P_j."""
        return nn.functional.logsigmoid(self(x, level)).cumsum(-1)

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor, Tensor]:
        """The first layer with the standardisation inside: weights of the drafter's features
        (F, hidden), of the context and the step before (C, hidden), and what each level adds
        (K+2, hidden)."""
        weight = (self.inputs.weight / self.std).T
        bias = self.inputs.bias - (self.mean / self.std) @ self.inputs.weight.T
        n = len(self.config.feature_names)
        return weight[:n].contiguous(), weight[n:].contiguous(), self.level.weight + bias


class DiscoLookahead(Lookahead):
    """Decides by a `Disco` network. Reads the host once per step, never per level on an
    accelerator.

    What follows from the step before alone is tabulated when a generation begins on a device: there
    are (K+1)^2 of those. Where the network reads one feature besides, and goes on wherever it is
    large enough, so is that bar, and then a level costs one comparison (ours). A network that reads
    the context is asked each time.

    when: "level" decides after each level (and before the first), "step" once per step up front
    rule: "cost" or the paper's "threshold"
    threshold: instead of the trained one
    log: a list to which (level, P) is added with every decision: level of the draft, and (B,) P of
        the deciding one: that at least that many levels are accepted. None keeps nothing
    Raises InputError where the drafter is not the one that the network was trained for.
    """

    def __init__(
        self,
        network: Disco,
        drafter: Drafter,
        when: When = "level",
        rule: Rule = "cost",
        threshold: float | None = None,
    ):
        config = self.config = network.config
        check_drafter(config, drafter)
        for name, value, allowed in (("when", when, When), ("rule", rule, Rule)):
            if value not in get_args(allowed):
                raise InputError(f"disco: {name} {value!r} is not one of {get_args(allowed)}")
        if when == "step" and rule == "threshold":
            raise InputError("disco: the paper's threshold is asked level by level: set when=level")
        self.when, self.rule, self.early_features = when, rule, drafter.early_features
        self.threshold = config.threshold if threshold is None else threshold
        if not 0 <= self.threshold <= 1:
            raise InputError(f"disco: threshold {self.threshold} is not between 0 and 1")
        self.reads = config.feature_names
        self.level_by_level = when == "level" or drafter.early_features
        self.needs = frozenset({"last_logits"} if config.context else ())
        self.network = network
        self.log: list[tuple[int, Tensor]] | None = None
        self._device: torch.device | None = None

    def speculates(self, device: torch.device) -> bool:
        """Nothing follows from a step that drafted nothing but the next one: where the first drafts
        nothing, none does."""
        if self._device != device:
            self._prepare(device)
        return self.log is not None or self.ever

    def begin(self, seqs: RowState) -> None:
        if self._device != seqs.length.device:
            self._prepare(seqs.length.device)
        self.temperature = seqs.temperature
        self.planned: Tensor | None = None

    def _prepare(self, device: torch.device) -> None:
        self._device = device
        network, n = self.network.to(device), self.config.n_levels
        self.own, rest, self.bias = network.folded()
        self.context, rest = rest[:-2], rest[-2:]
        self.out_weight = network.output.weight.detach().T.contiguous()
        self.out_bias = network.output.bias.detach()
        first, later, self.start_price = (x.to(device) for x in self.config.prices(self.when))
        #: after level g, of the levels still to come
        self.price = [(later if g else first)[g:] for g in range(n)]
        share = torch.arange(n + 1, device=device) / n
        previous = torch.stack(torch.meshgrid(share, share, indexing="ij"), -1)
        self.known = previous @ rest  # (K+1, K+1, hidden), by levels drafted and accepted before
        tabulated = not self.config.context
        self.plans = self._plan(self.known) if tabulated and self._decides_before else None
        self.bars = self._bars() if tabulated else None
        known = self.plans is not None and device.type != "meta"
        self.ever = not known or bool(self.plans[0, 0] > 0)

    @property
    def _decides_before(self) -> bool:
        """Whether anything is decided before a step. Where a draft always pays, nothing is."""
        if self.rule == "threshold":
            return False
        return self.early_features or self.when == "step" or self.config.first_rate > 0

    def _plan(self, base: Tensor) -> Tensor:
        """(...) int64 levels: where nothing can be known of the first level, the decision about it;
        else whether to look."""
        n = self.config.n_levels
        if self.early_features:
            before = self.p(base, None, n + 1) - self.start_price
            return (before.cumsum(-1).amax(-1) > 0) * n
        gain = self._gain(self.p(base, None, 0), 0)
        # Level by level it only matters whether anything pays.
        return best_depth(gain) if self.when == "step" else (gain.amax(-1) > 0) * n

    def _bars(self) -> Tensor | None:
        """(K+1, K+1, K): the feature from which on drafting goes on after level 0 .. K-1; None
        where the network does not decide by a bar. It is looked for in the range that training
        met, and beyond it taken as found at its ends."""
        n, device = self.config.n_levels, self.known.device
        if len(self.reads) != 1 or self.when == "step" or device.type == "meta":
            return None
        mean, std = self.network.mean[0], self.network.std[0]
        grid = mean + std * torch.linspace(-_RANGE, _RANGE, _GRID, device=device)
        asked = self.early_features and self.rule == "cost"
        first = 0 if asked else 1
        bars = [torch.zeros_like(self.known[..., 0])] * first
        for level in range(first, n):

            def goes(x: Tensor, level: int = level) -> Tensor:
                return self._goes(self.p(self.known, x[..., None], level), level)

            found = goes(grid[:, None, None].expand(-1, n + 1, n + 1))
            if bool((found[:-1] & ~found[1:]).any()):
                return None
            at = (~found).sum(0)  # the first grid point that goes on
            high, low = grid[at.clamp(max=_GRID - 1)], grid[(at - 1).clamp(min=0)]
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                on = goes(middle)
                low, high = torch.where(on, low, middle), torch.where(on, middle, high)
            bar = high.masked_fill(at == 0, float("-inf")).masked_fill(at == _GRID, float("inf"))
            bars.append(bar)
        return torch.stack(bars, -1)

    def observe(self, drafted: Tensor, accepted: Tensor, truth: Truth) -> None:
        self.previous = drafted, accepted
        if self.bars is not None:
            self.bar = self.bars[self.previous].unbind(1)
        if self.bars is None or self.log is not None:
            self.base = self.known[self.previous]  # (B, hidden)
        if self.config.context:
            self.base = self.base + context_features(truth, self.temperature) @ self.context

    def p(self, base: Tensor, features: Tensor | None, level: int) -> Tensor:
        """(..., K) P_j after `level` levels. base: (..., hidden) what the step before adds"""
        hidden = base + self.bias[level]
        if features is not None:  # else zeros
            hidden = hidden + features.to(hidden.dtype) @ self.own
        return (hidden.relu() @ self.out_weight + self.out_bias).sigmoid().cumprod(-1)

    def plan(self) -> Tensor | None:
        if not self._decides_before:
            return None
        if self.log is not None and not self.early_features:
            self.log.append((1, self.p(self.base, None, 0)[:, 0]))
        return self._plan(self.base) if self.plans is None else self.plans[self.previous]

    def go_on(self, features: Tensor | None, level: int) -> Tensor | bool:
        if level == 0 and self.rule == "threshold":
            return True
        if self.when == "step":  # the drafter has early features: the plan could not be made before
            if level == 0:
                self.planned = best_depth(self._gain(self._noted(features, 0), 0))
            return self.planned > level
        if self.bars is None:
            return self._goes(self._noted(features, level), level)
        if self.log is not None:
            self._noted(features, level)
        return features[:, 0] >= self.bar[level]

    def _goes(self, p: Tensor, level: int) -> Tensor:
        """(...) bool. p: (..., K) after this level"""
        if self.rule == "threshold":
            return p[..., level - 1] >= self.threshold
        return self._gain(p, level).amax(-1) > 0

    def _gain(self, p: Tensor, level: int) -> Tensor:
        """(..., K - level): what drafting to depth level + 1, level + 2, ... gives, less what it
        costs, in tokens."""
        return (p[..., level:] - self.price[level]).cumsum(-1)

    def _noted(self, features: Tensor | None, level: int) -> Tensor:
        """(B, K) `p`, with what decides kept in the log."""
        p = self.p(self.base, features, level)
        if self.log is not None:
            asked = level if self.rule == "threshold" else level + 1
            self.log.append((asked, p[:, asked - 1]))
        return p


def best_depth(gain: Tensor) -> Tensor:
    """(...) int64: the n in 0 .. J with the largest gain, that of n = 0 being 0; the first of equal
    ones. gain: (..., J)"""
    most, at = gain.max(-1)
    return torch.where(most > 0, at + 1, 0)


def check_drafter(config: DiscoConfig, drafter: Drafter) -> None:
    """Raises InputError naming what differs."""
    found = plain_values(drafter.identity())
    differ = [
        f"{key} {config.drafter.get(key)!r} / {found.get(key)!r}"
        for key in sorted(config.drafter.keys() | found.keys())
        if config.drafter.get(key) != found.get(key)
    ]
    if not set(config.feature_names) <= set(drafter.feature_names):
        said = ", ".join(drafter.feature_names)
        differ.append(f"features {', '.join(config.feature_names)} / {said}")
    if differ:
        raise InputError(
            "disco: this classifier was trained for another drafter (trained / given): "
            + "; ".join(differ)
            + "; train one for it with train/disco.py"
        )


def check_target(config: DiscoConfig, fingerprint: str) -> None:
    """Raises InputError where it was trained on another target's answers."""
    if config.target != fingerprint:
        raise InputError(
            f"disco: this classifier was trained for a target of fingerprint {config.target}, this "
            f"one has {fingerprint}: train one for it with train/disco.py"
        )


def save_disco(folder: str | Path, network: Disco) -> None:
    """Writes `config.json` and `model.safetensors`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    write_tensors(folder / WEIGHTS, weights)
    write_json(folder / CONFIG, plain_values(asdict(network.config)))


def load_disco(folder: str | Path) -> Disco:
    """Raises InputError naming the file and what is wrong with it."""
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    network = Disco(config)
    file = folder / WEIGHTS
    try:
        tensors = load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{file} cannot be read ({error}): train it anew") from None
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    if given != wanted:
        wrong = sorted(n for n in wanted.keys() | given.keys() if wanted.get(n) != given.get(n))
        raise InputError(f"{file} does not fit {CONFIG} beside it: {', '.join(wrong)}")
    if not all(bool(value.isfinite().all()) for value in tensors.values()):
        raise InputError(f"{file} holds numbers that are not finite: train it anew")
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)


def _read_config(file: Path) -> DiscoConfig:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{file} is missing: a trained lookahead is a folder made by train/disco.py"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error})") from None
    known = {f.name for f in fields(DiscoConfig)}
    if not isinstance(content, dict) or content.get("format") != FORMAT or set(content) != known:
        raise InputError(f"{file} is not the configuration of a lookahead of format {FORMAT}")
    for key in ("feature_names", "added_s"):
        content[key] = tuple(content[key])
    config = DiscoConfig(**content)
    if len(config.added_s) != config.n_levels:
        n = len(config.added_s)
        raise InputError(f"{file}: added_s has {n} entries, not {config.n_levels}")
    return config
