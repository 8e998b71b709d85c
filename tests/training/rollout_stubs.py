"""Rows, datasets, rewards and completions that are made, not sampled; shared by the trainer's tests."""

import zlib

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from cppo.rewards import Question, Sampling
from cppo.training.config import CPPOConfig
from cppo.training.trainer import CPPOTrainer

FIRST_TEXT_ID = 7
"""Smaller ids are special tokens."""


def picture(seed, width=32, height=32):
    """Coloured blocks, so that images differ in colours, not only in noise."""
    blocks = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def make_rows(counts, first=0):
    """One row per number of images in `counts`; every second image of a row is wider."""
    rows = []
    for index, count in enumerate(counts, start=first):
        images = [picture(100 * index + i, 32 + 16 * (i % 2)) for i in range(count)]
        message = {"role": "user", "content": f"What is number {index}?"}
        rows.append({"prompt": [message], "images": images, "answer": str(index), "sample_id": f"row-{index}"})
    return rows


def lazy_dataset(rows):
    """The rows as from `cppo.data`: images stay PIL objects."""
    index = Dataset.from_dict({"index": list(range(len(rows)))})
    return index.with_transform(lambda batch: {key: [rows[i][key] for i in batch["index"]] for key in rows[0]})


def token_reward(completion_ids, **kwargs):
    """A reward that differs within a group and depends only on the tokens."""
    return [float(sum(ids) % 11) for ids in completion_ids]


def parity_reward(completion_ids, **kwargs):
    return [float(sum(ids) % 2) for ids in completion_ids]


def asking_reward(completion_ids, answer, ask_policy, **kwargs):
    """The length of the policy's answers to questions about row 0 only: some processes have none to ask."""
    asked = [
        Question([{"role": "user", "content": f"What is {sum(ids) % 7}?"}]) if row == "0" else None
        for ids, row in zip(completion_ids, answer, strict=True)
    ]
    answers = ask_policy(asked, Sampling(max_tokens=12, temperature=0))
    said = [0 if text is None else 1 + len(text) for text in answers]
    return [reward + length for reward, length in zip(token_reward(completion_ids), said, strict=True)]


def uneven_reward(completion_ids, answer, **kwargs):
    """`token_reward` for rows 0 and 3; equal rewards for the others."""
    rewards = token_reward(completion_ids)
    return [reward if row in ("0", "3") else 0.9 for reward, row in zip(rewards, answer, strict=True)]


def drawn_completions(prompt_ids, draw=0, longest=10, numbers=None):
    """A completion for each prompt, from its tokens and its index among its copies; never an end token.

    numbers: these indices, where some copies are in other processes.
    """
    seen, completions = {}, []
    for place, ids in enumerate(prompt_ids):
        key = zlib.crc32(np.asarray(ids, dtype=np.int64).tobytes())
        copy = seen[key] = seen.get(key, -1) + 1
        copy = copy if numbers is None else numbers[place]
        rng = np.random.default_rng([key, copy, draw])
        completions.append(rng.integers(FIRST_TEXT_ID, 250, rng.integers(3, longest + 1)).tolist())
    return completions


def inject(trainer, longest=10, same_each_time=False):
    """Replace sampling of rollouts by `drawn_completions`; each call, or each mode of the model, draws others."""
    calls, sample = iter(range(10**6)), trainer._generate_single_turn

    def generate(prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        ours = isinstance(trainer, CPPOTrainer)
        if ours and (trainer._generating is None or trainer._made is not None):  # a reward asks, or they are made
            return sample(prompt_ids, images, multimodal_fields, num_generations)
        draw = int(not trainer.model.training) if same_each_time else next(calls)
        numbers = trainer._generating.numbers if ours else None
        return drawn_completions(prompt_ids, draw, longest, numbers), None

    trainer._generate_single_turn = generate
    return trainer


def build_trainer(model, folder, rows, cls=CPPOTrainer, config=CPPOConfig, *, reward_funcs=token_reward, **given):
    """A trainer on the CPU in float32, with 2 prompts x 4 rollouts per step; keywords are sorted to their targets."""
    objects = {"callbacks", "eval_dataset", "processing_class", "peft_config", "optimizers"}
    objects |= {"environment_factory", "rollout_func", "tools"}
    keywords = {key: given.pop(key) for key in objects & given.keys()}
    args = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "seed": 3,
        **given,
    }
    return cls(model, reward_funcs, config(output_dir=str(folder), **args), lazy_dataset(rows), **keywords)


def generation_batch(trainer, rows):
    """Rollouts, views and gate of rows as one micro-batch, as at the start of a step."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions([row for row in rows for _ in range(trainer.num_generations)])


def cut(trainer, batch, parts, steps=1):
    """The generation batch as this many micro-batches of this many optimizer steps, in order."""
    chunks = split_tensor_dict(split_pixel_values_by_grid(batch), parts)
    trainer._buffered_inputs = [unsplit_pixel_values_by_grid(chunk) for chunk in chunks]
    trainer.args.steps_per_generation, trainer.current_gradient_accumulation_steps = parts, parts // steps
    trainer._step, trainer._step_tokens = 0, None
    return trainer._buffered_inputs


def term_of(trainer, inputs):
    """The perception term in a micro-batch's loss: the part that changes with its weight."""
    losses, own = [], trainer.args.perception_weight
    for weight in (0.0, 1.0):
        trainer.args.perception_weight = weight
        losses.append(trainer._compute_loss(trainer.model, inputs))
    trainer.args.perception_weight = own
    return losses[1] - losses[0]


def step_logs(trainer):
    """What was logged of each training step."""
    return [log for log in trainer.state.log_history if "loss" in log]


def flat_weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
