"""A few seconds of fuzzing; and the fuzzer finds what it is for."""

import pytest
from fuzz import fuzzer

from enchtable_vllm.vector import Delta


def unverified(self, name):
    return Delta(*(self._files.read(held.name) for held in self.tensors[name].stored(name)))


def test_nothing_is_found(tmp_path):
    outcome = fuzzer.fuzz(8.0, 0, tmp_path)
    assert outcome.findings == []
    assert outcome.executions > 100
    assert {kind.split(":")[0] for kind in outcome.outcomes} == set(fuzzer.TARGETS)


@pytest.mark.parametrize(
    ("target", "name", "weaker"),
    [
        ("vector", "vector.SafetyVector.read", unverified),
        ("checkpoint", "checkpoint.reader.SafetensorError", ZeroDivisionError),
        ("factors", "vector.factor_files._digest", lambda *made_from: made_from[3].digest),
        ("plan", "plan.resolve._check_own_numbers", lambda _: None),
    ],
)
def test_a_reader_that_checks_less_is_found(tmp_path, monkeypatch, target, name, weaker):
    """Without digests, of deltas or of factors; without a case for a bad header, or arithmetic."""
    monkeypatch.setattr(f"enchtable_vllm.{name}", weaker)
    outcome = fuzzer.fuzz(20.0, 0, tmp_path, [target], until_found=True)
    assert outcome.findings
    assert all(folder.is_dir() for folder in outcome.findings)
