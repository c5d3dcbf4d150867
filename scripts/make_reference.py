#!/usr/bin/env python3
"""Make a reference case for `distill check` with transformers and PyTorch.

    scripts/make_reference.py TEACHER_DIR [STUDENT_DIR] -o CASE_DIR      models you have
    scripts/make_reference.py --random yarn -o CASE_DIR                  a tiny random model of one of the kinds below

Without STUDENT_DIR the student is the teacher with noise on its weights, a fifth of each tensor's spread: much less, and the losses are differences of
almost equal numbers, which fp32 cannot tell to 1e-5. The case holds copies of both models in fp32, so
make it from small models, or with --layers N, which keeps the first N. Everything is computed in fp32 on the CPU, attention "eager", the losses of the fp32 logits in double.
Needs torch, transformers and safetensors.
"""
import argparse, json, math, pathlib, sys

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = dict(vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, initializer_range=0.1)
RANDOM = {
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", dict(tie_word_embeddings=True)),
    "widths16": ("qwen2", dict(hidden_size=16, head_dim=16, intermediate_size=48)),      # multiples of 16, which is what a GPU multiplies in fp8, and no two of a layer equal
    "odd_vocab": ("qwen2", dict(vocab_size=397, intermediate_size=148)),
    "mqa": ("llama", dict(num_key_value_heads=1, num_attention_heads=8, head_dim=8)),
    "mha": ("llama", dict(num_key_value_heads=4)),
    "llama_bias": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama3": ("llama", dict(rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                                  original_max_position_embeddings=16))),
    "linear": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0))),
    "yarn": ("qwen2", dict(rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=128))),
    "qwen3": ("qwen3", dict(head_dim=32)),
    "qwen3_tied": ("qwen3", dict(head_dim=24, tie_word_embeddings=True, num_key_value_heads=1, rope_parameters=dict(
        rope_type="yarn", rope_theta=1e6, factor=2.0, original_max_position_embeddings=64, beta_fast=16.0, beta_slow=2.0))),
    "mistral": ("mistral", dict(head_dim=16, sliding_window=None)),
    "mistral_window": ("mistral", dict(head_dim=16, sliding_window=7)),
    "qwen2_window": ("qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
}


def random_model(kind, seed, small):
    model_type, extra = RANDOM[kind]
    size = {**SMALL, **(dict(vocab_size=131, hidden_size=32, intermediate_size=72) if small else {})}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**size, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **extra})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():                      # norms away from 1 and biases away from 0, or nothing tests them
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def load(path, layers):
    config = AutoConfig.from_pretrained(path)
    if getattr(config, "quantization_config", None):
        sys.exit(f"{path}: is quantised, which transformers cannot compute here; make a plain copy first: distill export with export.model={path}, export.dtype=f32 and export.path=DIR, and take DIR")
    if layers:
        config.num_hidden_layers = min(layers, config.num_hidden_layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32, attn_implementation="eager")


