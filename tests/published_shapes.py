"""Configurations of Qwen2.5-VL in any size, and in the published ones: shapes alone, nothing of the hub."""

from typing import Any

import transformers

IMAGE, START, END = 5, 3, 4


def qwen(text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    tokens = {"image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": START, "vision_end_token_id": END}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tied}
    return transformers.Qwen2_5_VLConfig(
        text_config={**text, **ends, "rope_parameters": rope},
        vision_config={**vision, "out_hidden_size": text["hidden_size"], "temporal_patch_size": 2},
        **tokens,
        tie_word_embeddings=tied,
    )


def sizes(hidden, intermediate, layers, heads, key_heads, vocabulary):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {**dict(zip(names, (hidden, intermediate, layers, heads, key_heads), strict=True)), "vocab_size": vocabulary}


def tower(hidden, intermediate, layers, heads, patch):
    windows = {"window_size": 8 * patch, "fullatt_block_indexes": [1], "spatial_merge_size": 2, "patch_size": patch}
    return {"hidden_size": hidden, "intermediate_size": intermediate, "depth": layers, "num_heads": heads, **windows}


TOWER = tower(1280, 3420, 32, 16, 14)
THREE_B = qwen(sizes(2048, 11008, 36, 16, 2, 151936), TOWER, tied=True)
SEVEN_B = qwen(sizes(3584, 18944, 28, 28, 4, 152064), TOWER, tied=False)
