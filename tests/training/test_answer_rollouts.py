"""Answers that are trained too: the gradient against float64, shares of the loss, and runs that resume."""

import pytest
import torch
from rollout_stubs import (
    build_trainer,
    cut,
    flat_weights,
    inject,
    make_rows,
    parity_reward,
    step_logs,
    token_reward,
)

from cppo.errors import UserError
from cppo.rewards import Question, Sampling
from cppo.training.answer_rollouts import AnswerTrainer, loss_factors

ANSWERS = {"trained_answers": "half_asked", "reward_weights": [1.0, 0.0], "method": "grpo"}


def half_asked(completion_ids, ask_policy, **kwargs):
    """Asks about every rollout except each group's first; an answer's reward is its last token."""
    questions = [
        Question([{"role": "user", "content": f"What is {sum(ids) % 9}?"}]) if place % 4 else None
        for place, ids in enumerate(completion_ids)
    ]
    answers = ask_policy(questions, Sampling(max_tokens=6))
    return [None if text is None else float(sum(map(ord, text)) % 7) for text in answers]


def generation(trainer, rows, parts=1):
    """The micro-batches of a generation batch with its answers, in order."""
    trainer.model.train()
    inputs = [row for row in rows for _ in range(trainer.num_generations)]
    rollouts = trainer._generate_and_score_completions(inputs)
    joined, units = trainer._with_answers(rollouts, rollouts["group_id"], trainer.args.trained_answers_weight)
    assert units == [group for group in rollouts["group_id"] for _ in range(2)]
    return cut(trainer, joined, parts)


@pytest.fixture(scope="module")
def rows():
    return make_rows([1, 0])


@pytest.fixture(scope="module")
def trainer_of(tiny, tmp_path_factory, rows):
    def make(**options):
        rewards = [token_reward, half_asked]
        trainer = build_trainer(tiny, tmp_path_factory.mktemp("run"), rows, reward_funcs=rewards, **ANSWERS, **options)
        trainer.model.double()
        return inject(trainer, same_each_time=True)

    return make


def scores(values):
    """Group z-scores over the known rewards, 0 for unknown ones."""
    known = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
    return [0.0 if value is None else ((value - known.mean()) / (known.std() + 1e-4)).item() for value in values]


def tokens(inputs, name):
    """The token ids of each row's prompt or completion."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(inputs[f"{name}_ids"], inputs[f"{name}_mask"], strict=True)]


def log_likelihood(trainer, row, prompt, response):
    """Log-probabilities of a response's tokens by one plain pass over it alone, image included."""
    inputs = {}
    if row["images"]:
        content = [{"type": "image", "image": image} for image in row["images"]]
        chat = [{"role": "user", "content": [*content, {"type": "text", "text": row["prompt"][0]["content"]}]}]
        inputs = dict(
            trainer.processing_class.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        )
    ids = torch.tensor([[*prompt, *response]])
    given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    types = (ids == trainer.model.config.image_token_id).int()
    logits = trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, **given).logits
    logps = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return logps.gather(1, ids[0, len(prompt) :, None]).squeeze(1)


@pytest.mark.parametrize("scorer", ["shared", "plain", "kernel"])
@pytest.mark.parametrize(("loss_type", "weight"), [("grpo", 0.5), ("grpo", 0.2), ("dapo", 0.5)])
def test_the_gradient_is_that_of_two_losses(trainer_of, rows, scorer, loss_type, weight):
    """w times the loss of the answers plus 1 - w times the loss of the rollouts, each with its own group z-scores."""
    trainer = trainer_of(scorer=scorer, loss_type=loss_type, trained_answers_weight=weight)
    (inputs,) = generation(trainer, rows)
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, inputs).backward()
    found = torch.cat(
        [parameter.grad.flatten() for parameter in trainer.model.parameters() if parameter.grad is not None]
    )

    asked = trainer.asked["half_asked"]
    assert sorted(asked.answers) == [1, 2, 3, 5, 6, 7]
    responses, prompts = ([*tokens(inputs, name)][::2] for name in ("completion", "prompt"))
    decode = trainer.processing_class.decode
    earned = [
        float(sum(map(ord, decode(asked.answers[place], skip_special_tokens=True))) % 7)
        if place in asked.answers
        else None
        for place in range(8)
    ]
    sets = [
        (token_reward(responses), prompts, responses, [rows[0]] * 4 + [rows[1]] * 4),
        (earned, asked.prompts, asked.answers, [{"images": []}] * 8),
    ]
    losses = []
    for rewards, questions, answers, shown in sets:
        advantages = scores(rewards[:4]) + scores(rewards[4:])
        total, length = torch.zeros((), dtype=torch.float64), 0
        for place, advantage in enumerate(advantages):
            if rewards[place] is not None:
                logps = log_likelihood(trainer, shown[place], questions[place], answers[place])
                total -= advantage * (logps.mean() if loss_type == "grpo" else logps.sum())
                length += len(logps)
        losses.append(total / (8 if loss_type == "grpo" else length))
    trainer.model.zero_grad()
    ((1 - weight) * losses[0] + weight * losses[1]).backward()
    expected = torch.cat(
        [parameter.grad.flatten() for parameter in trainer.model.parameters() if parameter.grad is not None]
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())
    assert min(abs(loss.item()) for loss in losses) > 1e-3


