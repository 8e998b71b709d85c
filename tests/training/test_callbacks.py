"""TRL's calls back into the trainer: a second, permuted or foreign call gets the right answer or an error."""

import pytest
import torch
from rollout_stubs import cut, generation_batch, inject, make_rows, parity_reward, picture
from trl import GRPOTrainer

from cppo.policy.vision_inputs import VISION_KEYS


@pytest.fixture(params=["shared", "kernel"])
def trainer(make_trainer, request):
    options = {"beta": 0.01, "num_iterations": 2, "scorer": request.param, "reward_funcs": parity_reward}
    return inject(make_trainer(make_rows([1, 1]), perception_gate="none", **options), same_each_time=True)


def scores_in_loss(trainer, monkeypatch, ask):
    """What `ask(scores of rows, ids, mask, T)` returns while TRL computes the loss of a micro-batch."""
    (inputs,) = cut(trainer, generation_batch(trainer, make_rows([1, 1])), 1)
    found = []

    def loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        length = inputs["completion_ids"].shape[1]
        vision = {key: inputs.get(key) for key in VISION_KEYS}

        def scores(ids, mask):
            return self._get_per_token_logps_and_entropies(model, ids, mask, length, **vision)[0]

        found.append(ask(scores, ids, mask))
        return scores(ids, mask).sum()

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", loss)
    trainer._compute_loss(trainer.model, inputs)
    return found[0]


def test_a_second_call_for_the_micro_batch_gets_the_same_scores(trainer, monkeypatch):
    one, other = scores_in_loss(trainer, monkeypatch, lambda scores, *rows: (scores(*rows), scores(*rows)))
    assert torch.equal(one, other)
    assert one.requires_grad


@pytest.mark.parametrize("change", ["permuted", "foreign"])
def test_other_rows_than_the_micro_batchs_are_an_error(trainer, monkeypatch, change):
    def ask(scores, ids, mask):
        if change == "permuted":
            return scores(ids.flip(0), mask.flip(0))
        return scores(torch.where(mask.bool(), ids.clamp(max=9), ids), mask)

    with pytest.raises(RuntimeError, match="scores of other rows"):
        scores_in_loss(trainer, monkeypatch, ask)


def test_scores_of_packed_rows_without_their_images_are_an_error(make_trainer):
    trainer = inject(make_trainer(make_rows([1, 1])))
    (inputs,) = cut(trainer, generation_batch(trainer, make_rows([1, 1])), 1)
    with pytest.raises(RuntimeError, match="without their images"):
        GRPOTrainer._compute_loss(trainer, trainer.model, inputs)


@pytest.mark.parametrize("order", ["as made", "permuted"])
def test_the_old_and_the_reference_policy_score_rows_in_any_order(make_trainer, monkeypatch, order):
    """The prompts are the same words about other images: sharing by index alone would mix them up in a permutation."""
    rows = [{**row, "prompt": make_rows([1])[0]["prompt"]} for row in make_rows([1, 1])]
    shared, plain = (
        inject(make_trainer(rows, beta=0.01, scorer=scorer, folder=scorer), same_each_time=True)
        for scorer in ("shared", "plain")
    )
    asked = {}

    def watched(self, model, ids, mask, length, batch_size=None, **more):
        asked.setdefault(self, (ids, mask, length, more))
        return original(self, model, ids, mask, length, batch_size, **more)

    original = type(shared)._get_per_token_logps_and_entropies
    found = {}

    def references(self, inputs, prompts, *rest):
        """Called by TRL after all scores are taken, still for this generation batch."""
        ids, mask, length, vision = asked[self]
        total = len(ids)
        places = torch.arange(total) if order == "as made" else torch.arange(total).view(2, -1).T.flatten()
        pixels = vision["pixel_values"].unflatten(0, (total, -1))[places].flatten(0, 1)
        more = {**vision, "pixel_values": pixels, "image_grid_thw": vision["image_grid_thw"][places]}
        if more.get("mm_token_type_ids") is not None:
            more["mm_token_type_ids"] = more["mm_token_type_ids"][places]
        scores, *_ = original(self, self.model, ids[places], mask[places], length, **more)
        found[self] = scores.masked_fill(~mask[places][:, -length:].bool(), 0.0)
        return rewards(self, inputs, prompts, *rest)

    rewards = type(shared)._calculate_rewards
    monkeypatch.setattr(type(shared), "_get_per_token_logps_and_entropies", watched)
    monkeypatch.setattr(type(shared), "_calculate_rewards", references)
    for trainer in (shared, plain):
        generation_batch(trainer, rows)
    torch.testing.assert_close(found[shared], found[plain], atol=1e-5, rtol=1e-5)


def test_rewards_of_other_responses_are_an_error(trainer, monkeypatch):
    original = type(trainer)._calculate_rewards

    def twice(self, inputs, prompts, completions, completion_ids):
        first = original(self, inputs, prompts, completions, completion_ids)
        assert torch.equal(original(self, inputs, prompts, completions, completion_ids), first)
        return original(self, inputs, prompts, completions, completion_ids[::-1])

    monkeypatch.setattr(type(trainer), "_calculate_rewards", twice)
    with pytest.raises(RuntimeError, match="rewards of other responses"):
        generation_batch(trainer, make_rows([1, 1]))


def test_images_show_their_views_whenever_they_are_asked_for(make_trainer):
    """Also twice and in another order: an image carries the view of its rollout."""
    rows = make_rows([1, 1])
    trainer = inject(make_trainer(rows, method="noisyrollout"))
    trainer.model.train()
    trainer.state.max_steps = 4
    batch = trainer._rollouts([row for row in rows for _ in range(4)], 0)
    mixed = trainer._rollout_views.mixed(batch, 4, 0, 0.1)
    prompts = [[{"role": "user", "content": [{"type": "image", "image": row["images"][0]}]}] for row in mixed]
    own = [prompt[0]["content"][0]["image"].tobytes() for prompt in prompts]
    first, second = (trainer._tokenize_prompts(prompts) for _ in range(2))
    turned = trainer._tokenize_prompts(prompts[::-1])
    pixels = [found[2]["pixel_values"].unflatten(0, (8, -1)) for found in (first, second, turned)]
    assert torch.equal(pixels[0], pixels[1])
    assert torch.equal(pixels[0], pixels[2].flip(0))
    assert not torch.equal(pixels[0][0], pixels[0][3])
    assert [images[0].tobytes() for images in first[1]] == own
    assert picture(0).tobytes() == own[0]
