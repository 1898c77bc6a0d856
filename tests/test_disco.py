"""The trained lookahead: its decisions in the loop and simulated on records, in float64; training;
files."""

import functools
import itertools
import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from models import VOCAB, alone, prompts, settings, tiny
from test_draft_model import close_draft
from test_head_drafter import make_head

from redrafter.config import DiscoTrainConfig, TreeConfig
from redrafter.contracts import InputError, Truth
from redrafter.decode.speculative import speculative
from redrafter.drafters.bigram import CountedBigrams, count_bigrams
from redrafter.drafters.features import SURE
from redrafter.drafters.frontier import ModelFrontier
from redrafter.drafters.head import HeadDrafter
from redrafter.drafters.lookup import SURE_OF_COPIES, PromptLookup
from redrafter.drafters.mixture import Mixture
from redrafter.drafters.model import DraftModel
from redrafter.drafters.multi import MultiCandidate
from redrafter.drafters.ngrammys import NGrammys
from redrafter.drafters.recycling import TokenRecycling
from redrafter.drafters.skipping import LayerSkipping
from redrafter.drafters.suffix import SuffixDrafter
from redrafter.lookahead.disco import (
    Disco,
    DiscoConfig,
    DiscoLookahead,
    best_depth,
    check_target,
    load_disco,
    save_disco,
)
from redrafter.records.choose import added_s, choose, inputs_of, policy_of
from redrafter.records.fit import (
    Examples,
    examples,
    fit,
    loss_on,
    predictions,
    roc_auc,
    survival_loss,
)
from redrafter.records.make import walk_texts
from redrafter.records.policies import Prices, Records, oracle, simulate, static

K = 4
MODES = {"greedy": {}, "sampled": dict(do_sample=True, temperature=0.8, top_k=0)}
LENGTHS = (9, 3, 14, 8, 11, 5)


def model(target, width=1):
    return DraftModel(close_draft(target, 0.08), target, K, width)


def head(target):
    return HeadDrafter(make_head(target, "own"), target, TreeConfig(3, K))


def suffix(target):
    return SuffixDrafter(K)


def bigram(target):
    return CountedBigrams(count_bigrams([p * 3 for p in prompts()], VOCAB, 2), 2, K)


DRAFTERS = {"model": model, "tree": functools.partial(model, width=2), "head": head,
            "suffix": suffix, "bigram": bigram}  # fmt: skip


@functools.cache
def walked(kind: str, mode: str):
    """(target, drafter, prompts, config, texts of records)"""
    target = tiny("llama")
    config = settings(eos_token_id=[5], **MODES[mode])
    drafter, rows = DRAFTERS[kind](target), prompts(LENGTHS, seed=1)
    texts = [t for at in (0, 3) for t in
             walk_texts(target, drafter, rows[at : at + 3], config, range(at, at + 3))]  # fmt: skip
    return target, drafter, rows, config, texts


def no_prices(records):
    return Prices(0.0, torch.zeros(K), torch.zeros(int(records.nodes.max()) + 1))


def counted(target, drafter, rows, config, lookahead):
    """Steps, tokens and drafted levels of every prompt, whose text is plain's. All in one batch;
    one of them by itself does the same."""
    look, drafted = lookahead(), [[0] * len(rows)]
    observe = look.observe

    def noted(levels, accepted, truth):
        drafted.append(levels.tolist())
        observe(levels, accepted, truth)

    look.observe = noted
    seeds = range(len(rows))
    made = speculative(target, rows, config, seeds=seeds, drafter=drafter, lookahead=look)
    assert made.tokens == alone(target, rows, config)[0]
    levels = [sum(row) for row in zip(*drafted, strict=True)]
    assert sum(levels) == sum(made.stats.drafted_at)
    one = speculative(
        target, rows[-1:], config, seeds=seeds[-1:], drafter=drafter, lookahead=lookahead()
    )
    assert one.tokens == made.tokens[-1:] and one.stats.steps == made.stats.steps[-1:]
    assert sum(one.stats.drafted_at) == levels[-1]
    return list(zip(made.stats.steps, made.stats.emitted, levels, strict=True))


