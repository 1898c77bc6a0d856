"""The recurrent head: its maths, its alignment, its files, and what is refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from redrafter.contracts import InputError
from redrafter.heads.apple import load_apple, save_apple
from redrafter.heads.load import load_head
from redrafter.heads.recurrent import RecurrentHead, RecurrentHeadConfig
from redrafter.targets.adapters import WeightDigests

#: a target whose "tokens" are embeddings already
AS_IS = SimpleNamespace(embed=lambda embeddings: embeddings)


class FakeTarget:
    """What a head asks of a target."""

    device = torch.device("cpu")

    def __init__(self, vocab_size, hidden_size, fingerprint="f1", scale=1.0):
        self.vocab_size, self.hidden_size, self.name = vocab_size, hidden_size, "fake"
        g = torch.Generator().manual_seed(vocab_size + hidden_size)
        self.table = torch.randn(vocab_size, hidden_size, generator=g) * scale
        self.lm_head_weight = torch.randn(vocab_size, hidden_size, generator=g)
        self._fingerprint = fingerprint

    def fingerprint(self):
        return self._fingerprint

    def digests(self):
        return WeightDigests(self._fingerprint)

    def probe(self):
        return {"hidden": [1.0], "logits": [1.0]}

    def embed(self, tokens):
        return self.table[tokens]


def make(vocab_size=31, hidden_size=8, **fields):
    torch.manual_seed(3)
    return RecurrentHead(
        RecurrentHeadConfig(vocab_size=vocab_size, hidden_size=hidden_size, **fields)
    )


def apple_logits(weights, config, c, embeddings):
    """Apple's drafter over a path, written from its description alone. embeddings: (K, P, H)."""
    state, all_logits = torch.zeros_like(c), []
    for e in embeddings:
        if config["rnn"]:
            recurrent = F.linear(state, weights["rnn_u.weight"], weights["rnn_u.bias"])
            state = F.silu(F.linear(e, weights["rnn_w.weight"]) + recurrent)
        else:
            state = state + e
        x = torch.cat((c, state), -1)
        if config["exit_dim"] != 2 * config["hidden_size"]:
            x = F.linear(x, weights["input_proj.weight"], weights["input_proj.bias"])
        n = config["num_draft_layers"]
        for i in range(n):
            block = f"lm_head.{i}.linear"
            x = x + F.silu(F.linear(x, weights[f"{block}.weight"], weights[f"{block}.bias"]))
        all_logits.append(F.linear(x, weights[f"lm_head.{n}.weight"]))
    return all_logits


def apple_folder(folder, vocab, hidden, exit_dim, blocks, rnn):
    """A drafter with random weights, as Apple's code saves it."""
    torch.manual_seed(vocab)
    layers = {f"lm_head.{i}.linear": nn.Linear(exit_dim, exit_dim) for i in range(blocks)}
    layers[f"lm_head.{blocks}"] = nn.Linear(exit_dim, vocab, bias=False)
    if rnn:
        layers["rnn_u"] = nn.Linear(hidden, hidden)
        layers["rnn_w"] = nn.Linear(hidden, hidden, bias=False)
    if exit_dim != 2 * hidden:
        layers["input_proj"] = nn.Linear(2 * hidden, exit_dim)
    weights = {
        f"{name}.{kind}": p.detach()
        for name, layer in layers.items()
        for kind, p in layer.named_parameters()
    }
    config = dict(
        model_type="recurrent_drafting_drafter", vocab_size=vocab, hidden_size=hidden,
        exit_dim=exit_dim, num_draft_layers=blocks, num_lookback_tokens=-1, rnn=rnn,
    )  # fmt: skip
    folder.mkdir()
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return weights, config


def run(head, c, embeddings):
    """Logits of every step, by the same calls as a drafter makes."""
    state, found = None, []
    for e in embeddings:
        state = head.step(e, state)
        found.append(head.logits(c, state))
    return found


