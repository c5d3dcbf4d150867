#!/usr/bin/env python3
"""Reads a dataset of logit shards with NumPy and h5py, following data/FORMAT.md and nothing else.

    scripts/read_shards.py DATASET [--row N] [--student LOGITS.npy]

Checks the manifest, the journal's chain, every file's size and SHA-256, every row's CRC-32C, the draws, and the mass of every supervised
position at every temperature, and prints a summary; --row prints one row's tokens and the teacher's first choices.
--student LOGITS.npy, a student's logits [rows, L, at least V] for the first rows of the dataset, prints the losses distill train would report for them:
the mean over the supervised positions of T^2 D(p, q), for every policy that the kind allows at every temperature it lists.
Exits 1 with one sentence when something is wrong.
"""
import argparse
import hashlib
import json
import os
import sys

import h5py
import numpy as np

FIELDS = ["tokens", "loss_mask", "document", "lse", "tail", "entropy", "label_logprob", "head_ids_low", "head_ids_high", "head_logprob",
          "tail_ids_low", "tail_ids_high", "tail_count", "tail_logprob", "sample_offset", "sample_ids_low", "sample_ids_high", "sample_count", "logits"]
RAGGED = {"sample_ids_low": 1, "sample_ids_high": 4, "sample_count": 1}          # entries per element


def crc_table():
    c = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        c = (c >> 1) ^ np.where(c & 1, np.uint32(0x82F63B78), np.uint32(0))
    return c


TABLE = crc_table()


def crc32c_rows(rows):
    """CRC-32C of every row of a [R, bytes] array, all rows at once: a byte at a time over R rows."""
    crc = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for column in np.ascontiguousarray(rows.T):
        crc = TABLE[(crc ^ column) & 255] ^ (crc >> np.uint32(8))
    return ~crc


def crc32c(data, table=TABLE.tolist()):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def need(condition, message):
    if not condition:
        sys.exit(f"read_shards: {message}")


def read_manifest(path):
    data = open(path, "rb").read()
    body, found, check = data.rpartition(b',\n  "check": "')
    need(found and check == b'%08x"\n}\n' % crc32c(body), f"{path}: check does not match")
    manifest = json.loads(data)
    need(manifest["format"] == "distill-logit-shards" and manifest["version"] == 1, f"{path}: not version 1 of the format")
    need(manifest["kind"] in ("hybrid", "topk", "sampled", "full"), f"{path}: kind {manifest['kind']}")
    return manifest, hashlib.sha256(data).hexdigest()


