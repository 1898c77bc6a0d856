"""Token recycling: the matrix by hand, the tree's structure, and the text unchanged."""

import copy

import pytest
import torch
from models import VOCAB, Recorder, alone, make_tree, path_to, prompts, settings, tiny

from redrafter.contracts import InputError, RowState, Truth
from redrafter.decode.speculative import speculative
from redrafter.decode.tree import ancestors
from redrafter.drafters.bigram import count_bigrams
from redrafter.drafters.recycling import (
    DEFAULT_TREE,
    PAPER_TREE,
    TokenRecycling,
    parse_children,
)

V = 10


def known(rows: list[list[int]], prompt_length: list[int], live=None, noise=None) -> RowState:
    """Rows as the loop holds them, the root included; what lies behind them is stale."""
    width = max(map(len, rows)) + 5
    ids = torch.tensor([row + [9] * (width - len(row)) for row in rows])
    live = [True] * len(rows) if live is None else live
    length = torch.tensor([len(row) for row in rows])
    return RowState(ids, length, torch.tensor(prompt_length), torch.tensor(live), noise)


def likely(*tokens: int) -> torch.Tensor:
    """(V,) logits: these tokens, most probable first, all others far below."""
    logits = torch.full((V,), -30.0).sub_(torch.arange(V))
    logits[list(tokens)] = torch.arange(len(tokens), 0, -1).float()
    return logits


def truth(tokens: list[list[int]], logits: list[list[torch.Tensor]], count: list[int]) -> Truth:
    stacked = torch.stack([torch.stack(row) for row in logits])
    return Truth(torch.tensor(tokens), torch.tensor(count), None, stacked)


def advance(drafter: TokenRecycling, told: Truth) -> None:
    """What the loop does before it calls `observe`: append to the rows that live on."""
    seqs = drafter.seqs
    where = seqs.length[:, None] + torch.arange(told.tokens.shape[1])
    seqs.ids.scatter_(1, where, told.tokens)
    seqs.length = seqs.length + told.count
    seqs.live = told.count > 0
    drafter.observe(told)


def matrix(drafter: TokenRecycling) -> dict[int, list[int]]:
    """What is known: token -> its successors in order."""
    shown = {}
    for token in range(drafter.vocab_size):
        there = drafter.next_log_p[token] > float("-inf")
        if bool(there.any()):
            assert there.tolist() == sorted(there.tolist(), reverse=True)
            shown[token] = drafter.next_tokens[token, there].tolist()
    return shown


def draft(drafter: TokenRecycling, levels: int | None = None):
    drafter.start()
    for level in range(1, 1 + (drafter.max_depth if levels is None else levels)):
        drafter.extend(level)
    return drafter.tree()


def small(**changes) -> TokenRecycling:
    options = {"children": "2/21", "k": 2, "fill_prompt": False, **changes}
    return TokenRecycling(V, **options)


# ---------------------------------------------------------------- the matrix


def test_the_row_written_is_that_of_the_token_read():
    drafter = small()
    # Two prompts (4 1) and (5); the prefill emits 2 and 6: said after reading 1 and 5.
    drafter.begin(known([[4, 1, 2], [5, 6]], [2, 1]))
    drafter.observe(truth([[2], [6]], [[likely(2, 3)], [likely(6, 7)]], [1, 1]))
    assert matrix(drafter) == {1: [2, 3], 5: [6, 7]}
    # Row 0: root 2, accepted 3 and 8, bonus 0. Row 1: nothing accepted below root 6, bonus 7;
    # what stands beyond its count must not be learned.
    step = truth(
        [[3, 8, 0], [7, 4, 4]],
        [[likely(3, 5), likely(8, 1), likely(0, 6)], [likely(7, 9), likely(4, 9), likely(9, 4)]],
        [3, 1],
    )
    advance(drafter, step)
    assert matrix(drafter) == {1: [2, 3], 5: [6, 7], 2: [3, 5], 3: [8, 1], 8: [0, 6], 6: [7, 9]}
    expected = likely(8, 1).log_softmax(-1)[[8, 1]]
    assert torch.allclose(drafter.next_log_p[3], expected)
    # The target now thinks otherwise about what follows 0 and 7; row 1 has ended.
    advance(drafter, truth([[1], [1]], [[likely(1, 0)], [likely(1, 2)]], [1, 0]))
    assert matrix(drafter)[0] == [1, 0] and 7 not in matrix(drafter), "count 0 is not learned from"
    advance(drafter, truth([[1], [1]], [[likely(9, 3)], [likely(1, 2)]], [1, 0]))
    assert matrix(drafter)[1] == [9, 3], "overwritten by what was said last"


