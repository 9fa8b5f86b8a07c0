"""Servers that swap, and a root of vectors for them."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import httpx
import models
from safetensors.torch import load_file, save_file
from vllm_runs import ONE_PROCESS

from enchtable_vllm.checkpoint import Checkpoint, locate, sampled_fingerprint, tensor_digest
from enchtable_vllm.demo.server import Server, free_port
from enchtable_vllm.plan.vector_root import plan_path
from enchtable_vllm.vector import SafetyVector, build_vector

FAULTS = Path(__file__).with_name("serving") / "faults"
TOKEN = "open-sesame-open-sesame"
ADMIN = {"X-Enchtable-Admin-Token": TOKEN}
ARGUMENTS = [
    "--load-format", "enchtable", "--dtype", "bfloat16", "--max-model-len", "512",
    "--skip-tokenizer-init",
]  # fmt: skip


@dataclass(frozen=True)
class Root:
    """A vector root for one family.

    ``sv-a`` and ``sv-b``: attention. ``sv-ffn``: the other half of the model. ``sv-q``: of each
    attention the query alone, which vLLM fuses with others. ``sv-flipped``: a bit of it has
    flipped. ``sv-nan``: it holds one. ``sv-unplanned``: no plan.
    """

    path: Path
    family: models.Family
    fingerprint: str

    def plan(self, name: str) -> Path:
        return plan_path(self.path / name, self.fingerprint)


def make_root(family: models.Family, folder: Path) -> Root:
    root = Root(folder / "root", family, sampled_fingerprint(Checkpoint(family.task)))
    root.path.mkdir(parents=True)
    for seed, name in enumerate(("sv-a", "sv-b", "sv-ffn", "sv-q", "sv-nan"), 20):
        part, scope = ("mlp", "ffn") if name == "sv-ffn" else ("self_attn", "attention")
        surrogate = models.perturbed(
            family.aligned, folder / f"surrogate-{name}", scale=2e-3, seed=seed, only=part
        )
        build_vector(locate(family.aligned), locate(surrogate), root.path / name, scope=scope)
        if name == "sv-q":
            keep_only(root.path / name, "q_proj")
        add_plan(root, name)
    for name in ("sv-flipped", "sv-unplanned"):
        shutil.copytree(root.path / "sv-b", root.path / name)
    shutil.rmtree(root.plan("sv-unplanned").parent)
    weights = root.path / "sv-flipped" / "safety_vector.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    make_non_finite(root, "sv-nan")
    return root


def keep_only(vector: Path, part: str) -> None:
    """Take every other tensor out of a vector."""
    file, manifest = vector / "safety_vector.safetensors", vector / "safety_vector.json"
    tensors = {name: t for name, t in load_file(file).items() if part in name}
    save_file(tensors, file, metadata={"format": "pt"})
    document = json.loads(manifest.read_text())
    document["tensors"] = {name: document["tensors"][name] for name in tensors}
    document["norm"] = math.hypot(*(t["norm"] for t in document["tensors"].values()))
    manifest.write_text(json.dumps(document))


def add_plan(root: Root, name: str, *, beta: float = 0.5) -> None:
    path = root.plan(name)
    path.parent.mkdir(exist_ok=True)
    plan = models.plan_for(root.family.task, root.family.base, root.path / name, beta=beta)
    path.write_text(plan.to_json())


def make_non_finite(root: Root, name: str) -> None:
    """A NaN whose digests, and whose plan's fingerprint, are right: only the values tell."""
    file, manifest = root.path / name / "safety_vector.safetensors", root.path / name
    tensors = load_file(file)
    chosen = sorted(tensors)[0]
    tensors[chosen].view(-1)[7] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    path = manifest / "safety_vector.json"
    document = json.loads(path.read_text())
    document["tensors"][chosen]["digest"] = tensor_digest(tensors[chosen])
    path.write_text(json.dumps(document))
    plan = json.loads(root.plan(name).read_text())
    plan["safety_vector"]["fingerprint"] = SafetyVector.open(manifest).fingerprint
    root.plan(name).write_text(json.dumps(plan))


