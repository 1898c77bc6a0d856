"""The pipeline's stages on the tiny target: every row is accounted for, and nothing depends on how
it was made. (The trainer's side: test_modes.py; files and their faults: test_store.py.)"""

import copy
import json
from pathlib import Path

import pytest
import torch

from redrafter.config import AnswersConfig, SourceConfig, StatesConfig, TargetConfig
from redrafter.contracts import InputError
from redrafter.data.answers import answer_seed, build_answers, generation_config
from redrafter.data.build_rows import build_rows, report
from redrafter.data.reading import Stored
from redrafter.data.states import DTYPES, build_states, decoded, wanted_positions
from redrafter.data.store import Job
from redrafter.decode.plain import plain
from redrafter.drafters.lookup import PromptLookup
from redrafter.targets.load import load_target

N_PROMPTS, NEW = 10, 12
# At 0.001 sampling says what greedy decoding says: those answers are duplicates.
HOW = AnswersConfig(temperatures=(0.0, 0.001, 1.0), samples_per_prompt=2, max_new_tokens=NEW)
PASSES = [(0.0, 0), (0.001, 0), (0.001, 1), (1.0, 0), (1.0, 1)]


@pytest.fixture(scope="module")
def target(tiny_target):
    return load_target(TargetConfig(str(tiny_target), dtype="float64"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def source(tiny_target, folder):
    """Ragged prompts: texts cut to different lengths."""
    rows = (tiny_target / "prompts_train.jsonl").read_text().splitlines()[:N_PROMPTS]
    texts = [json.loads(row)["text"][: 20 + 12 * i] for i, row in enumerate(rows)]
    return write_source(folder / "source.jsonl", [{"text": text} for text in texts])


@pytest.fixture(scope="module")
def prompts(target, source, folder):
    return build_rows(source, target.tokenizer, "prompts", folder / "prompts", progress=False)


@pytest.fixture(scope="module")
def answers(target, prompts, folder):
    return build_answers(target, prompts, HOW, folder / "answers", progress=False)


@pytest.fixture
def states(target, answers, tmp_path):
    def make(name="states", continuation=0, rows=answers, **settings):
        return build_states(
            target, rows, StatesConfig(**settings), tmp_path / name, continuation=continuation,
            progress=False,
        )  # fmt: skip

    return make


def write_source(path, rows, **settings):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(str(path), **{"format": "text", "text_prompt_tokens": 24, **settings})


def same_rows(one, two):
    assert torch.equal(one.row, two.row) and torch.equal(one.source_row, two.source_row)
    a, b = one.rows(), two.rows()
    for name in ("tokens", "supervised", "offsets"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def adds_up(store, rejected=True):
    """written + skipped + failed = input, in the manifest and in what people are told."""
    counts, given = store.counts, store.manifest["input"]
    duplicates = store.manifest.get("duplicates", 0)
    assert counts["rows"] + counts["skipped"] + duplicates + counts["failed"] == given
    assert store.n_rows == counts["rows"] and int(store.lengths.sum()) == counts["tokens"]
    listed = [r for shard in store.manifest["shards"] for r in shard["rejected"]]
    assert len(listed) == counts["skipped"] + counts["failed"]
    assert f"{given} given = {counts['rows']} written" in report(store)
    return listed


def killed(monkeypatch, at, call):
    """call(), with Job.write dying at its at-th shard."""
    written, write = [], Job.write

    def dies(self, *args):
        if len(written) == at - 1:
            raise KeyboardInterrupt
        written.append(self.folder)
        write(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Job, "write", dies)
        call()


def times(folder):
    return {p.name: p.stat().st_mtime_ns for p in Path(folder).glob("*.safetensors")}


def kept(before, folder):
    """Every shard of `before` is still the file that it was."""
    assert before and before.items() <= times(folder).items()


# ------------------------------------------------------------------ accounting


def test_rows_of_a_source_add_up(target, tmp_path):
    rows = [{"text": "import os\n" * n} for n in (9, 9, 12, 200)] + [{"text": 3}, {"text": "a = b"}]
    config = write_source(tmp_path / "s.jsonl", rows, max_failed_rows=1, text_prompt_tokens=500)
    made = build_rows(config, target.tokenizer, "prompts", tmp_path / "p", max_tokens=100,
                      progress=False)  # fmt: skip
    listed = adds_up(made)
    assert [r["source_row"] for r in listed] == [1, 3, 4]
    assert [r["failed"] for r in listed] == [False, False, True]
    assert made.counts["rows"] == 3 and made.source_row.tolist() == [0, 2, 5]


def test_answers_add_up(target, tiny_target, tmp_path):
    """A prompt that fills the context gets no answer, and is listed at every temperature."""
    lines = (tiny_target / "prompts_train.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines[:5]]
    rows = [{"text": texts[0][:60]}, {"text": "\n".join(texts)}, {"text": texts[1][:60]}]
    config = write_source(tmp_path / "s.jsonl", rows, text_prompt_tokens=600)
    prompts = build_rows(config, target.tokenizer, "prompts", tmp_path / "p", progress=False)
    how = AnswersConfig(max_new_tokens=3, shard_prompts=2)
    made = build_answers(target, prompts, how, tmp_path / "a", progress=False)
    listed = adds_up(made)
    assert [r["source_row"] for r in listed] == [1, 1] and made.manifest["input"] == 6
    assert "fills the context of 512" in listed[0]["reason"]
    assert made.row.tolist() == [0, 2, 3, 5] and made.source_row.tolist() == [0, 2, 0, 2]


def test_duplicates_are_removed_by_content(answers, states):
    made = states()
    assert adds_up(made) == []
    rows, unique = answers.rows(), {}
    for r in range(rows.n_rows):
        begin, end = rows.offsets[r : r + 2].tolist()
        content = rows.tokens[begin:end].tolist(), rows.supervised[begin:end].tolist()
        unique.setdefault(str(content), r)
    first = sorted(unique.values())
    assert made.manifest["duplicates"] == answers.n_rows - len(first) >= N_PROMPTS
    assert made.row.tolist() == first
    assert made.source_row.tolist() == answers.source_row[first].tolist()
    for place, row in enumerate(first):
        assert made.rows([place]).tokens.tolist() == rows.ids(row)


# ------------------------------------------------------------------ answers


def test_answers_are_what_each_prompt_alone_is_answered(target, prompts, answers):
    """And the mask is exactly the answer."""
    read, given = answers.rows(), prompts.rows()
    assert answers.n_rows == len(PASSES) * N_PROMPTS
    texts = {}
    for number, (temperature, sample) in enumerate(PASSES):
        for i in range(N_PROMPTS):
            prompt = given.ids(i)
            seed = answer_seed(0, i, temperature, sample)
            config = generation_config(temperature, NEW)
            text = plain(target, [prompt], config, seeds=[seed]).tokens[0]
            row = number * N_PROMPTS + i
            begin, end = read.offsets[row : row + 2].tolist()
            assert read.tokens[begin:end].tolist() == prompt + text
            mask = [False] * len(prompt) + [True] * len(text)
            assert read.supervised[begin:end].tolist() == mask and text
            texts[temperature, sample, i] = text
    assert any(texts[1.0, 0, i] != texts[1.0, 1, i] for i in range(N_PROMPTS)), "seeds do nothing"


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 3, "shard_prompts": 4}, {}],
                         ids=["batch 1", "shards of 4", "drafted by lookup"])  # fmt: skip
def test_answers_do_not_depend_on_how_they_are_made(target, prompts, answers, tmp_path, changes):
    how = AnswersConfig(**{**vars(HOW), **changes})
    drafter = None if changes else lambda: PromptLookup(4, 3)
    made = build_answers(target, prompts, how, tmp_path, drafter=drafter, progress=False)
    same_rows(made, answers)
    if "shard_prompts" not in changes:
        assert made.digest == answers.digest
    else:
        assert len(made.shards) == len(PASSES) * 3


def test_another_seed_gives_other_answers(target, prompts, answers, tmp_path):
    made = build_answers(target, prompts, HOW, tmp_path, seed=1, progress=False)
    assert made.digest != answers.digest
    n = N_PROMPTS
    assert made.rows(range(n)).tokens.tolist() == answers.rows(range(n)).tokens.tolist(), "greedy"
    sampled = range(3 * n, 5 * n)
    assert made.rows(sampled).tokens.tolist() != answers.rows(sampled).tokens.tolist()


def test_answers_go_on_after_a_kill(target, prompts, answers, tmp_path, monkeypatch):
    how = AnswersConfig(**{**vars(HOW), "shard_prompts": 4})
    call = lambda: build_answers(target, prompts, how, tmp_path, progress=False)  # noqa: E731
    killed(monkeypatch, 6, call)
    before = times(tmp_path)
    made = call()
    assert len(before) == 5 and len(times(tmp_path)) == 15
    kept(before, tmp_path)
    same_rows(made, answers)
    digest = made.digest
    for index in (3, 14):
        (tmp_path / f"shard-{index:05d}.safetensors").unlink()
    (tmp_path / "shard-00014.json").unlink()  # shard 3 keeps its receipt, and is made anew too
    (tmp_path / "manifest.json").unlink()
    before = times(tmp_path)
    assert call().digest == digest
    kept(before, tmp_path)
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"shard-00001\.safetensors is damaged"):
        call()