def test_of_equal_tokens_the_last_said_stays():
    drafter = small()
    drafter.begin(known([[3], [3], [3]], [1, 1, 1]))
    # 3 is read at depth 0 by all rows, and at depth 1 by rows 0 and 1; row 2 stops at depth 0.
    said = [
        [likely(3, 1), likely(4, 1)],
        [likely(3, 2), likely(5, 2)],
        [likely(3, 6), likely(6, 7)],
    ]
    advance(drafter, truth([[3, 4], [3, 5], [3, 6]], said, [2, 2, 1]))
    assert matrix(drafter) == {3: [5, 2]}, "the largest depth, the last row that reached it"


def test_rejected_nodes_teach_too():
    """Two rows whose trees are 1 - (2 - 4, 3) and 5 - (2 - 6, 7); the second has a hole at 7."""
    there = [[True] * 4, [True, True, False, True]]
    tree = make_tree([[1, 2, 3, 4], [5, 2, 7, 6]], [0, 0, 0, 1], there)
    said = [
        [likely(3, 2), likely(4, 5), likely(8, 9), likely(0, 1)],
        [likely(2, 7), likely(6, 8), likely(9, 1), likely(5, 0)],
    ]
    # Row 0 accepts 3, then says 8; row 1 accepts 2 and 6, then says 5.
    path = [[said[0][0], said[0][2], said[0][2]], [said[1][0], said[1][1], said[1][3]]]
    told = truth([[3, 8, 0], [2, 6, 5]], path, [2, 3])
    told.tree, told.tree_logits = tree, torch.stack([torch.stack(row) for row in said])
    of_path = {1: [3, 2], 3: [8, 9], 5: [2, 7], 2: [6, 8], 6: [5, 0]}
    drafters = {flag: small(all_nodes=flag) for flag in (False, True)}
    for drafter in drafters.values():
        drafter.begin(known([[9, 1], [9, 5]], [1, 1]))
        advance(drafter, copy.copy(told))
    assert matrix(drafters[False]) == of_path
    # 4 was rejected; 7 was never there; of the two 2s the later row's stays.
    assert matrix(drafters[True]) == {**of_path, 4: [0, 1]}
    # The prefill has no tree; a row that has ended teaches nothing.
    drafter = small()
    drafter.begin(known([[9, 1], [9, 5]], [1, 1]))
    drafter.observe(truth([[1], [5]], [[likely(1, 2)], [likely(5, 3)]], [1, 1]))
    assert matrix(drafter) == {9: [5, 3]}
    told.count = torch.tensor([2, 0])
    advance(drafter, told)
    assert matrix(drafter) == {9: [5, 3], 1: [3, 2], 3: [8, 9], 2: [4, 5], 4: [0, 1]}


def test_of_equal_nodes_the_deepest_then_the_last_stays():
    said = [likely(1, 2), likely(4, 5), likely(6, 7), likely(8, 9)]
    for n, expected in ((4, [8, 9]), (3, [6, 7]), (2, [4, 5])):
        drafter = small()
        drafter.begin(known([[0, 3]], [1]))
        told = truth([[0]], [[said[0]]], [1])
        told.tree = make_tree([[3] * n], [0, 0, 0, 1][:n])
        told.tree_logits = torch.stack(said[:n])[None]
        advance(drafter, told)
        assert matrix(drafter) == {3: expected}


