"""A test that has a target is skipped where that is missing, and makes its tensors where the target reads them."""

import pytest
import torch
from driver import require


@pytest.fixture(autouse=True)
def on_target(request):
    if "target" not in request.fixturenames:
        yield
        return
    target = request.getfixturevalue("target")
    require(target)
    with torch.device("cuda" if target == "cuda" else "cpu"):
        yield