class Live(Server):
    """A server of a root's task model; asked over HTTP.

    Args:
        root: The vectors.
        log: Where its output goes.
        arguments: Further arguments of ``vllm serve``.
        start: The loader's keys, besides the root.
        token: Whether it has an admin token.
        variables: Further environment variables.
    """

    def __init__(self, root, log, *arguments, start=None, token=True, variables=None):
        keys = {"vector_root": str(root.path), "safety_vector": "sv-a", **(start or {})}
        extra = ["--model-loader-extra-config", json.dumps(keys)]
        own = ONE_PROCESS | {"VLLM_PLUGINS": "enchtable"}
        if token:
            own["ENCHTABLE_ADMIN_TOKEN"] = TOKEN
        super().__init__(
            root.family.task,
            [*ARGUMENTS, *extra, *arguments],
            log,
            port=free_port(),
            variables=own | (variables or {}),
        )
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def __exit__(self, *error):
        self.http.close()
        super().__exit__(*error)

    def ask_anew(self):
        """Each request on a connection of its own from now on: any API server may get it."""
        self.http.close()
        alone = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.Client(base_url=self.url, timeout=120, limits=alone)

    def swapped_by(self):
        """The API server that each swap was asked of, in the order of their ends: by the log."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        ends = r"swap not done|safety vector (?:swapped|rolled_back|unchanged|dry_run)"
        return re.findall(rf"^\((A\w+Server\w*) .*\] (?:{ends})\b", text, re.MULTILINE)

    def get(self, path):
        response = self.http.get(path)
        return response.status_code, response.json()

    def post(self, path, body=None, headers=ADMIN):
        response = self.http.post(path, json=body or {}, headers=headers)
        return response.status_code, response.json()

    def swap(self, name, **options):
        return self.post("/v1/enchtable/swap", {"safety_vector": name, **options})

    def swapped(self, name, **options):
        status, answer = self.swap(name, **options)
        assert (status, answer.get("outcome")) == (200, "swapped"), answer
        return answer

    def rollback(self, **options):
        return self.post("/v1/enchtable/rollback", options)

    def status(self):
        status, document = self.get("/v1/enchtable/status")
        assert status == 200, document
        return document

    def weights(self):
        """Digests of what the ranks compute with, by engine."""
        status, document = self.post("/v1/enchtable/probe")
        assert status == 200, document
        return document["engines"]

    def complete(self, prompt=(1, 5, 9, 200, 17), max_tokens=8, **options):
        body = {
            "model": str(self.command[2]),
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "detokenize": False,
            "return_token_ids": True,
            **options,
        }
        response = self.http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response

    def begin(self, pool, requests, *, max_tokens=480):
        """Begin requests that take seconds; their futures, once the engines work on them all."""

        def one():
            return self.complete(max_tokens=max_tokens, ignore_eos=True, n=8, temperature=1.0)

        def tokens():
            text = self.http.get("/metrics").text
            return sum(map(float, re.findall(r"^vllm:prompt_tokens_total\S* (\S+)", text, re.M)))

        wanted = tokens() + requests * 8 * 5
        begun = [pool.submit(one) for _ in range(requests)]
        deadline = time.monotonic() + 60
        while (now := tokens()) < wanted:
            assert time.monotonic() < deadline, f"only {now} of {wanted} tokens were read"
            time.sleep(0.02)
        return begun

    @contextlib.contextmanager
    def held(self, fault, *arguments, **options):
        """A swap that waits, staged, for the end of the block; its answer comes after.

        Args:
            fault: The file that the server's planted faults are read from.
            arguments: Those of `swap`.
            options: Those of `swap`.
        """
        fault.write_text(json.dumps({"command": "poll", "do": "hold"}))
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(self.swap, *arguments, **options)
            try:
                deadline = time.monotonic() + 60
                while self.status()["state"] != "swapping":
                    assert not answer.done(), answer.result()
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                yield answer
            finally:
                fault.unlink()

    def swapped_once(self, fault, name, *, clients):
        """Of this many swaps at once one wins, and the others are told at once, while it holds."""
        fault.write_text(json.dumps({"command": "poll", "do": "hold"}))
        with ThreadPoolExecutor(clients) as pool:
            answers = as_completed(pool.submit(self.swap, name) for _ in range(clients))
            try:
                refused = [next(answers).result() for _ in range(clients - 1)]
            finally:
                fault.unlink()
            ((answered, document),) = (answer.result() for answer in answers)
        assert [(code, d["error"]["code"]) for code, d in refused] == [
            (409, "swap_in_progress")
        ] * (clients - 1)
        assert (answered, document["outcome"]) == (200, "swapped")

    def tokens(self, **options):
        return self.complete(**options).json()["choices"][0]["token_ids"]
