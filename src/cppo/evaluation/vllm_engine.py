"""vLLM's engine instead of transformers' generation."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Unpack

import torch
from transformers import AutoConfig, GenerationConfig

from cppo.assets import resolve_model
from cppo.errors import UserError, first_line
from cppo.evaluation.generate import Images, Prompts, Response, Sampling, end_token_ids, prompt_text
from cppo.evaluation.loading import FAILURES, check_vision_model, load_processor
from cppo.policy import vision_placeholder_ids
from cppo.policy.families import check_vision_rope

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_", "GROUP_", "TORCHELASTIC_")
"""Prefixes of the variables with which a launcher groups its processes; vLLM would read them as its own."""
LOCAL_PLACE = (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
"""Variables of a launcher for this process's local index and their number, with defaults for no launcher."""


class VllmEngine:
    """Answers prompts through vLLM.

    vLLM expands a prompt's image placeholders itself. It gets the chat text with one placeholder an image, and the
    images.

    Attributes:
        llm: vLLM's engine (`vllm.LLM`).
        processor: the model's; only its chat template and its tokenizer are used.
    """

    def __init__(self, llm: Any, processor: Any, config: Any, generation: GenerationConfig) -> None:
        self.llm, self.processor = llm, processor
        self._ends = end_token_ids(processor, generation)
        # The strongest bias that vLLM takes, in nats: a sampled placeholder would need an image.
        self._bias = dict.fromkeys(vision_placeholder_ids(processor, config), -100.0)

    def answer(self, prompts: Prompts, images: Images, **sampling: Unpack[Sampling]) -> list[str]:
        """One response to each prompt, as `generate_responses` has it; a sample's seed is drawn from its stream."""
        return [text for text, _ in self._texts(prompts, images, sampling)]

    def sample(self, prompts: Prompts, images: Images, **sampling: Unpack[Sampling]) -> list[Response]:
        """As `answer`, with the sum of the log-probabilities that vLLM reports, which are the model's own."""
        found = self._texts(prompts, images, sampling, logprobs=0)
        return [Response(text, float(output.cumulative_logprob)) for text, output in found]

    def _texts(self, prompts: Prompts, images: Images, sampling: Sampling, **more: Any) -> list[tuple[str, Any]]:
        """Each response's text, and what vLLM says of it."""
        asked = [self.prompt(prompt, pictures) for prompt, pictures in zip(prompts, images, strict=True)]
        temperature = sampling["temperature"]
        parameters = [
            self.parameters(
                max_tokens=sampling["max_new_tokens"],
                temperature=temperature,
                top_p=sampling["top_p"] if temperature else 1.0,
                seed=int(stream.integers(2**63)),
                **more,
            )
            for stream in sampling["streams"]
        ]
        outputs = [output.outputs[0] for output in self.generate(asked, parameters)]
        texts = self.processor.batch_decode([list(one.token_ids) for one in outputs], skip_special_tokens=True)
        return list(zip(texts, outputs, strict=True))

    def parameters(self, **sampling: Any) -> Any:
        """vLLM's `SamplingParams`: a response ends as in transformers and holds no placeholder."""
        from vllm import SamplingParams

        return SamplingParams(
            **sampling,
            top_k=0,
            repetition_penalty=1.0,
            stop_token_ids=self._ends,
            logit_bias=self._bias,
            detokenize=False,
        )

    def prompt(self, prompt: list[dict[str, Any]], images: Sequence[Any]) -> dict[str, Any]:
        """A prompt in vLLM's format."""
        shown = {"multi_modal_data": {"image": list(images)}} if images else {}
        return {"prompt": prompt_text(self.processor, prompt, images), **shown}

    def generate(self, asked: Sequence[dict[str, Any]], parameters: Sequence[Any]) -> Sequence[Any]:
        """vLLM's outputs, in order. Raises UserError if vLLM refuses a prompt."""
        start = self.processor.tokenizer.bos_token
        begun = start is not None and all(one.get("prompt", "").startswith(start) for one in asked)
        try:
            return self.llm.generate(
                asked, parameters, use_tqdm=False, tokenization_kwargs={"add_special_tokens": not begun}
            )
        except ValueError as error:
            raise UserError(f"vLLM refuses a prompt: {first_line(error)}") from error


def load_vllm(
    name: str,
    *,
    dtype: str,
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
    max_model_length: int | None = None,
) -> VllmEngine:
    """An engine of this process, on its own GPUs.

    Args:
        name: a packaged name, a folder or a Hugging Face name; no adapter.
        dtype: "float32", "bfloat16" or "float16".
        tensor_parallel_size: GPUs over which the weights are split.
        gpu_memory_utilization: the fraction of each GPU's memory for vLLM.
        max_model_length: tokens of prompt and response together; None for the model's limit.

    Raises:
        UserError: too few GPUs, or a model that vLLM cannot load or would compute otherwise.
    """
    check_vision_model(name)
    processor, folder = load_processor(name), str(resolve_model(name))
    config = AutoConfig.from_pretrained(folder)
    check_vision_rope(name, config)
    try:
        generation = GenerationConfig.from_pretrained(folder)
    except OSError:  # a checkpoint may lack one
        generation = GenerationConfig.from_model_config(config)
    with own_environment(tensor_parallel_size):
        from vllm import LLM

        try:
            llm = LLM(
                model=folder,
                dtype=dtype,
                tensor_parallel_size=tensor_parallel_size,
                gpu_memory_utilization=gpu_memory_utilization,
                max_model_len=max_model_length,
                use_tqdm_on_load=False,
            )
        except (*FAILURES, RuntimeError) as error:
            raise UserError(f"model: {name} cannot be loaded by vLLM: {first_line(error)}") from error
    return VllmEngine(llm, processor, config, generation)


@contextmanager
def own_environment(gpus: int) -> Iterator[None]:
    """Environment variables that hide the launcher from vLLM, on `gpus` GPUs.

    Raises UserError if this machine has too few.
    """
    before = dict(os.environ)
    index, count = (int(os.environ.get(name, default)) for name, default in LOCAL_PLACE)
    if count > 1 and torch.cuda.is_available():
        every = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own_gpus(every.split(","), index, count, gpus))
    for name in [name for name in os.environ if name.startswith(LAUNCHER_VARIABLES)]:
        del os.environ[name]
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a forked child would share the launcher's connections
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def own_gpus(every: Sequence[str], index: int, count: int, size: int) -> list[str]:
    """The `size` GPUs of `every` for process `index` of `count` on a machine. Raises UserError for too few."""
    if len(every) < count * size:
        raise UserError(
            f"--vllm_tensor_parallel_size {size} in {count} processes takes {count * size} GPUs, but there "
            f"are {len(every)}; start fewer processes"
        )
    return list(every[index * size : (index + 1) * size])
