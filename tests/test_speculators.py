"""Hidden states of a speculators folder: read, checked, trained on, and written back."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from models import tiny
from safetensors.torch import save_file

from redrafter.cli.export_speculators import main as export_command
from redrafter.cli.import_speculators import main as import_command
from redrafter.config import LossConfig, SourceConfig, StatesConfig
from redrafter.contracts import InputError
from redrafter.data.build_rows import build_rows
from redrafter.data.reading import Stored
from redrafter.data.speculators import SpeculatorsFolder, export_states, import_states
from redrafter.data.states import build_states
from redrafter.data.store import Store
from redrafter.heads.recurrent import RecurrentHead
from redrafter.targets.final_norm import final_norm, undo
from redrafter.targets.load import load_target
from redrafter.training.feed import Feed
from redrafter.training.step import batch_loss, total_weight

F8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def target(tiny_target):
    """Its norm's weight is no 1, so that what is before it and behind it differ."""
    loaded = load_target(str(tiny_target))
    torch.manual_seed(0)
    with torch.no_grad():
        loaded.model.model.norm.weight.mul_(torch.rand_like(loaded.model.model.norm.weight) + 0.5)
    return loaded


def texts(tiny_target, target, folder, n):
    """The beginnings of some texts as rows."""
    file = folder / "short.jsonl"
    lines = (tiny_target / "prompts_train.jsonl").read_text().splitlines()[:n]
    short = [{"text": json.loads(line)["text"][:150]} for line in lines]
    file.write_text("".join(json.dumps(row) + "\n" for row in short))
    source = SourceConfig(str(file), "text", text_prompt_tokens=4)
    return build_rows(source, target.tokenizer, "texts", folder / "rows", progress=False)


@pytest.fixture(scope="module")
def own(target, tiny_target, tmp_path_factory):
    """Our states of some texts."""
    folder = tmp_path_factory.mktemp("own")
    rows = texts(tiny_target, target, folder, 12)
    return build_states(target, rows, StatesConfig(), folder / "states", progress=False)


