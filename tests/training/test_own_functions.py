"""The user's own scores, selectors and sinks: the same on every scoring path, and one clear line for every mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from float64_reference import TEMPERATURE, reference_rollouts
from rollout_stubs import build_trainer, cut, generation_batch, inject, make_rows

from cppo.errors import UserError
from cppo.hooks import register_own
from cppo.perception import SCORES, SHAPINGS, TERMS, needs
from cppo.policy import packed, plain_scores
from cppo.rewards.spec import named_rewards
from cppo.training.before_updates import detect_tokens
from cppo.training.config import CPPOConfig
from cppo.training.micro_batch import Rollouts, ViewRequest

OWN, FAMILY = (Path(__file__).parent / "own" / file for file in ("own.py", "family.py"))
ROWS = make_rows([1, 2, 0, 1])


@pytest.fixture(scope="module")
def trainers(tiny, tmp_path_factory):
    """Scorer -> trainer: in float64 one by one, in float64 packed, in float32 packed, by TRL's kernel."""
    made = {}
    for name, scorer in (("plain", "plain"), ("packed", "shared"), ("packed32", "shared"), ("kernel", "kernel")):
        folder = tmp_path_factory.mktemp(name)
        trainer = build_trainer(tiny, folder, ROWS, scorer=scorer, temperature=TEMPERATURE)
        if name in ("plain", "packed"):
            trainer.model.double()
        made[name] = inject(trainer, same_each_time=True)
    return made


@pytest.fixture
def use(trainers, monkeypatch):
    """Give every trainer these functions as options, with all other options unchanged."""

    def choose(options=(), **functions):
        for trainer in trainers.values():
            values = {f"perception_{kind}": f"{OWN}:{name}" for kind, name in functions.items()} | dict(options)
            for name, value in values.items():
                monkeypatch.setattr(trainer.args, name, value)
            register_own(vars(trainer.args))
        return trainers

    return choose


def detected(trainer):
    """The dependency scores and perception tokens of the gated-in rollouts, with their indices."""
    (inputs,) = cut(trainer, generation_batch(trainer, ROWS), 1)
    request = ViewRequest.of(inputs, trainer.args.scored_views)
    rollouts = Rollouts.of(inputs, trainer._packs(inputs))
    return detect_tokens(trainer._scorer(), trainer.model, rollouts, request), request.rollouts


def loss_and_gradient(trainer):
    (inputs,) = cut(trainer, generation_batch(trainer, ROWS), 1)
    trainer._score_before_updates([inputs])
    loss = trainer._compute_loss(trainer.model, inputs)
    weights = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return loss.item(), torch.cat([one.flatten().double() for one in gradients if one is not None])


@pytest.fixture(scope="module")
def reference(trainers, processor):
    """Each need of one rollout and view at a time: log-probabilities, entropies, divergences."""
    trainer = trainers["plain"]
    return reference_rollouts(trainer.model, processor, ROWS, trainer.args.seed)


def test_scores_are_the_references(use, reference):
    """By their formula, written once more over the loops of the reference."""
    expected = {
        "lost": lambda r: [
            fall + 0.1 * (after - before)
            for fall, after, before in zip(r.scores["logp_shift"], r.entropies[2], r.entropies[0], strict=True)
        ],
        "both": lambda r: [a + 2 * b for a, b in zip(r.scores["kl"], r.scores["js"], strict=True)],
    }
    for name, formula in expected.items():
        for trainer in [use(score=name)[one] for one in ("plain", "packed")]:
            found, rows = detected(trainer)
            assert len(rows) > 2
            for row, values in zip(rows, found.score.tolist(), strict=True):
                wanted = formula(reference[row])
                assert values[: len(wanted)] == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("score", ["lost", "both", "variation", "moved"])
def test_scores_agree_on_every_path(use, score):
    trainers = use(score=score)
    found = {name: detected(trainer)[0] for name, trainer in trainers.items()}
    plain = found["plain"]
    mask = plain.response_mask.bool()
    assert plain.score[mask].std() > 1e-3
    for name, tolerance in (("packed", 1e-9), ("packed32", 1e-4), ("kernel", 1e-4)):
        difference = (found[name].score.double() - plain.score)[mask].abs().max()
        assert difference <= tolerance * plain.score[mask].abs().max(), name
        assert torch.equal(found[name].token_mask, plain.token_mask), name


