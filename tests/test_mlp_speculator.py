"""IBM's and Arctic's speculators: their maths, their files, and drafting with them."""

import itertools
import json
import math

import pytest
import safetensors.torch
import torch
from models import VOCAB, prompts, settings, tiny
from test_exactness import check
from torch.nn import functional as F

from redrafter.config import HeadConfig, TargetConfig, TreeConfig
from redrafter.contracts import InputError, RowState, Truth
from redrafter.decode.speculative import speculative
from redrafter.drafters.build import Resources, build_drafter
from redrafter.drafters.head import HeadDrafter
from redrafter.heads.load import load_head, load_trainable, own_class
from redrafter.heads.mlp_speculator import MLPSpeculator, SpeculatorConfig
from redrafter.planning.meta import MetaTarget, meta_head

HIDDEN = 32

IBM = dict(
    architectures=["MLPSpeculatorPreTrainedModel"], model_type="mlp_speculator", emb_dim=HIDDEN,
    inner_dim=24, n_candidates=5, n_predict=3, scale_input=False, tie_weights=False,
    top_k_tokens_per_head=[5, 4, 3], torch_dtype="float16", vocab_size=VOCAB,
)  # fmt: skip
ARCTIC = dict(
    architectures=["ArcticLSTMSpeculatorPreTrainedModel"], model_type="mlp_speculator",
    base_model_name_or_path="org/some-model", input_hidden_dim=HIDDEN, inner_dim="24",
    proj_dim="24", emb_dim="24", n_candidates=3, n_predict=3, scale_input=True, tie_weights=True,
    tie_lstm_embs=False, top_k_tokens_per_head=[1, 1, 1], vocab_size=VOCAB, method="sum_rnn",
)  # fmt: skip
CASES = {
    "ibm": IBM,
    "ibm-scaled": {**IBM, "scale_input": True, "inner_dim": 0, "n_predict": 4},
    "ibm-tied": {**IBM, "tie_weights": True, "scale_input": True},
    "arctic": {**ARCTIC, "tie_weights": False},
    "arctic-tied": ARCTIC,
    "arctic-lstm": {**ARCTIC, "method": "sum_lstm"},
    "arctic-lstm-tied": {**ARCTIC, "method": "sum_lstm", "tie_lstm_embs": True, "inner_dim": 24},
}


def width_of(config):
    return int(config["inner_dim"]) or config["emb_dim"]


def their_weights(config):
    """Random ones, under the names and with the copies that their code saves."""
    torch.manual_seed(len(json.dumps(config)))
    n, width, tied = config["n_predict"], width_of(config), config["tie_weights"]
    arctic = "input_hidden_dim" in config
    prefix, inside = ("", ".0") if arctic else ("speculator.", "")
    weights = {}

    def add(kind, index, *shape, copies=(), inside="", bias=False):
        for end in ("weight", "bias") if bias else ("weight",):
            value = torch.randn(shape, dtype=torch.float64)
            for i in (index, *copies):
                weights[f"{prefix}{kind}.{i}{inside}.{end}"] = value.clone()

    # Arctic's modules that are tied exist once, IBM's n times, and the heads n times in both.
    others = range(1, n) if tied and not arctic else ()
    if config.get("method", "sum_rnn") == "sum_rnn":
        for i in range(1 if tied else n):
            add("emb", i, VOCAB, width, copies=others, inside=inside)
            add("ln", i, width, copies=others, inside=inside, bias=True)
        add("proj", 0, width, HIDDEN, inside=inside)
        for i in range(1, 2 if tied else n):
            more = range(2, n) if tied and not arctic else ()
            add("proj", i, width, width, copies=more, inside=inside)
    else:
        for gate in ("forget", "input", "output", "cell"):
            add(f"{gate}_emb", 0, VOCAB, width)
            add(f"{gate}_proj", 0, width, HIDDEN)
            add(f"{gate}_proj", 1, width, width)
            if config["tie_lstm_embs"]:
                weights[f"{gate}_emb.0.weight"] = weights["forget_emb.0.weight"].clone()
        add("cell_ln", 0, width, bias=True)
        add("state_ln", 0, width, bias=True)
    for i in range(1 if tied else n):
        add("head", i, VOCAB, width, copies=range(1, n) if tied else ())
    return weights


def save(folder, config, weights):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    return folder


