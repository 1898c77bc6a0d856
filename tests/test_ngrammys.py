"""The N-Grammys: rows by hand, the tree they make, and what they change in the text: nothing."""

import functools

import pytest
import torch
from models import EOS, FAMILIES, NEW, VOCAB, Recorder, alone, endless, prompts, settings, tiny

from redrafter.contracts import InputError, RowState, Truth
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.decode.tree import BUCKETS
from redrafter.drafters.bigram import BigramTable, count_bigrams
from redrafter.drafters.lookup import PromptLookup
from redrafter.drafters.ngrammys import BIGRAM, CONTEXT, UNIGRAM, ContextIndex, NGrammys, merge
from redrafter.drafters.recycling import TokenRecycling
from redrafter.evaluation.rows import decode_rows
from redrafter.evaluation.walk import walk

NINF = float("-inf")


def table_of(successors: dict[int, list[int]], vocab=10, width=3, unigram=None) -> BigramTable:
    """Of the r-th successor the probability 2^-(r+1)."""
    tokens = torch.zeros(vocab, width, dtype=torch.long)
    log_p = torch.full((vocab, width), NINF)
    for token, after in successors.items():
        tokens[token, : len(after)] = torch.tensor(after)
        log_p[token, : len(after)] = torch.tensor([0.5 ** (r + 1) for r in range(len(after))]).log()
    return BigramTable(tokens, log_p, None if unigram is None else torch.tensor(unigram))


# After 1: 2, 3, 4. After 2: 5, ... and 5 is followed by nothing that is known.
HAND = {1: [2, 3, 4], 2: [5, 6], 3: [1], 4: [4], 6: [7, 8, 9], 7: [6], 8: [1], 9: [9]}


def known(texts, noise=None, temperature=1.0) -> RowState:
    width = max(map(len, texts)) + 8
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    length = torch.tensor([len(text) for text in texts])
    live = torch.ones_like(length, dtype=torch.bool)
    return RowState(ids, length, length.clone(), live, noise=noise, temperature=temperature)


def draft(drafter, texts, levels=None, **more):
    """Rows as lists (k of them, None where there is none), and the tree."""
    drafter.begin(known(texts, **more))
    drafter.start()
    for level in range(1, (drafter.w if levels is None else levels) + 1):
        drafter.extend(level)
    tokens, valid = drafter.rows()
    assert tokens.shape == valid.shape == (len(texts), drafter.k, drafter.w)
    rows = [
        [row[keep].tolist() or None for row, keep in zip(*one, strict=True)]
        for one in zip(tokens, valid, strict=True)
    ]
    return rows, drafter.tree()


def paths(tree, row) -> set[tuple[int, ...]]:
    """Token paths of a tree's valid leaves."""
    found, inner = {0: ()}, set()
    for node in range(1, tree.n_nodes):
        if tree.valid[row, node]:
            up = int(tree.parent[row, node])
            assert up < node and tree.depth[row, node] == tree.depth[row, up] + 1
            found[node] = found[up] + (int(tree.tokens[row, node]),)
            inner.add(up)
    return {path for node, path in found.items() if node not in inner}


# ---------------------------------------------------------------- rows


def test_context_rows_by_hand():
    """The query is the last 1: behind it came 2 3 twice, 4 5 and then, more recently, 6 2."""
    text = [1, 2, 3, 1, 4, 5, 1, 2, 3, 1, 6, 2, 9, 1]
    drafter = NGrammys(table_of({}), k=4, w=2, spill=())
    (rows,), tree = draft(drafter, [text])
    assert rows == [[2, 3], [6, 2], [4, 5], None]
    assert paths(tree, 0) == {(2, 3), (6, 2), (4, 5)}
    (rows,), _ = draft(NGrammys(table_of({}), k=2, w=2, spill=()), [text])
    assert rows == [[2, 3], [6, 2]]
    # With q = 2 the query is (9 1), which is new; with (3 1) there are two places.
    assert draft(NGrammys(table_of({}), k=2, w=2, query=2, spill=()), [text])[0] == [[None] * 2]
    (rows,), _ = draft(NGrammys(table_of({}), k=3, w=2, query=2, spill=()), [text + [2, 3, 1]])
    assert rows == [[6, 2], [4, 5], None], "of equally frequent ones the most recent first"


def test_a_match_does_not_run_past_the_end():
    (rows,), tree = draft(NGrammys(table_of({}), k=3, w=4, spill=()), [[7, 1, 8, 1]])
    assert rows == [[8, 1], None, None]
    assert tree.n_nodes == 3
    (rows,), _ = draft(NGrammys(table_of({}), k=3, w=3, spill=(), dedupe="first"), [[5, 5, 5]])
    assert rows == [[5], None, None], "5 and (5 5): the first token decides"
    by_row = NGrammys(table_of({}), k=3, w=3, spill=())
    (rows,), tree = draft(by_row, [[5, 5, 5]])
    assert rows == [[5], [5, 5], None] and paths(tree, 0) == {(5, 5)}
    assert draft(by_row, [[5]])[0] == [[None] * 3] and draft(by_row, [[5]])[1].n_nodes == 1