def streams(target, ids):
    """(T, 3, H): after the first layer, the same again, and the last; seen by own hooks."""
    layers, seen = target.model.model.layers, []
    hooks = [
        layers[i].register_forward_hook(lambda m, given, out: seen.append(out))
        for i in (0, len(layers) - 1)
    ]
    target.states(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    first, last = (out[0][0] if isinstance(out, tuple) else out[0] for out in seen)
    return torch.stack([first, first, last], 1)


def write(folder, target, store, stored=lambda stream: {"hidden_states": stream}, change=None):
    """What speculators would have on disk. change(row, tensors): a fault in a row's file"""
    rows, table = store.rows(), []
    masks = rows.supervised.split(rows.lengths().tolist())
    (folder / "hidden_states").mkdir(parents=True)
    for i in range(rows.n_rows):
        ids = rows.ids(i)
        table.append({"input_ids": ids, "loss_mask": masks[i].long().tolist(), "seq_len": len(ids)})
        made = {"token_ids": torch.tensor(ids), **stored(streams(target, ids))}
        made = made if change is None else change(i, made)
        if made is not None:
            save_file({k: v.contiguous() for k, v in made.items()},
                      folder / "hidden_states" / f"hs_{i}.safetensors")  # fmt: skip
    Dataset.from_list(table).save_to_disk(str(folder))
    return SpeculatorsFolder(folder)


def in_8_bits(stream):
    scale = stream.float().abs().amax((1, 2), keepdim=True) / torch.finfo(F8).max
    return {"hidden_states": (stream / scale).to(F8), "hidden_states_scales": scale}


def states_of(store):
    return store.read(range(store.n_rows), ["states"])["states"].float()


@pytest.mark.parametrize(
    "stored, close",
    [(None, 1e-6), (lambda s: {"hidden_states": s.bfloat16()}, 0.01), (in_8_bits, 0.06)],
    ids=["float32", "bfloat16", "fp8"],
)
def test_an_imported_store_holds_the_targets_states(target, own, tmp_path, stored, close):
    more = {} if stored is None else {"stored": stored}
    source = write(tmp_path / "s", target, own, **more)
    store = import_states(target, source, StatesConfig(), tmp_path / "a", progress=False)
    assert store.rows().tokens.tolist() == own.rows().tokens.tolist()
    assert store.rows().supervised.tolist() == own.rows().supervised.tolist()
    mine, theirs = states_of(own), states_of(store)
    assert float((mine - theirs).norm() / mine.norm()) < close
    assert (stored is None) == torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    again = import_states(target, source, StatesConfig(), tmp_path / "a", progress=False)
    assert again.digest == store.digest


def test_a_head_learns_from_it_as_from_our_own(target, own, tmp_path):
    """100 steps: every step's loss is the same to 1e-4."""
    source = write(tmp_path / "s", target, own)
    store = import_states(target, source, StatesConfig(), tmp_path / "a", progress=False)
    losses = []
    for made in (own, store):
        torch.manual_seed(0)
        head = RecurrentHead.for_target(target)
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
        feed = Feed(target, [Stored(made)], positions=24, depth=3, seed=0)
        loss = LossConfig(cross_entropy=1.0)
        for step in range(100):
            batch = feed.step(step)
            value, _ = batch_loss(head, head, target, batch, loss, total_weight(batch, loss))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
    mine, theirs = torch.tensor(losses).view(2, 100)
    assert mine[-10:].mean() < 0.8 * mine[:10].mean(), "nothing was learned: this tested nothing"
    assert float((mine - theirs).abs().max()) < 1e-4


@pytest.mark.parametrize(
    "stored, said",
    [
        (lambda s: s[:, [0, 2, 1]], "column 1 would fit"),
        (lambda s: s.roll(1, 0), "those -1 position away would fit"),
        (lambda s: s.roll(-1, 0), r"those \+1 position away would fit"),
        ("normed", "the states behind the norm would fit"),
        (lambda s: s.flip(-1), r"by 1\.\d+ \(median, relative\)\. Were they made with this"),
    ],
)
def test_states_read_wrongly_are_found_and_named(target, own, tmp_path, stored, said):
    if stored == "normed":
        norm = target.model.model.norm

        def stored(s):
            return torch.cat([s[:, :2], norm(s[:, 2:])], 1).detach()

    source = write(tmp_path / "s", target, own, lambda s: {"hidden_states": stored(s)})
    with pytest.raises(InputError, match=said):
        import_states(target, source, StatesConfig(), tmp_path / "a", progress=False)
    assert not list((tmp_path / "a").glob("shard-*"))
    import_states(target, source, StatesConfig(), tmp_path / "a", check_rows=0, progress=False)


def test_what_is_left_out_is_counted(target, own, tmp_path):
    def change(row, made):
        if row == 2:
            return None  # its request was lost
        if row == 3:
            made["token_ids"] = made["token_ids"] + 1
        if row == 4:
            made["hidden_states"] = made["hidden_states"][:-1]
        if row == 5:
            made["hidden_states"] = made["hidden_states"] * float("inf")
        return made

    source = write(tmp_path / "s", target, own, change=change)
    table = [dict(row) for row in source.data]
    table[6]["loss_mask"] = [0] * len(table[6]["loss_mask"])
    table[8] = table[7]
    Dataset.from_list(table).save_to_disk(str(tmp_path / "t"))
    (tmp_path / "s/hidden_states/hs_8.safetensors").write_bytes(
        (tmp_path / "s/hidden_states/hs_7.safetensors").read_bytes()
    )
    source = SpeculatorsFolder(tmp_path / "t", tmp_path / "s/hidden_states")
    store = import_states(target, source, StatesConfig(), tmp_path / "a", check_rows=2,
                          progress=False)  # fmt: skip
    listed = {r["source_row"]: r["reason"] for s in store.manifest["shards"] for r in s["rejected"]}
    assert {2: "no hidden states", 6: "nothing of it is learned", 8: "duplicate"}.items() <= (
        listed.items()
    )
    assert "hs_3" in listed[3] and "hs_4" in listed[4] and "not finite" in listed[5]
    counts = store.counts
    assert (counts["rows"], counts["skipped"], counts["failed"]) == (own.n_rows - 6, 4, 2)
    assert store.manifest["input"] == own.n_rows
    for broken, why in [
        (tmp_path / "s/hidden_states", "no data set"), (tmp_path / "t", "does not exist: name"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=why):
            SpeculatorsFolder(broken)
    narrow = tiny("llama")
    with pytest.raises(InputError, match="token"):
        import_states(narrow, source, StatesConfig(), tmp_path / "n", progress=False)


def test_there_and_back(target, tiny_target, own, tmp_path):
    """Exported, one layer lies there, from which the same states come back."""
    assert export_states(target, own, tmp_path / "s", progress=False) == own.n_rows
    source = SpeculatorsFolder(tmp_path / "s")
    assert source.stream(0, own.rows([0]).ids(0)).shape[1] == 1
    back = import_states(target, source, StatesConfig(), tmp_path / "a", progress=False)
    torch.testing.assert_close(states_of(back), states_of(own), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="exists: give another"):
        export_states(target, own, tmp_path / "s")
    other = load_target(str(tiny_target))
    with pytest.raises(InputError, match="made with another target"):
        export_states(other, own, tmp_path / "b")


def test_the_final_norm_of_each_family():
    for family in ("llama", "gemma3_text", "gpt2", "gpt_neox", "phi3", "mistral"):
        target = tiny(family)
        norm = final_norm(target)
        assert norm is dict(target.backbone.named_modules())[
            {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(family, "norm")
        ]
        states = target.states(torch.arange(1, 9)[None])[0]
        if family in ("gpt2", "gpt_neox"):
            biased = copy.deepcopy(norm)
            torch.nn.init.normal_(biased.weight)
            torch.nn.init.normal_(biased.bias)
            with pytest.raises(InputError, match="cannot be undone"), torch.inference_mode():
                undo(biased, biased(torch.randn_like(states)))
        else:
            with torch.inference_mode():
                for size in (1.0, 1e-2):  # where epsilon is nothing, and where it is not
                    given = norm(size * torch.randn_like(states))
                    torch.testing.assert_close(norm(undo(norm, given)), given, rtol=1e-5, atol=1e-6)


def test_the_commands(tiny_target, tmp_path, capsys):
    words = [f"--target.path={tiny_target}"]
    target = load_target(str(tiny_target))
    rows = texts(tiny_target, target, tmp_path, 3)
    build_states(target, rows, StatesConfig(), tmp_path / "states", progress=False)
    assert export_command([*words, f"--store={tmp_path / 'states'}",
                           f"--output_dir={tmp_path / 's'}"]) == 0  # fmt: skip
    assert import_command([*words, f"--folder={tmp_path / 's'}",
                           f"--output_dir={tmp_path / 'a'}"]) == 0  # fmt: skip
    assert "3 given = 3 written + 0 skipped + 0 failed" in capsys.readouterr().out
    assert json.loads((tmp_path / "a/job.json").read_text())["imported_from"] == "speculators"
    assert Store(tmp_path / "a", "states").n_rows == 3