def read_journal(path, dataset_id):
    entries, prev = {}, dataset_id
    for number, line in enumerate(open(path, "rb").read().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        entry = json.loads(line)
        need(entry["crc"] == "%08x" % crc32c(line.rpartition(b',"crc":')[0]), f"{path}: line {number}: crc")
        need(entry["prev"] == prev, f"{path}: line {number} does not follow the one before")
        need(entries.get(entry["shard"], entry)["sha256"] == entry["sha256"], f"{path}: shard {entry['shard']} twice")
        entries[entry["shard"]] = entry
        prev = hashlib.sha256(line).hexdigest()
    return entries


def unpack_ids(low, high):
    i = np.arange(low.shape[-1])
    return low.astype(np.uint32) | ((high[..., i // 4] >> (2 * (i % 4)).astype(np.uint8)) & 3).astype(np.uint32) << 16


def spread_samples(path, a, N):
    """The ragged entries of kind sampled as [R, L, N] ids and counts, as kind hybrid has them; checks what ties rows together."""
    offset = a["sample_offset"].astype(np.int64)
    ids, number = unpack_ids(a["sample_ids_low"], a["sample_ids_high"]), np.diff(offset, axis=1)
    need((number >= 0).all() and (number <= N).all(), f"{path}: sample_offset does not ascend by at most {N}")
    begin, end = offset[:, 0], -(-offset[:, -1] // 4) * 4
    need(begin[0] == 0 and (begin[1:] == end[:-1]).all() and len(ids) == max(end[-1], 4), f"{path}: rows do not follow each other")
    slot = np.arange(N)
    used = slot < number[..., None]
    at = np.where(used, offset[:, :-1, None] + slot, 0)
    rest = np.ones(len(ids), bool)
    rest[at[used]] = False
    need(not ids[rest].any() and not a["sample_count"][rest].any() and (a["sample_count"][~rest] > 0).all(), f"{path}: entries between rows are not 0")
    return np.where(used, ids[at], 0).astype(np.uint32), np.where(used, a["sample_count"][at], 0).astype(np.uint8)


def read_shard(path, manifest, dataset_id, entry):
    data = open(path, "rb").read()
    need(len(data) == entry["bytes"], f"{path}: {len(data)} bytes, the journal says {entry['bytes']}")
    need(hashlib.sha256(data).hexdigest() == entry["sha256"], f"{path}: SHA-256")
    R, L, K, V, nT = entry["rows"], manifest["row_length"], manifest["k"], manifest["valid_vocab"], len(manifest["temperatures"])
    shapes = {"tokens": ("u4", ()), "loss_mask": ("u1", ()), "document": ("u2", ()), "lse": ("f4", (nT,)), "entropy": ("f2", ()), "label_logprob": ("f2", ())}
    kind, m, N = manifest["kind"], manifest.get("m", 0), manifest.get("n", 0)
    if kind in ("topk", "hybrid"):
        shapes |= {"tail": ("f4", (nT,)), "head_ids_low": ("u2", (K,)), "head_ids_high": ("u1", ((K + 3) // 4,)), "head_logprob": ("f2", (K,))}
    if kind == "hybrid":
        shapes |= {"tail_ids_low": ("u2", (m,)), "tail_ids_high": ("u1", ((m + 3) // 4,)), "tail_count": ("u1", (m,)), "tail_logprob": ("f2", (m,))}
    if kind == "sampled":
        shapes |= {"sample_offset": ("u4", (L + 1,)), "sample_ids_low": ("u2", None), "sample_ids_high": ("u1", None), "sample_count": ("u1", None)}
    if kind == "full":
        shapes |= {"logits": ("f2", (V,))}
    with h5py.File(path, "r") as file:
        need(file.attrs["dataset"].decode() == dataset_id and file.attrs["shard"] == entry["shard"], f"{path}: belongs elsewhere")
        need(file.attrs["format"].decode() == manifest["format"] and file.attrs["version"] == 1 and file.attrs["kind"].decode() == manifest["kind"], f"{path}: attributes")
        need(file.attrs["first_row"] == entry["shard"] * manifest["rows_per_shard"] and file.attrs["rows"] == R, f"{path}: rows")
        need(set(file) == set(shapes) | {"row_crc"}, f"{path}: datasets {sorted(file)}")
        for name, (dtype, tail) in shapes.items():
            shape = (file["sample_count"].shape[0] // RAGGED[name],) if name in RAGGED else (R,) + tail if name == "sample_offset" else (R, L) + tail
            need(file[name].dtype == np.dtype("<" + dtype) and file[name].shape == shape, f"{path}: {name} is {file[name].dtype} {file[name].shape}")
            need(file[name].chunks is None and file[name].compression is None, f"{path}: {name} is not contiguous")
        arrays = {name: file[name][:] for name in FIELDS if name in shapes}
        stored = file["row_crc"][:]
    number = (np.arange(R, dtype="<u8") + entry["shard"] * manifest["rows_per_shard"])[:, None].view(np.uint8)
    if kind == "sampled":                          # rows of different lengths: one at a time
        bad = []
        for r in range(R):
            begin, end = int(arrays["sample_offset"][r, 0]), -(-int(arrays["sample_offset"][r, -1]) // 4) * 4
            data = number[r].tobytes() + b"".join((arrays[f][begin // RAGGED[f]:end // RAGGED[f]] if f in RAGGED else arrays[f][r]).tobytes() for f in FIELDS if f in arrays)
            bad += [r] if crc32c(data) != stored[r] else []
    else:
        raw = [np.ascontiguousarray(arrays[name]).reshape(R, -1).view(np.uint8).reshape(R, -1) for name in FIELDS if name in arrays]
        bad = np.flatnonzero(crc32c_rows(np.concatenate([number] + raw, axis=1)) != stored)
    need(len(bad) == 0, f"{path}: row {bad[:1]}: CRC")
    if "head_logprob" in arrays:
        arrays["head_ids"] = unpack_ids(arrays["head_ids_low"], arrays["head_ids_high"])
    if kind == "hybrid":
        arrays["draw_ids"], arrays["draw_count"] = unpack_ids(arrays["tail_ids_low"], arrays["tail_ids_high"]), arrays["tail_count"]
    if kind == "sampled":
        arrays["draw_ids"], arrays["draw_count"] = spread_samples(path, arrays, N)
    return arrays


def check_draws(path, manifest, a):
    D, on = manifest.get("m", manifest.get("n")), a["loss_mask"] == 1
    ids, count = a["draw_ids"].astype(np.int64), a["draw_count"].astype(np.int64)
    used = count > 0
    need((ids < manifest["valid_vocab"]).all() and not ids[~used].any() and (used[..., :-1] >= used[..., 1:]).all(), f"{path}: ids or slots of draws")
    need((np.diff(ids, axis=-1) > 0)[used[..., 1:]].all(), f"{path}: drawn ids do not ascend")
    nothing = np.isneginf(a["tail"][..., 0]) if "tail" in a else np.zeros_like(on)
    need((count.sum(-1) == np.where(nothing, 0, D))[on].all(), f"{path}: counts do not add up to {D}")
    if "head_ids" in a:
        both = (ids[..., :, None] == a["head_ids"].astype(np.int64)[..., None, :]).any(-1)
        need(not (both & used)[on].any(), f"{path}: a drawn id is in the head")
        need(not a["tail_logprob"].astype(np.float64)[~used].any() and (a["tail_logprob"].astype(np.float64) <= 2.0**-10).all(), f"{path}: log-probabilities of draws")


def check_ranges(path, manifest, a):
    """Returns, per temperature, the largest |mass - 1| over the supervised positions."""
    V, on, T = manifest["valid_vocab"], a["loss_mask"] == 1, np.float32(manifest["temperatures"]).astype(np.float64)
    need((a["tokens"] < V).all() and (a["loss_mask"] <= 1).all(), f"{path}: tokens or loss_mask")
    need(((a["document"][:, 1:] == a["document"][:, :-1]) | ~on[:, :-1]).all() and not on[:, -1].any(), f"{path}: a target in another document")
    lse = a["lse"].astype(np.float64)
    if "draw_ids" in a:
        check_draws(path, manifest, a)
    if manifest["kind"] == "sampled":
        masses = [np.ones_like(lse[..., 0])]
    elif manifest["kind"] == "full":
        logits = a["logits"].astype(np.float64)
        masses = [np.exp(logits * T[0] / t - lse[..., i, None]).sum(-1) for i, t in enumerate(T)]
    else:
        logp = a["head_logprob"].astype(np.float64)
        need((a["head_ids"] < V).all() and (np.diff(logp, axis=-1) <= 0).all(), f"{path}: head")
        need((np.diff(np.sort(a["head_ids"][on], axis=-1).astype(np.int64), axis=-1) > 0).all(), f"{path}: an id twice in a head")
        masses = [np.exp(T[0] / t * (logp + lse[..., :1]) - lse[..., i, None]).sum(-1) + np.exp(a["tail"][..., i].astype(np.float64)) for i, t in enumerate(T)]
    return [float(np.abs(mass[on] - 1).max(initial=0)) for mass in masses]


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def losses(manifest, a, row, z):
    """{(policy, T): T^2 D(p, q) of every position} of one row, z being the student's logits [L, V]."""
    T0, kind, out = float(np.float32(manifest["temperatures"][0])), manifest["kind"], {}
    lse = a["lse"][row].astype(np.float64)
    for i, T in enumerate(np.float32(manifest["temperatures"]).astype(np.float64)):
        logq = log_softmax(z / T)
        at_T = lambda logp: np.minimum(T0 / T * (logp + lse[:, :1]) - lse[:, i:i + 1], 0)
        of = lambda ids: np.take_along_axis(logq, ids.astype(np.int64), -1)
        if kind == "full":
            logp = log_softmax(a["logits"][row].astype(np.float64) * T0 / T)
            out["unbiased", T] = (np.exp(logp) * (logp - logq)).sum(-1)
        if kind == "sampled":
            w = a["draw_count"][row] / manifest["n"]
            out["unbiased", T] = (w * (-a["entropy"][row].astype(np.float64)[:, None] - of(a["draw_ids"][row]))).sum(-1)
        if kind in ("topk", "hybrid"):
            ids, logp, logr = a["head_ids"][row], at_T(a["head_logprob"][row].astype(np.float64)), np.minimum(a["tail"][row, :, i].astype(np.float64), 0)
            p, difference = np.exp(logp), logp - of(ids)
            outside = np.exp(logq)
            np.put_along_axis(outside, ids.astype(np.int64), 0, -1)
            with np.errstate(divide="ignore", invalid="ignore"):
                rest = np.where(np.isneginf(logr), 0, np.exp(logr) * (logr - np.log(outside.sum(-1))))
            head, P = (p * difference).sum(-1), p.sum(-1)
            out["bucket", T], out["drop", T], out["renormalise", T] = head + rest, head, head / P - np.log(P)
        if kind == "hybrid":
            count, logp0 = a["draw_count"][row], a["tail_logprob"][row].astype(np.float64)
            logp_T = T0 / T * (logp0 + lse[:, :1]) - lse[:, i:i + 1]
            with np.errstate(divide="ignore"):
                w = np.exp(np.log(count / manifest["m"]) + a["tail"][row, :, :1] + logp_T - logp0)
            out["unbiased", T] = head + (w * (np.minimum(logp_T, 0) - of(a["draw_ids"][row]))).sum(-1)
    return {(policy, T): T * T * loss for (policy, T), loss in out.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--row", type=int)
    parser.add_argument("--student", metavar="LOGITS.npy")
    options = parser.parse_args()
    manifest, dataset_id = read_manifest(os.path.join(options.dataset, "manifest.json"))
    entries = read_journal(os.path.join(options.dataset, "journal.jsonl"), dataset_id)
    shards = -(-manifest["rows"] // manifest["rows_per_shard"])
    worst, targets = np.zeros(len(manifest["temperatures"])), 0
    student, sums, positions = np.load(options.student, mmap_mode="r") if options.student else [], {}, 0
    need(not options.student or (student.ndim == 3 and student.shape[1] == manifest["row_length"] and student.shape[2] >= manifest["valid_vocab"]),
         f"{options.student}: not [rows, {manifest['row_length']}, {manifest['valid_vocab']} or more]")
    for shard, entry in sorted(entries.items()):
        path = os.path.join(options.dataset, "shards", "shard-%06d.h5" % shard)
        arrays = read_shard(path, manifest, dataset_id, entry)
        need(arrays["loss_mask"].sum() == entry["targets"] and arrays["tokens"].size == entry["tokens"], f"{path}: counts")
        worst = np.maximum(worst, check_ranges(path, manifest, arrays))
        targets += entry["targets"]
        row = -1 if options.row is None else options.row - shard * manifest["rows_per_shard"]
        for t in range(manifest["row_length"]) if 0 <= row < entry["rows"] else []:
            text = "%5d doc %d token %6d mask %d" % (t, arrays["document"][row, t], arrays["tokens"][row, t], arrays["loss_mask"][row, t])
            if "head_ids" in arrays:
                text += "  " + " ".join("%d:%.3f" % pair for pair in zip(arrays["head_ids"][row, t, :4], np.exp(arrays["head_logprob"][row, t, :4].astype(float))))
            if "draw_ids" in arrays:
                text += "  drawn " + " ".join("%dx%d" % pair for pair in zip(arrays["draw_ids"][row, t], arrays["draw_count"][row, t]) if pair[1])
            print(text)
        first = shard * manifest["rows_per_shard"]
        for r in range(min(entry["rows"], max(len(student) - first, 0))):
            on = arrays["loss_mask"][r] == 1
            positions += int(on.sum())
            for key, loss in losses(manifest, arrays, r, student[first + r, :, :manifest["valid_vocab"]].astype(np.float64)).items():
                sums[key] = sums.get(key, 0) + loss[on].sum()
    tokens, size = sum(e["tokens"] for e in entries.values()), sum(e["bytes"] for e in entries.values())
    print(f"dataset {dataset_id[:16]}: kind {manifest['kind']}, {len(entries)} of {shards} shards, {tokens} tokens, {targets} targets, {size / max(tokens, 1):.1f} bytes/token")
    if manifest["kind"] != "sampled":
        print("largest |mass - 1|: " + ", ".join(f"{w:.2e} at T = {t:g}" for w, t in zip(worst, manifest["temperatures"])))
    for (policy, T), total in sorted(sums.items()):
        print(f"kd {policy} T = {T:g}: {total / max(positions, 1):.9g} over {positions} positions")


if __name__ == "__main__":
    main()
