"""Exits 0 when this container's server serves what it should: the image's HEALTHCHECK.

'READY_URL' is for a server that listens elsewhere than the image's default.
"""

import os
import sys
import urllib.error
import urllib.request

url = os.environ.get("READY_URL", "http://127.0.0.1:8000/enchtable/ready")
try:
    with urllib.request.urlopen(url, timeout=8) as answer:
        print(answer.read(1000).decode())
except urllib.error.HTTPError as error:  # 503 says why; 404: VLLM_PLUGINS lacks 'enchtable'
    sys.exit(f"{url}: expected 200, got {error.code}: {error.read(1000).decode()}")
except OSError as error:
    sys.exit(f"{url}: expected an answer, got {error}")
