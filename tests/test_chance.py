"""The randomness of rows: that of each row alone, however many are drawn side by side and in whichever process."""

import multiprocessing
import os

import numpy as np
import pytest

from sfv_world import chance

ROWS = 2 * chance.ROWS_IN_TURN
SEEDS, AGES = np.arange(ROWS), 3 * np.arange(ROWS)


def test_a_row_is_the_same_among_many() -> None:
    noise = chance.noise(SEEDS, AGES, (3, 2))
    uniform, normal = chance.noise_of_observed(SEEDS, AGES, 2, (4, 4, 3), (2, 2, 5))
    assert len(np.unique(noise)) == noise.size
    for row in range(ROWS):
        alone = slice(row, row + 1)
        np.testing.assert_array_equal(noise[alone], chance.noise(SEEDS[alone], AGES[alone], (3, 2)))
        of_one = chance.noise_of_observed(SEEDS[alone], AGES[alone], 2, (4, 4, 3), (2, 2, 5))
        np.testing.assert_array_equal(uniform[alone], of_one[0])
        np.testing.assert_array_equal(normal[alone], of_one[1])


@pytest.mark.parametrize("later", [-1, 0, 1])
def test_whether_a_frame_ends_its_episode_has_nothing_to_do_with_its_noise(later: int) -> None:
    """Numbers of one stream are made of the same bits: the first uniform one tells the first normal one's size."""
    seeds, age = np.arange(4000), np.full(4000, 7)
    draws, noise = chance.draws(seeds, age), chance.noise(seeds, age + later, (1,))[:, 0]
    uniform = chance.noise_of_observed(seeds, age + later, 1, (1, 1, 3), (1, 1, 1))[0][:, 0, 0, 0, 0]
    for other in (noise, np.abs(noise), uniform):
        assert abs(np.corrcoef(draws, other)[0, 1]) < 4 / 4000**0.5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_forked_process_draws_the_same() -> None:
    """Gymnasium's AsyncVectorEnv may fork one that has drawn before."""
    here, there = chance.noise(SEEDS, AGES, (2,)), multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(target=lambda: there.put(chance.noise(SEEDS, AGES, (2,))))
    child.start()
    np.testing.assert_array_equal(there.get(timeout=60), here)
    child.join()
