"""A model whose language model is a part of it (vision and language) is a text target."""

import pytest
import torch
from models import prompts, replays
from transformers import AutoModelForImageTextToText, Gemma3Config, GenerationConfig

from redrafter.config import TargetConfig
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.targets.load import load_target

NEW = 24


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    torch.manual_seed(0)
    config = Gemma3Config(
        tie_word_embeddings=False,
        text_config=dict(
            vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, intermediate_size=48, max_position_embeddings=128,
            sliding_window=8, query_pre_attn_scalar=8, initializer_range=0.3,
            tie_word_embeddings=False,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        vision_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            image_size=28, patch_size=14,
        ),
        boi_token_index=60, eoi_token_index=61, image_token_index=62, mm_tokens_per_image=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("nested")
    AutoModelForImageTextToText.from_config(config, dtype=torch.float64).save_pretrained(folder)
    return load_target(TargetConfig(str(folder), dtype="float64", device="cpu"))


def test_its_texts_are_those_of_generate_and_drafting_changes_none(target):
    rows = prompts((9, 3, 14))
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    want = plain(target, rows, config).tokens
    for row, text in zip(rows, want, strict=True):
        ids = torch.tensor([row])  # without a mask, `generate` takes token 0 for padding
        stock = target.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
            eos_token_id=None,
        )  # fmt: skip
        assert stock[0, len(row) :].tolist() == text and len(set(text)) > 3
    texts = [row + text for row, text in zip(rows, want, strict=True)]
    for name, drafter in replays(texts, vocab=64).items():
        assert speculative(target, rows, config, drafter=drafter).tokens == want, name
