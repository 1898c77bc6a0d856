"""The golden batch of an export, and `eval/verify.py`: what differs is found and named."""

import json
import shutil
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from models import tiny
from transformers import AutoModelForCausalLM

from redrafter.cli.args import parse
from redrafter.cli.verify import main, with_head
from redrafter.config import TrainConfig
from redrafter.contracts import InputError
from redrafter.export import verify_decode
from redrafter.export.complete import complete
from redrafter.export.golden import FACTS, NUMBERS, read_facts, read_golden, write_golden
from redrafter.export.rounding import rounding
from redrafter.export.texts import template_fault, tokenizer_fault
from redrafter.heads.load import load_head
from redrafter.heads.recurrent import RecurrentHead
from redrafter.heads.recurrent_level import ReadyLevels
from redrafter.targets.model import Target
from redrafter.training.loop import Training

SETTINGS = {
    "data.source.format": "text", "data.source.n_rows": 24, "data.source.holdout_rows": 8,
    "data.answers.max_new_tokens": 24, "optim.steps": 12, "optim.batch_positions": 64,
    "optim.depth": 3, "eval.prompts": 6, "eval.max_new_tokens": 8, "eval.every_steps": 12,
    "save_steps": 12, "tracker": "null",
}  # fmt: skip
ALL = ["files", "target", "tokenizer", "template", "dtype", "hidden", "draft", "accepted", "text"]


@pytest.fixture(scope="module")
def exported(tiny_target, tmp_path_factory):
    """A head as the trainer exports it, not to be changed."""
    out = tmp_path_factory.mktemp("verify")
    given = {
        "target.path": tiny_target, "data.source.path": tiny_target / "prompts_train.jsonl",
        "output_dir": out / "head", "data.folder": out / "data", **SETTINGS,
    }  # fmt: skip
    wanted = parse(TrainConfig, [f"--{key}={value}" for key, value in given.items()], "test")
    Training(wanted).train()
    return out / "head"


@pytest.fixture
def head(exported, tmp_path):
    """A copy of it."""
    ignore = shutil.ignore_patterns("checkpoints")
    return shutil.copytree(exported, tmp_path / "head", ignore=ignore)


@pytest.fixture
def check(capsys):
    """check(*arguments) -> (exit status, {check: (word, text)}, the last line)"""

    def run(*words):
        capsys.readouterr()
        status = main([str(word) for word in words])
        *lines, last = capsys.readouterr().out.splitlines()
        lines = [line for line in lines if not line.endswith(": written")]
        found = {(parts := line.split(maxsplit=2))[0]: tuple(parts[1:]) for line in lines}
        assert list(found) == ALL
        return status, found, last

    return run


def changed_target(tiny_target, folder, change):
    """A copy of the target after change(its model)."""
    shutil.copytree(tiny_target, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_target)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- as exported


def test_a_training_leaves_a_golden_batch_that_passes(exported, tiny_target, check, tmp_path):
    """Its target is found by what the export says; on another number of threads, too."""
    out = tmp_path / "verify.json"
    status, found, last = check(exported, "--out", out)
    assert status == 0 and {word for word, _ in found.values()} == {"passed"}
    assert last == f"{exported} computes here what it did when it was exported"
    body = json.loads(out.read_text())
    assert body["passed"] and body["first_difference"] is None
    assert [c["name"] for c in body["checks"]] == ALL
    facts = read_facts(exported)
    assert len(set(map(len, facts["prompts"]))) > 1, "the batch is to be ragged"
    assert sum(sum(row) for row in facts["decodes"]["greedy"]["accepted"]) > 0
    assert facts["decodes"]["greedy"]["tokens"] != facts["decodes"]["sampled"]["tokens"]
    assert str(tiny_target) not in (exported / FACTS).read_text(), "it tells of no folders"
    assert sum((exported / name).stat().st_size for name in (FACTS, NUMBERS)) < 300_000


def test_the_held_out_prompts_are_taken(exported, tiny_target):
    rows = (tiny_target / "prompts_train.jsonl").read_text().splitlines()
    prompts = [json.loads(row)["text"] for row in rows[-8:]]
    facts = read_facts(exported)
    texts = facts["text"]["texts"][1:]
    assert all(any(text.removeprefix("<|endoftext|>") in p for p in prompts) for text in texts)


# ---------------------------------------------------------------- what differs


