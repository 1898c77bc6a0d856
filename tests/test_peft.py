"""Adapters: a target that is a base with one, and LoRA on a head.

The reference is peft itself: what its own model computes with the adapter applied.
"""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import safetensors.torch
import torch
from accelerate.utils import DistributedType
from models import alone, prompts, settings, tiny
from transformers import AutoModelForCausalLM

from redrafter.cli.args import parse
from redrafter.cli.train_redrafter import main
from redrafter.config import LoraSettings, OptimConfig, SpeedConfig, TargetConfig, TrainConfig
from redrafter.contracts import InputError
from redrafter.data.store import Store
from redrafter.decode.speculative import speculative
from redrafter.drafters.head import HeadDrafter
from redrafter.heads import lora
from redrafter.heads.load import load_head
from redrafter.heads.recurrent import RecurrentHead, RecurrentHeadConfig
from redrafter.targets.identity import target_identity
from redrafter.targets.load import load_model_config, load_target
from redrafter.targets.model import Target
from redrafter.targets.skipping import AttentionSkipping
from redrafter.training import checkpoint
from redrafter.training.engine import Engine
from redrafter.training.loop import Training
from redrafter.training.losses import chunked, cross_entropy


def read(path, base=None, dtype="float64"):
    return load_target(TargetConfig(str(path), base=base, device="cpu", dtype=dtype))


def model_in(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def save_adapter(base, folder, seed=0, **changes):
    """An adapter with random weights (peft's own start would change nothing)."""
    torch.manual_seed(seed)
    values = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"],
              "task_type": "CAUSAL_LM", "init_lora_weights": False, **changes}  # fmt: skip
    peft.get_peft_model(model_in(base), peft.LoraConfig(**values)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "base"
    tiny("llama").model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base):
    return save_adapter(base, base.parent / "adapter")


@pytest.fixture(scope="module")
def in_memory(base, adapter):
    """peft's own, not merged."""
    return peft.PeftModel.from_pretrained(model_in(base), adapter).eval()


@pytest.fixture(scope="module")
def merged(base, adapter):
    """A whole model's folder."""
    model = peft.PeftModel.from_pretrained(model_in(base), adapter).merge_and_unload()
    model.save_pretrained(base.parent / "merged")
    return base.parent / "merged"


IDS = torch.tensor([prompts((12,))[0]])


# ------------------------------------------------------------------ a target with an adapter


@torch.inference_mode()
def test_an_adapter_s_folder_computes_what_peft_does(base, adapter, in_memory):
    target = read(adapter)
    said = in_memory(input_ids=IDS).logits
    torch.testing.assert_close(target.model(input_ids=IDS).logits, said, atol=1e-10, rtol=0)
    torch.testing.assert_close(target.project(target.states(IDS)), said, atol=1e-10, rtol=0)
    assert (said - read(base).model(input_ids=IDS).logits).abs().max() > 0.1, "it changes nothing"
    assert {type(m) for m in target.model.modules()} == {type(m) for m in model_in(base).modules()}
    assert target.name == str(adapter)
    assert load_model_config(TargetConfig(str(adapter))).model_type == "llama"


def test_everything_works_on_it(base, adapter, in_memory):
    """Decoding with a head, and without attentions; merged as kept."""
    merged, kept = read(adapter), Target(in_memory)
    torch.manual_seed(0)
    texts = []
    for target in (merged, kept):
        head = RecurrentHead.for_target(target).double()
        rows, config = prompts(), settings()
        made = speculative(target, rows, config, drafter=HeadDrafter(head, target))
        texts.append(made.tokens)
        assert made.tokens == alone(target, rows, config)[0]
        with AttentionSkipping(target).without_attention([1]), torch.inference_mode():
            skipped = target.states(IDS)
        assert (skipped - target.states(IDS)).abs().max() > 1e-3
    assert texts[0] == texts[1]
    assert texts[0] != alone(read(base), prompts(), settings())[0]


