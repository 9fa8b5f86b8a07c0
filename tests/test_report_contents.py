"""What the report's page shows, against numbers that are found in another way."""

import re

from plans import dense, make_plan
from reports import Page, facts

from enchtable_vllm.report import report_page


def tiles(text):
    """Of the summary: name → value."""
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))


def test_refused_tensors_are_counted_and_named_with_their_reasons():
    tied, gone = "tied to the embeddings", "not in the task model"
    unused = {"lm_head.weight": tied, "model.layers.9.q.weight": gone, "model.norm.bias": gone}
    text = report_page(facts(make_plan(dense(2), unused=unused)))
    assert tiles(text)["refused tensors"] == "3"
    ((_, rows),) = Page(text).tables["tensors"]
    refused = {why: (names[0], names[1:]) for fate, names, why in rows if fate == "refused"}
    assert refused == {tied: ("1", "lm_head.weight"), gone: ("2", "model.layers.9.q.weight")}
    for why in (tied, gone):
        (listed,) = re.findall(rf"<summary>\d refused: {why}</summary>(.*?)</details>", text)
        names = re.findall(r"<bdi>(.*?)</bdi>", listed)
        assert names == [name for name, reason in unused.items() if reason == why]
    assert "refused tensors" not in tiles(report_page(facts(make_plan(dense(2)))))
