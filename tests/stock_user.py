"""A user who has transformers and an exported head, and not this library.

    python -I stock_user.py MODEL HEAD OTHER_HEAD OUT.json

MODEL has 48 tokens; HEAD is its head, OTHER_HEAD another model's. Results of every case, plain and
with the head, are left in OUT for `test_custom_generate.py` to judge.
"""

from __future__ import annotations

import copy
import json
import pickle
import sys
import warnings
from pathlib import Path
from string import ascii_letters

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

VOCAB, EOS, PAD = 48, [5, 17], 0
PADDED = 11  # tokens that the longest of the first four prompts has
SAMPLED = dict(do_sample=True, temperature=0.8, top_k=20, top_p=0.9)
SEEDS = [11, 12, 13, 14]


class Refuse:
    """No module of the library can be imported, wherever it may be installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "redrafter":
            raise ModuleNotFoundError(f"No module named {name!r}")


class AfterEven(LogitsProcessor):
    """Reads the last token and the length."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[input_ids[:, -1] % 2 == 0, 3 + input_ids.shape[1] % 5 :: 4] -= 3.0
        return scores


class AtMultiple(StoppingCriteria):
    """Ends a row after a multiple of 7."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 7 == 0


class Collect(BaseStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value.flatten().tolist())

    def end(self):
        self.seen.append("end")


def letters() -> PreTrainedTokenizerFast:
    """A letter per token: a .. z, then A .. V."""
    tokenizer = Tokenizer(BPE({c: i for i, c in enumerate(ascii_letters[:VOCAB])}, []))
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


#: name -> (rows of the batch, arguments), each made anew for both ways of decoding
CASES = {
    "repetition_penalty": lambda: (1, dict(repetition_penalty=1.4)),
    "no_repeat_ngram_size": lambda: (4, dict(no_repeat_ngram_size=2)),
    "bad_words_ids": lambda: (4, dict(bad_words_ids=[[8], [43, 26]])),
    "suppress_tokens": lambda: (4, dict(suppress_tokens=[1, 2, 3, 40])),
    "sequence_bias": lambda: (4, dict(sequence_bias=[[[8], 3.0], [[9, 4], -5.0]])),
    "min_new_tokens": lambda: (4, dict(min_new_tokens=15)),
    "min_length": lambda: (4, dict(min_length=28)),
    "max_length": lambda: (4, dict(max_length=21, max_new_tokens=None)),
    "exponential_decay": lambda: (1, dict(exponential_decay_length_penalty=(3, 1.3))),
    "forced_eos_token_id": lambda: (1, dict(forced_eos_token_id=5)),
    "eos_token_id": lambda: (4, dict(eos_token_id=[9, 30])),
    "no_eos": lambda: (4, dict(eos_token_id=-1)),
    "pad_token_id": lambda: (4, dict(pad_token_id=44)),
    "forced_bos_token_id": lambda: (4, dict(forced_bos_token_id=7)),
    "begin_suppress_tokens": lambda: (4, dict(begin_suppress_tokens=list(range(0, VOCAB, 2)))),
    "watermarking_config": lambda: (4, dict(
        watermarking_config=WatermarkingConfig(bias=4.0, context_width=1),
    )),
    "prompt_ignored": lambda: (4, dict(logits_processor=LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.6, prompt_ignore_length=PADDED)],
    ))),
    "own_min_length": lambda: (4, dict(
        logits_processor=LogitsProcessorList([MinLengthLogitsProcessor(PADDED + 15, EOS)]),
    )),
    "max_time": lambda: (1, dict(max_time=1e6)),
    "logits_processor": lambda: (1, dict(logits_processor=LogitsProcessorList([AfterEven()]))),
    "stopping_criteria": lambda: (
        4, dict(stopping_criteria=StoppingCriteriaList([AtMultiple()])),
    ),
    "max_length_criterion": lambda: (
        4, dict(stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(20)])),
    ),
    "stop_strings": lambda: (4, dict(stop_strings=["i", "F"], tokenizer=letters())),
    "stop_strings_in_config": lambda: (1, dict(
        tokenizer=letters(),
        generation_config=GenerationConfig(
            stop_strings=["i", "F"], max_new_tokens=18, eos_token_id=EOS, pad_token_id=PAD
        ),
    )),
    "generation_config": lambda: (4, dict(
        generation_config=GenerationConfig(
            max_new_tokens=9, eos_token_id=EOS, pad_token_id=PAD, repetition_penalty=1.0
        ),
    )),
    "context_ends": lambda: (1, dict(max_new_tokens=70, eos_token_id=-1)),
}  # fmt: skip

#: name -> (rows, arguments) that cannot be served
ERRORS = {
    "num_beams": lambda: (1, dict(num_beams=2)),
    "num_beams_sampled": lambda: (1, dict(num_beams=2, do_sample=True)),
    "penalty_alpha": lambda: (1, dict(penalty_alpha=0.6, top_k=4)),
    "prompt_lookup_num_tokens": lambda: (1, dict(prompt_lookup_num_tokens=3)),
    "assistant_model": lambda: (1, dict(assistant_model=torch.nn.Linear(1, 1))),
    "prefix_allowed_tokens_fn": lambda: (1, dict(prefix_allowed_tokens_fn=lambda b, i: [1])),
    "past_key_values": lambda: (1, dict(past_key_values=())),
    "position_ids": lambda: (1, dict(position_ids=torch.zeros(1, 3))),
    "output_scores": lambda: (1, dict(output_scores=True, return_dict_in_generate=True)),
    "output_attentions": lambda: (1, dict(output_attentions=True, return_dict_in_generate=True)),
    "cache_implementation": lambda: (1, dict(cache_implementation="static")),
    "streamer": lambda: (2, dict(streamer=Collect())),
    "tokenizer": lambda: (1, dict(stop_strings=["i"])),
    "pad_token_id": lambda: (2, dict(
        eos_token_id=None, pad_token_id=None,
        stopping_criteria=StoppingCriteriaList([AtMultiple()]),
    )),
    "guidance_scale": lambda: (1, dict(guidance_scale=1.5)),
    "seeds": lambda: (2, dict(do_sample=True, seeds=[1, 2, 3])),
    "tree": lambda: (1, dict(tree={"wide": 3})),
    "max_new_tokns": lambda: (1, dict(max_new_tokns=3)),
}  # fmt: skip


def loads_once(cls: type) -> None:
    """transformers reads, copies and imports a folder's code at every call: here at the first."""
    load, loaded = cls.load_custom_generate, {}

    def once(self, folder, **options):
        if folder not in loaded:
            loaded[folder] = load(self, folder, **options)
        return loaded[folder]

    cls.load_custom_generate = once