def published(config, weights, c, tokens):
    """Logits after each of the tokens, from the published formulas. c: (H,), tokens: list."""
    n, width = config["n_predict"], width_of(config)
    state_share = 0.5 ** (0.5 / n)
    token_share = math.sqrt((1 - state_share**2) * (width / 2))

    def find(kind, i, end="weight"):
        tied = config["tie_weights"]
        for j in [i] if not tied else [i, min(i, 1), 0]:
            for name in (f"speculator.{kind}.{j}.{end}", f"{kind}.{j}.{end}",
                         f"{kind}.{j}.0.{end}"):  # fmt: skip
                if name in weights:
                    return weights[name]
        raise KeyError(kind)

    def norm(x, kind, i):
        x = x / torch.sqrt((x * x).mean() + 1e-6)
        return x * find(kind, i) + find(kind, i, "bias")

    def mixed(state, token, gate, i):
        """Divided by the state's share, which the norm would take out again but for its epsilon."""
        share = token_share / state_share
        return find(f"{gate}proj", i) @ state + share * find(f"{gate}emb", i)[token]

    state, memory, found = c, torch.zeros(width, dtype=c.dtype), []
    if config["scale_input"]:
        state = state / torch.sqrt((state * state).mean() + 1e-6) / 2**0.5
    for i, token in enumerate(tokens):
        if config.get("method", "sum_rnn") == "sum_rnn":
            state = F.gelu(norm(mixed(state, token, "", i), "ln", i))
        else:
            forget = torch.sigmoid(mixed(state, token, "forget_", i))
            let_in = torch.sigmoid(mixed(state, token, "input_", i))
            let_out = torch.sigmoid(mixed(state, token, "output_", i))
            new = F.gelu(norm(mixed(state, token, "cell_", i), "cell_ln", i))
            memory = forget * memory + let_in * new
            state = let_out * F.gelu(norm(memory, "state_ln", i))
        found.append(find("head", i) @ state)
    return found


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_published_ones(tmp_path, case):
    config, weights = CASES[case], their_weights(CASES[case])
    head = load_head(save(tmp_path, config, weights), tiny("llama"))
    n, width = config["n_predict"], 3
    tokens = torch.randint(VOCAB, (2, n, width))
    context = torch.randn(2, 1, HIDDEN, dtype=torch.float64)
    states, level_tokens = None, tokens[:, 0, :1]
    for level in range(1, n + 1):
        states, logits = head.read(None, level_tokens, context, states, level)
        for row in range(2):
            for beam in range(level_tokens.shape[1]):
                path = [tokens[row, 0, 0], *tokens[row, 1:level, beam]]
                wanted = published(config, weights, context[row, 0], path)[-1]
                torch.testing.assert_close(logits[row, beam], wanted, atol=1e-10, rtol=1e-10)
        if level < n:  # the next level: three beams below the first one
            level_tokens = tokens[:, level]
            states = states.expand(-1, width, -1) if level == 1 else states


@pytest.mark.parametrize("case", CASES)
def test_its_tree_is_the_best_of_all_children(tmp_path, case):
    """Level by level, against a search that reads every path from its beginning."""
    config, weights = CASES[case], their_weights(CASES[case])
    target, n, width = tiny("llama"), config["n_predict"], 2
    head = load_head(save(tmp_path, config, weights), target)
    drafter = HeadDrafter(head, target, TreeConfig(width, n))
    ids, length = torch.randint(VOCAB, (1, 9)), torch.tensor([6])
    seqs = RowState(ids, length, length, torch.ones(1, dtype=torch.bool))
    hidden = torch.randn(1, 1, HIDDEN, dtype=torch.float64)
    drafter.begin(seqs)
    drafter.observe(Truth(seqs.root[:, None], torch.ones_like(length), hidden))
    drafter.start()
    beams = [((), 0.0)]
    for level in range(1, n + 1):
        drafter.extend(level)
        children = []
        for path, total in beams:
            read = [int(seqs.root), *path]
            log_q = published(config, weights, hidden[0, 0], read)[-1].log_softmax(-1)
            children += [((*path, t), total + float(log_q[t])) for t in range(VOCAB)]
        beams = sorted(children, key=lambda child: -child[1])[:width]
        assert drafter.tokens[-1][0].tolist() == [path[-1] for path, _ in beams]
        assert drafter.log_q[-1][0].tolist() == pytest.approx([s for _, s in beams], abs=1e-9)


# ------------------------------------------------------------------------------------- decoding


