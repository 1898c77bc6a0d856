"""What a training step holds in memory, measured in a process of its own by the shipped script."""

import json
import sys

import pytest
from launching import ROOT, run_copy

from redrafter.config import LossConfig

DEPTH = 5
#: tensors of logits that live at once: (cross-entropy, any other loss)
LOGITS = (4, 7)
#: M x E floats that live at once: activations of the head, features, their gradients
ACTIVATIONS = 12
SLACK = 40_000_000  # bytes: scratch memory of the matrix products, the allocator's rests

VOCAB = 32_000
CHUNK = 384  # 49 MB of logits: above 32 MB, glibc gives freed memory back at once
POSITIONS = 400  # all logits at once: 0.26 GB; of a loss that holds more of a chunk, more
POSITIONS_KL = 640
HUGE, POSITIONS_HUGE = 1600, 320  # rows of a chunk, and just as many in all
ROWS = ["--hidden", "32", "--vocab", f"{VOCAB}", "--chunk_rows", f"{CHUNK}"]
HIDDEN = 512
MATRIX = ["--hidden", f"{HIDDEN}", "--vocab", f"{VOCAB}", "--positions", "2"]  # a matrix of 131 MB
CASES = {
    "own": [*ROWS, "--positions", f"{POSITIONS}"],
    "frozen": [*ROWS, "--positions", f"{POSITIONS}", "--output", "target"],
    "kl": [*ROWS, "--positions", f"{POSITIONS_KL}", "--loss", "kl"],
    "huge chunks": [*ROWS, "--positions", f"{POSITIONS_HUGE}", "--chunk_rows", f"{HUGE}"],
    "matrix": MATRIX,
    "matrix accumulated": [*MATRIX, "--accumulation", "2"],
}
RUN = """
import json, sys
sys.path.insert(0, sys.argv[2])
import measure_step_memory as script
cases = json.loads(sys.argv[1])
print(json.dumps({name: script.measure(script.parse_args(args)) for name, args in cases.items()}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if sys.platform != "linux":
        pytest.skip("the resident set is read from /proc")
    folder = tmp_path_factory.mktemp("memory")
    (folder / "run.py").write_text(RUN)
    status, said = run_copy(
        folder / "run.py", [json.dumps(CASES), ROOT / "scripts/dev"], folder / "said.txt"
    )
    assert status == 0, said
    return json.loads(said.splitlines()[-1])


def bound(positions: int, hidden: int, vocab: int, chunk_rows: int, logits: int) -> int:
    """Bytes that a step may hold above weights, gradients and optimizer state (float32)."""
    activations = ACTIVATIONS * positions * DEPTH * 2 * hidden
    return 4 * (activations + logits * chunk_rows * vocab) + SLACK


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, positions", [("own", POSITIONS), ("frozen", POSITIONS), ("kl", POSITIONS_KL)]
)
def test_only_one_chunk_of_logits_lives_at_a_time(found, case, positions):
    allowed = bound(positions, 32, VOCAB, CHUNK, LOGITS[case == "kl"])
    assert allowed < positions * DEPTH * VOCAB * 4, "a single copy of all logits would fit too"
    assert found[case]["peak_above_bytes"] < allowed


@pytest.mark.slow
def test_the_measurement_sees_larger_chunks(found):
    """Else the test above could not fail."""
    found = found["huge chunks"]["peak_above_bytes"]
    assert found > 3 * HUGE * VOCAB * 4
    assert found > bound(POSITIONS_HUGE, 32, VOCAB, CHUNK, LOGITS[0])


@pytest.mark.slow
def test_the_gradient_of_the_matrix_is_there_once(found):
    matrix = VOCAB * 2 * HIDDEN * 4
    assert found["matrix"]["gradients_bytes"] > matrix
    assert found["matrix"]["peak_above_bytes"] < matrix / 4
    # Autograd's own sum over micro-batches holds two: the measurement would have seen a second one.
    assert found["matrix accumulated"]["peak_above_bytes"] > 0.9 * matrix


def test_default_chunks_suit_a_vocabulary_of_128k():
    """Two rows of 512 positions, hidden width 2048: under 3 GB, by the bound tested above."""
    for logits in LOGITS:
        assert bound(1024, 2048, 128_000, LossConfig().chunk_rows, logits) < 3e9