def test_a_fingerprint_is_the_same_however_it_is_loaded(
    base, adapter, merged, in_memory, monkeypatch, tmp_path
):
    target = read(adapter)
    native = model_in(base)
    native.load_adapter(str(adapter))
    same = [
        read(adapter, dtype="float32"), read(adapter, dtype="bfloat16"), Target(in_memory),
        Target(native), read(adapter, base=str(base)),
        read(shutil.copytree(adapter, tmp_path / "moved"), base=str(base)),
    ]  # fmt: skip
    monkeypatch.setattr(type(native), "is_quantized", True, raising=False)
    with pytest.warns(UserWarning, match="quantised, so the adapter is kept"):
        kept = read(adapter)
    monkeypatch.undo()
    assert any("lora_A" in name for name, _ in kept.model.named_parameters()), "kept, not merged"
    for other in [*same, kept]:
        assert other.fingerprint() == target.fingerprint()
        assert other.digests() == target.digests()
        assert target_identity(other)["config"] == target_identity(target)["config"]
    others = [
        read(base), read(merged), read(save_adapter(base, tmp_path / "seed", seed=1)),
        read(save_adapter(base, tmp_path / "alpha", lora_alpha=9)),
    ]  # fmt: skip
    assert len({t.fingerprint() for t in [target, *others]}) == 5
    assert target.digests().base == read(base).digests().base != read(merged).digests().base
    plain = read(base)
    plain.digests()
    assert plain.fingerprint() == others[0].fingerprint() == tiny("llama").fingerprint()
    dropped = read(save_adapter(base, tmp_path / "dropout", lora_dropout=0.5))
    assert dropped.fingerprint() == target.fingerprint(), "dropout is no part of the model"


_BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}


@pytest.mark.parametrize(
    ("more", "changes"),
    [
        (3, _BOTH), (-5, _BOTH), (3, {}), (-5, {}), (-5, {"target_modules": ["lm_head"]}),
        (-5, {"target_modules": ["q_proj", "embed_tokens"]}),
        (3, {"target_modules": ["lm_head", "embed_tokens"]}),
    ],
)  # fmt: skip
def test_an_adapter_may_bring_a_vocabulary_of_another_size(base, tmp_path, more, changes):
    """As resize_token_embeddings(len(tokenizer)) leaves it: larger, or without the base's
    padding."""
    model = model_in(base)
    model.resize_token_embeddings(model.config.vocab_size + more)
    config = peft.LoraConfig(
        **{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **changes}
    )
    resized = peft.get_peft_model(model, config)
    resized.save_pretrained(tmp_path / "resized")
    target = read(tmp_path / "resized")
    assert target.vocab_size == model.config.vocab_size == tiny("llama").vocab_size + more
    known = load_model_config(TargetConfig(str(tmp_path / "resized")))
    assert known.vocab_size == target.vocab_size
    ids = IDS.clamp(max=target.vocab_size - 1)
    with torch.inference_mode():
        said = resized.eval()(input_ids=ids).logits
        torch.testing.assert_close(target.model(input_ids=ids).logits, said, atol=1e-10, rtol=0)


def test_new_tokens_without_weights_are_refused(base, tmp_path):
    """peft saves the rows of an adapted matrix, and then not those of the other: they would be
    random."""
    model = model_in(base)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "grown")
    named = r"adapter_model\.safetensors has more tokens.*embed_tokens\.weight.*modules_to_save"
    with pytest.raises(InputError, match=named):
        read(tmp_path / "grown")


def _edit(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def _pickle(folder):
    weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")


def _truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])


def _more(folder):
    """A third layer, for which the base has no place; peft would leave it out in silence."""
    weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    weights |= {n.replace("layers.1", "layers.2"): t.clone() for n, t in weights.items()}
    safetensors.torch.save_file(weights, folder / "adapter_model.safetensors")


