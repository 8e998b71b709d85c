"""A stand-in for vLLM: records what it is given, and answers every prompt alike."""

from types import SimpleNamespace

from transformers import AutoTokenizer

RESPONSE = "<think> I see 3 and 4. 3 + 4 = 7. </think> \\boxed{7}"
engines = []
"""The arguments of each engine."""
asked = []
"""(prompt, sampling parameters) of each request."""
tokenizations = []
"""The tokenization options of each call."""


class SamplingParams(SimpleNamespace):
    pass


class LLM:
    def __init__(self, **options):
        if options["tensor_parallel_size"] > 2:
            raise RuntimeError("too few GPUs\n(a second line)")
        engines.append(options)
        tokenizer = AutoTokenizer.from_pretrained(options["model"])
        self._ids = [*tokenizer(RESPONSE, add_special_tokens=False).input_ids, tokenizer.eos_token_id]

    def generate(self, prompts, parameters, *, use_tqdm, tokenization_kwargs):
        if any("too long" in prompt["prompt"] for prompt in prompts):
            raise ValueError("the prompt is too long\n(a second line)")
        asked.extend(zip(prompts, parameters, strict=True))
        tokenizations.append(tokenization_kwargs)
        # The sum of log-probabilities is there where they were asked for.
        sums = [None if getattr(one, "logprobs", None) is None else -len(self._ids) / 4 for one in parameters]
        outputs = [SimpleNamespace(token_ids=tuple(self._ids), cumulative_logprob=one) for one in sums]
        return [SimpleNamespace(outputs=[one]) for one in outputs]