def test_logits_come_a_few_tokens_at_a_time(use, monkeypatch):
    trainer, seen = use()["packed"], []
    vocabulary = trainer.model.get_output_embeddings().out_features

    def recorded(logits, removing):
        seen.append(len(logits))
        assert logits.shape == removing.shape == (len(logits), vocabulary)
        return (logits - removing).amax(dim=-1)

    monkeypatch.setitem(SCORES, "recorded", needs("logits")(recorded))
    monkeypatch.setattr(packed, "chunk_logits", lambda device: 5 * vocabulary)
    monkeypatch.setattr(trainer.args, "perception_score", "recorded")
    found, _ = detected(trainer)
    assert sum(seen) == found.response_mask.sum() > 10
    assert max(seen) <= 5


def test_hidden_states_are_what_the_head_is_given(trainers, processor):
    """The head turns them into the reference's logits."""
    model, row = trainers["plain"].model, ROWS[1]
    inputs = processor(
        text=["<|vision_start|><|image_pad|><|vision_end|>" * 2], images=[row["images"]], return_tensors="pt"
    )
    ids, mask, vision = inputs.pop("input_ids"), inputs.pop("attention_mask"), dict(inputs)
    scores = plain_scores(model, ids, mask, 2, TEMPERATURE, vision, hidden_states=True)
    assert scores.hidden_states.shape == (1, 2, model.config.text_config.hidden_size)
    assert torch.equal(model.get_output_embeddings()(scores.hidden_states) / TEMPERATURE, scores.logits)


@pytest.mark.parametrize(
    "functions",
    [
        {"selector": "above_half"},
        {"selector": "lottery"},
        {"sink": "hinge"},
        {"sink": "near", "score": "both"},
        {"score": "moved", "selector": "above_half", "sink": "hinge"},
        {"sink": "softened"},
        {"sink": "moved_most", "score": "variation"},
    ],
    ids=lambda functions: "-".join(functions.values()),
)
def test_losses_and_gradients_agree_on_every_path(use, functions):
    shapes = functions.get("sink") in ("softened", "moved_most")
    options = {
        "perception_weight": 1.0,
        "perception_temperature": 1.0,
        "perception_gate": "none" if shapes else "advantage",
    }
    trainers = use(options, **functions)
    loss, gradient = loss_and_gradient(trainers["plain"])
    for name, tolerance in (("packed", 1e-6), ("packed32", 1e-4), ("kernel", 1e-4)):
        other_loss, other_gradient = loss_and_gradient(trainers[name])
        assert other_loss == pytest.approx(loss, abs=1e-7 if name == "packed" else 1e-5), name
        assert (other_gradient - gradient).norm() <= tolerance * gradient.norm(), name
    without = use({"perception_sink": "none"})["plain"]
    assert abs(loss_and_gradient(without)[0] - loss) > 1e-3


def test_a_term_written_again_is_the_published_one(use, tmp_path):
    """The contrast and VPPO's shaping, written as own functions, give the same bytes as the packaged ones."""
    again = tmp_path / "again.py"
    again.write_text(
        "import torch\nfrom cppo.perception import *\n"
        "def contrast(scores, options):\n"
        "    margin = scores.d_preserving - scores.d_removing\n"
        "    return torch.nn.functional.softplus(margin / options.perception_temperature)\n"
        "@advantage_shaping\n@needs('rollout_weights')\n"
        "def masked(scores, advantages, options):\n"
        "    return torch.where(scores.token_mask, advantages[:, None], 0.0)\n"
    )
    for packaged, name, gate in (("contrast", "contrast", "advantage"), ("mask_advantage", "masked", "none")):
        found = []
        for sink in (packaged, f"{again}:{name}"):
            found.append(loss_and_gradient(use({"perception_sink": sink, "perception_gate": gate})["packed"]))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
        assert torch.allclose(found[0][1], found[1][1], rtol=1e-9, atol=1e-12)


def test_what_fails_in_the_run_is_one_line_too(trainers, use, tmp_path):
    late = tmp_path / "late.py"
    late.write_text("def late(anchor, removing):\n    return anchor.logps if len(anchor.logps) == 4 else 1 / 0\n")
    use({"perception_score": f"{late}:late"})
    with pytest.raises(UserError, match=r"late.py:late' failed in late.py line 2: ZeroDivisionError"):
        detected(trainers["packed"])


