# SPDX-License-Identifier: Apache-2.0
"""Two network namespaces on this machine and what lies between them: a veth pair, which tc may slow down and which can be taken down, or a
program that holds, drops and resets what passes (kernels without netem exist). Standard library only; needs root and iproute2.
"""
import contextlib
import fcntl
import heapq
import itertools
import os
import pathlib
import random
import select
import shutil
import struct
import subprocess
import threading
import time

ADDRESSES = ("10.99.0.1", "10.99.0.2")
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
numbers = itertools.count()


def ip(*words):
    done = subprocess.run([shutil.which("ip", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin"), *words], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Namespaces:
    """Two of them, a and b, without anything between."""

    def __init__(self):
        number = f"{os.getpid() % 100000}-{next(numbers)}"
        self.names = [f"alambic-{number}-{letter}" for letter in "ab"]
        self.interfaces = [f"al{number}{letter}" for letter in "ab"]
        try:
            for name in self.names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
        except OSError:
            self.close()
            raise

    def close(self):
        for name in self.names:
            with contextlib.suppress(OSError):
                ip("netns", "del", name)

    def words(self, end, *command):
        """The command, inside namespace 0 or 1."""
        return [shutil.which("ip", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin"), "netns", "exec", self.names[end], *command]

    def up(self):
        for name, interface, address in zip(self.names, self.interfaces, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", address + "/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")

    def join_by_veth(self, rate=None):
        ip("link", "add", self.interfaces[0], "netns", self.names[0], "type", "veth", "peer", "name", self.interfaces[1], "netns", self.names[1])
        self.up()
        for end in (0, 1) if rate else ():
            subprocess.run(self.words(end, "tc", "qdisc", "add", "dev", self.interfaces[end], "root", "tbf", "rate", rate, "burst", "16kb", "latency", "200ms"), check=True, capture_output=True, timeout=60)

    def set_link(self, state):
        ip("-n", self.names[0], "link", "set", self.interfaces[0], state)

    def bytes_received(self, end):
        text = subprocess.run(self.words(end, "cat", f"/sys/class/net/{self.interfaces[end]}/statistics/rx_bytes"), check=True, capture_output=True, text=True, timeout=60).stdout
        return int(text)

    def join_by_proxy(self):
        descriptors = []
        for name, interface in zip(self.names, self.interfaces, strict=True):
            descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", interface.encode(), IFF_TUN | IFF_NO_PI))
            ip("link", "set", interface, "netns", name)
            descriptors.append(descriptor)
        self.up()
        return Proxy(descriptors)


class Proxy:
    """Carries IP packets between two tun devices on a thread of its own."""

    def __init__(self, descriptors):
        self.descriptors = descriptors
        self.delay = 0.0            # seconds, each way
        self.loss = 0.0             # share of packets that are dropped
        self.holds = False          # everything stays here until it is False again
        self.resets = None          # a pair of TCP ports: the connection between them is reset
        self.num_reset = self.num_dropped = self.num_carried = 0
        self.bytes_of = {}          # by pair of TCP ports
        self.draw = random.Random(1)
        self.waiting, self.order = [], itertools.count()
        self.ends = False
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def close(self):
        self.ends = True
        self.thread.join()
        for descriptor in self.descriptors:
            os.close(descriptor)

    def write(self, end, packet):
        with contextlib.suppress(OSError):  # the interface is gone
            os.write(self.descriptors[end], packet)

    def work(self):
        while not self.ends:
            soonest = self.waiting[0][0] - time.monotonic() if self.waiting and not self.holds else 0.05
            ready, _, _ = select.select(self.descriptors, [], [], max(0.0, min(soonest, 0.05)))
            for descriptor in ready:
                with contextlib.suppress(OSError):
                    self.take(self.descriptors.index(descriptor), os.read(descriptor, 65536))
            while self.waiting and not self.holds and self.waiting[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(self.waiting)
                self.write(end, packet)
                self.num_carried += 1

    def take(self, end, packet):
        if packet[0] >> 4 != 4:
            return
        if packet[9] == 6:
            head = (packet[0] & 15) * 4
            ports = frozenset(struct.unpack_from("!HH", packet, head))
            self.bytes_of[ports] = self.bytes_of.get(ports, 0) + len(packet)
            if ports == self.resets and not packet[head + 13] & (RST | SYN):
                self.reset(end, packet, head)
                return
        if self.draw.random() < self.loss:
            self.num_dropped += 1
            return
        heapq.heappush(self.waiting, (time.monotonic() + self.delay, next(self.order), 1 - end, packet))

    def reset(self, end, packet, head):
        """Both ends are told that the other has no such connection; the packet is lost."""
        source, destination = packet[12:16], packet[16:20]
        source_port, destination_port, sequence, acknowledged = struct.unpack_from("!HHII", packet, head)
        self.write(1 - end, tcp_packet(source, destination, source_port, destination_port, sequence, acknowledged))
        self.write(end, tcp_packet(destination, source, destination_port, source_port, acknowledged, sequence))
        self.num_reset += 1


def checksum(data):
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def tcp_packet(source, destination, source_port, destination_port, sequence, acknowledged, flags=RST | ACK):
    tcp = struct.pack("!HHIIBBHHH", source_port, destination_port, sequence, acknowledged, 5 << 4, flags, 0, 0, 0)
    tcp = tcp[:16] + struct.pack("!H", checksum(source + destination + struct.pack("!BBH", 0, 6, len(tcp)) + tcp)) + tcp[18:]
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0, source, destination)
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + tcp


def impossible():
    """Why there are no such networks here; "" where there are."""
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    for program in ("ip", "tc"):
        if shutil.which(program, path=search) is None:
            return f"{program} is not installed: run scripts/setup.sh --oracle"
    try:
        spaces = Namespaces()
    except OSError as error:
        return f"no network namespaces (root is needed): {error}"
    try:
        spaces.join_by_veth(rate="10mbit")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no veth pair or no tc tbf: {getattr(error, 'stderr', None) or error}"
    finally:
        spaces.close()
    return ""


def no_proxy():
    """Why no program can carry packets here; "" where one can."""
    return "" if pathlib.Path("/dev/net/tun").exists() else "no /dev/net/tun"
