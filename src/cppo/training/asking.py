"""The current policy answers the questions of rewards, generated like the trainer's rollouts.

Generation uses transformers' `generate` or vLLM, with the run's sampling options except those that the reward sets.
Image tokens stay banned, and prefills are not shared. Under vLLM one seed serves all requests of a call, so equal
questions get equal answers. Tested on the CPU, in one process and two (DDP and FSDP2), and with a stand-in for vLLM;
not run on a GPU.
"""

import copy
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from trl import prepare_multimodal_messages

from cppo.rewards import Question, Sampling
from cppo.rewards.asking import Prompt
from cppo.training.checkpoint import ResumableGRPOTrainer
from cppo.training.rollouts import GenerationBatch
from cppo.trl_surface import generation_batches, log_metric

FILLER = "?"
"""Question of processes with fewer questions than another: all must generate as often and with as many rows."""
ASKS = 1 << 30
"""Part of a random stream's key; it differs from the keys of rollouts and tokens."""


@dataclass(frozen=True)
class Answers:
    """The policy's answers to a reward's questions, without those it could not answer.

    Attributes:
        prompts, answers: token ids; an answer ends with its end token unless it is cut off.
        logps: of the answers' tokens, in nats, where vLLM sampled them.
        texts: the answers' texts.
    """

    prompts: dict[int, list[int]] = field(default_factory=dict)
    answers: dict[int, list[int]] = field(default_factory=dict)
    logps: dict[int, list[float]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)


