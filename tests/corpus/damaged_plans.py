"""Plans edited by hand."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator

from corpus.damage import OTHER, RESOLVE, Damage, damage, get_at, number_variants, put
from corpus.seeds import (
    NORM,
    Q,
    edit_json,
)

#: Told to people only: no coefficient follows from them.
FOR_PEOPLE = {"rank_fraction", "retained_share"}


def plan_numbers() -> Iterator[Damage]:
    heads = ["beta", "rank_fraction", "task_norm", "safety_norm", "norm_scale", "retained_share"]
    lists = ["a", "b", "interference", "attenuation", "coefficient"]
    places = [(key,) for key in heads]
    places += [("tensors", Q, "safety_norm"), ("tensors", Q, "retained_share")]
    places += [("tensors", Q, key, 0) for key in lists]
    for keys in places:
        where = ".".join(map(str, keys))

        def edit(family, keys=keys, scale=1.01):
            put(family.plan, keys, get_at(json.loads(family.plan.read_text()), keys) * scale)

        if not FOR_PEOPLE & set(keys):
            yield damage("plan", f"{where} edited", edit, "MergePlanError: .*should be",
                          proves="an edited plan" if where == "beta" else None)  # fmt: skip
        for name, value in number_variants(1.5):
            if name == "negative" and "retained_share" in keys:
                continue
            if name == "null" and keys[-1] == "retained_share" and len(keys) == 3:
                continue  # as if it were not there
            yield damage(
                "plan",
                f"{where} is {name}",
                lambda family, keys=keys, value=value: put(family.plan, keys, value),
                f"MergePlanError: .*{re.escape(str(keys[0]))}",
            )
    for key in lists:
        for name, value in (("missing", []), ("twice", [0.5, 0.5]), ("no list", 0.5)):
            yield damage(
                "plan",
                f"{key} {name}",
                lambda family, key=key, value=value: put(family.plan, ["tensors", Q, key], value),
                "MergePlanError: ",
            )


def plan_words() -> Iterator[Damage]:
    def edited(name, *keys, value, message, blind=()):
        return damage("plan", name, lambda f: put(f.plan, keys, value), message, blind)

    yield damage("plan", "no plan", lambda family: family.plan.unlink(),
                  "MergePlanError: .*(enchtable plan|base_model)")  # fmt: skip
    yield edited("a tensor kept by hand", "tensors", Q, "action", value="keep",
                 message="MergePlanError: .*kept tensor")  # fmt: skip
    yield edited("an unknown action", "tensors", Q, "action", value="drop",
                 message="MergePlanError: .*action")  # fmt: skip
    yield edited("another vector", "safety_vector", "fingerprint", value=OTHER,
                 message="MismatchError: .*vector that the plan", blind=RESOLVE)  # fmt: skip
    yield edited("another task model", "task_model", "fingerprint", value=OTHER,
                 message="MismatchError: .*task model that the plan", blind=RESOLVE)  # fmt: skip
    yield edited("another base model", "base_model", "fingerprint", value="x",
                 message="MergePlanError: .*fingerprint")  # fmt: skip
    yield edited("an unknown scope", "scope", value="everything", message="MergePlanError: .*scope")
    yield edited("a scope it is not for", "scope", value="ffn",
                 message="MismatchError: .*outside scope 'ffn'", blind=RESOLVE)  # fmt: skip
    yield edited(
        "no tensors", "tensors", value={}, message="MergePlanError: .*(at least one|mask for every)"
    )
    yield edited("no vector", "safety_vector", value=None, message="MergePlanError: .*safety_vec")

    def foreign(family):
        """A tensor that the vector does not hold, planned as another is."""
        edit_json(family.plan, lambda p: p["tensors"].update({NORM: p["tensors"][Q]}))

    yield damage("plan", "a tensor that is not in the vector", foreign, "MergePlanError: .*norm")

    def forget(family):
        edit_json(family.plan, lambda plan: plan["tensors"].pop(NORM) and None)

    yield damage("plan", "a tensor forgotten", forget, "MismatchError: .*not in the plan", RESOLVE)

    def unknown(family):
        edit_json(family.plan, lambda p: p["tensors"].update(x=p["tensors"][NORM]))

    yield damage("plan", "a tensor of no model", unknown, "MismatchError: .*'x' is not in",
                  RESOLVE)  # fmt: skip
    commit = "0" * 40
    for where in (
        {"path": "../v"}, {"path": "/v"}, {"path": "~/v"}, {"path": "a\0b"}, {"path": "a\\b"},
        {"path": ""}, {"path": "a/../../b"}, {"path": 3}, {}, {"path": "v", "repo_id": "a/b"},
        {"repo_id": "/abs/v", "commit": commit}, {"repo_id": "../v", "commit": commit},
        {"repo_id": "a/b"}, {"repo_id": "a/b", "commit": "main"},
    ):  # fmt: skip
        yield edited(f"location {where}", "safety_vector", "location", value=where,
                     message="MergePlanError: .*safety_vector.location")  # fmt: skip

    yield edited("location of a name too long", "safety_vector", "location", "path",
                 value="a" * 300, message="SafetyVectorError: .*File name too long",
                 blind=RESOLVE | {"merge", "command: merge"})  # fmt: skip

    def linked(family):
        outside = family.task.parent / "outside"
        shutil.move(family.vector, outside)
        family.vector.symlink_to(outside)

    yield damage("plan", "location: a link out of the folder", linked,
                  "MergePlanError: .*inside the plan's own",
                  RESOLVE | {"merge", "command: merge"})  # fmt: skip
