"""Pure, typed loss functions for PyTorch, and every term has a name."""

from . import energy as energy
from . import groups as groups
from . import joint_embedding as joint_embedding
from . import lm as lm
from . import sae as sae
from ._cached_gradients import cached_gradients as cached_gradients
from ._contract import ContractError as ContractError
from ._contract import contract as contract
from ._module import LossModule as LossModule
from ._term_average import TermAverage as TermAverage
from ._term_gradients import TermGradients as TermGradients
from ._term_gradients import term_gradients as term_gradients
from ._terms import Terms as Terms
from ._terms import terms as terms

__version__ = "0.2.0"