@pytest.mark.parametrize(
    ("vocab", "hidden", "exit_dim", "blocks", "rnn"),
    [(31, 8, 16, 2, True), (7, 4, 10, 1, True), (50, 6, 12, 0, True), (19, 8, 5, 3, False)],
)
def test_apples_drafters_give_apples_logits(tmp_path, vocab, hidden, exit_dim, blocks, rnn):
    weights, config = apple_folder(tmp_path / "apple", vocab, hidden, exit_dim, blocks, rnn)
    head = load_head(tmp_path / "apple")
    c, embeddings = torch.randn(5, hidden), torch.randn(4, 5, hidden)
    wanted = apple_logits(weights, config, c, embeddings)
    for k, (ours, theirs) in enumerate(zip(run(head, c, embeddings), wanted, strict=True)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, msg=f"step {k + 1}")
    # The reference must be able to disagree: a changed state changes what follows.
    assert not torch.allclose(wanted[1], apple_logits(weights, config, c, embeddings[1:])[0])

    save_apple(head, tmp_path / "back")
    again = safetensors.torch.load_file(tmp_path / "back" / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert all(back[k] == v for k, v in config.items() if k != "num_lookback_tokens")


def test_the_scale_of_embeddings_is_folded_for_apple(tmp_path):
    target = FakeTarget(31, 8, scale=0.02)
    head = RecurrentHead.for_target(target, embedding_scale="rms")
    scaled = target.table * head.inverse_rms
    assert scaled.pow(2).mean().item() == pytest.approx(1.0, abs=1e-5)
    save_apple(head, tmp_path / "apple")
    c, embeddings = torch.randn(5, 8), target.embed(torch.randint(31, (3, 5)))
    assert head.inverse_rms > 10, "a scale near one would test nothing"
    for ours, theirs in zip(
        run(head, c, embeddings), run(load_apple(tmp_path / "apple"), c, embeddings), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "fields",
    [
        dict(first_state="paper"), dict(cell="gru"), dict(input_norm=True),
        dict(draft_vocab_size=9), dict(cell="sum", embedding_scale="rms"), dict(state_norm=True),
    ],
    ids=lambda fields: "-".join(fields),
)  # fmt: skip
def test_what_apples_format_cannot_express_is_refused(tmp_path, fields):
    with pytest.raises(InputError, match=next(reversed(fields))):
        save_apple(make(**fields), tmp_path / "apple")
    assert not (tmp_path / "apple").exists()


VARIANTS = [
    dict(),
    dict(exit_dim=11, num_draft_layers=1),
    dict(first_state="paper", embedding_scale="rms"),
    dict(cell="gru", input_norm=True, state_norm=True),
    dict(cell="sum", output="target"),
    dict(draft_ids=torch.tensor([2, 3, 11, 30])),
    dict(output="target", draft_ids=torch.tensor([0, 29])),
]


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda f: "-".join(f) or "default")
def test_saving_loses_nothing(tmp_path, fields):
    target = FakeTarget(31, 8)
    head = RecurrentHead.for_target(target, **fields, trained_depth=5)
    head.save_pretrained(tmp_path)
    c, embeddings = torch.randn(2, 1, 8), torch.randn(3, 2, 4, 8)
    wanted = run(head, c, embeddings)
    for again in (load_head(tmp_path, target), RecurrentHead.from_pretrained(tmp_path)):
        found = run(again.bind(target), c, embeddings)
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
        assert again.config.trained_depth == 5
        assert again.config.target_fingerprint == target.fingerprint()
        columns = torch.arange(again.draft_vocab_size)
        assert wanted[0].shape[-1] == len(columns)
        ids = fields.get("draft_ids", columns)
        assert torch.equal(again.to_vocab_ids(columns), ids)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    frozen = [name for name, t in stored.items() if t.shape == target.lm_head_weight.shape]
    assert not (head.draws_on_target and frozen), "the target's matrix was saved with the head"


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda f: "-".join(f) or "default")
def test_any_leading_shape_and_the_whole_path_at_once(fields):
    target = FakeTarget(31, 8)
    head = RecurrentHead.for_target(target, **fields)
    c, embeddings = torch.randn(2, 3, 8), torch.randn(2, 3, 5, 8)
    by_step = run(head, c, embeddings.unbind(2))
    whole = F.linear(head(c, embeddings, AS_IS), head.vocab_matrix())
    for k, logits in enumerate(by_step):
        torch.testing.assert_close(whole[:, :, k], logits, atol=1e-5, rtol=0)
        row = run(head, c[1, 2], embeddings[1, 2])[k]
        torch.testing.assert_close(row, logits[1, 2], atol=1e-5, rtol=0)
    later = embeddings.clone()
    later[:, :, 3] += 1
    moved = F.linear(head(c, later, AS_IS), head.vocab_matrix())
    assert torch.equal(moved[:, :, :3], whole[:, :, :3]), "a step saw a later embedding"
    assert not torch.allclose(moved[:, :, 4], whole[:, :, 4]), "the state was forgotten"


