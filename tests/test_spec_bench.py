"""eval/spec_bench.py: figures, Spec-Bench's own counting, histories, templates, resuming."""

import json
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from redrafter.cli import spec_bench as cli
from redrafter.config import SpecBenchConfig, TargetConfig
from redrafter.contracts import InputError
from redrafter.evaluation.journal import Journal
from redrafter.evaluation.runs import Method, PromptBatch, TimedCall
from redrafter.evaluation.spec_bench import experiment
from redrafter.evaluation.spec_bench.answer_files import (
    compare,
    compare_files,
    compat_figures,
    file_names,
    tasks_of,
)
from redrafter.evaluation.spec_bench.questions import open_questions
from redrafter.evaluation.spec_bench.run import Asker, run_questions
from redrafter.files import read_packed
from redrafter.targets.load import load_target

ROOT = Path(__file__).resolve().parent.parent
MT_BENCH = {
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
}
QUESTIONS = [
    {
        "question_id": 81,
        "category": "writing",
        "turns": ["import os", "def add(a, b):\n    return"],
    },
    {"question_id": 82, "category": "math", "turns": ["class Reader(", "for name in"]},
    {"question_id": 161, "category": "translation", "turns": ["def add(self"]},
    {"question_id": 241, "category": "qa", "turns": ["import sys, import sys, import sys,"]},
    {"question_id": 242, "category": "qa", "turns": ["raise"]},
    {"question_id": 401, "category": "rag", "turns": ["if name in names: " * 150]},
]
#: The tiny target says nothing but blanks behind its own one.
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(target, folder, **changes):
    (folder / "chat.jinja").write_text(TEMPLATE)
    options = {
        "chat_template": folder / "chat.jinja",
        "target.path": target, "questions": folder / "q.jsonl", "out": folder / "out",
        "methods": "plain,stock,suffix:4x1,hf-lookup:4", "max_new_tokens": 12, "repeats": 2,
        "warmups": 1, "compat": "true", **changes,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in options.items()]