def planted(target, rows, n=3):
    """A speculator that replays the target's own bigrams: s_k shows which token was read, and the
    output matrix what followed it in plain texts. Its state adds a little of everything."""
    torch.manual_seed(2)
    head = MLPSpeculator(
        SpeculatorConfig(
            vocab_size=VOCAB, hidden_size=target.hidden_size, inner_dim=VOCAB, n_predict=n
        )
    ).double()
    follows = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for text in rows:
        for before, after in itertools.pairwise(text):
            follows[after, before] += 1
    with torch.no_grad():
        for level in range(n):
            head.speculator.emb[level].weight.copy_(torch.eye(VOCAB) * 4)
            head.speculator.proj[level].weight.mul_(0.5)
            head.speculator.head[level].weight.copy_(follows)
    return head.eval()


def plain_texts(target, rows, config, seeds):
    made = speculative(target, rows, config, seeds=seeds)
    return [row + text for row, text in zip(rows, made.tokens, strict=True)]


SAMPLED = dict(do_sample=True, temperature=0.8)


@pytest.mark.parametrize(
    ("family", "options"), [("llama", {}), ("llama", SAMPLED), ("gemma3_text", SAMPLED)]
)
def test_text_is_plain_decoding(family, options):
    target, rows, config = tiny(family), prompts(), settings(**options)
    resources = Resources(head=planted(target, plain_texts(target, rows, config, range(4))))
    names = ["head:1x3", "head:3x3", "head:2x3:beams", "head:3x2:best:5",
             "multi:source=head:children=[3,2]:how=seeded"]  # fmt: skip
    drafters = {name: build_drafter(name, target, resources) for name in names}
    check(target, rows, config, drafters)
    free = settings(**options, eos_token_id=-1)
    for name, drafter in drafters.items():
        made = speculative(target, rows, free, seeds=range(4), drafter=drafter)
        assert made.stats.accepted_at[0] > 0, f"{name} accepted nothing: equality says little"
        assert made.stats.accepted_at[-1] < made.stats.drafted_at[-1], f"{name} never erred"


@pytest.mark.parametrize("case", ["ibm-scaled", "arctic-tied", "arctic-lstm"])
def test_any_weights_leave_the_text_alone(tmp_path, case):
    target, rows = tiny("llama"), prompts()
    config = settings(do_sample=True, temperature=1.3, top_k=9)
    head = load_head(save(tmp_path, CASES[case], their_weights(CASES[case])), target)
    depth = CASES[case]["n_predict"]
    resources = Resources(head=head)
    names = [f"head:1x{depth}", f"head:3x{depth}"]
    check(target, rows, config, {name: build_drafter(name, target, resources) for name in names})


def test_it_drafts_no_further_than_it_was_trained(tmp_path):
    target = tiny("llama")
    head = load_head(save(tmp_path, IBM, their_weights(IBM)), target)
    with pytest.raises(InputError, match="drafts 3 tokens ahead at most: name it head:2x3"):
        build_drafter("head:2x4", target, Resources(head=head))
    assert HeadDrafter(head, target).max_depth == 3, "what nobody chose is what it can do"
    multi = build_drafter("multi:source=head:children=[2,1,1,1]:how=top", target, Resources(head))
    made = speculative(target, prompts(), settings(eos_token_id=-1), drafter=multi)
    assert made.stats.drafted_at[2] > 0
    assert made.stats.drafted_at[3:] in ([], [0])


# ---------------------------------------------------------------------------------------- files


def test_files_as_others_save_them(tmp_path):
    """Half precision, shards, and tied matrices of which transformers keeps one name."""
    config = CASES["ibm-tied"]
    weights = {name: t.half() for name, t in their_weights(config).items()}
    head = load_head(save(tmp_path / "all", config, weights))
    assert head.speculator.head[0].weight.dtype is torch.float16
    once = {k: t for k, t in weights.items() if not k.endswith((".0.weight", ".0.bias"))}
    once["speculator.proj.0.weight"] = weights["speculator.proj.0.weight"]
    again = load_head(save(tmp_path / "once", config, once))
    assert again.fingerprint() == head.fingerprint()
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(once)
    for i, part in enumerate((names[:4], names[4:])):
        safetensors.torch.save_file({k: once[k] for k in part}, folder / f"part{i}.safetensors")
    places = {k: f"part{i}.safetensors" for i, p in enumerate((names[:4], names[4:])) for k in p}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert load_head(folder).fingerprint() == head.fingerprint()


