"""Weights that change: losses by schedule, depths by the chance that what is drafted gets there."""

import json

import pytest
import torch
from head_kinds import CASES, KIND_CASES, make_head, written_out
from models import tiny
from test_head_kinds import depth_of, random_batch

from redrafter.cli.args import parse
from redrafter.config import LOSSES, LossConfig, TrainConfig
from redrafter.files import plain_values
from redrafter.training import step
from redrafter.training.step import batch_loss, loss_weights, needed_teacher, total_weight

HEADS = [*KIND_CASES.values(), "hydra-pruned"]
CHANCE = dict(depth_decay=0.9, depth_weights="chance", chance_floor=0.25)


def batch_of(head, target, depth):
    """Depths behind one that is not supervised are there too, as with a pruned vocabulary."""
    batch = random_batch(head, target, depth)
    assert (~batch.mask[:, 0] & batch.mask[:, 1]).any()
    return batch


def written_weights(head, target, batch, decay, floor):
    """{(start, depth): weight}, each path read from its beginning by the written formula."""
    found = {}
    for p, mask in enumerate(batch.mask.tolist()):
        chance = 1.0
        by_depth = written_out(head, target, batch.context[p], batch.tokens[p].tolist())
        for k, there in enumerate(mask):
            q = by_depth[k].softmax(-1)[batch.labels[p, k]].item() if there else 0.0
            if there:
                found[p, k] = decay**k * chance
            chance *= (1 - floor) * q + floor
    return found


@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
@pytest.mark.parametrize("case", HEADS)
def test_chance_weights_and_their_gradients_are_the_written_ones(case, chunk_rows):
    """Whatever chunk the depths of a draft fall into, and whether they share a matrix."""
    target = tiny("llama")
    head = make_head(target, case).train()
    depth = depth_of(head)
    batch = batch_of(head, target, depth)
    loss = LossConfig(cross_entropy=1.0, kl=0.5, chunk_rows=chunk_rows, **CHANCE)
    value, counts = batch_loss(head, head, target, batch, loss, total_weight(batch, loss))
    value.backward()
    found = {name: p.grad.clone() for name, p in head.named_parameters()}
    head.zero_grad()

    with torch.no_grad():
        weights = written_weights(head, target, batch, 0.9, 0.25)
    assert len({round(w, 6) for w in weights.values()}) > depth, "the same for all: tested nothing"
    features = head(batch.context, batch.tokens, target)
    ids = getattr(head, "draft_ids", torch.arange(target.vocab_size))
    total = 0.0
    for (p, k), weight in weights.items():
        log_q = (head.vocab_matrix(k + 1) @ features[p, k]).log_softmax(-1)
        log_p = target.project(batch.teacher[p, k]).log_softmax(-1)[ids].detach()
        each = 0.5 * (log_p.exp() * (log_p - log_q)).sum() - log_q[batch.labels[p, k]]
        total = total + weight * each
    total = total / batch.mask.any(1).sum()
    total.backward()
    assert value.item() == pytest.approx(total.item(), rel=1e-9)
    for name, p in head.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-10, rtol=1e-8, msg=name)
    assert counts[0].tolist() == batch.mask.sum(0).tolist()


def test_micro_batches_are_the_batch():
    target = tiny("llama")
    head, loss = make_head(target, "recurrent").train(), LossConfig(kl=1.0, **CHANCE)
    batch = batch_of(head, target, 4)
    grads = []
    for pieces in ([batch], batch.split(5)):
        head.zero_grad()
        for piece in pieces:
            batch_loss(head, head, target, piece, loss, total_weight(batch, loss))[0].backward()
        grads.append([p.grad.clone() for p in head.parameters()])
    for one, many in zip(*grads, strict=True):
        torch.testing.assert_close(one, many, atol=1e-12, rtol=1e-9)


def test_a_floor_of_one_weighs_as_the_decay_alone():
    target = tiny("llama")
    head = make_head(target, "recurrent").train()
    batch = batch_of(head, target, 4)
    chance = LossConfig(kl=1.0, **{**CHANCE, "chance_floor": 1.0})
    fixed = LossConfig(kl=1.0, depth_decay=0.9)
    values = [batch_loss(head, head, target, batch, loss, torch.tensor(1.0))[0].item()
              for loss in (chance, fixed)]  # fmt: skip
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.parametrize("planted", ["forgets other chunks", "counts its own depth"])
def test_a_fault_of_the_weights_is_seen(planted, monkeypatch):
    real = step.DraftChance.__call__

    def faulty(self, start, depth, logits, labels):
        if planted == "forgets other chunks":
            self.factors.fill_(1.0)
        found = real(self, start, depth, logits, labels)
        return found if planted[0] == "f" else found * self.factors[start, depth]

    monkeypatch.setattr(step.DraftChance, "__call__", faulty)
    with pytest.raises(AssertionError):
        test_chance_weights_and_their_gradients_are_the_written_ones("recurrent", 5)


