"""What holds for every input, not only for those that somebody thought of."""

import functools
import json
import math
import pickle
import random
import tempfile
from pathlib import Path

import architectures
import pytest
import torch
from corpus import seeds
from fuzz import fuzzer, mutations
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from enchtable_vllm.checkpoint import (
    Checkpoint,
    Location,
    ShardWriter,
    TensorHeader,
    sampled_fingerprint,
)
from enchtable_vllm.checkpoint.pickled import DTYPES as PICKLED
from enchtable_vllm.checkpoint.safetensors_file import STORED_DTYPES
from enchtable_vllm.checkpoint.writer import assign_shards, tensor_bytes, write_index
from enchtable_vllm.errors import CheckpointError, EnchTableError
from enchtable_vllm.files import parse_json
from enchtable_vllm.plan import MergePlan, PlannedTensor, VectorReference, read_plan, resolve_plan
from enchtable_vllm.plan.resolve import coefficient
from enchtable_vllm.vector import (
    SCOPES,
    Delta,
    ModelReference,
    SafetyVector,
    build_vector,
    in_scope,
    narrows,
)

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
DTYPES = st.sampled_from(sorted(STORED_DTYPES))
PICKLED_DTYPES = st.sampled_from(sorted(set(STORED_DTYPES) & set(PICKLED.values())))


@st.composite
def stored_tensors(draw, dtypes=DTYPES, shapes=SHAPES):
    """Name → tensor, of any bits."""
    tensors = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=6, unique=True)):
        dtype, shape = STORED_DTYPES[draw(dtypes)], draw(shapes)
        size = math.prod(shape) * dtype.itemsize
        # A boolean is a byte of 0 or 1.
        bits = draw(st.binary(min_size=size, max_size=size).map(bytearray))
        raw = torch.frombuffer(bits, dtype=torch.uint8) if size else torch.empty(0).to(torch.uint8)
        raw = raw % 2 if dtype is torch.bool else raw
        tensors[name] = raw.view(dtype).reshape(shape)
    return tensors


def spelling(dtype):
    return next(name for name, torch_dtype in STORED_DTYPES.items() if torch_dtype is dtype)


def headers_of(tensors):
    return [TensorHeader(n, spelling(t.dtype), tuple(t.shape), "") for n, t in tensors.items()]


def bits(tensor):
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def write(folder, tensors, max_shard_bytes=10**9, metadata=None):
    shards = assign_shards(headers_of(tensors), "model", max_shard_bytes)
    for file, shard in shards.items():
        with ShardWriter(folder / file, shard, metadata or {}) as writer:
            for header in shard:
                writer.write(header.name, tensors[header.name])
    write_index(folder, "model", shards)
    return Checkpoint(folder)


@given(stored_tensors(), st.integers(1, 200), st.dictionaries(NAMES, NAMES, max_size=2))
def test_what_is_written_is_read(tensors, max_shard_bytes, metadata):
    with tempfile.TemporaryDirectory() as name:
        checkpoint = write(Path(name), tensors, max_shard_bytes, metadata)
        assert set(checkpoint.tensors) == set(tensors)
        assert all(checkpoint.metadata(file) == metadata for file in checkpoint.files)
        for name, tensor in tensors.items():
            found = checkpoint.read(name)
            assert (found.dtype, found.shape, bits(found)) == (
                tensor.dtype,
                tensor.shape,
                bits(tensor),
            )
            assert checkpoint.read_bytes(name, 1, 3) == bits(tensor)[1:4]
        order = [name for _, names in checkpoint.names_by_file() for name in names]
        # Tensors without bytes have no order of their own.
        full = [n for n in tensors if tensors[n].numel()]
        assert [n for n in order if tensors[n].numel()] == full