def simulated(records, policy, **more):
    done = simulate(records, policy, no_prices(records), **more)
    return list(zip(done.steps.tolist(), done.tokens.tolist(), done.drafted.tolist(), strict=True))


# ------------------------------------------------------------------------------------ decisions


def network_for(drafter, target, hidden=8, seed=0, names=None, **more) -> Disco:
    torch.manual_seed(seed)
    disco = Disco(DiscoConfig(
        drafter.identity(), target.fingerprint(), names or drafter.feature_names, K, hidden,
        **{"added_s": (0.9, 0.5, 0.4, 0.3), "rate": 0.8, "first_rate": 0.5, "step_rate": 0.6,
           "threshold": 0.55, **more},
    ))  # fmt: skip
    with torch.no_grad():  # decisions that differ from step to step
        for p in disco.parameters():
            p.copy_(torch.randn_like(p) * 0.7)
        disco.mean.fill_(0.2)
        disco.std.fill_(0.7)
        disco.output.bias.add_(2.0)
    return disco.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("how", "mode"),
    [("level", "greedy"), ("step", "greedy"), ("context", "greedy"), ("context", "sampled"),
     ("level", "sampled"), ("threshold", "sampled"), ("idle", "sampled"), ("few", "sampled"),
     ("sure", "sampled")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["model", "head", "suffix"])
def test_simulated_decisions_are_those_of_the_loop(kind, mode, how):
    """Also, in `counted`: the text is plain's, and in a batch every row decides by itself."""
    target, drafter, rows, config, texts = walked(kind, mode)
    names = drafter.feature_names
    if how == "few":  # in an order of its own, and those that cost nothing
        names = names[::-2] if kind == "suffix" else SURE
    elif how == "sure":
        names = SURE_OF_COPIES if kind == "suffix" else SURE
    network = network_for(drafter, target, names=names, context=how == "context")
    options = {"threshold": dict(rule="threshold"), "idle": {}, "few": {}, "sure": {}}
    options = options.get(how, dict(when=how))
    if how == "context":
        options = dict(when="step" if mode == "greedy" else "level")
    if how == "idle":  # looks only where it seems to pay
        network.config = replace(network.config, start_rate=0.95, start_s=0.8)

    def look():
        return DiscoLookahead(network, drafter, **options)

    made = counted(target, drafter, rows, config, look)
    records = Records.of(texts, config.max_new_tokens)
    records.features = records.features[..., [drafter.feature_names.index(n) for n in names]]
    said = simulated(records, policy_of(look()), looks=drafter.early_features)
    if how == "idle" and kind == "suffix":
        found = []
        simulate(records, lambda m: found.append(policy_of(look())(m)) or found[-1],
               no_prices(records), looks=True)  # fmt: skip
        levels = set(torch.cat(found).tolist())
        assert -1 in levels and levels - {-1}, "sometimes it looks"
    assert made == said
    if kind != "head":  # random weights: nothing of it is accepted
        assert len({drafted for _, _, drafted in made}) > 1, "the classifier decides something"


@pytest.mark.parametrize("kind", ["model", "suffix"])
def test_a_classifier_that_never_drafts_costs_nothing(kind, monkeypatch):
    """Not even the loop: with one that drafts nothing at first, the drafter is never begun."""
    target = tiny("llama")
    drafter, rows, config = DRAFTERS[kind](target), prompts(LENGTHS, seed=1), settings()
    rates = {"first_rate": 50.0, "start_rate": 50.0}
    never = DiscoLookahead(network_for(drafter, target, **rates), drafter)
    assert never.speculates(target.device) is False
    assert DiscoLookahead(network_for(drafter, target), drafter).speculates(target.device)
    unsure = DiscoLookahead(network_for(drafter, target, context=True, **rates), drafter)
    assert unsure.speculates(target.device), "what the target says may change its mind"

    made = speculative(target, rows, config, drafter=drafter, lookahead=unsure)
    monkeypatch.setattr(drafter, "begin", lambda seqs: pytest.fail("begun"))
    seeds = range(len(rows))
    plainly = speculative(target, rows, config, seeds=seeds, drafter=drafter, lookahead=never)
    assert plainly.tokens == alone(target, rows, config)[0]
    assert plainly.stats.drafted_at == made.stats.drafted_at == [0] * K
    assert plainly.stats.steps == made.stats.steps and plainly.extra["drafter"] == {}
    assert plainly.stats.seconds["lookahead"] == 0


