"""`custom_generate/`: what a user of transformers alone gets, and that it is the library's code."""

import ast
import copy
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import stock_user
import torch
from models import EOS, tiny
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
)

import redrafter
from redrafter.config import KINDS, TreeConfig
from redrafter.contracts import InputError
from redrafter.decode.request import Request
from redrafter.decode.speculative import speculative
from redrafter.drafters.head import HeadDrafter
from redrafter.export.complete import complete
from redrafter.export.custom_generate import vendored_files, write_custom_generate
from redrafter.heads.load import load_head
from redrafter.heads.recurrent import RecurrentHead
from redrafter.targets.model import Target

LIBRARY = Path(redrafter.__file__).parent
FILES = vendored_files("recurrent")
#: of every kind of heads, by "kind/file"
SOURCES = {
    f"{kind}/{name}": text
    for kind in KINDS for name, text in vendored_files(kind).items() if name.endswith(".py")
}  # fmt: skip
COMMIT = "0123456789" * 4


def save_head(target, folder, seed=3, **fields):
    torch.manual_seed(seed)
    head = RecurrentHead.for_target(target, **fields).double()
    with torch.no_grad():
        for p in head.parameters():
            p.mul_(3.0)
    head.save_pretrained(folder)
    write_custom_generate(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target of 48 tokens in float64, its head, and the head of another target."""
    base = tmp_path_factory.mktemp("stock")
    target = tiny("llama")
    target.model.save_pretrained(base / "model")
    save_head(target, base / "head", output="target", embedding_scale="rms")
    save_head(tiny("llama", num_hidden_layers=1), base / "other")
    repo = base / "home/hub/models--user--draft-head.v1"  # as huggingface_hub keeps one
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(COMMIT)
    shutil.copytree(base / "head", repo / "snapshots" / COMMIT)
    return base


@pytest.fixture(scope="module")
def found(folders):
    """What `stock_user.py` saw, in a process that cannot import the library."""
    out = folders / "out.json"
    arguments = [folders / "model", folders / "head", folders / "other", out]
    done = subprocess.run(
        [sys.executable, "-I", stock_user.__file__, *map(str, arguments)],
        env={**os.environ, "HF_HOME": str(folders / "home"), "OMP_NUM_THREADS": "1"},
        cwd=folders, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


# ------------------------------------------------------------------------------ the user


def test_user_has_no_library(found):
    assert found["modules"] == []


@pytest.mark.parametrize("batch", [1, 4])
def test_greedy_is_plain_generates(found, batch):
    made = found["greedy"][str(batch)]
    assert sum(map(len, made["ours"])) == 24
    assert made["ours"] == made["plain"]
    # A head of random weights: that drafts are accepted at all must still show.
    most = {1: 0.85, 4: 0.92}[batch] * made["forwards"]["plain"]
    assert made["forwards"]["ours"] < most, made["forwards"]


def test_texts_put_every_stop_to_the_test(found):
    """Rows that end by EOS at once, later, and by length, in one batch."""
    new = [row[-18:] for group in found["greedy"]["1"]["plain"] for row in group]
    by_eos = sum(row[-1] in EOS for row in new)
    assert 5 < by_eos < 20, by_eos
    assert any(0 in row[-18:] for group in found["greedy"]["4"]["plain"] for row in group)


@pytest.mark.parametrize("name", stock_user.CASES)
def test_argument_is_honoured(found, name):
    case = found["cases"][name]
    if name == "context_ends":  # plain generate goes on behind the context
        length = tiny("llama").max_positions
        assert [row[:length] for row in case["plain"]] == case["ours"]
        assert "context of 64 tokens" in case["ours_warned"][0]
        return
    assert case["ours"] == case["plain"]
    assert case["ours_warned"] == []


@pytest.mark.parametrize("name", [n for n, make in stock_user.CASES.items() if make()[0] == 1])
def test_argument_is_honoured_in_a_padded_batch(found, name):
    case, rows = found["padded"][name], found["sampled"]["prompts"]
    if name == "logits_processor":  # one's own sees no padding
        assert unpadded(case["ours"], rows) == found["alone"]
    elif name == "context_ends":
        left = [tiny("llama").max_positions - len(row) for row in rows]
        ours, plain = (unpadded(case[way], rows, left) for way in ("ours", "plain"))
        assert ours == plain and [len(row) for row in ours] == left
    else:
        assert case["ours"] == case["plain"]
        assert case["ours_warned"] == []
    if name not in IDLE:
        assert case["ours"] != found["greedy"]["4"]["plain"][0]


def test_the_models_own_configuration_is_honoured_in_a_padded_batch(found):
    made = found["models_own"]
    assert made["ours"] == made["plain"] == found["padded"]["repetition_penalty"]["ours"]
    assert made["ours"] != found["greedy"]["4"]["plain"][0] and made["ours_warned"] == []


def unpadded(made, rows, lengths=None):
    """New tokens per row, up to a length or what was filled in behind an EOS."""
    width = max(map(len, rows))
    new = [row[width:] for row in made]
    if lengths is not None:
        return [row[:n] for row, n in zip(new, lengths, strict=True)]
    ends = [next((i + 1 for i, t in enumerate(row) if t in EOS), len(row)) for row in new]
    return [row[:end] for row, end in zip(new, ends, strict=True)]


def test_overflow_is_an_error(found):
    kind, text = found["overflow"]
    assert kind == "InputError" and "not finite" in text and "float32" in text


#: they leave the text as it is
IDLE = {"max_time", "generation_config", "context_ends", "forced_bos_token_id"}


@pytest.mark.parametrize("name", sorted(stock_user.CASES.keys() - IDLE))
def test_argument_matters(found, name):
    """Else the test above would pass without it."""
    case = found["cases"][name]
    free = found["greedy"][str(len(case["ours"]))]["plain"][0]
    assert case["ours"] != free


def test_stream_is_plain_generates(found):
    assert found["streamed"]["ours"] == found["streamed"]["plain"]
    assert found["streamed"]["ours"][-1] == "end" and len(found["streamed"]["ours"]) > 3


def test_result_object_and_positional_ids(found):
    made = found["result"]
    assert made["type"] == made["plain_type"] == "GenerateDecoderOnlyOutput"
    assert made["ours"] == made["plain"]
    assert found["positional"]["ours"] == found["positional"]["plain"]


def test_from_the_hub_by_the_codes_own_commit(found):
    assert found["hub"]["source"] == ["user/draft-head.v1", COMMIT]
    assert found["hub"]["ours"] == found["hub"]["plain"]


@pytest.mark.parametrize("name", stock_user.ERRORS)
def test_what_cannot_be_served_is_named(found, name):
    kind, text = found["errors"][name]
    named = {"num_beams_sampled": "num_beams", "guidance_scale": "ClassifierFreeGuidance"}
    assert kind in ("InputError", "ValueError") and named.get(name, name) in text, (kind, text)


def test_another_targets_head(found):
    kind, text = found["other"]
    assert kind == "InputError" and "trained for another target" in text
    assert found["other_allowed"]["ours"] == found["other_allowed"]["plain"]


def test_model_is_left_as_it_was(found):
    after = found["left_alone"]
    assert after["grads"] == 1
    assert after["training"] == [True, False, True]
    assert after["copy"] == ["dict", "dict"]  # copies and pickles carry no head
    assert after["kept"] and after["read_again"] and after["same"]
    assert after["moved"] == "torch.float32"


# ------------------------------------------------------------------------------ sampling


def library(folders, rows, seeds, **options):
    target = tiny("llama")
    drafter = HeadDrafter(load_head(folders / "head", target), target, TreeConfig(width=2, depth=2))
    config = GenerationConfig(do_sample=True, max_new_tokens=18, eos_token_id=list(EOS), **options)
    return speculative(target, rows, config, seeds=seeds, drafter=drafter).tokens


def padded(prompts, tokens):
    """transformers' layout."""
    left, right = max(map(len, prompts)), max(map(len, tokens))
    return [
        [0] * (left - len(p)) + p + t + [0] * (right - len(t))
        for p, t in zip(prompts, tokens, strict=True)
    ]


def test_sampling_is_the_librarys(folders, found):
    made, rows = found["sampled"], found["sampled"]["prompts"]
    options = {k: v for k, v in stock_user.SAMPLED.items() if k != "do_sample"}
    seeds = stock_user.SEEDS
    wanted = padded(rows, library(folders, rows, seeds, **options))
    assert made["seeded"] == wanted
    assert made["one_seed"] == padded(rows, library(folders, rows, 3, **options))
    # The default that transformers has, and the library has not.
    assert made["top_k_50"] == padded(rows, library(folders, rows, seeds, top_k=50))
    assert made["seeded"] != made["one_seed"]


def test_copies_of_a_prompt_take_the_next_seeds(folders, found):
    made, rows = found["sampled"]["copies"], found["sampled"]["prompts"]
    options = {k: v for k, v in stock_user.SAMPLED.items() if k != "do_sample"}
    twice = [row for row in rows for _ in range(2)]
    seeds = [seed + copy for seed in stock_user.SEEDS for copy in range(2)]
    assert made == padded(twice, library(folders, twice, seeds, **options))


def test_without_seeds_torchs_generator_decides(found):
    first, again = found["sampled"]["torch_seeded"]
    assert first == again  # although the very first call read the head
    assert first[0] != first[1]


# ------------------------------------------------------------------------------ the library


def test_without_a_tokenizer_the_weights_decide(tmp_path):
    """transformers' user has one, but does not show it to the model."""
    words = SimpleNamespace(get_vocab=lambda: {"a": 0})
    model, other = tiny("llama").model, tiny("llama", num_hidden_layers=1).model
    head = RecurrentHead.for_target(Target(model, words))
    head.save_pretrained(tmp_path)
    load_head(tmp_path, Target(model))
    load_head(tmp_path, Target(model, words))
    with pytest.raises(InputError, match="another target"):
        load_head(tmp_path, Target(other))
    with pytest.raises(InputError, match="another target"):
        load_head(tmp_path, Target(model, SimpleNamespace(get_vocab=lambda: {"b": 0})))


def test_attention_that_takes_no_mask_is_refused():
    model = AutoModelForCausalLM.from_config(
        # A copy: it is written to, and the target is everybody's.
        copy.deepcopy(tiny("llama").model.config),
        attn_implementation="flex_attention",
    )
    with pytest.raises(InputError, match="attn_implementation 'flex_attention'"):
        Target(model)


def test_drafter_is_told_the_temperature_of_any_warper():
    for sampled, wanted in ((True, 0.6), (False, 1.0)):
        config = GenerationConfig(do_sample=sampled, temperature=2.0, max_new_tokens=2)
        warpers = LogitsProcessorList([TemperatureLogitsWarper(0.3)])
        request = Request(tiny("llama"), [[1]], config, 0, warpers, None, None, None)
        assert request.sequences(1).temperature == pytest.approx(wanted)


# ------------------------------------------------------------------------------ the files


def statements(text):
    """Name -> its definitions' syntax trees, with imports of the library made alike."""
    found = {}
    for node in ast.parse(text).body:
        for inner in ast.walk(node):
            if isinstance(inner, ast.ImportFrom) and (
                inner.level or (inner.module or "").startswith("redrafter.")
            ):
                inner.module, inner.level = inner.module.split(".")[-1].split("_")[-1], 0
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = ast.dump(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                found[ast.unparse(target)] = ast.dump(node)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_the_librarys(kind):
    for name, text in SOURCES.items():
        if name.startswith(f"{kind}/"):
            check_copy(text)


def check_copy(text):
    first = text.splitlines()[0]
    origin = LIBRARY / first.split(" redrafter/")[1].split(" of ")[0]
    assert redrafter.__version__ in first and "Apache-2.0" in text.splitlines()[1]
    copied, ours = statements(text), statements(origin.read_text())
    assert copied and copied.items() <= ours.items()


def test_nothing_but_these_packages_is_needed():
    """transformers refuses to run code whose imports, wherever they stand, are not installed."""
    allowed = {"torch", "transformers", "safetensors"} | set(sys.stdlib_module_names)
    for name, text in SOURCES.items():
        tree = ast.parse(text)
        tried = {id(n) for t in ast.walk(tree) if isinstance(t, ast.Try) for n in ast.walk(t)}
        for node in ast.walk(tree):
            if id(node) in tried:
                continue
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                if node.level:
                    beside = f"{name.split('/')[0]}/{node.module}.py"
                    assert beside in SOURCES, (name, node.module)
                    continue
                names = [node.module]
            assert {n.split(".")[0] for n in names} <= allowed, (name, names)


def test_no_name_is_missing():
    """Every global that compiled code reads is there; annotations are not compiled."""
    import builtins
    import dis

    def globals_read(code):
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                yield step.argval
        for constant in code.co_consts:
            if hasattr(constant, "co_code"):
                yield from globals_read(constant)

    for name, text in SOURCES.items():
        tree = ast.parse(text)
        known = {*dir(builtins), "__file__", "__annotations__", "__module__", "__qualname__"}
        for node in ast.walk(tree):
            if isinstance(node, ast.alias):
                known.add((node.asname or node.name).split(".")[0])
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                known.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known.add(node.id)
        missing = set(globals_read(compile(text, name, "exec"))) - known
        assert not missing, (name, missing)


def test_every_export_carries_them(folders, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folders / "head" / name, tmp_path)
    complete(tmp_path, SimpleNamespace(sharded=True, name="large"))  # no golden batch of this one
    assert {p.name: p.read_text() for p in (tmp_path / "custom_generate").iterdir()} == FILES


def test_other_kinds_stay_at_home():
    for kind, other in itertools.permutations(KINDS, 2):
        assert f"{kind}/heads_{other}.py" not in SOURCES


def test_old_files_go(folders, tmp_path):
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        write_custom_generate(tmp_path)
    shutil.copy(folders / "head/config.json", tmp_path)
    write_custom_generate(tmp_path)
    (tmp_path / "custom_generate/old.py").touch()
    folder = write_custom_generate(tmp_path)
    assert {p.name: p.read_text() for p in folder.iterdir()} == FILES
