"""A larger model that computes what a small one does, and a head that goes with it."""

import contextlib
import importlib.util
import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import prompts, settings
from transformers import AutoConfig, AutoModelForCausalLM

from redrafter.config import CostsConfig, TargetConfig, TreeConfig
from redrafter.contracts import InputError
from redrafter.decode.speculative import speculative
from redrafter.drafters.head import HeadDrafter
from redrafter.evaluation.models import load_both
from redrafter.evaluation.pictures import title_of
from redrafter.evaluation.report import write_result
from redrafter.export.inflated import write_target
from redrafter.export.inflated_head import inflate_head
from redrafter.heads.load import load_head
from redrafter.heads.recurrent import RecurrentHead, RecurrentHeadConfig
from redrafter.targets.inflation import Shape, check, inflate
from redrafter.targets.load import load_target

SMALL = dict(
    vocab_size=48, hidden_size=24, intermediate_size=40, num_hidden_layers=2, head_dim=6,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    rms_norm_eps=1e-3, initializer_range=0.3, bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
FAMILIES = {
    "llama": dict(attention_bias=True, mlp_bias=True),
    "llama tied": dict(tie_word_embeddings=True),
    "llama stretched": dict(
        rope_parameters=dict(
            rope_type="llama3", rope_theta=1000.0, factor=4.0, low_freq_factor=1.0,
            high_freq_factor=4.0, original_max_position_embeddings=16,
        )
    ),
    "mistral": dict(sliding_window=5),
    "qwen2": dict(
        use_sliding_window=True, sliding_window=5, max_window_layers=1, tie_word_embeddings=False
    ),
    "qwen3": dict(attention_bias=True),
}  # fmt: skip
#: what grows: each alone, all at once, and fewer query heads to a key-value head than before
SHAPES = {
    "width": dict(hidden_size=40),
    "head width": dict(head_dim=10),
    "groups": dict(num_attention_heads=12),
    "repeated": dict(num_attention_heads=6, num_key_value_heads=6),
    "mlp": dict(intermediate_size=56),
    "layers": dict(num_hidden_layers=4),
    "all": dict(
        hidden_size=64, head_dim=16, num_attention_heads=12, num_key_value_heads=4,
        intermediate_size=96, num_hidden_layers=3,
    ),
}  # fmt: skip


def small(name: str, dtype=torch.float32, **changes):
    """Norms and biases are drawn too: ones and zeros would hide a factor."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(name.split()[0], **{**SMALL, **FAMILIES[name], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for part in model.parameters():
            if part.dim() == 1:
                part.uniform_(0.5, 1.5)
    return model


def shape(model, **changes) -> Shape:
    return Shape(**{**vars(Shape.of(model.config)), **changes})


def logits(model) -> torch.Tensor:
    ids = torch.tensor(prompts((19, 19)))
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(
    ("family", "grows"),
    [(family, "all") for family in FAMILIES]
    + [(family, grows) for family in ("llama", "qwen3") for grows in SHAPES if grows != "all"],
)
def test_logits_are_the_small_models(family, grows):
    model = small(family)
    large = inflate(model, shape(model, **SHAPES[grows]), "small", torch.float32)
    assert {k: getattr(large.config, k) for k in SHAPES[grows]} == SHAPES[grows]
    want = logits(model)
    assert want.std() > 0.5, "logits that show nothing"
    assert (logits(large) - want).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(hidden_size=16), "hidden_size: 16"),
        (dict(num_hidden_layers=1), "num_hidden_layers: 1"),
        (dict(), "hidden_size"),
        (dict(num_attention_heads=7), "num_key_value_heads: 2 must divide"),
        (dict(num_attention_heads=4, num_key_value_heads=4, head_dim=7), "head_dim: 7"),
        (dict(num_attention_heads=6, num_key_value_heads=3, head_dim=8), None),
        (dict(num_attention_heads=3 * 4, num_key_value_heads=12), None),
    ],
)
def test_a_shape_that_does_not_fit_is_named(changes, named):
    model = small("llama")
    if named is None:
        check(model.config, shape(model, **changes))
        return
    with pytest.raises(InputError, match=named):
        check(model.config, shape(model, **changes))


def test_too_few_key_value_heads_are_counted():
    model = small("llama", num_attention_heads=6)  # 3 query heads to each of 2
    with pytest.raises(InputError, match="give at least 4"):
        check(model.config, shape(model, num_attention_heads=6, num_key_value_heads=3))
    check(model.config, shape(model, num_attention_heads=8, num_key_value_heads=4))


def test_what_cannot_be_inflated_is_named():
    config = AutoConfig.for_model("gemma", **SMALL)
    with pytest.raises(InputError, match=r"model_type 'gemma'.*llama"):
        check(config, Shape.of(config))
    model = small("llama", rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0))
    with pytest.raises(InputError, match="rotations of type 'yarn'; keep 6"):
        check(model.config, shape(model, head_dim=8))
    check(model.config, shape(model, hidden_size=40))


# ---------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parent.parent / "scripts" / "inflate_target.py"
    spec = importlib.util.spec_from_file_location("inflate_target", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


#: 64 wide, 5 heads of 2 key-value heads would not do; see make_tiny_target.py for the small sizes
LARGER = ["--hidden_size=96", "--num_attention_heads=12", "--num_key_value_heads=6",
          "--head_dim=24", "--intermediate_size=300", "--num_hidden_layers=6"]  # fmt: skip


@pytest.fixture(scope="module")
def written(script, published_run, tiny_target, tmp_path_factory):
    """(large target's folder, its head's, what was printed)."""
    base, said = tmp_path_factory.mktemp("inflated"), io.StringIO()
    with contextlib.redirect_stdout(said):
        status = script.main([
            f"--target.path={tiny_target}", f"--out={base / 'large'}", *LARGER,
            f"--head={published_run}", f"--head_out={base / 'head'}",
        ])  # fmt: skip
    assert status == 0
    return base / "large", base / "head", said.getvalue()


def test_a_folder_like_any_other_is_written(written, tiny_target):
    large, head, said = written
    target, own = load_target(str(large)), load_target(str(tiny_target))
    assert Shape.of(target.config) == Shape(96, 6, 12, 6, 24, 300)
    assert target.tokenizer.get_vocab() == own.tokenizer.get_vocab()
    assert target.tokenizer.chat_template == own.tokenizer.chat_template
    assert target.eos_token_ids == own.eos_token_ids
    n = sum(p.numel() for p in target.model.parameters())
    assert said.splitlines()[0].startswith(f"{large}: {n:,} weights, {4 * n / 1e9:.2f} GB")
    assert f"inflated from {tiny_target.name}" in said
    assert not [p for p in large.parent.iterdir() if p not in (large, head)], "nothing else is left"


def test_texts_and_acceptance_are_the_small_models(written, tiny_target, published_run):
    large, head, _ = written
    found = []
    for folder, heads in ((tiny_target, published_run), (large, head)):
        target = load_target(str(folder))
        drafter = HeadDrafter(load_head(heads, target), target, TreeConfig(width=3, depth=3))
        lines = (tiny_target / "prompts_heldout.jsonl").read_text().splitlines()[:8]
        ids = [target.tokenizer(json.loads(line)["text"]).input_ids[:24] for line in lines]
        found.append(speculative(target, ids, settings(max_new_tokens=48), drafter=drafter))
    small_made, large_made = found
    assert large_made.tokens == small_made.tokens
    assert large_made.stats.accepted_at == small_made.stats.accepted_at
    assert small_made.stats.accepted_at[1] > 0, "acceptance that shows nothing"


def test_shards_hold_what_one_file_would(tiny_target, tmp_path):
    own = load_target(str(tiny_target))
    new = shape(own.model, hidden_size=96)
    write_target(own, new, tmp_path / "whole", torch.float32)
    write_target(own, new, tmp_path / "parts", torch.float32, shard_bytes=200_000)
    assert len(list((tmp_path / "parts").glob("model-*-of-*.safetensors"))) > 2
    one, other = (load_target(str(tmp_path / name)).model for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_reports_say_that_it_is_inflated(written, tiny_target, tmp_path, capsys):
    target, _ = load_both(CostsConfig(target=TargetConfig(str(written[0])), prompts=""))
    assert "inflated from tiny_target" in capsys.readouterr().out
    write_result(str(tmp_path / "a.json"), {}, target, {})
    facts = json.loads((tmp_path / "a.json").read_text())["provenance"]["target"]
    assert "inflated from tiny_target" in facts["inflated"]
    assert "(inflated)" in title_of(target)
    assert "(inflated)" not in title_of(load_target(str(tiny_target)))


HEADS = {
    "code": {},
    "exit narrower": dict(exit_dim=11, output="target"),
    "frozen, pruned": dict(output="target", draft_vocab_size=20),
    "gru": dict(cell="gru", first_state="paper"),
    "sum": dict(cell="sum", embedding_scale="rms"),
    "norm": dict(input_norm=True, state_norm=True, num_draft_layers=0),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_drafts_what_it_did(kind):
    torch.manual_seed(2)
    head = RecurrentHead(RecurrentHeadConfig(vocab_size=48, hidden_size=8, **HEADS[kind]))
    large = inflate_head(head, 20)
    assert large.config.hidden_size == 20 and large.config.exit_dim >= 20
    matrix, e, c = torch.randn(48, 8), torch.randn(3, 2, 8), torch.randn(3, 8)

    def pad(x):
        return torch.nn.functional.pad(x, (0, 12))

    each = []
    for h, grown in ((head, lambda x: x), (large, pad)):
        for module in h.modules():
            if isinstance(module, torch.nn.RMSNorm):
                module.eps = 0.0  # the one thing that does not grow with the width
        h.bind(SimpleNamespace(lm_head_weight=grown(matrix)))
        states = h.step(grown(e[:, 1]), h.step(grown(e[:, 0])))
        each.append(h.logits(grown(c), states))
    assert each[0].std() > 0.01
    assert (each[1] - each[0]).abs().max() < 1e-5


def test_a_head_that_is_too_wide_is_named():
    head = RecurrentHead(RecurrentHeadConfig(vocab_size=48, hidden_size=8))
    with pytest.raises(InputError, match="hidden_size: 6 is less than the head's 8"):
        inflate_head(head, 6)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--hidden_size=8"], "hidden_size: 8 is less"),
        ([], "the shape is the model's own"),
        (["--hidden_size=96", "--head=x"], "head, head_out"),
        (["--like={folder}"], "out.*exists"),
        (["--hidden_size=96"], "do not fit in .* where 0.00 GB"),
    ],
)
def test_the_script_refuses_before_it_writes(
    script, words, named, tiny_target, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    out = tmp_path if "{folder}" in str(words) else tmp_path / "new"
    (tmp_path / "kept").touch()
    words = [w.format(folder=tiny_target) for w in words]
    with pytest.raises(SystemExit) as end:
        script.main([f"--target.path={tiny_target}", f"--out={out}", *words])
    assert end.value.code == 2
    assert re.search(named, capsys.readouterr().err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept"]