def test_a_head_of_another_target(head, tiny_target, check, tmp_path):
    other = changed_target(
        tiny_target, tmp_path / "other", lambda m: m.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    )
    status, found, last = check(head, "--target.path", other)
    word, text = found["target"]
    assert (status, word, last) == (1, "FAILED", f"{head} differs first in: target")
    mine = read_facts(head)["target"]["weights"]
    assert f"tiny_target ({mine})" in text and "another target: other (" in text
    assert found["draft"] == ("-", "not made, as target differs")


@pytest.mark.parametrize(
    "name, place",
    [("model.safetensors", -1), ("model.safetensors", 20), (NUMBERS, -1), (FACTS, 400),
     (FACTS, 1), ("config.json", 30)],
)  # fmt: skip
def test_one_flipped_byte(head, check, name, place):
    content = bytearray((head / name).read_bytes())
    content[place] ^= 1
    (head / name).write_bytes(content)
    status, found, last = check(head)
    word, text = found["files"]
    assert (status, word, last) == (1, "FAILED", f"{head} differs first in: files")
    assert text.startswith(name), text
    assert {w for w, _ in found.values()} <= {"FAILED", "-", "passed"}
    assert found["text"][0] == "-"


def test_a_missing_file_and_one_too_many(head, check):
    (head / NUMBERS).unlink()
    (head / "custom_generate").mkdir(exist_ok=True)
    (head / "custom_generate" / "more.py").write_text("")
    _, found, _ = check(head)
    assert found["files"][1] == f"{NUMBERS} is missing; custom_generate/more.py was not exported"


def test_a_changed_template(head, tiny_target, check, tmp_path):
    other = shutil.copytree(tiny_target, tmp_path / "other")
    changed = 0
    for file in (other / "chat_template.jinja", other / "tokenizer_config.json"):
        if file.exists() and "# {{" in (text := file.read_text()):
            file.write_text(text.replace("# {{", "## {{"))
            changed += 1
    assert changed
    status, found, last = check(head, "--target.path", other)
    word, text = found["template"]
    assert (status, word, last) == (1, "FAILED", f"{head} differs first in: template")
    assert "conversation 0 differs from character" in text
    assert "'# Hello! What" in text and " Hello! What" in text and "another chat template" in text
    assert [c for c, (w, _) in found.items() if w != "passed"] == ["template"]


def test_a_wrong_dtype(head, check):
    for dtype in ("bfloat16", "float16"):
        status, found, last = check(head, "--target.dtype", dtype)
        assert (status, last) == (1, f"{head} differs first in: dtype")
        assert found["dtype"] == (
            "FAILED", f"the target computes in {dtype}, the golden batch was made in float32: give "
            "--target.dtype float32, or leave it out",
        )  # fmt: skip
    weights = safetensors.torch.load_file(head / "model.safetensors")
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in weights.items()}
    safetensors.torch.save_file(half, head / "model.safetensors")
    _, found, last = check(head)
    assert last == f"{head} differs first in: files"
    # Stored in half precision it computes as its target does.
    assert found["dtype"] == ("passed", "float32, the head float32")


def test_weights_that_the_digest_does_not_sample(head, tiny_target, check, tmp_path):
    """Every second value of this matrix is no part of the fingerprint."""

    def change(model):
        weight = model.model.layers[1].mlp.up_proj.weight
        assert weight.numel() >= 2 * 4096
        weight.view(-1)[1::2] *= 1.01

    other = changed_target(tiny_target, tmp_path / "other", change)
    status, found, last = check(head, "--target.path", other)
    assert found["target"][0] == "passed", "else this tests something else"
    assert (status, last) == (1, f"{head} differs first in: hidden")
    assert found["hidden"][1].startswith("prompt 0, position ")
    assert found["draft"][0] == "passed", "it begins at the stored hidden states"


def test_another_recurrence(head, check, monkeypatch):
    advance = RecurrentHead.advance
    monkeypatch.setattr(RecurrentHead, "advance", lambda *given: advance(*given) + 1e-3)
    monkeypatch.setattr(ReadyLevels, "make", lambda *_: None)  # these are the same by kernels
    status, found, last = check(head)
    assert (status, last) == (1, f"{head} differs first in: draft")
    assert found["draft"][1].startswith("prompt 0, depth 1: the head's logits are ")
    assert found["text"][0] == "passed", "a draft changes no token"


