"""Methods that bring rewards: the trainer's use of them, and three steps of each."""

import re
from pathlib import Path

import pytest
from rollout_stubs import inject, make_rows, step_logs, token_reward

from cppo.methods import METHODS
from cppo.rewards import load_reward
from cppo.rewards.spec import parse_reward

PAGE = Path(__file__).parents[2] / "docs" / "train" / "rewards.md"
SEE = "description?opening=see&closing=.&max_tokens=6"


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.rewards])
def test_three_steps(make_trainer, method):
    """The texts are drawn, so only the test's own reward, beside the method's, earns anything."""
    rows = [{**row, "facts": ["a dot", "two dots"]} for row in make_rows([1, 0, 2, 1])]
    trainer = inject(make_trainer(rows, reward_funcs=["method", token_reward], method=method, max_steps=3))
    before = next(trainer.model.parameters()).clone()
    trainer.train()
    rewards = METHODS[method].rewards
    assert trainer.reward_weights.tolist() == pytest.approx([*rewards.values(), 1.0])
    assert trainer.reward_func_names[:-1] == [load_reward(parse_reward(name)).__name__ for name in rewards]
    assert len(step_logs(trainer)) == 3
    assert not next(trainer.model.parameters()).equal(before)


def test_a_description_is_asked_about_in_training(make_trainer, monkeypatch):
    """The rollouts repeat the micro VLM's; the tiny model's answers are wrong and have reward 0."""
    trainer = make_trainer(make_rows([1, 1]), reward_funcs=[SEE, token_reward], method="grpo", max_steps=3)
    says = trainer.processing_class.tokenizer("see 3 and 5.", add_special_tokens=False)["input_ids"]
    sample = trainer._generate_single_turn

    def generate(prompt_ids, *rest):
        if trainer._generating is None:
            return sample(prompt_ids, *rest)
        return [[*says, 9 + place] for place in range(len(prompt_ids))], None

    monkeypatch.setattr(trainer, "_generate_single_turn", generate)
    trainer.train()
    for log in step_logs(trainer):
        assert log["asking/questions"] == 8
        assert 1 <= log["asking/mean_length"] <= 6
        assert log["rewards/description_reward/mean"] == 0
    asked = trainer.processing_class.decode(trainer.asked["description_reward"].prompts[0])
    assert "Description: 3 and 5" in asked
    assert "<|image_pad|>" not in asked


def test_missing_rewards_of_the_method_are_reported(make_trainer, caplog):
    trainer = make_trainer(make_rows([1, 1]), method="vision-sr1")
    assert trainer.reward_func_names == ["token_reward"]
    assert (
        "rewards of the method vision-sr1 are not used: accuracy, format?before=description, description;"
        in caplog.text
    )
    caplog.clear()
    whole = make_trainer(make_rows([1, 1]), reward_funcs=None, method="vision-sr1", folder="whole")
    assert whole.reward_func_names == ["accuracy_reward", "format_reward", "description_reward"]
    assert whole.reward_weights.tolist() == pytest.approx([0.9, 0.1, 1.0])
    weighed = make_trainer(
        make_rows([1, 1]), reward_funcs=None, method="vision-sr1", reward_weights=[1, 2, 3], folder="weighed"
    )
    assert weighed.reward_weights.tolist() == [1, 2, 3]
    assert "not used" not in caplog.text


def test_the_class_that_the_page_shows_asks(make_trainer, tmp_path, monkeypatch):
    (code,) = [
        found for found in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "PolicyReward" in found
    ]
    monkeypatch.chdir(tmp_path)
    Path("looks_again.py").write_text(code)
    trainer = inject(make_trainer(make_rows([1, 2]), reward_funcs=["looks_again.py:LooksAgain?"], method="grpo"))
    trainer.train()
    (log,) = step_logs(trainer)
    assert log["asking/questions"] == 8
    prompts = trainer.asked["LooksAgain"].prompts
    assert all(trainer.model.config.image_token_id in prompt for prompt in prompts.values())