def _fewer(folder):
    weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    weights = {n: t for n, t in weights.items() if "layers.1" not in n}
    safetensors.torch.save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_pickle, r"adapter_model\.bin.*save it again with save_pretrained"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "safetensors does not exist"),
        (_truncate, r"adapter_model\.safetensors is damaged"),
        (_more, "no place for.*layers.2"), (_fewer, "no tensors for.*layers.1"),
        (lambda f: _edit(f, base_model_name_or_path="no/such/one"), "'no/such/one'.*target.base"),
        (lambda f: _edit(f, base_model_name_or_path="gone/away"), "gone/away.*adapter_config.json"),
        (lambda f: _edit(f, base_model_name_or_path=None), "names no base.*target.base"),
        (lambda f: _edit(f, peft_type="NEXT_YEARS"), r"adapter_config\.json cannot be read"),
        (lambda f: (f / "adapter_config.json").write_text("{"), r"config\.json cannot be read"),
        (lambda f: (f / "config.json").write_text("{}"), "whole model.*move one"),
        (lambda f: _edit(f, alora_invocation_tokens=[1]), "activated LoRA"),
    ],
)  # fmt: skip
def test_an_adapter_that_cannot_be_used_is_refused_by_name(adapter, tmp_path, damage, named):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    read(folder)
    damage(folder)
    with pytest.raises(InputError, match=f"(?s){named}") as error:
        read(folder)
    assert str(folder) in str(error.value)


def test_an_adapter_of_another_architecture_is_refused(base, adapter, tmp_path):
    for family, changes in (("gpt2", {}), ("llama", {"hidden_size": 64}),
                            ("llama", {"num_hidden_layers": 1})):  # fmt: skip
        other = tmp_path / f"{family}{len(changes)}{list(changes.values())}"
        tiny(family, **changes).model.save_pretrained(other)
        with pytest.raises(
            InputError, match=r"does not fit the base.*another architecture"
        ) as error:
            read(adapter, base=str(other))
        assert str(adapter) in str(error.value) and str(other) in str(error.value)
    with pytest.raises(InputError, match="is an adapter itself"):
        read(adapter, base=str(adapter))
    with pytest.raises(InputError, match=r"target\.base is given"):
        read(base, base=str(base))
    tokens = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peft.get_peft_model(model_in(base), tokens).save_pretrained(tmp_path / "prompt")
    with pytest.raises(InputError, match="PROMPT_TUNING puts tokens of its own"):
        read(tmp_path / "prompt")


def scaled(base, folder, scale, seed=0, **changes):
    """An adapter whose own products are `scale` times as large; returns the share of the logits
    that it changes, by peft's own model."""
    save_adapter(base, folder, seed=seed, **changes)
    file = folder / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(file)
    for name, tensor in weights.items():
        if "lora_A." in name or "lora_embedding_B" in name:  # of tied ones each other's transpose
            weights[name] = tensor * scale
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    adapted = peft.PeftModel.from_pretrained(model_in(base), folder).eval()
    ids = IDS.clamp(min=1)  # the base's row of padding is zeros, of which any change is large
    with torch.inference_mode():
        said = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            bare = adapted(input_ids=ids).logits
    return float((said - bare).norm() / said.norm())


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied") / "base"
    tiny("llama", tie_word_embeddings=True).model.save_pretrained(folder)
    return folder


