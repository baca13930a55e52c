"""Random numbers as a function of (seed, epoch, sample id), independent of worker count and restarts."""

import numpy as np


def uniforms(seed: int, epoch: int, ids: np.ndarray, count: int) -> np.ndarray:
    """Draw float64 (N,count) in [0,1), a function of seed, epoch and each id alone. ids: uint64 (N,)."""
    return (random_bits(seed, epoch, ids, count) >> np.uint64(11)) * 2.0**-53


def random_bits(seed: int, epoch: int | np.ndarray, ids: np.ndarray, count: int) -> np.ndarray:
    """Draw uint64 (N,count) of independent random bits, a function of seed, epoch and each id alone. ids: uint64 (N,).

    epoch: of all ids, or int64 (N,) of each.
    SplitMix64 (Steele, Lea and Flood 2014) over a state hashed from the three.
    """
    with np.errstate(over="ignore"):
        state = _mix(
            np.asarray(ids, np.uint64) ^ _mix(np.array(seed, np.uint64) + _mix(np.array(epoch + 1, np.uint64)))
        )
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return _mix(state[:, None] + steps)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