# ------------------------------------------------------------------ which losses, and the schedule


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ("", {"kl": 1.0}),
        ("data.labels=greedy", {"cross_entropy": 1.0}),
        ("data.labels=local", {"cross_entropy": 1.0}),
        ("loss.chunk_rows=64 loss.teacher=top_k loss.depth_decay=0.8", {"kl": 1.0}),
        ("loss.kl=0.5", {"kl": 0.5}),
        ("loss.cross_entropy=2", {"cross_entropy": 2.0}),
        ("loss.lk_hybrid=1 data.labels=greedy", {"lk_hybrid": 1.0}),
        ("loss.cross_entropy=0 loss.kl=1", {"kl": 1.0}),
        ('loss={"cross_entropy":1,"kl":1}', {"cross_entropy": 1.0, "kl": 1.0}),
    ],
)
def test_the_losses_given_are_all_there_is_and_kl_where_none_is(given, weights):
    config = parse(TrainConfig, arguments(given), "test")
    stored = plain_values(config)["loss"]
    assert {name: stored[name] for name in LOSSES} == dict.fromkeys(LOSSES, 0.0) | weights
    assert loss_weights(config.loss) == weights
    assert (needed_teacher(config.loss) is None) == (set(weights) == {"cross_entropy"})
    again = parse(TrainConfig, [*arguments(""), f"--loss={json.dumps(stored)}"], "test")
    assert again.loss == config.loss, "what was stored says the same to any later version"


def arguments(given):
    return ["--target.path=t", "--output_dir=o", *(f"--{word}" for word in given.split())]


@pytest.mark.parametrize(
    ("given", "halfway"),
    [
        ("", {"kl": 0.5, "lk_hybrid": 0.5}),
        ("data.labels=greedy", {"cross_entropy": 0.5, "lk_hybrid": 0.5}),
        ("loss.reverse_kl=1", {"reverse_kl": 0.5, "lk_hybrid": 0.5}),
    ],
)
def test_weights_move_from_those_given_or_the_default_loss(given, halfway):
    moving = f'loss.towards={{"lk_hybrid":1}} {given}'
    loss = parse(TrainConfig, arguments(moving), "test").loss
    assert loss_weights(loss, 0.5) == halfway
    assert loss_weights(loss, 1.0) == {"lk_hybrid": 1.0} and needed_teacher(loss) == "states"


def test_a_step_takes_no_loss_that_nobody_has_chosen():
    with pytest.raises(ValueError, match="no loss has a weight"):
        loss_weights(LossConfig())


def test_weights_move_on_a_line():
    config = LossConfig(cross_entropy=1.0, kl=0.5, towards={"minus_log_acceptance": 2.0, "kl": 0.5})
    assert loss_weights(config) == {"cross_entropy": 1.0, "kl": 0.5}
    assert loss_weights(config, 0.25) == {
        "cross_entropy": 0.75, "kl": 0.5, "minus_log_acceptance": 0.5,
    }  # fmt: skip
    assert loss_weights(config, 1.0) == {"kl": 0.5, "minus_log_acceptance": 2.0}
    still = LossConfig(cross_entropy=1.0, kl=0.5)
    assert loss_weights(still, 0.7) == loss_weights(still) == {"cross_entropy": 1.0, "kl": 0.5}


def test_a_loss_of_the_end_needs_its_teacher_from_the_beginning():
    assert needed_teacher(LossConfig(cross_entropy=1.0, towards={"lk_hybrid": 1.0})) == "states"
    assert needed_teacher(LossConfig(kl=1.0, towards={"cross_entropy": 1.0})) == "states"
    assert needed_teacher(LossConfig(cross_entropy=1.0, towards={"cross_entropy": 2.0})) is None


@pytest.mark.parametrize("case", [c for c in CASES if c in ("recurrent", "medusa")])
def test_a_step_takes_the_weights_of_its_time(case):
    target = tiny("llama")
    head = make_head(target, case).train()
    batch = random_batch(head, target, depth_of(head))
    moving = LossConfig(cross_entropy=1.0, towards={"reverse_kl": 1.0})
    fixed = LossConfig(cross_entropy=0.25, reverse_kl=0.75)
    weight = total_weight(batch, moving)
    found = batch_loss(head, head, target, batch, moving, weight, 0.75)[0]
    assert found.item() == batch_loss(head, head, target, batch, fixed, weight)[0].item()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"towards": {"k_l": 1.0}}, "towards: k_l is no loss .*; name some of cross_entropy, kl"),
        ({"towards": {"kl": 0.0}}, "towards: give one of the losses a weight"),
        ({"cross_entropy": 0.0, "towards": {"kl": 1.0}}, "give one of cross_entropy, kl"),
        ({"kl": 0.0}, "give one of cross_entropy, kl.* a weight, or leave all of them out"),
        ({"chance_floor": 1.5}, r"chance_floor: 1.5 must lie in 0\.\.1"),
    ],
)
def test_weights_that_make_no_sense_are_named(given, said):
    with pytest.raises(ValueError, match=said):
        LossConfig(**given)
