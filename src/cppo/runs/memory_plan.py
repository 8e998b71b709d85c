"""How much memory of a GPU training takes, by arithmetic on tensor shapes. Nothing here was measured or fitted.

Sizes are in bytes. The terms follow the tensors that transformers' layers keep for the backward pass; of the letters in
formulas h, q, k, i stand for widths of a token: hidden states, queries, keys, and the inside of the MLP.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

from cppo.runs.model_shapes import ModelShapes

HALF, FULL = 2, 4
"""Bytes of a number in bfloat16 and in float32."""
MOMENTS = 2 * FULL
"""Bytes of a weight's two moments in AdamW."""
HEAD_TOKENS, HEAD_VOCABULARY = 4096, 8192
"""The tile of logits that TRL's kernel computes at a time: its tokens, and the vocabulary of `cppo.policy.packed`."""
ZERO3_LIVE_WEIGHTS, ZERO3_BUCKET = 10**9, 5 * 10**8
"""DeepSpeed's defaults of `stage3_max_live_parameters` and `reduce_bucket_size`, in numbers."""
RESERVE = 0.1
"""The share of a GPU's memory that a plan leaves free: CUDA's context, workspaces of kernels, fragments."""
ASSUMPTIONS = (
    "arithmetic on the tensor shapes of the configuration, no measurement",
    "AdamW; float32 weights that compute in bfloat16; LoRA: bfloat16 weights, adapters in float32",
    "every rollout has the full response length and passes the gate",
    "prompts shared over a group where the recipe's `scorer` is `shared`, ZeRO-3 excepted",
    "attention by kernels that keep no scores; gated MLPs and RMS norms, as Qwen's",
    "DDP keeps its buckets beside the gradients; autocast keeps no copies of weights from one layer to the next",
    "ZeRO-3 takes a row for each rollout and view (`scorer: kernel`), and gathers all weights to generate",
    f"{RESERVE:.0%} of each GPU stay free for CUDA's context, workspaces and fragments",
)


@dataclass(frozen=True)
class Work:
    """What a GPU does.

    Attributes:
        gpus: that train together.
        prompt_tokens, image_tokens, response_tokens: of a rollout; the image's are among the prompt's.
        num_generations: rollouts of a prompt.
        micro_batch: rollouts of a backward pass.
        step_rollouts, batch_rollouts: of an optimizer step, and of a generation batch.
        generation_slice: rollouts that are generated at a time.
        views: scored for each rollout, beside its image.
        view_gradients: whether they take part in the backward pass.
        sequential: whether the image and each view have a pass of their own, computed again for the backward pass.
        shared: whether prompts are scored once for a group; a row each otherwise.
        checkpointing: whether layers are computed again for the backward pass.
        reference: whether there is a reference model.
        frozen_tower: whether the vision tower is not trained.
        lora_r: rank of an adapter.
    """

    gpus: int
    prompt_tokens: int
    image_tokens: int
    response_tokens: int
    num_generations: int
    micro_batch: int
    step_rollouts: int
    batch_rollouts: int
    generation_slice: int
    views: int
    view_gradients: bool = True
    sequential: bool = False
    shared: bool = True
    checkpointing: bool = True
    reference: bool = False
    frozen_tower: bool = False
    lora_r: int = 16


@dataclass(frozen=True)
class Way:
    """A way to spread training over GPUs.

    Attributes:
        stream: bytes of a number of the hidden states between layers; float32 weights under autocast give 4.
        shards: whether weights, gradients and optimizer are spread over the GPUs.
        adapter: whether only an adapter is trained.
        packs: whether prompts can be shared.
        gathers_all: whether all weights are gathered while rollouts are generated.
    """

    name: str
    stream: int = HALF
    shards: bool = False
    adapter: bool = False
    packs: bool = True
    gathers_all: bool = False


DDP = Way("DDP", stream=FULL)
FSDP2 = Way("FSDP2", shards=True)
ZERO3 = Way("ZeRO-3", shards=True, packs=False, gathers_all=True)
LORA = Way("LoRA", adapter=True)
WAYS = (DDP, FSDP2, ZERO3, LORA)


@dataclass(frozen=True)
class Need:
    """Bytes on each GPU, at a micro-batch and a generation slice.

    Attributes:
        weights, gradients, optimizer: those of training.
        reference: weights of the reference model.
        buffers: of communication: DDP's buckets, or gathered layers and what is reduced.
        pixels: images of the generation batch that wait for their updates.
        activations: highest of a backward pass, with views' pixels and gradients that are not in place yet.
        keys_and_values: of the rollouts that are generated at a time.
        generation: all else while rollouts are generated: the prompts' pass, logits, gathered weights, pixels.
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

    @property
    def update(self) -> int:
        """The sum while a micro-batch is trained on."""
        lasting = self.weights + self.optimizer + self.reference
        return lasting + self.gradients + self.buffers + self.pixels + self.activations

    @property
    def rollouts(self) -> int:
        """The sum while rollouts are generated: gradients are gone by then, DDP's buckets are not."""
        lasting = self.weights + self.optimizer + self.reference
        return lasting + self.buffers + self.keys_and_values + self.generation


