#!/usr/bin/env python3
"""Reads a dataset of logit shards with NumPy and h5py, following data/FORMAT.md and nothing else.

    scripts/read_shards.py DATASET [--row N]

Checks the manifest, the journal's chain, every file's size and SHA-256, every row's CRC-32C and the mass of every supervised
position at every temperature, and prints a summary; --row prints one row's tokens and the teacher's first choices.
Exits 1 with one sentence when something is wrong.
"""
import argparse
import hashlib
import json
import os
import sys

import h5py
import numpy as np

FIELDS = ["tokens", "loss_mask", "document", "lse", "tail", "entropy", "label_logprob", "head_ids_low", "head_ids_high", "head_logprob", "logits"]


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


def crc32c(data):
    return int(crc32c_rows(np.frombuffer(data, np.uint8)[None])[0])


def need(condition, message):
    if not condition:
        sys.exit(f"read_shards: {message}")


def read_manifest(path):
    data = open(path, "rb").read()
    body, found, check = data.rpartition(b',\n  "check": "')
    need(found and check == b'%08x"\n}\n' % crc32c(body), f"{path}: check does not match")
    manifest = json.loads(data)
    need(manifest["format"] == "distill-logit-shards" and manifest["version"] == 1, f"{path}: not version 1 of the format")
    need(manifest["kind"] in ("topk", "full"), f"{path}: kind {manifest['kind']}")
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


def head_ids(file):
    low, high = file["head_ids_low"][:].astype(np.uint32), file["head_ids_high"][:]
    i = np.arange(low.shape[2])
    return low | ((high[:, :, i // 4] >> (2 * (i % 4)).astype(np.uint8)) & 3).astype(np.uint32) << 16


def read_shard(path, manifest, dataset_id, entry):
    data = open(path, "rb").read()
    need(len(data) == entry["bytes"], f"{path}: {len(data)} bytes, the journal says {entry['bytes']}")
    need(hashlib.sha256(data).hexdigest() == entry["sha256"], f"{path}: SHA-256")
    R, L, K, V, nT = entry["rows"], manifest["row_length"], manifest["k"], manifest["valid_vocab"], len(manifest["temperatures"])
    shapes = {"tokens": ("u4", ()), "loss_mask": ("u1", ()), "document": ("u2", ()), "lse": ("f4", (nT,)), "entropy": ("f2", ()), "label_logprob": ("f2", ())}
    if manifest["kind"] == "topk":
        shapes |= {"tail": ("f4", (nT,)), "head_ids_low": ("u2", (K,)), "head_ids_high": ("u1", ((K + 3) // 4,)), "head_logprob": ("f2", (K,))}
    else:
        shapes |= {"logits": ("f2", (V,))}
    with h5py.File(path, "r") as file:
        need(file.attrs["dataset"].decode() == dataset_id and file.attrs["shard"] == entry["shard"], f"{path}: belongs elsewhere")
        need(file.attrs["format"].decode() == manifest["format"] and file.attrs["version"] == 1 and file.attrs["kind"].decode() == manifest["kind"], f"{path}: attributes")
        need(file.attrs["first_row"] == entry["shard"] * manifest["rows_per_shard"] and file.attrs["rows"] == R, f"{path}: rows")
        need(set(file) == set(shapes) | {"row_crc"}, f"{path}: datasets {sorted(file)}")
        for name, (dtype, tail) in shapes.items():
            need(file[name].dtype == np.dtype("<" + dtype) and file[name].shape == (R, L) + tail, f"{path}: {name} is {file[name].dtype} {file[name].shape}")
            need(file[name].chunks is None and file[name].compression is None, f"{path}: {name} is not contiguous")
        arrays = {name: file[name][:] for name in FIELDS if name in shapes}
        stored = file["row_crc"][:]
        if "head_ids_low" in arrays:
            arrays["head_ids"] = head_ids(file)
    number = (np.arange(R, dtype="<u8") + entry["shard"] * manifest["rows_per_shard"])[:, None].view(np.uint8)
    raw = [np.ascontiguousarray(arrays[name]).reshape(R, -1).view(np.uint8).reshape(R, -1) for name in FIELDS if name in arrays]
    bad = np.flatnonzero(crc32c_rows(np.concatenate([number] + raw, axis=1)) != stored)
    need(len(bad) == 0, f"{path}: row {bad[:1]}: CRC")
    return arrays


def check_ranges(path, manifest, a):
    """Returns, per temperature, the largest |mass - 1| over the supervised positions."""
    V, on, T = manifest["valid_vocab"], a["loss_mask"] == 1, np.float32(manifest["temperatures"]).astype(np.float64)
    need((a["tokens"] < V).all() and (a["loss_mask"] <= 1).all(), f"{path}: tokens or loss_mask")
    need(((a["document"][:, 1:] == a["document"][:, :-1]) | ~on[:, :-1]).all() and not on[:, -1].any(), f"{path}: a target in another document")
    lse = a["lse"].astype(np.float64)
    if manifest["kind"] == "full":
        logits = a["logits"].astype(np.float64)
        masses = [np.exp(logits * T[0] / t - lse[..., i, None]).sum(-1) for i, t in enumerate(T)]
    else:
        logp = a["head_logprob"].astype(np.float64)
        need((a["head_ids"] < V).all() and (np.diff(logp, axis=-1) <= 0).all(), f"{path}: head")
        need((np.diff(np.sort(a["head_ids"][on], axis=-1).astype(np.int64), axis=-1) > 0).all(), f"{path}: an id twice in a head")
        masses = [np.exp(T[0] / t * (logp + lse[..., :1]) - lse[..., i, None]).sum(-1) + np.exp(a["tail"][..., i].astype(np.float64)) for i, t in enumerate(T)]
    return [float(np.abs(mass[on] - 1).max(initial=0)) for mass in masses]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--row", type=int)
    options = parser.parse_args()
    manifest, dataset_id = read_manifest(os.path.join(options.dataset, "manifest.json"))
    entries = read_journal(os.path.join(options.dataset, "journal.jsonl"), dataset_id)
    shards = -(-manifest["rows"] // manifest["rows_per_shard"])
    worst, targets = np.zeros(len(manifest["temperatures"])), 0
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
            print(text)
    tokens, size = sum(e["tokens"] for e in entries.values()), sum(e["bytes"] for e in entries.values())
    print(f"dataset {dataset_id[:16]}: kind {manifest['kind']}, {len(entries)} of {shards} shards, {tokens} tokens, {targets} targets, {size / max(tokens, 1):.1f} bytes/token")
    print("largest |mass - 1|: " + ", ".join(f"{w:.2e} at T = {t:g}" for w, t in zip(worst, manifest["temperatures"])))


if __name__ == "__main__":
    main()
