"""Every kind of heads by one contract: its maths, its loss, its trees and texts, its plan."""

import copy
import itertools
import re
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from head_kinds import CASES, make_head, written_out
from models import alone, prompts, settings, tiny
from test_head_drafter import drafted, one_tree
from transformers import LlamaConfig

from redrafter.config import (
    KINDS,
    DataConfig,
    HeadConfig,
    LoraSettings,
    LossConfig,
    OptimConfig,
    TargetConfig,
    TrainConfig,
    TreeConfig,
)
from redrafter.contracts import InputError
from redrafter.decode.noise import gumbel
from redrafter.decode.speculative import speculative
from redrafter.drafters.build import Resources, build_drafter
from redrafter.drafters.head import HeadDrafter
from redrafter.heads import lora
from redrafter.heads.load import head_class, load_head
from redrafter.planning import memory
from redrafter.planning.meta import MetaTarget, meta_head
from redrafter.planning.speed import level_bytes_read
from redrafter.training.feed import Batch
from redrafter.training.refusals import check_depths
from redrafter.training.step import batch_loss, depth_accuracy, total_weight

BOUNDED = [case for case, (kind, _) in CASES.items() if head_class(kind).depth_field]


def depth_of(head, most=4):
    return min(most, head.max_depth or most)


# ------------------------------------------------------------------------------- the list of kinds


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_what_its_module_and_its_options_say(kind):
    cls = head_class(kind)
    assert (cls.kind, kind) == (kind, next(k for k, _ in CASES.values() if k == kind))
    known = {field.name for field in fields_of(cls.config_class)}
    assert set(KINDS[kind]) <= known & {field.name for field in fields_of(HeadConfig)}
    assert cls.depth_field is None or cls.depth_field in known
    assert all(cls.paper) and cls.smaller, "a card and a plan say these"


@pytest.mark.parametrize(("kind", "option"), [(k, o) for k in KINDS for o in KINDS[k]])
def test_help_says_which_kinds_have_an_option(kind, option):
    import ast
    import inspect

    from redrafter.config import heads

    body = ast.parse(inspect.getsource(heads.HeadConfig)).body[0].body
    told = {
        node.target.id: " ".join(after.value.value.split())
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr)
    }
    assert kind in told[option]
    others = [other for other in KINDS if option not in KINDS[other]]
    assert not [other for other in others if f"({other}" in told[option]]


def test_an_option_of_another_kind_is_refused_naming_both():
    for kind, other in itertools.permutations(KINDS, 2):
        for option in KINDS[other].keys() - KINDS[kind].keys():
            with pytest.raises(ValueError, match=f"head.{option} .*{other}.*head.kind is {kind}"):
                HeadConfig(kind=kind, **{option: 1})
        assert HeadConfig(kind=kind).resolved().options == KINDS[kind]
    with pytest.raises(ValueError, match=r"head\.kind: 'lstm'"):
        HeadConfig(kind="lstm")


def test_depths_without_maps_are_refused_before_any_work():
    given = {"target": TargetConfig("t"), "data": DataConfig(), "output_dir": "o"}
    config = TrainConfig(**given, optim=OptimConfig(depth=3))
    check_depths(config, None)
    with pytest.raises(InputError, match=r"eval\.tree\.depth 4, .* 3 tokens"):
        check_depths(config, 3)
    with pytest.raises(InputError, match=r"optim\.depth 3, .* set optim.depth 5"):
        check_depths(config, 5)