TIED = {"target_modules": ["lm_head"], "ensure_weight_tying": True}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("scale", "changes"),
    [(1, {"target_modules": ["lm_head"]}), (0.1, {"target_modules": ["lm_head"]}), (1, TIED),
     (0.0013, TIED)],
    ids=["one", "one, a little", "both", "both, a little"],
)  # fmt: skip
def test_a_merge_that_is_none_is_found_out(tied, tmp_path, scale, changes, dtype):
    """On one of two tied matrices: merging would change both, or both twice; however little."""
    effect = scaled(tied, tmp_path / "adapter", scale, **changes)
    assert (0.01 < effect < 0.05) == (scale < 1), effect
    with pytest.raises(
        InputError, match=r"(?s)adapter_model\.safetensors.*tied.*modules_to_save.*target\.base"
    ):
        read(tmp_path / "adapter", dtype=dtype)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_what_is_advised_for_tied_matrices_works(tied, tmp_path):
    """modules_to_save, and a base whose matrices are no longer tied."""
    save_adapter(tied, tmp_path / "saved", modules_to_save=["lm_head"])
    model = model_in(tied)
    embed, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    lm_head.weight = torch.nn.Parameter(embed.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "untied")
    assert scaled(tied, tmp_path / "adapter", 0.03, target_modules=["lm_head"]) > 0.005
    for folder, on in (("saved", tied), ("adapter", tmp_path / "untied")):
        adapted = peft.PeftModel.from_pretrained(model_in(tied), tmp_path / folder).eval()
        with torch.inference_mode():
            said = adapted(input_ids=IDS).logits
            ours = read(tmp_path / folder, base=str(on)).model(input_ids=IDS).logits
        torch.testing.assert_close(ours, said, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scale", [0.01, 1e-4, 0])
def test_a_small_adapter_is_no_wrong_one(base, tmp_path, scale, dtype):
    """In half precision most of it is lost where weights are rounded; of a new one (B = 0) there
    is nothing to lose."""
    modules = ["q_proj", "down_proj", "lm_head"]
    effect = scaled(base, tmp_path / "adapter", scale, target_modules=modules)
    assert effect < 0.2 and (effect > 0) == (scale > 0)
    read(tmp_path / "adapter", dtype=dtype)


def test_a_base_that_overflows_is_not_a_wrong_merge(base, tmp_path):
    model = model_in(base)
    model.get_input_embeddings().weight.data.mul_(1e6)
    model.save_pretrained(tmp_path / "loud")
    save_adapter(tmp_path / "loud", tmp_path / "adapter")
    read(tmp_path / "adapter", dtype="float32")
    with pytest.raises(InputError, match=r"are not finite in torch\.float16.*wider target\.dtype"):
        read(tmp_path / "adapter", dtype="float16")


# ------------------------------------------------------------------ whose head it is


@pytest.fixture
def head(adapter, tmp_path):
    torch.manual_seed(0)
    RecurrentHead.for_target(read(adapter)).save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def test_a_head_refuses_the_bare_base_and_says_so(base, adapter, head, tmp_path):
    load_head(head, read(adapter))
    for allow in (False, "merged"):
        with pytest.raises(InputError, match="is its bare base, without the adapter") as error:
            load_head(head, read(base), allow)
        assert str(head) in str(error.value) and str(base) in str(error.value)
        assert "adapter's folder as target.path" in str(error.value)
    load_head(head, read(base), True)
    with pytest.raises(InputError, match="same base, another adapter"):
        load_head(head, read(save_adapter(base, tmp_path / "other", seed=1)))
    RecurrentHead.for_target(read(base)).save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match=r"with an adapter on top.*head\.lora"):
        load_head(tmp_path / "plain", read(adapter))
    with pytest.raises(InputError, match="does not compute what"):
        load_head(tmp_path / "plain", read(adapter), "merged")


def test_a_merged_copy_needs_a_word_and_is_checked(base, adapter, merged, head, tmp_path):
    with pytest.raises(InputError, match="allow_other_target merged"):
        load_head(head, read(merged))
    half = tmp_path / "half"  # a merged model that was saved in half precision
    model_in(merged).to(torch.bfloat16).save_pretrained(half)
    other = save_adapter(base, tmp_path / "a", seed=1)
    peft.PeftModel.from_pretrained(model_in(base), other).merge_and_unload().save_pretrained(
        tmp_path / "other"
    )
    for folder in (merged, half):
        for dtype in ("float32", "bfloat16"):
            found = load_head(head, read(folder, dtype=dtype), "merged")
    with pytest.raises(InputError, match=r"does not compute what.*differ by \d+%"):
        load_head(head, read(tmp_path / "other"), "merged")
    # The other way round: trained on the merged copy.
    RecurrentHead.for_target(read(merged)).save_pretrained(tmp_path / "of_merged")
    load_head(tmp_path / "of_merged", read(adapter), "merged")
    found.config.target_probe = None
    found.save_pretrained(head)
    with pytest.raises(InputError, match="nothing was"):
        load_head(head, read(merged), "merged")