@pytest.mark.parametrize(
    ("score", "selector", "sink"),
    [
        ("sandwiched", "top", "contrast"),
        ("near", "uncertain", "divergence"),
        ("near", "all", "kept"),
        ("near", "top", "mask_advantage"),
    ],
)
def test_what_functions_declare_comes_on_every_path(use, score, selector, sink):
    """Views, similarities, the response mask, entropies, options, advantages, and a mean over all tokens."""
    names = {"perception_score": score, "perception_selector": selector, "perception_sink": sink}
    own = ("sandwiched", "near", "uncertain", "kept")
    options = {option: f"{FAMILY}:{name}" if name in own else name for option, name in names.items()}
    options |= {"perception_weight": 1.0, "perception_gate": "none", "perception_selector_scope": "batch"}
    trainers = use({**options, "perception_band": [1.0, 2.0]})
    loss, gradient = loss_and_gradient(trainers["plain"])
    for name, tolerance in (("packed", 1e-6), ("packed32", 2e-4), ("kernel", 2e-4)):
        other_loss, other_gradient = loss_and_gradient(trainers[name])
        assert other_loss == pytest.approx(loss, abs=1e-7 if name == "packed" else 2e-5), name
        assert (other_gradient - gradient).norm() <= tolerance * gradient.norm(), name
    if sink == "kept":
        (inputs,) = cut(trainers["plain"], generation_batch(trainers["plain"], ROWS), 1)
        assert not any(inputs["perception_views"])


def config(tmp_path, **given):
    return CPPOConfig(str(tmp_path), use_cpu=True, bf16=False, **given)


@pytest.mark.parametrize(
    ("option", "name", "words"),
    [
        ("score", "gone.py:f", "perception_score 'gone.py:f': there is no file gone.py"),
        ("sink", "nothing_like_this.views:f", "there is no module nothing_like_this"),
        ("score", "own.py:", "write module:function or file.py:function"),
        ("score", "own.py:gone", "own.py has no gone"),
        ("score", "own.py:LIMIT", "is of type int, not a function"),
        ("score", "own.py:alone", "failed: TypeError: alone() takes 1 positional argument"),
        ("score", "own.py:alone", "a score is called as function(anchor, removing)"),
        (
            "score",
            "own.py:flat",
            "must return a floating-point tensor of shape (4, 6), one value per token; it returned",
        ),
        ("score", "own.py:counted", "it returned int64 values of shape (4, 6)"),
        ("score", "own.py:listed", "it returned a list"),
        ("score", "own.py:undefined", "not finite for ordinary scores: avoid 0 / 0 and log 0"),
        ("score", "own.py:undeclared", "failed in own.py line 82: AttributeError: 'NoneType'"),
        (
            "score",
            "own.py:unknown_need",
            "needs attention, which a score does not get; it may need all_layers, hidden",
        ),
        ("score", "own.py:drawn", "returns other values for the same tensors"),
        (
            "score",
            "own.py:clamped",
            "which the loss needs as it is: change a clone()",
        ),
        ("selector", "own.py:filled", "changes a tensor that it is given"),
        ("score", "own.py:leaves", "failed in own.py line 95: SystemExit: 3"),
        ("selector", "own.py:everything", "selects tokens outside response_mask: return its selection & response_mask"),
        ("selector", "own.py:padded", "depends on values outside the response, which may be anything"),
        ("selector", "own.py:undrawn", "declare needs('draws')"),
        ("score", "own.py:three", "with needs('logits') a score is called as function(logits, removing_logits)"),
        ("score", "own.py:logits_and_js", "needs('logits') comes alone: compute js from the logits, or drop logits"),
        ("score", "own.py:undeclared_logits", "declare needs('logits')"),
        ("score", "own.py:undeclared_kl", "KeyError: 'kl'; declare needs('kl')"),
        ("score", "own.py:undeclared_mask", "declare needs('response_mask')"),
        ("score", "own.py:undeclared_layer", "declare needs('last_layer')"),
        ("score", "own.py:mistaken", "with the inputs that it declares by needs(...)"),
        ("sink", "own.py:undeclared_advantages", "declare needs('advantages')"),
        ("selector", "own.py:weights", "must return a bool tensor of shape (4, 6)"),
        ("selector", "own.py:narrow", "unexpected keyword argument"),
        ("sink", "own.py:constant", "has no gradient, so it trains nothing"),
        ("sink", "own.py:steep", "has a gradient that is not finite"),
        ("sink", "own.py:a_rollout", "perception_gate = 'advantage' would leave the advantages of the other"),
        ("score", "entropy_shft", "did you mean `entropy_shift`? choose one of"),
        ("selector", "best", "or give file.py:function"),
    ],
)
def test_mistakes_are_found_before_a_run(tmp_path, monkeypatch, option, name, words):
    monkeypatch.chdir(OWN.parent)
    with pytest.raises(UserError) as caught:
        config(tmp_path, **{f"perception_{option}": name})
    assert words in str(caught.value)
    assert f"perception_{option}" in str(caught.value) or option == "sink"
    assert "\n" not in str(caught.value)


