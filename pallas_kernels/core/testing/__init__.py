"""The test suite that every operator passes, as plain functions over its `arg_specs`.

An operator is compared with its own `reference` in float64, on the same numbers: outputs, states,
and every gradient, with random cotangents on y and on the final state. The reference is compared
with documents run one by one, and with golden files in tests/.

    cases      what is called: drawn numbers, and what a call gives for them
    compare    tolerances, in one table
    checks     the suite
"""

from pallas_kernels.core.testing.cases import (
    ArgSpec,
    Arrays,
    Case,
    draw_case,
    letters_of,
    oracle,
    packed_rows,
    required,
    results,
)
from pallas_kernels.core.testing.checks import (
    FAST_LENGTHS,
    SLOW_LENGTHS,
    check_agrees,
    check_configs,
    check_deterministic,
    check_documents_alone,
    check_hand_off,
    check_padding_only,
    check_program_size,
    check_state_dtypes,
    check_vmap,
)
from pallas_kernels.core.testing.compare import (
    TOLERANCES,
    Tolerance,
    assert_close,
    assert_equal,
    tolerance_of,
)

__all__ = [
    "Arrays",
    "ArgSpec",
    "Case",
    "draw_case",
    "letters_of",
    "oracle",
    "packed_rows",
    "required",
    "results",
    "FAST_LENGTHS",
    "SLOW_LENGTHS",
    "check_agrees",
    "check_configs",
    "check_deterministic",
    "check_documents_alone",
    "check_hand_off",
    "check_padding_only",
    "check_program_size",
    "check_state_dtypes",
    "check_vmap",
    "TOLERANCES",
    "Tolerance",
    "assert_close",
    "assert_equal",
    "tolerance_of",
]