def test_the_word_can_be_given_on_the_command_line():
    needed = ["--target.path=a", "--prompts=b"]
    for given, wanted in (("merged", "merged"), ("true", True), ("false", False)):
        config = parse(SpeedConfig, [*needed, f"--allow_other_target={given}"], "test")
        assert config.allow_other_target == wanted and type(config.allow_other_target) is type(
            wanted
        )
    with pytest.raises(SystemExit):
        parse(SpeedConfig, [*needed, "--allow_other_target=maybe"], "test")


# ------------------------------------------------------------------ LoRA on a head

HEADS = [
    {}, {"output": "target"}, {"cell": "gru", "exit_dim": 24}, {"cell": "sum", "input_norm": True},
    {"embedding_scale": "rms", "draft_ids": torch.arange(0, 40, 2)},
]  # fmt: skip


#: a target whose "tokens" are embeddings already
AS_IS = SimpleNamespace(embed=lambda embeddings: embeddings)


def new_head(**fields):
    target = tiny("llama")
    torch.manual_seed(4)
    return RecurrentHead.for_target(target, **fields)


def said_by(head, n=6):
    g = torch.Generator().manual_seed(1)
    c, e = torch.randn(n, 32, generator=g), torch.randn(n, 3, 32, generator=g)
    f = head(c, e, AS_IS)
    return torch.nn.functional.linear(f.to(head.vocab_matrix().dtype), head.vocab_matrix())


