"""Kernels of drafting: what stands around a product, the best children of a beam, and a level of a
recurrent head in one call; torch's numbers up to rounding, a row's own whatever other rows there
are."""

import copy
import ctypes
import pickle

import pytest
import torch
from models import alone, prompts, settings, tiny
from test_kernels import drawn, near
from torch.nn import functional as F

from redrafter import kernels, products
from redrafter.config import TreeConfig
from redrafter.decode.speculative import speculative
from redrafter.drafters.beams import best_children
from redrafter.drafters.head import HeadDrafter
from redrafter.heads import recurrent
from redrafter.heads.base import ResidualBlock
from redrafter.heads.hydra import FirstBlock
from redrafter.heads.recurrent import RecurrentHead
from redrafter.kernels import FLOATS, Panels, Step
from redrafter.targets.model import Target

INF, NAN = float("inf"), float("nan")

# ------------------------------------------------------------------------- around a product


@pytest.mark.parametrize(("width", "out"), [(1, 1), (33, 50), (96, 131)])
def test_what_stands_around_a_product_is_right_and_rows_are_alone(made, width, out):
    panels, x = Panels(made, drawn(out, width)), drawn(12, width, seed=1)
    onto, bare = drawn(12, out, seed=2), x.double() @ drawn(out, width).double().t()
    for shape in ((out,), (3, 1, out), (12, out)):
        add = 3 * drawn(*shape, seed=3)
        each = add.double().view(-1, out).repeat_interleave(12 * out // add.numel(), 0)
        near(panels(x, add), bare + each)
        near(panels(x, add, True), F.silu(bare + each))
        found = panels(x, add, True, onto)
        near(found, F.silu(bare + each) + onto)
        one = panels(x[7:8], each[7].float(), True, onto[7:8])
        assert torch.equal(one, found[7:8])


def test_what_would_be_read_where_nothing_is_is_an_error(made):
    panels, x = Panels(made, drawn(20, 8)), drawn(6, 8)
    for add in (drawn(4, 20), drawn(12, 20), drawn(6, 19), drawn(7)):
        with pytest.raises(ValueError, match="to be added to 6 rows of 20"):
            panels(x, add)
    with pytest.raises(ValueError, match="to be added to 6 rows of 20"):
        panels(x, None, True, drawn(5, 20))
    assert panels(drawn(0, 8), drawn(20), True, drawn(0, 20)).shape == (0, 20)


@pytest.mark.parametrize("token", [-1, 5])
def test_a_row_that_is_not_known_is_an_error_before_anything_is_written(made, token):
    table, at, y = drawn(5, 4), torch.tensor([2, token]), torch.full((2, 4), 7.0)
    step = made.step(2, y.data_ptr(), out=4, add=table.data_ptr(), at=at.data_ptr(), known=5)
    with pytest.raises(IndexError, match="none of 5"):
        made.take(made.steps([step]), 2)
    assert (y == 7).all()


def test_a_step_is_the_sources():
    text = (kernels.SOURCES / "products.c").read_text()
    text = text.split("struct step {", 1)[1].split("};", 1)[0]
    lines = [line.split("/*")[0].strip(" ;") for line in text.splitlines()]
    names = [
        name.strip(" *") for line in lines
        if line.startswith(("const ", "float ", "long ", "int "))
        for name in line.removeprefix("const ").split(" ", 1)[1].split(",")
    ]  # fmt: skip
    assert ["inputs" if name == "in" else name for name in names] == [n for n, _ in Step._fields_]
    assert ctypes.sizeof(Step) >= 12 * 8 + 3 * 4


@pytest.mark.parametrize("block", [ResidualBlock(40), FirstBlock(40, 24)])
def test_blocks_are_right_and_pass_gradients(made, block):
    x = drawn(2, 3, 40)
    wanted = block.double()(x.double())
    block.float()
    with torch.inference_mode():
        near(block(x), wanted, 1e-4)
        assert type(block.linear) is products.Linear and block.linear.product().panels is not None
    block(x).sum().backward()
    assert block.linear.weight.grad is not None


# --------------------------------------------------------------------------------- beams


def in_order(scores, log_q, width):
    """The reference: all children by value, then by parent, then by column, in float64 where the
    order does not hang on rounding."""
    scores, log_q = scores.double(), log_q.double()
    total = scores - scores.logsumexp(-1, keepdim=True) + log_q[:, :, None]
    total = total.nan_to_num(-INF, INF, -INF).flatten(1)
    order = total.sort(dim=1, descending=True, stable=True).indices[:, :width]
    return order % scores.shape[-1], order // scores.shape[-1], total.gather(1, order)


@pytest.mark.parametrize("columns", [1, 7, 33, 300, 4099])
@pytest.mark.parametrize("parents", [1, 3])
def test_the_best_children_are_found_and_rows_are_alone(made, parents, columns):
    scores, log_q = 3 * drawn(2, parents, columns), drawn(2, parents, seed=1)
    scores[0, 0, ::5] = -INF
    scores[0, 0, 0] = 1.0
    for width in {1, min(4, columns * parents), min(50, columns * parents)}:  # more than columns
        found = made.best_children(scores, log_q, width)
        tokens, place, value = in_order(scores, log_q, width)
        finite = value.isfinite()
        assert torch.equal(found[0][finite], tokens[finite])
        assert torch.equal(found[1][finite], place[finite])
        near(found[2].nan_to_num(-9.0, 0, -9.0), value.nan_to_num(-9.0, 0, -9.0), 1e-4)
        pairs = (found[1] * columns + found[0]).tolist()
        assert all(len(set(row)) == width and max(row) < parents * columns for row in pairs)
        for row in range(2):
            alone = made.best_children(scores[row : row + 1], log_q[row : row + 1], width)
            assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, found, strict=True))


