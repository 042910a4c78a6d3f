# SPDX-License-Identifier: Apache-2.0
"""Cuts the save of a checkpoint at every one of its system calls, by SIGKILL and by a full disk (strace's injection).

  python3 tests/checkpoints/kill_every_syscall.py build/release/checkpoints/checkpoints_tests

A first run under strace lists the calls the save makes. Then one run for each: the process is killed on entering that call,
or the call returns ENOSPC; afterwards the newest checkpoint must load, and nothing but checkpoints may be left.
"""
import collections
import os
import pathlib
import re
import subprocess
import sys
import tempfile

TEST = "--gtest_filter=RunState.ASaveCutAnywhereLeavesAValidCheckpoint"
CALLS = ["openat", "write", "pwrite64", "ftruncate", "fsync", "fdatasync", "close", "mkdir", "rename", "renameat", "renameat2",
         "unlink", "unlinkat", "rmdir", "copy_file_range", "sendfile"]
FULL_DISK = ["openat", "write", "pwrite64", "fsync", "mkdir", "rename"]


def run(program, folder, mode, *strace):
    environment = {**os.environ, "ALAMBIC_TEST_OUTPUT": str(folder), "ALAMBIC_TEST_MODE": mode, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*strace, program, TEST], env=environment, capture_output=True, text=True)


def calls_of_the_save(program, scratch):
    """[(call, its number among calls of that name from the process's start, arguments)], in order."""
    trace, folder = scratch / "trace", scratch / "listed"
    folder.mkdir()
    done = run(program, folder, "save", "strace", "-o", trace, "-e", "trace=" + ",".join(CALLS + ["newfstatat", "stat", "statx"]))
    assert done.returncode == 0, done.stdout + done.stderr
    counts, found, marked = collections.Counter(), [], False
    for line in trace.read_text().splitlines():
        call = re.match(r"(\w+)\((.*)", line)
        if not call:
            continue
        counts[call[1]] += 1
        marked = marked or "/alambic-marker" in line
        if marked and call[1] in CALLS:
            found.append((call[1], counts[call[1]], call[2]))
            if call[1] == "write" and call[2].startswith("1,"):  # gtest's report: the save is over
                found.pop()
                break
    return found


def main():
    program = pathlib.Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        calls = calls_of_the_save(program, scratch)
        assert len(calls) > 40 and any(call == "rename" for call, _, _ in calls), calls
        cuts = [(call, number, text, "signal=KILL") for call, number, text in calls]
        cuts += [(call, number, text, "error=ENOSPC") for call, number, text in calls
                 if call in FULL_DISK and (call != "openat" or "O_CREAT" in text)]
        for i, (call, number, text, fault) in enumerate(cuts):
            folder = scratch / str(i)
            folder.mkdir()
            cut = run(program, folder, "save", "strace", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={number}")
            what = f"{fault} at {call} number {number} ({text[:80]})"
            assert (cut.returncode == 0) == (fault != "signal=KILL"), f"{what}: exit {cut.returncode}\n{cut.stdout}"
            seen = run(program, folder, "verify")
            assert seen.returncode == 0, f"{what}: left {sorted(p.name for p in folder.iterdir())}\n{seen.stdout}"
        print(f"{len(calls)} system calls of a save: killed at each, disk full at {len(cuts) - len(calls)}; a valid checkpoint is always left")


if __name__ == "__main__":
    main()
