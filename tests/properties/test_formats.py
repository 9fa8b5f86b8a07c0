"""Masks, cached factors, the loader's keys, a plan's journal, ``current.json``: what is written is
read, and what is damaged is refused or changes nothing."""

import json
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from corpus import seeds
from hypothesis import given
from hypothesis import strategies as st

from enchtable_kernels import pack_keep
from enchtable_vllm.errors import ConfigError, EnchTableError
from enchtable_vllm.plan import MaskOptions, open_masks, read_plan
from enchtable_vllm.plan.journal import Journal, Terms
from enchtable_vllm.plan.masks import MaskWriter
from enchtable_vllm.plan.vector_root import CURRENT_FILE, VectorRoot
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.vector import SCOPES, SafetyVector
from enchtable_vllm.vector.factor_files import FactorFiles, matrices
from enchtable_vllm.vector.factors import factor

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False, allow_nan=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
)


@st.composite
def changes(draw):
    """A function that changes bytes somewhere: one of them, a cut, or something in between."""
    place, byte = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 255))
    insert = draw(st.binary(max_size=4))
    kind = draw(st.sampled_from(["flip", "cut", "insert"]))

    def change(data):
        at = int(place * len(data))
        if kind == "flip" and data:
            return data[:at] + bytes([data[at] ^ byte]) + data[at + 1 :]
        return data[:at] if kind == "cut" else data[:at] + insert + data[at:]

    return change


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """A masked family and one with cached factors."""
    made = {}
    for form in ("masked", "factored"):
        made[form] = seeds.small_family(tmp_path_factory.mktemp(form) / "family")
        seeds.FORMS[form](made[form])
    return made


@given(st.dictionaries(TEXT, st.lists(st.booleans(), min_size=1, max_size=40), min_size=1))
def test_masks_that_are_written_are_read(masks):
    bits = {name: pack_keep(torch.tensor(mask)) for name, mask in masks.items()}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "merge_plan.json")
        with MaskWriter(path) as writer:
            writer.begin({name: (len(mask),) for name, mask in masks.items()})
            for name in masks:
                writer.write(name, bits[name])
            reference = writer.finish(MaskOptions(density=0.5))
        kept = [keep for mask in masks.values() for keep in mask]
        assert reference.kept_share == pytest.approx(sum(kept) / len(kept), abs=1e-6)
        stored = seeds.stored(path.parent / reference.path)
    assert stored.keys() == bits.keys()
    assert all(torch.equal(stored[name], bits[name]) for name in bits)


def read_masks(family):
    plan, _ = read_plan(family.plan)
    masks, vector = open_masks(plan, family.plan), SafetyVector.open(family.vector)
    counts = {name: torch.Size(vector.tensors[name].shape).numel() for name in plan.merged}
    return {name: masks.read(name, count).tolist() for name, count in counts.items()}


def read_factors(family):
    files = FactorFiles(vector := SafetyVector.open(family.vector))
    found = {name: files.read(name) for name in vector.tensors}
    return {n: [(f.left.tolist(), f.right.tolist()) for f in row] for n, row in found.items()}


@given(changes())
@pytest.mark.parametrize(
    ("form", "path_of", "read"),
    [
        ("masked", lambda f: f.task / "merge_plan.masks" / "keep_bits.safetensors", read_masks),
        ("factored", lambda f: f.vector / "safety_vector_factors.safetensors", read_factors),
    ],
    ids=["masks", "factors"],
)
def test_changed_masks_and_factors_are_refused_or_the_same(forms, form, path_of, read, change):
    path = path_of(forms[form])
    before, values = path.read_bytes(), read(forms[form])
    try:
        path.write_bytes(change(before))
        assert read(forms[form]) == values
    except EnchTableError:
        assert path.read_bytes() != before
    finally:
        path.write_bytes(before)


def test_factors_that_are_written_are_read(forms):
    vector = SafetyVector.open(forms["factored"].vector)
    for name in vector.tensors:
        expected = [factor(m, 0.5) for m in matrices(vector.dense(name)[0])]
        for one, other in zip(FactorFiles(vector).read(name), expected, strict=True):
            assert (one.exponent, one.rung) == (other.exponent, other.rung)
            assert torch.equal(one.left, other.left)
            assert torch.equal(one.right, other.right)


