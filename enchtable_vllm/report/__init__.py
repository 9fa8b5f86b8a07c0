"""A merge plan for people: its facts, what they warn of, and a page that shows them."""

from enchtable_vllm.report.facts import Facts, collect
from enchtable_vllm.report.page import report_page

__all__ = ["Facts", "collect", "report_page"]