def test_of_equal_children_the_first_parents_first_columns_come_first(made):
    scores = torch.zeros(1, 3, 200)
    scores[:, :, [5, 150, 151, 190]] = 2.0
    tokens, place, _ = made.best_children(scores, torch.zeros(1, 3), 6)
    assert tokens.tolist() == [[5, 150, 151, 190, 5, 150]] and place.tolist() == [[0] * 4 + [1] * 2]
    tokens, place, _ = made.best_children(scores, torch.tensor([[-1.0, 0.0, 0.0]]), 9)
    assert tokens.tolist() == [[5, 150, 151, 190] * 2 + [5]]
    assert place.tolist() == [[1] * 4 + [2] * 4 + [0]]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_children_without_a_probability_come_last_and_are_none_twice(made, bad):
    """One such score of a node spoils all of its children; of -inf, only all together do."""
    scores, log_q = drawn(1, 2, 100), torch.zeros(1, 2)
    scores[0, 0, slice(None) if bad == -INF else 37] = bad
    tokens, place, value = made.best_children(scores, log_q, 100)
    assert (place == 1).all() and value.isfinite().all()
    tokens, place, value = made.best_children(scores, log_q, 103)
    assert tokens[0, -3:].tolist() == [0, 1, 2] and place[0, -3:].tolist() == [0, 0, 0]
    assert (value[0, -3:] == -INF).all()
    tokens, _, value = made.best_children(scores[:, :1], log_q[:, :1], 4)
    assert tokens.tolist() == [[0, 1, 2, 3]] and (value == -INF).all()


def test_more_children_than_there_are_are_an_error(made):
    for width in (0, 7):
        with pytest.raises(ValueError, match="children of 2 x 3"):
            made.best_children(drawn(1, 2, 3), drawn(1, 2), width)
    with pytest.raises(ValueError, match="children of 2 x 3"):
        made.best_children(drawn(1, 2, 3), drawn(1, 1), 2)


@torch.inference_mode()
def test_drafters_find_their_children_by_kernels_and_torch_finds_the_same(made, monkeypatch):
    scores, log_q = 3 * drawn(2, 3, 500), drawn(2, 3, seed=1)
    scores = scores[..., ::2]  # no rows together
    found = best_children(scores, log_q, 4)
    calls = []
    monkeypatch.setattr(made, "_best_children", lambda *a: calls.append(a))
    best_children(scores, log_q, 4)
    with torch.inference_mode(False):
        wanted = best_children(scores.clone(), log_q.clone(), 4)
    assert len(calls) == 1
    assert torch.equal(found.tokens, wanted.tokens) and torch.equal(found.place, wanted.place)
    near(found.log_q, wanted.log_q)


