"""Settings of every test: one BLAS thread, and offscreen rendering where there is no display."""

from __future__ import annotations

import os

# As the commands set it: matrix products round alike wherever in memory a matrix lies.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
if "DISPLAY" not in os.environ:
    os.environ.setdefault("MUJOCO_GL", "egl")

import torch

torch.set_num_threads(1)
