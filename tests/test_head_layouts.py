"""Medusa's and Hydra's heads as others write them, and speculators: names, logits, drafts."""

import json

import pytest
import safetensors.torch
import torch
from head_kinds import make_head
from models import prompts, settings, tiny
from torch import nn
from torch.nn import functional as F

from redrafter.cli.convert_head import main
from redrafter.contracts import InputError
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.drafters.build import Resources, build_drafter
from redrafter.heads.load import load_head

VOCAB, HIDDEN, HEADS = 48, 32, 3


@pytest.fixture(scope="module")
def saved_target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    tiny("llama").model.save_pretrained(folder)
    return folder


def convert(head, to, out, *target):
    given = ["--head", str(head), "--to", to, "--out", str(out), "--target.dtype", "float64"]
    return main(given + ["--target.path", str(*target)] if target else given[:-2])


def logits_of(head, target, c, tokens):
    """(P, K, V) along given paths, by the calls of a drafter. c: (P, H); tokens: (P, K)."""
    states, found = None, []
    for level, read in enumerate(tokens.unbind(1), start=1):
        states, logits = head.read(target, read[:, None], c[:, None], states, level)
        found.append(logits[:, 0])
    return torch.stack(found, 1)


def some(n=5):
    g = torch.Generator().manual_seed(8)
    c = torch.randn(n, HIDDEN, generator=g, dtype=torch.float64)
    return c, torch.randint(VOCAB, (n, HEADS), generator=g)


def check_drafts(head, target):
    """Its drafts are verified as anybody's, and some are taken."""
    rows, config = prompts(), settings(eos_token_id=-1)
    texts = [plain(target, [row], config).tokens[0] for row in rows]
    drafter = build_drafter(f"head:3x{HEADS}", target, Resources(head=head))
    made = speculative(target, rows, config, drafter=drafter)
    assert made.tokens == texts and sum(made.stats.accepted_at) > 0


# ----------------------------------------------------------------------------------------- Medusa


class Block(nn.Module):
    def __init__(self, width, out=None):
        super().__init__()
        self.linear = nn.Linear(width, out or width)
        if out is not None:
            self.res_connection = nn.Linear(width, out)

    def forward(self, x):
        kept = self.res_connection(x) if hasattr(self, "res_connection") else x
        return kept + F.silu(self.linear(x))


def fasterdecoding(blocks=1):
    """Their list of heads: residual blocks, then a matrix."""
    torch.manual_seed(2)
    return nn.ModuleList(
        nn.Sequential(*(Block(HIDDEN) for _ in range(blocks)), nn.Linear(HIDDEN, VOCAB, bias=False))
        for _ in range(HEADS)
    ).double()


def in_vllm(folder, c):
    """What vLLM's MedusaModel makes of a folder: its names, its fields, its forward."""
    config = json.loads((folder / "config.json").read_text())
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert (config["architectures"], config["model_type"]) == (["MedusaModel"], "medusa")
    assert (config["vocab_size"], config["hidden_size"]) == (VOCAB, HIDDEN)
    assert config["truncated_vocab_size"] == VOCAB
    read, found = set(), []
    for i in range(config["num_heads"]):
        x = c
        for j in range(config["num_hidden_layers"]):
            names = [f"blocks.{i}.layers.{j}.{end}" for end in ("weight", "bias")]
            read |= set(names)
            bias = weights[names[1]] if config["medusa_fc_bias"] else None
            x = x + F.silu(F.linear(x, weights[names[0]], bias))
        matrix = f"lm_heads.{0 if config['original_lm_head'] else i}.weight"
        read.add(matrix)
        found.append(F.linear(x, weights[matrix]))
    assert read == weights.keys(), "tensors that vLLM would not look at"
    return torch.stack(found, 1)