@given(stored_tensors(PICKLED_DTYPES), st.integers(1, 3), st.booleans())
def test_what_is_pickled_is_read(tensors, count, turned):
    """In one file or several with their index, row-major or not."""
    if turned:
        tensors = {n: t.mT if t.ndim == 2 else t for n, t in tensors.items()}
    names = sorted(tensors)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        where = {n: f"pytorch_model-{i % count + 1}.bin" for i, n in enumerate(names)}
        for file in set(where.values()):
            torch.save({n: tensors[n] for n in names if where[n] == file}, folder / file)
        if count > 1:
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
        checkpoint = Checkpoint(folder)
        assert set(checkpoint.tensors) == set(tensors)
        assert set(checkpoint.files) == set(where.values())
        for name, tensor in tensors.items():
            found, row_major = checkpoint.read(name), tensor.contiguous()
            assert found.is_contiguous()
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert bits(found) == bits(row_major)
            assert checkpoint.read_bytes(name, 1, 3) == bits(row_major)[1:4]


@settings(max_examples=settings.default.max_examples * 5)
@given(seed=st.integers(0, 2**64))
def test_a_changed_place_of_an_index_is_refused_or_changes_no_tensor(cut, seed):
    """Of shards of either format."""
    rng = random.Random(seed)
    for folder, tensors in cut.items():
        (index,) = folder.glob("*.index.json")
        before = index.read_bytes()
        try:
            index.write_text(json.dumps(mutations.mutate_json(json.loads(before), rng)))
            checkpoint = Checkpoint(folder)
            assert set(checkpoint.tensors) == set(tensors)
            assert all(torch.equal(checkpoint.read(n), t) for n, t in tensors.items())
        except EnchTableError:
            pass
        finally:
            index.write_bytes(before)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 8))
def test_shards_are_filled_in_order_and_never_overfilled(sizes, most):
    headers = [TensorHeader(str(i), "U8", (size,), "") for i, size in enumerate(sizes)]
    shards = list(assign_shards(headers, "model", most).values())
    assert [header for shard in shards for header in shard] == headers
    held = [sum(map(tensor_bytes, shard)) for shard in shards]
    assert all(total <= most or len(shard) == 1 for total, shard in zip(held, shards, strict=True))
    for total, following in zip(held, shards[1:], strict=False):
        assert total + tensor_bytes(following[0]) > most  # the next one did not fit