def need(shapes: ModelShapes, way: Way, work: Work) -> Need:
    """What training this model in this way needs of each GPU."""
    trained = lora_weights(shapes, work.lora_r) if way.adapter else shapes.weights
    share = work.gpus if way.shards else 1
    buffers = 0
    if way is ZERO3:
        buffers = HALF * (min(ZERO3_LIVE_WEIGHTS, shapes.weights) + min(ZERO3_BUCKET, shapes.weights))
    elif way.shards:
        # Embedding and output layer stay gathered. Of the layers one is in use, one comes, one is reduced from a copy.
        buffers = HALF * (shapes.end_weights + 4 * shapes.layer_weights)
    elif work.gpus > 1:
        buffers = FULL * trained
    lasting, gradients, reference = FULL * shapes.weights, FULL * trained, FULL * shapes.weights
    if way.adapter:
        lasting, reference = HALF * shapes.weights + FULL * trained, 0
    elif way is ZERO3:
        lasting, gradients, reference = (HALF + FULL) * shapes.weights, HALF * trained, HALF * shapes.weights
    packed = work.shared and way.packs
    images = ceil(work.batch_rollouts / work.num_generations) if packed else work.batch_rollouts
    return Need(
        weights=lasting // share,
        gradients=gradients // share,
        optimizer=MOMENTS * trained // share,
        reference=reference // share if work.reference else 0,
        buffers=buffers,
        pixels=_pixels(shapes, work, images),
        activations=activations(shapes, way, work),
        keys_and_values=work.generation_slice * (work.prompt_tokens + work.response_tokens) * key_value_bytes(shapes),
        generation=_generation(shapes, way, work),
    )


def lora_weights(shapes: ModelShapes, rank: int) -> int:
    """Of an adapter on the linear layers of the decoder."""
    return shapes.layers * rank * sum(inputs + outputs for inputs, outputs in shapes.linear)


def key_value_bytes(shapes: ModelShapes) -> int:
    """Keys and values of a token in all layers."""
    return 2 * HALF * shapes.layers * shapes.key_heads * shapes.head_dim


def activations(shapes: ModelShapes, way: Way, work: Work) -> int:
    """The most that a micro-batch's forward and backward pass holds beside weights, their gradients and its pixels.

    The peak is in the head, in the last decoder layer or in the last block of the vision tower, each with what layers
    before it have kept.
    """
    groups = ceil(work.micro_batch / work.num_generations)
    packed = work.shared and way.packs
    prompts = groups if packed else work.micro_batch
    tokens = prompts * (work.prompt_tokens - packed) + work.micro_batch * work.response_tokens  # of one pass
    prompt_keys = work.micro_batch * (work.prompt_tokens - 1) if packed else 0  # prompts again, before each response
    scored = work.micro_batch * work.response_tokens
    passes = 1 + work.views
    graphs = passes if work.view_gradients else 1
    together = 1 if work.sequential else graphs
    patches = prompts * work.image_tokens * shapes.patches_per_token

    h = shapes.hidden
    kept, peak = _layer(shapes, way, work.lora_r)
    keys = 2 * HALF * (shapes.key_heads if packed else shapes.heads) * shapes.head_dim
    rotary = HALF * 2 * shapes.head_dim
    of_layer = together * (tokens * (peak + keys + rotary) + prompt_keys * keys)
    if work.checkpointing:
        text = together * tokens * shapes.layers * way.stream * h
    else:
        of_layer -= (layer := together * (tokens * (kept + keys) + prompt_keys * keys))
        text = shapes.layers * layer
    if way.adapter:
        text += together * tokens * way.stream * h  # the embedding, at which gradients end
    tower_kept, projector, block = _tower(shapes, way, work)
    tower = together * patches * (tower_kept + projector)
    # The views' pixels come to the card; those of all passes are joined, and cast for the tower.
    pixels = patches * shapes.patch_values * (FULL * work.views + together * (FULL + HALF))

    states = together * tokens * h * (2 * FULL + way.stream) + passes * scored * h * way.stream
    head_gradient = 0 if way.adapter else way.stream * shapes.head_weights
    gradients = scored * h * FULL + graphs * scored * h * way.stream
    head = states + gradients + HALF * HEAD_VOCABULARY * min(scored, HEAD_TOKENS)
    if not way.adapter:
        calls = graphs if packed else 1
        head += FULL * shapes.head_weights + (head_gradient if way.stream == HALF else 0) + (calls > 1) * head_gradient
    # A tied weight's gradient waits for the embedding's; where weights are sharded, for the end of the pass.
    waiting = head_gradient if shapes.tied or way.shards else 0
    if way.stream == FULL:
        of_layer += HALF * shapes.layer_weights  # autocast's copies, for the backward pass
    unkept = (passes - graphs) * tokens * _forward_width(shapes, way)
    text_peak = max(head, waiting + of_layer, unkept)
    tower_peak = waiting + together * patches * block
    return pixels + tower + max(text + text_peak, tower_peak)