# ------------------------------------------------------------------------------ recurrent heads

SHAPES = {
    "own": dict(),
    "one block": dict(num_draft_layers=1, embedding_scale="rms"),
    "target": dict(output="target"),
    "narrow": dict(exit_dim=24, embedding_scale="rms"),
    "narrow target": dict(exit_dim=24, num_draft_layers=0, output="target"),
    "pruned": dict(output="target", draft_ids=torch.arange(3, 40)),
}


def float_target():
    return Target(tiny.__wrapped__("llama").model.float())


def head_of(target, **shape):
    torch.manual_seed(0)
    head = RecurrentHead.for_target(target, **shape).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return head


def drafted(head, target, context, rows=slice(None), levels=3, width=3):
    """States and logits of all levels of given paths."""
    states, found = None, []
    tokens = torch.randint(0, 48, (2, width, levels), generator=torch.Generator().manual_seed(4))
    for level in range(1, levels + 1):
        read = tokens[rows, :, level - 1]
        read = read[:, :1] if level == 1 else read
        states, logits = head.read(target, read, context, states, level)
        found += [states, logits]
        states = states.expand(-1, width, -1) if level == 1 else states.flip(1)
    return found


@pytest.fixture
def takes(made, monkeypatch):
    """How often levels were made in one call (what is made of c is a call of one step)."""
    counted, real = [], made._take_steps
    monkeypatch.setattr(
        made, "_take_steps", lambda *a: (counted.extend([a][: a[1] - 1]), real(*a))[1]
    )
    return counted


@torch.inference_mode()
@pytest.mark.parametrize("tabulated", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_level_in_one_call_is_torchs_and_rows_are_alone(takes, shape, tabulated, monkeypatch):
    """tabulated: W e of all tokens, as of a small vocabulary"""
    target = float_target()
    monkeypatch.setattr(recurrent, "_TABLE", 1 << 21 if tabulated else 0)
    head, context = head_of(target, **SHAPES[shape]), drawn(2, 1, target.hidden_size)
    assert head._tabulates == tabulated
    found = drafted(head, target, context)
    assert len(takes) == 3
    for row in range(2):
        alone = drafted(head, target, context[row : row + 1], slice(row, row + 1))
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, found, strict=True))
    monkeypatch.setattr(products, "kernels", None)
    head.eval()
    n = len(takes)
    wanted = drafted(head, target, context)
    assert len(takes) == n
    for a, b in zip(found, wanted, strict=True):
        near(a, b, 1e-4)


def panels_of(head):
    """Of all matrices that it has drafted by."""
    linears = [m._product for m in head.modules() if isinstance(m, products.Linear)]
    first = [] if head._first is None else [head._first.of_c, head._first.of_s]
    made = [*linears, *first, *head._products.values()]
    return [p.panels for p in made if p is not None and p.panels is not None]


@torch.inference_mode()
@pytest.mark.parametrize("tabulated", [True, False])
@pytest.mark.parametrize("output", ["own", "target"])
def test_a_head_drafts_by_rounded_matrices_and_by_its_own_again(
    takes, output, tabulated, monkeypatch
):
    """Those of the head and of the target's vocabulary, but the target's own product stays."""
    monkeypatch.setattr(recurrent, "_TABLE", 1 << 21 if tabulated else 0)
    target = float_target()
    head, context = head_of(target, output=output), drawn(2, 1, target.hidden_size)
    hidden = drawn(3, target.hidden_size)
    projected = target.project(hidden).clone()
    own = drafted(head, target, context)
    assert {p.kind for p in panels_of(head)} == {FLOATS}
    head.round_while_drafting(True)
    found = drafted(head, target, context)
    assert len(takes) == 6 and {p.bytes for p in panels_of(head)} >= {2}
    rounded = copy.deepcopy(head).float()
    for parameter in rounded.parameters():
        if parameter.dim() == 2:
            parameter.copy_(parameter.bfloat16().float())
    if output == "target":
        rounded._frozen_matrix = head._frozen_matrix.bfloat16().float()
    rounded.round_while_drafting(False)
    wanted = drafted(rounded, target, context)
    for a, b, c in zip(found[1:], wanted[1:], own[1:], strict=True):
        # Where the processor multiplies pairs, what is multiplied is rounded, too.
        near(a, b, 2e-2 if kernels.load().pairs else 1e-4)
        assert a.shape == b.shape and not torch.equal(a, c)
        near(a, c, 5e-2)
    assert torch.equal(target.project(hidden), projected)
    head.round_while_drafting(False)
    again = drafted(head, target, context)
    assert all(torch.equal(a, c) for a, c in zip(again, own, strict=True))


