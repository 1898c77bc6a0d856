"""Fitting a DISCO network to records, and choosing what its decisions are made with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from redrafter.bars import Bar
from redrafter.config.lookahead import DiscoTrainConfig
from redrafter.contracts import InputError
from redrafter.data.store import Store
from redrafter.decode.tree import bucket
from redrafter.drafters.features import SURE
from redrafter.drafters.lookup import SURE_OF_COPIES
from redrafter.drafters.profile import StepCosts, read_costs, step_costs
from redrafter.lookahead.disco import Disco, DiscoConfig
from redrafter.records.choose import choose, inputs_of
from redrafter.records.policies import (
    Moment,
    Prices,
    Records,
    Simulated,
    Visit,
    no_prices,
    oracle,
    simulate,
    static,
)
from redrafter.records.store import KIND, read_records


@dataclass
class Examples:
    """M moments at which a step began. inputs: (M, K+2, I), what would be known after level 0..K,
    and before the drafter has begun;
    chance: (M, K), nan where level k was not tested; accepted, judged: (M,)"""

    inputs: Tensor
    chance: Tensor
    accepted: Tensor
    judged: Tensor


def examples(records: Records, rollouts: int, seed: int, context: bool = False) -> Examples:
    """The moments that random policies meet: the network must know its way wherever a policy
    leads, and what the step before did depends on the policy. Ours.

    rollouts: passes over the texts, each with a random number of levels in every step
    context: see `DiscoConfig`
    """
    random = torch.Generator().manual_seed(seed)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    rows = torch.arange(len(records.length))

    def visit(step: Visit) -> None:
        live = step.live
        found.append((rows[live], step.position[live], step.previous[live]))

    def policy(moment: Moment) -> Tensor:
        return torch.randint(records.n_levels + 1, moment.accepted.shape, generator=random)

    for _ in range(rollouts):
        simulate(records, policy, no_prices(records), visit=visit)
    row, place, previous = (torch.cat(x) for x in zip(*found, strict=True))
    moment = Moment(records.features[row, place], records.context[row, place], previous,
                    records.accepted[row, place])  # fmt: skip
    return Examples(
        inputs_of(moment, context), records.chance[row, place],
        records.accepted[row, place], records.judged[row, place],
    )  # fmt: skip


def survival_loss(logits: Tensor, chance: Tensor) -> Tensor:
    """Mean over the tested levels of the cross-entropy between the chance that a level is accepted
    given the one before it, and the predicted one.

    logits: (M, K+2, K), asked as in `Examples.inputs`; chance: (M, K), nan where not tested.
    Summed over a draft's levels that is minus the log-likelihood of its accepted depth. Where the
    outcome was drawn, its chance stands in for it: the same mean, less noise.
    """
    tested = ~chance.isnan()
    wanted = chance.nan_to_num()[:, None].expand_as(logits)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    weight = tested[:, None].expand_as(loss)
    return (loss * weight).sum() / weight.sum().clamp(min=1)


def fit(
    train: Examples,
    validation: Examples,
    disco: DiscoConfig,
    config: DiscoTrainConfig,
    accelerator: Accelerator,
    progress: bool = True,
) -> tuple[Disco, dict[str, Any]]:
    """The network of the epoch with the smallest loss on `validation`, and how it went.

    In one process: a few thousand parameters learn in seconds, less than processes need to start.
    """
    if not len(train.accepted) or not len(validation.accepted):
        raise InputError("records: no step was recorded to train or to validate on")
    torch.manual_seed(config.seed)
    device = accelerator.device
    network = Disco(disco)
    flat = train.inputs.flatten(0, 1)
    network.mean.copy_(flat.mean(0))
    network.std.copy_(flat.std(0).clamp(min=1e-3))
    network.to(device)
    data = TensorDataset(train.inputs, train.chance)
    order = torch.Generator().manual_seed(config.seed)
    loader = DataLoader(data, config.batch_size, shuffle=True, generator=order)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    steps = config.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, history = (float("inf"), -1, {}), []
    bar = Bar(range(config.epochs), desc="disco", unit="epoch", disable=not progress)
    for epoch in bar:
        network.train()
        for inputs, chance in loader:
            inputs, chance = inputs.to(device), chance.to(device)
            level = torch.arange(disco.n_levels + 2, device=device)
            loss = survival_loss(network(inputs, level.expand(inputs.shape[:2])), chance)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        value = loss_on(network, validation)
        history.append(value)
        bar.set_postfix(validation=f"{value:.4f}", best=f"{best[0]:.4f}")
        if value < best[0]:
            weights = {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}
            best = (value, epoch, weights)
        elif epoch - best[1] >= config.patience_epochs:
            break
    done = Disco(disco)
    done.load_state_dict(best[2])
    facts = {"epochs": len(history), "best_epoch": best[1], "validation_loss": history}
    return done.eval().requires_grad_(False), facts


@torch.no_grad()
def loss_on(network: Disco, examples: Examples) -> float:
    device = network.mean.device
    total, count = 0.0, 0
    level = torch.arange(network.config.n_levels + 2, device=device)
    for part in torch.arange(len(examples.accepted)).split(4096):
        inputs, chance = examples.inputs[part].to(device), examples.chance[part].to(device)
        n = int((~chance.isnan()).sum())
        total += n * float(survival_loss(network(inputs, level.expand(inputs.shape[:2])), chance))
        count += n
    return total / max(1, count)


# ------------------------------------------------------------------------------------ the command


def train_disco(
    store: Store, config: DiscoTrainConfig, accelerator: Accelerator, progress: bool = True
) -> tuple[Disco, dict[str, Any], tuple[Tensor, Tensor]]:
    """Returns the network, a report of it, and its predictions on the validation records: that a
    level just drafted is accepted, and whether it was.

    Raises InputError where records and costs do not belong together, or there are too few.
    """
    made = store.identity
    n = store.n_rows - config.validation_prompts
    if made["kind"] != KIND or n < 1 or config.validation_prompts < 1:
        raise InputError(
            f"records: {store.name} holds {store.n_rows} rows of {made['kind']}, of which "
            f"validation_prompts {config.validation_prompts} validate: give more records "
            "(data/lookahead.py), or validate on fewer"
        )
    name = made["drafter"]["name"]
    costs = step_costs(config.costs, name, None, batch=1)
    _same_target(config.costs, made["target"]["weights"])
    names = wanted_features(made["feature_names"], config.features)
    train, validation = (
        read_records(store, rows, names) for rows in (range(n), range(n, store.n_rows))
    )
    early_features = made["foresees"]
    largest = int(max(train.nodes.max(), validation.nodes.max()))
    prices = prices_of(costs, train.n_levels, largest, buckets=early_features)
    disco = DiscoConfig(
        drafter={k: v for k, v in made["drafter"].items() if k != "name"},
        target=made["target"]["weights"], feature_names=names, context=config.context,
        n_levels=made["levels"], hidden=config.hidden, temperature=made["temperature"],
        device=device_of(config.costs),
        trained_on={"records": store.digest, "drafter": name, "prompts": made["prompts"],
                    "rows": [made["rows"][0], made["rows"][n - 1]]},
    )  # fmt: skip
    seen = examples(train, config.rollouts, config.seed, config.context)
    unseen = examples(validation, config.rollouts, config.seed + 1, config.context)
    network, facts = fit(seen, unseen, disco, config, accelerator, progress)
    disco, policies = choose(network, validation, prices, early_features)
    network.config = disco
    policies |= {f"static {k}": simulate(validation, static(k), prices) for k in
                 range(disco.n_levels + 1)}  # fmt: skip
    fixed = max(range(disco.n_levels + 1), key=lambda k: policies[f"static {k}"].rate())
    policies["oracle"] = simulate(validation, oracle, prices)
    base = policies[f"static {fixed}"].rate()
    figures = {name: _figures(done, base) for name, done in policies.items()}
    figures["best static"] = {**figures[f"static {fixed}"], "levels": fixed}
    p, y, level = predictions(network, unseen)
    areas = [roc_auc(p[level == g], y[level == g]) for g in range(1, disco.n_levels + 1)]
    report = {
        **facts, "validation_prompts": config.validation_prompts, "moments": len(seen.accepted),
        "policies": figures, "roc_auc": areas, "threshold": disco.threshold, "rate": disco.rate,
        "first_rate": disco.first_rate, "step_rate": disco.step_rate,
        "added_s": list(disco.added_s),
    }  # fmt: skip
    return network, report, (p, y)


def wanted_features(known: list[str], asked: list[str] | None) -> tuple[str, ...]:
    """Raises InputError naming one that the drafter does not publish."""
    if asked is None:
        sure = (names for names in (SURE, SURE_OF_COPIES) if set(names) <= set(known))
        return next(sure, tuple(known))
    if unknown := [name for name in asked if name not in known]:
        raise InputError(
            f"features: {', '.join(unknown)}: choose from what the records hold, {', '.join(known)}"
        )
    return tuple(asked)


def _figures(done: Simulated, base: float) -> dict[str, float]:
    steps = int(done.steps.sum())
    return {
        "tokens_per_second": done.rate(), "ratio": done.rate() / base,
        "tokens_per_step": int(done.tokens.sum()) / steps,
        "drafted_per_step": int(done.drafted.sum()) / steps,
    }  # fmt: skip


@torch.no_grad()
def predictions(network: Disco, examples: Examples) -> tuple[Tensor, Tensor, Tensor]:
    """(M',) each: the paper's question. P_g asked after level g, whether at least g levels were
    accepted, and g; of the levels that the text is long enough for."""
    level = torch.arange(network.config.n_levels + 2)
    p = network.log_p(examples.inputs, level.expand(examples.inputs.shape[:2])).exp()
    g = level[1:-1]
    own = p[:, g, g - 1]  # (M, K)
    asked = g <= examples.judged[:, None]
    right = g <= examples.accepted[:, None]
    return own[asked], right[asked], g.expand_as(own)[asked]


def roc_auc(score: Tensor, label: Tensor) -> float | None:
    """Area under the ROC curve: how often a right one has the larger score, ties counting half.
    None where all labels are equal."""
    positive = int(label.sum())
    negative = len(label) - positive
    if not positive or not negative:
        return None
    _, place, count = score.double().unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    rank = (last - (count - 1) / 2)[place]  # of equal ones the mean
    return float((rank[label].sum() - positive * (positive + 1) / 2) / (positive * negative))


def prices_of(costs: StepCosts, n_levels: int, largest: int, buckets: bool) -> Prices:
    """Measured costs as tables.

    largest: nodes of the largest tree; buckets: copies come in trees of the usual sizes
    """
    level = torch.tensor([costs.draft_s(k) for k in range(n_levels + 1)], dtype=torch.float64)
    sizes = [min(bucket(n), largest) if buckets else n for n in range(1, largest + 1)]
    verify = [0.0] + [costs.verify_s(n) + costs.loop_s(n) for n in sizes]
    start = float(costs.start_s)
    level[1:] -= start
    return Prices(start, level.diff(), torch.tensor(verify, dtype=torch.float64))


def _same_target(costs: str, weights: str) -> None:
    measured = read_costs(costs)[1].get("provenance", {}).get("target", {}).get("fingerprint")
    if measured != weights:
        raise InputError(
            f"costs: {costs} was measured with another target (fingerprint {measured}, the records "
            f"are of {weights}): measure with eval/costs.py for this one"
        )


def device_of(costs: str) -> dict[str, Any]:
    """Where the costs were measured."""
    facts = read_costs(costs)[1].get("provenance", {})
    return {key: facts.get(key) for key in ("device", "threads")}