def _layer(shapes: ModelShapes, way: Way, rank: int) -> tuple[int, int]:
    """What a decoder layer keeps of a token, and the most it holds in its backward pass; both without keys and values.

    The most is held where the MLP's product goes backward: its gradient and those of its two factors are there, the
    product is gone.
    """
    h, q, i = shapes.hidden, shapes.heads * shapes.head_dim, shapes.intermediate
    attention = HALF * 2 * q + FULL * shapes.heads  # queries, outputs, a number a head in float32
    if way.adapter:
        # Frozen layers keep no inputs, but each adapter a copy of its own; norms keep theirs in float32.
        copies = sum(HALF * (inputs + rank) for inputs, _ in shapes.linear)
        kept = 2 * FULL * h + attention + copies + HALF * 3 * i
        # At the last of them: the product three times, once in float32; what goes into the MLP, and the frozen result.
        return kept, kept + (HALF + FULL) * i + HALF * 3 * h
    # Two norms keep their input in float32, the normalised and the scaled one; where the stream is float32 already, the
    # first input is kept anyway, and of the scaled one each of the five linear layers keeps a cast.
    norms = 2 * (FULL + HALF + HALF) * h if way.stream == HALF else (3 * FULL + 5 * HALF) * h
    kept = norms + attention + HALF * 4 * i  # gate, activated gate, up, product
    return kept, kept + HALF * 2 * i + way.stream * h


def _tower(shapes: ModelShapes, way: Way, work: Work) -> tuple[int, int, int]:
    """What the vision tower's blocks keep of a patch, what the projector keeps, and the most a block holds backward."""
    e, f = shapes.vision_hidden, shapes.vision_intermediate
    # A norm, then two layers as wide as a token's patches. A frozen layer keeps no input.
    projector = (FULL + HALF) * e if way.adapter else (FULL + 4 * HALF) * e
    if work.frozen_tower and not way.adapter:
        return 0, projector, 0
    # TRL lets gradients of an adapter run through the frozen tower, to its first layer's input.
    norms = 2 * FULL * e if way.adapter else 2 * (FULL + 2 * HALF) * e
    attention, gated = HALF * 4 * e, HALF * (3 if way.adapter else 4) * f
    block = norms + attention + gated
    kept = shapes.vision_layers * (HALF * e if work.checkpointing else block)
    return kept, projector, (block if work.checkpointing else 0) + HALF * 2 * f + HALF * e


def _forward_width(shapes: ModelShapes, way: Way) -> int:
    """Bytes of a token in a layer that keeps nothing: the stream twice, a norm's output, three widths of the MLP."""
    return (2 * way.stream + HALF) * shapes.hidden + HALF * 3 * shapes.intermediate


def _pixels(shapes: ModelShapes, work: Work, images: int) -> int:
    return FULL * images * work.image_tokens * shapes.patches_per_token * shapes.patch_values


def _generation(shapes: ModelShapes, way: Way, work: Work) -> int:
    """What is held beside lasting tensors, keys and values while a slice of rollouts is generated."""
    prompts = ceil(work.generation_slice / work.num_generations) if work.shared else work.generation_slice
    prefill = prompts * work.prompt_tokens * _forward_width(shapes, way)
    choice = work.generation_slice * shapes.vocabulary * 3 * FULL  # logits, scores, probabilities
    gathered = HALF * shapes.weights if way.gathers_all else 0
    return max(prefill, choice) + gathered + _pixels(shapes, work, work.batch_rollouts)


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to the limit that fits, where all smaller ones do too; 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def largest_micro_batch(shapes: ModelShapes, way: Way, work: Work, budget: float) -> int:
    """The most rollouts of a micro-batch within so many bytes, up to those of a step; 0 if not one fits."""
    return largest(work.step_rollouts, lambda size: need(shapes, way, replace(work, micro_batch=size)).update <= budget)


def largest_slice(shapes: ModelShapes, way: Way, work: Work, budget: float) -> int:
    """The most rollouts generated at a time within so many bytes, up to a generation batch; 0 if not one fits."""
    return largest(
        work.batch_rollouts, lambda size: need(shapes, way, replace(work, generation_slice=size)).rollouts <= budget
    )
