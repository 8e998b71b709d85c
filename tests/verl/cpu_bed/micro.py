"""The embedded model under the transformers of verl: importing this module makes it the model that it is elsewhere.

Its vision tower turns positions by another base than Qwen's own 10,000. Its configuration says so, in a field that
transformers before 5.11 does not read.
"""

import json

from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionRotaryEmbedding

from cppo.assets import MICRO_DIR

BASE = json.loads((MICRO_DIR / "config.json").read_text())["vision_config"]["rope_parameters"]["rope_theta"]

Qwen2_5_VisionRotaryEmbedding.__init__.__defaults__ = (BASE,)