def test_a_verification_that_is_wrong(head, check, monkeypatch):
    """Forwards over trees prefer token 7: other tokens, by no near-tie."""
    forward = Target.forward

    def planted(self, *args, keep=None, **kwargs):
        out = forward(self, *args, keep=keep, **kwargs)
        if keep is None:
            out.logits[..., 7] += 50
        return out

    monkeypatch.setattr(Target, "forward", planted)
    # which finds it when it is loaded
    monkeypatch.setattr("redrafter.targets.load.check_once", lambda target, files: None)
    status, found, last = check(head)
    assert (status, last) == (1, f"{head} differs first in: text")
    assert found["text"][1].startswith("greedy, prompt 0, new token 1: 7 (")
    assert "and 7 more like this" in found["text"][1]


# ---------------------------------------------------------------- near-ties


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """(head, target, its golden batch, a, b): tokens a and b are the same to the target, and a is
    the sixth of a greedy text."""
    folder = tmp_path_factory.mktemp("twins")
    target = tiny("llama", vocab_size=256)  # changed below; no other test has it
    torch.manual_seed(0)
    RecurrentHead.for_target(target).save_pretrained(folder)
    write_golden(folder, target)
    texts = read_golden(folder).facts["decodes"]["greedy"]["tokens"]
    a = texts[1][5]
    b = next(t for t in range(target.vocab_size - 1, a, -1) if all(t not in row for row in texts))
    with torch.inference_mode():
        for weight in (target.lm_head_weight, target.model.get_input_embeddings().weight):
            weight[b] = weight[a]
    write_golden(folder, target)
    return load_head(folder, target, True), target, folder, a, b


def compared(twins, change):
    head, target, folder, a, _ = twins
    golden = read_golden(folder)
    how = golden.facts["decodes"]["greedy"]
    assert how["tokens"][1][5] == a
    change(golden, how)
    with torch.inference_mode():
        return verify_decode.check_decodes(head, target, golden, 1e-6)


def test_a_tie_is_no_fault(twins):
    def change(golden, how):
        how["tokens"][1][5] = twins[4]

    accepted, text = compared(twins, change)
    assert text == (True, "128 tokens are the same, but for near-ties: 1")
    assert accepted[0], accepted


def test_what_is_no_tie_is_one(twins):
    """A token that nearly won is a fault; and one behind a tie, where the texts have parted."""

    def change(golden, how):
        start = len(how["tokens"][0])
        how["tokens"][1][5] = int(golden.tensors["greedy.score_ids"][start + 5, 3])

    _, (passed, text) = compared(twins, change)
    assert not passed and text.startswith("greedy, prompt 1, new token 5: ")

    def later(golden, how):
        how["tokens"][1][5] = twins[4]
        start = len(how["tokens"][0])
        how["tokens"][1][9] = int(golden.tensors["greedy.score_ids"][start + 9, 3])

    _, (passed, text) = compared(twins, later)
    assert not passed and text.startswith("greedy, prompt 1, new token 9: ")


def test_scores_that_are_far_apart_explain_nothing(twins):
    def change(golden, how):
        how["tokens"][1][5] = twins[4]
        golden.tensors["greedy.scores"][len(how["tokens"][0]) + 5] += 1.0

    _, (passed, text) = compared(twins, change)
    assert not passed and "differ from the stored ones by 1.0e+00" in text


def test_texts_that_end_elsewhere(twins):
    def shorter(golden, how):
        how["tokens"][2].pop()
        how["finish"][2] = "eos"
        for key in ("scores", "score_ids"):
            numbers = golden.tensors[f"greedy.{key}"]
            at = sum(map(len, how["tokens"][:3]))
            golden.tensors[f"greedy.{key}"] = torch.cat((numbers[:at], numbers[at + 1 :]))

    _, (passed, text) = compared(twins, shorter)
    assert (passed, text) == (
        False, "greedy, prompt 2: 16 tokens here, ended by length; then 15, ended by eos"
    )  # fmt: skip

    def reason(golden, how):
        how["finish"][0] = "eos"

    _, (passed, text) = compared(twins, reason)
    assert (passed, text) == (False, "greedy, prompt 0: ended by length here, then by eos")


def test_another_number_accepted(twins):
    def change(golden, how):
        how["accepted"][0][2] += 1

    (passed, text), _ = compared(twins, change)
    assert not passed and text.startswith("greedy, prompt 0, step 2: ")
    assert text.endswith("the draft is the same")


