"""The Triton kernels of the project and the calls that stand for them: what the table and the spill test look at.

To add a kernel: write a function that allocates its tensors and calls the project's own launcher, and list it in
`CASES` with the arguments of a representative call, and those of a call small enough for the interpreter that goes
through the same kernels. The function returns the tensor whose elements are the unit of "bytes per element".

The function must not compute on its tensors (they can be large; `torch.empty` costs nothing), except for integer
inputs that a kernel uses as indices. CUDA kernels need no entry: every kernel in csrc/cuda/*.cu is in the table.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One representative call; `call(*full)` is compiled, `call(*small)` is run under the interpreter."""

    name: str
    call: Callable[..., Tensor]
    full: tuple
    small: tuple


CASES: list[Case] = []


def run(name: str) -> None:
    """Makes the representative call; cubin.launch_facts calls this by name."""
    (case,) = (case for case in CASES if case.name == name)
    case.call(*case.full)
