"""A short fault campaign; tests/faults/campaign.py runs the whole one."""

import campaign
import pytest


@pytest.mark.parametrize("fault", campaign.FAULTS, ids=lambda fault: fault.__name__)
def test_fault(fault):
    _, count, needs_root = campaign.FAULTS[fault]
    if needs_root and campaign.os.geteuid() != 0:
        pytest.skip("takes root to arrange")
    outcomes = campaign.run(fault, count, seed=1)
    assert outcomes
