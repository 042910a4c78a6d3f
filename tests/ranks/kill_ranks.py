# SPDX-License-Identifier: Apache-2.0
"""Kills random ranks at random moments of a run by `alambic launch --restarts`, again and again, and compares the end with a run that
nobody disturbed: the same bytes. Python's standard library only.

usage: kill_ranks.py ALAMBIC [--kills N] [--ranks N] [--seed N]
"""
import argparse
import sys

from scene import Scene, kill_ranks


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("alambic")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    total, runs = 0, 0
    scene = Scene(options.alambic, steps=400)
    try:
        scene.train("whole")
        wanted = scene.fingerprint("whole")
        while total < options.kills:
            run = f"run{runs}"
            total += kill_ranks(scene, run, options.kills - total, options.ranks, options.seed + runs, say=lambda text: print(text, file=sys.stderr))
            runs += 1
            if scene.fingerprint(run) != wanted:
                print(f"{run} ended with other bytes than the run that nobody disturbed", file=sys.stderr)
                return 1
    finally:
        scene.close()
    print(f"{total} kills in {runs} runs of {options.ranks} ranks: the same bytes as without")
    return 0


if __name__ == "__main__":
    sys.exit(main())
