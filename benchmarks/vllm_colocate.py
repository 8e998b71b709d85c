"""Check that rollouts of colocated vLLM answer the trained prompts: rows with one image, with two and with none.

The trainer makes a generation batch through TRL's link to a vLLM engine in its own process. Then
1. vLLM's own replacement of image placeholders must give each prompt's tokens as the processor does, while TRL's
   request without this package's gives more tokens;
2. vLLM's log-probability of a sampled token must differ from transformers' by at most 1e-3 nats.

Prints a Markdown table, and ends with status 1 where one of these fails. It needs the environment of
`vllm_agreement.py`:

    VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python benchmarks/vllm_colocate.py

docs/results/checks.md has the figures. The weights are those that vLLM loaded: on a CPU it cannot take others.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl.generation import vllm_generation
from vllm_agreement import micro_for_vllm, rows_of

from cppo import CPPOConfig, CPPOTrainer
from cppo.evaluation import prompt_inputs
from cppo.evaluation.dependency import score_responses
from cppo.policy import vision_placeholder_ids

LARGEST_DIFFERENCE = 1e-3


class WatchingTrainer(CPPOTrainer):
    """Records vLLM's requests and prompts; makes one generation batch."""

    def watch(self) -> None:
        self.vllm_generation.sync_weights = lambda: None
        self.asked: list[list[int]] = []
        self.made: list[list[int]] = []
        engine = self.vllm_generation.llm
        theirs = engine.generate

        def generate(prompts: Sequence[dict[str, Any]], **options: Any) -> Any:
            outputs = theirs(prompts, **options)
            self.asked += [prompt["prompt_token_ids"] for prompt in prompts]
            self.made += [list(output.prompt_token_ids) for output in outputs]
            return outputs

        engine.generate = generate

    def batch(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        self.model.train()
        self.current_gradient_accumulation_steps = 1
        return self._generate_and_score_completions([row for row in rows for _ in range(self.num_generations)])


def make_trainer(model: str, folder: str) -> WatchingTrainer:
    """A trainer with rollouts from vLLM in this process, in float32, which TRL leaves to vLLM."""
    vllm_generation.LLM = partial(vllm_generation.LLM, dtype="float32")
    args = CPPOConfig(
        folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=512,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=32,
        perception_gate="none",
        temperature=1.0,
    )
    index = Dataset.from_dict({"prompt": [[{"role": "user", "content": "?"}]]})
    return WatchingTrainer(model, lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids], args, index)


def kept(batch: dict[str, Any], name: str, mask: str) -> list[Any]:
    """A batch's values outside the padding, one list per row."""
    return [values[own.bool()].tolist() for values, own in zip(batch[name], batch[mask], strict=True)]


@torch.no_grad()
def apart(trainer: CPPOTrainer, row: dict[str, Any], ids: list[int], logps: list[float]) -> Tensor:
    """Difference between vLLM's and transformers' log-probabilities of a response, [tokens], in nats.

    vLLM's are of a distribution without the banned tokens.
    """
    inputs = prompt_inputs(trainer.processing_class, [row["prompt"]], [row["images"]])
    logits = score_responses(trainer.model, inputs, [ids], temperature=1.0).logits
    assert logits is not None
    banned = torch.tensor(vision_placeholder_ids(trainer.processing_class, trainer.model.config))
    expected = logits[0].index_fill(-1, banned, -torch.inf).log_softmax(dim=-1)
    return (expected.gather(-1, torch.tensor(ids)[:, None])[:, 0] - torch.tensor(logps)).abs()


def twice_expanded(trainer: WatchingTrainer, prompt: list[int], images: Sequence[Any]) -> int:
    """vLLM's tokens of a prompt with images that are already expanded."""
    shown = {"multi_modal_data": {"image": list(images)}} if images else {}
    llm = trainer.vllm_generation.llm
    llm.generate([{"prompt_token_ids": prompt, **shown}], use_tqdm=False)
    return len(trainer.made[-1])


def compare(name: str, items: int) -> bool:
    """Print one table row per kind of row; returns whether all agree."""
    good = True
    print("| rows | prompt tokens | asked of vLLM | made by vLLM | without CPPO | tokens | largest difference, nats |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(name, folder)
        trainer.watch()
        for kind, asked in rows_of(items).items():
            trainer.asked, trainer.made = [], []
            rows = [{"prompt": prompt, "images": images} for prompt, images in asked]
            batch = trainer.batch(rows)
            prompts = kept(batch, "prompt_ids", "prompt_mask")
            answers = kept(batch, "completion_ids", "completion_mask")
            logps = kept(batch, "sampling_per_token_logps", "completion_mask")
            shown = [row for row in rows for _ in range(trainer.num_generations)]
            found = [apart(trainer, *answer) for answer in zip(shown, answers, logps, strict=True)]
            difference = torch.cat(found)
            images = asked[0][1]
            same = trainer.made == prompts
            twice = twice_expanded(trainer, prompts[0], images)
            figures = [len(prompts[0]), len(trainer.asked[0]), len(trainer.made[0]), twice]
            print(
                f"| {len(asked)} x 4, {kind} | {' | '.join(map(str, figures))} | {difference.numel():,} | "
                f"{difference.max():.1e} |"
            )
            good &= same and difference.max().item() <= LARGEST_DIFFERENCE
            good &= (twice > len(prompts[0])) == bool(images)
    return good


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR|NAME")
    parser.add_argument("--items", type=int, default=8, help="prompts of each kind")
    given = parser.parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        name = given.model or micro_for_vllm(Path(folder) / "micro")
        return 0 if compare(name, given.items) else 1


if __name__ == "__main__":
    sys.exit(main())