@pytest.mark.parametrize("case", ["medusa", "medusa-target"])
@torch.no_grad()
def test_our_medusa_is_vllms(tmp_path, saved_target, case, capsys):
    target = tiny("llama")
    head = make_head(target, case)
    head.save_pretrained(tmp_path / "ours")
    where = [saved_target] if case == "medusa-target" else []
    assert convert(tmp_path / "ours", "vllm-medusa", tmp_path / "vllm", *where) == 0
    c, tokens = some()
    wanted = logits_of(head, target, c, tokens)
    torch.testing.assert_close(in_vllm(tmp_path / "vllm", c), wanted, atol=1e-12, rtol=0)
    again = load_head(tmp_path / "vllm", target)
    torch.testing.assert_close(logits_of(again, target, c, tokens), wanted, atol=1e-12, rtol=0)
    if not where:
        assert again.fingerprint() == head.fingerprint()
        return
    with pytest.raises(SystemExit):
        convert(tmp_path / "ours", "vllm-medusa", tmp_path / "no")
    assert "the layout vllm-medusa has it in the head" in capsys.readouterr().err


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("prefix", ["", "medusa_head."])
@torch.no_grad()
def test_fasterdecodings_heads_load(tmp_path, blocks, prefix):
    theirs, target = fasterdecoding(blocks), tiny("llama")
    weights = {prefix + name: t.clone() for name, t in theirs.state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "medusa_lm_head.safetensors")
    # As published: without a model_type, and with a number of heads that is not that of the file.
    config = {"medusa_num_heads": 2, "medusa_num_layers": blocks,
              "base_model_name_or_path": "org/vicuna"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    head = load_head(tmp_path, target)
    assert (head.max_depth, head.config.target_name) == (HEADS, "vicuna")
    c, tokens = some()
    wanted = torch.stack([one(c) for one in theirs], 1)
    torch.testing.assert_close(logits_of(head, target, c, tokens), wanted, atol=1e-12, rtol=0)
    if blocks == 1:
        check_drafts(head, target)


def test_a_pruned_map_of_vllm_is_read(tmp_path):
    ids = torch.arange(1, VOCAB, 5)
    theirs = fasterdecoding()
    weights = {f"lm_heads.{i}.weight": one[1].weight.detach() for i, one in enumerate(theirs)}
    weights |= {f"blocks.{i}.layers.0.weight": one[0].linear.weight.detach()
                for i, one in enumerate(theirs)}  # fmt: skip
    safetensors.torch.save_file(weights | {"token_map": ids}, tmp_path / "model.safetensors")
    config = {"model_type": "medusa", "vocab_size": VOCAB, "num_heads": HEADS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    head = load_head(tmp_path, tiny("llama"))
    assert torch.equal(head.to_vocab_ids(torch.arange(len(ids))), ids)
    assert torch.equal(head.vocab_matrix(2), weights["lm_heads.1.weight"][ids])
    assert not any(p.any() for n, p in head.named_parameters() if n.endswith("bias"))


def test_what_is_no_medusa_is_named(tmp_path):
    def refused(match, weights, **config):
        file = tmp_path / "medusa_lm_head.safetensors"
        safetensors.torch.save_file(weights, file)
        (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": HEADS, **config}))
        with pytest.raises(InputError, match=match):
            load_head(tmp_path)

    weights = {name: t.clone() for name, t in fasterdecoding().state_dict().items()}
    refused(r"unknown tensors \['what'\]", weights | {"what": torch.ones(1)})
    fewer = {n: t for n, t in weights.items() if n != "1.0.linear.weight"}
    refused(r"blocks\.1\.0\.linear\.weight", fewer)
    refused(r"lm_heads\.2\.weight", weights | {"2.1.weight": torch.ones(VOCAB - 1, HIDDEN)})
    refused("no matrix", {"0.0.linear.weight": torch.ones(2, 2)})
    (tmp_path / "medusa_lm_head.safetensors").unlink()
    torch.save(weights, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(InputError, match=r"medusa_lm_head\.pt alone, a pickle") as refusal:
        load_head(tmp_path)
    assert "'medusa_lm_head.safetensors')" in str(refusal.value), "the line writes what is read"


# ------------------------------------------------------------------------------------------ Hydra


def hydras(blocks):
    torch.manual_seed(4)
    mlp = nn.ModuleList(
        nn.Sequential(Block((k + 2) * HIDDEN, HIDDEN), *(Block(HIDDEN) for _ in range(blocks - 1)))
        for k in range(HEADS)
    )
    lm_head = nn.ModuleList(nn.Linear(HIDDEN, VOCAB) for _ in range(HEADS))
    return nn.ModuleDict({"hydra_mlp": mlp, "hydra_lm_head": lm_head}).double()


def save_hydra(folder, theirs, **changes):
    safetensors.torch.save_file(theirs.state_dict(), folder / "hydra_lm_head.safetensors")
    config = {"hydra_num_heads": HEADS, "hydra_num_layers": 1, "hydra_head_arch": "mlp",
              "grounded_heads": True, "hidden_state_offset": 0, **changes}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("blocks", [1, 2])
@torch.no_grad()
def test_hydras_heads_load(tmp_path, blocks):
    theirs, target = hydras(blocks), tiny("llama")
    head = load_head(save_hydra(tmp_path, theirs), target)
    c, tokens = some()
    wanted = []
    for k in range(HEADS):  # head k's input: the state, then what is known and drafted before
        x = torch.cat((c, target.embed(tokens[:, : k + 1]).flatten(1)), -1)
        wanted.append(theirs["hydra_lm_head"][k](theirs["hydra_mlp"][k](x)))
    found = logits_of(head, target, c, tokens)
    torch.testing.assert_close(found, torch.stack(wanted, 1), atol=1e-12, rtol=0)
    if blocks == 1:
        check_drafts(head, target)
    head.save_pretrained(tmp_path / "ours")
    again = load_head(tmp_path / "ours", target)
    assert torch.equal(logits_of(again, target, c, tokens), found), "the bias is kept"


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"hydra_head_arch": "prefix-mlp"}, "hydra_head_arch = 'prefix-mlp'"),
     ({"grounded_heads": False}, "grounded_heads = False"),
     ({"hidden_state_offset": 1}, "hidden_state_offset = 1")],
)  # fmt: skip
def test_other_hydras_are_refused_by_name(tmp_path, changes, named):
    with pytest.raises(InputError, match=named):
        load_head(save_hydra(tmp_path, hydras(1), **changes))


