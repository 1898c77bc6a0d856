"""Drafting with the target minus some attentions: which ones, exactly plain text, and the cache."""

import copy
import functools

import pytest
import torch
from models import NEW, Recorder, alone, paired, prompts, settings, tiny
from transformers import DynamicCache

from redrafter.contracts import InputError
from redrafter.costs import CostMeter
from redrafter.decode.speculative import speculative
from redrafter.drafters.skipping import NO_DRAFT, LayerSkipping
from redrafter.lookahead.draft_exit import DraftExit
from redrafter.targets.cache import RowCache
from redrafter.targets.model import Target

DEPTH = 4
MODES = {"greedy": {}, "t0.7": dict(do_sample=True, temperature=0.7)}
FREE = dict(eos_token_id=-1)
DEEP = dict(num_hidden_layers=4)
SETS = {
    "one": dict(fixed=(1,)),
    "all": dict(fixed=(0, 1, 2, 3)),
    "prompt": dict(threshold=None, max_skipped=2),
    "step": dict(threshold=None, max_skipped=1, refresh="step", positions=1),
    "bar": dict(threshold=0.8, refresh="step", positions=2, protect=(1, 0)),
}


@functools.cache
def said(family: str, mode: str, deep: bool = False, **more):
    target = tiny(family, **(DEEP if deep else {}))
    return alone(target, prompts(), settings(**MODES[mode], **more))


# ------------------------------------------------------------------------------------- cosines


@torch.inference_mode()
def cosines(target: Target, text: list[int]) -> torch.Tensor:
    """(L, T): a forward over this text alone, attention's share caught by name."""
    streams, layers = [], target.backbone.layers
    handles = []
    for layer in layers:
        handles += [
            layer.register_forward_pre_hook(lambda _, args: streams.append(args[0])),
            layer.self_attn.o_proj.register_forward_hook(lambda *a: streams.append(a[2])),
        ]
    target.states(torch.tensor([text]))
    for handle in handles:
        handle.remove()
    pairs = zip(streams[::2], streams[1::2], strict=True)
    return torch.stack([torch.cosine_similarity(h, h + a, dim=-1)[0] for h, a in pairs])


@pytest.mark.parametrize("positions", [None, 2])
def test_cosines_of_the_prompt_leave_out_the_padding(positions):
    target, rows = tiny("llama", **DEEP), prompts()
    drafter = LayerSkipping(target, threshold=None, max_skipped=2, positions=positions)
    got = speculative(target, rows, settings(**FREE), drafter=drafter)
    own = [cosines(target, row)[:, -(positions or 0) :].mean(1) for row in rows]
    want = torch.stack(own).mean(0)
    assert got.extra["drafter"]["cosine"] == pytest.approx(want.tolist(), abs=1e-5)
    chosen = sorted(want.topk(2).indices.tolist())
    assert [s["layers"] for s in got.extra["drafter"]["sets"]] == [chosen]


