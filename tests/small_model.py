"""An untrained model that answers at once, by its sizes for `build_micro`, and the options of a short run with it."""

SMALL = {"text_hidden": 32, "text_layers": 1, "text_intermediate": 48, "vision_hidden": 32, "vision_layers": 1}
SHORT_RUN = {
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 8,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
