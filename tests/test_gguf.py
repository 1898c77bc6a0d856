"""A GGUF file is a target: the weights that were put into it come out of it, once, and a bad one
is one clear error that leaves nothing behind."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from launching import run_copy
from transformers import AutoModelForCausalLM, AutoTokenizer

from redrafter.config import TargetConfig
from redrafter.contracts import InputError
from redrafter.targets import gguf as ours
from redrafter.targets import gguf_tokenizer
from redrafter.targets.load import load_target
from redrafter.targets.text import load_tokenizer

NEEDS = "needs the package gguf, which writes the files that are read here"
TOKENS = [[0, 5, 9, 300, 41, 17, 2, 250]]


def write_gguf(
    folder: Path, file: Path, architecture: str = "llama", leave_out: str = "", pre: str = "gpt-2",
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:  # fmt: skip
    """A llama of `folder` as llama.cpp keeps it, in float32: names and order are its own."""
    gguf = pytest.importorskip("gguf", reason=NEEDS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), model.config
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_name("tiny")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":  # as factors alone, by which frequencies are divided
        own = model.model.rotary_emb.inv_freq
        usual = rope["rope_theta"] ** -(torch.arange(len(own)) / len(own))
        writer.add_tensor("rope_freqs.weight", (usual / own).numpy())
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values.numpy())
    inner = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if i in special else 1 for _, i in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in inner["merges"]])
    writer.add_add_bos_token(True)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if leave_out and leave_out in name:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, n in heads.items():
            if part in name:  # llama.cpp rotates neighbours, transformers halves
                half = value.view(n, 2, value.shape[0] // n // 2, value.shape[1])
                value = half.swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def written(tiny_target, tmp_path_factory) -> Path:
    return write_gguf(tiny_target, tmp_path_factory.mktemp("gguf") / "tiny-F32.gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(ours.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(cache: Path) -> list[str]:
    """What lies in the cache, but for locks."""
    beside = {"probed"}  # what is known of targets that were tried
    found = cache.iterdir() if cache.exists() else ()
    return [p.name for p in found if p.suffix != ".lock" and p.name not in beside]


def refusal(config: TargetConfig) -> str:
    with pytest.raises(InputError) as error:
        load_target(config)
    return str(error.value)


def test_it_is_the_model_that_was_put_in(tiny_target, written, cache, capsys, monkeypatch):
    want = load_target(TargetConfig(str(tiny_target), device="cpu"))
    made = load_target(TargetConfig(str(written), device="cpu"))
    said = capsys.readouterr().err
    assert "tiny-F32.gguf: unpacking" in said and str(cache) in said
    ids = torch.tensor(TOKENS)
    assert torch.equal(made.states(ids), want.states(ids))
    assert made.name == str(written) and made.dtype == torch.float32
    assert made.eos_token_ids == want.eos_token_ids and made.max_positions == want.max_positions
    text = "import os"  # runs of blanks are split as transformers thinks best
    assert made.tokenizer(text).input_ids == want.tokenizer(text).input_ids
    assert made.tokenizer.get_vocab() == want.tokenizer.get_vocab()
    assert made.tokenizer.chat_template == want.tokenizer.chat_template
    (folder,) = kept(cache)
    saved = AutoModelForCausalLM.from_pretrained(cache / folder, dtype="auto")
    assert saved.dtype == torch.float32 and saved.config.model_type == "llama"
    # From now on nothing is unpacked, and what wrote the file is not needed
    monkeypatch.setattr(ours, "_make", lambda *a: pytest.fail("unpacked twice"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    again = load_target(TargetConfig(str(written.parent), device="cpu"))
    assert torch.equal(again.states(ids), want.states(ids))
    named = TargetConfig(str(written.parent), gguf_file=written.name, device="cpu")
    assert load_tokenizer(named).get_vocab() == want.tokenizer.get_vocab()


def test_it_is_the_base_of_an_adapter(tiny_target, written, tmp_path):
    peft = pytest.importorskip("peft", reason="adapters are peft's")
    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32)
    drawn = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, drawn).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    made = load_target(TargetConfig(str(tmp_path / "adapter"), base=str(written), device="cpu"))
    ids = torch.tensor(TOKENS)
    torch.testing.assert_close(made.project(made.states(ids)), adapted(ids).logits)
    assert made.tokenizer.chat_template and made.digests().adapter
    file = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "base_model_name_or_path": str(written)}))
    again = load_target(TargetConfig(str(tmp_path / "adapter"), device="cpu"))
    assert again.fingerprint() == made.fingerprint()


def test_an_accelerator_computes_in_the_files_precision(written, cache, monkeypatch):
    """`auto` there takes what config.json says; the weights stay exact."""
    monkeypatch.setattr(ours, "_FILE_TYPES", {})
    folder = Path(ours.as_folder(written))
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(("rope", "written"), [
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192}, "rope_freqs.weight"),
    ({"rope_type": "linear", "factor": 4.0}, "scaling.type"),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, "scaling.type"),
])  # fmt: skip
def test_positions_are_stretched_as_the_file_says(tiny_target, tmp_path, cache, rope, written):
    """transformers leaves out what says so, and computes another model's scores."""
    stretched = tmp_path / "stretched"
    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32)
    usual = model(torch.tensor(TOKENS)).logits
    AutoTokenizer.from_pretrained(tiny_target).save_pretrained(stretched)
    model.config.rope_parameters = {"rope_theta": 77_000.0, **rope}
    model.save_pretrained(stretched)
    model = AutoModelForCausalLM.from_pretrained(stretched, dtype=torch.float32)
    file = write_gguf(stretched, tmp_path / "stretched.gguf")
    assert written.encode() in file.read_bytes()
    target = load_target(TargetConfig(path=str(file), device="cpu"))
    found, wanted = (m(torch.tensor(TOKENS)).logits for m in (target.model, model))
    assert (found - wanted).abs().max() < 1e-6 < 1e-4 < (wanted - usual).abs().max()


