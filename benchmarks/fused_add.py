"""The fused addition against memcpy and against plain torch, on the CPU or a GPU.

Bytes: bf16 stored, delta and merged are 6 an element; memcpy of the same bytes (3 in, 3 out) is
the floor. Correctness first: bits are compared with the reference before anything is timed.

    python benchmarks/fused_add.py [--elements 33554432] [--rounds 9]
"""

from __future__ import annotations

import argparse
import platform

import torch
from _harness import interleaved, quantiles, row, write

from enchtable_kernels import fused_add
from enchtable_kernels._addition import Addition
from enchtable_kernels.reference import fused_add_reference


def main() -> None:
    """Measure, print ratios, append rows to results/fused_add.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=2**25)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    generator = torch.Generator().manual_seed(0)
    stored, delta = (
        (torch.randn(options.elements, generator=generator) * scale).bfloat16().to(device)
        for scale in (0.02, 1e-3)
    )
    out, expected = torch.empty_like(stored), torch.empty_like(stored)
    addition = Addition(stored, delta, expected, 0.3)
    fused_add_reference(addition)
    fused_add(stored, delta, [0.3], out=out)
    if not torch.equal(out, expected):
        raise SystemExit("not bit-identical with the reference: no speed is reported")
    half = options.elements * 3 // 2
    source, target = (torch.empty(half, dtype=torch.bfloat16, device=device) for _ in range(2))

    def wait(_: object) -> None:
        if gpu:
            torch.cuda.synchronize()

    seconds = interleaved(
        {
            "memcpy": lambda: wait(target.copy_(source)),
            "fused_add": lambda: wait(fused_add(stored, delta, [0.3], out=out)),
            "torch reference": lambda: wait(fused_add_reference(addition)),
        },
        options.rounds,
    )
    name = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU"
    threads = "" if gpu else f", {torch.get_num_threads()} threads"
    print(f"{options.elements} elements, bf16, on {name}{threads}")
    floor = quantiles(seconds["memcpy"])[1]
    rows: list[dict[str, object]] = []
    for provider, values in seconds.items():
        p50 = quantiles(values)[1]
        speed = 6 * options.elements / p50 / 1e9
        print(f"{provider:16} {p50 * 1e3:8.2f} ms  {speed:8.1f} GB/s  {p50 / floor:6.2f}x memcpy")
        rows.append(row("fused_add", provider, options.elements, "bf16", values))
    print(f"rows appended to {write('fused_add', rows, name + threads)}")


if __name__ == "__main__":
    main()