def test_the_best_depth_by_trying_all():
    random = torch.Generator().manual_seed(0)
    p, price = torch.rand(200, 5, generator=random).sort(1, descending=True)[0], torch.rand(200, 5)
    price = price * torch.rand(200, 1, generator=random) * 2
    got = best_depth((p - price).cumsum(-1)).tolist()
    for row, cost, n in zip(p, price, got, strict=True):
        gains = [float((row[:k] - cost[:k]).sum()) for k in range(6)]
        assert n == max(range(6), key=lambda k: round(gains[k], 6))
    assert set(got) >= {0, 1, 5}


def test_one_level_may_pay_for_the_next():
    """The first level costs more than it gives, the second makes up for it; the log keeps P."""
    target = tiny("llama")
    drafter = model(target)
    network = network_for(drafter, target, added_s=(1.2, 0.1, 0.1, 9.0), first_rate=1.0)
    with torch.no_grad():
        network.output.weight.zero_()
        network.output.bias.fill_(4.0)  # each level with 0.982, whatever is seen
    look = DiscoLookahead(network, drafter)
    look.log = []
    made = speculative(target, prompts((6,)), settings(eos_token_id=-1), drafter=drafter,
                       lookahead=look)  # fmt: skip
    stats = made.stats
    assert stats.drafted_at[2] > 0 and stats.drafted_at[3] == 0
    assert {level for level, _ in look.log} == {1, 2, 3, 4}
    assert all(abs(float(p) - 0.982**level) < 1e-3 for level, p in look.log)


def test_nothing_reads_the_host_per_level():
    """Decisions on the meta device, where reading a value is an error."""
    target = tiny("llama")
    drafter = model(target)
    network = network_for(drafter, target).to("meta")
    for options in (dict(), dict(when="step"), dict(rule="threshold")):
        look = DiscoLookahead(network, drafter, **options)
        count = torch.ones(3, dtype=torch.long, device="meta")
        look.begin(type("S", (), {"length": count, "temperature": 1.0})())
        tokens = torch.zeros(3, K + 1, dtype=torch.long, device="meta")
        look.observe(count, count, Truth(tokens, count))
        look.plan()
        for level in range(1, K):
            features = torch.zeros(3, len(drafter.feature_names), device="meta")
            assert look.go_on(features, level).shape == (3,) if look.level_by_level else True


# ------------------------------------------------------------------------------------- training


def test_the_loss_by_hand():
    """Minus the log-likelihood of the accepted depth: 2 of 3 levels, and 1 where the text ends."""
    logits = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(0)).double()
    p, nan = logits.sigmoid()[:, 0], float("nan")
    chance = torch.tensor([[1.0, 1.0, 0.0], [1.0, nan, nan]]).double()
    wanted = -(p[0, 0] * p[0, 1] * (1 - p[0, 2])).log() - p[1, 0].log()
    assert float(survival_loss(logits, chance)) == pytest.approx(float(wanted) / 4)
    soft = torch.tensor([[0.3, nan, nan], [nan] * 3]).double()
    wanted = -(0.3 * p[0, 0].log() + 0.7 * (1 - p[0, 0]).log())
    assert float(survival_loss(logits, soft)) == pytest.approx(float(wanted))