# ------------------------------------------------------------------------------------- conversion


def test_a_layout_takes_heads_of_its_kind(tmp_path, saved_target, capsys):
    target = tiny("llama")
    for case in ("medusa", "medusa-pruned", "mlp_speculator-tied"):
        make_head(target, case).save_pretrained(tmp_path / case)

    def refused(case, to):
        with pytest.raises(SystemExit):
            convert(tmp_path / case, to, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "this is a mlp_speculator head" in refused("mlp_speculator-tied", "vllm-medusa")
    assert "this is a medusa head" in refused("medusa", "mlp_speculator")
    assert "this is a medusa head" in refused("medusa", "apple")
    assert "without draft_vocab_size" in refused("medusa-pruned", "vllm-medusa")
    assert convert(tmp_path / "mlp_speculator-tied", "mlp_speculator", tmp_path / "ibm") == 0
    one, two = (load_head(tmp_path / name) for name in ("mlp_speculator-tied", "ibm"))
    assert one.fingerprint() == two.fingerprint()


def test_others_heads_become_ours(tmp_path, saved_target):
    """With an owner from then on, and the code that transformers runs."""
    (tmp_path / "theirs").mkdir()
    folder = save_hydra(tmp_path / "theirs", hydras(1))
    assert convert(folder, "redrafter", tmp_path / "ours", saved_target) == 0
    assert (tmp_path / "ours/custom_generate/heads_hydra.py").is_file()
    with pytest.raises(InputError, match="trained for another target"):
        load_head(tmp_path / "ours", tiny("qwen3"))
