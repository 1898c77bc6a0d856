"""Training heads that read the prefix: rows that starts share; and what such heads cannot do."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from head_kinds import make_head as plain_head
from models import tiny
from test_prefix import greedy_feed, make_head

from redrafter.config import (
    LOSSES,
    DataConfig,
    HeadConfig,
    LossConfig,
    TargetConfig,
    TrainConfig,
)
from redrafter.contracts import InputError
from redrafter.export.layouts import convert
from redrafter.files import plain_values
from redrafter.heads.load import head_class
from redrafter.planning.speed import bound
from redrafter.processes import join
from redrafter.serve.chain import check_depth
from redrafter.training.checkpoint import check_same
from redrafter.training.refusals import check_prefix
from redrafter.training.step import StepLoss, batch_loss, contexts_of, total_weight


def test_rows_of_a_batch_give_what_each_start_gives_alone():
    """And in any number of micro-batches, gradients and all."""
    target = tiny("llama")
    head = make_head(target).train()
    _, _, feed = greedy_feed(target, positions=24, row_starts=4, buffer_rows=2)
    batch, loss = feed.step(0), LossConfig(cross_entropy=1.0)
    assert len(batch.rows.hidden) < 24, "no row is shared"
    found = contexts_of(head, target, batch)
    for p, (row, place) in enumerate(zip(batch.rows.row, batch.rows.place, strict=True)):
        hidden, tokens = (x[row : row + 1, : place + 1] for x in
                          (batch.rows.hidden, batch.rows.tokens))  # fmt: skip
        assert torch.equal(hidden[0, -1], batch.context[p])
        assert tokens[0, -1] == batch.tokens[p, 0], "the token that the draft begins at"
        own = head.contexts(target, hidden, tokens)[0, -1]
        torch.testing.assert_close(found[p], own, atol=1e-11, rtol=1e-11)
    whole = total_weight(batch, loss)
    for parts in (1, 5):
        head.zero_grad()
        values = [batch_loss(head, head, target, b, loss, whole)[0] for b in batch.split(parts)]
        sum(values).backward()
        grads = {name: p.grad.clone() for name, p in head.named_parameters()}
        if parts == 1:
            value, first = sum(values), grads
    torch.testing.assert_close(sum(values), value, atol=1e-11, rtol=1e-11)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, first[name], atol=1e-11, rtol=1e-9, msg=name)


def test_every_start_once_in_groups_of_a_row_and_found_again_at_any_step():
    target = tiny("llama")
    options = dict(positions=10, row_starts=5, buffer_rows=3)
    _, _, feed = greedy_feed(target, **options)
    batches = [feed.step(step) for step in range(feed.steps_per_epoch + 2)]
    starts = torch.cat([b.context for b in batches[: feed.steps_per_epoch]])
    assert len(starts) == 6 * 20 == len(starts.unique(dim=0))
    assert max(len(b.rows.hidden) for b in batches) == 2, "ten starts, five of a row"
    _, _, again = greedy_feed(target, **options)
    for step in (len(batches) - 1, 4, 0):
        one, other = again.step(step), batches[step]
        assert torch.equal(one.context, other.context)
        for name, value in vars(one.rows).items():
            assert torch.equal(value, getattr(other.rows, name)), name
    by_one = greedy_feed(target, **{**options, "row_starts": None})[2]
    assert by_one.step(0).rows is None


def test_processes_share_a_step_and_one_may_have_none_of_it():
    target = tiny("llama")
    head = make_head(target).train()
    options = dict(positions=4, row_starts=4)
    whole = greedy_feed(target, **options)[2]
    feeds_ = [greedy_feed(target, share=(r, 2), **options)[2] for r in range(2)]
    sizes = set()
    for step in range(6):
        parts = [feed.step(step) for feed in feeds_]
        sizes |= {len(part.context) for part in parts}
        together = torch.cat([part.context for part in parts])
        batch = whole.step(step)
        assert {tuple(c) for c in together.tolist()} == {tuple(c) for c in batch.context.tolist()}
    assert 0 in sizes
    part = next(p for step in range(6) for f in feeds_ if not len((p := f.step(step)).context))
    head.zero_grad()
    loss = LossConfig(cross_entropy=1.0)
    batch_loss(head, head, target, part, loss, torch.tensor(1.0))[0].backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def trained(target, share=(0, 1), wrap=lambda loss: loss):
    """(weights after a few steps, positions that this process had of each)"""
    head, config = make_head(target).train(), LossConfig(cross_entropy=1.0)
    _, _, feed = greedy_feed(target, positions=12, row_starts=6, share=share)
    model = wrap(StepLoss(head, target, config))
    optimizer, sizes = torch.optim.Adam(head.parameters(), lr=0.01), []
    for step in range(5):
        batch = feed.step(step)
        sizes.append(len(batch.context))
        weight = total_weight(batch, config)
        if share[1] > 1:
            torch.distributed.all_reduce(weight)
        (model(batch, weight)[0] * share[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return head.state_dict(), sizes


def in_two_processes():
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # the fork brought its parent's along
    state, target = join(cpu=True), tiny("llama")
    share = (state.process_index, state.num_processes)
    found, sizes = trained(target, share, torch.nn.parallel.DistributedDataParallel)
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, sizes)
    assert [sum(pair) for pair in zip(*everyone, strict=True)] == [12] * 5
    assert 0 in everyone[0] + everyone[1], "each had some of every step"
    for name, tensor in trained(target)[0].items():
        torch.testing.assert_close(found[name], tensor, atol=1e-12, rtol=1e-12, msg=name)


def test_two_processes_train_the_head_of_one():
    tiny("llama")
    debug_launcher(in_two_processes, num_processes=2)


def test_a_checkpoint_from_before_there_was_an_option_is_gone_on_with():
    """It did what the option's default does; not what another value of it does."""
    for kind in ("mlp_speculator", "recurrent"):
        given = (TargetConfig("t"), DataConfig(), "o")
        config = TrainConfig(*given, head=HeadConfig(kind=kind))
        stored = plain_values(config)
        del stored["head"]["prefix"], stored["optim"]["row_starts"]
        check_same(stored, plain_values(config), frozenset(), Path("c"))
    other = TrainConfig(*given, head=HeadConfig(prefix="attention"))
    del stored["head"]["kind"]
    with pytest.raises(InputError, match=r"head\.prefix 'none' -> 'attention'"):
        check_same(stored, plain_values(other), frozenset(), Path("c"))