def test_the_papers_first_state_is_the_embedding():
    e = torch.randn(3, 8)
    assert torch.equal(make(first_state="paper").step(e), e)
    code = make(first_state="code")
    torch.testing.assert_close(code.step(e), F.silu(F.linear(e, code.rnn_w.weight,
                                                             code.rnn_u.bias)))  # fmt: skip


def test_a_bound_matrix_is_shared_and_a_missing_one_is_named():
    target = FakeTarget(31, 8)
    head = RecurrentHead.for_target(target, output="target")
    assert head.vocab_matrix().data_ptr() == target.lm_head_weight.data_ptr()
    assert "lm_head_weight" not in dict(head.named_parameters())
    with pytest.raises(InputError, match="bind"):
        make(output="target").logits(torch.zeros(1, 8), torch.zeros(1, 8))
    with pytest.raises(InputError, match="31 x 8"):
        head.bind(FakeTarget(31, 9))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(cell="lstm"), "cell"), (dict(vocab_size=0), "vocab_size"),
        (dict(num_draft_layers=-1), "num_draft_layers"),
        (dict(draft_vocab_size=99), "draft_vocab_size"), (dict(output="tied"), "output"),
    ],
)  # fmt: skip
def test_nonsense_in_a_config_is_named(fields, named):
    with pytest.raises(InputError, match=named):
        make(**fields)


def saved(tmp_path, **fields):
    head = RecurrentHead.for_target(FakeTarget(31, 8), **fields)
    head.save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def test_a_head_of_another_target_is_refused(tmp_path):
    folder = saved(tmp_path)
    for other, named in (
        (FakeTarget(31, 9), "hidden_size"),
        (FakeTarget(32, 8), "vocab_size"),
        (FakeTarget(31, 8, "f2"), "allow_other_target"),
    ):
        with pytest.raises(InputError, match=named) as error:
            load_head(folder, other)
        assert str(folder) in str(error.value)
    load_head(folder, FakeTarget(31, 8, "f2"), allow_other_target=True)
    load_head(folder, FakeTarget(31, 8))


def _truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])


def _drop_a_tensor(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["rnn_u.bias"]
    safetensors.torch.save_file(weights, folder / "model.safetensors")


def _other_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 30}))


def _pickle(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def _other_kind(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_truncate, "model.safetensors is damaged"), (_drop_a_tensor, "rnn_u.bias"),
        (_other_shape, "model.safetensors: tensor"), (_pickle, "pytorch_model.bin alone, a pickle"),
        (_other_kind, "llama"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid"),
        (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
        (shutil.rmtree, "does not exist, and is no owner/name of the Hub"),
    ],
)  # fmt: skip
def test_a_damaged_head_is_refused_by_name(tmp_path, damage, named):
    folder = saved(tmp_path)
    load_head(folder)
    damage(folder)
    with pytest.raises(InputError, match=named) as error:
        load_head(folder)
    assert str(folder) in str(error.value)