# ------------------------------------------------------------------ states


def alone(target, store, row):
    """A row of a store and its hidden states, from a forward of that row only."""
    tokens = store.rows([row]).tokens
    return tokens, target.states(tokens[None])[0]


def test_states_go_on_after_a_kill(states, tmp_path, monkeypatch):
    whole = states("whole")
    size = dict(shard_bytes=40_000)
    killed(monkeypatch, 4, lambda: states("killed", **size))
    before = times(tmp_path / "killed")
    assert len(before) == 3
    made = states("killed", **size)
    assert len(made.shards) > 5
    kept(before, tmp_path / "killed")
    undisturbed = states("undisturbed", **size)
    assert made.digest == undisturbed.digest
    same_rows(made, whole)
    columns, rows = ["states", "tokens"], range(whole.n_rows)
    torch.testing.assert_close(made.read(rows, columns), whole.read(rows, columns),
                               atol=1e-12, rtol=0)  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_stored_numbers_are_within_their_rounding(target, states, dtype):
    """Half a unit in the last place: 2^-24, 2^-8, 2^-11 of the number; of int8, half a step of
    the row's largest number / 127."""
    exact = states("exact").read(range(8), ["states"])["states"]
    part = Stored(states(dtype, dtype=dtype))
    columns = part.load(torch.arange(8), (0, 0))
    assert columns["states"].dtype == DTYPES[dtype] and exact.dtype == torch.float64
    found = decoded(columns, torch.arange(len(exact)), torch.float64)
    if dtype == "int8":
        bound = exact.abs().amax(-1, keepdim=True) / 127 / 2 * 1.00001
        assert columns["states"].int().abs().amax(-1).tolist() == [127] * len(exact)
    else:
        unit = {"float32": 2**-24, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
        bound = exact.abs() * unit + 1e-7 * (dtype == "float16")
    error = (found - exact).abs()
    assert (error <= bound).all() and (error > bound / 10).any(), "too exact: was it rounded?"
    itemsize = part.store.columns["states"][0].itemsize
    assert itemsize == {"float32": 4, "int8": 1}.get(dtype, 2)


def test_teacher_columns_are_the_most_probable_tokens(target, states):
    store = states(teacher_top_k=5)
    for row in (0, 7, store.n_rows - 1):
        tokens, hidden = alone(target, store, row)
        best = target.project(hidden).log_softmax(-1).topk(5)
        found = store.read([row], ["teacher_ids", "teacher_log_p"])
        assert found["teacher_ids"].shape == (len(tokens), 5)
        assert torch.equal(found["teacher_ids"].long(), best.indices)
        torch.testing.assert_close(found["teacher_log_p"], best.values.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", [1, 4])
def test_continuations_are_generations_from_each_position(target, states, n):
    store, asked = states(continuation=n), 0
    for row in (2, 9, store.n_rows - 1):
        read = store.rows([row])
        said = store.read([row], ["continuation"])["continuation"]
        wanted = wanted_positions(read)
        assert (said[~wanted] == -1).all() and wanted.sum() == read.supervised.sum()
        for t in wanted.nonzero()[::3, 0].tolist():
            prefix = read.tokens[: t + 1].tolist()
            text = plain(target, [prefix], generation_config(0, n), seeds=[0]).tokens[0]
            assert said[t].tolist() == text + [-1] * (n - len(text))
            asked += 1
    assert asked >= 9


def test_too_many_bytes_are_refused_before_any_are_written(answers, states, tmp_path):
    size = states("whole").counts["tokens"] * (4 + 1 + 64 * 8)
    with pytest.raises(InputError, match=rf"need {size} bytes .* max_bytes is {size - 1}: "):
        states("refused", max_bytes=size - 1)
    assert [p.name for p in (tmp_path / "refused").iterdir()] == ["job.json"]
    assert states("refused", max_bytes=size).digest == states("whole").digest


# ------------------------------------------------------------------ other targets


@pytest.mark.parametrize("part", ["tokenizer", "template"])
def test_prompts_of_another_text_are_refused(target, source, tmp_path, part):
    other = copy.deepcopy(target.tokenizer)
    if part == "template":
        other.chat_template += "{# another #}"
    else:
        other.add_tokens(["xyzzy"])
    prompts = build_rows(source, other, "prompts", tmp_path / "p", progress=False)
    with pytest.raises(InputError, match=rf"made with another {part}"):
        build_answers(target, prompts, HOW, tmp_path / "a", progress=False)
    assert not (tmp_path / "a").exists(), "something was begun"
    with pytest.raises(InputError, match=rf"made with another {part}"):
        build_states(target, prompts, StatesConfig(), tmp_path / "s", progress=False)
