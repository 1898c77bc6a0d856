"""Speculative decoding, whole: draft, verify, accept, repeat. It needs transformers alone, and
gives the tokens of greedy decoding, which are the library's.

  python examples/teaching_loop.py TARGET "a text to go on with"
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


def copy_what_followed(ids: list[int], n: int = 4, longest: int = 3) -> list[int]:
    """A drafter: up to n tokens that followed the last occurrence of the text's end."""
    for size in range(min(longest, len(ids) - 1), 0, -1):
        for start in range(len(ids) - size - 1, -1, -1):
            if ids[start : start + size] == ids[-size:]:
                return ids[start + size : start + size + n]
    return []


@torch.inference_mode()
def speculate(model, ids: list[int], n_new: int, draft=copy_what_followed) -> tuple[list[int], int]:
    """(new tokens, forwards of the model). Greedy; draft: a function of the tokens so far."""
    ids, stop, steps, eos = list(ids), len(ids) + n_new, 0, model.generation_config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [eos])
    cache = DynamicCache(config=model.config)
    known = 0  # tokens whose keys and values lie in it
    while len(ids) < stop:
        # Draft. The last token of a draft would be followed by the model's own: leave it room.
        guesses = draft(ids)[: stop - len(ids) - 1]
        # Verify: one forward over all tokens that are new to the cache, the guesses included.
        new = torch.tensor([ids[known:] + guesses], device=model.device)
        logits = model(input_ids=new, past_key_values=cache).logits[0]
        steps += 1
        # What the model itself says at the last sure token, and behind each guess.
        own = logits[-len(guesses) - 1 :].argmax(-1).tolist()
        # Accept: guesses count as long as they are what the model says; then its own token.
        right = 0
        while right < len(guesses) and guesses[right] == own[right]:
            right += 1
        known = len(ids) + right
        if wrong := len(guesses) - right:
            cache.crop(-wrong)  # forget them
        for token in own[: right + 1]:
            ids.append(token)
            if token in ends:
                return ids[stop - n_new :], steps
    return ids[stop - n_new :], steps


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    tokens, steps = speculate(model, tokenizer(sys.argv[2]).input_ids, 64)
    print(tokenizer.decode(tokens), f"\n[{len(tokens)} tokens in {steps} forwards]")
