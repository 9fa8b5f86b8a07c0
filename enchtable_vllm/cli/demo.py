"""``enchtable demo``."""

def demo() -> None:
    """Demo."""
