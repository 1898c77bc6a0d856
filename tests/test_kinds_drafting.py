"""Every kind of heads in what decides about drafts: records of them, and the node budget."""

import pytest
import torch
from head_kinds import KIND_CASES, make_head
from models import Recorder, alone, prompts, settings, tiny

from redrafter.config import KINDS, TreeConfig
from redrafter.decode.speculative import speculative
from redrafter.drafters.budget import NodeBudget
from redrafter.drafters.head import HeadDrafter
from redrafter.records.make import walk_texts
from redrafter.records.policies import Prices, Records, simulate, static

SAMPLED = dict(do_sample=True, temperature=0.8, top_k=0)


def of_kind(kind, target, **options):
    """A drafter of width 3, as deep as the head goes; it is right now and then."""
    head = make_head(target, KIND_CASES[kind], scale=0.3)
    return HeadDrafter(head, target, TreeConfig(3, min(4, head.max_depth or 4)), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_records_of_a_kind_tell_what_its_drafts_do(kind):
    """Every fixed depth, simulated on the records, takes the steps that decoding takes."""
    target, rows, config = tiny("llama"), prompts(), settings(eos_token_id=-1, **SAMPLED)
    drafter, seeds = of_kind(kind, target), range(len(prompts()))
    records = Records.of(walk_texts(target, drafter, rows, config, seeds), config.max_new_tokens)
    prices = Prices(0.0, torch.zeros(drafter.max_depth), torch.zeros(int(records.nodes.max()) + 1))
    made = speculative(target, rows, config, seeds=seeds, drafter=drafter)
    assert made.tokens == alone(target, rows, config, list(seeds))[0]
    said = simulate(records, static(drafter.max_depth), prices)
    assert said.steps.tolist() == made.stats.steps
    assert said.tokens.tolist() == made.stats.emitted
    assert sum(made.stats.accepted_at) > 0, "nothing was right: this tested nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_budget_sizes_drafts_of_a_kind(kind):
    target, rows, config = tiny("llama"), prompts(), settings(**SAMPLED)
    budget = NodeBudget({1: 1.0, 3: 1.02, 5: 1.05, 9: 1.2, 13: 1.5}, [0.01, 0.02])
    drafter = Recorder(of_kind(kind, target, budget=budget))
    seeds = list(range(len(rows)))
    want = alone(target, rows, config, seeds)[0]
    assert speculative(target, rows, config, seeds=seeds, drafter=drafter).tokens == want
    sizes = {tree.n_nodes for tree, *_ in drafter.steps}
    assert len(sizes) > 1 and max(sizes) <= drafter.max_nodes
