"""Text in, text out: special tokens once, no blank lost, and why a target has no tokenizer."""

import json
import shutil

import pytest
import torch
from models import settings, tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from redrafter.config import TargetConfig
from redrafter.contracts import InputError
from redrafter.decode.plain import plain
from redrafter.targets import text as texts
from redrafter.targets.load import load_model_config, load_target
from redrafter.targets.text import TextStream, continuation, encode, load_tokenizer, tokenizer_of

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def sentencepiece_like(ends: bool = False) -> PreTrainedTokenizerFast:
    """As Llama's: blanks are part of the word behind them, and the first one is not text.

    ends: it puts an EOS behind every text
    """
    words = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "▁", "a", "b", "c", "▁a", "▁b", "▁c"]
    words += [f"<0x{byte:02X}>" for byte in (0x0A, 0x3C, 0x3E)]
    bpe = models.BPE(
        {word: i for i, word in enumerate(words)}, [("▁", "a"), ("▁", "b"), ("▁", "c")],
        unk_token="<unk>", byte_fallback=True, fuse_unk=True,
    )  # fmt: skip
    made = Tokenizer(bpe)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ends else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's, with no special tokens of its own in front."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


# ---------------------------------------------------------------- in


@pytest.mark.parametrize("ends", [False, True])
def test_special_tokens_stand_in_front_once_and_never_behind(ends):
    tokenizer = sentencepiece_like(ends)
    assert tokenizer("a b").input_ids == [1, 9, 10] + [2] * ends
    assert encode(tokenizer, "a b") == [1, 9, 10]
    rendered = "<s>a b"  # as a chat template writes it
    assert encode(tokenizer, rendered).count(1) == 1
    assert encode(tokenizer, "a b</s>")[-1] == 2, "what the text says itself stays"
    assert encode(tokenizer, "") == [1]


def test_a_tokenizer_without_special_tokens_adds_none():
    tokenizer = byte_level()
    assert encode(tokenizer, "a b") == tokenizer("a b").input_ids
    assert encode(tokenizer, "") == []


# ---------------------------------------------------------------- out


def test_the_blank_between_prompt_and_continuation_stays():
    tokenizer = sentencepiece_like()
    assert tokenizer.decode([10, 11]) == "b c", "on their own: a blank is lost"
    assert continuation(tokenizer, [1, 9], [10, 11]) == " b c"
    assert continuation(tokenizer, [1, 9], [7, 2]) == "b", "special tokens are no text"
    assert continuation(tokenizer, [1], [9, 10]) == "a b", "the first blank of all is not text"


def test_a_character_across_the_border_belongs_to_what_was_added():
    tokenizer = sentencepiece_like()
    assert continuation(tokenizer, [1, 9, 3], [4, 10]) == "é b"
    plain_bytes = byte_level()
    ids = plain_bytes("aé").input_ids
    assert continuation(plain_bytes, ids[:2], ids[2:]) == "é"


@pytest.mark.parametrize("make", [sentencepiece_like, byte_level])
def test_a_stream_is_the_continuation_in_pieces(make):
    tokenizer = make()
    random = torch.Generator().manual_seed(0)
    n = len(tokenizer)
    for _ in range(30):
        ids = torch.randint(3, n, (40,), generator=random).tolist()
        pieces = []
        stream = TextStream(tokenizer, pieces.append)
        for turn in range(2):  # it can be used again
            pieces.clear()
            prompt, new = ids[: 5 + turn], ids[5 + turn :]
            stream.put(torch.tensor([prompt]))
            for token in new:
                stream.put(torch.tensor([token]))
            stream.end()
            if "\ufffd" not in tokenizer.decode(ids):
                assert "".join(pieces) == continuation(tokenizer, prompt, new)
    words = "a b c a é b c é é a b c" if make is sentencepiece_like else "naïve — ok 漢字, fine."
    ids = tokenizer(words).input_ids
    for cut in range(1, len(ids)):
        pieces = []
        stream = TextStream(tokenizer, pieces.append)
        stream.put(torch.tensor([ids[:cut]]))
        for token in ids[cut:]:
            stream.put(torch.tensor([token]))
        stream.end()
        assert "".join(pieces) == continuation(tokenizer, ids[:cut], ids[cut:])


# ---------------------------------------------------------------- no tokenizer, and why


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A model's folder without a tokenizer."""
    folder = tmp_path_factory.mktemp("bare")
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_token_ids_need_no_tokenizer_and_text_says_what_is_missing(bare, monkeypatch, tmp_path):
    folder = shutil.copytree(bare, tmp_path / "model")
    (folder / "tokenizer.model").write_bytes(b"\n\x05never read")
    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    target = load_target(str(folder))
    assert target.tokenizer is None
    assert plain(target, [[1, 2]], settings(max_new_tokens=2)).tokens
    with pytest.raises(InputError, match=r"PROMPTS is text.*pip install sentencepiece") as found:
        tokenizer_of(target, "PROMPTS")
    assert found.value.__cause__ is target.tokenizer_error
    with pytest.raises(InputError, match=r"stop_strings is text.*pip install sentencepiece"):
        plain(target, [[1]], settings(max_new_tokens=2, stop_strings=["a"]))


@pytest.mark.parametrize("raised", [ImportError("pip install rjieba"), TypeError("None")])
def test_whatever_a_family_raises_is_kept(bare, monkeypatch, raised):
    import transformers

    def fail(*args, **options):
        raise raised

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    target = load_target(str(bare))
    with pytest.raises(InputError, match=str(raised)):
        tokenizer_of(target, "prompt")
    assert target.tokenizer_error.__cause__ is raised


def test_a_target_made_by_hand_has_none():
    with pytest.raises(InputError, match=r"Llama.*has no tokenizer"):
        tokenizer_of(tiny("llama"), "prompt")


def test_missing_files_are_named(bare):
    with pytest.raises(InputError, match="cannot be loaded: none of its files"):
        load_tokenizer(TargetConfig(path=str(bare)))


# ---------------------------------------------------------------- paths that are no model


def test_a_folder_with_code_of_its_own_is_refused_without_a_question(bare, monkeypatch, tmp_path):
    folder = shutil.copytree(bare, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {
        "AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('run')")

    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append("run it?") or "n")
    for load in (load_target, lambda path: load_model_config(TargetConfig(path=path))):
        with pytest.raises(InputError, match=r"never run here. What the installed") as found:
            load(str(folder))
        assert "trust_remote_code" not in str(found.value) and not asked


def test_code_of_its_own_beside_a_known_class_is_left_alone(bare, tmp_path):
    folder = shutil.copytree(bare, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    assert type(load_target(str(folder)).model) is LlamaForCausalLM


@pytest.mark.parametrize(
    ("name", "kind"),
    [("model.safetensors", "weights alone"), ("config.json", "not a folder")],
)
def test_a_file_is_called_what_it_is(tmp_path, name, kind):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"{kind}.*give the folder"):
        load_target(str(tmp_path / name))