def test_bigram_rows_by_hand():
    drafter = NGrammys(table_of(HAND), k=4, w=3, allocation=(0, 4, 0), spill=())
    rows, tree = draft(drafter, [[1], [6], [5]])
    # 5 has no successor: the row 2 5 ends there, and nothing follows a last 5.
    assert rows[0] == [[2, 5], [3, 1, 2], [4, 4, 4], None]
    assert rows[1] == [[7, 6, 7], [8, 1, 2], [9, 9, 9], None]
    assert rows[2] == [None] * 4
    assert tree.n_nodes == 13 and tree.n_nodes in BUCKETS
    assert paths(tree, 2) == {()}
    assert tree.tokens[:, 0].tolist() == [1, 6, 5]


def test_context_comes_before_bigram_and_no_first_token_twice():
    table = table_of(HAND, unigram=[2, 9, 8, 7, 0])
    text = [1, 3, 9, 1, 8, 0, 1]
    # Context: 8 0, 3 9. Bigram: 2 5, (3 begins a row), 4 4. Unigram: (2 does), 9 9, (8), 7 6, 0.
    (rows,), tree = draft(NGrammys(table, k=7, w=2, dedupe="first"), [text])
    assert rows == [[8, 0], [3, 9], [2, 5], [4, 4], [9, 9], [7, 6], [0]]
    assert paths(tree, 0) == {tuple(row) for row in rows}
    (rows,), _ = draft(NGrammys(table, k=7, w=2), [text])
    assert rows == [[8, 0], [3, 9], [2, 5], [3, 1], [4, 4], [9, 9], [8, 1]]
    # Shares: what context cannot fill goes to the sources in the order of spill.
    (rows,), _ = draft(NGrammys(table, k=5, w=1, allocation=(3, 1, 0)), [text])
    assert rows == [[8], [3], [2], [4], [9]]
    (rows,), _ = draft(NGrammys(table, k=5, w=1, allocation=(1, 1, 1)), [text])
    assert rows == [[8], [2], [9], [3], [4]]
    (rows,), _ = draft(NGrammys(table, k=4, w=1, allocation=(1, 1, 0), spill=("unigram",)), [text])
    assert rows == [[8], [2], [9], [7]]
    (rows,), _ = draft(NGrammys(table, k=4, w=1, allocation=(0, 0, 4), spill=()), [text])
    assert rows == [[2], [9], [8], [7]]
    drafter = NGrammys(table_of(HAND), k=3, w=1, allocation=(0, 0, 0), spill=("bigram", "context"))
    assert draft(drafter, [text])[0] == [[[2], [3], [4]]]


def test_features_and_levels():
    drafter = NGrammys(table_of(HAND, unigram=[9]), k=4, w=2)
    drafter.begin(known([[1, 3, 1, 3, 1], [5], [1]]))
    drafter.start()
    one = drafter.features()  # of the level to come
    drafter.extend(1)
    two = drafter.features()
    drafter.extend(2)
    # 3 1 twice, 2 5, 4 4, 9 9; 9 9; 2 5, 3 1, 4 4, 9 9.
    assert one.tolist() == [[CONTEXT, 2, 4], [UNIGRAM, 0, 1], [BIGRAM, 0, 4]]
    assert two.tolist() == one.tolist()
    assert drafter.features().tolist() == [[0, 0, 0]] * 3, "nothing reaches a third level"
    assert len(drafter.feature_names) == one.shape[1]
    full = drafter.tree()
    drafter.level = 1
    assert drafter.tree().n_nodes == 5 < full.n_nodes and drafter.tree().depth.max() == 1
    assert int(drafter.rows()[1].sum(-1).max()) == 1
    drafter.seqs.live[0] = False
    drafter.start()
    assert drafter.features()[0].tolist() == [0, 0, 0], "a finished row drafts nothing"


def brute_candidates(text, q, w):
    """Continuations by rescanning the text."""
    query, found = text[-q:], {}
    for place in range(q, len(text)):
        if text[place - q : place] == query:
            row = tuple(text[place : place + w])
            found[row] = found.get(row, (0, 0))[0] + 1, place
    best = sorted(found.items(), key=lambda item: item[1], reverse=True)
    return [(row, n) for row, (n, _) in best]