def test_k_larger_than_the_vocabulary():
    drafter = TokenRecycling(V, ((12,), (1,)), k=12, fill_prompt=False)
    drafter.begin(known([[1, 2]], [1]))
    drafter.observe(truth([[2]], [[likely(2, 3)]], [1]))
    assert sorted(matrix(drafter)[1]) == list(range(V)) and matrix(drafter)[1][:2] == [2, 3]
    drafter.begin(known([[2, 1]], [1]))
    tree = draft(drafter)
    assert tree.valid[0].tolist() == [True] + [True] * V + [False] * 2 + [False]
    target, rows = tiny("llama"), prompts()
    wide = TokenRecycling(VOCAB, ((60,), (1,)), k=60)
    got = speculative(target, rows, settings(), drafter=wide)
    assert got.tokens == alone(target, rows, settings())[0]


def test_prompts_fill_only_what_is_not_known():
    warm = count_bigrams([[5, 6]], V, 1)
    drafter = small(fill_prompt=True, warm=warm)
    # 1 is followed by 2 twice and 3, 4 once; the root 7 is no part of the prompt, nor is what
    # lies behind it; 5 is known from the table.
    drafter.begin(known([[1, 4, 1, 2, 1, 3, 1, 2, 7], [5, 8, 0]], [8, 2]))
    assert matrix(drafter) == {1: [2, 3], 2: [1], 3: [1], 4: [1], 5: [6]}
    # The target's word replaces a prompt's, and no later prompt replaces the target's.
    drafter.observe(truth([[7], [0]], [[likely(7, 1)], [likely(0, 1)]], [1, 1]))
    assert matrix(drafter)[2] == [7, 1] and matrix(drafter)[8] == [0, 1]
    drafter.begin(known([[2, 9, 1, 5, 0]], [4]))
    known_now = matrix(drafter)
    assert known_now[2] == [7, 1] and known_now[5] == [6]
    assert known_now[1] == [5], "a newer prompt replaces an older one"
    drafter.begin(known([[6, 6]], [1]))
    assert matrix(drafter) == known_now, "a prompt of one token has no pair"


def test_reset_forgets_all_but_the_table():
    warm = count_bigrams([[5, 6], [5, 6], [5, 7], [5, 8]], V, 3)  # wider than k
    for reset in (False, True):
        drafter = small(warm=warm, reset=reset)
        start = matrix(drafter)
        assert start == {5: [6, 7]}
        drafter.begin(known([[5, 2]], [1]))
        drafter.observe(truth([[2]], [[likely(2, 3)]], [1]))
        assert matrix(drafter) == {5: [2, 3]}
        drafter.begin(known([[4, 2]], [1]))
        assert matrix(drafter) == (start if reset else {5: [2, 3]})


# ---------------------------------------------------------------- the tree


def taught(rows: dict[int, tuple[int, ...]], **changes) -> TokenRecycling:
    """A drafter to which the target has said `rows`."""
    drafter = small(**changes)
    for token, after in rows.items():
        drafter.begin(known([[token, after[0]]], [1]))
        drafter.observe(truth([[after[0]]], [[likely(*after)]], [1]))
    return drafter


def test_tree_by_hand():
    drafter = taught({1: (2, 3), 2: (4, 5), 4: (1, 2)}, children="2/21/101")
    drafter.begin(known([[7, 1], [7, 2], [7, 8]], [1, 1, 1]))
    tree = draft(drafter)
    assert drafter.max_nodes == tree.n_nodes == 8 and drafter.max_depth == 3
    assert tree.parent[0].tolist() == [0, 0, 0, 1, 1, 2, 3, 5]
    assert tree.depth[0].tolist() == [0, 1, 1, 2, 2, 2, 3, 3]
    # Below 1: 2 and 3; below 2: 4 and 5; 3 is not known, nor is anything below its hole.
    assert tree.valid[0].tolist() == [True] * 5 + [False, True, False]
    assert tree.tokens[0, tree.valid[0]].tolist() == [1, 2, 3, 4, 5, 1]
    assert tree.valid[1].tolist() == [True] * 5 + [False, True, False]
    assert tree.tokens[1, tree.valid[1]].tolist() == [2, 4, 5, 1, 2, 2]
    assert tree.valid[2].tolist() == [True] + [False] * 7, "an unknown token is no token 0"
    path = likely(2, 3).log_softmax(-1)[2] + likely(4, 5).log_softmax(-1)[5]
    assert torch.allclose(tree.log_q[0, 4], path)
    assert draft(drafter, levels=1).n_nodes == 3 and draft(drafter, levels=0).n_nodes == 1