def test_a_checkpoint_whose_default_was_cross_entropy_is_gone_on_with_by_that_alone():
    given = (TargetConfig("t"), DataConfig(), "o")
    by_tokens = plain_values(TrainConfig(*given, loss=LossConfig(cross_entropy=1.0)))
    for known in (set(LOSSES), {"cross_entropy", "kl"}, set()):  # as versions stored them
        stored = json.loads(json.dumps(by_tokens))
        for name in set(LOSSES) - known:
            del stored["loss"][name]
        check_same(stored, by_tokens, frozenset(), Path("c"))
        with pytest.raises(InputError) as refused:
            check_same(stored, plain_values(TrainConfig(*given)), frozenset(), Path("c"))
        assert "loss.cross_entropy 1.0 -> 0.0; loss.kl 0.0 -> 1.0" in str(refused.value)
        assert "Set them back (--loss.cross_entropy=1.0 --loss.kl=0.0)" in str(refused.value)
    layers = plain_values(TrainConfig(*given, head=HeadConfig(aux_layers=(2, 4))))
    moving = plain_values(TrainConfig(*given, loss=LossConfig(towards={"kl": 2.0})))
    said = r"\('--head\.aux_layers=\[2, 4\]' no --loss\.towards\.kl\)"
    with pytest.raises(InputError, match=said):
        check_same(layers, moving, frozenset(), Path("c"))


# -------------------------------------------------------------------------------------- refusals


def test_what_it_cannot_do_is_refused_by_name(tmp_path):
    target = tiny("llama")
    head = make_head(target)
    with pytest.raises(InputError, match=r"head\.prefix attention.*engine"):
        check_depth(head, 2, "num_speculative_tokens")
    head.save_pretrained(tmp_path / "head")
    for layout in ("apple", "vllm-medusa", "mlp_speculator"):
        with pytest.raises(InputError, match="no place for a context of the whole row"):
            convert(tmp_path / "head", layout, tmp_path / layout, target)
    config = TrainConfig(TargetConfig("t"), DataConfig(labels="local"), "o")
    check_prefix(config, False)
    with pytest.raises(InputError, match=r"data\.labels local.*head\.prefix"):
        check_prefix(config, True)
    made = head_class("recurrent").config_class
    for heads, width in ((None, 31), (32, 32), (0, 32)):
        config = made(vocab_size=9, hidden_size=width, prefix="attention", prefix_heads=heads)
        with pytest.raises(InputError, match=f"prefix_heads = .*hidden_size = {width} must be"):
            config.check()
    with pytest.raises(InputError, match="prefix = 'lstm'"):
        head_class("medusa").config_class(vocab_size=9, hidden_size=4, prefix="lstm").check()
    with pytest.raises(InputError, match="prefix: a speculator"):
        cls = head_class("mlp_speculator").config_class
        cls(vocab_size=9, hidden_size=4, prefix="attention").check()


def test_the_bound_counts_what_is_read_once_a_step():
    target = tiny("llama")
    with_it, without = make_head(target), plain_head(target, "recurrent")
    one, other = bound(with_it, target, 3), bound(without, target, 3)
    size = sum(p.numel() for p in with_it.prefix_layer.parameters()) * 8
    assert (one.context_bytes, other.context_bytes) == (size, 0)
    assert one.level_bytes == other.level_bytes
    assert one.break_even - other.break_even == pytest.approx(size / one.target_bytes)