# ------------------------------------------------------------------------------------- the maths


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_levels_and_whole_paths_are_the_written_formula(case):
    """Which token a level reads, and whose matrix speaks of it, too."""
    target = tiny("llama")
    head = make_head(target, case)
    depth, generator = depth_of(head), torch.Generator().manual_seed(1)
    tokens = torch.randint(target.vocab_size, (2, depth, 3), generator=generator)
    tokens[:, 0] = tokens[:, :1, 0]  # a draft has one root
    c = torch.randn(2, 1, target.hidden_size, generator=generator, dtype=torch.float64)
    states, found = None, []
    for level in range(1, depth + 1):
        read = tokens[:, level - 1] if level > 1 else tokens[:, 0, :1]
        states, logits = head.read(target, read, c, states, level)
        assert logits.shape == (*read.shape, head.draft_vocab_size)
        found.append(logits)
        states = states.expand(-1, 3, -1) if level == 1 else states
    whole = head(c.expand(-1, 3, -1), tokens.transpose(1, 2), target)
    for row, beam in itertools.product(range(2), range(3)):
        path = tokens[row, :, beam].tolist()
        for k, wanted in enumerate(written_out(head, target, c[row, 0], path)):
            got = found[k][row, beam if k else 0]
            torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)
            trained = head.vocab_matrix(k + 1) @ whole[row, beam, k]
            torch.testing.assert_close(trained, wanted, atol=1e-9, rtol=1e-9)


@torch.inference_mode()
def draft_levels(head, target, c, tokens):
    """Logits of each level. tokens: (B, K, w), of which the first level reads one."""
    states, found = None, []
    for level in range(1, tokens.shape[1] + 1):
        read = tokens[:, level - 1] if level > 1 else tokens[:, 0, :1]
        states, logits = head.read(target, read, c, states, level)
        states = states.expand(-1, tokens.shape[2], -1) if level == 1 else states
        found.append(logits)
    return found