def test_each_micro_batch_has_as_many_of_both(trainer_of, rows):
    for inputs in generation(trainer_of(loss_type="grpo"), rows, parts=4):
        assert len(inputs["prompt_ids"]) == 4
        assert [place is None for place in inputs["rollout_place"]] == [False, True] * 2


def test_a_schedule_moves_the_share(make_trainer, monkeypatch):
    seen, own = [], AnswerTrainer._with_answers
    monkeypatch.setattr(AnswerTrainer, "_with_answers", lambda *given: (seen.append(given[-1]), own(*given))[1])
    run(make_trainer, schedules=["trained_answers_weight=linear:1:0.4"], save_strategy="no")
    assert seen == pytest.approx([0.5, 0.4, 0.3])


def test_shares_of_the_loss():
    assert loss_factors("grpo", 0.5, 70, 10) == (1.0, 1.0)
    assert loss_factors("dr_grpo", 0.25, 70, 10) == (1.5, 0.5)
    # 60 tokens and 20: over all 80 the answers have a quarter; half of the loss is twice that.
    assert loss_factors("dapo", 0.5, 60, 20) == pytest.approx((2 / 3, 2.0))
    assert loss_factors("bnpo", 0.25, 60, 20) == pytest.approx((1.0, 1.0))
    assert loss_factors("dapo", 0.5, 60, 0) == (1.0, 1.0)


def run(make_trainer, resume=None, folder="out", **options):
    trainer = make_trainer(
        make_rows([1, 0, 2, 1]),
        reward_funcs=[token_reward, half_asked],
        folder=folder,
        max_steps=3,
        **{"save_strategy": "steps", "save_steps": 1, **ANSWERS, **options},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "grpo", "num_iterations": 2, "beta": 0.1},
        {"steps_per_generation": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        {"method": "cppo", "scorer": "kernel"},
        {"method": "vppo", "num_iterations": 2},
    ],
)
def test_runs_resume(make_trainer, options):
    """With old log-probabilities, a reference and views: three steps, and the same bytes from a checkpoint."""
    whole = run(make_trainer, **options)
    again = run(make_trainer, resume=f"{whole.args.output_dir}/checkpoint-1", folder="again", **options)
    assert torch.equal(flat_weights(whole.model), flat_weights(again.model))
    logs = step_logs(whole)
    assert len(logs) == 3
    assert logs[0]["answers/reward"] > 0
    assert logs[0]["reward"] != logs[0]["answers/reward"]
    assert all(torch.isfinite(weight).all() for weight in whole.model.parameters())
    assert {sample["reward"] for sample in whole.last_samples} != {None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"trained_answers": "token_reward"},
            "trained_answers = 'token_reward' is not a reward that asks the policy; choose one of half_asked",
        ),
        ({"trained_answers": "half_ask"}, "did you mean `half_asked`"),
        ({"trained_answers_weight": 1.0}, r"trained_answers_weight: 1.0 is outside \(0, 1\)"),
        ({"rollout_func": object}, "leave out tools, environments and rollout_func"),
    ],
)
def test_what_cannot_be_trained(make_trainer, options, message):
    with pytest.raises(UserError, match=message):
        make_trainer(make_rows([1, 1]), reward_funcs=[token_reward, half_asked], **{**ANSWERS, **options})


def test_no_reward_asks(make_trainer):
    with pytest.raises(UserError, match="none of the rewards does so; description"):
        make_trainer(make_rows([1, 1]), reward_funcs=[token_reward, parity_reward], trained_answers="parity_reward")
