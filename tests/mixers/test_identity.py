"""The mixer that mixes nothing keeps the contract as well."""

import pytest

from seqzoo.mixers import Identity
from seqzoo.testing import PROMISES, Subject, check_promise

SUBJECT = Subject(build=Identity)


@pytest.mark.parametrize("promise", PROMISES)
def test_promise(promise):
    result = check_promise(promise, SUBJECT)
    assert result.outcome == "kept", result.detail
