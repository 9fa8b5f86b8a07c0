"""Pages that stand alone: the skeleton and the few marks that every page of the project shares."""

from enchtable_vllm.page.document import (
    Html,
    cell,
    heading,
    label,
    page,
    paragraph,
    table,
    text,
)

__all__ = ["Html", "cell", "heading", "label", "page", "paragraph", "table", "text"]
