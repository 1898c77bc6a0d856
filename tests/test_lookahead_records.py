"""Records of a drafter, and lengths replayed on them, against the loop that they speak of."""


import pytest
import torch
from models import prompts, settings, tiny
from test_disco import DRAFTERS, MODES, K, counted, replayed, walked

from redrafter.contracts import InputError, Lookahead
from redrafter.decode.noise import gumbel
from redrafter.decode.speculative import speculative
from redrafter.drafters.skipping import LayerSkipping
from redrafter.drafters.suffix import SuffixDrafter
from redrafter.lookahead.context import context_features
from redrafter.lookahead.oracle import FullDepth, OracleLookahead
from redrafter.lookahead.static import StaticLookahead
from redrafter.records.make import acceptance_chance, walk_texts
from redrafter.records.policies import Records, oracle, static

# ------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", DRAFTERS)
def test_replayed_lengths_are_those_of_decoding(kind, mode):
    target, drafter, rows, config, texts = walked(kind, mode)
    records = Records.of(texts, config.max_new_tokens)
    for levels in (0, 1, K):
        made = counted(target, drafter, rows, config, lambda k=levels: StaticLookahead(k))
        said = replayed(records, static(levels))
        assert made == said
    full = FullDepth()
    speculative(target, rows, config, seeds=range(len(rows)), drafter=drafter, lookahead=full)
    made = speculative(
        target, rows, config, seeds=range(len(rows)), drafter=drafter,
        lookahead=OracleLookahead(full.depths),
    )  # fmt: skip
    assert made.stats.steps == [steps for steps, _, _ in replayed(records, oracle)]
    if kind == "model":
        assert {int(a) for t in texts for a in t.accepted} == set(range(K + 1))


class Watching(Lookahead):
    """Keeps what a lookahead is given: at which length, after which level."""

    needs = frozenset({"last_logits"})

    def __init__(self):
        self.features, self.context = {}, {}

    def begin(self, seqs):
        self.seqs = seqs

    def go_on(self, features, level):
        self.features[int(self.seqs.length), level] = features[0].float()
        return True

    def observe(self, drafted, accepted, truth):
        self.context[int(self.seqs.length)] = context_features(truth, self.seqs.temperature)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["model", "tree", "head", "suffix"])
def test_what_is_recorded_is_what_a_lookahead_reads(kind, mode):
    target, drafter, rows, config, texts = walked(kind, mode)
    n = 0
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        seen = Watching()
        speculative(target, [row], config, seeds=[i], drafter=drafter, lookahead=seen)
        for (length, level), features in seen.features.items():
            at = length - len(row) - 1
            assert torch.allclose(text.features[at, level], features, atol=1e-5)
            n += 1
        for length, context in seen.context.items():
            if (at := length - len(row) - 1) < len(text.tokens):
                assert torch.allclose(text.context[at], context, atol=1e-5)
    assert n > 30


def test_chances_stand_for_what_was_drawn():
    """What was accepted of copies, and its chance given the token's own noise, agree in the mean;
    greedy outcomes are certain."""
    target = tiny("llama")
    config = settings(do_sample=True, temperature=1.5, top_k=0, eos_token_id=-1)
    rows = [(p * 4)[:12] for p in prompts((3,) * 60, seed=3)]
    texts = walk_texts(target, SuffixDrafter(K, factor=4), rows, config, range(60))
    chance = torch.cat([t.chance for t in texts])
    accepted = torch.cat([t.accepted for t in texts])
    tested = ~chance.isnan()
    hard = (torch.arange(1, K + 1) <= accepted[:, None]).float()
    n, drawn = int(tested.sum()), chance[tested]
    assert n > 300 and ((drawn > 0.02) & (drawn < 0.98)).sum() > 50
    # Five standard errors of a sum of independent draws with these chances.
    spread = 5 * float((drawn * (1 - drawn)).sum()) ** 0.5
    assert abs(float(hard[tested].sum() - drawn.sum())) < spread
    assert set(walked("model", "sampled")[4][0].chance.nan_to_num(0).unique().tolist()) <= {0, 1}
    below = tested & (torch.arange(1, K + 1) > accepted[:, None] + 1)
    assert not bool(below.any()), "nothing is known below a level that was rejected"


def test_the_chance_of_a_set_of_siblings_by_counting():
    log_p = torch.tensor([0.4, 0.3, 0.2, 0.1]).double().log()[None]
    tokens, siblings = torch.tensor([[9, 2, 0, 1]]) % 4, torch.tensor([[False, True, False, True]])
    assert float(acceptance_chance(log_p, tokens, siblings, None)) == pytest.approx(0.5)
    n = 200_000
    own = gumbel(torch.tensor([1]), torch.tensor([[7]]), 4)[0, 0].double()
    noise = -torch.log(-torch.log(torch.rand(n, 4, generator=torch.Generator().manual_seed(0))))
    noise[:, [1, 2]] = own[[1, 2]].float()  # what the drafter saw; tokens 0 and 3 are not known
    wins = torch.isin((log_p + noise).argmax(1), torch.tensor([1, 2])).float().mean()
    said = float(acceptance_chance(log_p, tokens, siblings, own[None]))
    assert 0.1 < said < 0.9 and abs(said - float(wins)) < 5 * 0.5 / n**0.5
    none = torch.zeros_like(siblings)
    assert float(acceptance_chance(log_p, tokens, none, own[None])) == 0.0


def test_a_drafter_that_borrows_the_cache_is_refused():
    target = tiny("llama")
    with pytest.raises(InputError, match="reads the target's cache"):
        walk_texts(target, LayerSkipping(target, 2, fixed=(1,)), prompts(), settings(), range(4))