@pytest.mark.parametrize("children", [DEFAULT_TREE, PAPER_TREE, "1/1/1", "3/021/1"])
@pytest.mark.parametrize("noisy", [False, True])
def test_structure(children, noisy):
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(V, (40, 12), generator=random).tolist()
    warm = count_bigrams([row for row in rows if 3 not in row], V, 8)
    drafter = TokenRecycling(V, children, warm=warm)
    noise = torch.randn(4, 8, V, generator=random, dtype=torch.float64) if noisy else None
    drafter.begin(known([[row[0], row[1]] for row in rows[:3]] + [[1, 3]], [1] * 4, noise=noise))
    tree = draft(drafter)
    counts = parse_children(children)
    assert tree.n_nodes == drafter.max_nodes == 1 + sum(map(sum, counts))
    seen = ancestors(tree, drafter.max_depth)
    for b in range(4):
        for node in range(1, tree.n_nodes):
            path = path_to(tree, b, node)
            assert path == sorted(path) and len(path) == 1 + int(tree.depth[b, node])
            assert seen[b, node].nonzero()[:, 0].tolist() == path
            parent, valid = path[-2], bool(tree.valid[b, node])
            assert not valid or (
                bool(tree.valid[b, parent])
                and int(tree.tokens[b, node])
                in matrix(drafter).get(int(tree.tokens[b, parent]), ())
                and tree.log_q[b, node] <= tree.log_q[b, parent]
            )
        family = list(zip(tree.parent[b].tolist(), tree.tokens[b].tolist(), strict=True))
        family = [pair for pair, valid in zip(family, tree.valid[b].tolist(), strict=True) if valid]
        assert len(family[1:]) == len(set(family[1:])), "siblings differ"
    assert not tree.valid[3, 1:].any() and tree.valid[:3, 1].all()
    assert not tree.log_q.isnan().any()


def test_named_trees():
    assert TokenRecycling(V).max_nodes == 25 and TokenRecycling(V).max_depth == 5
    counts = [sum(level) for level in parse_children(PAPER_TREE)]
    assert counts == [8, 21, 25, 15, 8, 3] and sum(counts) == 80


def test_noise_orders_successors_as_the_target_will():
    noise = torch.zeros(1, 3, V, dtype=torch.float64)
    noise[0, 0, 3] = 9.0  # for the first token behind the root
    noise[0, 1, 5] = 9.0  # for the second
    drafter = taught({1: (2, 3), 3: (4, 5), 2: (6, 7)})
    for seeded, expected in ((True, [1, 3, 2, 5, 4, 6]), (False, [1, 2, 3, 6, 7, 4])):
        drafter.seeded = seeded
        drafter.begin(known([[7, 1]], [1], noise=noise.clone()))
        assert draft(drafter).tokens[0].tolist() == expected
        assert torch.equal(drafter.seqs.noise, noise), "the noise is not the drafter's to write"


