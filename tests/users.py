"""Another user than root, whose permissions know no limits."""

import os
from contextlib import contextmanager


@contextmanager
def nobody():
    """As a user who owns nothing."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
