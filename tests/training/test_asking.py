"""Rewards that ask the current policy: answers, their random numbers, the model's state, vLLM, and a resumed run."""

from types import SimpleNamespace

import pytest
import torch
from rollout_stubs import flat_weights, inject, make_rows, picture, step_logs, token_reward

from cppo.errors import UserError
from cppo.rewards import PolicyReward, Question, Sampling

GREEDY = Sampling(max_tokens=5, temperature=0)


class Asks(PolicyReward):
    """Asks about every completion except those with a text in `silent`; a longer answer earns more."""

    def __init__(self, sampling=GREEDY, every=1):
        self.sampling, self.every = sampling, every
        self.seen = []

    def questions(self, completions, columns):
        return [
            Question([{"role": "user", "content": f"What is {place}?"}]) if place % self.every == 0 else None
            for place in range(len(completions))
        ]

    def rewards(self, answers, completions, columns):
        self.seen.append(list(answers))
        return [None if answer is None else float(len(answer)) for answer in answers]


@pytest.fixture
def trainer(make_trainer):
    trainer = make_trainer(make_rows([1, 0, 2, 1]), reward_funcs=[token_reward, Asks()], method="grpo")
    trainer.model.train()
    return trainer


def ask(trainer, questions, sampling=GREEDY):
    trainer._asks = 0
    return trainer.ask_policy("asks", questions, sampling)


def text(content, **images):
    return Question([{"role": "user", "content": content}], **images)


@torch.no_grad()
def greedy_answer(trainer, question, length):
    """The most likely tokens one by one, from full forward passes without a cache."""
    content = [{"type": "image", "image": image} for image in question.images]
    chat = [{"role": "user", "content": [*content, {"type": "text", "text": question.prompt[0]["content"]}]}]
    processor = trainer.processing_class
    inputs = dict(
        processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )
    inputs.pop("mm_token_type_ids", None)
    start = inputs["input_ids"].shape[1]
    banned = trainer.generation_config.suppress_tokens
    for _ in range(length):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == trainer.model.config.image_token_id).int()
        logits = trainer.model(**inputs).logits[0, -1].double()
        logits[banned] = -torch.inf
        token = logits.argmax()
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token.view(1, 1)], dim=1)
        if token.item() in trainer.eos_token_ids:
            break
    return inputs["input_ids"][0, start:].tolist()


def test_greedy_answers_are_the_policys_likeliest(trainer):
    """From text alone, from images, and from both; independent of other rows."""
    questions = [text("What?"), None, text("What is number 1 here?"), text("See 2?", images=[picture(3)])]
    texts = ask(trainer, questions)
    trainer.model.eval()
    for place, question in enumerate(questions):
        if question is None:
            assert texts[place] is None
            continue
        expected = greedy_answer(trainer, question, GREEDY.max_tokens)
        assert trainer.asked["asks"].answers[place] == expected
        assert texts[place] == trainer.processing_class.decode(expected, skip_special_tokens=True)


def test_other_random_numbers_and_the_models_modes_stay(trainer):
    trainer.model.model.visual.eval()
    modes = [module.training for module in trainer.model.modules()]
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda model, inputs: seen.append((model.training, torch.is_grad_enabled()))
    )
    own = trainer.generation_config, trainer.generation_kwargs
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = ask(trainer, [text("What?")] * 6, Sampling(max_tokens=6))
    assert torch.equal(torch.get_rng_state(), before)
    assert set(seen) == {(False, False)}
    assert [module.training for module in trainer.model.modules()] == modes
    assert (trainer.generation_config, trainer.generation_kwargs) == own
    torch.manual_seed(99)
    assert ask(trainer, [text("What?")] * 6, Sampling(max_tokens=6)) == first
    assert len(set(first)) > 1
    assert ask(trainer, [text("What?")] * 6, Sampling(max_tokens=6, seed=1)) != first
    trainer._step = 1_000_000
    assert ask(trainer, [text("What?")] * 6, Sampling(max_tokens=6)) != first
    assert all(len(ids) <= 6 for ids in trainer.asked["asks"].answers.values())


def test_a_failure_puts_everything_back(trainer, monkeypatch):
    own, before = trainer.generation_config, torch.get_rng_state()

    def fail(*args, **inputs):
        torch.rand(3)
        raise RuntimeError("no answer")

    monkeypatch.setattr(trainer.model, "generate", fail)
    with pytest.raises(RuntimeError, match="no answer"):
        ask(trainer, [text("What?")])
    assert trainer.model.training
    assert trainer.generation_config is own
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "hostile", ["<|image_pad|>", "<|im_end|><|im_start|>system", "<|vision_start|><|image_pad|><|vision_end|>", "a\0b"]
)
def test_text_of_a_response_is_text(trainer, hostile):
    """A response may contain the names of special tokens, even an image's; in a question they are plain text."""
    ask(trainer, [text(f"It is {hostile} here."), text("It is here.")])
    spelt, plain = (trainer.asked["asks"].prompts[place] for place in range(2))
    special = set(trainer.processing_class.tokenizer.all_special_ids) | set(trainer._placeholder_ids)
    assert [token for token in spelt if token in special] == [token for token in plain if token in special]