def made_up(n: int, seed: int) -> Records:
    """Texts whose levels are accepted with a chance that feature 0 of the level before says."""
    random = torch.Generator().manual_seed(seed)
    shape = (n, 40)
    features = torch.rand(*shape, K + 1, 2, generator=random)
    context = torch.rand(*shape, 1, generator=random)
    chance = features[:, :, :K, 0]  # of level k: what is known after level k - 1
    drawn = torch.rand(*shape, K, generator=random) < chance
    accepted = drawn.long().cumprod(-1).sum(-1)
    level = torch.arange(1, K + 1)
    hard = (level <= accepted[..., None]).float()
    hard = hard.masked_fill(level > accepted[..., None] + 1, float("nan"))
    nodes = torch.arange(1, K + 2).expand(*shape, -1)
    return Records(features, context, nodes, accepted, torch.full(shape, K), hard,
                   torch.full((n,), 40), torch.full(shape, K))  # fmt: skip


PRICES = Prices(0.3, torch.full((K,), 0.35), torch.tensor([0.0, 1.0, 1.1, 1.2, 1.3, 1.4]))


def test_training_finds_what_can_be_known():
    train, held = made_up(120, 0), made_up(30, 1)
    disco = DiscoConfig({}, "", ("a", "b"), K, 16)
    config = DiscoTrainConfig("", "", "", epochs=15, batch_size=256)
    seen, unseen = examples(train, 2, 0), examples(held, 2, 1)
    network, facts = fit(seen, unseen, disco, config, Accelerator(cpu=True), progress=False)
    assert facts["validation_loss"][facts["best_epoch"]] == min(facts["validation_loss"])
    assert loss_on(network, unseen) == pytest.approx(min(facts["validation_loss"]), rel=1e-5)
    # Asked before level 1, feature 0 of level 0 is its very chance.
    chance = unseen.inputs[:, 0, 0]
    p = network.log_p(unseen.inputs[:, 0], torch.zeros(len(chance), dtype=torch.long)).exp()[:, 0]
    assert float((p - chance).abs().mean()) < 0.1  # 0.25 by the mean alone
    # Nothing in it says the same of the last level after the last: no better than the mean.
    own, right, level = predictions(network, unseen)
    assert len(own) == len(unseen.accepted) * K and set(level.tolist()) == {1, 2, 3, 4}
    assert abs(float(own.mean()) - float(right.float().mean())) < 0.03

    chosen, done = choose(network, held, PRICES, early_features=False)
    fixed = max(simulate(held, static(k), PRICES).rate() for k in range(K + 1))
    best = simulate(held, oracle, PRICES).rate()
    assert fixed * 1.02 < done["level"].rate() < best
    assert done["level"].rate() >= max(done["threshold"].rate(), done["step"].rate())
    assert chosen.rate > 0 and chosen.first_rate >= 0 and 0 < chosen.threshold < 1


def test_examples_are_moments_of_policies():
    records = made_up(5, 2)
    found = examples(records, 3, 0)
    share = found.inputs[:, 0, -2:]
    assert bool((share[:, 1] <= share[:, 0]).all()), "accepted of the drafted"
    assert {round(float(x) * K) for x in share[:, 0].unique()} == set(range(K + 1))
    again = examples(records, 3, 0)
    assert torch.equal(again.inputs, found.inputs) and len(found.accepted) > 3 * 5 * 12


def test_what_a_level_adds():
    """A copy of two tokens ends its tree there: what level 3 costs is asked of the longer ones."""
    records = made_up(1, 0)
    nodes = torch.tensor([1, 2, 3, 3, 3]).expand(1, 40, -1).clone()
    nodes[0, ::2] = torch.tensor([1, 2, 3, 4, 5])
    records.nodes = nodes
    verify = torch.tensor([0.0, 1.0, 1.5, 1.75, 2.75, 2.85]).double()
    prices = Prices(0.3, torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), verify)
    got = added_s(records, prices, early_features=False)
    assert got.tolist() == pytest.approx([0.3 + 0.1 + 0.5, 0.2 + 0.25, 0.3 + 1.0, 0.4 + 0.1])
    assert added_s(records, prices, early_features=True)[0] == pytest.approx(0.1 + 0.5)
    moved = simulate(records, static(0), prices, looks=True).seconds
    still = simulate(records, static(0), prices).seconds
    assert float(moved - still) == pytest.approx(40 * 0.3)


