"""log Z of the target's predictions, by which a pruned head learns without the pruned columns."""

import torch
from torch import nn

from redrafter.targets.load import load_target
from redrafter.training.normalizers import Normalizers, projects_columns


class Capped:
    """A target of 3 numbers and 11 tokens."""

    sharded, dtype, device = False, torch.float64, torch.device("cpu")
    vocab_size, hidden_size = 11, 3
    _logit_scale, _logit_cap, wide_head = 1.0, 2.0, None

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.seed = seed
        self.lm_head = nn.Linear(3, 11, bias=True, dtype=self.dtype)
        self.asked = 0

    def fingerprint(self):
        return f"weights {self.seed}"

    def project(self, hidden):
        self.asked += len(hidden)
        return torch.tanh(self.lm_head(hidden) / 2.0) * 2.0


def columns_of(lengths, supervised):
    torch.manual_seed(1)
    n = sum(lengths)
    states = torch.randn(n, 3, dtype=torch.float64)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return {"states": states, "supervised": torch.tensor(supervised, dtype=torch.bool)}, offsets


def test_one_number_for_every_position_that_a_label_follows():
    target = Capped()
    columns, offsets = columns_of([4, 3], [0, 0, 1, 1, 1, 0, 1])
    found = Normalizers(target).of(columns, offsets, torch.tensor([[0, 7], [0, 2]]))
    wanted = target.project(columns["states"]).logsumexp(-1)
    follows = torch.tensor([0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)  # never past a row's end
    torch.testing.assert_close(found[follows], wanted[follows])
    assert not found[~follows].any()


def test_a_row_is_projected_once_and_its_numbers_do_not_depend_on_its_neighbours():
    target = Capped()
    columns, offsets = columns_of([4, 3], [1] * 7)
    normalizers = Normalizers(target)
    first = normalizers.of(columns, offsets, torch.tensor([[0, 7], [1, 7]]))
    assert target.asked == 2 * normalizers.chunk
    other = {name: torch.cat((c[4:], c[:4])) for name, c in columns.items()}
    again = normalizers.of(other, torch.tensor([0, 3, 7]), torch.tensor([[1, 7], [0, 7]]))
    alone = {name: c[4:] for name, c in columns.items()}
    fresh = Normalizers(target).of(alone, torch.tensor([0, 3]), torch.tensor([[1, 7]]))
    assert target.asked == 3 * normalizers.chunk
    assert torch.equal(again, torch.cat((first[4:], first[:4])))
    assert torch.equal(fresh, first[4:])


def test_those_of_a_stores_rows_are_there_for_the_next_training(tmp_path, monkeypatch):
    """Of the same store and target; whatever else is in the folder, or cannot be put there."""
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path))
    columns, offsets = columns_of([4, 3], [1] * 7)
    keys = torch.tensor([[0, 7], [1, 7]])

    def asked(stores, seed=0):
        target = Capped(seed)
        made = Normalizers(target, stores).of(columns, offsets, keys)
        assert torch.equal(made, Normalizers(Capped(seed)).of(columns, offsets, keys))
        return target.asked // Normalizers(target).chunk

    assert asked(["a", "b"]) == 2 and asked(["a", "b"]) == 0
    assert asked(["d", None]) == 2, "row 7 of another store is another row"
    assert asked(["a", "c"]) == 1 and asked(["a", "b"], seed=1) == 2
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-4])
    assert asked(["a", "b"]) == 2 and asked(["a", "b"]) == 0, "cut off, and made anew"
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path / "file"))
    assert asked(["a", "b"]) == 2 and asked(["a", "b"]) == 2


def test_only_a_plain_matrix_gives_some_of_its_columns(tiny_target):
    target = load_target(str(tiny_target))
    assert projects_columns(target)
    hidden = torch.randn(2, target.hidden_size, dtype=target.dtype)
    some = torch.tensor([3, 1, 40])
    torch.testing.assert_close(target.project(hidden, some), target.project(hidden)[:, some])

    other = Capped()
    other.lm_head = nn.Sequential(other.lm_head)
    assert not projects_columns(other)