@torch.inference_mode()
def test_a_vocabulary_of_bfloat16_numbers_is_not_copied_to_be_rounded(takes):
    model = tiny.__wrapped__("llama").model.float()
    model.lm_head.weight.data.copy_(model.lm_head.weight.bfloat16().float())
    target = Target(model)
    head, context = head_of(target, output="target"), drawn(2, 1, target.hidden_size)
    head.round_while_drafting(True)
    drafted(head, target, context)
    assert list(head._products.values()) == [target.lm_product]


@pytest.mark.parametrize("sampled", [False, True])
def test_a_rounded_draft_changes_no_text(takes, sampled):
    target = float_target()
    head, config = head_of(target), settings(do_sample=sampled)
    rows, drafts = prompts((9, 3, 14)), []
    wanted, _ = alone(target, rows, config, range(3))
    for rounded in (True, False):
        drafter = HeadDrafter(head, target, TreeConfig(2, 3, rounded=rounded))
        made = speculative(target, rows, config, seeds=range(3), drafter=drafter)
        assert made.tokens == wanted
        assert {p.bytes for p in panels_of(head)} >= {2 if rounded else 4}
        drafts.append(drafter.log_q[-1].clone())
    assert takes and not torch.equal(*drafts)


@torch.inference_mode()
def test_drafts_of_one_head_may_take_turns(takes):
    """Whoever shares it, each goes on from its own context."""
    target = float_target()
    head, contexts = head_of(target), drawn(2, 2, 1, target.hidden_size)
    tokens, states, found = torch.tensor([[1], [2]]), [None, None], [[], []]
    for level in (1, 2, 3):
        for i, context in enumerate(contexts):
            states[i], logits = head.read(target, tokens, context, states[i], level)
            found[i].append(logits)
    for context, logits in zip(contexts, found, strict=True):
        state, alone = None, []
        for level in (1, 2, 3):
            state, one = head.read(target, tokens, context, state, level)
            alone.append(one)
        for a, b in zip(alone, logits, strict=True):
            near(a, b, 1e-5)
    assert not torch.allclose(found[0][2], found[1][2])
    assert len(takes) == 12


def test_weights_that_change_are_read_anew_and_copies_of_a_head_are_their_own(takes):
    target = float_target()
    head, context = head_of(target, output="target"), drawn(2, 1, target.hidden_size)
    for part in (head.rnn_u.weight, head.rnn_u.bias, head.lm_head[0].linear.bias,
                 head.lm_head[1].linear.weight, head.to_hidden.weight):  # fmt: skip
        with torch.inference_mode():
            before = drafted(head, target, context)
            other = copy.deepcopy(head)
            assert other._ready is None and pickle.loads(pickle.dumps(head._ready)) is None
        with torch.no_grad():
            part.add_(1.0)
        with torch.inference_mode():
            after = drafted(head, target, context)
            assert not torch.allclose(after[-1], before[-1])
            other.bind(target)
            assert all(torch.equal(a, b) for a, b in zip(drafted(other, target, context), before,
                                                         strict=True))  # fmt: skip
            head.eval()  # where they change without a trace
            again = drafted(head, target, context)
            assert all(torch.equal(a, b) for a, b in zip(again, after, strict=True))


