"""A million random operations on contiguous memory, compared with a map of its slots after every one.

    python tests/benchmarks/allocators.py [--operations 1000000]

Then the speed of the allocators alone, without the comparison. Prints a line for each kind; exits with an
error as soon as a slot is lost or given out twice.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1] / "invariants"))

from slot_model import KINDS, POLICIES, SlotPair, live_on

from servesim.kv.address_space import Fit, build_address_space


def compare(operations: int) -> None:
    """The operations, spread over every policy and fit."""
    each = -(-operations // (len(KINDS) * len(POLICIES)))
    for policy in POLICIES:
        for fit in KINDS:
            rng, begin_s = Random(f"{policy} {fit}"), time.perf_counter()
            pair = SlotPair(231, 60, policy, fit)
            refused = 0
            for _ in range(each):
                live_on(pair, rng)
                pair.check()
                refused += bool(pair.refused)
            took_s = time.perf_counter() - begin_s
            print(f"{policy:<7} {fit:<6} {each:>8,} operations, {refused:>7,} refused: ok, {took_s:.0f} s")


def measure(fit: Fit, operations: int = 200_000) -> None:
    """Allocations of 16 to 2,048 slots in a pool of a million, kept nearly full."""
    rng, space = Random(1), build_address_space(fit, 1_000_000)
    live: list[tuple[int, int]] = []
    sizes = [rng.randint(16, 2048) for _ in range(operations)]
    begin_s = time.perf_counter()
    for size in sizes:
        while space.largest_hole < space.granted(size):
            address, held = live.pop(rng.randrange(len(live)))
            space.free(address, held)
        live.append((space.allocate(size), size))
    took_s = time.perf_counter() - begin_s
    print(f"{fit:<6} {took_s / operations * 1e6:.1f} us per allocation and free, {len(live)} live")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=1_000_000)
    compare(parser.parse_args().operations)
    for kind in KINDS:
        measure(kind)