@pytest.mark.parametrize(("q", "w"), [(1, 1), (1, 3), (2, 2), (3, 5)])
def test_index_is_a_rescan(q, w):
    random = torch.Generator().manual_seed(0)
    most = 0
    for vocab in (1, 2, 4):
        text = torch.randint(vocab, (60,), generator=random).tolist()
        index = ContextIndex(q, w)
        for n, token in enumerate(text, start=1):
            index.extend(token)
            assert index.candidates() == brute_candidates(text[:n], q, w) * (n >= q)
            most = max(most, *(n for _, n in index.candidates()), 0)
    assert most > 5, "frequent continuations occurred"


def test_trie_equals_rows():
    random = torch.Generator().manual_seed(0)
    for _ in range(50):
        rows = torch.randint(3, (6, 4), generator=random).tolist()
        rows = [row[: 1 + i % 4] for i, row in enumerate(rows)]
        tokens, parent, depth = merge(rows)
        found = {0: ()}
        for node in range(1, len(tokens)):
            assert parent[node] < node and depth[node] == depth[parent[node]] + 1
            found[node] = found[parent[node]] + (tokens[node],)
        prefixes = {tuple(row[:n]) for row in rows for n in range(len(row) + 1)}
        assert sorted(found.values()) == sorted(prefixes), "every prefix once, and no other"
        assert tokens[1 : 1 + len(rows[0])] == rows[0]


@pytest.mark.parametrize("temperature", [0.4, 2.5])
def test_seeded_order_is_the_targets(temperature):
    """The first guess is the target's choice among those tokens wherever p is the table's."""
    table = table_of({t: [(t + 1) % 10, (t + 3) % 10, (t + 4) % 10] for t in range(10)})
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 10, generator=random, dtype=torch.float64) * 2
    given = {"noise": noise, "temperature": temperature}
    rows, _ = draft(NGrammys(table, k=3, w=3, allocation=(0, 3, 0)), [[1], [4]], **given)
    changed = 0
    for b, last in enumerate((1, 4)):

        def score(token, depth, b=b):
            return [
                float(lp) / temperature + float(noise[b, depth, t])
                for t, lp in zip(table.tokens[token], table.log_p[token], strict=True)
            ]  # fmt: skip

        order = sorted(range(3), key=lambda r: -score(last, 0)[r])
        assert [row[0] for row in rows[b]] == [int(table.tokens[last, r]) for r in order]
        for row in rows[b]:
            for depth in (1, 2):
                values = score(row[depth - 1], depth)
                best = values.index(max(values))
                assert row[depth] == int(table.tokens[row[depth - 1], best])
                changed += best > 0
    assert changed
    plain_rows, _ = draft(
        NGrammys(table, k=3, w=3, allocation=(0, 3, 0), seeded=False), [[1], [4]], **given
    )
    assert plain_rows[0] == [[2, 3, 4], [4, 5, 6], [5, 6, 7]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": 0}, "k 0"), ({"w": 0}, "w 0"), ({"query": 0}, "query 0"),
        ({"allocation": (3, 3, 0), "k": 5}, "at most k = 5"), ({"allocation": (1, -1, 1)}, "below"),
        ({"allocation": (1, 1)}, "context, bigram, unigram"), ({"spill": ("lookup",)}, "lookup"),
        ({"spill": ("bigram", "bigram")}, "each once"), ({"dedupe": "x"}, "'x'"),
        ({"allocation": (0, 0, 0), "spill": ()}, "no source"),
        ({"allocation": (1, 0, 1)}, "needs a unigram"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(changes, said):
    with pytest.raises(InputError, match=f"ngrammys: .*{said}"):
        NGrammys(table_of(HAND), **changes)


# ---------------------------------------------------------------- in the loop


@functools.cache
def setting(family: str, sampled: bool):
    """Ragged prompts, the texts alone, and a table counted on what the target says."""
    target, rows = tiny(family), prompts()
    config = settings(do_sample=sampled, temperature=1.3)
    counted = count_bigrams(endless(target, rows, config), VOCAB, 4)
    table = BigramTable(counted.tokens, counted.log_p, torch.arange(5, 11))
    return target, rows, config, alone(target, rows, config), table


OPTIONS = {
    "mixed": dict(k=4, w=4),
    "one": dict(k=1, w=1),
    "all": dict(k=6, w=3, allocation=(2, 2, 2), dedupe="first", query=2, seeded=False),
}


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_drafting_changes_nothing(family, sampled):
    target, rows, config, (want, finish), table = setting(family, sampled)
    assert len(set(map(len, want))) > 1 or "eos" not in finish
    accepted = 0
    # To a drafter that reads tokens alone all families are one.
    for options in OPTIONS.values() if family == "llama" else [OPTIONS["all"]]:
        drafter = NGrammys(table, **options)
        recorder = Recorder(drafter)
        made = speculative(target, rows, config, seeds=range(len(rows)), drafter=recorder)
        assert (made.tokens, made.finish) == (want, finish)
        accepted += sum(made.stats.accepted_at)
        sizes = {tree.n_nodes for tree, *_ in recorder.steps}
        assert sizes <= {*BUCKETS, drafter.max_nodes} and max(sizes) <= drafter.max_nodes
        if family != "llama":
            continue
        # A row's draft depends neither on its neighbours nor on the generation before.
        single = [
            speculative(target, [row], config, seeds=[i], drafter=drafter).stats.accepted_at
            for i, row in enumerate(rows)
        ]
        assert made.stats.accepted_at == [sum(level) for level in zip(*single, strict=True)]
    assert accepted > 10


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "deepseek_v3"])
def test_rows_are_the_tree(family):
    """k rows by the paper's own verification: same text, steps and accepted depths."""
    target, rows, config, (want, finish), table = setting(family, False)
    for options in OPTIONS.values():
        drafter = NGrammys(table, **options)
        for row, text, why in zip(rows, want, finish, strict=True):
            made = decode_rows(target, row, drafter, NEW, EOS)
            tree = speculative(target, [row], config, drafter=drafter)
            assert made.tokens == tree.tokens == [text] and made.finish == [why]
            for count in ("steps", "emitted", "drafted_at", "accepted_at", "forwards"):
                assert getattr(made.stats, count) == getattr(tree.stats, count), count
            assert made.stats.nodes_verified >= tree.stats.nodes_verified


