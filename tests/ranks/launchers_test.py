# SPDX-License-Identifier: Apache-2.0
"""Ranks that torchrun, mpirun and srun start come to the bytes of one rank. Each launcher is a real one; a test is skipped only where its
launcher is not installed. Python's standard library only.

usage: launchers_test.py ALAMBIC TORCHRUN
"""
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

from scene import Scene, WithScene, environment, free_port, is_alive, wait_until

ALAMBIC = WithScene.alambic = os.path.abspath(sys.argv.pop(1))
TORCHRUN = os.path.abspath(sys.argv.pop(1))


def missing(*programs):
    """Why a test is skipped; "" where all are installed."""
    absent = [program for program in programs if shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin") is None]
    return f"{', '.join(absent)} not installed: run scripts/setup.sh --oracle" if absent else ""


class Launched(WithScene):
    def finish(self, words, code=0, env=None, seconds=200):
        done = subprocess.run([str(word) for word in words], env=env or environment(), capture_output=True, text=True, timeout=seconds)
        self.assertEqual(done.returncode, code, f"{done.stdout}\n{done.stderr}")
        return done


@unittest.skipIf(missing(TORCHRUN), missing(TORCHRUN))
class Torchrun(Launched):
    def test_two_ranks(self):
        self.finish([TORCHRUN, "--no-python", "--nproc-per-node", "2", "--master-port", free_port(), *self.scene.words("static")])
        self.assertEqual(self.scene.fingerprint("static"), self.whole)

    def test_its_agents_own_store(self):
        done = self.finish([TORCHRUN, "--no-python", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", *self.scene.words("agent")])
        self.assertEqual(self.scene.fingerprint("agent"), self.whole, done.stderr)

    def test_a_killed_rank_is_started_again_by_torchrun(self):
        scene = Scene(ALAMBIC, steps=2000)
        try:
            scene.train("whole")
            process = subprocess.Popen([TORCHRUN, "--no-python", "--nproc-per-node", "2", "--max-restarts", "2", "--monitor-interval", "0.2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
                                        *scene.words("again", "--resume")], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            wait_until(lambda: scene.steps_done("again") >= 50, 120, "the first steps")
            found = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_alive(pid) and command_of(pid)[:2] == [ALAMBIC, "train"] and any(word.endswith("again.yaml") for word in command_of(pid))]
            self.assertEqual(len(found), 2)
            os.kill(found[1], signal.SIGKILL)
            _, err = process.communicate(timeout=200)
            self.assertEqual(process.returncode, 0, err)
            self.assertIn("resuming from checkpoint-", err)
            self.assertEqual(scene.fingerprint("again"), scene.fingerprint("whole"))
        finally:
            scene.close()


def command_of(process):
    try:
        return pathlib.Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []


@unittest.skipIf(missing("mpirun"), missing("mpirun"))
class Mpirun(Launched):
    WORDS = ["mpirun", "--allow-run-as-root", "--oversubscribe"]

    def test_two_and_four_ranks(self):
        for ranks in (2, 4):
            self.finish([*self.WORDS, "-n", ranks, *self.scene.words(f"mpi{ranks}")])
            self.assertEqual(self.scene.fingerprint(f"mpi{ranks}"), self.whole)

    def test_a_conflict_names_the_variables(self):
        done = self.finish([*self.WORDS, "-n", "2", "-x", "RANK=0", "-x", "WORLD_SIZE=2", *self.scene.words("conflict")], code=7)
        self.assertIn("RANK=0, but OMPI_COMM_WORLD_RANK=1", done.stderr)


SLURM = ("munged", "slurmctld", "slurmd", "srun", "sbatch")


@unittest.skipIf(missing(*SLURM), missing(*SLURM))
@unittest.skipIf(os.getuid() != 0, "Slurm's daemons are started here as root only")
class Srun(Launched):
    """A Slurm of one node, with daemons of this test's own."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = tempfile.TemporaryDirectory(prefix="alambic-slurm-")
        root = pathlib.Path(cls.folder.name)
        root.chmod(0o755)
        for name in ("state", "spool"):
            (root / name).mkdir()
        (root / "key").write_bytes(os.urandom(1024))
        (root / "key").chmod(0o400)
        host = socket.gethostname().split(".")[0]
        (root / "slurm.conf").write_text("\n".join([
            "ClusterName=alambic", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={free_port()}", f"SlurmdPort={free_port()}",
            "AuthType=auth/munge", f"AuthInfo=socket={root}/munge.socket", "CryptoType=crypto/munge", "SlurmUser=root", "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none",
            "SelectType=select/cons_tres", "SelectTypeParameters=CR_CPU", f"StateSaveLocation={root}/state", f"SlurmdSpoolDir={root}/spool", f"SlurmctldPidFile={root}/ctld.pid",
            f"SlurmdPidFile={root}/slurmd.pid", "ReturnToService=2", "MpiDefault=none", "JobRequeue=1", "KillWait=30", "SlurmdParameters=config_overrides",
            f"NodeName={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN", f"PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP", ""]))
        cls.env = environment(SLURM_CONF=str(root / "slurm.conf"))
        cls.env["PATH"] += ":/usr/sbin"
        cls.daemons = []
        try:
            cls.daemon(root, "munged", "--foreground", "--force", f"--key-file={root}/key", f"--socket={root}/munge.socket", f"--pid-file={root}/munge.pid", f"--log-file={root}/munge.log",
                       f"--seed-file={root}/munge.seed", "--num-threads=2")
            wait_until((root / "munge.socket").exists, 30, "munged's socket")
            cls.daemon(root, "slurmctld", "-D", "-f", root / "slurm.conf")
            cls.daemon(root, "slurmd", "-D", "-f", root / "slurm.conf")
            wait_until(lambda: b"idle" in subprocess.run(["sinfo", "-h", "-o", "%T"], env=cls.env, capture_output=True, timeout=60).stdout, 90, "an idle node")
        except BaseException:
            sys.stderr.write("".join(path.read_text() for path in root.glob("*.out")))
            cls.tearDownClass()
            raise

    @classmethod
    def daemon(cls, root, *words):
        with open(root / f"{words[0]}.out", "w") as out:
            cls.daemons.append(subprocess.Popen([str(word) for word in words], env=cls.env, stdout=out, stderr=out))

    @classmethod
    def tearDownClass(cls):
        for daemon in reversed(cls.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        cls.folder.cleanup()
        super().tearDownClass()

    def test_two_and_four_ranks(self):
        for ranks in (2, 4):
            self.finish(["srun", "-n", ranks, *self.scene.words(f"srun{ranks}")], env=self.env)
            self.assertEqual(self.scene.fingerprint(f"srun{ranks}"), self.whole)

    def batch(self, name, scene, *words, options=()):
        script = scene.root / f"{name}.sh"
        script.write_text("#!/bin/sh\n" + " ".join(words) + "\n")
        done = self.finish(["sbatch", "--parsable", "-o", scene.root / f"{name}.log", "--open-mode=append", *options, script], env=self.env)
        return done.stdout.strip()

    def wait_for_end(self, job, seconds=120):
        wait_until(lambda: not subprocess.run(["squeue", "-h", "-j", job], env=self.env, capture_output=True, text=True, timeout=60).stdout.strip(), seconds, f"the end of job {job}")

    def test_a_batch_script_is_one_process(self):
        words = self.scene.words("script")
        self.wait_for_end(self.batch("script", self.scene, *words, options=("-n", "4")))
        self.assertEqual(self.scene.fingerprint("script"), self.whole)

    def test_a_requeued_job_goes_on(self):
        scene = Scene(ALAMBIC, steps=2000)
        try:
            scene.train("whole")
            job = self.batch("queued", scene, "exec", "srun", *scene.words("queued", "--resume"), options=("-n", "2", "--requeue"))
            wait_until(lambda: scene.steps_done("queued") >= 50, 120, "the first steps")
            self.finish(["scontrol", "requeue", job], env=self.env)
            time.sleep(1)
            self.finish(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=self.env)  # it would wait for two minutes
            wait_until((scene.root / "queued/report.json").exists, 200, "the end of the run")
            self.wait_for_end(job)
            self.assertEqual(scene.fingerprint("queued"), scene.fingerprint("whole"))
            self.assertIn("resuming from checkpoint-", (scene.root / "queued.log").read_text())
        finally:
            scene.close()

    def test_the_warning_before_the_end_of_its_time_stops_it(self):
        scene = Scene(ALAMBIC, steps=1000000)
        try:
            process = subprocess.Popen(["srun", "-n", "2", *scene.words("warned")], env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            wait_until(lambda: scene.steps_done("warned") >= 20, 120, "the first steps")
            job = subprocess.run(["squeue", "-h", "-o", "%i"], env=self.env, capture_output=True, text=True, timeout=60).stdout.split()[0]
            self.finish(["scancel", "--signal=USR1", job], env=self.env)  # what --signal=USR1@60 sends
            _, err = process.communicate(timeout=120)
            self.assertEqual(process.returncode, 75, err)
            self.assertEqual(err.count("stopped on request"), 2, err)
        finally:
            scene.close()


if __name__ == "__main__":
    unittest.main()