def test_a_function_in_place_of_its_name(tmp_path):
    for option, value in (("perception_score", cut), ("removing_views", [cut])):
        with pytest.raises(UserError, match=f"{option}: expected .*; name a function as text: file.py:function$"):
            config(tmp_path, **{option: value})


def test_a_shaping_of_another_shape(tmp_path):
    with pytest.raises(UserError, match=r"must return a floating-point tensor of shape \(4, 6\)"):
        config(tmp_path, perception_sink=f"{OWN}:a_rollout", perception_gate="none")


def test_views_scored_by_the_rollouts_policy_are_not_enough_for_all(tmp_path):
    given = {"method": "papo", "perception_selector": "top", "perception_removing_entropy_weight": 0.0}
    given["perception_normalization"] = "rollout"
    config(tmp_path, **given, perception_score=f"{OWN}:lost")
    with pytest.raises(UserError, match="keeps only log-probabilities and entropies, but js, kl is needed"):
        config(tmp_path, **given, perception_score=f"{OWN}:both")


def test_names_resolve_to_functions(tmp_path):
    """A sink declares its kind itself; a registered name needs no file."""
    config(tmp_path, perception_sink=f"{OWN}:hinge", perception_score=f"{OWN}:lost")
    shaping = config(tmp_path, perception_sink=f"{OWN}:softened", perception_gate="none")
    assert f"{OWN}:hinge" in TERMS
    assert f"{OWN}:softened" in SHAPINGS
    assert f"{OWN}:lost" in SCORES
    assert (shaping.uses_perception, shaping.adds_perception_loss, shaping.scored_views) == (True, False, ("removing",))
    assert config(tmp_path, perception_sink=f"{OWN}:hinge").adds_perception_loss


def test_a_file_runs_once_for_all_its_functions(tmp_path, monkeypatch):
    """Score, selector, view and reward share its state, also where one is named by another path."""
    file = tmp_path / "shared.py"
    file.write_text(
        "with open('runs', 'a') as runs:\n    runs.write('.')\n"
        "def score(anchor, removing):\n    return anchor.logps - removing.logps\n"
        "def selector(score, response_mask, top_fraction, **_):\n    return response_mask & (score > 0)\n"
        "def view(image, rng):\n    return image\n"
        "def reward(completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    own = {f"perception_{name}": f"{file}:{name}" for name in ("score", "selector")}
    config(tmp_path, **own, removing_views=["shared.py:view"])
    named_rewards(["shared.py:reward"])
    assert (tmp_path / "runs").read_text() == "."
    text = file.read_text()
    file.write_text(f"{text}# changed\n")
    os.utime(file, ns=(0, 0))  # a clock may be too coarse to show the change
    named_rewards(["shared.py:reward"])
    assert (tmp_path / "runs").read_text() == ".."
    other = tmp_path / "other"
    other.mkdir()
    (other / "shared.py").write_text(text)
    ours, theirs = named_rewards(["shared.py:reward", "other/shared.py:reward"])
    assert ours.__module__ != theirs.__module__, "files of one name hide each other"


def test_a_missing_file_is_found_before_torch_is_imported(tmp_path):
    program = "import sys; from cppo.cli.main import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    argv = [sys.executable, "-c", program, "train", "--perception_selector", "gone.py:mine"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "2 False\n"
    elsewhere = "; run from the folder where it lies, such as the training folder\n"
    assert done.stderr == "cppo: error: perception_selector 'gone.py:mine': there is no file gone.py" + elsewhere


def test_a_view_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"is declared under\('left',\): give 'removing' or 'preserving'"):
        config(tmp_path, perception_score=f"{FAMILY}:strange")
