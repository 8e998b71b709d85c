# %% [markdown]
# # From data to a map of the tokens
#
# For people who use CPPO from Python.
# After this page you can train a model, measure it and see which tokens depend on the image.
#
# This example goes from data to a trained model and a map of the tokens that depend on the image. It runs on a CPU
# with `micro`, the vision-language model of this package (1.4 M parameters). Run `make test` or `pip install -e .`
# first; then run it as a notebook or as a script.

# %%
import os
from dataclasses import asdict
from html import escape
from pathlib import Path

from PIL import Image
from transformers.trainer_callback import PrinterCallback

from cppo import CPPOConfig, CPPOTrainer
from cppo.data import load_records, question_text, to_dataset
from cppo.evaluation import BLANK, evaluate, load_model, paired_bootstrap
from cppo.evaluation.inspection import InspectOptions, inspect_record
from cppo.reports import RunData, render_report
from cppo.reports.inspection import render_inspection
from cppo.reports.views import draw_grid, perturbed_records, shown_item
from cppo.rewards import accuracy_reward, format_reward
from cppo.views import ViewSampler

STEPS = int(os.environ.get("QUICKSTART_STEPS", "60"))
ITEMS = int(os.environ.get("QUICKSTART_ITEMS", "500"))
OUT = Path("runs/quickstart")
OUT.mkdir(parents=True, exist_ok=True)


def show(content: Image.Image | str, name: str) -> None:
    """Save a picture or a page in OUT; a notebook also shows it."""
    if isinstance(content, Image.Image):
        content.save(OUT / name)
    else:
        (OUT / name).write_text(content, encoding="utf-8")
    if "get_ipython" in globals():
        from IPython.display import HTML, display

        frame = '<iframe srcdoc="{}" width="100%" height="900" style="border: 0"></iframe>'
        display(content if isinstance(content, Image.Image) else HTML(frame.format(escape(content))))


# %% [markdown]
# ## The data
#
# Each image shows handwritten digits in heavy noise; each question is about two of them. The training and the
# held-out items use different handwriting. For your own data, give a file: `load_records("train.jsonl")`.

# %%
train = load_records("tasks:digits?noise=150&n=4000")
held_out = load_records(f"tasks:digits?noise=150&n={ITEMS}", split="test")
strip = Image.new("RGB", (3 * 200 - 8, 192), "white")
for place, record in enumerate(train[index] for index in range(3)):
    print(f"{place + 1}. {question_text(record.prompt)}  ->  {record.answer}")
    strip.paste(record.images[0].convert("RGB").resize((192, 192), Image.Resampling.NEAREST), (place * 200, 0))
show(strip, "data.png")

# %% [markdown]
# ## The views
#
# For every image, the trainer draws a view that keeps its information (I+) and a view that removes it (I-). These
# are examples for the first image:

# %%
sampler = ViewSampler(seed=0)
show(draw_grid(shown_item(train[0], perturbed_records(train[0], sampler, 2)[1])), "views.png")

# %% [markdown]
# ## Before training

# %%
model, processor = load_model("micro", device="cpu")
before = evaluate(model, processor, held_out, batch_size=64, max_new_tokens=80)
low, high = before.accuracy_ci95
print(f"{before.accuracy:.1%} right, 95 % interval [{low:.1%}, {high:.1%}], {len(held_out)} items")

# %% [markdown]
# ## Training
#
# `CPPOTrainer` has the arguments of TRL's `GRPOTrainer`. A step answers 16 questions 8 times each. The rewards are
# accuracy and format; the perception loss is on by default.

# %%
config = CPPOConfig(
    str(OUT / "model"),
    max_steps=STEPS,
    learning_rate=1e-4,
    lr_scheduler_type="constant_with_warmup",
    warmup_steps=5,
    per_device_train_batch_size=128,
    num_generations=8,
    max_completion_length=80,
    reward_weights=[0.9, 0.1],
    beta=0.0,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
)
trainer = CPPOTrainer(model, [accuracy_reward, format_reward], config, to_dataset(train), processing_class=processor)
trainer.remove_callback(PrinterCallback)  # it prints every number of every step
trainer.train()
metrics = [entry for entry in trainer.state.log_history if "reward" in entry]
for first in range(0, len(metrics), 10):
    rewards = [entry["reward"] for entry in metrics[first : first + 10]]
    print(f"steps {first + 1:2} to {first + len(rewards):2}  mean reward {sum(rewards) / len(rewards):.3f}")

# %% [markdown]
# ## After training

# %%
model.eval()
after = evaluate(model, processor, held_out, batch_size=64, max_new_tokens=80)
blank = evaluate(model, processor, held_out, condition=BLANK, batch_size=64, max_new_tokens=80)
gain = paired_bootstrap(before.accuracies, after.accuracies, seed=0)
print(f"{before.accuracy:.1%} -> {after.accuracy:.1%}, with a grey image {blank.accuracy:.1%}")
print(f"gain {100 * gain.mean:+.1f} points, 95 % interval [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]")

# %% [markdown]
# The curves show the reward, the perception loss, d+ and d-, and the entropies.

# %%
summary = {"before": before.to_dict(), "after": after.to_dict()}
summary |= {"blank": blank.to_dict(), "gain": asdict(gain)}
run = RunData(
    name="quickstart",
    config={"model": "micro", "data": train.name, "method": config.method, "max_steps": STEPS},
    metrics=metrics,
    samples=[],
    probes=[],
    progress={},
    summary=summary,
)
show(render_report(run), "curves.html")

# %% [markdown]
# ## Which tokens depend on the image
#
# The colour of a response token shows how much it depends on the image. Underlined tokens are read from the image,
# which this data records. Outlined tokens are selected by the training rule. Point at a token for its numbers.

# %%
options = InspectOptions(samples=2, max_new_tokens=80)
items = [inspect_record(model, processor, held_out[index], sampler, options) for index in range(min(4, ITEMS))]
show(render_inspection(items, model="quickstart", data=held_out.name, score="entropy_shift"), "tokens.html")

# %% [markdown]
# ## Save and load
#
# `save_model` also writes a model card. This command evaluates the saved model:
# `cppo eval --model runs/quickstart/model --data "tasks:digits?noise=150"`.

# %%
trainer.save_model()
again, its_processor = load_model(str(OUT / "model"), device="cpu")
few = held_out.keep(range(min(64, ITEMS)))
same = evaluate(again, its_processor, few, batch_size=64, max_new_tokens=80)
assert same.accuracies == after.accuracies[: len(few)]
print("\n".join(sorted(file.name for file in (OUT / "model").iterdir())))
