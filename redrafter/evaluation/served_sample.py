"""Is what a server says the target's? A few of its greedy answers beside the target's own scores.

The target is run along the server's answer, token by token (`lossless.reference`). The scores that
the server chose by are not known, so a token that is not the target's own choice is explained where
the scores of the two are closer than rounding moves both: gap <= 2 * rounding, `rounding` being
what `lossless` measures of the target as it is loaded here. Of a text without token ids other
tokens may stand for the same text, which is compared then. Source: ours, after `lossless`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from redrafter.contracts import InputError
from redrafter.data.answers import Answer, Asked, generation_config
from redrafter.decode.verify import choose
from redrafter.evaluation.lossless import reference
from redrafter.processes import say
from redrafter.targets.model import Target
from redrafter.targets.text import text_of


@dataclass
class Difference:
    """A token of a server that the target would not have said. gap: of the target's own scores;
    rounding: what is explained"""

    prompt: int
    position: int
    token: int
    own: int
    gap: float
    rounding: float

    @property
    def explained(self) -> bool:
        return self.gap <= 2 * self.rounding


@torch.inference_mode()
def differences(
    target: Target, asked: Sequence[Asked], answers: Sequence[Answer], past_eos: bool = False
) -> list[Difference]:
    """Every token of some greedy answers that is not the target's own choice there.

    past_eos: the answers go on behind an EOS, as a server's do that was told to ignore it
    """
    found: list[Difference] = []
    for prompt, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        config = generation_config(0.0, len(answer.tokens))
        if past_eos:
            config.eos_token_id = -1
        along = reference(target, question.ids, config, 0, answer.tokens)
        choices = choose(along.scores, None).tolist()
        places = [i for i, own in enumerate(choices) if own != answer.tokens[i]]
        if places and "as text" in (answer.counted or {}):
            more = generation_config(0.0, 2 * len(answer.tokens))  # of shorter tokens it needs more
            own_tokens = reference(target, question.ids, more, 0).tokens
            said, own_text = (text_of(target.tokenizer, t) for t in (answer.tokens, own_tokens))
            if own_text.startswith(said):
                continue
        for i in places:
            token, own = answer.tokens[i], choices[i]
            gap = float(along.scores[i, own].double() - along.scores[i, token].double())
            found.append(Difference(prompt, i, token, own, gap, along.rounding))
    return found


def compare_sample(target: Target, asked: Sequence[Asked], answers: Sequence[Answer]) -> None:
    """Say what a sample of greedy answers has shown. Raises InputError where a token of them is
    neither the target's own nor a near-tie."""
    found = differences(target, asked, answers)
    tokens = sum(len(answer.tokens) for answer in answers)
    wrong = [d for d in found if not d.explained]
    if not wrong:
        say(
            f"{len(answers)} greedy answers of the server: {tokens} tokens, "
            f"{len(found)} of them near-ties of the target's own choice, the others that choice"
        )
        return
    first = wrong[0]
    token, own = (_shown(target, t) for t in (first.token, first.own))
    raise InputError(
        f"the server's greedy answers are not the target's: {len(wrong)} of {tokens} tokens in "
        f"{len({d.prompt for d in wrong})} of {len(answers)} answers. First: sampled prompt "
        f"{first.prompt}, token {first.position}: {token} where the target says {own}, by "
        f"{first.gap:.3g}; rounding explains {2 * first.rounding:.3g}. Does the server run this "
        "checkpoint, unquantised and with its own template, and does --target.dtype say the dtype "
        "it computes in? --answers.requests.check_prompts 0 takes its answers as they are"
    )


def _shown(target: Target, token: int) -> str:
    return repr(token if target.tokenizer is None else text_of(target.tokenizer, [token]))