def test_what_does_not_fit_is_named(tmp_path):
    weights = their_weights(IBM)

    def refused(match, config=IBM, tensors=weights, target=None):
        with pytest.raises(InputError, match=match):
            load_head(save(tmp_path, config, tensors), target)

    refused("config.json: n_predict is 0", {**IBM, "n_predict": 0})
    refused("tie_weights is 'yes'", {**IBM, "tie_weights": "yes"})
    refused("method 'gru'", {**ARCTIC, "method": "gru"})
    refused("several layers", {**ARCTIC, "emb_dim": "24.24"})
    refused("proj_dim is '12' and inner_dim 24", {**ARCTIC, "proj_dim": "12"})
    refused("sum_lstm has tied weights", {**CASES["arctic-lstm"], "tie_weights": False})
    fewer = {k: t for k, t in weights.items() if k != "speculator.ln.2.bias"}
    refused(r"missing tensors \['speculator.ln.2.bias'\]", tensors=fewer)
    refused(r"unknown tensors \['speculator.more.0.weight'\]",
            tensors={**weights, "speculator.more.0.weight": torch.ones(1)})  # fmt: skip
    refused("speculator.proj.0.weight has shape", {**IBM, "emb_dim": 31})
    refused("differ, but config.json says that they are tied",
            {**IBM, "tie_weights": True, "emb_dim": HIDDEN})  # fmt: skip
    refused("the head's hidden_size is 32", target=tiny("llama", hidden_size=64))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="a pickle, which could run any code"):
        load_head(tmp_path)


def test_an_lstm_is_not_trained(tmp_path):
    case = "arctic-lstm"
    with pytest.raises(InputError, match=r"sum_lstm .* neither be trained nor written"):
        load_trainable(save(tmp_path, CASES[case], their_weights(CASES[case])))


@pytest.mark.parametrize("case", ["ibm", "ibm-tied", "arctic", "arctic-tied"])
def test_it_is_written_in_ibms_layout(tmp_path, case):
    """And is then what it was, to whoever reads that layout; ours knows its target, too."""
    weights = their_weights(CASES[case])
    head = load_trainable(save(tmp_path / "theirs", CASES[case], weights), tiny("llama"))
    head.config.trained_depth = 3
    head.config.target_fingerprint = "whose"
    head.save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {name: written[name] for name in IBM if name not in ("torch_dtype", "scale_input")} == {
        name: value for name, value in {**IBM, "tie_weights": CASES[case]["tie_weights"]}.items()
        if name not in ("torch_dtype", "scale_input")
    }  # fmt: skip
    assert written["scale_input"] == CASES[case]["scale_input"]
    assert written["torch_dtype"] == "float64"
    stored = safetensors.torch.load_file(tmp_path / "ours" / "model.safetensors")
    plain = {name.removeprefix("speculator."): t for name, t in stored.items()}
    assert all(name.startswith("speculator.") for name in stored)
    for name, value in weights.items():
        mine = name.removeprefix("speculator.")
        kind, index, *_, end = mine.split(".")
        kept = next(
            t for i in (index, "1", "0") if (t := plain.get(f"{kind}.{i}.{end}")) is not None
        )
        assert torch.equal(kept, value)
    again = load_head(tmp_path / "ours")
    assert again.fingerprint() == head.fingerprint()
    assert (again.config.trained_depth, again.config.target_fingerprint) == (3, "whose")
    assert own_class(tmp_path / "ours") is MLPSpeculator and own_class(tmp_path / "theirs") is None
    tiny("llama").model.config.save_pretrained(tmp_path)
    target = MetaTarget(TargetConfig(str(tmp_path), dtype="float64", device="cpu"))
    for folder in ("ours", "theirs"):
        planned = meta_head(HeadConfig(init_from=str(tmp_path / folder)), target)
        assert {n: t.shape for n, t in planned.state_dict().items()} == {
            n: t.shape for n, t in head.state_dict().items()
        }


def test_the_remedy_for_a_pickle_works(tmp_path, monkeypatch):
    """The line that the message gives, run as it stands; tied matrices share memory there."""
    config, weights = CASES["ibm-tied"], their_weights(CASES["ibm-tied"])
    folder = save(tmp_path, config, weights)
    (folder / "model.safetensors").unlink()
    first = {}
    for value in weights.values():
        first.setdefault(float(value.sum()), value)
    tied = {name: first[float(value.sum())] for name, value in weights.items()}
    assert len({t.data_ptr() for t in tied.values()}) < len(tied)
    torch.save(tied, folder / "pytorch_model.bin")
    with pytest.raises(InputError) as refused:
        load_head(folder)
    code = str(refused.value).split('python -c "')[1].rsplit('"', 1)[0]
    monkeypatch.chdir(folder)
    exec(compile(code, "remedy", "exec"), {})
    wanted = save(tmp_path / "direct", config, weights)
    assert load_head(folder).fingerprint() == load_head(wanted).fingerprint()