def test_rows_at_the_end_of_the_context():
    target, row = tiny("gpt2"), prompts((50,))[0]
    config = settings(max_new_tokens=40, eos_token_id=-1)
    (want,), _ = alone(target, [row], config)
    drafter = NGrammys(count_bigrams([row + want], VOCAB, 3), k=3, w=6)
    assert len(want) == 14, "the context ends the text"
    assert decode_rows(target, row, drafter, 40, -1).tokens == [want]


@pytest.mark.parametrize("name", [*OPTIONS, "lookup"])
def test_walking_a_known_text_counts_what_decoding_does(name):
    target, rows, config, (want, finish), table = setting("llama", False)
    assert {"eos", "length"} <= set(finish)
    drafter = PromptLookup(5) if name == "lookup" else NGrammys(table, **OPTIONS[name])
    walked = walk(drafter, rows, want, NEW)
    single = [speculative(target, [row], config, drafter=drafter).stats for row in rows]
    assert walked.steps == [one.steps[0] for one in single]
    assert walked.emitted == [one.emitted[0] for one in single]
    assert walked.forwards == sum(one.forwards for one in single)
    assert walked.nodes_verified == sum(one.nodes_verified for one in single)
    for level in ("drafted_at", "accepted_at"):
        per_row = zip(*(getattr(one, level) for one in single), strict=True)
        assert getattr(walked, level) == [sum(counts) for counts in per_row], level
    assert walked.tokens_per_step > 1 and walked.seconds["draft"] > 0


def test_walk_edges():
    drafter = NGrammys(table_of({1: [2], 2: [3]}), k=1, w=3, spill=("bigram",))
    assert walk(drafter, [[4], [4]], [[1], []]).steps == [0, 0]
    stats = walk(drafter, [[4]], [[1, 2, 3, 9]])
    assert (stats.steps, stats.emitted, stats.accepted_at) == ([1], [3], [1, 1, 0])
    with pytest.raises(InputError, match="needs the target's logits"):
        walk(TokenRecycling(VOCAB), [[1]], [[1, 2]])


class NoPeeking(PromptLookup):
    """Fails where the text ahead can be seen."""

    def start(self):
        super().start()
        assert not self.seqs.ids[0, int(self.seqs.length) :].any()

    def observe(self, truth: Truth):
        n = int(truth.count)
        assert (n > 0) == bool(self.seqs.live[0]), "as the loop tells a row that has ended"
        at = int(self.seqs.length)
        assert self.seqs.ids[0, at - n : at].tolist() == truth.tokens[0, :n].tolist()


def test_walk_hides_what_is_to_come():
    _, rows, _, (want, _), _ = setting("llama", False)
    assert walk(NoPeeking(3), rows, want).tokens_per_step >= 1


def test_more_rows_never_cost_a_token():
    """Tokens per step grow with k for fixed w: the rows of a smaller k come first."""
    target, rows, _, (want, _), table = setting("llama", False)
    taus = [
        walk(NGrammys(table, k=k, w=3), rows, want).tokens_per_step for k in (1, 2, 3, 5, 8, 12)
    ]
    assert taus == sorted(taus) and taus[0] < taus[-1]
    assert plain(target, [rows[0]], settings()).tokens == [want[0]]