def check_drafted(head, target, seed):
    """In float32 a head keeps copies and tables while it drafts; float64 is the reference."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(target.vocab_size, (2, depth_of(head), 3), generator=generator)
    c = torch.randn(2, 1, target.hidden_size, generator=generator, dtype=torch.float64)
    reference = copy.deepcopy(head).double()
    found = draft_levels(head, target, c.float(), tokens)
    for a, b in zip(found, draft_levels(reference, target, c, tokens), strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_draft_in_float32_is_the_reference_whatever_changed_before(case):
    target = tiny.__wrapped__("llama")
    head = make_head(target, case).float()
    check_drafted(head, target, 1)
    check_drafted(head, target, 2)  # another context
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0, fused=True)  # leaves no trace
    for p in head.train().parameters():
        p.grad = torch.full_like(p, 0.05)
    optimizer.step()
    check_drafted(head.eval(), target, 2)
    with torch.no_grad():
        for p in (*head.parameters(), *head.buffers(), target.embedding_weight):
            if p.is_floating_point():
                p.mul_(1.5)
    check_drafted(head, target, 2)


@pytest.mark.parametrize(
    "fields",
    [
        {"exit_dim": 10}, {"input_norm": True}, {"num_draft_layers": 0, "first_state": "paper"},
        {"cell": "sum", "output": "target"}, {"cell": "gru"},
    ],
)  # fmt: skip
def test_every_form_of_a_recurrent_head_drafts_so(fields):
    target = tiny("llama")
    torch.manual_seed(0)
    head = head_class("recurrent").for_target(target, **fields).eval()
    check_drafted(head, target, 1)


def random_batch(head, target, depth, positions=12, seed=2):
    g = torch.Generator().manual_seed(seed)
    shape = (positions, depth)
    return Batch(
        torch.randn(positions, target.hidden_size, generator=g, dtype=torch.float64),
        torch.randint(target.vocab_size, shape, generator=g),
        torch.randint(head.draft_vocab_size, shape, generator=g),
        torch.rand(shape, generator=g) > 0.3,
        torch.randn(*shape, target.hidden_size, generator=g, dtype=torch.float64),
    )


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_mean_of_the_written_formula(case):
    """Depth k learns the label of depth k, with its own matrix, whoever owns it."""
    target = tiny("llama")
    head = make_head(target, case).train()
    depth = depth_of(head)
    batch = random_batch(head, target, depth)
    loss = LossConfig(cross_entropy=0.7, kl=0.3, depth_decay=0.8, chunk_rows=5)
    value, counts = batch_loss(head, head, target, batch, loss, total_weight(batch, loss))
    ids = getattr(head, "draft_ids", torch.arange(target.vocab_size))
    total = weight = 0.0
    hits = [0] * depth
    for p in range(12):
        by_depth = written_out(head, target, batch.context[p], batch.tokens[p].tolist())
        for k in batch.mask[p].nonzero()[:, 0].tolist():
            log_q, label = by_depth[k].log_softmax(-1), batch.labels[p, k]
            log_p = target.project(batch.teacher[p, k]).log_softmax(-1)[ids]
            each = -0.7 * log_q[label] + 0.3 * (log_p.exp() * (log_p - log_q)).sum()
            total, weight = total + 0.8**k * each, weight + 0.8**k
            hits[k] += int(log_q.argmax() == label)
    assert value.item() == pytest.approx((total / weight).item(), rel=1e-9)
    assert (counts[0].tolist(), counts[1].tolist()) == (batch.mask.sum(0).tolist(), hits)
    value.backward()
    without = [name for name, p in head.named_parameters() if p.grad is None]
    assert not without, "every weight learns: else data parallel training stops"
    measured = replace(batch, labels=head.to_vocab_ids(batch.labels))
    found = depth_accuracy(head.eval(), target, [measured], 7)
    shares = [h / n for h, n in zip(hits, batch.mask.sum(0).tolist(), strict=True)]
    assert found["top_1"] == pytest.approx(shares)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_whole_logits(case):
    target = tiny("llama")
    head = make_head(target, case).train()
    depth = depth_of(head)
    batch = random_batch(head, target, depth)
    loss = LossConfig(cross_entropy=1.0, chunk_rows=3)
    batch_loss(head, head, target, batch, loss, total_weight(batch, loss))[0].backward()
    found = {name: p.grad.clone() for name, p in head.named_parameters()}
    head.zero_grad()
    features = head(batch.context, batch.tokens, target)
    logits = torch.stack([features[:, k] @ head.vocab_matrix(k + 1).T for k in range(depth)], 1)
    picked = logits.log_softmax(-1).gather(-1, batch.labels[:, :, None])[:, :, 0]
    (-picked[batch.mask].mean()).backward()
    for name, p in head.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-10, rtol=1e-8, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_learns(kind):
    """From where it begins: a start that repeats the target must not be a dead one."""
    target = tiny("llama")
    torch.manual_seed(0)
    fields = {} if head_class(kind).depth_field is None else {head_class(kind).depth_field: 3}
    head = head_class(kind).for_target(target, **fields).double().train()
    batch = random_batch(head, target, 3)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    loss, values = LossConfig(cross_entropy=1.0), []
    for _ in range(40):
        value, _ = batch_loss(head, head, target, batch, loss, total_weight(batch, loss))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.5 * values[0]


# --------------------------------------------------------------------------- saving, and retuning


@pytest.mark.parametrize("case", CASES)
def test_saving_loses_nothing(case, tmp_path):
    target = tiny("llama")
    head = make_head(target, case)
    head.config.trained_depth = 3
    head.save_pretrained(tmp_path)
    cls = type(head)
    for again in (load_head(tmp_path, target), cls.load(tmp_path).bind(target),
                  cls.from_pretrained(tmp_path).bind(target)):  # fmt: skip
        assert again.fingerprint() == head.fingerprint()
        assert again.config.trained_depth == 3
        assert again.config.target_fingerprint == target.fingerprint()
        assert again.summary() == head.summary()
        mine, its = head.state_dict(), again.state_dict()
        assert mine.keys() == its.keys() and all(torch.equal(t, its[n]) for n, t in mine.items())
    with pytest.raises(InputError, match="trained for another target"):
        load_head(tmp_path, tiny("qwen3"))


@pytest.mark.parametrize("case", CASES)
def test_lora_reaches_every_linear_map(case):
    target = tiny("llama")
    head, again = make_head(target, case), make_head(target, case)
    depth = depth_of(head)
    batch = random_batch(head, target, depth)
    lora.adapt(head, LoraSettings(r=2), "some/where/head")
    for name, p in head.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p.data, std=0.1)
    loss = LossConfig(cross_entropy=1.0)
    value, _ = batch_loss(head, head, target, batch, loss, total_weight(batch, loss))
    value.backward()
    assert not [n for n, p in head.named_parameters() if p.requires_grad and p.grad is None]
    plain_head = lora.merged(head)
    merged, _ = batch_loss(plain_head, plain_head, target, batch, loss, total_weight(batch, loss))
    before, _ = batch_loss(again, again, target, batch, loss, total_weight(batch, loss))
    assert merged.item() == pytest.approx(value.item(), rel=1e-6)
    assert abs(before.item() - value.item()) > 1e-3, "nothing was added: this tested nothing"


# ------------------------------------------------------------------------------- trees and texts


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_levels_are_the_best_of_all_children(case, seeded):
    """Against a search that reads every path from its beginning by the written formula."""
    target, width = tiny("llama"), 3
    head = make_head(target, case)
    depth, noise = depth_of(head, 3), None
    if seeded:
        position = torch.tensor([[5], [8]]) + torch.arange(depth + 1)
        noise = gumbel(torch.tensor([7, 8]), position, target.vocab_size)
    drafter = HeadDrafter(head, target, TreeConfig(width, depth))
    tree, seqs, hidden = one_tree(target, drafter, noise, temperature=0.7)
    ids = getattr(head, "draft_ids", torch.arange(target.vocab_size)).tolist()
    for row in range(2):
        beams = [((), 0.0)]
        for level in range(depth):
            children = []
            for path, total in beams:
                read = [int(seqs.root[row]), *path]
                scores = written_out(head, target, hidden[row, 0], read)[-1]
                scores = scores if noise is None else scores / 0.7 + noise[row, level][ids]
                log_q = scores.log_softmax(-1).tolist()
                children += [((*path, t), total + q) for t, q in zip(ids, log_q, strict=True)]
            beams = sorted(children, key=lambda child: -child[1])[:width]
            nodes = (tree.depth[row] == level + 1).nonzero()[:, 0].tolist()
            found = {drafted(tree, row, n): float(tree.log_q[row, n]) for n in nodes}
            assert found == pytest.approx(dict(beams), abs=1e-9)


NAMES = ("head:1x{k}", "head:3x{k}", "head:3x{k}:best:5",
         "multi:source=head:children=[3,2]:how=top")  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_text_is_plain_decoding(case):
    """In float64, alone and in a ragged batch of four, greedily and for a seed."""
    target, rows, seeds = tiny("llama"), prompts(), [3, 4, 5, 6]
    head = make_head(target, case, scale=0.3)
    resources = Resources(head=head)
    accepted, configs = 0, [settings(), settings(do_sample=True, temperature=1.3, top_k=9)]
    # By every name in one of both ways, by the next case's heads in the other one.
    for i, name in enumerate(NAMES, start=list(CASES).index(case)):
        config = configs[i % 2]
        want = alone(target, rows, config, seeds)[0]
        drafter = build_drafter(name.format(k=depth_of(head)), target, resources)
        made = speculative(target, rows, config, seeds=seeds, drafter=drafter)
        assert made.tokens == want, name
        if name == NAMES[1]:
            one = speculative(target, rows[:1], config, seeds=seeds[0], drafter=drafter)
            assert one.tokens == want[:1]
        accepted += sum(made.stats.accepted_at)
    assert accepted > 0, "nothing was accepted: equality says little"


@pytest.mark.parametrize("case", BOUNDED)
def test_no_deeper_than_its_maps(case):
    target = tiny("llama")
    head = make_head(target, case)
    with pytest.raises(InputError, match=f"drafts {head.max_depth} tokens ahead at most"):
        build_drafter(f"head:2x{head.max_depth + 1}", target, Resources(head=head))
    assert HeadDrafter(head, target).max_depth == head.max_depth
    multi = build_drafter("multi:source=head:children=[2,1,1,1]:how=top", target, Resources(head))
    made = speculative(target, prompts(), settings(eos_token_id=-1), drafter=multi)
    assert not any(made.stats.drafted_at[head.max_depth :])


# ------------------------------------------------------------------------------------- the plan


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    """A target of 128k tokens and width 2048, of which there is a configuration only."""
    folder = tmp_path_factory.mktemp("wide")
    LlamaConfig(
        hidden_size=2048, intermediate_size=64, num_hidden_layers=1, num_attention_heads=16,
        vocab_size=128_000,
    ).save_pretrained(folder)  # fmt: skip
    return MetaTarget(TargetConfig(path=str(folder), dtype="bfloat16", device="cpu"))


@pytest.mark.parametrize(
    ("kind", "output"),
    [(k, o) for k in KINDS for o in ("own", "target") if o == "own" or "output" in KINDS[k]],
)
def test_no_kind_holds_more_than_one_chunk_of_logits(kind, output, meta):
    """K = 5 depths, each with a matrix of its own or not."""
    chosen = {"output": output} if "output" in KINDS[kind] else {}
    head = meta_head(HeadConfig(kind=kind, **chosen), meta)
    rows, positions = 64, 128
    loss = LossConfig(cross_entropy=1.0, chunk_rows=rows)
    found = memory.step_memory(head, meta, loss, OptimConfig(batch_positions=positions))
    chunk, features = 4 * rows * 128_000, 4 * positions * 5 * 4096  # at most
    # The chunk, its log-softmax and gradient, and what these are made of; per depth it would be
    # five times as much.
    assert chunk < found.loss.logits < 4.1 * chunk + 3 * features
    one = 4 * sum(p.numel() for p in head.parameters())
    assert found.gradients == one, "each matrix has one gradient"
    assert found.backward.gradients <= one and found.backward.logits < features


@pytest.mark.parametrize("case", CASES)
def test_a_plan_knows_what_a_level_reads(case):
    """Bytes of the maps and the matrix that one level multiplies with."""
    target = tiny("llama")
    head = make_head(target, case)
    depth = depth_of(head)
    sizes = {n: p.numel() for n, p in head.named_parameters()}
    if head.kind in ("recurrent", "medusa"):  # whose levels are alike
        each = sum(sizes.values()) // (head.max_depth or 1)
    elif head.kind == "hydra":  # those after the first one
        each = sum(
            n for name, n in sizes.items() if name.split(".")[1] != "0"
        ) // (depth - 1)  # fmt: skip
    else:  # embeddings are looked up; level 1 alone has the projection of the hidden state
        width = head.config.inner_dim
        each = width * width + 2 * width + target.vocab_size * width
    borrowed = head.vocab_matrix().numel() if head.draws_on_target else 0
    assert level_bytes_read(head, target, depth) == 8 * (each + borrowed)


DOC = Path(__file__).resolve().parent.parent / "docs/add-a-head.md"
ROWS = re.findall(
    r"^\| `(\w+)`(?:, (\w+) (\w+))? \| ([\d,]+)" + r" \| ([\d.]+)" * 3 + r" \|$",
    DOC.read_text(), re.MULTILINE,
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(filter(None, row[:3])))
def test_the_page_says_what_a_plan_gives(row, meta):
    kind, option, value, *said = row
    chosen = {} if not option else {option: {"true": True}.get(value, value)}
    head = meta_head(HeadConfig(kind=kind, **chosen), meta)
    found = memory.step_memory(head, meta, LossConfig(kl=1.0), OptimConfig())
    weights = sum(p.numel() for p in head.parameters())
    figures = [weights / 1e6, *(n / 1e9 for n in (found.gradients, found.loss.logits, found.peak))]
    assert said == [f"{figures[0]:,.0f}", *(f"{figure:.2f}" for figure in figures[1:])]


def test_the_page_is_short_and_has_every_kind():
    assert len(DOC.read_text().splitlines()) < 150
    assert {row[0] for row in ROWS} == set(KINDS)
