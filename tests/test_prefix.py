"""Heads that read the prefix: the layer's formula, its cache, and what drafts begin from."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from models import alone, prompts, settings, shared, tiny
from torch.nn import functional as F

from redrafter.config import LossConfig, StatesConfig, TreeConfig
from redrafter.contracts import Truth
from redrafter.costs import CostMeter
from redrafter.data.rows import Rows, offsets_of, starts_per_row
from redrafter.data.states import StateMaker
from redrafter.decode.speculative import speculative
from redrafter.drafters import context as drafting_context
from redrafter.drafters.build import Resources, build_drafter
from redrafter.drafters.compose import Wrapped
from redrafter.drafters.head import HeadDrafter
from redrafter.heads import prefix as layers
from redrafter.heads.load import head_class
from redrafter.records.make import walk_texts
from redrafter.targets.cache import RowCache
from redrafter.training import feed as feeds
from redrafter.training.feed import Feed
from redrafter.training.step import batch_loss, contexts_of, total_weight

KINDS = {"recurrent": {}, "hydra": {"num_heads": 3}}
K = 3


def make_head(target, kind="recurrent", scale=1.0):
    """In float64, every weight moved from where it begins."""
    torch.manual_seed(3)
    head = head_class(kind).for_target(target, prefix="attention", **KINDS[kind]).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(torch.randn_like(p) * scale / p.shape[-1] ** 0.5)
    return head.eval()


# ------------------------------------------------------------------------------------- the layer


def normed(x, weight):
    return x / torch.sqrt((x * x).mean() + 1e-6) * weight


def turned(x, position):
    """Rotary: the pairs (x_i, x_{i + d/2}) by the angle position * 10000^(-2 i / d)."""
    half = len(x) // 2
    angle = position * 10000.0 ** (-2 * torch.arange(half, dtype=torch.float64) / len(x))
    pairs = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pairs.real, pairs.imag))


def written_out(head, hidden, embedded):
    """c at every position of one row, position by position. hidden, embedded: (T, H)"""
    w, n = dict(head.prefix_layer.named_parameters()), head.config.prefix_heads
    stream, keys, values, found = [], [], [], []
    for t in range(len(hidden)):
        x = hidden[t] + w["token_in.weight"] @ normed(embedded[t], w["token_norm.weight"])
        q, k, v = (w["qkv.weight"] @ normed(x, w["attention_norm.weight"])).view(3, n, -1)
        keys.append([turned(k[i], t) for i in range(n)])
        values.append(v)
        stream.append(x)
        mixed = []
        for i in range(n):
            scores = [turned(q[i], t) @ key[i] / k.shape[-1] ** 0.5 for key in keys]
            weights = torch.stack(scores).softmax(0)
            mixed.append(sum(a * value[i] for a, value in zip(weights, values, strict=True)))
        y = x + w["attention_out.weight"] @ torch.cat(mixed)
        gate, up = (w["gate_up.weight"] @ normed(y, w["mlp_norm.weight"])).chunk(2)
        found.append(y + w["down.weight"] @ (F.silu(gate) * up))
    return torch.stack(found)


def random_rows(target, n_rows, n, seed=1):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_rows, n, target.hidden_size, generator=g, dtype=torch.float64)
    return hidden, torch.randint(target.vocab_size, (n_rows, n), generator=g)


@torch.no_grad()
def test_the_layer_is_the_written_formula():
    target = tiny("llama")
    torch.manual_seed(3)
    cls = head_class("recurrent")
    head = cls.for_target(target, prefix="attention", prefix_heads=4).double()
    hidden, tokens = random_rows(target, 2, 6)
    assert torch.equal(head.contexts(target, hidden, tokens), hidden), "a new head's c is h_t"
    for p in head.prefix_layer.parameters():
        p.add_(torch.randn_like(p) / p.shape[-1] ** 0.5)
    found = head.contexts(target, hidden, tokens)
    for row in range(2):
        wanted = written_out(head, hidden[row], target.embed(tokens[row]))
        torch.testing.assert_close(found[row], wanted, atol=1e-11, rtol=1e-11)
    h = target.hidden_size
    assert sum(p.numel() for p in head.prefix_layer.parameters()) == 11 * h * h + 3 * h


@pytest.mark.parametrize("changed", [0, 3, 5])
@torch.no_grad()
def test_a_position_reads_those_before_it_and_the_token_that_follows(changed):
    target = tiny("llama")
    head = make_head(target)
    hidden, tokens = random_rows(target, 1, 6)
    before = head.contexts(target, hidden, tokens)
    tokens[0, changed] = (tokens[0, changed] + 1) % target.vocab_size
    moved = (head.contexts(target, hidden, tokens) - before).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [t >= changed for t in range(6)]


@torch.no_grad()
def test_by_pieces_it_is_what_it_is_at_once():
    """Ragged rows, whose steps bring different numbers of positions and nan in their padding."""
    target = tiny("llama")
    head = make_head(target)
    hidden, tokens = random_rows(target, 3, 16)
    whole = head.contexts(target, hidden, tokens)
    cache, lengths = RowCache(1, 3, 20, hidden.device), [0, 0, 0]
    for pieces in ([5, 2, 7], [1, 4, 0], [3, 3, 3], [1, 1, 1], [4, 0, 2]):
        n = max(pieces)
        part = torch.full((3, n, target.hidden_size), float("nan"), dtype=torch.float64)
        read, real = torch.zeros(3, n, dtype=torch.long), torch.zeros(3, n, dtype=torch.bool)
        for row, (at, count) in enumerate(zip(lengths, pieces, strict=True)):
            part[row, :count] = hidden[row, at : at + count]
            read[row, :count], real[row, :count] = tokens[row, at : at + count], True
        cache.prepare(n, ~real)
        found = head.contexts(target, part, read, cache)
        for row, (at, count) in enumerate(zip(lengths, pieces, strict=True)):
            wanted = whole[row, at : at + count]
            torch.testing.assert_close(found[row, :count], wanted, atol=1e-12, rtol=1e-12)
        lengths = [at + count for at, count in zip(lengths, pieces, strict=True)]
        cache.commit(lengths)


# -------------------------------------------------------------------------------------- drafting

NAMES = ("multi:source=head:children=[3,2]:how=top", "select(mix(head:2x3,lookup:3x1),none)",
         "head:3x3")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_plain_decoding(kind):
    """In float64, alone and in a ragged batch of four, greedily and for a seed."""
    target, rows, seeds = tiny("llama"), prompts(), [3, 4, 5, 6]
    resources = Resources(head=make_head(target, kind, scale=0.3))
    accepted = 0
    for options in ({}, dict(do_sample=True, temperature=1.3, top_k=9)):
        config = settings(**options)
        wanted, _ = alone(target, rows, config, seeds=seeds)
        for name in NAMES if kind == "recurrent" else NAMES[-1:]:
            drafter = build_drafter(name, target, resources)
            made = speculative(target, rows, config, seeds=seeds, drafter=drafter)
            assert made.tokens == wanted, name
            accepted += sum(made.stats.accepted_at)
        one = speculative(target, rows[:1], config, seeds=seeds[0], drafter=drafter)
        assert one.tokens == wanted[:1]
    assert accepted > 0, "nothing was accepted: equality says little"


class Watching(Wrapped):
    """Keeps c of every live row whenever a truth was observed: (row, tokens known, c)."""

    def begin(self, seqs):
        super().begin(seqs)
        self.seen = []

    def observe(self, truth: Truth):
        super().observe(truth)
        for row, live in enumerate(self.seqs.live.tolist()):
            if live:
                self.seen.append((row, int(self.seqs.length[row]), self.inner.context[row, 0]))


@pytest.mark.parametrize("n_rows", [1, 4])
@torch.no_grad()
def test_drafts_begin_from_what_the_whole_row_gives(n_rows):
    """In steps that accept some, all or nothing, with padded prompts and rows that end early."""
    target, rows = tiny("llama"), prompts()[:n_rows]
    trained = overfitted(target)
    drafter = Watching(HeadDrafter(trained, target, TreeConfig(2, K)))
    width = max(map(len, rows))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    made = speculative(target, padded, settings(), drafter=drafter, attention_mask=mask)
    assert sum(made.stats.accepted_at) > 0
    assert n_rows == 1 or len({len(text) for text in made.tokens}) > 1, "all ended together"
    for row, known, c in drafter.seen:
        text = torch.tensor([(rows[row] + made.tokens[row])[:known]])
        hidden = target.states(text[:, :-1])
        whole = trained.contexts(target, hidden, text[:, 1:])
        torch.testing.assert_close(c, whole[0, -1], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_a_walk_over_known_texts_gives_the_same():
    """Where lookahead records are made: one token of every row at a time, and no cache."""
    target, rows = tiny("llama"), prompts()[:2]
    head = make_head(target)
    drafter = Watching(HeadDrafter(head, target, TreeConfig(1, 2)))
    walk_texts(target, drafter, rows, settings(), [0, 0])
    answers, _ = alone(target, rows, settings())
    assert len(drafter.seen) > 10
    for row, known, c in drafter.seen:
        text = torch.tensor([(rows[row] + answers[row])[:known]])
        whole = head.contexts(target, target.states(text[:, :-1]), text[:, 1:])
        torch.testing.assert_close(c, whole[0, -1], atol=1e-9, rtol=1e-9)


def test_a_price_counts_what_a_step_reads(monkeypatch):
    """As many positions as a step has depths, behind a context; in `rest`, not in the levels."""
    target, read = tiny("llama"), []
    drafter = HeadDrafter(make_head(target), target, TreeConfig(2, K))

    def contexts(self, target, hidden, tokens, cache):
        read.append((hidden.shape[1], cache.width))
        return hidden

    monkeypatch.setattr(type(drafter.head), "contexts", contexts)
    CostMeter(target, new_tokens=[1], contexts=[9], batches=[2], drafters={"it": drafter}).round()
    assert read == [(9, 9), (K + 1, 9 - 1 + K + 1)]


# --------------------------------------------------- what training counts, and what decoding counts


class Texts:
    """A part of a feed: the target's own greedy answers, whose states are made as a store's are."""

    def __init__(self, target, rows, answers):
        lengths = torch.tensor([len(r) + len(a) for r, a in zip(rows, answers, strict=True)])
        learned = [[False] * len(r) + [True] * len(a) for r, a in zip(rows, answers, strict=True)]
        tokens = [r + a for r, a in zip(rows, answers, strict=True)]
        supervised = torch.tensor(list(itertools.chain(*learned)))
        known = Rows(
            torch.tensor(list(itertools.chain(*tokens))), supervised, offsets_of(lengths)
        )
        self.n_rows, self.starts = len(rows), starts_per_row(supervised, lengths)
        self.made = StateMaker(target, StatesConfig()).columns(known)
        self.made |= {"tokens": known.tokens, "supervised": supervised}
        self.offsets = known.offsets

    def load(self, rows, place):
        at = [torch.arange(self.offsets[r], self.offsets[r + 1]) for r in rows.tolist()]
        columns = {name: c[torch.cat(at)] for name, c in self.made.items()}
        offsets = offsets_of(torch.tensor([len(a) for a in at]))
        return {**columns, "offsets": offsets, "there": torch.ones(len(rows), dtype=torch.bool)}


def greedy_feed(target, **options):
    """(prompts, length of the texts, a feed of them)"""
    rows = prompts((9, 3, 14, 8, 5, 11))
    config = settings(eos_token_id=-1)
    answers, _ = alone(target, rows, config)
    given = dict(positions=32, depth=K, seed=0, row_starts=8)
    return rows, config, Feed(target, [Texts(target, rows, answers)], **{**given, **options})


@shared
@torch.enable_grad()
def overfitted(target, row_starts=8, **context):
    """A head that knows these texts, so that its drafts are accepted to every depth. context: what
    makes its c; usually the layer over the row"""
    fields = dict(embedding_scale="rms", output="target", **context or {"prefix": "attention"})
    torch.manual_seed(0)
    head = head_class("recurrent").for_target(target, **fields).double().train()
    _, _, feed = greedy_feed(target, row_starts=row_starts)
    optimizer, loss = torch.optim.Adam(head.parameters(), lr=0.01), LossConfig(cross_entropy=1.0)
    for step in range(25):
        batch = feed.step(step)
        batch_loss(head, head, target, batch, loss, total_weight(batch, loss))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return head.eval()


@torch.no_grad()
def counts_of_training(head, target):
    """(drafted, accepted) by depth, had decoding drafted what training's forward pass says."""
    rows, config, feed = greedy_feed(target)
    (batch,) = feed.batches(10_000)
    features = head(contexts_of(head, target, batch), batch.tokens, target)
    hits = ((features @ head.vocab_matrix().T).argmax(-1) == batch.labels) & batch.mask
    right = hits.cumprod(1).sum(1).tolist()
    drafted, accepted, at = [0] * K, [0] * K, 0
    for _ in rows:
        n = config.max_new_tokens  # starts of a row: from the one that learns the first token on
        of_row, at = right[at : at + n], at + n
        known = 1  # tokens that are emitted; the prefill's own is the first root
        while known < n:
            count = of_row[known]
            for k in range(min(K, n - known)):
                drafted[k] += 1
                accepted[k] += k < count
            known += count + 1
    assert at == len(right)
    return drafted, accepted