def train_a_little(head, steps=3):
    """With the very sum of losses that training uses."""
    labels = torch.arange(18) % head.draft_vocab_size
    trained = [p for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    for _ in range(steps):
        f = head(torch.ones(6, 32), torch.ones(6, 3, 32), AS_IS).flatten(0, 1)
        loss = chunked(
            f, head.vocab_matrix(),
            lambda x, rows: (cross_entropy(x, labels[rows]).sum(), torch.zeros(1)), 5,
        )[0]  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return trained


@pytest.mark.parametrize("fields", HEADS)
def test_lora_starts_as_the_head_trains_alone_and_merges(fields, tmp_path):
    plain = new_head(**fields)
    before = {n: t.clone() for n, t in plain.state_dict().items()}
    said = said_by(plain)
    head = lora.adapt(new_head(**fields), LoraSettings(r=3, alpha=5.0), "some/where/head")
    assert torch.equal(said_by(head), said)
    trained = train_a_little(head)
    named = {n for n, p in head.named_parameters() if p.requires_grad}
    linear = [n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(trained) == 2 * len(linear) and all(".lora_" in n for n in named)
    for name in linear:
        up = head.get_submodule(name).lora_B["default"].weight
        assert up.abs().max() > 0, f"{name} learned nothing"
    after = said_by(head)
    assert (after - said).abs().max() > 0.01
    random = torch.get_rng_state()
    whole = lora.merged(head)
    assert torch.equal(torch.get_rng_state(), random), "training would go on differently"
    assert whole.state_dict().keys() == before.keys()
    torch.testing.assert_close(said_by(whole), after, atol=1e-4, rtol=1e-4)
    assert any(not torch.equal(t, before[n]) for n, t in whole.state_dict().items())
    kept = {
        n.replace(".base_layer", ""): t for n, t in head.state_dict().items() if "lora" not in n
    }
    assert all(torch.equal(t, before[n]) for n, t in kept.items()), "the original was trained"

    for tensor in whole.state_dict().values():
        tensor.zero_()
    assert torch.equal(said_by(head), after), "a merged head shares its tensors"

    lora.save(head, tmp_path)
    again = lora.adapt(new_head(**fields), LoraSettings(r=3, alpha=5.0), "head")
    lora.load(tmp_path, again)
    assert torch.equal(said_by(again), after)
    by_peft = peft.PeftModel.from_pretrained(new_head(**fields), tmp_path).merge_and_unload()
    torch.testing.assert_close(said_by(by_peft), after, atol=1e-4, rtol=1e-4)
    assert "some" not in (tmp_path / "adapter_config.json").read_text(), "tells of folders"


def test_lora_on_what_was_named_and_on_nothing_else(tmp_path):
    head = lora.adapt(new_head(), LoraSettings(target_modules=("rnn_w", "linear")), "head")
    adapted = {n.split(".lora_")[0] for n, p in head.named_parameters() if p.requires_grad}
    assert adapted == {"rnn_w", "lm_head.0.linear", "lm_head.1.linear"}
    with pytest.raises(InputError, match=r"head\.lora\.target_modules.*'q_proj'.*rnn_u"):
        lora.adapt(new_head(), LoraSettings(target_modules=("q_proj",)), "head")
    lora.save(head, tmp_path)
    torch.manual_seed(9)
    other = RecurrentHead(RecurrentHeadConfig(**{**new_head().config.to_dict()}))
    other = lora.adapt(other, LoraSettings(target_modules=("rnn_w", "linear")), "head")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors was trained on a head"):
        lora.load(tmp_path, other)
    for bad in ({"r": 0}, {"dropout": 1.0}, {"target_modules": ()}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            replace(LoraSettings(), **bad)


# ------------------------------------------------------------------ whole trainings

SETTINGS = {
    "data.source.format": "text", "data.source.n_rows": 16, "data.source.holdout_rows": 8,
    "data.answers.max_new_tokens": 16, "optim.steps": 8, "optim.batch_positions": 32,
    "optim.depth": 3, "optim.warmup_steps": 2, "eval.prompts": 4, "eval.max_new_tokens": 12,
    "eval.every_steps": 4, "eval.temperatures": "[0]", "eval.tree.width": 2, "eval.tree.depth": 2,
    "save_steps": 4, "log_steps": 2, "tracker": "null",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_target, tmp_path_factory):
    """arguments(target, out, **changes) of a short run."""
    folder = tmp_path_factory.mktemp("runs")

    def arguments(target, out, **changes):
        given = {
            "target.path": target, "output_dir": folder / out, "data.folder": folder / "data",
            "data.source.path": tiny_target / "prompts_train.jsonl", **SETTINGS, **changes,
        }  # fmt: skip
        return [f"--{key}={value}" for key, value in given.items()]

    return arguments


@pytest.fixture(scope="module")
def first(tiny_target, trained):
    """A head for the bare base."""
    run = Training(parse(TrainConfig, trained(tiny_target, "first"), "test"))
    run.train()
    return run.out


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")
            if p.is_file()}  # fmt: skip


def test_a_head_is_retuned_by_lora_for_an_adapted_target(tiny_target, trained, first, tmp_path):
    """Distillation from base plus adapter; the checkpoint is an adapter, the export a head."""
    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="with an adapter on top"):
        load_head(first, load_target(str(tmp_path / "adapter")))

    before = digests(first)
    options = {"head.init_from": first, "head.lora.r": 3, "head.lora.dropout": 0.1}
    arguments = trained(tmp_path / "adapter", "tuned", **options, **{"optim.lr": 0.02})
    assert main(arguments) == 0
    assert digests(first) == before, "the original was touched"

    out = parse(TrainConfig, arguments, "test").output_dir
    out = Path(out)
    target = load_target(str(tmp_path / "adapter"))
    assert target.tokenizer is not None, "the base's"
    head = load_head(out, target)
    with pytest.raises(InputError, match="bare base"):
        load_head(out, load_target(str(tiny_target)))
    step = json.loads((out / "provenance.json").read_text())["step"]
    names = {p.name for p in (out / "checkpoints" / f"step-{step}").iterdir()} - {"README.md"}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors",
                     "rng.safetensors", "state.json"}  # fmt: skip
    start = load_head(first)
    merged = peft.PeftModel.from_pretrained(start, out / "adapter").merge_and_unload()
    for name, tensor in head.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor)
    assert not torch.equal(head.rnn_w.weight, load_head(first).rnn_w.weight)
    stores = [Store(p) for p in (out.parent / "data").glob("states-*")]
    assert {s.identity["target"]["weights"] for s in stores} == {
        target.fingerprint(), load_target(str(tiny_target)).fingerprint()
    }  # fmt: skip


