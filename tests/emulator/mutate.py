#!/usr/bin/env python3
"""Breaks kernels, one at a time, and expects a test to fail: mutate.py BUILD_EMULATE [OP...], by way of scripts/emulate.sh --mutate [OP...]

Every line of the table takes something out of a kernel that a device would miss only sometimes, or only in what lies behind a buffer. The translated source is changed where it lies in
the build directory, and made again afterwards, so that nothing outside that directory changes. Exit code 0 when every mutant was caught and every test passes without them.
"""
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple


class Mutation(NamedTuple):
    what: str
    build: str          # address or race
    op: str             # the source, and its test where no other is named
    old: str            # its first occurrence is meant
    new: str
    test: str = ""
    tests: str = "bf16"


MUTATIONS = [
    Mutation("the link kernel reads its tile before all have written it", "race", "embed",
             "__syncthreads();\n        #pragma unroll 16", "\n        #pragma unroll 16"),
    Mutation("keys are multiplied by a query that is not all there yet", "race", "attention",
             "query[d] = to_float(q[d]);\n    __syncthreads();", "query[d] = to_float(q[d]);\n"),
    Mutation("bits of the head are set without an atomic", "race", "sample_targets",
             "atomicOr(&head[id >> 5], 1u << (id & 31));", "head[id >> 5] |= 1u << (id & 31);"),
    Mutation("the floor is read before the warp that looks for it has written it", "race", "teacher_targets",
             "    __syncthreads();\n    float reached", "    float reached"),
    Mutation("a logit at the floor is neither summed nor listed", "address", "teacher_targets", "(unsigned)(t[i] >= reached)", "(unsigned)(t[i] > reached)"),
    Mutation("one element too many is written", "address", "embed", "if (c >= C) return;", "if (c > C) return;"),
    Mutation("one word too many of dynamic shared memory is cleared", "address", "sample_targets", "i < words;", "i <= words;"),
    Mutation("a row is used before its asynchronous copies have arrived", "address", "rmsnorm", "wait_for_all_but<RING - 1>();", "wait_for_all_but<RING>();"),
    Mutation("a barrier for half of the block", "address", "adamw",
             "    __syncthreads();\n    float scale", "    if (threadIdx.x < THREADS / 2) __syncthreads();\n    float scale"),
    Mutation("two bytes of a transposed word are exchanged", "address", "fp8", "__byte_perm(low01, low23, 0x7632)", "__byte_perm(low01, low23, 0x6732)"),
    Mutation("the scales of a tile's rows are read before they are there", "race", "fp8", ": 1;\n        __syncthreads();", ": 1;"),
    Mutation("a row that waits is not rounded when the next one comes", "address", "rmsnorm", "if (n != blockIdx.x) round_waiting(n - gridDim.x, most);", "", "fp8", "fused_bf16"),
]
COMPLAINT = re.compile(rb"emulator: .*|ERROR: AddressSanitizer: .*|runtime error: .*|.* is off by .*|.* is \S+, not \S+|.*was overwritten.*")
ENVIRONMENT = {**os.environ, "OPS_CASES": os.environ.get("OPS_CASES", "6"), "DISTILL_EMULATE_GUARD": "256"}


def build(directory: pathlib.Path, test: str) -> None:
    made = subprocess.run(["ninja", "-C", directory, f"tests/test_kernels_{test}"], capture_output=True, text=True)
    if made.returncode:
        sys.exit(f"mutate.py: {test} does not build:\n{made.stdout[-3000:]}")


def run(directory: pathlib.Path, test: str, tests: str) -> subprocess.CompletedProcess:
    return subprocess.run([directory / f"tests/test_kernels_{test}", "--jobs", "1", "--filter", f"gpu/{tests}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT, timeout=600)


def caught(m: Mutation, builds: pathlib.Path) -> bool:
    directory, test = builds / m.build, m.test or m.op
    build(directory, test)
    if run(directory, test, m.tests).returncode:
        print(f"FAILED   {test}: the test fails without a mutation")
        return False
    source = directory / "tests/emulator" / f"{m.op}.cpp"
    text = source.read_text()
    if m.old not in text:
        print(f"FAILED   {m.op}: {m.what}: the kernel no longer has this text; the table wants another")
        return False
    try:
        source.write_text(text.replace(m.old, m.new, 1))
        build(directory, test)
        outcome = run(directory, test, m.tests)
    finally:
        source.unlink()
        build(directory, test)
    complaint = COMPLAINT.search(outcome.stdout)
    print(f"{'caught ' if outcome.returncode else 'MISSED '}  {m.op}: {m.what}\n         {complaint[0].decode(errors='replace')[:200] if complaint else ''}", flush=True)
    return outcome.returncode != 0


def main() -> None:
    builds, ops = pathlib.Path(sys.argv[1]), sys.argv[2:]
    found = [caught(m, builds) for m in MUTATIONS if not ops or m.op in ops]
    print(f"{sum(found)} of {len(found)} mutants caught")
    sys.exit(0 if all(found) else 1)


main()