def counts_of_decoding(head, target):
    rows, config, _ = greedy_feed(target)
    drafter = HeadDrafter(head, target, TreeConfig(1, K))
    stats = speculative(target, rows, config, drafter=drafter).stats
    return stats.drafted_at, stats.accepted_at


def test_decoding_accepts_what_training_counts():
    """Exactly, depth by depth, on the same greedy rows."""
    target = tiny("llama")
    head = overfitted(target)
    drafted, accepted = counts_of_training(head, target)
    assert (drafted, accepted) == counts_of_decoding(head, target)
    assert all(0 < a < d for d, a in zip(drafted, accepted, strict=True)), "nothing to compare"


def too_far(monkeypatch):
    """In training a position reads the token after the one that follows it."""
    rows_of = feeds.rows_of

    def shifted(columns, starts, dtype):
        return rows_of({**columns, "tokens": columns["tokens"].roll(-1)}, starts, dtype)

    monkeypatch.setattr(feeds, "rows_of", shifted)


def attends_too_far(monkeypatch):
    """In training a position attends to the one behind it."""

    def wider(q, k, v, is_causal=False, attn_mask=None):
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(1)
        return F.scaled_dot_product_attention(q, k, v, seen if is_causal else attn_mask)

    theirs = SimpleNamespace(scaled_dot_product_attention=wider, silu=F.silu)
    monkeypatch.setattr(layers, "F", theirs)


def one_late(monkeypatch):
    """A draft begins from the context one position before its own."""
    read = drafting_context.HeadContext._read

    def late(self, hidden, tokens, count):
        return read(self, hidden.roll(1, 1), tokens.roll(1, 1), count)

    monkeypatch.setattr(drafting_context.HeadContext, "_read", late)


@pytest.mark.parametrize("fault", [too_far, attends_too_far, one_late])
def test_that_comparison_sees(fault, monkeypatch):
    """The texts stay right whatever the layer reads: only these counts tell."""
    target = tiny("llama")
    head = overfitted(target)
    rows, config, _ = greedy_feed(target)
    wanted, _ = alone(target, rows, config)
    counts = [counts_of_training(head, target)] if fault is one_late else []
    if fault is not one_late:
        counts.append(counts_of_decoding(head, target))
    fault(monkeypatch)
    drafter = HeadDrafter(head, target, TreeConfig(1, K))
    assert speculative(target, rows, config, drafter=drafter).tokens == wanted
    other = counts_of_decoding if fault is one_late else counts_of_training
    assert other(head, target) != counts[0]
