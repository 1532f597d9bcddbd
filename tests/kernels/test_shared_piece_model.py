"""The order in which waves of a cluster wait for each other, by a model; and that each of its waits is needed."""

import pytest
import shared_piece_model as model


def test_pieces_in_turns_end_and_nothing_is_overwritten() -> None:
    assert not model.found(400)


@pytest.mark.parametrize(
    "wait", ["before expecting", "await_scores", "the turn before", "tops_passed", "have_read", "meet_output"]
)
def test_the_model_finds_what_a_wait_is_for(wait: str) -> None:
    seed = 470 if wait == "the turn before" else 0  # near the first call that needs it
    assert model.found(2000, without=wait, seed=seed)
