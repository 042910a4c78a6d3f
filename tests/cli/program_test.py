#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The built program as a process: what only a process can show (signals, pipes, environment, locale, bytes in paths).

usage: program_test.py ALAMBIC
"""
import json
import os
import signal
import subprocess
import sys
import tempfile
import unittest

ALAMBIC = os.path.abspath(sys.argv.pop(1))


def run(*words, env=None, stdin=None, stdout=subprocess.PIPE, cwd=None):
    return subprocess.run([ALAMBIC, *words], env=env, input=stdin, stdout=stdout, stderr=subprocess.PIPE, cwd=cwd, timeout=120)


class Program(unittest.TestCase):
    def test_exit_codes_and_channels(self):
        done = run("--version")
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertTrue(done.stdout.startswith(b"alambic "))
        wrong = run("scroe")
        self.assertEqual((wrong.returncode, wrong.stdout), (2, b""))
        self.assertEqual(wrong.stderr, b"alambic: unknown verb scroe; did you mean score?\n  remedy: alambic --help lists the verbs\n")
        self.assertEqual(run().returncode, 2)
        self.assertEqual(run("inspect", "/no/such/path").returncode, 3)

    def test_a_full_disk_behind_stdout(self):
        with open("/dev/full", "wb") as full:
            done = run("--help", stdout=full)
        self.assertEqual(done.returncode, 5)
        self.assertIn(b"standard output cannot be written", done.stderr)

    def test_a_reader_that_went_away_ends_it_quietly(self):
        for words in (("man",), ("train", "--help"), ("doctor", "--json")):
            read_end, write_end = os.pipe()
            os.close(read_end)
            done = run(*words, stdout=write_end)
            os.close(write_end)
            self.assertEqual((done.returncode, done.stderr), (-signal.SIGPIPE, b""), words)
        piped = subprocess.run(["bash", "-c", '"$0" train --help | head -n 1; echo "${PIPESTATUS[0]}"', ALAMBIC], capture_output=True, timeout=120)
        self.assertEqual(piped.stderr, b"")
        self.assertIn(piped.stdout.splitlines()[1], (b"0", b"141"))  # 0: all was in the pipe before head closed it

    def test_long_values_and_line_breaks_in_one_word(self):
        long = "w4 " * 40_000  # 120 kB; the kernel allows 128 KiB a word
        for word in ("--text=" + long, "--text=a\nb", "-" + "q" * 100_000, "-m" + long, "--" + "a" * 100_000, "--" + "a-" * 40_000 + "=x"):
            done = run("score", "-m", "/no/such/model", word)
            self.assertIn(done.returncode, (2, 3), (word[:20], done.stderr[-200:]))
            self.assertTrue(done.stderr.startswith(b"alambic: "), word[:20])

    def test_an_empty_environment(self):
        done = run("doctor", "--json", env={})  # no HOME, no PATH, no LANG
        self.assertIn(done.returncode, (0, 5))
        self.assertEqual(done.stderr, b"")
        self.assertGreater(json.loads(done.stdout)["memory"]["available"], 0)

    def test_other_locales(self):
        for name in ("de_DE.UTF-8", "tr_TR.UTF-8", "xx_XX", "C"):
            env = dict(os.environ, LC_ALL=name, LANG=name)
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "run.yaml")
                with open(path, "w", encoding="utf-8") as file:
                    file.write("model: m\noutput: o\ndata: {mixture: [{store: s}]}\nschedule: {learning_rate: 0.5}\n")
                done = run("inspect", path, "--json", env=env)
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertEqual(json.loads(done.stdout)["config"]["schedule"]["learning_rate"], 0.5)

    def test_paths_of_any_bytes(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(os.fsencode(folder), b"caf\xe9 \n.yaml")
            with open(path, "wb") as file:
                file.write(b"model: m\noutput: o\ndata: {mixture: [{store: s}]}\n")
            done = run("inspect", path, "--json")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(done.stdout.count(b"\n"), 1)
            json.loads(done.stdout)
            missing = run("inspect", path + b"x")
            self.assertEqual(missing.returncode, 3)
            self.assertEqual(missing.stderr.count(b"\n"), 2)  # one line of cause, one of remedy
            self.assertEqual(run("inspect", os.path.join(os.fsencode(folder), b"n" * 300)).returncode, 3)

    def test_no_colours(self):
        for words in (("--help",), ("train", "--help"), ("doctor",)):
            self.assertNotIn(b"\x1b", run(*words).stdout)

    def test_the_input_is_judged_before_the_output(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "x.gguf")
            with open(path, "wb") as file:
                file.write(b"GGUF\x03\x00\x00\x00")
            self.assertEqual(run("import", path, "/proc/out").returncode, 3)


if __name__ == "__main__":
    unittest.main()
