#!/usr/bin/env python3
"""How much rounding to fp8 changes the products of a model, by scheme: the measurement behind base/fp8.h and kernels/backend.h.

    scripts/fp8_schemes.py MODEL_DIR TEXT [POSITIONS]

MODEL_DIR: a Hugging Face directory; TEXT: a file it is run on, forward and backward (cross entropy). Of every matrix of every block it takes the input x, the weight w
and the gradient dy of the output, and compares  y = x w^T,  dx = dy w,  dw = dy^T x  of rounded factors with the products of the factors as they are: ||a - b|| / ||b||, the mean
over all matrices and, behind it, the worst. Needs torch and transformers.
"""
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


def scale_of(most, kind, power_of_two):
    """The scale that brings `most` to the largest number of the format, or, as a power of two, to at most that."""
    s = (most / LARGEST[kind]).clamp(min=2.0**-62)
    return torch.exp2(torch.ceil(torch.log2(s))) if power_of_two else s


def rounded(x, s, kind):
    return (x / s).clamp(-LARGEST[kind], LARGEST[kind]).to(kind).float() * s


def by_row(x, kind=E4M3, power_of_two=True):
    return rounded(x, scale_of(x.abs().amax(1, keepdim=True), kind, power_of_two), kind)


def by_tensor(x, kind=E4M3):
    return rounded(x, scale_of(x.abs().max(), kind, False), kind)


def by_block(x, rows, cols, kind=E4M3):
    """A scale for every rows x cols block, as checkpoints with weight_scale_inv have (128 x 128), and 1 x 128 for activations."""
    out = torch.empty_like(x)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], cols):
            b = x[i:i + rows, j:j + cols]
            most = b.abs().amax(1, keepdim=True) if rows == 1 else b.abs().max()
            out[i:i + rows, j:j + cols] = rounded(b, scale_of(most, kind, False), kind)
    return out


def row_scale(x):
    return scale_of(x.abs().amax(1, keepdim=True), E4M3, True)


def folded(dy, x):
    """dy^T x from rows with scales: a row of dy takes on its row of x's, and is rounded once more to one scale for all."""
    sx, sy = row_scale(x), row_scale(dy)
    xq = (x / sx).clamp(-448, 448).to(E4M3).float()
    f = sx * sy
    s = f.max()
    dyq = ((dy / sy).clamp(-448, 448).to(E4M3).float() * (f / s)).to(E4M3).float()
    return dyq.t() @ xq * s


def transposed_rows(w):
    """w as rounded by rows for the forward, rounded once more by columns for the backward."""
    return by_row(by_row(w).t().contiguous()).t()


SCHEMES = {
    "e4m3, a power of two per row; dw: folded (what distill does)":
        (lambda x, w: by_row(x) @ by_row(w).t(), lambda dy, w: by_row(dy) @ transposed_rows(w), folded),
    "e4m3, largest / 448 per row; dw: per column":
        (lambda x, w: by_row(x, E4M3, False) @ by_row(w, E4M3, False).t(), lambda dy, w: by_row(dy, E4M3, False) @ by_row(w.t().contiguous(), E4M3, False).t(),
         lambda dy, x: by_row(dy.t().contiguous(), E4M3, False) @ by_row(x.t().contiguous(), E4M3, False).t()),
    "e4m3, one scale per tensor":
        (lambda x, w: by_tensor(x) @ by_tensor(w).t(), lambda dy, w: by_tensor(dy) @ by_tensor(w), lambda dy, x: by_tensor(dy).t() @ by_tensor(x)),
    "e4m3, gradients e5m2, one scale per tensor":
        (lambda x, w: by_tensor(x) @ by_tensor(w).t(), lambda dy, w: by_tensor(dy, E5M2) @ by_tensor(w), lambda dy, x: by_tensor(dy, E5M2).t() @ by_tensor(x)),
    "e4m3, gradients e5m2, a power of two per row; dw: one scale":
        (lambda x, w: by_row(x) @ by_row(w).t(), lambda dy, w: by_row(dy, E5M2) @ transposed_rows(w), lambda dy, x: by_tensor(dy, E5M2).t() @ by_tensor(x)),
    "e4m3, 1 x 128 and 128 x 128 blocks":
        (lambda x, w: by_block(x, 1, 128) @ by_block(w, 128, 128).t(), lambda dy, w: by_block(dy, 1, 128) @ by_block(w, 128, 128),
         lambda dy, x: by_block(dy.t().contiguous(), 1, 128) @ by_block(x.t().contiguous(), 1, 128).t()),
}


def main():
    path, text, positions = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 2048
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(path)(open(text, encoding="utf-8", errors="replace").read(8 * positions), return_tensors="pt").input_ids[0, :positions]
    length = min(256, model.config.max_position_embeddings)
    rows = ids[:len(ids) // length * length].view(-1, length)
    seen = {}

    def watch(name, linear):
        def forward(_, inputs, output):
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            output.register_hook(lambda dy: seen.__setitem__(name, (x, linear.weight.detach(), dy.detach().reshape(-1, dy.shape[-1]))))
        linear.register_forward_hook(forward)

    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            watch(name, module)
    model(rows, labels=rows).loss.backward()
    print(f"{path}: {len(seen)} matrices, {rows.numel()} positions\n")
    error = lambda a, b: ((a - b).norm() / b.norm()).item()
    print(f"{'':62s}{'y':>16s}{'dx':>16s}{'dw':>16s}")
    for scheme, (forward, backward, weight) in SCHEMES.items():
        errors = torch.tensor([[error(forward(x, w), x @ w.t()), error(backward(dy, w), dy @ w), error(weight(dy, x), dy.t() @ x)] for x, w, dy in seen.values()]) * 100
        print(f"{scheme:62s}" + "".join(f"{m:8.2f} {t:5.1f} %" for m, t in zip(errors.mean(0), errors.amax(0))))


main()
