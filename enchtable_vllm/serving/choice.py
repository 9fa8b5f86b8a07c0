"""From a name to what the loader needs: which vector a server may serve, and where it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from enchtable_vllm.checkpoint.location import on_hub
from enchtable_vllm.errors import ConfigError, SignatureError, UnknownVectorError
from enchtable_vllm.plan import read_plan
from enchtable_vllm.plan.vector_root import (
    CURRENT,
    CURRENT_FILE,
    NO_VECTOR,
    VectorRoot,
    is_vector_name,
    no_plan,
    plan_path,
)
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.prepare import OpenTask
from enchtable_vllm.vector.safety_vector import VECTOR_PATTERNS


@dataclass(frozen=True)
class Choice:
    """What is to be served.

    Attributes:
        name: What people call it: a name of the root, a repository at a commit, ``@none``; None
            where only the vector itself can tell.
        config: The loader's keys with vector and plan in their places; None: no vector.
    """

    name: str | None
    config: LoaderConfig | None

    def verified(self) -> Choice:
        """The same, of what is served: its signature was verified when it came.

        What is read again must be that very vector and plan, digest by digest, whoever signed it;
        so a key that is not trusted any more is no reason to stay with what it signed.
        """
        if self.config is None:
            return self
        return Choice(self.name, self.config.model_copy(update={"require_signature": None}))


def choose_at_start(start: LoaderConfig, task: OpenTask) -> Choice:
    """What the server's own config asks for.

    Raises:
        EnchTableError: The root has no such vector, no plan of it for this task model, or no
            ``current.json``.
    """
    asked = start.safety_vector
    if asked == NO_VECTOR:
        return Choice(NO_VECTOR, None)
    if asked == CURRENT:
        return _current(start, task)
    if asked is not None and start.vector_root is not None and is_vector_name(asked):
        return _from_root(start, asked, start.beta, task, start.merge_plan)
    return Choice(None, start)


def choose(start: LoaderConfig, asked: str, beta: float | None, task: OpenTask) -> Choice:
    """What a swap asks for: only what the server's config allows.

    Args:
        start: The server's config.
        asked: See docs/http-api.md, "Names of vectors".
        beta: Another β than the plan's.
        task: The task model that is served.

    Raises:
        UnknownVectorError: Neither the root nor the allowed repositories hold it.
        SignatureError: It asks for what nobody can have signed.
        EnchTableError: As `choose_at_start`.
    """
    if asked == CURRENT:
        return _current(start, task)
    signed_only = start.require_signature is not None
    if asked == NO_VECTOR:
        if signed_only:
            raise _unsignable(asked, "no vector")
        return Choice(NO_VECTOR, None)
    if asked in start.allowed_repositories or start.vector_root is not None:
        find = _from_hub if asked in start.allowed_repositories else _from_root
        choice = find(start, asked, beta, task)
        return _with_own_beta(choice) if signed_only else choice
    raise UnknownVectorError(
        f"safety vector '{asked}'",
        expected=f"one of {start.allowed_repositories}, or a 'vector_root' in "
        "--model-loader-extra-config",
        got="neither",
        fix="Start the server with a folder of vectors that it may swap in.",
    )


def _with_own_beta(choice: Choice) -> Choice:
    """The same, with the β of the plan that will be verified, and no other.

    A β next to nothing serves next to no vector, which whoever may not sign must not be able to.
    """
    assert choice.config is not None
    assert choice.config.merge_plan is not None  # a plan that is computed cannot have been signed
    beta = choice.config.beta
    if beta is None:
        return choice
    own = read_plan(Path(choice.config.merge_plan))[0].beta
    if beta != own:
        raise _unsignable(f"{choice.name}' with beta '{beta}", f"a plan with beta {own}")
    return Choice(choice.name, choice.config.model_copy(update={"beta": None}))


def _unsignable(asked: str, got: str) -> SignatureError:
    return SignatureError(
        f"safety vector '{asked}'",
        expected="what was signed, as 'require_signature' demands: a vector with its plan's beta",
        got=got,
        fix="Name a signed vector; another beta is another plan, to be made and signed.",
    )


def _current(start: LoaderConfig, task: OpenTask) -> Choice:
    if start.vector_root is None:
        raise UnknownVectorError(
            f"safety vector '{CURRENT}'",
            expected="a 'vector_root' in --model-loader-extra-config",
            got="none",
            fix="Name the vector itself.",
        )
    current = VectorRoot(start.vector_root).current()
    if current is None:
        raise ConfigError(
            f"vector root '{start.vector_root}'",
            expected=f"a '{CURRENT_FILE}' that names the vector to serve",
            got="none",
            fix="A swap with 'persist' writes it. For the first start name the vector itself.",
        )
    return choose(start, current.safety_vector, current.beta, task)


def _from_root(
    start: LoaderConfig,
    name: str,
    beta: float | None,
    task: OpenTask,
    plan: str | Path | None = None,
) -> Choice:
    assert start.vector_root is not None
    root = VectorRoot(start.vector_root)
    folder = root.folder(name)
    plan = plan or root.plan(name, task.fingerprint)
    return _with_plan(start, name, str(folder), folder, plan, beta, task)


def _from_hub(start: LoaderConfig, asked: str, beta: float | None, task: OpenTask) -> Choice:
    repo_id, _, commit = asked.partition("@")
    plans = plan_path(Path(), task.fingerprint)
    folder = on_hub(
        repo_id,
        commit,
        cache_dir=task.cache_dir,
        allow_patterns=(*VECTOR_PATTERNS, str(plans), f"{plans.with_suffix('.masks')}/*"),
        what="safety vector",
    ).path
    plan = folder / plans
    return _with_plan(start, asked, asked, folder, plan if plan.is_file() else None, beta, task)


def _with_plan(
    start: LoaderConfig,
    name: str,
    vector: str,
    folder: Path,
    plan: str | Path | None,
    beta: float | None,
    task: OpenTask,
) -> Choice:
    if plan is None and start.base_model is None:
        raise no_plan(name, folder, str(task.location), task.fingerprint)
    settled = {
        "safety_vector": vector,
        "merge_plan": None if plan is None else str(plan),
        "base_model": start.base_model if plan is None else None,
        "beta": beta,
    }
    return Choice(name, start.model_copy(update=settled))
