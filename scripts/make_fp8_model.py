#!/usr/bin/env python3
"""Turn a Hugging Face directory in f32, f16 or bf16 into fp8 as it is published, to test readers with.

    scripts/make_fp8_model.py MODEL_DIR -o OUT_DIR --kind fp8-block --kind modelopt ...  [--dequantised [--libraries]]

Writes OUT_DIR/KIND for every kind (all of them without --kind): matrices of the blocks in e4m3 with scales, everything else in bf16, config.json with the
quantization_config that goes with it. --dequantised writes OUT_DIR/KIND-f32 too: the same numbers in f32, number times scale as PyTorch computes it. --libraries: the
dequantisation of transformers and of compressed-tensors, of what is installed of them, must give the same to the bit, and what was compared is printed.
Scales are amax / 448: enough for tests, no calibration. Needs torch and safetensors.
"""
import argparse, copy, json, pathlib, shutil, sys

import torch
from safetensors.torch import load_file, save_file

F8, MAX = torch.float8_e4m3fn, 448.0
ACTIVATIONS = {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True, "type": "float"}


def compressed(strategy, dynamic=True, **more):
    weights = {"dynamic": False, "num_bits": 8, "observer": "minmax", "observer_kwargs": {}, "strategy": strategy, "symmetric": True, "type": "float",
               "actorder": None, "block_structure": None, "group_size": None, **more}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed", "global_compression_ratio": None,
            "kv_cache_scheme": None, "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "output_activations": None,
            "input_activations": {**ACTIVATIONS, "dynamic": dynamic, "strategy": "token" if dynamic else "tensor"}}}}


# kind: (scales, name of the scale, its dtype, quantization_config, names of scales of activations and kv cache)
def kinds(block):
    static = compressed("tensor", dynamic=False)
    static["kv_cache_scheme"] = {**ACTIVATIONS, "dynamic": False, "strategy": "tensor"}
    modelopt = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"], "producer": {"name": "modelopt", "version": "0.33.0"},
                "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
                "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
                                              "weights": {"dynamic": False, "num_bits": 8, "type": "float"}}}}
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
    return {
        "fp8-block": ("block", "weight_scale_inv", torch.float32, fp8, []),
        "fp8-block-bf16": ("block", "weight_scale_inv", torch.bfloat16, {**fp8, "modules_to_not_convert": ["lm_head"]}, []),
        "fp8-tensor": ("tensor", "weight_scale", torch.float32, {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, ["input_scale"]),
        "compressed-tensor": ("one", "weight_scale", torch.float32, static, ["input_scale", "k_scale", "v_scale"]),
        "compressed-channel": ("row", "weight_scale", torch.bfloat16, compressed("channel"), []),
        "compressed-block": ("block", "weight_scale", torch.float16, compressed("block", block_structure=block), []),
        "fbgemm": ("row", "weight_scale", torch.float32, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}, ["input_scale_ub"]),
        "modelopt": ("tensor", "weight_scale", torch.float32, modelopt, ["input_scale", "k_proj.k_scale", "v_proj.v_scale"]),
    }


def spread(scale, shape, scales, block):
    """The scale of every element."""
    if scales != "block":
        return scale.reshape(-1, 1).expand(shape)
    return scale.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]


def quantise(w, scales, dtype, block):
    rows, cols = w.shape
    if scales == "block":
        down, across = -(-rows // block[0]), -(-cols // block[1])
        padded = torch.zeros(down * block[0], across * block[1])
        padded[:rows, :cols] = w
        amax = padded.view(down, block[0], across, block[1]).abs().amax((1, 3))
    elif scales == "row":
        amax = w.abs().amax(1, keepdim=True)
    else:
        amax = w.abs().amax().reshape([] if scales == "tensor" else [1])
    scale = (amax.clamp(min=1e-12) / MAX).to(dtype)
    return (w / spread(scale.float(), w.shape, scales, block)).clamp(-MAX, MAX).to(F8), scale


def libraries(q, scale, scales, config, block):
    """(who, numbers) of every library at hand that reads this kind."""
    if config["quant_method"] == "fp8" and (scales != "block" or (q.shape[0] % block[0] == 0 and q.shape[1] % block[1] == 0)):
        try:
            from transformers.integrations.finegrained_fp8 import Fp8Dequantize
            yield "transformers", Fp8Dequantize(None)._dequantize_one(q, scale if scale.dim() else scale.reshape(1, 1), output_dtype=torch.float32)
        except ImportError:
            pass
    if config["quant_method"] == "compressed-tensors":
        try:
            from compressed_tensors.quantization import QuantizationArgs
            from compressed_tensors.quantization.lifecycle.forward import dequantize
            yield "compressed-tensors", dequantize(q, scale.float(), args=QuantizationArgs(**config["config_groups"]["group_0"]["weights"]))
        except ImportError:
            pass


def make(kind, tensors, config, source, a):
    block, out = a.block, pathlib.Path(a.output)
    scales, name_of_scale, dtype, quantization, activations = kinds(block)[kind]
    stored, numbers, compared = {}, {}, {}
    for name, w in tensors.items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            stored[name] = w.to(torch.bfloat16)
            numbers[name] = stored[name].float()
            continue
        q, scale = quantise(w.float(), scales, dtype, block)
        stored[name], stored[f"{module}.{name_of_scale}"] = q, scale
        numbers[name] = q.float() * spread(scale.float(), w.shape, scales, block)
        for who, theirs in libraries(q, scale, scales, quantization, block) if a.libraries else []:
            if not torch.equal(theirs.float(), numbers[name]):
                sys.exit(f"{kind}: {name}: {who} dequantises to other numbers")
            compared[who] = compared.get(who, 0) + 1
        for extra in activations:
            attention = module.rpartition(".")[0]
            if "." in extra or extra.startswith(("k_", "v_")):
                if module.endswith("k_proj"):
                    stored[f"{attention}.{extra}"] = torch.tensor(0.5)
            else:
                stored[f"{module}.{extra}"] = torch.tensor([0.25])
    for directory, content, extra in [(out / kind, stored, {"quantization_config": quantization})] + [(out / f"{kind}-f32", numbers, {})] * a.dequantised:
        directory.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if file.is_file() and file.name != "config.json" and ".safetensors" not in file.name:
                shutil.copy(file, directory)
        save_file({k: v.contiguous() for k, v in content.items()}, directory / "model.safetensors", metadata={"format": "pt"})
        plain = copy.deepcopy(config)
        plain.update(extra, torch_dtype="bfloat16" if extra else "float32", dtype="bfloat16" if extra else "float32")
        (directory / "config.json").write_text(json.dumps(plain, indent=2) + "\n")
    said = "; ".join(f"{n} tensors are as {who} dequantises them" for who, n in compared.items())
    print(f"{out / kind}: {sum(v.dtype == F8 for v in stored.values())} tensors in e4m3" + (f"; {said}" if said else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--kind", action="append", choices=sorted(kinds([128, 128])))
    parser.add_argument("--block", type=int, nargs=2, default=[128, 128], metavar=("ROWS", "COLS"))
    parser.add_argument("--dequantised", action="store_true")
    parser.add_argument("--libraries", action="store_true")
    a = parser.parse_args()
    source = pathlib.Path(a.model)
    config = json.loads((source / "config.json").read_text())
    if config.get("quantization_config"):
        sys.exit(f"{source}: is quantised already")
    tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors.update(load_file(file))
    for kind in a.kind or kinds(a.block):
        make(kind, tensors, config, source, a)


if __name__ == "__main__":
    main()