@pytest.mark.parametrize(("name", "why"), [
    ("rope_freqs.weight", "factors of its own (rope_freqs.weight)"),
    ("rope_factors_long.weight", "a way of its own"),
])  # fmt: skip
def test_positions_stretched_in_a_way_that_cannot_be_said(tiny_target, tmp_path, cache, name, why):
    config = AutoModelForCausalLM.from_pretrained(tiny_target).config
    half = config.hidden_size // config.num_attention_heads // 2
    factors = {name: torch.linspace(1, 5, half)}
    file = write_gguf(tiny_target, tmp_path / "own.gguf", tensors=factors)
    assert why in (said := refusal(TargetConfig(str(file)))) and "own.gguf" in said
    assert "Give the model that it was made from" in said and not kept(cache)


def test_text_is_split_as_the_file_says(tiny_target, tmp_path, cache, capsys):
    """transformers splits as GPT-2 does wherever it does not know the name: two line breaks before
    a digit are two words, in a model that sets digits apart one."""
    text = "list:\n\n1. one   22\n  3"

    def words(pre: str, kept: bool = False) -> list[str]:
        file = write_gguf(tiny_target, tmp_path / f"{pre}.gguf", pre=pre)
        reader = pytest.importorskip("gguf").GGUFReader(str(file))
        read = gguf_tokenizer.load_tokenizer(file, reader)
        tokenizer = load_tokenizer(TargetConfig(path=str(file))) if kept else read
        split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
        return [word.replace("\u010a", "\n").replace("\u0120", " ") for word, _ in split]

    assert words("gpt-2") == [
        "list", ":", "\n", "\n", "1", ".", " one", "  ", " 22", "\n ", " 3",
    ]  # fmt: skip
    assert "tokenizer.ggml.pre" not in capsys.readouterr().err
    apart = ["list", ":", "\n\n", "1", ".", " one", "   ", "2", "2", "\n  ", "3"]
    assert words("smollm", kept=True) == apart == words("starcoder")
    assert words("llama-bpe")[1:3] == [":\n\n", "1"], "one that transformers knows is left alone"
    assert "tokenizer.ggml.pre" not in capsys.readouterr().err
    assert words("of-tomorrow") == words("gpt-2")
    assert "tokenizer.ggml.pre 'of-tomorrow', is not known" in capsys.readouterr().err


def test_which_file_is_meant(tmp_path, cache):
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("b.gguf", "a.gguf"):
        (folder / name).touch()
    assert "several GGUF files" in (said := refusal(TargetConfig(str(folder))))
    assert said.endswith("target.gguf_file: a.gguf, b.gguf")
    said = refusal(TargetConfig(str(folder), gguf_file="c.gguf"))
    assert "has no 'c.gguf'; it has a.gguf, b.gguf" in said
    said = refusal(TargetConfig(str(folder / "c.gguf")))
    assert "c.gguf' does not exist" in said
    (folder / "a-00001-of-00002.gguf").touch()
    said = refusal(TargetConfig(str(folder / "a-00001-of-00002.gguf")))
    assert "llama-gguf-split --merge" in said
    (folder / "config.json").write_text("{}")  # an ordinary model, whatever lies beside it
    assert ours.find_gguf(TargetConfig(str(folder))) is None
    assert kept(cache) == []


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_file(written, tmp_path, cache, share):
    whole = written.read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(whole[: int(len(whole) * share)])
    said = refusal(TargetConfig(str(file)))
    assert said.startswith(f"target.path: {file} is no whole GGUF file") and "get it anew" in said
    assert kept(cache) == []


def test_an_unknown_architecture_and_missing_weights(tiny_target, tmp_path, cache):
    file = write_gguf(tiny_target, tmp_path / "new.gguf", architecture="quux")
    said = refusal(TargetConfig(str(file)))
    assert str(file) in said and "quux" in said and "the model that it was made from" in said
    file = write_gguf(tiny_target, tmp_path / "less.gguf", leave_out="layers.1.mlp.up_proj")
    said = refusal(TargetConfig(str(file)))
    assert "lacks 1 of the model's weights, model.layers.1.mlp.up_proj.weight" in said
    assert kept(cache) == []


def test_a_full_disk(written, cache, monkeypatch):
    """Known beforehand, or found out while writing: nothing half-written is left."""
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr(ours.shutil, "disk_usage", lambda folder: usage)
        said = refusal(TargetConfig(str(written)))
    assert "1,000 are free" in said and ours.CACHE in said and str(cache) in said

    def full(self, folder, **more):
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    from transformers import PreTrainedModel

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        said = refusal(TargetConfig(str(written)))
    assert "No space left on device" in said and ours.CACHE in said
    assert kept(cache) == []
    load_target(TargetConfig(str(written)))


def test_without_the_package_the_remedy_is_named(tmp_path, cache, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in refusal(TargetConfig(str(tmp_path / "x.gguf")))


def test_a_command_takes_it(written, tmp_path):
    source = tmp_path / "q.jsonl"
    source.write_text('{"question": "What is x?"}\n')
    argv = ["--target.path", written.parent, "--target.gguf_file", written.name,
            "--source.path", source, "--show", 1]  # fmt: skip
    status, said = run_copy("data/prepare.py", argv, tmp_path / "said.txt")
    assert status == 0, said
    assert "What is x?" in said