@given(stored_tensors(shapes=st.just((2, 3))), st.data())
def test_any_changed_bit_changes_the_fingerprint_and_sharding_does_not(tensors, data):
    """Of tensors that are smaller than the samples."""
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, str(i)) for i in range(4)]
        for folder in folders:
            folder.mkdir()
        before = sampled_fingerprint(write(folders[0], tensors))
        assert sampled_fingerprint(write(folders[1], tensors, 1)) == before
        chosen = data.draw(st.sampled_from(sorted(tensors)))
        raw = bytearray(bits(tensors[chosen]))
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] ^= 1
        changed = torch.frombuffer(raw, dtype=torch.uint8).view(tensors[chosen].dtype)
        changed = tensors | {chosen: changed.reshape(2, 3)}
        assert sampled_fingerprint(write(folders[2], changed)) != before
        flat = tensors | {chosen: tensors[chosen].reshape(6)}
        assert sampled_fingerprint(write(folders[3], flat)) != before


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Folder → tensors: a checkpoint in two shards, in either format."""
    found = {}
    for store in (seeds.shard, functools.partial(architectures.pickled, shards=2)):
        folder = seeds.small_checkpoint(tmp_path_factory.mktemp("cut") / "checkpoint")
        found[folder] = seeds.stored(folder)
        store(folder)
    return found


FLOATS = st.sampled_from(["F32", "BF16", "F16"])


@given(
    st.sampled_from(["bf16", "fp32", "int8"]), FLOATS, st.integers(1, 5000), st.integers(0, 2**32)
)
def test_a_built_vector_is_the_difference(dtype, stored, most, seed):
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, kind) for kind in ("a", "s", "v")]
        models = []
        for folder in folders[:2]:
            folder.mkdir()
            shapes = {f"l.{i}.self_attn.q.weight": (3 + i, 40) for i in range(3)}
            tensors = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
            models.append({n: t.to(STORED_DTYPES[stored]) for n, t in tensors.items()})
            save_file(models[-1], folder / "model.safetensors")
        ends = map(Location, folders[:2])
        report = build_vector(*ends, folders[2], dtype=dtype, max_shard_bytes=most)
        vector = SafetyVector.open(folders[2])
        assert vector.manifest == report.manifest
        text = (folders[2] / "safety_vector.json").read_text()
        assert vector.manifest.model_dump_json(indent=2) + "\n" == text
        for key in models[0]:
            delta = models[0][key].float() - models[1][key].float()
            expected = {
                "bf16": delta.bfloat16(), "fp32": delta, "int8": Delta.quantized(delta).float(),
            }[dtype]  # fmt: skip
            assert torch.equal(vector.read(key).float(), expected.float())


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return seeds.small_family(tmp_path_factory.mktemp("properties") / "family")


@settings(max_examples=settings.default.max_examples * 10)
@given(data=st.data())
def test_a_changed_byte_of_a_vector_is_refused_or_changes_no_value(family, data):
    """In whichever file of it."""
    values = fuzzer.feed_vector(family.vector)
    files = {path: path.read_bytes() for path in sorted(family.vector.iterdir())}
    path = data.draw(st.sampled_from(sorted(files)))
    place = data.draw(st.integers(0, len(files[path]) - 1))
    byte = data.draw(st.integers(0, 255))
    changed = files[path][:place] + bytes([byte]) + files[path][place + 1 :]
    try:
        path.write_bytes(changed)
        assert fuzzer.feed_vector(family.vector) == values
    except EnchTableError:
        assert changed != files[path]
    finally:
        path.write_bytes(files[path])


@settings(max_examples=settings.default.max_examples * 10)
@given(st.integers(0, 2**64), st.booleans())
def test_a_changed_place_of_a_plan_is_refused_or_changes_no_coefficient(family, seed, repaired):
    """Unless whoever changes it computes everything that follows; and then n is the most."""
    rng = random.Random(seed)
    document = json.loads(family.plan.read_text())
    before = resolve_plan(*read_plan(family.plan)).coefficients
    task, vector = Checkpoint(family.task), SafetyVector.open(family.vector)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "merge_plan.json")
        changed = mutations.mutate_json(document, rng)
        if repaired:
            try:
                changed = mutations.repair_plan(changed)
            except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError):
                assume(False)
        path.write_text(json.dumps(changed))
        try:
            resolved = resolve_plan(*read_plan(path))
            resolved.check_vector(vector)
            resolved.check_headers(task, vector)
        except EnchTableError:
            return
        if not repaired:
            assert resolved.coefficients.keys() == before.keys()
            for key, row in resolved.coefficients.items():
                assert row == pytest.approx(before[key], rel=1e-8)
        for row in resolved.coefficients.values():
            assert all(0 <= c <= resolved.norm_scale < math.inf for c in row)


MODEL = ModelReference(id="m", fingerprint="blake3:" + "0" * 64)
TERMS = st.tuples(st.floats(0, 10), st.floats(0, 10))
MODULES = [f"model.layers.{i}.{m}.weight" for i in range(3) for m in ("self_attn.q", "mlp.up")]
MODULES += ["lm_head.weight", "model.norm.weight"]
FAMILIAR = st.sampled_from(MODULES)


@st.composite
def plans(draw, names=FAMILIAR):
    """A plan that agrees with itself."""
    chosen = draw(st.lists(names, min_size=1, max_size=6, unique=True))
    norms = [draw(st.floats(1e-3, 1e3)) for _ in chosen]
    beta, task_norm = draw(st.floats(1e-3, 1e2)), draw(st.floats(1e-3, 1e3))
    n = beta * task_norm / math.hypot(*norms)
    tensors = {"kept": PlannedTensor(action="keep", task_digest=MODEL.fingerprint, reason="x")}
    for name, norm in zip(chosen, norms, strict=True):
        terms = draw(st.lists(TERMS, min_size=1, max_size=3))
        interference = tuple(a * n + b for a, b in terms)
        tensors[name] = PlannedTensor(
            action="merge",
            task_digest=MODEL.fingerprint,
            safety_norm=norm,
            a=tuple(a for a, _ in terms),
            b=tuple(b for _, b in terms),
            interference=interference,
            attenuation=tuple(math.exp(-x) for x in interference),
            coefficient=tuple(coefficient(n, a, b) for a, b in terms),
        )
    return MergePlan(
        task_model=MODEL,
        base_model=MODEL,
        safety_vector=VectorReference(
            name=draw(st.text(max_size=5)), fingerprint=MODEL.fingerprint
        ),
        beta=beta,
        rank_fraction=draw(st.floats(0.01, 1)),
        scope="all",
        task_norm=task_norm,
        safety_norm=math.hypot(*norms),
        norm_scale=n,
        retained_share=draw(st.floats(-2, 2)),
        tensors=dict(sorted(tensors.items())),
    )


@given(plans(names=NAMES.filter(lambda name: name != "kept")))
def test_a_plan_that_is_written_is_read(plan):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "merge_plan.json")
        path.write_text(plan.to_json())
        again, _ = read_plan(path)
    assert again == plan
    assert again.to_json() == plan.to_json()
    resolved = resolve_plan(again, "")
    assert resolved.coefficients == {n: t.coefficient for n, t in plan.merged.items()}


@given(plans(), st.sampled_from(SCOPES), st.floats(1e-3, 1e2))
def test_narrowing_takes_what_is_in_scope_and_nothing_else(plan, scope, beta):
    inside = {name for name in plan.merged if in_scope(name, scope)}
    assume(inside)
    resolved = resolve_plan(plan, "", beta=beta, scope=scope)
    assert resolved.coefficients.keys() == inside
    assert resolved.coefficients.keys() | resolved.kept.keys() == plan.tensors.keys()
    safety_norm = math.hypot(*(plan.tensors[name].safety_norm for name in inside))
    assert resolved.norm_scale == pytest.approx(beta * plan.task_norm / safety_norm, rel=1e-12)
    assert all(0 <= c <= resolved.norm_scale for row in resolved.coefficients.values() for c in row)


@given(*(st.sampled_from(SCOPES) for _ in range(3)), st.sampled_from(MODULES))
def test_scopes_are_ordered_by_what_they_select(one, two, three, name):
    assert narrows(one, one)
    if narrows(one, two):
        assert in_scope(name, two) or not in_scope(name, one)
        if narrows(two, three):
            assert narrows(one, three)
        if narrows(two, one):
            assert one == two


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
)


@given(JSON)
def test_json_is_read_as_it_is_written(value):
    assert parse_json(json.dumps(value).encode()) == value


@given(st.lists(st.text(max_size=3), min_size=1, max_size=4), st.data())
def test_a_key_twice_is_refused_at_any_depth(keys, data):
    repeated = [*keys, data.draw(st.sampled_from(keys))]
    text = "{" + ", ".join(f"{json.dumps(key)}: 1" for key in repeated) + "}"
    for _ in range(data.draw(st.integers(0, 3))):
        text = f'[{{"a": {text}}}]'
    with pytest.raises(ValueError, match="twice"):
        parse_json(text.encode())


@given(st.text(), st.text(max_size=10_000), st.text())
@example("a\nINFO all is well", "\x1b[2J", "\ud800")
def test_a_message_is_one_printable_line(subject, got, fix):
    error = CheckpointError(subject, expected="x", got=got, fix=fix)
    text = str(error)
    assert text.isprintable()
    assert len(text) < 30_000
    text.encode()
    assert str(pickle.loads(pickle.dumps(error))) == text


def test_the_libraries_agree(family):
    """Our reading of a header, and safetensors' own."""
    for folder in (family.base, family.vector):
        stem = "safety_vector" if folder == family.vector else "model"
        checkpoint = Checkpoint(folder, stem=stem)
        for name, tensor in load_file(seeds.weights(folder)).items():
            assert torch.equal(checkpoint.read(name), tensor)
