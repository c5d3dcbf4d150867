#!/usr/bin/env python3
"""Rewrites the table of rotary frequencies in tests/data/test_model_config.c with what the installed transformers computes.

    python3 scripts/make_rope_golden.py            (needs torch and transformers 5)

Each row: the rope keys of a config.json, head width, max_position_embeddings, the factor on cos and sin, and inverse
frequencies at eight places. The rows stand between the two comments that name this script.
"""
import json
import pathlib

import transformers
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def yarn(**keys):
    return {"rope_type": "yarn", "factor": 4.0, **keys}


CASES = [
    # rope keys, head_dim, max_position_embeddings
    ({"rope_theta": 10000.0, "rope_scaling": None}, 128, 4096),
    ({"rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}}, 64, 32768),
    ({"rope_theta": 11158839.92}, 80, 4096),
    ({"rope_theta": 10000, "rope_scaling": {"type": "linear", "factor": 2.5}}, 96, 4096),
    ({"rope_theta": 500000.0, "rope_scaling": LLAMA3}, 128, 131072),
    ({"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "factor": 32.0}}, 64, 131072),
    ({"rope_parameters": {**LLAMA3, "rope_theta": 10000.0, "low_freq_factor": 0.5, "original_max_position_embeddings": 64}}, 16, 512),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6, "factor": 2, "low_freq_factor": 1, "high_freq_factor": 3}}, 32, 2048),
    ({"rope_theta": 1000000.0, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, 128, 32768),
    ({"rope_theta": 1000000.0, "rope_scaling": yarn(original_max_position_embeddings=32768)}, 128, 131072),
    ({"rope_theta": 10000.0, "rope_scaling": yarn()}, 128, 4096),
    ({"rope_theta": 10000.0, "rope_scaling": yarn(factor=40, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=1.0)}, 64, 163840),
    ({"rope_theta": 10000.0, "rope_scaling": yarn(original_max_position_embeddings=4096, mscale=0.707)}, 64, 16384),
    ({"rope_theta": 10000.0, "rope_scaling": yarn(original_max_position_embeddings=4096, attention_factor=0.75, mscale=2.0, mscale_all_dim=1.0)}, 64, 16384),
    ({"rope_theta": 150000.0, "rope_scaling": yarn(factor=32.0, original_max_position_embeddings=4096, truncate=False)}, 64, 131072),
    ({"rope_theta": 10000.0, "rope_scaling": yarn(original_max_position_embeddings=2048, beta_fast=16, beta_slow=2.0)}, 112, 8192),
    ({"rope_theta": 10000.0, "rope_scaling": yarn(original_max_position_embeddings=2048, beta_fast=None, beta_slow=0)}, 16, 8192),
    ({"rope_theta": 10000.0, "rope_scaling": yarn(factor=None, original_max_position_embeddings=2048)}, 128, 16384),
    ({"rope_theta": 10000.0, "rope_scaling": yarn(factor=1.0, original_max_position_embeddings=2048)}, 32, 2048),
    ({"rope_parameters": yarn(rope_theta=10000.0, original_max_position_embeddings=8)}, 8, 32),
    ({"rope_theta": 10000.0, "original_max_position_embeddings": 2048, "rope_scaling": yarn(factor=8)}, 128, 16384),
]


def row(keys, head_dim, max_position):
    config = LlamaConfig(**json.loads(json.dumps(keys)), hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=max_position)
    rotary = LlamaRotaryEmbedding(config)
    values = rotary.inv_freq.double().tolist()
    places = sorted({round(i * (len(values) - 1) / 7) for i in range(8)})
    text = json.dumps(keys, separators=(",", ":")).replace('"', '\\"')
    pairs = ", ".join("{%d, %.9g}" % (i, values[i]) for i in places)
    return '    {"%s", %d, %d, %.17g,\n     %d, {%s}},' % (text, head_dim, max_position, rotary.attention_scaling, len(places), pairs)


def main():
    path = pathlib.Path(__file__).resolve().parent.parent / "tests/data/test_model_config.c"
    lines = path.read_text().splitlines()
    marks = [i for i, line in enumerate(lines) if "scripts/make_rope_golden.py" in line]
    assert len(marks) == 2, "the two comments that name this script are gone"
    lines[marks[0]] = "    /* from here: scripts/make_rope_golden.py, transformers %s */" % transformers.__version__
    lines[marks[0] + 1:marks[1]] = [row(*case) for case in CASES]
    path.write_text("\n".join(lines) + "\n")


main()
