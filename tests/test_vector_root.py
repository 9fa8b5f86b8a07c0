"""The folder that a server takes vectors from: names, plans, current.json."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from enchtable_vllm.errors import ConfigError, MergePlanError, UnknownVectorError
from enchtable_vllm.plan.vector_root import (
    CURRENT_FILE,
    VectorRoot,
    is_pinned_repository,
    is_vector_name,
    plan_path,
)

FINGERPRINT = "blake3:" + "0f" * 32


@pytest.fixture
def root(tmp_path):
    for name in ("sv-a", "sv-b"):
        (tmp_path / "root" / name / "plans").mkdir(parents=True)
    (tmp_path / "root" / ".hidden").mkdir()
    (tmp_path / "root" / "a file").write_text("")
    return VectorRoot(tmp_path / "root")


def test_names(root):
    assert root.names() == ["sv-a", "sv-b"]
    assert root.folder("sv-a").name == "sv-a"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../root/sv-a", "/etc", "sv-a/plans", "@none", "-x", "sv-z", "ß", "a\0"]
)
def test_other_names_are_refused(root, name):
    with pytest.raises(UnknownVectorError, match="expected one of"):
        root.folder(name)


def test_a_link_out_of_the_root_is_refused_and_one_inside_is_not(root, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (root.path / "out").symlink_to(tmp_path / "elsewhere")
    (root.path / "alias").symlink_to(root.path / "sv-a")
    with pytest.raises(UnknownVectorError, match="a link out of it"):
        root.folder("out")
    assert root.folder("alias")


def test_plans(root, tmp_path):
    assert root.plan("sv-a", FINGERPRINT) is None
    path = plan_path(root.path / "sv-a", FINGERPRINT)
    assert path.name == "0f" * 32 + ".json"
    path.write_text("{}")
    assert root.plan("sv-a", FINGERPRINT).read_text() == "{}"
    path.unlink()
    (tmp_path / "plan.json").write_text("{}")
    path.symlink_to(tmp_path / "plan.json")
    with pytest.raises(MergePlanError, match="inside the vector's own folder"):
        root.plan("sv-a", FINGERPRINT)


def test_current(root):
    assert root.current() is None
    first = root.set_current("sv-a", None)
    assert (first.version, first.safety_vector, first.beta) == (1, "sv-a", None)
    assert root.current() == first
    assert root.set_current("sv-a", None) == first  # says so already
    second = root.set_current("sv-a", 0.5)
    assert (second.version, root.current().beta) == (2, 0.5)
    root.clear_current()
    assert root.current() is None
    root.clear_current()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"version": 1}',
        '{"version": 1, "safety_vector": "a", "updated": "", "beta": -1}',
        '{"version": 1, "safety_vector": "a", "updated": "", "beta": NaN}',
        '{"version": 1, "safety_vector": "a", "updated": "", "more": 1}',
        '{"version": 0, "safety_vector": "a", "updated": ""}',
        '{"version": 1, "safety_vector": "@current", "updated": ""}',
        '{"format_version": 2, "version": 1, "safety_vector": "a", "updated": ""}',
    ],
)
def test_a_damaged_current_is_refused_and_can_be_written_anew(root, text):
    (root.path / CURRENT_FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"current\.json"):
        root.current()
    assert root.set_current("sv-b", None).safety_vector == "sv-b"
    assert json.loads((root.path / CURRENT_FILE).read_text())["safety_vector"] == "sv-b"


def test_a_current_that_is_a_link_out_is_refused(root, tmp_path):
    (tmp_path / "other.json").write_text('{"version": 1, "safety_vector": "a", "updated": ""}')
    (root.path / CURRENT_FILE).symlink_to(tmp_path / "other.json")
    with pytest.raises(ConfigError, match="a link to"):
        root.current()


def test_readers_never_see_half_a_file(root):
    """Many writers, one file: some are told that another is at it, none leaves a half."""

    def write(number):
        try:
            root.set_current(f"sv-{number}", float(number + 1))
        except ConfigError as error:
            return str(error)
        return "one process at a time"

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(write, range(40)))
        assert all("one process at a time" in each for each in told)
        assert root.current() is not None
    assert not list(root.path.glob("*.partial"))


def test_a_root_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="vector root"):
        VectorRoot(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="vector root"):
        VectorRoot(tmp_path / "file")


def test_names_and_repositories():
    assert is_vector_name("llama-3-8b_v1.2")
    assert not is_vector_name("x" * 129)
    assert is_pinned_repository("org/name@" + "0" * 40)
    for text in ("org/name", "org/name@main", "org/name@" + "0" * 39, "../x@" + "0" * 40):
        assert not is_pinned_repository(text)