@pytest.mark.parametrize("positions", [None, 1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_cosines_after_a_verification(mode, positions):
    """Of accepted nodes alone, at their own places, in rows of different lengths."""
    target, rows = tiny("llama", **DEEP), prompts()
    drafter = LayerSkipping(
        target, DEPTH, threshold=None, max_skipped=1, refresh="step", positions=positions
    )
    seen = Recorder(drafter)
    seen.watch = drafter.watch
    choices, choose = [], drafter._choose

    def noted():
        choose()
        live = [b for b, on in enumerate(drafter.seqs.live.tolist()) if on]
        choices.append((drafter.seqs.length.tolist(), live, drafter.cosine, drafter.skipped))

    drafter._choose = noted
    config = settings(**MODES[mode], **FREE)
    got = speculative(target, rows, config, seeds=range(4), drafter=seen)
    texts = [row + new for row, new in zip(rows, got.tokens, strict=True)]
    assert len(choices) == 1 + len(seen.steps)
    for lengths, live, cosine, skipped in choices[:-1]:
        read = [cosines(target, texts[b][: lengths[b] - 1]) for b in live]
        want = torch.stack([c[:, -(positions or 0) :].mean(1) for c in read]).mean(0)
        assert cosine == pytest.approx(want.tolist(), abs=1e-5)
        assert skipped == (int(want.argmax()),)
    counts = {n for _, truth, _, _ in seen.steps for n in truth.count.tolist()}
    assert len(counts - {0}) > 1


def test_unwatched_prompts_are_read_by_the_drafter():
    """A loop or a wrapper that does not know `watch`."""
    target, rows = tiny("llama", **DEEP), prompts()
    own, wrapped = (LayerSkipping(target, DEPTH, **SETS["prompt"]) for _ in range(2))
    speculative(target, rows, settings(), drafter=own)
    speculative(target, rows, settings(), drafter=Recorder(wrapped))
    assert own.cosine == pytest.approx(wrapped.cosine, abs=1e-6) and own.skipped == wrapped.skipped


class Foreign(Recorder):
    """Has another tree verified; what its nodes are, the drafter cannot know."""

    def __init__(self, inner):
        super().__init__(inner)
        self.watch = inner.watch

    def tree(self):
        self.last = copy.copy(super().tree())
        return self.last


def test_another_tree_is_not_learned_from():
    target = tiny("llama", **DEEP)
    drafter = LayerSkipping(target, DEPTH, **SETS["step"])
    got = speculative(target, prompts(), settings(**FREE), drafter=Foreign(drafter))
    assert got.tokens == alone(target, prompts(), settings(**FREE))[0]
    assert len(drafter.report()["sets"]) == 1  # more in test_the_sets_of_these_cases_vary


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        (dict(threshold=0.5), (1, 2, 3)),
        (dict(threshold=0.875), (2,)),
        (dict(threshold=0.8751), ()),
        (dict(threshold=0.5, max_skipped=2), (1, 2)),
        (dict(threshold=None, max_skipped=3, protect=(2, 0)), (2, 3)),
        (dict(threshold=0.5, protect=(0, 2)), (1,)),
        (dict(threshold=0.5, protect=(2, 2)), ()),
    ],
)
def test_the_rule(options, layers, monkeypatch):
    given = torch.tensor([0.125, 0.75, 0.875, 0.625])
    drafter = LayerSkipping(tiny("llama", **DEEP), **options)
    monkeypatch.setattr(
        drafter.skipping, "measure", lambda: Told(given[:, None, None].expand(4, 1, 3))
    )
    speculative(tiny("llama", **DEEP), prompts((3,)), settings(), drafter=drafter)
    assert drafter.skipped == layers


class Told:
    def __init__(self, values):
        self.values = values

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def stacked(self):
        return self.values


# -------------------------------------------------------------------------------- exact drafts


@pytest.mark.parametrize(("mode", "options", "exits"), paired(MODES, SETS, (False, True)))
def test_text_is_plain_decoding(mode, options, exits):
    target, rows = tiny("llama", **DEEP), prompts()
    drafter = LayerSkipping(target, DEPTH, **SETS[options])
    for part in (slice(0, None), slice(-1, None)):
        got = speculative(
            target, rows[part], settings(**MODES[mode]), seeds=range(4)[part], drafter=drafter,
            lookahead=DraftExit.of(drafter) if exits else None,
        )  # fmt: skip
        assert (got.tokens, got.finish) == tuple(x[part] for x in said("llama", mode, True))
        assert got.stats.drafted_at[0] > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["mistral", "phi3", "gpt2", "deepseek_v3"])
def test_text_of_other_families(family, mode):
    target = tiny(family)
    for options in (dict(fixed=(1,)), SETS["step"]):
        drafter = LayerSkipping(target, DEPTH, **options)
        got = speculative(target, prompts(), settings(**MODES[mode]), seeds=range(4),
                          drafter=drafter, lookahead=DraftExit.of(drafter))  # fmt: skip
        assert (got.tokens, got.finish) == said(family, mode)


