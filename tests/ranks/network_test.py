# SPDX-License-Identifier: Apache-2.0
"""Two ranks in two network namespaces: over a slow link, over one that breaks in mid-step or for a moment, and through a program that delays,
loses and resets. Python's standard library only. Ends with 77 and the reason when the machine or its privileges do not allow one of these.

usage: network_test.py ALAMBIC
"""
import os
import subprocess
import sys
import time
import unittest

import network
from scene import Scene, WithScene, environment, wait_until

ALAMBIC = WithScene.alambic = os.path.abspath(sys.argv.pop(1))
TIMEOUT = 5


class Network(WithScene):
    def setUp(self):
        self.spaces = network.Namespaces()
        self.addCleanup(self.spaces.close)
        self.processes = []
        self.addCleanup(self.end_all)

    def end_all(self):
        for process in self.processes:
            process.kill()
            process.communicate()

    def start(self, run, *more, scene=None):
        """A rank in each namespace."""
        scene = scene or self.scene
        for rank in (0, 1):
            env = environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR=network.ADDRESSES[0], MASTER_PORT="29500", GLOO_SOCKET_IFNAME=self.spaces.interfaces[rank])
            self.processes.append(subprocess.Popen(self.spaces.words(rank, *scene.words(run, *more)), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))

    def wait(self, seconds=200):
        """(exit code, stderr) of each rank."""
        ends = [process.communicate(timeout=seconds) for process in self.processes]
        return [(process.returncode, err) for process, (_, err) in zip(self.processes, ends, strict=True)]

    def finish(self, run):
        for code, err in self.wait():
            self.assertEqual(code, 0, err)
        self.assertEqual(self.scene.fingerprint(run), self.whole)

    def long_run(self, run, *more):
        """Ranks that go on for ever, at some step."""
        self.start(run, "--set", "limits.max_steps=1000000", "--set", f"ranks.timeout={TIMEOUT}", *more)
        wait_until(lambda: self.scene.steps_done(run) >= 5 or any(process.poll() is not None for process in self.processes), 100, "the first steps")

    def expect_lost(self, began, seconds, patterns):
        """Both ranks end with 7 in time, and each says what its pattern says."""
        ends = self.wait()
        self.assertLess(time.monotonic() - began, seconds)
        for (code, err), pattern in zip(ends, patterns, strict=True):
            self.assertEqual(code, 7, err)
            self.assertRegex(err, pattern)


class Veth(Network):
    def test_the_same_bytes_and_all_of_them_over_the_interface(self):
        self.spaces.join_by_veth()
        self.start("veth")
        self.finish("veth")
        for end in (0, 1):
            self.assertGreater(self.spaces.bytes_received(end), 20 * 5000)

    def test_a_slow_link_is_slow_and_changes_nothing(self):
        self.spaces.join_by_veth(rate="1mbit")
        began = time.monotonic()
        self.start("slow")
        self.finish("slow")
        seconds, most = time.monotonic() - began, max(self.spaces.bytes_received(end) for end in (0, 1))
        self.assertGreater(seconds, 0.8 * most * 8 / 1e6)
        self.assertGreater(most, 20 * 5000)

    def test_a_link_that_goes_down_in_mid_step_ends_all(self):
        self.spaces.join_by_veth(rate="1mbit")  # nearly all of a step is a sum under way
        self.long_run("down")
        began = time.monotonic()
        self.spaces.set_link("down")
        where = r"in step \d+, [a-z ]+"
        self.expect_lost(began, TIMEOUT + 10, [rf"rank 1 hangs {where}: no sign of life for \d+ s .*; this is rank 0, {where}", rf"rank 0 hangs {where}: no answer for 4 s .*; this is rank 1, {where}"])
        self.assertGreater(time.monotonic() - began, TIMEOUT)

    def test_a_link_that_comes_back_within_the_timeout_is_no_loss(self):
        scene = Scene(ALAMBIC, steps=60)
        try:
            scene.train("whole")
            self.spaces.join_by_veth(rate="1mbit")
            self.start("back", scene=scene)
            wait_until(lambda: scene.steps_done("back") >= 5, 100, "the first steps")
            self.spaces.set_link("down")
            time.sleep(3)
            before = scene.steps_done("back")
            time.sleep(1)
            self.assertEqual(scene.steps_done("back"), before)  # nothing gets through
            self.spaces.set_link("up")
            for code, err in self.wait():
                self.assertEqual(code, 0, err)
            self.assertEqual(scene.fingerprint("back"), scene.fingerprint("whole"))
        finally:
            scene.close()


class Proxied(Network):
    def setUp(self):
        if network.no_proxy():
            self.skipTest(network.no_proxy())
        super().setUp()
        self.proxy = self.spaces.join_by_proxy()
        self.addCleanup(self.proxy.close)

    def connections(self):
        """(the watch's, Gloo's) ports: beside the store's there are these two, and tensors are more than signs of life."""
        found = {ports: size for ports, size in self.proxy.bytes_of.items() if 29500 not in ports}
        self.assertEqual(len(found), 2, found)
        return sorted(found, key=found.get)

    def test_delay_and_loss_change_nothing(self):
        self.proxy.delay, self.proxy.loss = 0.02, 0.01
        began = time.monotonic()
        self.start("delayed")
        self.finish("delayed")
        self.assertGreater(time.monotonic() - began, 20 * 4 * 0.02)  # a step has four calls at least, none of which is answered sooner
        self.assertGreater(self.proxy.num_dropped, 0)
        self.assertGreater(self.proxy.num_carried, 20 * 10)

    def test_what_is_held_for_longer_than_the_timeout_ends_all(self):
        self.long_run("stuck")
        began = time.monotonic()
        self.proxy.holds = True
        self.expect_lost(began, TIMEOUT + 10, [r"rank 1 hangs in step \d+", r"rank 0 hangs in step \d+"])

    def test_a_reset_of_tensors_connection_ends_all(self):
        self.long_run("reset")
        began = time.monotonic()
        _, self.proxy.resets = self.connections()
        # The end that reads first sees the reset; the other one that, or that the first has left.
        said = r"alambic: (the connection to rank {0} broke: (Read error .* reset by peer|Connection closed by peer)|rank {0} (failed|died) in step \d+)"
        self.expect_lost(began, 10, [said.format(1), said.format(0)])
        self.assertGreater(self.proxy.num_reset, 0)

    def test_a_reset_of_the_watchs_connection_ends_all(self):
        self.long_run("unwatched")
        began = time.monotonic()
        self.proxy.resets, _ = self.connections()
        self.expect_lost(began, 10, [r"rank 1 died in step \d+", r"rank 0 died in step \d+"])
        self.assertGreater(self.proxy.num_reset, 0)


if __name__ == "__main__":
    if network.impossible():
        print(f"skipped: {network.impossible()}")
        sys.exit(77)
    done = unittest.main(exit=False).result
    for test, reason in done.skipped:
        print(f"skipped: {test}: {reason}")
    sys.exit(1 if not done.wasSuccessful() else 77 if done.skipped else 0)
