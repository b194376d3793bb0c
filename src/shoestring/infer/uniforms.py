"""One random number for each draw, a function of who draws and where: no state, no order.

splitmix64 of a counter (Steele, Lea and Flood 2014), keyed by (seed, stream, sample). A sequence that is preempted,
or decoded beside others, sees the numbers it would have seen alone.
"""

from __future__ import annotations

import hashlib

import numpy as np

GAMMA, A, B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
FEW = 16  # rows up to which Python's own integers are faster than twelve small arrays


def draw_key(seed: int, stream: int, sample: int) -> int:
    """64 bits that name a sample's stream of random numbers."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniforms(keys: list[int], positions: list[int]) -> np.ndarray:
    """For each key and position a number in [0, 1), fp64 with 53 random bits."""
    if len(keys) <= FEW:
        return np.array([_uniform(key, position) for key, position in zip(keys, positions, strict=True)])
    with np.errstate(over="ignore"):  # arithmetic is meant to wrap
        z = np.array(keys, dtype=np.uint64) + (np.array(positions, dtype=np.uint64) + np.uint64(1)) * np.uint64(GAMMA)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(A)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(B)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _uniform(key: int, position: int) -> float:
    """One of them."""
    mask = (1 << 64) - 1
    z = (key + (position + 1) * GAMMA) & mask
    z = (z ^ (z >> 30)) * A & mask
    z = (z ^ (z >> 27)) * B & mask
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53