def test_the_sets_of_these_cases_vary():
    """Else "step" would be "prompt" by another name; and some drafts are accepted, not all."""
    target = tiny("llama", **DEEP)
    drafter = LayerSkipping(target, DEPTH, **SETS["step"])
    got = speculative(target, prompts(), settings(**FREE), drafter=drafter)
    assert len(got.extra["drafter"]["sets"]) > 1
    assert 0 < sum(got.stats.accepted_at) < sum(got.stats.drafted_at)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "deepseek_v3"])
@pytest.mark.parametrize("lengths", [(9, 3, 14, 8), (9,)])
def test_with_nothing_skipped_all_is_accepted(lengths, family, mode):
    """Ragged rows and one, windows, noise: a slip in positions, masks or the cache shows here."""
    target, rows = tiny(family), prompts(lengths)
    n_steps = 3
    config = settings(**MODES[mode], **FREE, max_new_tokens=1 + n_steps * (DEPTH + 1))
    drafter = LayerSkipping(target, DEPTH, fixed=())
    got = speculative(target, rows, config, seeds=range(len(rows)), drafter=drafter)
    assert got.tokens == alone(target, rows, config)[0]
    assert got.stats.accepted_at == got.stats.drafted_at == [n_steps * len(rows)] * DEPTH
    assert got.stats.tokens_per_step == DEPTH + 1


def test_unseeded_proposals_are_the_likeliest():
    target, rows = tiny("llama"), prompts()
    config = settings(do_sample=True, temperature=1.5, **FREE)
    accepted = {}
    for seeded in (True, False):
        drafter = LayerSkipping(target, DEPTH, fixed=(), seeded=seeded)
        got = speculative(target, rows, config, seeds=range(4), drafter=drafter)
        assert got.tokens == alone(target, rows, config)[0]
        accepted[seeded] = got.stats.accepted_at[0] / got.stats.drafted_at[0]
    assert accepted[True] == 1.0 and accepted[False] < 0.8


class Guarded(Recorder):
    """The committed part of the cache, before and after every draft."""

    n = 0

    def committed(self):
        cache: RowCache = self.seqs.cache
        return [
            part[b, :, :n].clone()
            for view in cache._views for part in view for b, n in enumerate(cache.lengths)
        ]  # fmt: skip

    def start(self):
        self.kept, self.lengths = self.committed(), list(self.seqs.cache.lengths)
        super().start()

    def extend(self, level):
        out = super().extend(level)
        assert self.seqs.cache.lengths == self.lengths
        return out

    def tree(self):
        out = super().tree()
        assert self.seqs.cache.lengths == self.lengths == (self.seqs.length - 1).tolist()
        assert all(map(torch.equal, self.kept, self.committed()))
        Guarded.n += 1
        return out


@pytest.mark.parametrize("options", ["one", "all", "prompt"])
def test_drafting_leaves_the_committed_cache_alone(options):
    target = tiny("llama", **DEEP)
    drafter = LayerSkipping(target, DEPTH, **SETS[options])
    before = Guarded.n
    speculative(target, prompts(), settings(**FREE), drafter=Guarded(drafter))
    assert Guarded.n > before + 3


def test_no_similar_attention_means_no_draft():
    target = tiny("llama", **DEEP)
    drafter = LayerSkipping(target, DEPTH, threshold=1.0)
    got = speculative(
        target, prompts(), settings(), seeds=range(4), drafter=drafter,
        lookahead=DraftExit.of(drafter),
    )  # fmt: skip
    assert (got.tokens, got.finish) == said("llama", "greedy", True)
    assert got.stats.drafted_at == [0] * DEPTH and got.stats.tokens_per_step == 1.0
    assert got.stats.nodes_verified == sum(got.stats.steps)
    report = got.extra["drafter"]
    assert report["note"] == NO_DRAFT and report["draft_forwards"] == 0
    assert report["attention_skipped"] == report["weights_skipped"] == 0.0