def test_drafts_that_are_ties():
    def tree(tokens, scores):
        parents = [0, 0, 0, 1]
        return torch.tensor(tokens), torch.tensor(parents), torch.tensor(scores)

    then = tree([9, 1, 2, 3], [0.0, -1.0, -2.0, -1.5])
    fault = verify_decode._draft_fault
    assert fault(then, tree([9, 1, 4, 3], [0.0, -1.0, -2.0001, -1.5]), 1e-3) is None
    apart = fault(then, tree([9, 1, 4, 3], [0.0, -1.0, -2.1, -1.5]), 1e-3)
    assert apart.startswith("at level 1 other tokens were drafted, with scores 1.0e-01 apart")
    assert fault(then, tree([9, 2, 1, 3], [0.0, -1.0, -2.0, -9.0]), 1e-3).startswith("at level 2")
    assert fault(then, then, 1.0) == "the draft is the same"
    short = tuple(part[:3] for part in then)
    assert fault(then, short, 1.0) == "2 levels were drafted, then 3"


# ---------------------------------------------------------------- parts


def test_rounding():
    eps = torch.finfo(torch.float32).eps
    assert rounding(torch.float32, 2.0, 0.0) == pytest.approx(2 * 68 * eps)
    assert rounding(torch.float32, 2.0, 0.1) == pytest.approx(0.4)
    assert rounding(torch.float32, 2.0, 9.0) == 0.5, "what is all noise explains nothing"
    assert rounding(torch.bfloat16, 1.0, 0.0) == pytest.approx(4 * 2**-7, rel=1e-2)


def test_tokenizers_that_differ(exported, tiny_target):
    """One whose pieces are others, and one that only ends its texts otherwise; other versions of
    the library may write the same one otherwise."""
    from transformers import AutoTokenizer

    then = read_facts(exported)["text"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    assert tokenizer_fault(tokenizer, then, "0") is None
    assert tokenizer_fault(None, then, "0").startswith("there is no tokenizer here")
    assert tokenizer_fault(None, None, "0") is None
    tokenizer.add_tokens(["Hello"])
    fault = tokenizer_fault(tokenizer, then, "0")
    assert fault.startswith("another tokenizer: of text 0, behind ") and "token " in fault
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    tokenizer.add_tokens(["never-seen-here"])
    assert "the same tokens" in tokenizer_fault(tokenizer, then, _tokenizers_version())
    assert tokenizer_fault(tokenizer, then, "0") is None
    tokenizer.eos_token = "<|pad|>"
    assert template_fault(tokenizer, then).startswith("the same template with other special tokens")
    tokenizer.chat_template = None
    assert template_fault(tokenizer, then) == "another chat template: here there is none"


def _tokenizers_version():
    import tokenizers

    return tokenizers.__version__


def test_heads_without_a_golden_batch(head, tiny_target, check, capsys):
    with pytest.raises(SystemExit):
        main([str(head), "--write", "true"])
    assert "exists, and a new one would hide" in capsys.readouterr().err
    shutil.rmtree(head / "golden")
    with pytest.raises(SystemExit) as stop:
        main([str(head)])
    assert stop.value.code == 2
    assert "exported without a golden batch" in capsys.readouterr().err
    (head / "provenance.json").unlink()
    with pytest.raises(SystemExit):
        main([str(head), "--write", "true"])
    assert f"give --target.path, the target that {head} was" in capsys.readouterr().err
    held_out = tiny_target / "prompts_heldout.jsonl"
    words = ["--target.path", str(tiny_target)]
    assert main([str(head), *words, "--write", "true", "--prompts", str(held_out)]) == 0
    assert check(*words, head)[0] == 0


def test_where_none_can_be_made_it_is_told(head):
    """And what is there of another head goes."""
    told = complete(head, SimpleNamespace(sharded=True, name="large"))
    assert len(told) == 1 and "layers are shared out" in told[0]
    assert f"eval/verify.py {head} --target.path large --write true" in told[0]
    assert not (head / "golden").exists()


def test_a_batch_of_a_later_format(head):
    from redrafter.files import digest_json, write_json

    facts = {**read_facts(head), "format": 99}
    write_json(head / FACTS, {**facts, "digest": digest_json(facts)})
    with pytest.raises(InputError, match="format 99, this version reads 1"):
        read_facts(head)


def test_the_head_may_stand_alone():
    assert with_head(["H", "--out", "x"]) == ["--head=H", "--out", "x"]
    assert with_head(["--out", "x", "H"]) == ["--out", "x", "--head=H"]
    assert with_head(["--out=x", "H"]) == ["--out=x", "--head=H"]
    assert with_head(["--head", "H"]) == ["--head", "H"]
