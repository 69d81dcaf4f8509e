"""`torch.autograd.Function`, as a type checker has to see it."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:

    class Function(torch.autograd.Function):
        """Give `apply` the types that torch leaves out; nothing of it exists at run time."""

        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Any:
            """Compute the outputs."""

else:
    Function = torch.autograd.Function
