"""The published methods that are defined by their rewards: perception is paid for, and GRPO learns it.

A declaration's `rewards` are the rewards with their weights. Prompts have to ask for the form that they look for.
"""

from cppo.methods.blocks import Options
from cppo.methods.published import grpo


def vision_sr1() -> Options:
    r"""Vision-SR1 (arXiv 2508.19652), first version: a response's description alone must give the right answer again.

    Reward 0.9 accuracy + 0.1 format + 1.0 for the answer that the current policy finds from description and question,
    without the image. On GRPO: one advantage for all tokens. The form is `<description>`, `<think>`, `\boxed{}`, and
    prompts have to ask for it. In its code a response without the tag is passed on whole, its answer included, and
    pays; and a description may hold the answer. Here a missing or empty description earns nothing, and one with
    `\boxed` neither (`description?guard=none` is theirs, `answer` stricter). The second answer is one sample at the
    rollouts' temperature, as in its code; its 512 tokens are ours. Published runs: first a supervised stage on 9,000
    rows, then G = 8, KL 0.01 to the reference, temperature 1, top-p 0.99.
    """
    return {
        **grpo(),
        "rewards": {"accuracy": 0.9, "format?before=description": 0.1, "description": 1.0},
    }


def vision_sr1_two_advantages() -> Options:
    """Vision-SR1 (arXiv 2508.19652), later version: the answers from descriptions are trained too, by their own reward.

    The response has the reward 0.9 accuracy + 0.1 format, the second answer that of the description; each has group
    z-scores of its own, its own log-probabilities and KL, and half of the loss. Of this version a note is known, no
    code: the weights are the first one's, and so are tags, guard and the bound of 512 tokens. The loss is a mean over
    rows, of which both have as many, so halves are exact. A response without a description has no second answer, and
    its group's statistics are those of the others.
    """
    return {
        **grpo(),
        "loss_type": "grpo",
        "trained_answers": "description_reward",
        "trained_answers_weight": 0.5,
        "rewards": {**vision_sr1()["rewards"], "description": 0.0},
    }


def visionary_r1() -> Options:
    r"""Visionary-R1 (arXiv 2505.14677): the caption before the reasoning must answer the question by itself.

    Reward accuracy + format + 0.1 for the answer that the current policy finds from caption and question, without the
    image; its instruction asks for a fixed refusal where the text does more than describe, which earns 0. The form is
    `<info>`, `<think>`, and the answer, here in `\boxed{}` as for all methods, there in `<answer>`. In its code the
    caption reward is added again at every loss call, captions with line breaks are not found, and missing ones shift
    the rewards of later rollouts; here each counts once, in its place. Its grader goes by the kind of question (ANLS,
    ROUGE); ours compares as `accuracy` does. The words of the refusal are ours. Published runs: G = 8, 768 tokens, at
    most 1e6 pixels, and a KL to the reference of 0.04 that a cosine takes to 0 (`schedules: [beta=cosine]`).
    """
    caption = "description?opening=<info>&closing=</info>&refusal=not a description"
    return {
        **grpo(),
        "loss_type": "grpo",
        "beta": 0.04,
        "schedules": ["beta=cosine"],
        "rewards": {"accuracy": 1.0, "format?before=info": 1.0, caption: 0.1},
    }


def perception_r1() -> Options:
    r"""Perception-R1 (arXiv 2506.07218): the visual facts that a row lists must stand in the response.

    Reward 0.9 accuracy + 0.1 format + 0.7 facts stated / (facts + 1e-6) - 2 (1 - distinct / all 20-grams of words). Its
    data column `facts` holds what a text model took from reference traces; a row without any has no such term. In its
    code a judge of 32B parameters says which facts a response states, not whether they are true, and a failed call is
    worth 0: `facts?judge=URL&model=NAME`. Without a judge, the default here, a fact must stand there in its own words.
    Its form is `<think>` and `<answer>` with `\boxed{}` in it, here `<think>` and `\boxed{}`. Clip 0.2 / 0.3, no
    KL. Published runs: G = 8, 25 epochs over 1,442 rows. A weighting of 1.0 / 0.1 in its code is not used there.
    """
    return {
        **grpo(),
        "epsilon": 0.2,
        "epsilon_high": 0.3,
        "rewards": {"accuracy": 0.9, "format": 0.1, "facts": 0.7, "word_repetition?ngram_size=20": 2.0},
    }


REWARDED = {
    "perception-r1": perception_r1,
    "vision-sr1": vision_sr1,
    "vision-sr1-two-advantages": vision_sr1_two_advantages,
    "visionary-r1": visionary_r1,
}
"""By the name that `method` is set to."""