KEYS = {
    "safety_vector": TEXT,
    "merge_plan": TEXT,
    "base_model": TEXT,
    "beta": POSITIVE,
    "scope": st.sampled_from(SCOPES),
    "verify": st.sampled_from(["sampled", "content"]),
    "rounding": st.sampled_from(["nearest", "stochastic"]),
    "vector_root": TEXT,
    "staging_gib": POSITIVE,
    "inner_extra_config": st.dictionaries(TEXT, JSON, max_size=2),
}


@given(st.fixed_dictionaries({}, optional=KEYS))
def test_good_keys_are_taken_as_they_are(keys):
    try:
        config = LoaderConfig.parse(json.loads(json.dumps(keys)))
    except ConfigError:
        assert "base_model" in keys  # the one among them that asks for, and excludes, another
        assert "merge_plan" in keys or "safety_vector" not in keys
        return
    told = config.model_dump()
    assert {key: json.dumps(told[key]) for key in keys} == {
        key: json.dumps(value) for key, value in keys.items()
    }
    assert LoaderConfig.parse(told) is not None


@given(JSON | st.dictionaries(st.sampled_from(sorted(LoaderConfig.model_fields)), JSON))
def test_any_other_json_is_refused_or_of_the_types_that_are_promised(value):
    try:
        config = LoaderConfig.parse(value)
    except ConfigError:
        return
    assert config.beta is None or config.beta > 0
    assert config.safety_vector is None or isinstance(config.safety_vector, str)


RUNG = st.sampled_from(["gram32", "deflated32", "gram64", "svd64", "zero"])
FINITE = st.floats(0, allow_infinity=False, allow_nan=False)
ROWS = st.lists(st.tuples(FINITE, FINITE, st.tuples(RUNG, RUNG)), min_size=1, max_size=3)


@st.composite
def journals(draw):
    """Name → (digests, terms)."""
    found = {}
    for name in draw(st.lists(TEXT, max_size=4, unique=True)):
        a, b, rungs = zip(*draw(ROWS), strict=True)
        digests = tuple(draw(TEXT) for _ in range(3))
        found[name] = digests, Terms(draw(FINITE), a, b, rungs)
    return found


def remember_all(path, lines):
    """What the journal gives for each line, and which of them it had to compute."""
    computed, given_back = [], {}
    with suppress(KeyboardInterrupt), Journal(path) as journal:
        journal.begin(["inputs"], 0)
        for name, (digests, terms) in lines.items():
            given_back[name] = journal.remember(
                name, digests, lambda n=name, t=terms: computed.append(n) or t
            )
        raise KeyboardInterrupt  # an interruption keeps it
    assert given_back == {name: terms for name, (_, terms) in lines.items()}
    return computed


@given(journals(), changes())
def test_a_journal_gives_back_what_was_found_and_what_is_damaged_is_computed_again(lines, change):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "journal")
        assert remember_all(path, lines) == list(lines)
        assert remember_all(path, lines) == []
        data = path.read_bytes()
        for damaged in (change(data), data.replace(b'"safety_norm":', b'"safety_norm":1')):
            path.write_bytes(damaged)
            remember_all(path, lines)  # right, whatever it had to compute
            assert remember_all(path, lines) == []


@given(TEXT, st.none() | POSITIVE, changes(), st.binary(max_size=60))
def test_current_json_is_read_as_it_is_written_or_refused(vector, beta, change, junk):
    with tempfile.TemporaryDirectory() as name:
        root, path = VectorRoot(name), Path(name, CURRENT_FILE)
        written = root.set_current(vector, beta)
        assert (written.safety_vector, written.beta) == (vector, beta)
        assert root.current() == written
        for data in (change(path.read_bytes()), junk, b""):
            path.write_bytes(data)
            with suppress(ConfigError):
                found = root.current()
                assert found.version >= 1
                assert found.beta is None or found.beta > 0
            assert root.set_current("other", beta).safety_vector == "other"
            assert root.current().safety_vector == "other"
