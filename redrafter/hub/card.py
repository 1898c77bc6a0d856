"""The model card of a head: nothing stands in it that no file of the run says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from redrafter.evaluation.report import (
    described_prompts,
    markdown_table,
    measured_on,
    n_rows,
    with_interval,
)
from redrafter.hub.profile import PROFILE, profile_of
from redrafter.hub.recipe import data, pictures_of, sources, training
from redrafter.hub.release import CARD_CONTENT, CONTENT, matches
from redrafter.hub.run import Result, Run

TAGS = ["redrafter", "speculative-decoding", "draft-head"]
#: key in a result: (type, name) of the metric in the Hub's model-index
METRICS = {
    "tokens_per_step": ("tokens_per_step", "tokens per target forward"),
    "speedup_stock": ("speedup", "speedup over model.generate"),
    "speedup_plain": ("speedup", "speedup over the best plain loop"),
}
_NOT_MEASURED = """\
Nothing was measured on this head after its training: no speed is claimed. Measure it, and publish
again:

```bash
redrafter speed --target.path TARGET --head RUN --prompts PROMPTS.jsonl --out RUN/speed.json
redrafter lossless --target.path TARGET --head RUN --prompts PROMPTS.jsonl --out RUN/lossless.json
```"""


def model_card(run: Run, repo: str, files: Sequence[str], pictures: Mapping[str, str]) -> str:
    """The whole README.md.

    repo: where it will lie, USER/NAME; files: paths that lie there with it; pictures: name
        ("training", ...) -> path in the repository
    """
    from huggingface_hub import ModelCard

    name = repo.split("/")[-1]
    parts = [
        f"# {name}",
        _introduction(run),
        "## Use\n\n" + _use(run, repo, files),
        "## Measured\n\n" + _measured(run, pictures),
        "## Training\n\n" + training(run, pictures),
        "## Data\n\n" + data(run),
        "## Limits\n\n" + _limits(run),
        "## Files\n\n" + _files([*files, *pictures.values()]),
        _made_by(run),
    ]
    text = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{metadata(run, name, files).to_yaml()}\n---\n\n{text}\n"))


# -------------------------------------------------------------------------------- metadata


def metadata(run: Run, name: str, files: Sequence[str]) -> Any:
    """huggingface_hub.ModelCardData: what the Hub filters and shows by."""
    from huggingface_hub import ModelCardData

    runs_alone = ["custom_generate"] * any(f.startswith("custom_generate/") for f in files)
    datasets = sorted({s["name"] for s in sources(run) if s["on_hub"]})
    return ModelCardData(
        model_name=name,
        base_model=run.target.hub_id,
        library_name="redrafter",
        pipeline_tag="text-generation",
        tags=[
            *TAGS,
            kind_tag(run),
            *runs_alone,
        ],  # the Hub lists those that generate() takes by that word
        datasets=datasets or None,
        eval_results=eval_results(run) or None,
        **run.target.license,
    )


def eval_results(run: Run) -> list[Any]:
    """A huggingface_hub.EvalResult for every figure of every method that drafts with the head."""
    from huggingface_hub import EvalResult

    found = []
    for result in run.speeds:
        for method, figures in result.of_head().items():
            for key, (kind, label) in METRICS.items():
                if figures.get(key) is None:
                    continue
                low, high = figures["low"].get(key), figures["high"].get(key)
                about = {
                    "method": method, "temperature": result.body["temperature"],
                    "batch_size": result.body["batch_size"], "n_prompts": result.body["n_prompts"],
                    "max_new_tokens": result.config["max_new_tokens"],
                    "device": result.body["provenance"]["device"], "low": low, "high": high,
                }  # fmt: skip
                found.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type=Path(result.prompts).stem,
                        dataset_name=result.prompts,
                        metric_type=kind,
                        metric_name=f"{label}, {result.title}, {method}",
                        metric_value=figures[key],
                        metric_args={k: v for k, v in about.items() if v is not None},
                    )
                )
    return found


# -------------------------------------------------------------------------------- sections


def _introduction(run: Run) -> str:
    head, target = run.head.config, run.target
    shown = f"[{target.hub_id}](https://huggingface.co/{target.hub_id})" if target.hub_id else (
        f"`{target.name}` (not known on the Hub)")  # fmt: skip
    weights = sum(p.numel() for p in run.head.parameters())
    dtype = str(run.head.dtype).removeprefix("torch.")
    depth = head.trained_depth
    vocabulary = head.draft_vocab_size or head.vocab_size
    rows = [
        ("licence", _licence(run)),
        ("head", f"{weights:,} weights in {dtype}, {run.head.described()}, output: {_output(run)}"),
        ("drafts from", f"{vocabulary:,} of the target's {head.vocab_size:,} tokens"),
        ("trained for", f"drafts of {depth} tokens" if depth else "a depth that was not recorded"),
        ("target's fingerprint", f"`{head.target_fingerprint or 'not recorded'}`"),
        ("head's fingerprint", f"`{run.head.fingerprint()}`"),
    ]  # fmt: skip
    claim = "**the text is the target's own, only sooner**"
    if sum(row[-1] for row in compared(run)):
        claim = "the text should be the target's own, **which did not hold when it was checked**"
    text = (
        f"A draft head for {shown}. It guesses the target's next few tokens, and the target checks "
        f"all guesses in one forward pass: {claim}. {_after(run)}"
    )
    return text + "\n\n" + markdown_table(["target", shown], rows)


def _output(run: Run) -> str:
    if run.head.draws_on_target:
        return "the target's own matrix"
    return "a matrix of its own" if run.head.shares_matrix else "a matrix of its own per depth"


def _after(run: Run) -> str:
    name, number = run.head.paper
    shown = f"{name} ([{number}](https://arxiv.org/abs/{number}))"
    return f"Its kind is `{run.head.kind}`, after {shown}."


def kind_tag(run: Run) -> str:
    """What the Hub finds heads of this kind by."""
    kind = run.head.kind.replace("_", "-")
    return "recurrent-drafter" if kind == "recurrent" else kind


def _licence(run: Run) -> str:
    stated, found = run.target.license, run.target.stated_in
    if not stated:
        return "of the target: not known where this card was made; look at the target's own card"
    name = stated.get("license_name") or stated["license"]
    link = stated.get("license_link", "")
    shown = f"[{name}]({link})" if link.startswith("http") else name
    return f"{shown}, as stated by {found}"


def _use(run: Run, repo: str, files: Sequence[str]) -> str:
    target = run.target.hub_id or "TARGET"
    text = (
        f"```python\nfrom redrafter import generate, load_target\n\n"
        f'target = load_target("{target}")\n'
        f'print(generate(target, "Once upon a time", head="{repo}").extra["texts"][0])\n```'
    )
    if run.target.hub_id is None:
        text += "\n\n`TARGET` is the folder (or Hub id) of the target above."
    if "custom_generate/generate.py" in files:
        text += (
            "\n\nWith plain transformers, without this library (the code is in "
            "[custom_generate](custom_generate); read it before you trust it):\n\n"
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model, tokenizer = (c.from_pretrained("{target}") for c in '
            "(AutoModelForCausalLM, AutoTokenizer))\n"
            'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
            f'model.generate(**inputs, custom_generate="{repo}", trust_remote_code=True)\n```'
        )
    if any(name.startswith("golden/") for name in files):
        text += (
            "\n\nWhether this copy does on your machine what it did where it was made: "
            f"`redrafter verify {repo}`."
        )
    return text


def _measured(run: Run, pictures: Mapping[str, str]) -> str:
    if not run.speeds and not run.proofs:
        return _NOT_MEASURED
    parts = [_exactness(run)]
    if run.speeds:
        lines = [line for result in run.speeds for line in _headlines(result)]
        parts.append("\n".join(lines))
        parts.append(pictures_of(pictures, ["speedup", "acceptance"]))
        parts += [_measured_table(result) for result in run.speeds]
        parts.append(_acceptance(run))
    else:
        parts.append("Speed was not measured: no speed is claimed.")
    return "\n\n".join(part for part in parts if part)


def _headlines(result: Result) -> list[str]:
    """A line per method that drafts with the head."""
    facts, lines = result.body["provenance"], []
    for method, m in result.of_head().items():
        rates = {
            key: with_interval(m[key], m["low"].get(key), m["high"].get(key)) for key in METRICS
        }
        lines.append(
            f"- `{method}` on {result.title}: **{rates['tokens_per_step']} tokens per step**, "
            f"{rates['speedup_stock']} x `model.generate`, {rates['speedup_plain']} x the best "
            f"plain loop ({described_prompts(result.body)}, {measured_on(facts)})"
        )
    return lines + [f"    - warning: {warning}" for warning in result.body["warnings"] if lines]


def _measured_table(result: Result) -> str:
    """All methods of a file, those that draft with something else too."""
    body, facts = result.body, result.body["provenance"]
    rows = []
    for method, m in body["methods"].items():
        tau, stock, plain = (
            with_interval(m[key], m["low"].get(key), m["high"].get(key)) for key in METRICS
        )
        bound, efficiency = (with_interval(m[key], None, None) for key in ("bound", "efficiency"))
        equal = f"{m['equal_rows']}/{n_rows(body)}"
        rows.append([f"`{method}`", tau, stock, plain, bound, efficiency,
                     f"({equal})" if m["law_only"] else equal])  # fmt: skip
    columns = ["method", "tokens/step", "x `model.generate`", "x best plain loop", "bound",
               "efficiency", "= plain"]  # fmt: skip
    share = with_interval(body["loop_share"], None, None)
    caption = (
        f"{body['n_prompts']} prompts of up to {result.config['max_new_tokens']} new tokens each; "
        f"{measured_on(facts)}; best plain "
        f"loop `{body['best_plain']}`; intervals: 95 % bootstrap over prompts; bound: what the "
        "measured costs allow with these tokens per step; efficiency: speed after the prefill / "
        "bound; = plain: rows whose text is plain decoding's (in brackets: plain's law, another "
        f"text); share of the plain text that repeats itself: {share}. Acceptance by depth, costs "
        f"and seconds stand in [{result.name}]({result.name})."
    )
    return f"### {result.title} (`{result.name}`)\n\n{markdown_table(columns, rows)}\n\n{caption}"


def _acceptance(run: Run) -> str:
    """The content of speculation_profile.json."""
    made = profile_of(run.speeds, run.head)
    if made is None:
        return ""
    rows = []
    for p in made["profiles"]:
        rates = (p["marginal_accept_rates"], p["conditional_accept_rates"])
        where, new = (p["measurement_conditions"][key] for key in ("dataset", "osl"))
        rows.append([f"`{p['method']}`", f"{where}, T = {p['temperature']:g}", new,
                     f"{p['mean_accept_length']:.2f}", f"{p['draft_acceptance_rate']:.3f}",
                     *(" ".join("-" if r is None else f"{r:.3f}" for r in kind) for kind in rates)
                     ])  # fmt: skip
    columns = ["method", "prompts", "most new tokens", "mean length", "of drafted tokens",
               "accepted to position k", "... of those to k - 1"]  # fmt: skip
    caption = (
        "As engines count: accepted tokens behind a stop are counted, steps without a draft are "
        f"not; the length holds the bonus token. Also in [{PROFILE}]({PROFILE})."
    )
    return f"### Acceptance by position\n\n{markdown_table(columns, rows)}\n\n{caption}"


def compared(run: Run) -> list[list[Any]]:
    """Rows of the table of exactness: method, mode, prompts, batches, tokens compared, near-ties,
    unexplained tokens."""
    return [
        [f"`{method}`", f"{mode.replace('_', ' ')}, T = {r['temperature']:g}",
         f"{proof.prompts}, {r['prompts']}", proof.config["batch_sizes"], r["compared_tokens"],
         r["near_ties"], r["unexplained"]]
        for proof in run.proofs
        for method, modes in proof.body["methods"].items()
        for mode, r in modes.items()
    ]  # fmt: skip


def verdict(run: Run) -> str:
    """A sentence on `compared`."""
    rows = compared(run)
    bad, ties = (sum(row[i] for row in rows) for i in (6, 5))
    if bad:
        return f"**Not lossless: {bad} differences from plain decoding are unexplained.**"
    if ties:
        return (
            "Drafted and plain text are the same up to rounding: every differing token is a "
            "near-tie that the measured rounding explains."
        )
    return "Every compared token is that of plain decoding."


def _exactness(run: Run) -> str:
    """What eval/lossless.py found."""
    if not run.proofs:
        return "Whether drafting changes a token was not checked on this head (no `lossless.json`)."
    columns = ["method", "mode", "prompts", "batches", "tokens compared", "near-ties",
               "unexplained"]  # fmt: skip
    return verdict(run) + "\n\n" + markdown_table(columns, compared(run))


def _limits(run: Run) -> str:
    lines = [
        "It works with its own target only: another one is refused by its fingerprint (with "
        "`allow_other_target` the text stays right, and few guesses are accepted).",
    ]
    if run.speeds:
        lines.append(
            "The figures above hold for those prompts, that device and those settings. Other "
            "text, batches and devices give others: measure with `redrafter speed`."
        )
    for result in run.speeds:
        for method, m in result.of_head().items():
            if (ratio := m["speedup_plain"]) is not None and ratio < 1:
                lines.append(
                    f"On {result.title}, `{method}` was **slower** than the best plain loop "
                    f"({ratio:.2f} x): do not speculate there."
                )
        share = result.body["loop_share"]
        if share is not None and share > 0.5:
            lines.append(
                f"On {result.title}, {share:.0%} of the plain text repeats itself, which flatters "
                "every drafter."
            )
    if names := sorted({s["name"] for s in sources(run)}):
        lines.append(
            f"It learned from {', '.join(f'`{n}`' for n in names)}; on text of another kind fewer "
            "guesses are accepted."
        )
    if run.head.config.draft_vocab_size:
        lines.append("It never guesses a token outside of its own part of the vocabulary.")
    lines.append(
        "It adds nothing to what the target can say, and takes nothing away: bias and errors are "
        "the target's. The terms of the target's licence apply to what is made with it."
    )
    return "\n".join(f"- {line}" for line in lines)


def _files(files: Sequence[str]) -> str:
    """One line per kind of file."""
    told: dict[str, list[str]] = {}
    for pattern, what in {**CARD_CONTENT, **CONTENT}.items():
        found = [name for name in files if matches(name, pattern)]
        if not found:
            continue
        folder = found[0].split("/")[0]
        shown = [f"`{folder}/`"] if "/" in found[0] else [f"`{name}`" for name in found]
        told.setdefault(what, []).extend(s for s in shown if s not in told.get(what, []))
    rows = [[", ".join(names), what] for what, names in told.items()]
    return markdown_table(["file", "what"], rows)


def _made_by(run: Run) -> str:
    versions = run.facts.get("versions")
    if not versions:
        return ""
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    commit = run.facts.get("git_commit")
    return f"Trained with {shown}" + (f", commit `{commit}`." if commit else ".")
