"""The HTTP interface, in vLLM's own API server: see docs/http-api.md."""