def test_roc_auc_by_pairs():
    random = torch.Generator().manual_seed(0)
    score = torch.randint(12, (80,), generator=random) / 12
    label = torch.rand(80, generator=random) < score
    pairs = [(float(s > o) + 0.5 * float(s == o))
             for s, o in itertools.product(score[label], score[~label])]  # fmt: skip
    assert roc_auc(score, label) == pytest.approx(sum(pairs) / len(pairs))
    assert roc_auc(score, torch.ones(80, dtype=torch.bool)) is None


def test_no_steps_no_training():
    nothing = Examples(torch.zeros(0, K + 1, 7), torch.zeros(0, K), torch.zeros(0), torch.zeros(0))
    disco = DiscoConfig({}, "", ("a", "b"), K, 4)
    with pytest.raises(InputError, match="no step was recorded"):
        fit(nothing, nothing, disco, DiscoTrainConfig("", "", ""), Accelerator(cpu=True))


# ---------------------------------------------------------------------------------------- files


def test_a_classifier_is_read_back_and_refused(tmp_path):
    target = tiny("llama")
    drafter = model(target)
    network = network_for(drafter, target)
    save_disco(tmp_path, network)
    again = load_disco(tmp_path)
    assert again.config == network.config
    x, level = torch.randn(3, len(again.config.inputs)), torch.tensor([0, 2, 4])
    assert torch.equal(again.log_p(x, level), network.log_p(x, level))
    DiscoLookahead(again, drafter)
    for other, said in (
        (DraftModel(close_draft(target, 0.3), target, K), "draft "),
        (DraftModel(drafter.draft, target, K + 1), "levels 4 / 5"),
        (DraftModel(drafter.draft, target, K, 2), "width 1 / 2"),
        (head(target), "kind 'DraftModel' / 'RecurrentDrafter'"),
        (suffix(target), "features p_1"),
    ):
        with pytest.raises(InputError, match="trained for another drafter") as error:
            DiscoLookahead(again, other)
        assert said in str(error.value)
    with pytest.raises(InputError, match="trained for a target of fingerprint"):
        check_target(again.config, "another")
    for options in (dict(when="never"), dict(rule="luck"), dict(threshold=2.0),
                    dict(when="step", rule="threshold")):  # fmt: skip
        with pytest.raises(InputError, match="disco: "):
            DiscoLookahead(again, drafter, **options)


def test_drafters_that_differ_say_so():
    """As deep and with the same features, but not the drafter that a classifier was trained for."""
    target = tiny("llama")
    tables = [count_bigrams([p * n for p in prompts()], VOCAB, 2) for n in (3, 9)]
    frontier = ModelFrontier(close_draft(target, 0.1), target, 9)
    other = ModelFrontier(close_draft(target, 0.3), target, 9)
    families = [
        [PromptLookup(K, 2), PromptLookup(K, 3), PromptLookup(K, 3, "recent")],
        [CountedBigrams(tables[0], 2, K), CountedBigrams(tables[1], 2, K),
         CountedBigrams(tables[0], 1, K)],
        [MultiCandidate([frontier], (2, 1)), MultiCandidate([frontier], (1, 2)),
         MultiCandidate([other], (2, 1)), MultiCandidate([frontier], (2, 1), how="iid")],
        [Mixture({"a": suffix(target), "b": PromptLookup(K, n)}, nodes)
         for n, nodes in ((2, 5), (3, 5), (2, 6))],
        [NGrammys(tables[0], 2, K), NGrammys(tables[1], 2, K), NGrammys(tables[0], 3, K),
         NGrammys(tables[0], 2, K, query=2)],
        [TokenRecycling(VOCAB, "2/21", 2), TokenRecycling(VOCAB, "2/12", 2),
         TokenRecycling(VOCAB, "2/21", 2, tables[0]), TokenRecycling(VOCAB, "2/21", 2, tables[1])],
        [LayerSkipping(target, K, fixed=(0,)), LayerSkipping(target, K, fixed=(1,)),
         LayerSkipping(target, K), LayerSkipping(target, K, threshold=0.5)],
    ]  # fmt: skip
    for family in families:
        said = [json.dumps(drafter.identity(), sort_keys=True) for drafter in family]
        assert len(set(said)) == len(said)