def test_a_retuning_goes_on_where_it_stopped(tiny_target, trained, first, tmp_path):
    """Bit for bit, from the adapter's checkpoint; with another original it is refused."""
    options = {"head.init_from": first, "head.lora.r": 3, "keep_checkpoints": 9}
    straight = Training(parse(TrainConfig, trained(tiny_target, "straight", **options), "test"))
    straight.train()
    shutil.copytree(straight.out / "checkpoints" / "step-4",
                    straight.out.parent / "again" / "checkpoints" / "step-4")  # fmt: skip
    again = trained(tiny_target, "again", resume="auto", **options)
    resumed = Training(parse(TrainConfig, again, "test"))
    assert resumed.done == 4
    resumed.train()
    for name in ("model.safetensors", "adapter/adapter_model.safetensors",
                 "checkpoints/step-8/optimizer.safetensors"):  # fmt: skip
        one, two = (safetensors.torch.load_file(r.out / name) for r in (straight, resumed))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), name
    half = straight.out / "checkpoints" / "step-4"
    for step in (half, straight.out / "checkpoints" / "step-8"):  # either may be the best one
        checkpoint.export(step, resumed.head, tmp_path / step.name)
        files = (step, tmp_path / step.name / "adapter")
        one, two = (safetensors.torch.load_file(f / "adapter_model.safetensors") for f in files)
        assert all(torch.equal(one[k], two[k]) for k in one)
    exported = [load_head(tmp_path / f"step-{n}").rnn_w.weight for n in (4, 8)]
    assert not torch.equal(*exported)
    moved = shutil.copytree(first, straight.out.parent / "moved")
    weights = safetensors.torch.load_file(moved / "model.safetensors")
    weights["rnn_u.bias"] += 1
    safetensors.torch.save_file(weights, moved / "model.safetensors")
    state = half / "state.json"
    state.write_text(state.read_text().replace(json.dumps(str(first)), json.dumps(str(moved))))
    changed = trained(tiny_target, "x", resume=half, **{**options, "head.init_from": moved})
    with pytest.raises(InputError, match="was trained on a head"):
        Training(parse(TrainConfig, changed, "test"))


def test_what_lora_cannot_do_is_refused_before_any_work(tiny_target, trained, first, capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, trained(tiny_target, "n", **{"head.lora.r": 3}), "test")
    assert re.search("head.lora.*head.init_from", capsys.readouterr().err)
    options = {"head.init_from": first, "head.lora.target_modules": "[gates]",
               "data.folder": first.parent / "none"}  # fmt: skip
    with pytest.raises(InputError, match=r"head\.lora\.target_modules"):
        Training(parse(TrainConfig, trained(tiny_target, "n", **options), "test"))
    assert not (first.parent / "none").exists()


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_lora_under_an_engine_that_splits_the_head_is_refused(kind):
    """Before accelerate prepares anything (the stand-in has nothing to prepare with)."""
    head = lora.adapt(new_head(), LoraSettings(r=3), "some/where/head")
    stand_in = SimpleNamespace(num_processes=2, distributed_type=DistributedType[kind])
    loss = SimpleNamespace(head=head, target=None)
    with pytest.raises(InputError, match=r"head\.lora needs .*ddp\.yaml"):
        Engine(stand_in, loss, None, OptimConfig(steps=1))
