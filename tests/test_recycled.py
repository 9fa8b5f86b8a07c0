"""Memory that comes back when the tensors made of it are gone."""

import threading

import torch

from enchtable_vllm.merge import Recycled


def test_memory_is_used_again_when_the_last_view_of_it_is_gone():
    memory = Recycled()
    first = memory.empty((4, 6), torch.bfloat16)
    assert (first.shape, first.dtype, first.is_contiguous()) == ((4, 6), torch.bfloat16, True)
    place, view = first.data_ptr(), first.view(-1)[3:]
    del first
    assert memory.empty((4, 6), torch.bfloat16).data_ptr() != place  # a view of it lives
    kept = memory.empty((4, 6), torch.bfloat16)
    assert kept.data_ptr() != place
    del view
    assert memory.empty((2, 6), torch.float32).data_ptr() == place  # as many bytes
    assert memory.empty((5, 6), torch.bfloat16).data_ptr() != place


def test_memory_comes_back_from_other_threads():
    memory, places = Recycled(), set()
    for _ in range(20):
        tensor = [memory.empty((1000,), torch.float32)]
        places.add(tensor[0].data_ptr())
        thread = threading.Thread(target=tensor.clear)
        thread.start()
        thread.join()
    assert len(places) == 1
