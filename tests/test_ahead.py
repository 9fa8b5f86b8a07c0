"""Results that are made ahead of their use: each once, in any order, within a budget."""

import threading
import time

import pytest

from enchtable_vllm.merge import Ahead

SIZES = {f"tensor {i}": 10 + i for i in range(8)}
NAMES = list(SIZES)


class Making:
    """Makes a result of a name, and notes which thread made what."""

    def __init__(self, *, fails=""):
        self.made, self.threads, self._fails = [], set(), fails

    def __call__(self, name):
        self.made.append(name)
        self.threads.add(threading.current_thread().name)
        if name == self._fails:
            raise OSError(f"no {name}")
        return name.upper()


@pytest.fixture
def ahead():
    begun = []

    def begin(make, budget_bytes=10**6, **options):
        begun.append(Ahead(make, SIZES, budget_bytes, **options))
        return begun[-1]

    yield begin
    for each in begun:
        each.close()


def settled(making):
    """What has been made when nothing more is."""
    before = None
    while before != making.made:
        before = list(making.made)
        time.sleep(0.05)
    return before


@pytest.mark.parametrize("order", [list, reversed])
@pytest.mark.parametrize("budget", [0, 25, 40, 10**6])
@pytest.mark.parametrize("patient", [False, True])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_each_comes_once_whoever_makes_it(ahead, order, budget, patient, beside, threads):
    making = Making()
    begun = ahead(making, budget, beside=beside, threads=threads)
    if patient:
        settled(making)
    for name in order(NAMES):
        assert (begun.take(name) or making(name)) == name.upper()
    assert sorted(making.made) == NAMES


def test_no_more_lies_ready_than_the_budget_allows(ahead):
    making = Making()
    begun = ahead(making, SIZES[NAMES[0]] + SIZES[NAMES[1]])
    assert settled(making) == NAMES[:2]
    assert begun.take(NAMES[0]) == NAMES[0].upper()
    assert settled(making) == NAMES[:2]  # the third is larger than what was taken
    assert begun.take(NAMES[1]) == NAMES[1].upper()
    assert settled(making) == NAMES[:3]
    assert making.threads == {"enchtable-ahead-0"}


def test_where_no_core_is_idle_they_work_only_while_the_asking_one_does(ahead):
    making, asking = Making(), threading.current_thread().name
    begun = ahead(making, SIZES[NAMES[0]] + SIZES[NAMES[1]], beside=False)
    assert settled(making) == []  # vLLM makes its empty model
    begun.fill()
    for name in NAMES[:2]:
        assert begun.take(name) == name.upper()
    assert settled(making) == NAMES[:2]  # it copies
    assert begun.take(NAMES[2]) == NAMES[2].upper()
    assert making.made == NAMES[:3]  # no room for the fourth beside it, until it was taken
    assert begun.take(NAMES[3]) == NAMES[3].upper()
    assert making.threads <= {"enchtable-ahead-0", asking}


def test_filling_makes_all_that_may_lie_ready_before_it_returns(ahead):
    ready = threading.Event()

    def make(name):
        assert ready.wait(10)
        return name.upper()

    begun = ahead(make, beside=False, threads=2)
    threading.Timer(0.1, ready.set).start()
    begun.fill()
    assert not begun._making
    assert sorted(begun._ready) == NAMES


def test_what_was_asked_for_too_early_is_not_made_again(ahead):
    making = Making()
    begun = ahead(making, 0)
    assert begun.take(NAMES[3]) is None
    for name in (*NAMES[:3], *NAMES[4:]):
        assert begun.take(name) is None
    assert settled(making) == []


def test_an_error_meets_whoever_asks_for_that_one(ahead):
    begun = ahead(Making(fails=NAMES[2]))
    for name in (*NAMES[:2], *NAMES[3:]):
        begun.take(name)
    for thread in begun._threads:
        thread.join()
    with pytest.raises(OSError, match=NAMES[2]):
        begun.take(NAMES[2])


@pytest.mark.parametrize("budget", [0, 25, 10**6])
def test_closing_leaves_no_thread(ahead, budget):
    begun = ahead(Making(), budget)
    begun.close()
    assert not any(thread.is_alive() for thread in begun._threads)
    begun.close()
