"""Everything that can be refused before the first weight is read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from enchtable_vllm.checkpoint import (
    Checkpoint,
    Location,
    local,
    locate,
    on_hub,
    sampled_fingerprint,
)
from enchtable_vllm.errors import ConfigError, MergePlanError
from enchtable_vllm.files import is_there
from enchtable_vllm.merge.stream import check_rounding
from enchtable_vllm.plan import (
    PLAN_FILE,
    MergeMasks,
    MergePlan,
    PlanOptions,
    ResolvedPlan,
    open_masks,
    plan_digest,
    read_plan_bytes,
    resolve_plan,
)
from enchtable_vllm.plan.cache import cached_plan
from enchtable_vllm.plan.merge_plan import MASKS_STEM
from enchtable_vllm.progress import Progress, silent
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.signing import open_signed
from enchtable_vllm.vector import SafetyVector
from enchtable_vllm.vector.safety_vector import VECTOR_PATTERNS

#: vLLM's class of Mistral's models that see.
_BY_MISTRALS_NAMES = "PixtralForConditionalGeneration"


@dataclass(frozen=True)
class PlanSource:
    """Where a plan came from.

    Attributes:
        plan_cache: Of one that is computed at load, whether it was at hand; None: made ahead.
        plan_seconds: How long computing it took, or finding it in the cache.
    """

    plan_cache: Literal["hit", "miss"] | None = None
    plan_seconds: float | None = None


MADE_AHEAD = PlanSource()


@dataclass(frozen=True)
class OpenTask:
    """A task model whose headers are checked.

    Attributes:
        location: Its folder.
        checkpoint: The same, opened: its files are those that were checked.
        fingerprint: Sampled.
        load_format: What vLLM calls the files that were checked.
        cache_dir: vLLM's ``--download-dir``.
    """

    location: Location
    checkpoint: Checkpoint
    fingerprint: str
    load_format: str
    cache_dir: str | None


@dataclass(frozen=True)
class Prepared:
    """Checked inputs of a merge.

    Attributes:
        task: The task model.
        resolved: The plan in force.
        vector: The safety vector.
        masks: The plan's, if it has any.
        config: What they were found by.
        plan_source: Where the plan came from.
        signed_by: Who signed vector and plan; None: nobody had to.
    """

    task: OpenTask
    resolved: ResolvedPlan
    vector: SafetyVector
    masks: MergeMasks | None
    config: LoaderConfig
    plan_source: PlanSource
    signed_by: str | None = None


def open_task(
    config: LoaderConfig, model: str, revision: str | None, cache_dir: str | None
) -> OpenTask:
    """Find, open and check the task model.

    Args:
        config: The loader's keys.
        model: The task model, as vLLM has it: a folder or a Hub id.
        revision: Its Hub revision.
        cache_dir: vLLM's ``--download-dir``.

    Raises:
        EnchTableError: It is missing, malformed or quantised, or another inner format reads
            other files of it.
    """
    location = locate(model, revision=revision, cache_dir=cache_dir, what="task model")
    checkpoint = Checkpoint(location.path, what="task model")
    checkpoint.refuse_quantized()
    load_format = stored_format(checkpoint, config.inner_load_format)
    return OpenTask(location, checkpoint, sampled_fingerprint(checkpoint), load_format, cache_dir)


def prepare(
    config: LoaderConfig, task: OpenTask, *, device: str, progress: Progress = silent
) -> Prepared:
    """Find, open and check plan and vector for a task model.

    Args:
        config: Settled: see `enchtable_vllm.serving.choice`.
        task: The task model.
        device: Where a plan is computed, if one must be.
        progress: For that computation.

    Raises:
        EnchTableError: Anything is missing, malformed, or does not belong together.
    """
    masks, source, signed_by = None, MADE_AHEAD, None
    if config.base_model is not None:
        assert config.safety_vector is not None  # LoaderConfig sees to it
        vector = SafetyVector.open(config.safety_vector, cache_dir=task.cache_dir)
        base = locate(config.base_model, cache_dir=task.cache_dir, what="base model")
        options = PlanOptions(device=device)
        began = time.perf_counter()
        plan, digest, hit = cached_plan(task.location, base, vector, options, progress=progress)
        source = PlanSource("hit" if hit else "miss", time.perf_counter() - began)
    else:
        path = _find_plan(config, task.location, task.cache_dir)
        plan, data = read_plan_bytes(path)
        digest = plan_digest(data)
        location = _locate_vector(config, plan, path, task.cache_dir)
        vector, signature = open_signed(location, config.require_signature)
        if signature is not None:
            signature.vouch_plan(path, data)
            signed_by = signature.signed_by
        masks = open_masks(plan, path)
    resolved = resolve_plan(plan, digest, beta=config.beta, scope=config.scope)
    resolved.check_vector(vector)
    resolved.check_task_model(task.fingerprint, task.checkpoint.what)
    resolved.check_headers(task.checkpoint, vector)
    check_rounding(config.rounding, resolved, task.checkpoint)
    return Prepared(task, resolved, vector, masks, config, source, signed_by)


def prepare_model(
    config: LoaderConfig,
    model: str,
    revision: str | None,
    cache_dir: str | None,
    *,
    device: str,
) -> Prepared:
    """`open_task` and `prepare`, for whoever has nothing to do in between."""
    return prepare(config, open_task(config, model, revision, cache_dir), device=device)


def stored_format(checkpoint: Checkpoint, chosen: str) -> str:
    """The inner load format with which vLLM reads the very files that were checked.

    ``auto`` would prefer Mistral's ``consolidated*.safetensors``, whose names no plan made from
    the other files knows; and some formats read files beside those that were checked.

    Args:
        checkpoint: The task model.
        chosen: ``inner_load_format``.

    Raises:
        ConfigError: That format reads other files.
    """
    kind, chosen = checkpoint.layout.kind, chosen.lower()
    fitting = "mistral" if kind == "consolidated" else "hf"
    if chosen == "auto":
        return fitting
    others = {"pt", "npcache"} | ({"mistral"} if kind == "safetensors" else set())
    if chosen in others or (kind == "pickled" and chosen != "hf"):
        raise ConfigError(
            "model_loader_extra_config, 'inner_load_format'",
            expected=f"a format that reads '{checkpoint.files[0]}', which was checked",
            got=f"'{chosen}'",
            fix=f'Leave it out, or set "inner_load_format": "{fitting}".',
        )
    beside = sorted(set(checkpoint.layout.files) - set(checkpoint.files))
    if chosen.startswith("runai") and beside:
        raise ConfigError(
            "model_loader_extra_config, 'inner_load_format'",
            expected=f"'{chosen}', which reads every safetensors file, in a folder without others",
            got=f"'{beside[0]}', which '{checkpoint.layout.index_name}' does not name",
            fix="Move the other files elsewhere, or leave 'inner_load_format' out.",
        )
    return chosen


def refuse_other_names(checkpoint: Checkpoint, architectures: Sequence[str]) -> None:
    """Refuse files whose names the model that vLLM makes would pass over.

    Beside ``params.json`` and Mistral's ``consolidated`` files, vLLM takes Mistral's config, and
    of a model that sees the class that reads Mistral's names alone. It would take the language
    model from the other files, which were checked, and leave the rest as memory was.

    Args:
        checkpoint: The task model.
        architectures: vLLM's.

    Raises:
        ConfigError: They are such files.
    """
    if checkpoint.layout.kind != "consolidated" and _BY_MISTRALS_NAMES in architectures:
        raise ConfigError(
            checkpoint.what,
            expected=f"Mistral's own weights, which '{_BY_MISTRALS_NAMES}' reads, and no others "
            "beside them",
            got=f"'{checkpoint.files[0]}'",
            fix="Start with '--config-format hf', or move 'params.json' elsewhere.",
        )


def _find_plan(config: LoaderConfig, task: Location, cache_dir: str | None) -> Path:
    if config.merge_plan is None:
        path = task.path / PLAN_FILE
        if not is_there(path):
            raise MergePlanError(
                f"task model '{task}'",
                expected=f"a '{PLAN_FILE}' in it, or 'merge_plan' or 'base_model' in "
                "--model-loader-extra-config",
                got="none",
                fix="Make a plan with 'enchtable plan', or name what it is computed from.",
            )
        return path
    path = Path(config.merge_plan)
    with suppress(RuntimeError):  # no such home
        path = path.expanduser()
    if path.suffix == ".json" or (is_there(path) and not _is_folder(path)):
        return path
    folder = locate(
        path, cache_dir=cache_dir, allow_patterns=(PLAN_FILE, f"*/{MASKS_STEM}*"), what="merge plan"
    )
    return folder.path / PLAN_FILE


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # reading it says why
        return False


def _locate_vector(
    config: LoaderConfig, plan: MergePlan, path: Path, cache_dir: str | None
) -> Location:
    if config.safety_vector is not None:
        return locate(
            config.safety_vector,
            cache_dir=cache_dir,
            allow_patterns=VECTOR_PATTERNS,
            what="safety vector",
        )
    where = plan.safety_vector.location
    if where is None:
        raise MergePlanError(
            f"merge plan '{path}'",
            expected="the place of its safety vector, or 'safety_vector' in "
            "--model-loader-extra-config",
            got="neither",
            fix="Name the vector, or put it inside the model's folder and plan again.",
        )
    if where.repo_id is not None:
        return on_hub(
            where.repo_id,
            where.commit,
            cache_dir=cache_dir,
            allow_patterns=VECTOR_PATTERNS,
            what="safety vector",
        )
    assert where.path is not None  # VectorLocation holds one of the two
    folder = path.parent / where.path
    if not folder.resolve().is_relative_to(path.parent.resolve()):
        raise MergePlanError(
            f"merge plan '{path}', safety_vector.location",
            expected="a folder inside the plan's own",
            got=f"'{where.path}', a link to '{folder.resolve()}'",
            fix="Name the vector with 'safety_vector' in --model-loader-extra-config.",
        )
    return local(folder)
