"""Which of a folder's files are the model: the choice that vLLM's default loader makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from enchtable_vllm.errors import CheckpointError

#: ``consolidated``: safetensors under Mistral's own names.
Kind = Literal["safetensors", "consolidated", "pickled"]

#: What a trainer leaves beside the weights; vLLM passes these over too.
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin")
#: What peft writes beside an adapter.
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Layout:
    """Where the weights are.

    Attributes:
        kind: How they are stored.
        index_name: The index's file name, whether or not there is one.
        files: The weight files on disk; with an index only those that it names count.
    """

    kind: Kind
    index_name: str
    files: tuple[str, ...]


def find_layout(folder: Path, stem: str, what: str) -> Layout:
    """Choose among a folder's files.

    Args:
        folder: The folder.
        stem: ``model``: everything that vLLM's default loader reads, in its order: files
            named by ``model.safetensors.index.json``, any other safetensors, ``.bin``. Another
            stem: its safetensors only.
        what: How an error message calls the folder.

    Raises:
        CheckpointError: There are no weights, two sets of the same ones, or an adapter's alone.
    """
    index_name = f"{stem}.safetensors.index.json"
    names = _listing(folder, what)
    if stem == "model" and _ADAPTER in names and "config.json" not in names:
        raise CheckpointError(
            what,
            expected="a whole model",
            got=f"an adapter ('{_ADAPTER}')",
            fix="Merge it into its base first, with peft: 'merge_and_unload()' and "
            "'save_pretrained'.",
        )
    if stem != "model":
        files = sorted(names & {f"{stem}.safetensors"})
    else:
        files = sorted(name for name in names if name.endswith(".safetensors"))
    if index_name in names:
        return Layout("safetensors", index_name, tuple(files))
    consolidated = [file for file in files if stem == "model" and file.startswith("consolidated")]
    if consolidated and len(consolidated) < len(files):
        raise CheckpointError(
            what,
            expected=f"one set of weights, or '{index_name}' to tell which it is",
            got=f"'{consolidated[0]}' beside '{min(set(files) - set(consolidated))}'",
            fix="Move the consolidated files elsewhere: read together, the second set would "
            "overwrite the first, and with it what was merged.",
        )
    if consolidated:
        return Layout("consolidated", "consolidated.safetensors.index.json", tuple(files))
    if files:
        return Layout("safetensors", index_name, tuple(files))
    pickled = sorted(n for n in names if n.endswith(".bin") and not n.endswith(_NOT_WEIGHTS))
    if stem == "model" and pickled:
        return Layout("pickled", "pytorch_model.bin.index.json", tuple(pickled))
    raise CheckpointError(
        what,
        expected=f"'{stem}.safetensors' or '{index_name}'"
        + (", or 'pytorch_model.bin'" if stem == "model" else ""),
        got="no such file",
        fix="Check the path.",
    )


def _listing(folder: Path, what: str) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except OSError as error:
        raise CheckpointError(
            what, expected="a readable folder", got=error, fix="Check the path."
        ) from error
