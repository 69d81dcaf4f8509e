"""Property-based tests for loss functions, which this library's own tests use as well.

Requires the extra `testing`.
"""

from importlib.util import find_spec as _find_spec

if _find_spec("hypothesis") is None:
    raise ModuleNotFoundError(
        'termwise.testing needs hypothesis: pip install "termwise[testing]"', name="hypothesis"
    )

from ._calls import BrokenCall as BrokenCall
from ._calls import Call as Call
from ._calls import Inputs as Inputs
from ._calls import broken_calls as broken_calls
from ._calls import calls as calls
from ._derivatives import assert_double_backward as assert_double_backward
from ._derivatives import assert_forward_mode as assert_forward_mode
from ._deterministic import assert_deterministic as assert_deterministic
from ._launches import assert_launches as assert_launches
from ._laws import assert_compiles as assert_compiles
from ._laws import assert_contract as assert_contract
from ._laws import assert_finite as assert_finite
from ._laws import assert_formula as assert_formula
from ._laws import assert_gradients as assert_gradients
from ._laws import assert_permutation_invariant as assert_permutation_invariant
from ._laws import assert_pure as assert_pure
from ._laws import assert_scale as assert_scale
from ._laws import assert_shift_invariant as assert_shift_invariant
from ._laws import assert_symmetric as assert_symmetric
from ._laws import assert_terms_sum as assert_terms_sum
from ._laws import assert_vmaps as assert_vmaps
from ._masked import assert_masked as assert_masked
from ._ranks import Ranks as Ranks
from ._recompiles import assert_recompiles as assert_recompiles
from ._recovers import GaussianEnergy as GaussianEnergy
from ._recovers import check_recovers as check_recovers
from ._recovers import exact_noise as exact_noise
from ._recovers import exact_projections as exact_projections
from ._recovers import sigma_points as sigma_points
from ._sharding import assert_sharding as assert_sharding