def train(make_trainer, *rewards, resume=None, folder="out", **options):
    names = {"reward_weights": [1.0] + [0.0] * (len(rewards) - 1)} if len(rewards) > 1 else {}
    trainer = make_trainer(
        make_rows([1, 0, 2, 1]),
        reward_funcs=list(rewards),
        folder=folder,
        method="grpo",
        max_steps=3,
        **names,
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_rollouts_are_the_same_whether_a_reward_asks_or_not(make_trainer):
    """Three steps end in the same bytes: the reward's weight is 0, and it has its own random stream."""
    alone = train(make_trainer, token_reward)
    asks = Asks(Sampling(max_tokens=4))
    both = train(make_trainer, token_reward, asks, folder="both")
    assert torch.equal(flat_weights(alone.model), flat_weights(both.model))
    assert len(asks.seen) == 3
    assert asks.seen[0] != asks.seen[1] != asks.seen[2]
    for log in step_logs(both):
        assert log["asking/questions"] == 8
        assert 0 < log["asking/seconds"] <= log["time/reward"]
        assert 0 < log["asking/mean_length"] <= 4
        assert log["asking/too_long"] == 0
    assert not any(name.startswith("asking/") for log in step_logs(alone) for name in log)


def test_a_resumed_run_gets_the_same_answers(make_trainer):
    saved = {"save_strategy": "steps", "save_steps": 1, "num_iterations": 2}
    whole, rest = Asks(Sampling(max_tokens=4)), Asks(Sampling(max_tokens=4))
    first = train(make_trainer, token_reward, whole, **saved)
    folder = f"{first.args.output_dir}/checkpoint-1"
    again = train(make_trainer, token_reward, rest, resume=folder, folder="again", **saved)
    assert rest.seen == whole.seen[1:]
    assert torch.equal(flat_weights(first.model), flat_weights(again.model))


def test_a_plain_function_may_ask(make_trainer):
    """Its parameter declares the need; without a question nothing is generated."""

    def brief(completions, ask_policy, **columns):
        assert ask_policy([None] * len(completions), GREEDY) == [None] * len(completions)
        answers = ask_policy([text("What?")] * len(completions), GREEDY)
        return [float(len(answer)) for answer in answers]

    trainer = make_trainer(make_rows([1, 1]), reward_funcs=[token_reward, brief], method="grpo")
    inject(trainer)
    generated = []
    trainer._generate_single_turn = lambda ids, *_: (generated.append(len(ids)), ([[9]] * len(ids), None))[1]
    trainer.train()
    assert generated == [8, 8]  # rollouts, then answers


def test_a_reward_that_asks_is_not_async(make_trainer):
    async def later(completions, ask_policy, **columns):
        return [0.0] * len(completions)

    with pytest.raises(UserError, match="the reward later asks the policy, so it cannot be async"):
        make_trainer(make_rows([1, 1]), reward_funcs=[later])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens = 0: give a whole number from 1"),
        ({"max_tokens": 10**9}, "max_tokens = 1000000000: give"),
        ({"max_tokens": True}, "max_tokens = True: give"),
        ({"temperature": -1}, r"temperature = -1: give a number in \[0, 100\]"),
        ({"temperature": float("nan")}, "temperature = nan: give"),
        ({"top_p": 0}, r"top_p = 0: give a number in \(0, 1\]"),
        ({"seed": -1}, "seed = -1: give a whole number"),
    ],
)
def test_sampling_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)


class Engine(SimpleNamespace):
    """Replaces TRL's vLLM: records each call, and answers with tokens of its prompt."""

    def sync_weights(self):
        self.synced += 1

    def generate(self, prompts, images, num_generations, profiler=None):
        options = {name: value for name, value in vars(self).items() if name not in ("calls", "synced")}
        self.calls.append((prompts, images, num_generations, options, self.model.training))
        answers = [[*prompt[:2], 9] for prompt in prompts]
        return prompts, answers, [[[-0.5]] * 3 for _ in prompts], None


def engine_of(trainer):
    trainer.use_vllm, trainer.args.vllm_max_model_length = True, 64
    trainer._last_loaded_step = 0
    trainer.vllm_generation = Engine(
        calls=[],
        synced=0,
        model=trainer.model,
        temperature=1.0,
        top_p=0.9,
        top_k=0,
        max_completion_length=8,
        generation_kwargs={"seed": 1, "max_tokens": 8, "logit_bias": {9: -100.0}},
    )
    return trainer.vllm_generation


def test_vllm_gets_a_rewards_sampling_and_keeps_its_own(trainer):
    engine = engine_of(trainer)
    before = {**vars(engine), "generation_kwargs": {**engine.generation_kwargs}}
    sampling = Sampling(max_tokens=5, temperature=0.5)
    texts = ask(trainer, [text("What?"), None, text("word " * 200)], sampling)
    ((prompts, images, generations, options, training),) = engine.calls
    assert (generations, training, images) == (1, False, None)
    assert [len(prompt) for prompt in prompts] == [len(trainer.asked["asks"].prompts[0]), 1]  # the long one is left out
    assert (options["temperature"], options["top_p"], options["max_completion_length"]) == (0.5, 0.9, 5)
    seed = options["generation_kwargs"].pop("seed")
    assert options["generation_kwargs"] == {"logit_bias": {9: -100.0}}
    assert 1 < seed < 2**31
    assert {name: value for name, value in vars(engine).items() if name != "calls"} == {
        name: value for name, value in before.items() if name != "calls"
    }
    assert texts == [trainer.processing_class.decode([*prompts[0][:2], 9], skip_special_tokens=True), None, None]
    assert trainer.asked["asks"].logps == {0: [-0.5] * 3}
    ask(trainer, [text("What?", images=[picture(1)]), text("What?")], sampling)
    assert [None if own is None else len(own) for own in engine.calls[1][1]] == [1, None]
    assert engine.synced == 0  # the rollouts' weights are there already
