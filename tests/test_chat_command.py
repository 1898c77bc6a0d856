"""`redrafter chat`, as a user runs it: lines in, answers and what they took out."""

import io
import re
import runpy
import sys

import pytest
from launching import ROOT
from models import tiny
from test_text import TEMPLATE, sentencepiece_like

from redrafter import generate, load_target
from redrafter.cli.chat import check_drafter, converse, main, shown
from redrafter.config import ChatConfig, TargetConfig
from redrafter.contracts import Generation, InputError, StepStats


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny model that chats, after a fashion."""
    place = tmp_path_factory.mktemp("model")
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    tiny("llama").model.save_pretrained(place)
    return str(place)


def asked(*texts: str) -> list[dict]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_a_conversation_through_the_command(folder, monkeypatch, capsys):
    said = "a b c\n\nb\n/rest\n" + "a " * 80 + "\n/reset\na b c"  # no newline: Ctrl-D ends it
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    monkeypatch.setattr(sys, "path", [*sys.path])  # the launcher puts its clone there
    monkeypatch.setattr(sys, "argv", [
        "chat.py", "--target.path", folder, "--drafter", "mix(lookup:6x2,suffix:6x1)",
        "--target.dtype", "float64", "--max_new_tokens", "8",
    ])  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts/chat.py"), run_name="__main__")
    assert not ended.value.code
    out, err = capsys.readouterr()
    target = load_target(TargetConfig(path=folder, dtype="float64"))
    one = generate(target, messages=asked("a b c"), max_new_tokens=8).extra["texts"][0]
    two = generate(target, messages=asked("a b c", one, "b"), max_new_tokens=8).extra["texts"][0]
    assert two != one, "the second depends on what was said before"
    answers = re.findall(r"(.*?)\n\[(\d tokens?, .*?)\]\n", out, re.DOTALL)
    assert [text for text, _ in answers] == [one, two, one], out
    assert all(" per step" in took for _, took in answers)
    assert "levels accepted" in out
    errors = [line for line in err.splitlines() if "Loading weights" not in line and line]
    assert len(errors) == 2, "one line each"
    assert errors[0].startswith("error: no command /rest")
    assert "leaves no room in the context of 64" in errors[1] and "/reset" in errors[1]


def test_what_is_wrong_is_said_before_anything_is_loaded(folder, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--target.path", "nowhere", "--drafter", "head:4x4"])
    wanted = "error: drafter: 'head:4x4' needs --head, the folder of a trained draft head\n"
    assert ended.value.code == 2 and tuple(capsys.readouterr()) == ("", wanted)
    for name, said in (
        ("hed", "'hed' is unknown"), ("bigram:2x2", "needs --bigrams"), ("replay", "already known"),
        ("suffix:rule=x", "rule 'x' is not one of"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"^drafter: .*{said}"):
            check_drafter(ChatConfig(target=TargetConfig(path="x"), drafter=name))
    with pytest.raises(SystemExit):
        main(["--target.path", folder, "--max_new_tokens", "0"])
    assert "max_new_tokens: 0 must be at least 1" in capsys.readouterr().err


def test_an_interrupted_answer_is_forgotten(folder, capsys):
    """Ctrl-C within an answer; what follows is answered as if it had not been asked."""
    target, written = load_target(folder), []
    config = ChatConfig(target=TargetConfig(path=folder), max_new_tokens=8, system="c")

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 1:
            raise KeyboardInterrupt

    converse(target, None, config, iter(["a b c", "a b c"]), write)
    chat = [{"role": "system", "content": "c"}, *asked("a b c")]
    wanted = generate(target, messages=chat, max_new_tokens=8)
    at = next(i for i, text in enumerate(written) if "interrupted" in text)
    assert "".join(written[at + 1 :]) == f"{wanted.extra['texts'][0]}\n[{shown(wanted)}]\n"


def test_what_an_answer_took():
    stats = StepStats([4], [9], [4, 4, 2], [3, 2, 1])
    made = Generation([[0] * 10], ["length"], stats)
    assert shown(made) == (
        "10 tokens, 2.25 per step, 6 of 10 drafted levels accepted, cut at max_new_tokens or the "
        "context's end"
    )
    assert shown(Generation([[0]], ["eos"], StepStats([0], [0]))) == "1 token"