class User:
    def __init__(self, model: Path, head: Path):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        loads_once(type(self.model))
        self.model.generation_config.eos_token_id = EOS
        self.model.generation_config.pad_token_id = PAD
        # A random head is right by chance: 8 of 48 tokens a level make every branch occur.
        self.head = dict(
            custom_generate=str(head), trust_remote_code=True, tree={"width": 8, "depth": 3}
        )
        random = torch.Generator().manual_seed(7)
        lengths = torch.randint(2, 13, (50,), generator=random).tolist()
        prompts = [torch.randint(6, VOCAB, (n,), generator=random).tolist() for n in lengths]
        self.prompts = prompts[:24]

    def batch(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """Left-padded, with a token that also stands in texts."""
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def plain(self, rows: int | list, **options):
        return self._made(rows, options)

    def ours(self, rows: int | list, **options):
        return self._made(rows, {**self.head, **options})

    def _made(self, rows, options):
        rows = self.prompts[:rows] if isinstance(rows, int) else rows
        options = {"max_new_tokens": 18, **options}
        if "generation_config" in options:
            del options["max_new_tokens"]
        if options.get("max_new_tokens", 0) is None:
            del options["max_new_tokens"]
        return self.model.generate(**self.batch(rows), **options)


def both(user: User, rows, make) -> dict:
    """Plain and with the head; the options may hold state, so each gets its own."""
    found = {}
    for way in ("plain", "ours"):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            made = getattr(user, way)(rows, **make())
        found[way] = made.tolist()
        found[f"{way}_warned"] = [str(w.message) for w in warned]
    return found


def greedy(user: User, batch: int, forwards: list[int]) -> dict:
    groups = [user.prompts[i : i + batch] for i in range(0, len(user.prompts), batch)]
    found = {"forwards": {}}
    for way in ("plain", "ours"):
        before = len(forwards)
        found[way] = [getattr(user, way)(group).tolist() for group in groups]
        found["forwards"][way] = len(forwards) - before
    return found


def sampled(user: User) -> dict:
    def one(seed=None, **options):
        if seed is not None:
            torch.manual_seed(seed)
        return user.ours(4, **SAMPLED, **options).tolist()

    del user.model._draft_head  # the first call reads the head
    first = [one(seed=5), one()]
    return {
        "seeded": one(seeds=SEEDS),
        "one_seed": one(seeds=3),
        "top_k_50": user.ours(4, do_sample=True, seeds=SEEDS).tolist(),
        "copies": one(seeds=SEEDS, num_return_sequences=2),
        "torch_seeded": [first, [one(seed=5), one()]],
        "prompts": user.prompts[:4],
    }


def streamed(user: User) -> dict:
    found = {}
    for way in ("plain", "ours"):
        streamer = Collect()
        getattr(user, way)(1, streamer=streamer)
        found[way] = streamer.seen
    return found


def left_alone(user: User, head: Path) -> dict:
    """What the model is like afterwards, and what travels with its copies."""
    model = user.model
    model.requires_grad_(True)
    model.lm_head.weight.requires_grad_(False)
    model.train()
    model.model.layers[0].eval()
    del model._draft_head
    wanted = user.ours(2)
    found = {
        "grads": [p.requires_grad for p in model.parameters()].count(False),
        "training": [model.training, model.model.layers[0].training, model.lm_head.training],
        "copy": [type(getattr(m, "_draft_head", None)).__name__
                 for m in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))],
    }  # fmt: skip
    model.eval()
    kept = model._draft_head
    user.ours(2)
    found["kept"] = model._draft_head is kept
    (head / "model.safetensors").touch()
    user.ours(2)
    found["read_again"] = model._draft_head is not kept
    model.float()
    made = user.ours(2)
    found["moved"] = str(model._draft_head.target.dtype)
    model.double()
    found["same"] = made.shape == wanted.shape
    return found


