"""The file of injected rollouts matches today's trainer; the tests of verl compare verl with the file.

`python tests/training/test_injected_rollouts.py` rewrites the file.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from rollout_stubs import build_trainer, cut, generation_batch
from transformers import AutoModelForImageTextToText, AutoProcessor

import cppo.perception
import cppo.training.trainer
from cppo.assets import MICRO_DIR
from cppo.tasks import TaskOptions, make_item
from cppo.training.micro_batch import Rollouts

sys.path.insert(0, str(Path(__file__).parents[1] / "verl"))
from injected import EPOCH, METHODS, SEED, TEMPERATURE, Found, Group, digest, read, write

SIZE = 4
"""Rollouts of a group."""
REWARDS = ([1.0, 0.1, 0.0, 1.0], [0.1, 1.0, 0.1, 0.0], [0.7] * SIZE, [1.0, 0.0, 0.0, 1.0])


def drawn_groups(tokenizer):
    """Four prompts: about one image, two images, one image with equal rewards, and one image."""
    rng = np.random.default_rng(0)
    items = [make_item("digits", TaskOptions(noise=40), seed=5, index=index, split="train") for index in range(5)]
    groups = []
    for place, (item, rewards) in enumerate(zip(items, REWARDS, strict=False)):
        images = [[item.image], [item.image, items[4].image], [item.image], [item.image]][place]
        texts = [item.response[: rng.integers(12, len(item.response))] for _ in range(SIZE - 1)] + [item.response]
        responses = [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in texts]
        groups.append(Group(item.prompt, images, item.id if place == 1 else None, responses, list(rewards)))
    return groups


def trainer_of(groups, method, model, processor, folder):
    """A trainer with generation replaced by the groups' responses, at the start of the second epoch."""
    rows = [
        {
            "prompt": [{"role": "user", "content": group.text}],
            "images": group.images,
            "sample_id": group.sample_id,
            "place": place,
        }
        for place, group in enumerate(groups)
    ]

    def injected(completions, place, **kwargs):
        seen = dict.fromkeys(place, 0)
        rewards = []
        for one in place:
            rewards.append(groups[one].rewards[seen[one]])
            seen[one] += 1
        return rewards

    trainer = build_trainer(
        model,
        folder,
        rows,
        processing_class=processor,
        reward_funcs=injected,
        method=method,
        num_generations=SIZE,
        per_device_train_batch_size=SIZE * len(groups),
        max_completion_length=128,
        max_steps=8,
        beta=0.0,
        seed=SEED,
        temperature=TEMPERATURE,
        **METHODS[method],
    )
    trainer.state.epoch = float(EPOCH)
    completions = [response.tolist() for group in groups for response in group.responses]
    trainer._generate_single_turn = lambda *args, **kwargs: (completions, None)
    return trainer, rows


def record(groups, method, model, processor, folder):
    """The trainer's results for the groups; fills in prompts, advantages and old log-probabilities."""
    trainer, rows = trainer_of(groups, method, model, processor, folder)
    begun = []
    begin = trainer._views.begin
    trainer._views.begin = lambda *args: begun.append(begin(*args)) or begun[-1]
    (inputs,) = cut(trainer, generation_batch(trainer, rows), 1)
    trainer._score_before_updates([inputs])
    packed = Rollouts.of(inputs, trainer._packs(inputs))
    terms = []

    def perception_loss(*arguments):
        terms.append(cppo.perception.perception_loss(*arguments))
        return terms[-1]

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cppo.training.trainer, "perception_loss", perception_loss)
        logps = trainer._scorer().score(trainer.model, packed).logps
        loss = trainer._compute_loss(trainer.model, inputs)
    ((term, _),) = terms
    lengths = [len(response) for group in groups for response in group.responses]
    for place, group in enumerate(groups):
        places = range(place * SIZE, place * SIZE + SIZE)
        group.prompt = inputs["prompt_ids"][places[0]][inputs["prompt_mask"][places[0]].bool()]
        group.advantages = inputs["advantages"][list(places)].tolist()
        group.old_logps = [logps[row, : lengths[row]].clone() for row in places]
    _, detected, (_, mask) = trainer._trained
    selected = [torch.zeros(length, dtype=torch.bool) for length in lengths]
    for row, chosen in zip(detected, mask, strict=True):
        selected[row] = chosen[: lengths[row]].clone()
    weights = inputs["perception_weights"].tolist()
    views = {}
    for place in range(len(groups)):
        if any(weights[place * SIZE : place * SIZE + SIZE]):
            pairs = [pair.result() for pair in begun[0].begun[place * SIZE]]
            views[str(place)] = [[digest(preserving), digest(removing)] for preserving, removing in pairs]
    return Found(float(term), float(loss), weights, selected, views)


def recorded(folder):
    """The groups, filled in, and the trainer's results by method."""
    model = AutoModelForImageTextToText.from_pretrained(MICRO_DIR)
    processor = AutoProcessor.from_pretrained(MICRO_DIR, padding_side="left")
    groups = drawn_groups(processor.tokenizer)
    return groups, {method: record(groups, method, model, processor, folder) for method in METHODS}


def test_the_file_holds_what_the_trainer_says(tmp_path):
    groups, found = recorded(tmp_path)
    groups_read, found_read = read()
    assert len(groups) == len(groups_read)
    for now, then in zip(groups, groups_read, strict=True):
        assert (now.text, now.sample_id, now.rewards) == (then.text, then.sample_id, then.rewards)
        assert [digest(image) for image in now.images] == [digest(image) for image in then.images]
        assert torch.equal(now.prompt, then.prompt)
        assert all(map(torch.equal, now.responses, then.responses))
        assert now.advantages == pytest.approx(then.advantages, abs=1e-6)
        for own, other in zip(now.old_logps, then.old_logps, strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-5)
    assert list(found) == list(found_read)
    for method, now in found.items():
        then = found_read[method]
        assert now.views == then.views, method
        assert now.weights == then.weights, method
        assert all(map(torch.equal, now.selected, then.selected)), method
        assert now.term == pytest.approx(then.term, abs=1e-6), method
        assert now.loss == pytest.approx(then.loss, abs=1e-6), method
        assert any(chosen.any() for chosen in now.selected)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write(*recorded(folder))
