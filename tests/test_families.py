"""Every causal LM that this transformers knows: exact in float64, or refused with the reason.

`families.json` says which. A family that moves from one to the other fails here, and so does one
that a newer transformers brings: run its test, see what comes out, give it its line in the table.
"""

import pytest
from families import FAMILIES, TABLE, build, check_texts, outcome

from redrafter.targets.model import Target

SINGLE = [family for family in FAMILIES if not TABLE.get(family, "").startswith("not built")]


@pytest.mark.parametrize("family", SINGLE)
def test_family(family):
    model = build(family)
    found = outcome(model)
    known = TABLE.get(family)
    assert known is not None, (
        f'{family} is not in tests/families.json: add "{family}": "{found}" (of a refusal the '
        "words that give the reason), and sizes to tests/families.py where it is not small"
    )
    verdict, _, reason = known.partition(": ")
    assert found.startswith(verdict) and reason in found, f"{family} was {known!r}, is {found!r}"
    if verdict == "refused":
        assert type(model).__name__ in found


def test_table_says_nothing_of_families_that_are_gone():
    """Of those that cannot be made small it says why; all others are made."""
    assert set(TABLE) - set(FAMILIES) == set()
    assert {known.partition(":")[0] for known in TABLE.values()} == {
        "exact",
        "refused",
        "not built",
    }
    assert all(known.partition(": ")[2] for known in TABLE.values() if known != "exact")


def test_the_comparison_sees_a_wrong_text():
    """A target whose positions are one off for short rows alone is caught, so `exact` means it."""
    target = Target(build("gpt2"))
    forward = target.forward

    def shifted(tokens, positions, *args, **kwargs):
        return forward(tokens, positions + (positions == 3), *args, **kwargs)

    target.forward = shifted
    with pytest.raises(AssertionError, match="against fresh forwards"):
        check_texts(target, sampled=False)
