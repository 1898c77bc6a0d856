"""One run counted twice: as here, and as serving engines do."""

import json

import pytest
from models import EOS, VOCAB, endless, prompts, settings, tiny

from redrafter.contracts import Lookahead, StepStats
from redrafter.decode.speculative import speculative
from redrafter.drafters.replay import ReplayDrafter
from redrafter.evaluation.figures import acceptance, engine_figures
from redrafter.evaluation.report import engine_table
from redrafter.hub.profile import PROFILE, profile_after, profile_of, write_profile
from redrafter.hub.run import SPEEDS, read_run, results_of


class Engine(Lookahead):
    """Counts by itself what an engine would: what was drafted and accepted in each step, before any
    stop, and nothing where nothing was drafted. Drafts nothing in every third step."""

    level_by_level = False

    def __init__(self, depth):
        self.step, self.seen, self.n = -1, [], 0
        self.depth = depth

    def plan(self):
        self.step += 1
        return 0 if self.step % 3 == 2 else None

    def observe(self, drafted, accepted, truth):
        if self.step >= 0:
            live = self.live
            self.seen += [
                pair for pair, on in zip(zip(drafted.tolist(), accepted.tolist(), strict=True),
                                         live, strict=True) if on
            ]  # fmt: skip
        self.live = self.seqs.live.tolist()

    def begin(self, seqs):
        self.seqs = seqs


@pytest.mark.parametrize("acceptance_of, eos", [(0.9, list(EOS)), (1.0, list(EOS)), (0.6, -1)])
def test_both_countings_of_one_run(acceptance_of, eos):
    target, rows = tiny("llama"), prompts((9, 3, 14, 8, 5, 7, 6, 4), 3)
    config = settings(eos_token_id=eos)
    texts = endless(target, rows, config)
    engine = Engine(4)
    made = speculative(
        target, rows, config, lookahead=engine,
        drafter=ReplayDrafter(texts, VOCAB, 4, 1, acceptance_of),
    )  # fmt: skip
    drafts = [(n, m) for n, m in engine.seen if n]
    stats, tokens = made.stats, sum(map(len, made.tokens))
    drafted = sum(n for n, _ in drafts)
    found = engine_figures(stats, tokens, sum(stats.drafted_at))
    assert found["num_drafts"] == len(drafts) and found["num_draft_tokens"] == drafted
    accepted = sum(m for _, m in drafts)
    assert found["num_accepted_tokens"] == accepted
    assert found["mean_acceptance_length"] == 1 + accepted / len(drafts)
    assert found["draft_acceptance_rate"] == accepted / drafted
    positions = [sum(m > k for _, m in drafts) / len(drafts) for k in range(4)]
    assert found["per_position_acceptance_rate"] == positions
    histogram = [sum(m == j for _, m in drafts) for j in range(5)]
    assert found["acceptance_histogram"] == histogram
    assert found["steps_without_draft"] == len(engine.seen) - len(drafts) > 0
    assert found["spec_accept_length"] == tokens / sum(stats.steps) > stats.tokens_per_step
    # Ours leaves out what lies behind a stop; there must have been some, where rows end by one.
    assert sum(stats.accepted_at) <= accepted
    assert (sum(stats.accepted_at) < accepted) == (eos != -1)


def test_nothing_drafted_is_no_rate():
    found = engine_figures(StepStats([3], [3]), 4, 0)
    assert found["mean_acceptance_length"] is found["draft_acceptance_rate"] is None
    assert (found["num_drafts"], found["acceptance_histogram"]) == (0, [0])
    assert found["steps_without_draft"] == 3


def test_a_head_bears_its_profile(run, capsys):
    """Made from the measured file alone, shown on the card, and gone with the file."""
    from published import released

    read = read_run(run)
    made = json.loads((run / PROFILE).read_text())
    assert made == profile_of(read.speeds, read.head), "eval/speed.py wrote it beside the head"
    (profile,), body = made["profiles"], json.loads((run / "speed.json").read_text())
    engine, ours = (body["methods"]["head"][key] for key in ("engine", "acceptance"))
    marginal, k = profile["marginal_accept_rates"], profile["num_speculative_tokens"]
    assert marginal == engine["per_position_acceptance_rate"] and len(marginal) == k
    assert profile["mean_accept_length"] == pytest.approx(1 + sum(marginal))
    for i, rate in enumerate(profile["conditional_accept_rates"]):
        above = marginal[i - 1] if i else 1.0
        assert rate == (marginal[i] / above if above else None)
    assert set(ours) == set(acceptance([], [])), "the older name stays"
    assert (profile["tree"]["width"], profile["tree"]["depth"], k) == (4, 4, 4)
    where = profile["measurement_conditions"]
    assert (where["num_samples"], where["osl"], where["file"]) == (3, 16, "speed.json")
    release, _ = released(run)
    assert PROFILE in release.files
    card = (release.card / "README.md").read_text()
    assert f"{profile['mean_accept_length']:.2f}" in card.split("### Acceptance by position")[1]
    assert "head" in str(engine_table(body)[1])
    # An older file has no such counts, and another head's is not this one's.
    del body["methods"]["head"]["engine"]
    (run / "speed.json").write_text(json.dumps(body))
    assert write_profile(run, read.head) is None and not (run / PROFILE).exists()
    assert "### Acceptance by position" not in released(run)[0].files
    body["provenance"]["head"]["fingerprint"] = "0" * 16
    (run / "speed.json").write_text(json.dumps(body))
    profile_after(str(run / "speed.json"), str(run), read.head)
    assert "was measured with another head" in capsys.readouterr().out
    assert results_of(run, read.head, ("nothing*.json",)) == () and SPEEDS
