"""The sizes of an untrained model that answers at once, for `build_micro`."""

SMALL = {"text_hidden": 32, "text_layers": 1, "text_intermediate": 48, "vision_hidden": 32, "vision_layers": 1}