def put_in_place(head, target, what):
    """Something of the head, or that it reads, becomes another."""
    linear = {"map": head.rnn_u, "block": head.lm_head[1].linear}.get(what)
    if linear is not None:
        other = products.Linear(linear.in_features, linear.out_features).eval()
        setattr(*((head, "rnn_u") if what == "map" else (head.lm_head[1], "linear")), other)
    elif what == "matrix":
        head._frozen_matrix = head._frozen_matrix.flip(0)
    elif what == "embeddings":
        target.embedding_weight.data = target.embedding_weight.data.flip(0)
    elif what == "data":
        head.lm_head[1].linear.bias.data = head.lm_head[1].linear.bias.data + 1
    elif what == "weights":
        head.to_hidden.weight.data = head.to_hidden.weight.data.flip(0)
    elif what == "first":
        linear = head.input_proj if head._projects else head.lm_head[0].linear
        linear.weight.data = linear.weight.data.flip(0)
    elif what == "kernels":
        products.kernels = None
    elif what == "renewed":  # as where a text begins, after a change without a trace
        target.lm_head.weight.data.neg_()
        target.lm_product.renew()
    else:
        head.double()


CHANGES = [
    "map", "block", "matrix", "embeddings", "data", "weights", "first", "dtype", "kernels",
    "renewed",
]  # fmt: skip


@torch.inference_mode()
@pytest.mark.parametrize("what", CHANGES)
def test_a_head_that_is_no_more_what_it_was_drafts_as_what_it_is(takes, what, monkeypatch):
    """Between two drafts; what was laid out for the first is not what the second is made by."""
    target = float_target()
    head, context = head_of(target, output="target"), drawn(2, 1, target.hidden_size)
    before = drafted(head, target, context)
    kept = head._ready
    drafted(head, target, context)
    assert head._ready is kept
    monkeypatch.setattr(products, "kernels", products.kernels)  # what it is afterwards, too
    n = len(takes)
    put_in_place(head, target, what)
    other = copy.deepcopy(head)
    other._frozen_matrix = head._frozen_matrix
    if what == "dtype":
        context = context.double()
        head._frozen_matrix = other._frozen_matrix = head._frozen_matrix.double()
    found, wanted = drafted(head, target, context), drafted(other, target, context)
    for a, b in zip(found, wanted, strict=True):
        near(a, b, 1e-4 if what == "kernels" else 0.0)  # by torch the copy, by products the head
    if what in ("dtype", "kernels"):
        assert len(takes) == n
    else:
        assert not torch.allclose(found[-1], before[-1])


@torch.inference_mode()
def test_drafts_of_other_numbers_of_rows_follow_each_other(takes):
    target = float_target()
    head, context = head_of(target), drawn(2, 1, target.hidden_size)
    both = drafted(head, target, context)
    for row in (1, 0):
        alone = drafted(head, target, context[row : row + 1], slice(row, row + 1))
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, both, strict=True))
    again = drafted(head, target, context)
    assert all(torch.equal(a, b) for a, b in zip(again, both, strict=True))
    assert len(head._ready._rooms) == 2


def test_gradients_and_what_kernels_do_not_know_are_torchs(takes):
    target = float_target()
    head, context = head_of(target), drawn(2, 1, target.hidden_size)
    drafted(head, target, context)[-1].sum().backward()
    assert head.rnn_u.weight.grad is not None and not takes
    with torch.inference_mode():
        for shape in (dict(cell="gru"), dict(input_norm=True), dict(state_norm=True),
                      dict(first_state="paper"), dict(num_draft_layers=0)):  # fmt: skip
            drafted(head_of(target, **shape), target, context)
        drafted(head_of(target).double(), target, context.double())
        assert not takes
        drafted(head, target, context)
        assert len(takes) == 3
        for wrong in (torch.tensor([[1], [999]]), torch.tensor([[-1], [1]])):
            with pytest.raises(IndexError):
                head.read(target, wrong, context, None, 1)
        with pytest.raises(RuntimeError):
            head.read(target, torch.ones(3, 1).long(), context, None, 1)
