"""Safety vectors: aligned − surrogate, on disk, verified byte by byte when used."""

from enchtable_vllm.vector.build import BuildReport, build_vector
from enchtable_vllm.vector.delta import Delta
from enchtable_vllm.vector.factor_files import add_factors
from enchtable_vllm.vector.format import (
    VECTOR_FILE_STEM,
    VECTOR_MANIFEST,
    ModelReference,
    VectorManifest,
    VectorTensor,
)
from enchtable_vllm.vector.safety_vector import SafetyVector
from enchtable_vllm.vector.scope import SCOPES, Scope, in_scope, narrows

__all__ = [
    "SCOPES",
    "VECTOR_FILE_STEM",
    "VECTOR_MANIFEST",
    "BuildReport",
    "Delta",
    "ModelReference",
    "SafetyVector",
    "Scope",
    "VectorManifest",
    "VectorTensor",
    "add_factors",
    "build_vector",
    "in_scope",
    "narrows",
]