def result(user: User, **options) -> dict:
    made = user.ours(2, return_dict_in_generate=True, **options)
    plain = user.plain(2, return_dict_in_generate=True)
    return {"type": type(made).__name__, "plain_type": type(plain).__name__,
            "ours": made.sequences.tolist(), "plain": plain.sequences.tolist()}  # fmt: skip


def refused(user: User, call) -> list[str]:
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def overflow(user: User) -> list[str]:
    """One row of the model's embedding is infinite, and stands in no prompt."""
    user.ours(1)  # reads the head while the model is what it was trained for
    rows = user.model.get_input_embeddings().weight.data
    made = user.plain(1)[0, len(user.prompts[0]) :].tolist()
    token = next(t for t in made if t not in user.prompts[0])
    kept = rows[token].clone()
    rows[token] = float("inf")
    found = refused(user, lambda: user.ours(1))
    rows[token] = kept
    return found


def models_own(user: User) -> dict:
    """A penalty in the model's own generation configuration, for a padded batch."""
    settings = user.model.generation_config
    settings.repetition_penalty = 1.4
    found = both(user, 4, dict)
    settings.repetition_penalty = None
    return found


def main() -> None:
    model, head, other, out = map(Path, sys.argv[1:])
    sys.meta_path.insert(0, Refuse())
    torch.set_num_threads(1)
    user, forwards = User(model, head), []
    counter = user.model.model.register_forward_hook(lambda *_: forwards.append(1))
    found = {"greedy": {str(b): greedy(user, b, forwards) for b in (1, 4)}}
    counter.remove()
    found["cases"] = {name: both(user, make()[0], lambda make=make: make()[1])
                      for name, make in CASES.items()}  # fmt: skip
    assert max(map(len, user.prompts[:4])) == PADDED
    found["padded"] = {name: both(user, 4, lambda make=make: make()[1])
                       for name, make in CASES.items() if make()[0] == 1}  # fmt: skip
    found["alone"] = [user.plain([row], **CASES["logits_processor"]()[1])[0, len(row):].tolist()
                      for row in user.prompts[:4]]  # fmt: skip
    found["models_own"] = models_own(user)
    found["sampled"] = sampled(user)
    found["streamed"] = streamed(user)
    found["result"] = result(user)
    ids = torch.tensor(user.prompts[:1])
    found["positional"] = {
        "ours": user.model.generate(ids, max_new_tokens=18, **user.head).tolist(),
        "plain": user.model.generate(ids, max_new_tokens=18).tolist(),
    }
    found["hub"] = both_hub(user)
    found["errors"] = {name: refused(user, lambda make=make: user.ours(make()[0], **make()[1]))
                       for name, make in ERRORS.items()}  # fmt: skip
    found["other"] = refused(user, lambda: user.ours(1, custom_generate=str(other)))
    found["other_allowed"] = {
        "ours": user.ours(4, custom_generate=str(other), allow_other_target=True).tolist(),
        "plain": user.plain(4).tolist(),
    }
    found["overflow"] = overflow(user)
    found["left_alone"] = left_alone(user, head)
    found["modules"] = sorted(m for m in sys.modules if m.split(".")[0] == "redrafter")
    out.write_text(json.dumps(found))


def both_hub(user: User) -> dict:
    """From a repository of the Hub, which lies in the cache."""
    user.model._draft_head = None
    made = user.ours(4, custom_generate="user/draft-head.v1")
    return {"ours": made.tolist(), "plain": user.plain(4).tolist(),
            "source": user.model._draft_head.key[:2]}  # fmt: skip


if __name__ == "__main__":
    main()
