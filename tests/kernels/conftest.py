"""Where there is no GPU, Triton's interpreter runs the kernels. It must be chosen before the
first import of triton; child processes of other tests get an environment without it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