class AskingTrainer(ResumableGRPOTrainer):
    """The part of `CPPOTrainer` that answers rewards; the trainer sets its attributes.

    Attributes:
        asked: the latest answers by the name of the reward.
    """

    asked: dict[str, Answers]
    _generating: GenerationBatch | None
    _placeholder_ids: list[int]
    _asks: int

    def ask_policy(self, name: str, questions: Sequence[Question | None], sampling: Sampling) -> list[str | None]:
        """The texts of the answers to a reward's questions; all processes must ask together.

        A question too long for vLLM's context gets no answer. The metric `asking/too_long` counts such questions.
        """
        own = [question for question in questions if question is not None]
        asked = self._filled_up(own)
        found = Answers()
        self.asked[name] = found
        self._asks += 1
        if not asked:
            return [None] * len(questions)
        started = time.perf_counter()
        with self._asking(sampling):
            prompts, answers, logps, fits = self._answer(asked, sampling)
        seconds = time.perf_counter() - started
        texts = self.processing_class.batch_decode(answers, skip_special_tokens=True)
        places = [place for place, question in enumerate(questions) if question is not None]
        for index, place in enumerate(places):
            if fits[index]:
                found.prompts[place], found.answers[place] = prompts[index], answers[index]
                found.texts[place] = texts[index]
                if logps is not None:
                    found.logps[place] = logps[index]
        if self.model.training:
            tokens = sum(len(answer) for answer in answers[: len(own)])
            self._log_answers(seconds, len(own), len(own) - sum(fits[: len(own)]), tokens)
        return [found.texts.get(place) for place in range(len(questions))]

    def _filled_up(self, own: list[Question]) -> list[Question]:
        """This process's questions, with fillers up to the longest list of any process; one has an image if needed."""
        has_images = any(question.images for question in own)
        counts = torch.tensor([[len(own), has_images]], device=self.accelerator.device)
        numbers, with_images = self.accelerator.gather(counts).T.tolist()
        shows = any(with_images)
        size = max(
            number + (number > 0 and shows and not has) for number, has in zip(numbers, with_images, strict=True)
        )
        as_text = bool(own) and isinstance(own[0].prompt, str)
        filler = Question(FILLER if as_text else [{"role": "user", "content": FILLER}])
        if shows and not as_text:
            filler = replace(filler, images=[Image.new("RGB", (56, 56), "grey")])
        return own + [filler] * (size - len(own))

    def _answer(
        self, asked: Sequence[Question], sampling: Sampling
    ) -> tuple[list[list[int]], list[list[int]], list[list[float]] | None, list[bool]]:
        """Prompts, answers and log-probabilities of questions, and whether each fits into vLLM's context."""
        ids, images, fields = self._tokenize_prompts([self._messages(question) for question in asked])
        limit = self.args.vllm_max_model_length if self.use_vllm else None
        fits = [limit is None or len(prompt) + sampling.max_tokens <= limit for prompt in ids]
        if not all(fits):  # a filler of one token replaces it, to keep the number of rows
            ids = [prompt if fit else prompt[:1] for prompt, fit in zip(ids, fits, strict=True)]
            images = images and [own if fit else None for own, fit in zip(images, fits, strict=True)]
        answers, logps = self._generate_single_turn(ids, images, fields, 1)
        return ids, [list(answer) for answer in answers], logps, fits

    def _messages(self, question: Question) -> Prompt:
        """The question as the trainer tokenizes it, without special tokens in its text."""
        if isinstance(question.prompt, str):
            return self._plain(question.prompt)
        messages = prepare_multimodal_messages(copy.deepcopy(question.prompt), images=list(question.images))
        for message in messages:
            for part in message["content"]:
                if part["type"] == "text":
                    part["text"] = self._plain(str(part["text"]))
        return messages

    def _plain(self, text: str) -> str:
        """A text with a space in place of each special token, because a response may contain their names."""
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= {*tokenizer.all_special_tokens, *tokenizer.convert_ids_to_tokens(self._placeholder_ids)}
        named = sorted(filter(None, special), key=len, reverse=True)
        return re.sub("|".join(map(re.escape, named)), " ", text) if named else text

    @contextmanager
    def _asking(self, sampling: Sampling) -> Iterator[None]:
        """Context: the model evaluates, with the sampling options and the random stream of a reward."""
        modes = {module: module.training for module in self.model.modules()}
        rollouts, self._generating = self._generating, None
        seed = self._stream(sampling)
        device = self.accelerator.device
        forked = [] if device.type == "cpu" else [device]
        try:
            self.model.eval()
            with (
                torch.random.fork_rng(forked, device_type="cuda" if device.type == "cpu" else device.type),
                _sampling_of(self, sampling, seed),
            ):
                torch.default_generator.manual_seed(seed)
                if forked:
                    torch.get_device_module(device).manual_seed(seed)
                yield
        finally:
            self._generating = rollouts
            for module, training in modes.items():
                module.training = training

    def _stream(self, sampling: Sampling) -> int:
        """The seed of the current questions, the same in a resumed run; 31 bits, as vLLM needs."""
        key = (
            self.args.seed,
            sampling.seed,
            generation_batches(self),
            self.accelerator.process_index,
            ASKS + self._asks,
            int(self.model.training),
        )
        return int(np.random.SeedSequence(key).generate_state(1).item() >> 1)

    def _log_answers(self, seconds: float, questions: int, too_long: int, tokens: int) -> None:
        """Log the seconds of the slowest process, and the number of questions of all."""
        own = torch.tensor([[seconds, questions, too_long, tokens]], device=self.accelerator.device)
        found = self.accelerator.gather(own)
        log_metric(self, "asking/seconds", found[:, 0].max().item())
        asked, left_out, length = found[:, 1:].sum(dim=0).tolist()
        log_metric(self, "asking/questions", asked)
        log_metric(self, "asking/too_long", left_out)
        log_metric(self, "asking/mean_length", length / asked)


@contextmanager
def _sampling_of(trainer: Any, sampling: Sampling, seed: int) -> Iterator[None]:
    """Context: the trainer generates with these options instead of the run's."""
    greedy = sampling.temperature == 0
    own = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    given = {name: value for name, value in own.items() if value is not None}
    if trainer.use_vllm:
        engine = trainer.vllm_generation
        # The run's options would override the engine's attributes.
        others = {name: one for name, one in engine.generation_kwargs.items() if name not in ("max_tokens", *given)}
        others["seed"] = seed
        with changed(engine, {**given, "max_completion_length": sampling.max_tokens, "generation_kwargs": others}):
            yield
        return
    if greedy:
        given = {"do_sample": False}
    given["max_new_tokens"] = sampling.max_tokens
    config = copy.deepcopy(trainer.generation_config)
    for name, value in given.items():
        setattr(config, name, value)
    with changed(trainer, {"generation_config": config, "generation_kwargs": {**trainer.generation_kwargs, **given}}):
        yield


@contextmanager
def changed(target: Any, values: dict[str, Any]) -> Iterator[None]:
    """Context: an object's attributes have these values."""
    own = {name: getattr(target, name) for name in values}
    vars(target).update(values)
    try:
        yield
    finally:
        vars(target).update(own)
