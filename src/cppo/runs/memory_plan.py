"""GPU memory of training, by arithmetic on tensor shapes. Nothing here was measured or fitted.

Sizes are in bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

from cppo.runs.activation_plan import Counts, activations, forward_width, lora_weights
from cppo.runs.memory_work import FULL, HALF, ZERO3, Way, Work
from cppo.runs.model_shapes import ModelShapes

MOMENTS = 2 * FULL
"""Bytes of a weight's two moments in AdamW."""
ZERO3_LIVE_WEIGHTS, ZERO3_BUCKET = 10**9, 5 * 10**8
"""DeepSpeed's defaults of `stage3_max_live_parameters` and `reduce_bucket_size`, in numbers."""
RESERVE = 0.1
"""The share of a GPU's memory that a plan leaves free: CUDA's context, workspaces of kernels, fragments."""
ASSUMPTIONS = (
    "arithmetic on the tensor shapes of the configuration, no measurement",
    "AdamW; float32 weights that compute in bfloat16; LoRA: bfloat16 weights, adapters in float32",
    "every rollout has the full response length and passes the gate",
    "prompts shared over a group if the recipe's `scorer` is `shared`, except under ZeRO-3",
    "attention by kernels that keep no scores; gated MLPs and RMS norms, as Qwen's",
    "DDP keeps its buckets beside the gradients; autocast keeps no copies of weights from one layer to the next",
    "ZeRO-3 takes a row for each rollout and view (`scorer: kernel`), and gathers all weights to generate",
    f"{RESERVE:.0%} of each GPU stay free for CUDA's context, workspaces and fragments",
)


@dataclass(frozen=True)
class Need:
    """Bytes on each GPU, for a micro-batch and a generation slice.

    Attributes:
        weights, gradients, optimizer: those of training.
        reference: weights of the reference model.
        buffers: of communication: DDP's buckets, or gathered layers and reduced gradients.
        pixels: images that wait on the GPU for their updates; 0 with shared prompts, whose images wait on the host.
        activations: peak of a micro-batch, with its images and unfinished gradients.
        keys_and_values: of the rollouts that are generated at a time.
        generation: everything else during generation: images, the prompts' pass, logits, gathered weights.
        scoring: while the reference scores rollouts and they are cut into micro-batches: images, a pass.
    """

    weights: int
    gradients: int
    optimizer: int
    reference: int
    buffers: int
    pixels: int
    activations: int
    keys_and_values: int
    generation: int
    scoring: int

    @property
    def update(self) -> int:
        """Sum while a micro-batch is trained on."""
        lasting = self.weights + self.optimizer + self.reference
        return lasting + self.gradients + self.buffers + self.pixels + self.activations

    @property
    def rollouts(self) -> int:
        """Peak while rollouts are made: gradients are freed by then, DDP's buckets are not."""
        lasting = self.weights + self.optimizer + self.reference
        return lasting + self.buffers + max(self.keys_and_values + self.generation, self.scoring)


def need(shapes: ModelShapes, way: Way, work: Work) -> Need:
    """What training this model in this way needs on each GPU."""
    trained = lora_weights(shapes, work.lora_r) if way.adapter else shapes.weights
    share = work.gpus if way.shards else 1
    buffers = 0
    if way is ZERO3:
        buffers = HALF * (min(ZERO3_LIVE_WEIGHTS, shapes.weights) + min(ZERO3_BUCKET, shapes.weights))
    elif way.shards:
        # Embedding and output layer stay gathered. One layer is in use, one arrives, one is reduced from a copy.
        buffers = HALF * (shapes.end_weights + 4 * shapes.layer_weights)
    elif work.gpus > 1:
        buffers = FULL * trained
    lasting, gradients, reference = FULL * shapes.weights, FULL * trained, FULL * shapes.weights
    if way.adapter:
        lasting, reference = HALF * shapes.weights + FULL * trained, 0
    elif way is ZERO3:
        lasting, gradients, reference = (HALF + FULL) * shapes.weights, HALF * trained, HALF * shapes.weights
    packed = work.shared and way.packs
    image = FULL * work.image_tokens * shapes.patches_per_token * shapes.patch_values
    all_images = image * work.batch_rollouts
    # With shared prompts, a slice and a micro-batch have their groups' prompts.
    shown, scored = (image * ceil(size / work.num_generations) for size in (work.generation_slice, work.micro_batch))
    scoring = _pass(shapes, way, work) + (scored if packed else all_images) if work.reference else 0
    return Need(
        weights=lasting // share,
        gradients=gradients // share,
        optimizer=MOMENTS * trained // share,
        reference=reference // share if work.reference else 0,
        buffers=buffers,
        pixels=0 if packed else all_images,
        activations=activations(shapes, way, work),
        keys_and_values=work.generation_slice * (work.prompt_tokens + work.response_tokens) * key_value_bytes(shapes),
        generation=(shown if packed else all_images) + _generation(shapes, way, work),
        scoring=scoring if packed else max(scoring, 2 * all_images),
    )


def key_value_bytes(shapes: ModelShapes) -> int:
    """Keys and values of a token in all layers."""
    return 2 * HALF * shapes.layers * shapes.key_heads * shapes.head_dim


def _generation(shapes: ModelShapes, way: Way, work: Work) -> int:
    """Bytes beside lasting tensors, images, keys and values while a slice of rollouts is generated."""
    prompts = ceil(work.generation_slice / work.num_generations) if work.shared else work.generation_slice
    prefill = prompts * work.prompt_tokens * forward_width(shapes, way)
    choice = work.generation_slice * shapes.vocabulary * 3 * FULL  # logits, scores, probabilities
    return max(prefill, choice) + (HALF * shapes.weights if way.gathers_all else 0)


def _pass(shapes: ModelShapes, way: Way, work: Work) -> int:
    """Bytes of the reference's pass over a micro-batch."""
    return Counts.of(shapes, way, work).tokens * forward_width(shapes, way)


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to the limit that fits, if all smaller ones fit; 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def largest_micro_batch(shapes: ModelShapes, way: Way, work: Work, budget: float) -> int:
    """The most rollouts of a micro-batch within `budget` bytes, up to a step's rollouts; 0 if none fits."""
    return largest(work.step_rollouts, lambda size: need(shapes, way, replace(work, micro_batch=size)).update <= budget)


def largest_slice(shapes: ModelShapes, way: Way, work: Work, budget: float) -> int:
    """The most rollouts generated at a time within `budget` bytes, up to a generation batch; 0 if none fits."""
    return largest(
        work.batch_rollouts, lambda size: need(shapes, way, replace(work, generation_slice=size)).rollouts <= budget
    )
