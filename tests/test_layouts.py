"""Apple's layout both ways: names, configuration keys, logits, and drafts stay the same."""

import json

import pytest
import safetensors.torch
import torch
from models import prompts, settings, tiny
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from redrafter.cli.convert_head import main
from redrafter.config import TreeConfig
from redrafter.contracts import InputError
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.drafters.head import HeadDrafter
from redrafter.export.layouts import convert
from redrafter.heads.load import load_head
from redrafter.heads.mlp_speculator import MLPSpeculator, SpeculatorConfig
from redrafter.heads.recurrent import RecurrentHead
from redrafter.targets.load import load_target

# ------------------------------------------------------- Apple's drafter, from its description


class AppleConfig(PretrainedConfig):
    model_type = "recurrent_drafting_drafter"

    def __init__(self, vocab_size=-1, hidden_size=-1, exit_dim=-1, num_draft_layers=-1,
                 num_lookback_tokens=-1, rnn=False, **kwargs):  # fmt: skip
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.exit_dim = vocab_size, hidden_size, exit_dim
        self.num_draft_layers, self.num_lookback_tokens = num_draft_layers, num_lookback_tokens
        self.rnn = rnn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + F.silu(self.linear(x))


class Drafter(PreTrainedModel):
    config_class = AppleConfig

    def __init__(self, config):
        super().__init__(config)
        hidden, width = config.hidden_size, config.exit_dim
        if width != 2 * hidden:
            self.input_proj = nn.Linear(2 * hidden, width)
        blocks = [Block(width) for _ in range(config.num_draft_layers)]
        self.lm_head = nn.Sequential(*blocks, nn.Linear(width, config.vocab_size, bias=False))
        if config.rnn:
            self.rnn_u = nn.Linear(hidden, hidden)
            self.rnn_w = nn.Linear(hidden, hidden, bias=False)
        self.post_init()

    def _init_weights(self, module):
        pass

    def logits(self, c, embeddings):
        """(..., V) after each of `embeddings` (K, ..., H), as their beam search computes them."""
        state, found = torch.zeros_like(c), []
        for e in embeddings:
            state = F.silu(self.rnn_w(e) + self.rnn_u(state)) if self.config.rnn else e + state
            x = torch.cat([c, state], dim=-1)
            found.append(self.lm_head(self.input_proj(x) if hasattr(self, "input_proj") else x))
        return found


def load_as_apple(folder):
    """By transformers, as their code does; every weight must have been found, and used."""
    drafter, info = Drafter.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in info), info
    return drafter.double()


def their_json(folder):
    """config.json; the dtype's key has another name in today's transformers than in Apple's."""
    fields = json.loads((folder / "config.json").read_text())
    if "dtype" in fields:
        fields["torch_dtype"] = fields.pop("dtype")
    return fields


# ------------------------------------------------------------------------------------- the tests