def test_the_report_adds_up():
    target = tiny("llama", **DEEP)
    drafter = LayerSkipping(target, DEPTH, fixed=[2, 1])
    made = speculative(target, prompts((5,)), settings(**FREE), drafter=drafter)
    report, n_steps = made.extra["drafter"], made.stats.steps[0]
    assert report["sets"] == [{"layers": [1, 2], "steps": n_steps}]
    assert report["attention_skipped"] == 0.5 and report["cosine"] is None
    assert report["weights_skipped"] == drafter.skipping.weights_skipped((1, 2)) > 0
    assert report["draft_forwards"] == n_steps * DEPTH and report["note"] is None
    again = speculative(target, prompts((5,)), settings(max_new_tokens=2), drafter=drafter)
    assert again.extra["drafter"]["draft_forwards"] == DEPTH  # of this generation alone


@torch.inference_mode()
def test_features_are_probabilities_of_the_draft():
    """q by a fresh forward over the drafted path, without the noise."""
    target, row = tiny("llama", **DEEP), prompts((9,))
    config = settings(do_sample=True, temperature=0.7, max_new_tokens=3, **FREE)
    drafter = LayerSkipping(target, DEPTH, fixed=(0, 3))
    told, extend = [], drafter.extend
    drafter.extend = lambda level: (extend(level), told.append(drafter.features()))
    seen = Recorder(drafter)
    speculative(target, row, config, seeds=[3], drafter=seen)
    tree, _, (length,), _ = seen.steps[0]
    drafted = tree.tokens[0].tolist()
    # What was read of the text before the root saw all attentions: only the drafted path is short
    # of some, so the reference goes over a cache too.
    text = torch.tensor([row[0]])
    cache = DynamicCache()
    target.backbone(input_ids=text, past_key_values=cache, use_cache=True)
    assert length == len(row[0]) + 1
    read = dict(input_ids=torch.tensor([drafted]), past_key_values=cache, use_cache=True)
    with drafter.skipping.without_attention((0, 3)):
        out = target.backbone(**read)
    q = (target.project(out.last_hidden_state)[0] / 0.7).softmax(-1)
    want = [float(q[i, drafted[i + 1]]) for i in range(DEPTH)]
    assert [float(f[0, 0]) for f in told[:DEPTH]] == pytest.approx(want, abs=1e-9)
    assert torch.equal(tree.log_q[0, 1:], torch.stack([f[0, -1] for f in told[:DEPTH]]))


def test_its_costs_can_be_measured():
    target = tiny("llama", **DEEP)
    drafters = {"skip": LayerSkipping(target, 2, fixed=(1,)), "auto": LayerSkipping(target, 2)}
    meter = CostMeter(target, new_tokens=(1, 3), contexts=(16,), drafters=drafters)
    meter.run(1)
    assert meter.table().draft("skip") > 0 and drafters["skip"].report()["draft_forwards"] == 2


def test_near_the_end_of_the_context():
    target = tiny("gpt2", n_positions=32, max_position_embeddings=32)
    rows, config = prompts((30, 20)), settings(**FREE, max_new_tokens=NEW)
    drafter = LayerSkipping(target, 6, fixed=(1,))
    got = speculative(target, rows, config, seeds=range(2), drafter=drafter)
    assert got.tokens == alone(target, rows, config)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(depth=0), "depth 0"),
        (dict(threshold=None), "give threshold"),
        (dict(threshold=1.5), "threshold 1.5"),
        (dict(max_skipped=0), "max_skipped 0"),
        (dict(positions=0), "positions 0"),
        (dict(refresh="often"), "refresh 'often'"),
        (dict(protect=(1, -1)), "protect"),
        (dict(fixed=(0, 7)), "no layer 7"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        LayerSkipping(tiny("llama"), **options)