def kl_losses(student, teacher, mask, T, k):
    """Every loss as a function of the student's logits; means over mask = 1, times T^2. In double: a small KL is a difference of
    large logarithms, and the reference should not be the one that rounds."""
    lp, lq = (teacher.double() / T).log_softmax(-1), (student.double() / T).log_softmax(-1)
    p, q = lp.exp(), lq.exp()
    top_lp, top_ids = lp.topk(k, dim=-1)
    top_lq, top_p = lq.gather(-1, top_ids), top_lp.exp()
    P, Q = top_p.sum(-1), top_lq.exp().sum(-1)

    def mean(per_position):
        return per_position[mask].mean() * T * T

    def jsd(beta):
        lm = torch.logaddexp(lp + math.log(beta), lq + math.log(1 - beta))
        return mean(beta * (p * (lp - lm)).sum(-1) + (1 - beta) * (q * (lq - lm)).sum(-1))

    losses = {
        "forward_kl": mean((p * (lp - lq)).sum(-1)),
        "reverse_kl": mean((q * (lq - lp)).sum(-1)),
        "jsd_0.1": jsd(0.1), "jsd_0.5": jsd(0.5), "jsd_0.9": jsd(0.9),
        "topk_tail_kl": mean((top_p * (top_lp - top_lq)).sum(-1) + (1 - P) * ((1 - P).log() - (1 - Q).log())),
        "topk_renorm_kl": mean((top_p / P[..., None] * (top_lp - P[..., None].log() - top_lq)).sum(-1)),
    }
    return losses, top_lp, top_ids


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL_DIR", help="teacher, and optionally student")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--random", choices=sorted(RANDOM), help="make tiny random models instead")
    parser.add_argument("--small", action="store_true", help="with --random: small enough to be committed")
    parser.add_argument("--layers", type=int, default=0, help="keep only the first N layers")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--temperature", type=float, default=3.0)
    parser.add_argument("--topk", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    if bool(a.random) == bool(a.models) or len(a.models) > 2:
        sys.exit("give one or two MODEL_DIRs, or --random KIND")

    if a.random:
        teacher, student = (random_model(a.random, a.seed + i, a.small) for i in (0, 1))
    else:
        teacher, student = load(a.models[0], a.layers), load(a.models[-1], a.layers)
        if len(a.models) == 1:
            torch.manual_seed(a.seed)
            with torch.no_grad():
                for p in student.parameters():
                    p.add_(torch.randn_like(p) * 0.2 * p.float().std().nan_to_num(0.1))
    teacher.eval(), student.eval()
    out = pathlib.Path(a.output)
    teacher.save_pretrained(out / "teacher")
    student.save_pretrained(out / "student")

    generator = torch.Generator().manual_seed(a.seed)
    ids = torch.randint(0, teacher.config.vocab_size, (a.rows, a.length), generator=generator)
    mask = torch.rand(ids.shape, generator=generator) < 0.7
    T = a.temperature
    with torch.no_grad():
        teacher_logits = teacher(ids).logits

    tensors = {"ids": ids.int(), "mask": mask.to(torch.uint8), "teacher_logits": teacher_logits}
    logits = student(ids).logits.detach().requires_grad_()
    losses, top_lp, top_ids = kl_losses(logits, teacher_logits, mask, T, a.topk)
    for kind, loss in losses.items():
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
        tensors["dlogits." + kind] = grad[:1]
    tensors.update(student_logits=logits.detach(), topk_logprobs=top_lp.float(), topk_ids=top_ids.int())
    shifted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    adamw = dict(lr=1e-3, betas=[0.9, 0.95], eps=1e-8, weight_decay_2d=0.1, weight_decay_1d=0.0, clip=1.0)
    groups = [dict(params=[p for p in student.parameters() if p.dim() == d], weight_decay=adamw[f"weight_decay_{d}d"]) for d in (2, 1)]
    optimizer = torch.optim.AdamW(groups, lr=adamw["lr"], betas=tuple(adamw["betas"]), eps=adamw["eps"])
    trajectory, norms = [], []
    for step in range(a.steps):
        optimizer.zero_grad()
        loss = kl_losses(student(ids).logits, teacher_logits, mask, T, a.topk)[0]["forward_kl"]
        loss.backward()
        if step == 0:
            tensors.update({"grad." + name: p.grad.clone() for name, p in student.named_parameters()})
        norms.append(torch.nn.utils.clip_grad_norm_(student.parameters(), adamw["clip"]).item())
        trajectory.append(loss.item())
        optimizer.step()
    tensors.update({f"after{a.steps}." + name: p.detach() for name, p in student.named_parameters()})

    save_file({k: v.contiguous() for k, v in tensors.items()}, out / "reference.safetensors")
    reference = dict(temperature=T, topk=a.topk, losses={k: v.item() for k, v in losses.items()}, cross_entropy_shifted=shifted.item(), adamw=adamw,
                     trajectory_loss=trajectory, trajectory_grad_norm=norms, torch=torch.__version__)
    (out / "reference.json").write_text(json.dumps(reference, indent=1) + "\n")
    print(f"{out}: {sum(p.numel() for p in student.parameters())} parameters, {int(mask.sum())} supervised positions")


if __name__ == "__main__":
    main()