CASES = {
    "recurrent": dict(exit_dim=64, num_draft_layers=2, rnn=True),
    "projected": dict(exit_dim=11, num_draft_layers=1, rnn=True),
    "sum": dict(exit_dim=64, num_draft_layers=0, rnn=False),
    "projected-sum": dict(exit_dim=40, num_draft_layers=3, rnn=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_apples_folders_in_and_out(tmp_path, case, dtype):
    torch.manual_seed(5)
    theirs = Drafter(AppleConfig(vocab_size=48, hidden_size=32, **CASES[case])).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    head = load_head(tmp_path / "theirs")
    assert head.dtype_of_weights is dtype, "read in another precision than it is stored in"

    c, embeddings = torch.randn(2, 5, 32).double(), torch.randn(4, 2, 5, 32).double()
    wanted, state = theirs.double().logits(c, embeddings), None
    head = head.double()
    for e, logits in zip(embeddings, wanted, strict=True):
        state = head.step(e, state)
        torch.testing.assert_close(head.logits(c, state), logits, atol=1e-12, rtol=0)

    convert(tmp_path / "theirs", "apple", tmp_path / "again")
    assert their_json(tmp_path / "again") == their_json(tmp_path / "theirs")
    one, two = (
        safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        for name in ("theirs", "again")
    )
    assert one.keys() == two.keys()
    assert all(one[k].dtype == two[k].dtype and torch.equal(one[k], two[k]) for k in one)


#: fields of our heads that Apple's layout can take
OURS = {
    "plain": {},
    "scaled": dict(embedding_scale="rms"),
    "borrowed": dict(output="target", embedding_scale="rms", exit_dim=24),
    "sum": dict(cell="sum", num_draft_layers=1),
}


@pytest.fixture(scope="module")
def saved_target(tmp_path_factory):
    """A folder of the tiny target, which a command can load."""
    folder = tmp_path_factory.mktemp("target")
    tiny("llama").model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def double(saved_target):
    from redrafter.config import TargetConfig

    return load_target(TargetConfig(str(saved_target), dtype="float64"))


@pytest.mark.parametrize("case", OURS)
def test_our_heads_out_and_in(tmp_path, saved_target, double, case, capsys):
    torch.manual_seed(7)
    head = RecurrentHead.for_target(double, **OURS[case]).double()
    with torch.no_grad():  # peaky, so that beams compete over parents
        for p in head.parameters():
            p.mul_(3.0)
    head.save_pretrained(tmp_path / "ours")
    target = ["--target.path", str(saved_target), "--target.dtype", "float64"]
    out = [str(tmp_path / name) for name in ("ours", "apple", "back")]
    assert main(["--head", out[0], "--to", "apple", "--out", out[1], *target]) == 0
    assert main(["--head", out[1], "--to", "redrafter", "--out", out[2], *target]) == 0
    assert "made for" in capsys.readouterr().out
    theirs = load_as_apple(tmp_path / "apple")
    assert their_json(tmp_path / "apple").keys() == {
        "architectures", "exit_dim", "hidden_size", "model_type", "num_draft_layers",
        "num_lookback_tokens", "rnn", "torch_dtype", "transformers_version", "vocab_size",
    }  # fmt: skip
    stored = safetensors.torch.load_file(tmp_path / "apple" / "model.safetensors")
    assert stored.keys() == theirs.state_dict().keys()

    tokens = torch.randint(48, (4, 5))
    c = torch.randn(5, 32).double()
    wanted, state = theirs.logits(c, double.embed(tokens)), None
    for e, logits in zip(double.embed(tokens), wanted, strict=True):
        state = head.step(e, state)
        torch.testing.assert_close(head.logits(c, state), logits, atol=1e-5, rtol=1e-5)
    texts, accepted = drafted(double, head)
    assert sum(accepted) > 0, "nothing was accepted: equal counts would say little"
    for folder in ("apple", "back"):
        again = load_head(tmp_path / folder, double)
        assert drafted(double, again) == (texts, accepted)
    assert again.config.target_fingerprint == double.fingerprint()


def drafted(target, head):
    """Texts, and tokens accepted by depth: the same drafts are accepted alike."""
    drafter = HeadDrafter(head, target, TreeConfig(4, 4))
    rows = prompts((9, 3, 14, 8, 5, 11))
    made = speculative(target, rows, settings(eos_token_id=-1), drafter=drafter)
    return made.tokens, made.stats.accepted_at


def test_a_converted_head_remembers_its_target_and_its_training(tmp_path, saved_target, double):
    head = RecurrentHead.for_target(double)
    head.save_pretrained(tmp_path / "ours")
    rows = {"source": {"path": "prompts.jsonl", "holdout_rows": 7}}
    (tmp_path / "ours" / "provenance.json").write_text(json.dumps(rows))
    convert(tmp_path / "ours", "apple", tmp_path / "apple", double)
    facts = json.loads((tmp_path / "apple" / "provenance.json").read_text())
    assert facts["converted_from"] == {"head": "ours", "provenance": rows}
    unknown = load_head(tmp_path / "apple", double)  # Apple's files say nothing of it
    assert unknown.config.target_fingerprint == ""
    convert(tmp_path / "apple", "redrafter", tmp_path / "back", double)
    assert (tmp_path / "back" / "custom_generate" / "generate.py").is_file()
    with pytest.raises(InputError, match="trained for another target"):
        load_head(tmp_path / "back", tiny("qwen3"))


def test_a_head_stored_in_half_precision_computes_as_its_target_does(tmp_path, double, capsys):
    torch.manual_seed(3)
    head = RecurrentHead.for_target(double, draft_ids=torch.arange(0, 48, 2))
    head.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", "redrafter", tmp_path / "small", double, "bfloat16")
    size = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("ours", "small")]
    assert size[1] < 0.6 * size[0]
    assert {p.dtype for p in load_head(tmp_path / "small").parameters()} == {torch.bfloat16}
    ours, small = (load_head(tmp_path / n, double) for n in ("ours", "small"))
    for (name, was), now in zip(ours.named_parameters(), small.parameters(), strict=True):
        assert now.dtype == torch.float32, name
        assert torch.equal(now, was.bfloat16().float()), name
    rows = prompts((9, 3, 14))
    made = speculative(double, rows, settings(eos_token_id=-1),
                       drafter=HeadDrafter(small, double, TreeConfig(4, 4)))  # fmt: skip
    assert made.tokens == plain(double, rows, settings(eos_token_id=-1)).tokens

    with torch.no_grad():
        head.lm_head[0].linear.weight[0, 0] = 1e6
    head.save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match="beyond the range of float16: take bfloat16"):
        convert(tmp_path / "wide", "redrafter", tmp_path / "out", double, "float16")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_converted_is_said_before_anything_is_written(tmp_path, double, capsys):
    def refused(*argv):
        with pytest.raises(SystemExit) as ended:
            main([*argv])
        assert ended.value.code == 2
        assert not list(tmp_path.glob("*out*"))
        return capsys.readouterr().err

    out = str(tmp_path / "out")
    for name, fields in (("gru", dict(cell="gru")), ("borrowed", dict(output="target"))):
        RecurrentHead.for_target(double, **fields).save_pretrained(tmp_path / name)
    assert "cell = 'gru'" in refused("--head", f"{tmp_path}/gru", "--to", "apple", "--out", out)
    message = refused("--head", f"{tmp_path}/borrowed", "--to", "apple", "--out", out)
    assert "--target.path" in message
    full = str(tmp_path / "gru")
    assert "exists" in refused("--head", full, "--to", "redrafter", "--out", full)
    (tmp_path / "spec").mkdir()
    ibm = dict(model_type="mlp_speculator", vocab_size=48, emb_dim=32, inner_dim=8, n_predict=2)
    weights = MLPSpeculator(SpeculatorConfig(
        vocab_size=48, hidden_size=32, inner_dim=8, n_predict=2
    )).state_dict()
    safetensors.torch.save_file(weights, tmp_path / "spec" / "model.safetensors")
    (tmp_path / "spec" / "config.json").write_text(json.dumps(ibm))
    message = refused("--head", f"{tmp_path}/spec", "--to", "apple", "--out", out)
    assert "this is a mlp_speculator head" in message


def test_shards_are_read_and_named(tmp_path):
    head = Drafter(AppleConfig(vocab_size=48, hidden_size=32, **CASES["recurrent"]))
    head.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    loaded = load_head(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], p) for name, p in head.state_dict().items())
    shards[1].unlink()
    with pytest.raises(InputError, match=shards[1].name):
        load_head(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(InputError, match="names no shards beside it"):
        load_head(tmp_path)