@pytest.fixture(scope="module")
def made(tiny_target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    write(folder / "q.jsonl", QUESTIONS)
    assert cli.main(command(tiny_target, folder)) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def target(tiny_target):
    return load_target(TargetConfig(str(tiny_target), device="cpu"))


def settings(folder, **changes):
    values = {"max_new_tokens": 12, "warmups": 0, "repeats": 1, **changes}
    return SpecBenchConfig(
        target=TargetConfig("x"), questions=str(folder / "q.jsonl"), out=str(folder), **values
    )


# ---------------------------------------------------------------- figures


def check_figures(folder):
    """Every speedup and length again, from what the result says of each question."""
    body = json.loads(read_packed(folder / "spec-bench.json"))
    rows = body["per_question"]
    for name, m in rows["methods"].items():
        for task, said in body["figures"][name].items():
            task_of = ["mt_bench" if c in MT_BENCH else c for c in rows["category"]]
            at = [i for i, t in enumerate(task_of) if task in ("overall", t)]
            macro, pooled, speeds = [], [], []
            for run in range(len(m["tokens"])):
                sums = []
                for x in (m, rows["methods"][body["baseline"]]):
                    tokens, seconds = ([x[k][run][i] for i in at] for k in ("tokens", "seconds"))
                    each = [a / b for a, b in zip(tokens, seconds, strict=True)]
                    sums.append((mean(each), sum(tokens) / sum(seconds)))
                macro.append(sums[0][0] / sums[1][0])
                pooled.append(sums[0][1] / sums[1][1])
                speeds.append(sums[0][0])
            for key, values in (("macro_speedup", macro), ("pooled_speedup", pooled),
                                ("tokens_per_second", speeds)):  # fmt: skip
                assert said[key]["value"] == pytest.approx(mean(values), rel=1e-9)
                std = stdev(values) if len(values) > 1 else None
                assert said[key]["std"] == (std if std is None else pytest.approx(std, abs=1e-9))
            steps = sum(run[i] for run in m["steps"] for i in at)
            length = sum(run[i] for run in m["emitted"] for i in at) / max(1, steps)
            shown = (said["mean_accepted_tokens"] or {"value": 0})["value"]
            assert shown == pytest.approx(length, rel=1e-9) and said["questions"] == len(at)
    return body


def test_figures_can_be_recomputed(made):
    body = check_figures(made)
    assert list(body["figures"]["plain"]) == ["mt_bench", "translation", "qa", "rag", "overall"]
    assert body["figures"]["plain"]["overall"]["macro_speedup"]["value"] == 1
    for name in ("suffix:4x1", "hf-lookup:4"):
        overall = body["figures"][name]["overall"]
        assert overall["mean_accepted_tokens"]["value"] > 1, "nothing was accepted"
        for key in ("macro_speedup", "pooled_speedup", "mean_accepted_tokens"):
            assert overall[key]["low"] <= overall[key]["value"] <= overall[key]["high"]
        assert overall["macro_speedup"]["low"] < overall["macro_speedup"]["high"]
    assert body["figures"]["suffix:4x1"]["overall"]["acceptance"]["unconditional"][0] > 0
    assert body["exact"] and all(
        same["equal_tokens"] == same["equal_texts"] == same["turns"] == 2 * 8
        for same in body["lossless"].values()
    )
    shown = (made / "table.md").read_text()
    assert "strict-compat" in shown and shown.count("`suffix:4x1`") == 4


@pytest.mark.parametrize(
    "folder", sorted(ROOT.glob("eval/results/spec-bench*")), ids=lambda p: p.name
)
def test_committed_figures_can_be_recomputed(folder):
    body = check_figures(folder)
    whole = folder.name == "spec-bench"
    assert body["exact"] and body["counts"]["questions"] == (480 if whole else 20)
    tasks = ["mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag"]
    of_task = {task: of["questions"] for task, of in body["figures"]["plain"].items()}
    assert of_task.pop("overall") == sum(of_task.values()) == body["counts"]["questions"]
    assert sorted(of_task) == sorted(tasks) and (not whole or set(of_task.values()) == {80})


def test_answer_files_are_spec_benchs(made, tiny_target):
    """Their keys, in which another program finds what the result says."""
    body = json.loads((made / "spec-bench.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    files = body["answer_files"]
    assert files["suffix:4x1"] == "suffix-4x1.jsonl"
    speeds: dict[str, list[float]] = {}
    for name, file in files.items():
        for run in (0, 1):
            lines = (made / f"answers/run-{run + 1}" / file).read_text().splitlines()
            assert len(lines) == len(QUESTIONS)
            counted = body["per_question"]["methods"][name]
            ratio = []
            for i, (line, question) in enumerate(zip(lines, QUESTIONS, strict=True)):
                answer = json.loads(line)
                assert set(answer) == {
                    "question_id", "category", "answer_id", "model_id", "choices", "tstamp"
                }  # fmt: skip
                assert answer["question_id"] == question["question_id"]
                assert answer["category"] == question["category"]
                (choice,) = answer["choices"]
                assert set(choice) == {
                    "index", "turns", "decoding_steps", "new_tokens", "wall_time", "accept_lengths"
                }  # fmt: skip
                per_turn = {len(choice[k]) for k in
                            ("turns", "decoding_steps", "new_tokens", "wall_time")}  # fmt: skip
                assert per_turn == {len(question["turns"])}
                assert sum(choice["new_tokens"]) == counted["tokens"][run][i]
                assert sum(choice["wall_time"]) == pytest.approx(counted["seconds"][run][i])
                assert sum(choice["decoding_steps"]) == counted["steps"][run][i]
                assert len(choice["accept_lengths"]) == counted["steps"][run][i]
                assert sum(choice["accept_lengths"]) == counted["emitted"][run][i]
                new = sum(choice["new_tokens"])
                if name == "plain":  # as its evaluation/speed.py does to the baseline
                    new = sum(len(tokenizer(t).input_ids) - 1 for t in choice["turns"])
                ratio.append(new / sum(choice["wall_time"]))
            speeds.setdefault(name, []).append(mean(ratio))
    for name in files:
        compat = body["compat"][name]["overall"]
        if name != "plain":
            ratios = [a / b for a, b in zip(speeds[name], speeds["plain"], strict=True)]
            assert compat["speedup"]["value"] == pytest.approx(mean(ratios))
            assert compat["speedup"]["std"] == pytest.approx(stdev(ratios))
        assert compat["tokens_per_second_baseline"]["value"] == pytest.approx(
            mean(speeds["plain"])
        )  # fmt: skip


def answer(name, category, texts, new, seconds, lengths):
    choice = {"turns": texts, "new_tokens": new, "wall_time": seconds, "accept_lengths": lengths}
    return {"question_id": name, "category": category, "choices": [choice]}


def test_strict_compat_by_hand():
    """Their counting on two questions: 3 + 1 words in 2 s and 4 in 1 s against 6 + 2 and 5."""

    def words(text, **options):
        return SimpleNamespace(input_ids=["BOS", *text.split()])

    base = [
        answer(1, "math", ["a b c", "d"], [99, 99], [1.0, 1.0], [1] * 9),
        answer(2, "rag", ["e f g h"], [99], [1.0], [1]),
    ]
    own = [
        answer(1, "math", ["x", "x"], [6, 2], [0.5, 1.5], [4, 2, 2]),
        answer(2, "rag", ["x"], [5], [0.5], [5]),
    ]
    over = compat_figures([own], [base], words, "overall")
    assert over["tokens_per_second"]["value"] == (8 / 2 + 5 / 0.5) / 2 == 7
    assert over["tokens_per_second_baseline"]["value"] == (4 / 2 + 4 / 1) / 2 == 3
    assert over["speedup"] == {"value": 7 / 3, "std": None}
    assert over["mean_accepted_tokens"] == (4 + 2 + 2 + 5) / 4
    chat = compat_figures([own, own], [base, base], words, "mt_bench")
    assert chat["speedup"] == {"value": 4 / 2, "std": 0}
    assert chat["mean_accepted_tokens"] == 8 / 3
    # Two runs: a mean of ratios, deviations with one degree of freedom less.
    slow = [{**a, "choices": [{**a["choices"][0], "wall_time": [2.0]}]} for a in base[1:]]
    both = compat_figures([own[1:], own[1:]], [base[1:], slow], words, "rag")
    assert both["speedup"]["value"] == (10 / 4 + 10 / 2) / 2
    assert both["speedup"]["std"] == pytest.approx(2.5 / 2**0.5)


def test_tasks_are_spec_benchs():
    assert tasks_of(["rag", "math", "gsm8k", "writing", "math_reasoning"]) == {
        "mt_bench": [1, 3], "math_reasoning": [4], "rag": [0], "gsm8k": [2],
        "overall": [0, 1, 2, 3, 4],
    }  # fmt: skip


# ---------------------------------------------------------------- the same texts?


def test_what_differs_is_found(tmp_path):
    one = {1: ["a", "b"], 2: ["c"]}
    assert compare(one, dict(one)) == {"turns": 3, "equal": 3, "first_difference": None}
    for other, equal, where in (
        ({1: ["a", "b"]}, 2, (2, 1, True)),  # a file that ends early
        ({1: ["a"], 2: ["c"]}, 2, (1, 2, True)),
        ({1: ["a", "x"], 2: ["c"]}, 2, (1, 2, False)),
        ({**one, 3: ["d"]}, 3, (3, 1, True)),
    ):
        for pair in ((one, other), (other, one)):
            found = compare(*pair)
            first = dict(zip(("question_id", "turn", "missing"), where, strict=True))
            assert found["equal"] == equal < found["turns"] and found["first_difference"] == first
    rows = [answer(1, "qa", ["a"], [1], [1.0], []), answer(2, "qa", ["b"], [1], [1.0], [])]
    whole = write(tmp_path / "whole.jsonl", rows)
    short = write(tmp_path / "short.jsonl", rows[:1])
    assert compare_files(whole, whole)["equal"] == 2
    assert compare_files(whole, short) == compare_files(short, whole)
    assert compare_files(whole, short)["first_difference"]["missing"]
    write(tmp_path / "bad.jsonl", [rows[0], {"question_id": 3}])
    with pytest.raises(InputError, match=r"bad\.jsonl:2 is no answer"):
        compare_files(whole, tmp_path / "bad.jsonl")


class Scripted(Method):
    """Says what it was told to, whatever it is asked, and keeps what it was asked."""

    def __init__(self, name, target, answers):
        super().__init__(name, target, None)
        self.answers, self.asked = list(answers), []

    def _run(self, batch):
        self.asked.append(batch.prompts[0])
        return TimedCall([self.answers[len(self.asked) - 1]], {})


def test_a_difference_reaches_the_result(tiny_target, tmp_path, monkeypatch):
    write(tmp_path / "q.jsonl", QUESTIONS[:2])
    build = experiment.build

    def wrong(names, config, target, head):
        plain = build(["plain"], config, target, head)[0]
        other = Scripted("stock", target, [[40, 41]] * 9)
        return [plain, other]

    monkeypatch.setattr(experiment, "build", wrong)
    changes = {"methods": "plain,stock", "warmups": 0, "repeats": 1}
    cli.main(command(tiny_target, tmp_path, **changes))
    body = json.loads((tmp_path / "out/spec-bench.json").read_text())
    assert not body["exact"] and "stock differs from plain in 4 of 4 turns" in body["warnings"][0]
    assert body["lossless"]["stock"]["equal_texts"] == 0


# ---------------------------------------------------------------- chats


def test_every_method_has_its_own_history(target, tmp_path):
    write(tmp_path / "q.jsonl", QUESTIONS[:1])
    config = settings(tmp_path)
    chat, (question,), _ = open_questions(target, config)
    tokenizer, ends = target.tokenizer, target.tokenizer.eos_token_id
    asker = Asker(target, chat, config)
    for words in (" pass and more ", "return None"):
        said = [*tokenizer(words, add_special_tokens=False).input_ids, ends]
        method = Scripted("stock", target, [said, said])
        turns = asker.one(method, question)
        first, second = (
            [{"role": "user", "content": text}] for text in QUESTIONS[0]["turns"]
        )  # fmt: skip
        mine = [{"role": "assistant", "content": words.strip()}]
        wanted = [
            tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True)
            for m in (first, first + mine + second)
        ]
        assert [tokenizer.decode(ids) for ids in method.asked] == wanted
        assert words.strip() in wanted[1]
        assert [turn["text"] for turn in turns] == [words.strip()] * 2, "no EOS in a text"
        assert turns[1]["tokens"] == said and turns[1]["prompt_tokens"] == len(method.asked[1])


@pytest.mark.parametrize(("begin", "n", "step", "rows"), [
    (0, None, 3, [0, 3, 6]), (1, 2, 3, [1, 4]), (0, 3, 1, [0, 1, 2]), (6, None, 5, [6]),
])  # fmt: skip
def test_every_so_many_th_question(target, tmp_path, begin, n, step, rows):
    write(tmp_path / "q.jsonl", [{"question_id": i, "turns": [f"x = {i}"]} for i in range(7)])
    config = settings(tmp_path, question_begin=begin, n_questions=n, question_step=step)
    assert [question.row for question in open_questions(target, config)[1]] == rows


def test_chat_templates(target, tmp_path):
    write(tmp_path / "q.jsonl", [{"messages": [
        {"role": "system", "content": "short"}, {"role": "user", "content": "one"},
        {"role": "assistant", "content": "old"}, {"role": "user", "content": "two"}]}])  # fmt: skip
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}=")
    said, own = {}, target.tokenizer.chat_template
    for name in ("question", str(file)):
        chat, (question,), _ = open_questions(target, settings(tmp_path, chat_template=name))
        history = [*question.turns[0], {"role": "assistant", "content": "new"}, *question.turns[1]]
        said[name] = target.tokenizer.decode(chat.prompt(history, "x")[0])
    assert target.tokenizer.chat_template == own, "the target's own is left alone"
    bos = target.tokenizer.bos_token
    assert said["question"] == f"{bos}short\n\nQuestion: one\nAnswer: new\n\nQuestion: two\nAnswer:"
    assert said[str(file)] == "<system>short<user>one<assistant>new<user>two="
    bare = SimpleNamespace(**vars(target))
    bare.tokenizer = AutoTokenizer.from_pretrained(target.name)
    bare.tokenizer.chat_template = None
    with pytest.raises(InputError, match="--chat_template question"):
        open_questions(bare, settings(tmp_path))
    assert open_questions(bare, settings(tmp_path, chat_template="question"))
    with pytest.raises(InputError, match=r"no\.jinja' cannot be read"):
        open_questions(target, settings(tmp_path, chat_template="no.jinja"))
    file.write_text("{% for m in")
    chat, (question,), _ = open_questions(target, settings(tmp_path, chat_template=str(file)))
    with pytest.raises(InputError, match=r"q\.jsonl:1: the chat template refuses"):
        chat.prompt(question.turns[0], question.where)


def test_prompts_longer_than_the_context(target, tmp_path):
    write(tmp_path / "q.jsonl", [QUESTIONS[-1], QUESTIONS[2]])
    room = target.max_positions - 12
    chat, (long, short), _ = open_questions(target, settings(tmp_path))
    whole = list(chat.renderer.conversation(long.turns[0], "x"))
    ids, cut = chat.prompt(long.turns[0], long.where)
    assert len(whole) > room == len(ids) and cut == len(whole) - room
    assert ids == whole[:1] + whole[cut + 1 :] and ids[0] == target.tokenizer.bos_token_id
    assert chat.prompt(short.turns[0], short.where)[1] == 0
    for rule, told in (("error", "long_prompts"), ("skip", None)):
        config = settings(tmp_path, long_prompts=rule)
        chat, (long, short), _ = open_questions(target, config)
        asker, method = Asker(target, chat, config), Scripted("stock", target, [[9], [9]])
        assert "methods" in asker.all([method], short)
        if told:
            with pytest.raises(InputError, match=rf"q\.jsonl:1: a prompt of .*{told}"):
                asker.all([method], long)
        else:
            assert "a prompt of" in asker.all([method], long)["skipped"]
    with pytest.raises(InputError, match="max_new_tokens: 512 leaves no room"):
        open_questions(target, settings(tmp_path, max_new_tokens=512))


def test_cut_and_left_out_are_reported(made, tiny_target, tmp_path):
    body = json.loads((made / "spec-bench.json").read_text())
    assert {c["turns"] for c in body["counts"]["cut"].values()} == {1}
    assert (
        body["counts"]["cut"]["plain"]["tokens"] > 0 and "lost" in (made / "table.md").read_text()
    )
    write(tmp_path / "q.jsonl", QUESTIONS[-2:])
    changes = {"long_prompts": "skip", "methods": "plain", "repeats": 1, "warmups": 0}
    cli.main(command(tiny_target, tmp_path, **changes))
    counts = json.loads((tmp_path / "out/spec-bench.json").read_text())["counts"]
    assert list(counts["skipped"]) == ["401"] and counts["questions"] == 1


@pytest.mark.parametrize(
    ("row", "category", "said"),
    [
        ({"question": "why", "answer": "so"}, "question", ["why"]),
        ({"prompt": ["a", "b"], "category": "stem", "prompt_id": 7}, "stem", ["a", "b"]),
        ({"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f",
          "canonical_solution": "    pass"}, "humaneval", ["def f():\n"]),
        ({"task_id": 3, "text": "Add.", "code": "x", "test_list": ["assert a", "assert b"]}, "mbpp",
         ["You are an expert Python programmer, and here is your task: Add. Your code should pass "
          "these tests:\n\nassert a\nassert b\n"]),
        ({"id": "abc", "article": "News.", "highlights": "New."}, "summarization",
         ["Summarize: News."]),
    ],
)  # fmt: skip
def test_benchmarks_by_format(target, tmp_path, row, category, said):
    write(tmp_path / "q.jsonl", [row])
    _, (question,), _ = open_questions(target, settings(tmp_path))
    assert [[m["content"] for m in turn] for turn in question.turns] == [[text] for text in said]
    names = [row[key] for key in ("task_id", "prompt_id", "id") if key in row] or [1]
    assert (question.category, question.id) == (category, names[0])
    _, (named,), _ = open_questions(target, settings(tmp_path, category="gsm8k"))
    assert named.category == row.get("category", "gsm8k")


@pytest.mark.parametrize(
    ("second", "named"),
    [
        ({"question_id": 1, "turns": ["a"]}, r"q\.jsonl:2: question id 1 stands in .*q\.jsonl:1"),
        ({"question_id": 2, "turns": ["a", 3]}, r"q\.jsonl:2: number 2 of 'turns'"),
        ({"question_id": 2, "turns": []}, r"q\.jsonl:2: no 'turns'"),
        ({"question_id": [2], "turns": ["a"]}, r"q\.jsonl:2: the question's id"),
        ({"question_id": 2, "text": "a"}, r"q\.jsonl:2: no 'turns' .*auto saw turns"),
    ],
)
def test_bad_questions_are_named(target, tmp_path, second, named):
    write(tmp_path / "q.jsonl", [{"question_id": 1, "turns": ["a"]}, second])
    with pytest.raises(InputError, match=named):
        open_questions(target, settings(tmp_path))


# ---------------------------------------------------------------- going on


def test_a_stopped_run_goes_on(tiny_target, made, tmp_path, monkeypatch, capsys):
    write(tmp_path / "q.jsonl", QUESTIONS)
    asked, one = [], Asker.one

    def counted(self, method, question):
        if len(asked) == stop:
            raise KeyboardInterrupt
        asked.append((question.id, method.name))
        return one(self, method, question)

    monkeypatch.setattr(Asker, "one", counted)
    stop, args = 4 + 3 * 4 + 2, command(tiny_target, tmp_path)  # warm-up, three and a half
    with pytest.raises(SystemExit, match="130"):
        cli.main(args)
    journal = tmp_path / "out/journal.jsonl"
    kept = journal.read_bytes()
    assert kept.count(b"\n") == 1 + 3 and not (tmp_path / "out/answers").exists()
    journal.write_bytes(kept + b'{"run": 0, "question_id": 242, "meth')  # killed in a write
    stop, asked[:] = None, []
    assert cli.main(args) == 0
    again = [q for q, name in asked[4:] if name == "plain"]
    assert again == [241, 242, 401] + [q["question_id"] for q in QUESTIONS]
    assert journal.read_bytes().startswith(kept)
    for file in sorted((made / "answers/run-1").iterdir()):
        mine = tmp_path / "out/answers/run-1" / file.name
        assert compare_files(file, mine)["first_difference"] is None
    # All is there: nobody is asked, and the result says the same.
    before, asked[:] = json.loads((tmp_path / "out/spec-bench.json").read_text()), []
    assert cli.main([*args, "--compat=false"]) == 0 and not asked
    after = json.loads((tmp_path / "out/spec-bench.json").read_text())
    assert after["figures"] == before["figures"] and after["compat"] is None
    check_figures(tmp_path / "out")
    # Fewer questions are a part of it; another configuration is another run.
    assert cli.main([*args, "--n_questions=2", "--repeats=1"]) == 0 and not asked
    assert json.loads((tmp_path / "out/spec-bench.json").read_text())["counts"]["questions"] == 2
    assert cli.main([*args, "--n_questions=1", "--question_begin=5"]) == 0 and not asked
    body = json.loads((tmp_path / "out/spec-bench.json").read_text())
    assert body["per_question"]["question_id"] == [401]
    for change in ("--max_new_tokens=9", "--seed=1", "--chat_template=question"):
        with pytest.raises(SystemExit):
            cli.main([*args, change])
        assert f"another {change[2:].split('=')[0]}" in capsys.readouterr().err
    write(tmp_path / "q.jsonl", [*QUESTIONS[:-1], {**QUESTIONS[-1], "turns": ["other"]}])
    with pytest.raises(SystemExit):
        cli.main(args)
    assert "content of questions" in capsys.readouterr().err
    assert not asked


def test_a_damaged_journal_is_named(tmp_path):
    journal = Journal(tmp_path / "j.jsonl", {"a": 1})
    journal.add((0, "x"), {"methods": {}})
    journal.add((1, 7), {"skipped": "long"})
    again = Journal(tmp_path / "j.jsonl", {"a": 1})
    assert again.entries == {(0, "x"): {"methods": {}}, (1, 7): {"skipped": "long"}}
    with pytest.raises(InputError, match="another a, b"):
        Journal(tmp_path / "j.jsonl", {"a": 2, "b": 1})
    lines = (tmp_path / "j.jsonl").read_text().splitlines()
    (tmp_path / "j.jsonl").write_text("\n".join([lines[0], lines[1][:-9], lines[2]]) + "\n")
    with pytest.raises(InputError, match=r"j\.jsonl:2 is damaged"):
        Journal(tmp_path / "j.jsonl", {"a": 1})


# ---------------------------------------------------------------- the clock, and what is asked for


def test_methods_take_turns_and_warm_up(target, tmp_path):
    """Whoever begins changes from question to question; warm-ups are in no figure."""
    write(tmp_path / "q.jsonl", QUESTIONS[2:5])
    order = []

    class Noted(Scripted):
        def _run(self, batch):
            order.append(self.name[0])
            return TimedCall([[7, 8]], {})

    config = settings(tmp_path, warmups=2, repeats=2)
    chat, questions, _ = open_questions(target, config)
    methods = [Noted(name, target, []) for name in ("plain", "stock", "lookup")]
    journal = Journal(tmp_path / "j.jsonl", {})
    run_questions(target, methods, questions, chat, config, journal)
    text = "".join(order)
    assert text == "psl" * 2 + "psl" + "slp" + "lps" + "slp" + "lps" + "psl"
    assert len(journal.entries) == 6
    turn = journal.entries[1, 242]["methods"]["stock"][0]
    assert turn["lengths"] == [1] and turn["seconds"] > 0


def test_seconds_are_of_decoding_alone(target, tmp_path, monkeypatch):
    """A slow tokenizer and a slow `prepare` cost nothing."""
    write(tmp_path / "q.jsonl", QUESTIONS[2:3])
    config = settings(tmp_path)
    chat, (question,), _ = open_questions(target, config)
    clock = [0.0]
    monkeypatch.setattr("redrafter.evaluation.runs.time.perf_counter", lambda: clock[0])

    class Slow(Scripted):
        def prepare(self, batch: PromptBatch):
            clock[0] += 100

        def _run(self, batch):
            clock[0] += 3
            return TimedCall([[7, 8]], {})

    render = chat.renderer.conversation

    def slowly(*args):
        clock[0] += 1000
        return render(*args)

    monkeypatch.setattr(chat.renderer, "conversation", slowly)
    (turn,) = Asker(target, chat, config).one(Slow("stock", target, []), question)
    assert turn["seconds"] == 3


def test_wrong_requests_are_named(tiny_target, tmp_path, capsys):
    write(tmp_path / "q.jsonl", QUESTIONS[:1])
    for change, named in (
        ({"baseline": "stock", "methods": "plain"}, "baseline: 'stock' is not among"),
        ({"methods": "plain,head"}, "needs"),
        ({"methods": "plain,bigram:2x2"}, "give --bigrams"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 must be at least 1"),
        ({"questions": tmp_path / "no.jsonl"}, "no.jsonl does not exist"),
        ({"question_begin": 1, "methods": "plain"}, "question_begin: 1 leaves out all 1 rows"),
        ({"format": "columns", "methods": "plain"}, "prompt_column"),
    ):
        with pytest.raises(SystemExit):
            cli.main(command(tiny_target, tmp_path, **change))
        assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "nothing was done"
    with pytest.raises(InputError, match="would both be in"):
        file_names(["a:b", "a(b"])


def test_sampled_texts_are_plains(tiny_target, tmp_path):
    """Seeded: the same with a drafter, two turns long; an own law is not compared."""
    write(tmp_path / "q.jsonl", QUESTIONS[:2])
    changes = {
        "methods": "plain,suffix:4x1,hf-lookup:2", "repeats": 1, "warmups": 0, "temperature": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    cli.main(command(tiny_target, tmp_path, **changes))
    body = json.loads((tmp_path / "out/spec-bench.json").read_text())
    same = body["lossless"]["suffix:4x1"]
    assert same["equal_tokens"] == same["turns"] == 4 and same["compared"]
    assert not body["lossless"]["hf-lookup:2"]["compared"] and body["exact"]
