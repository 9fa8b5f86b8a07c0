"""What rounding to nearest and stochastically leaves of a small addition, in bf16.

Prints docs/method.md's table; the same on every machine: ``python -m benchmarks.rounding``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from enchtable_kernels import Effect, fused_add

RMS = (2e-6, 2e-5, 1e-4)
_SIGMA, _ELEMENTS, _KEY = 0.02, 2**22, 1


def lines() -> Iterator[str]:
    """Of a table in Markdown: normal weights and a normal delta in fp32, each drawn once."""
    generator = torch.Generator().manual_seed(0)
    stored = (torch.randn(_ELEMENTS, generator=generator) * _SIGMA).bfloat16()
    delta = torch.randn(_ELEMENTS, generator=generator)
    yield "| rms of c·S | rounding | retained share | cosine | relative error |"
    yield "| --- | --- | --- | --- | --- |"
    for rms in RMS:
        for rounding, key in (("nearest", None), ("stochastic", _KEY)):
            _, sums = fused_add(stored, delta, [rms], rounding_key=key)
            found = Effect.from_tensor(sums)
            values = found.retained_share, found.cosine, found.relative_error
            figures = " | ".join(f"{value:.2g}" for value in values)
            yield f"| {rms:.0e} | {rounding} | {figures} |".replace("e-0", "e-")


if __name__ == "__main__":
    print("\n".join(lines()))
