"""Views made ahead equal the sampler's, come from other threads, and are made only for gated-in prompts."""

import threading
import time
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from PIL import Image
from rollout_stubs import make_rows
from tiny_families import build_family, with_first_token
from transformers import AutoProcessor

from cppo.errors import UserError
from cppo.messages import replace_images
from cppo.policy.prompts import canonical_row, process_prompt, prompt_messages
from cppo.training.rollouts import GenerationBatch
from cppo.training.view_maker import ViewMaker
from cppo.views import ViewSampler

KINDS = ("removing", "preserving")


@dataclass(frozen=True)
class WatchedSampler(ViewSampler):
    """Records the thread and the row of every call, and waits for `gate`."""

    calls: list[tuple[str, str]] = field(default_factory=list)
    called: threading.Event = field(default_factory=threading.Event)
    gate: threading.Event = field(default_factory=threading.Event)

    def views(self, image, sample_id, epoch, image_index):
        self.calls.append((threading.current_thread().name, sample_id))
        self.called.set()
        assert self.gate.wait(30)
        return super().views(image, sample_id, epoch, image_index)


class FailingSampler(ViewSampler):
    def views(self, image, sample_id, epoch, image_index):
        raise UserError("no views today")


@pytest.fixture
def batch():
    """Three prompts with one image, two and one; two rollouts of each."""
    return GenerationBatch.of([row for row in make_rows([1, 2, 1]) for _ in range(2)], 0, 2, alone=False)


@pytest.fixture
def rows(batch):
    return batch.rows


@pytest.fixture
def process(processor):
    return partial(process_prompt, processor, tools=None, chat_template_kwargs={})


@pytest.fixture
def tokens(rows, processor):
    return [process_prompt(processor, prompt_messages(row), None, {}).token_ids for row in rows]


def test_views_made_ahead_equal_the_samplers_even_if_the_image_changes(batch, rows, tokens, process):
    expected = []
    for row in rows:
        pairs = [ViewSampler(3).views(image, row["sample_id"], 1, place) for place, image in enumerate(row["images"])]
        preserving, removing = (
            process(replace_images(prompt_messages(row), images)).vision for images in zip(*pairs, strict=True)
        )
        expected.append({"removing": removing, "preserving": preserving})
    sampler = WatchedSampler(3)
    begun = ViewMaker(sampler, 2, process).begin(batch, epoch=1)
    for row in rows:
        for image in row["images"]:
            image.paste("red", (0, 0, *image.size))
    sampler.gate.set()
    made = begun.inputs([True] * len(rows), tokens, KINDS)
    assert sorted(name for _, name in sampler.calls) == ["row-0", "row-1", "row-1", "row-2"]
    assert all(thread.startswith("cppo-views") for thread, _ in sampler.calls)
    for views, wanted in zip(made, expected, strict=True):
        for kind in KINDS:
            assert torch.equal(views[kind]["pixel_values"], wanted[kind]["pixel_values"])
            assert views[kind]["num_images"] == wanted[kind]["num_images"]
    assert made[0] is made[1]
    assert made[0] is not made[2]


def test_views_of_gated_out_prompts_that_wait_are_not_made(batch, tokens, process):
    sampler = WatchedSampler(3)
    begun = ViewMaker(sampler, 1, process).begin(batch, epoch=0)
    assert sampler.called.wait(30)  # the only thread waits at the gate with the first row
    waiting = begun.begun[2]

    def open_the_gate():
        while not all(pair.cancelled() for pair in waiting):
            time.sleep(0.01)
        sampler.gate.set()

    threading.Thread(target=open_the_gate, daemon=True).start()
    made = begun.inputs([False, False, False, False, True, False], tokens, ("removing",))
    assert [view is not None for view in made] == [False, False, False, False, True, False]
    assert [name for _, name in sampler.calls] == ["row-0", "row-2"]


def test_an_error_of_a_view_surfaces_where_it_is_needed(batch, rows, tokens, process):
    begun = ViewMaker(FailingSampler(3), 2, process).begin(batch, epoch=0)
    assert begun.inputs([False] * len(rows), tokens, KINDS) == [None] * len(rows)
    with pytest.raises(UserError, match="no views today"):
        ViewMaker(FailingSampler(3), 2, process).begin(batch, epoch=0).inputs([True] * 6, tokens, KINDS)


@pytest.mark.parametrize("family", ["gemma3", "idefics3"])
def test_a_first_token_of_the_template_appears_once(family, tmp_path):
    """As in the anchor, which TRL tokenizes by `apply_chat_template`."""
    processor = with_first_token(AutoProcessor.from_pretrained(build_family(family, tmp_path)))
    messages = prompt_messages(canonical_row(make_rows([1])[0]))
    anchor = processor.apply_chat_template([messages], tokenize=True, return_dict=True, add_generation_prompt=True)
    assert anchor["input_ids"][0].count(processor.tokenizer.pad_token_id) == 1
    assert process_prompt(processor, messages, None, {}).token_ids == anchor["input_ids"][0]


def test_views_are_drawn_for_each_rollout_or_once(process, processor):
    """Rollouts' own views depend on their number in the group, not on the process; single draws on no epoch."""
    rows = [row for row in make_rows([1, 2]) for _ in range(4)]

    def pixels(draws, epoch=0, first=0, rows=rows):
        batch = GenerationBatch.of(rows, first, 4, alone=False)
        tokens = [process_prompt(processor, prompt_messages(row), None, {}).token_ids for row in batch.rows]
        begun = ViewMaker(ViewSampler(3), 2, process, draws).begin(batch, epoch)
        made = begun.inputs([True] * len(rows), tokens, ("removing",))
        return [own["removing"]["pixel_values"].numpy().tobytes() for own in made]

    for draws, distinct in (("epoch", 2), ("once", 2), ("rollout", 8)):
        assert len(set(pixels(draws))) == distinct
        assert (pixels(draws, epoch=1) == pixels(draws)) == (draws == "once")
    # A second process may begin with a whole group, or in the middle of one.
    assert pixels("rollout", first=8) == pixels("rollout")
    assert pixels("rollout", first=2, rows=rows[2:]) == pixels("rollout")[2:]
    assert pixels("rollout", first=1, rows=rows[1:2]) == pixels("rollout")[1:2]


def test_the_threads_end_with_the_maker(batch, rows, tokens, process):
    already = set(threading.enumerate())
    maker = ViewMaker(ViewSampler(3), 2, process)
    maker.begin(batch, epoch=0).inputs([True] * len(rows), tokens, KINDS)
    threads = set(threading.enumerate()) - already
    assert threads
    del maker
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_large_images_are_changed_one_at_a_time(process):
    """Views of an image take tens of bytes per pixel, so threads share a limit on their pixels."""
    at_work, peak = [], []

    class Sampler:
        seed = 0

        def at(self, progress):
            return self

        def views(self, image, *key):
            at_work.append(image)
            peak.append(len(at_work))
            time.sleep(0.02)
            at_work.pop()
            return image, image

    maker = ViewMaker(Sampler(), 4, process)
    for side, alone in ((4000, True), (100, False)):
        peak.clear()
        image, prompt = Image.new("L", (side, side)), [{"role": "user", "content": "q"}]
        rows = [{"prompt": [*prompt], "images": [image], "sample_id": str(number)} for number in range(6)]
        begun = maker.begin(GenerationBatch.of(rows, 0, 1, alone=False), 0).begun
        assert [len(pair.result()) for pairs in begun.values() for pair in pairs] == [2] * 6
        assert (max(peak) == 1) == alone