@pytest.mark.parametrize("damage", ["missing", "half", "shape", "nan", "config", "format", "added"])
def test_damaged_files_are_refused(damage, tmp_path):
    target = tiny("llama")
    network = network_for(model(target), target)
    save_disco(tmp_path, network)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    fields = json.loads(config.read_text())
    if damage == "missing":
        config.unlink()
    elif damage == "half":
        weights.write_bytes(weights.read_bytes()[:99])
    elif damage == "shape":
        config.write_text(json.dumps({**fields, "hidden": 9}))
    elif damage == "nan":
        with torch.no_grad():
            network.output.bias[0] = float("nan")
        save_disco(tmp_path, network)
    elif damage == "config":
        config.write_text("{")
    elif damage == "format":
        config.write_text(json.dumps({**fields, "format": 1}))
    else:
        config.write_text(json.dumps({**fields, "added_s": [1.0]}))
    file = weights.name if damage in ("half", "shape", "nan") else config.name
    with pytest.raises(InputError, match=file):
        load_disco(tmp_path)


def test_inputs_are_in_the_order_of_their_names():
    from redrafter.records.policies import Moment

    moment = Moment(torch.arange(10.0).view(1, 5, 2), torch.tensor([[0.6]]),
                    torch.tensor([[4.0, 2.0]]), torch.tensor([0]))  # fmt: skip
    config = DiscoConfig({}, "", ("a", "b"), K)
    assert len(config.inputs) == inputs_of(moment, False).shape[-1]
    assert inputs_of(moment, False)[0, 2].tolist() == pytest.approx([4, 5, 1.0, 0.5])
    assert replace(config, context=True).inputs[2] == "root_p"
    assert inputs_of(moment, True)[0, 2].tolist() == pytest.approx([4, 5, 0.6, 1.0, 0.5])


@pytest.mark.parametrize("rule", ["cost", "threshold"])
@pytest.mark.parametrize("early_features", [False, True])
def test_a_bar_decides_as_its_network_does(rule, early_features):
    """One feature: where the network goes on from a bar on, that is found; else there is none."""
    target = tiny("llama")
    drafter = SuffixDrafter(K, 1) if early_features else model(target)
    names = SURE_OF_COPIES if early_features else SURE
    random = torch.Generator().manual_seed(0)
    network = network_for(drafter, target, names=names, rate=0.9, threshold=0.3)
    network.inputs.weight[:, 0].abs_()
    network.output.weight.abs_()  # the surer, the better
    network.output.bias.fill_(0.5 if rule == "cost" else -1.0)
    look = DiscoLookahead(network, drafter, rule=rule)
    rows = torch.ones(400, dtype=torch.long)
    drafted = torch.randint(K + 1, (400,), generator=random)
    accepted = (drafted * torch.rand(400, generator=random)).long()
    look.begin(type("S", (), {"length": rows, "temperature": 1.0})())
    look.observe(drafted, accepted, Truth(rows[:, None], rows))
    assert look.bars is not None
    base, answers = look.known[drafted, accepted], []
    for level in range(0 if early_features and rule == "cost" else 1, K):
        features = -4 * torch.rand(400, 1, generator=random)
        answers.append(look.go_on(features, level))
        assert torch.equal(answers[-1], look._goes(look.p(base, features, level), level))
    assert 100 < int(torch.stack(answers).sum()) < 400 * len(answers) - 100, "both answers occur"

    network.inputs.weight[:, 0].neg_()  # the surer, the worse
    other = DiscoLookahead(network, drafter, rule=rule)
    other.begin(type("S", (), {"length": rows, "temperature": 1.0})())
    assert other.bars is None