BAD = {
    "no tree": (dict(children="3/a"), "'3/a' is no tree"),
    "an empty level": (dict(children="3//1"), "is no tree"),
    "too many parents": (dict(children="2/111"), "level 2 .* 3 nodes, the level above has 2"),
    "no child": (dict(children="2/00"), r"level 2 .*not all 0"),
    "more than k": (dict(children="3", k=2), "level 1 .* 0 to k = 2"),
    "no level": (dict(children=()), "needs a level"),
    "k": (dict(k=0), "k = 0"),
    "another V": (dict(warm=count_bigrams([[1, 2]], 4, 2)), "of 4 tokens, the target has 10"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_refused(what):
    options, message = BAD[what]
    with pytest.raises(InputError, match=message):
        small(**options)


# ---------------------------------------------------------------- in the loop

CONFIGS = {"greedy": settings(), "t1": settings(do_sample=True, temperature=1.0)}


@pytest.mark.parametrize("all_nodes", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_exact_and_better_when_hot(name, all_nodes):
    """Random weights say something else after every prefix, so what rejected nodes teach pushes out
    what a second run could use: only the accepted path's words must make it better here."""
    target, rows, config = tiny("llama"), prompts(), CONFIGS[name]
    want, finish = alone(target, rows, config)
    drafter = TokenRecycling(VOCAB, all_nodes=all_nodes)
    taus = []
    for _ in range(2):
        recorder = Recorder(drafter)
        got = speculative(target, rows, config, seeds=range(len(rows)), drafter=recorder)
        assert (got.tokens, got.finish) == (want, finish)
        assert got.stats.emitted == [len(w) - 1 for w in want]
        taus.append(got.stats.tokens_per_step)
    assert sum(got.stats.accepted_at) > 0 and (all_nodes or taus[1] > max(1.2, taus[0]))
    cold = TokenRecycling(VOCAB, reset=True, all_nodes=all_nodes)
    for _ in range(2):
        got = speculative(target, rows, config, seeds=range(len(rows)), drafter=cold)
        assert got.tokens == want and got.stats.tokens_per_step == taus[0]


def test_warm_start_pays_at_once():
    target, rows, config = tiny("llama"), prompts(), CONFIGS["greedy"]
    want, _ = alone(target, rows, config)
    table = count_bigrams([r + w for r, w in zip(rows, want, strict=True)], VOCAB, 8)
    taus = []
    for warm in (None, table):
        drafter = TokenRecycling(VOCAB, warm=warm, fill_prompt=False)
        got = speculative(target, rows, config, drafter=drafter)
        assert got.tokens == want
        taus.append(got.stats.tokens_per_step)
    assert taus[1] > taus[0]


def test_what_the_loop_teaches_is_what_the_model_says():
    """Every known row is the top k of the logits after that token, where it last stood.

    What rejected nodes teach is the model's word as well, on text that never was: see below.
    """
    target, row = tiny("llama"), prompts()[2]
    config = settings(eos_token_id=-1)
    drafter = TokenRecycling(VOCAB, fill_prompt=False, all_nodes=False)
    text = row + speculative(target, [row], config, drafter=drafter).tokens[0]
    recorder = Recorder(drafter)
    speculative(target, [row], config, drafter=recorder)
    # A row's last step is not reported: the row is not live any more.
    read = len(row) + sum(int(told.count[0]) for _, told, _, _ in recorder.steps)
    logits = target.project(target.states(torch.tensor([text])))[0]
    expected = {}
    for place in range(len(row) - 1, read):
        expected[text[place]] = logits[place].topk(8).indices.tolist()
    known_now = matrix(drafter)
    assert {token: known_now[token] for token in expected} == expected
    assert len(expected) > 5


def test_the_loop_teaches_every_node_of_its_trees():
    """Node by node, in the order of the steps, with the target run anew on each node's path."""
    target, rows = tiny("llama"), prompts()[:2]
    drafter = TokenRecycling(VOCAB, fill_prompt=False)
    recorder = Recorder(drafter)
    made = speculative(target, rows, settings(eos_token_id=-1), drafter=recorder).tokens
    texts = [row + text for row, text in zip(rows, made, strict=True)]
    expected, rejected = {}, 0
    for prompt in rows:
        out = target.project(target.states(torch.tensor([prompt])))[0, -1]
        expected[prompt[-1]] = out.topk(8).indices.tolist()
    for tree, told, lengths, _ in recorder.steps:
        order = [(int(tree.depth[row, node]), row, node) for row in range(2)
                 for node in range(tree.n_nodes)
                 if int(told.count[row]) and bool(tree.valid[row, node])]  # fmt: skip
        for _, row, node in sorted(order):
            path = tree.tokens[row, path_to(tree, row, node)].tolist()
            text = torch.tensor([texts[row][: lengths[row] - 1] + path])
            out = target.project(target.states(text))[0, -1]
            expected[path[-1]] = out.topk(8).indices.tolist()
            rejected += path[1:] != texts[row][lengths[row] : lengths[row] + len(path) - 1]
    assert matrix(drafter) == expected and rejected > 20
