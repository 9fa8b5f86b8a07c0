"""Merging: one stream, used by the loader and by the offline merge alike."""

from enchtable_vllm.merge.ahead import Ahead
from enchtable_vllm.merge.cores import has_idle_core
from enchtable_vllm.merge.offline import merge_checkpoint
from enchtable_vllm.merge.one import Merged, TensorMerge
from enchtable_vllm.merge.populate import populate
from enchtable_vllm.merge.recycled import Recycled
from enchtable_vllm.merge.report import MergeReport
from enchtable_vllm.merge.second_names import under_both_names
from enchtable_vllm.merge.stream import MergeStream

__all__ = [
    "Ahead",
    "MergeReport",
    "MergeStream",
    "Merged",
    "Recycled",
    "TensorMerge",
    "has_idle_core",
    "merge_checkpoint",
    "populate",
    "under_both_names",
]
