"""Programmatic dependent launch (CUDA Programming Guide): a kernel starts while the one before it still runs.

A kernel that is launched so does two things first. It lets the next one start, which then waits in turn; and it waits
until the one before has ended and its results can be read. Only what no kernel writes, weights, may be touched earlier.
Every kernel waits, even if it reads nothing of the one before: else the next could overtake both.
"""

import torch

OVERLAP = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
LAUNCH = {
    "launch_pdl": OVERLAP,
    "enable_fp_fusion": True,  # Triton's default until 3.9, which 3.10 turns round: a * b + c rounded once
}  # what every launch of a kernel says
