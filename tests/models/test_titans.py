"""Models of Titans: as large as their files say, from shapes alone."""

import pytest

from seqzoo.config.compose import compose
from seqzoo.config.paths import shipped
from seqzoo.eval import describe


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
def test_size(variant):
    name = f"titans_{variant}_340m"
    total = describe.parameters(describe.abstract_model(compose([f"model={name}"]).model)).total
    text = (shipped() / "model" / f"{name}.yaml").read_text()
    assert f"of {total / 1e6:.1f}M parameters" in text
    assert abs(total / 340e6 - 1) < 0.02  # the paper's
