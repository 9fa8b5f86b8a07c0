"""What the fused addition is asked to add, and how others would: shared by CPU and CUDA."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import NotVerified
from enchtable_kernels import fused_add, pack_keep, scales_per_row
from enchtable_kernels._addition import Addition
from enchtable_kernels.reference import fused_add_reference

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "int8"}
_STORED = (torch.bfloat16, torch.float16, torch.float32)
#: A matrix's usual row, of whole blocks of scales; and one whose last block is shorter.
_ROW, _RAGGED_ROW = 4096, 4095
_COEFFICIENT = 0.3
_KEY = 0x9E3779B97F4A7C15
#: Around what the paths treat apart: one element, a block, a thread's least share.
_VERIFIED = (1, 63, 2049, 4096 * 3 + 1, 2**20 + 5)
_WHOLE_BYTES = 2**18


@dataclass(frozen=True)
class Variant:
    """What a model, a vector and a plan can ask for; each is a kernel of its own on a GPU."""

    stored: torch.dtype = torch.bfloat16
    delta: torch.dtype = torch.bfloat16
    ragged: bool = False
    keep: bool = False
    stochastic: bool = False

    def __str__(self) -> str:
        """Of rows and tables."""
        more = {"ragged": self.ragged, "masked": self.keep, "stochastic": self.stochastic}
        words = [name for name, wanted in more.items() if wanted]
        return ", ".join([f"{_SHORT[self.stored]} + {_SHORT[self.delta]}", *words])

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return _SHORT[self.stored]

    @property
    def bytes_an_element(self) -> float:
        """Read and written, once each."""
        scales = 4 / 64 if self.delta == torch.int8 else 0
        return 2 * self.stored.itemsize + self.delta.itemsize + scales + self.keep / 8

    def addition(self, elements: int, device: str) -> Addition:
        """Random weights and deltas."""
        generator = torch.Generator(device).manual_seed(0)

        def noise(scale: float) -> torch.Tensor:
            return torch.randn(elements, generator=generator, device=device).mul_(scale)

        stored = noise(0.02).to(self.stored)
        made = Addition(stored, noise(1e-3).to(_STORED[0]), torch.empty_like(stored), _COEFFICIENT)
        if self.delta == torch.int8:
            row = min(_RAGGED_ROW if self.ragged else _ROW, elements)
            row = row if elements % row == 0 else elements
            whole = torch.randint(
                -127, 128, (elements,), generator=generator, device=device, dtype=torch.int8
            )
            count = elements // row * scales_per_row(row)
            scales = torch.rand(count, generator=generator, device=device).mul_(1e-5)
            made = dataclasses.replace(made, delta=whole, scales=scales, row_length=row)
        elif self.delta != made.delta.dtype:
            made = dataclasses.replace(made, delta=noise(1e-3).to(self.delta))
        if self.keep:
            chosen = torch.rand(elements, generator=generator, device=device) < 0.5
            made = dataclasses.replace(made, keep_bits=pack_keep(chosen))
        return dataclasses.replace(made, rounding_key=_KEY if self.stochastic else None)

    def elements(self, stored_bytes: int) -> int:
        """So many that the weights have about that size, in whole rows."""
        row = _RAGGED_ROW if self.ragged else _ROW
        return max(1, stored_bytes // self.stored.itemsize // row) * row


def variants() -> Iterator[Variant]:
    """All 32."""
    deltas = (
        (torch.bfloat16, False),
        (torch.float32, False),
        (torch.int8, False),
        (torch.int8, True),
    )
    for stored, (delta, ragged), keep in itertools.product(_STORED, deltas, (False, True)):
        for stochastic in (False, True) if stored == torch.bfloat16 else (False,):
            yield Variant(stored, delta, ragged, keep, stochastic)


def ours(addition: Addition) -> torch.Tensor:
    """The fused addition, through its one entry point."""
    rows = addition.stored.numel() // addition.row_length
    shape = (rows, addition.row_length) if addition.scales is not None else (-1,)
    stored, delta, out = (
        tensor.view(shape) for tensor in (addition.stored, addition.delta, addition.out)
    )
    scales = None if addition.scales is None else addition.scales.view(rows, -1)
    merged, _ = fused_add(
        stored, delta, [addition.coefficient], scales=scales, keep_bits=addition.keep_bits,
        rounding_key=addition.rounding_key, out=out,
    )  # fmt: skip
    return merged


def verify_variants(wanted: Sequence[Variant], device: str) -> None:
    """Every bit is the reference's, at sizes around those that are treated apart.

    Raises:
        NotVerified: One is not.
    """
    # Whole rows last: only they are whole blocks of scales.
    sizes = [(one, size) for one in wanted for size in (*_VERIFIED, one.elements(_WHOLE_BYTES))]
    for variant, elements in sizes:
        addition = variant.addition(elements, device)
        on_cpu: dict[str, Any] = {
            field.name: value.cpu()
            for field in dataclasses.fields(addition)
            if isinstance(value := getattr(addition, field.name), torch.Tensor)
        }
        expected = dataclasses.replace(
            addition, **{**on_cpu, "out": torch.empty(elements, dtype=variant.stored)}
        )
        fused_add_reference(expected)
        addition.out.fill_(float("nan"))
        merged = ours(addition).cpu().view(-1)
        bits = torch.int32 if variant.stored.itemsize == 4 else torch.int16
        wrong = int((merged.view(bits) != expected.out.view(bits)).sum())
        if wrong:
            raise NotVerified(
                f"fused addition on {device}, {variant}, {elements} elements",
                expected="the reference's bits",
                got=f"{wrong} elements with others",
                fix="No speed is reported.",
            )
