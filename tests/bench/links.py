"""Network namespaces joined by links with a delay and a rate, for communication benchmarks on one machine. Needs root.

    links.py [--delay-ms 1] [--mbit 0] [--how auto|netem|tun]     measures the speed and the cost of such a link
    links.py --clean                                              removes the namespaces of a killed run

With netem in the kernel, a bridge joins the namespaces and netem delays the packets that leave each of them. Without netem, each
namespace has a TUN device, and a forwarder process reads every packet, holds it for the delay and passes it on. The forwarder
stands in for hardware, so it runs at real-time priority. Its processor time is measured, because it competes with the benchmark.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import multiprocessing
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import Callable, Iterator, NamedTuple

HUB = "dyad-hub"
DEVICE = "link0"
MTU = 65_000
"""The largest packet size, because the forwarder's cost is per packet. A network card with segmentation offload gets packets
of this size from the kernel too."""


class Link(NamedTuple):
    """Properties of each direction of each link."""

    delay: float
    """Seconds one way."""
    rate: float = 0.0
    """Bytes per second, 0 for no limit."""


def ip(*words: object) -> None:
    """Runs ip(8); raises OSError with its message on failure."""
    done = subprocess.run(["ip", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(map(str, words))}: {done.stderr.strip()}")


def name(index: int) -> str:
    """Name of a namespace."""
    return f"dyad{index}"


def address(index: int) -> str:
    """Address of a namespace."""
    return f"10.77.0.{index + 1}"


def inside(index: int, command: list[str]) -> list[str]:
    """Command line that runs `command` in a namespace. `ip` execs it, so a signal to the started process reaches it."""
    return ["ip", "netns", "exec", name(index), *command]


def existing() -> list[str]:
    """Existing namespaces of this script."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    names = [line.split()[0] for line in listed.splitlines() if line.strip()]
    return [found for found in names if found == HUB or (found.startswith("dyad") and found[4:].isdigit())]


def clean() -> None:
    """Removes the namespaces of this script with their devices."""
    for found in existing():
        ip("netns", "del", found)


def has_netem() -> bool:
    """Whether the kernel has netem; tried on the loopback device of a temporary namespace."""
    ip("netns", "add", HUB)
    try:
        words = ["tc", "-n", HUB, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
        return subprocess.run(words, capture_output=True).returncode == 0
    finally:
        ip("netns", "del", HUB)


@contextlib.contextmanager
def joined(count: int, link: Link, how: str = "auto") -> Iterator[Forwarder | None]:
    """Creates namespaces dyad0 .. joined pairwise. Yields the forwarder, or None with netem. Removes them at the end."""
    if existing():
        sys.exit(f"{', '.join(existing())} exist: another run is going on, or was killed (then: links.py --clean)")
    # SIGTERM must run the clean-up below, as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    forwarder = None
    try:
        by_kernel = how == "netem" or (how == "auto" and has_netem())
        for index in range(count):
            ip("netns", "add", name(index))
            ip("-n", name(index), "link", "set", "lo", "up")
        if by_kernel:
            bridge(count, link)
        else:
            forwarder = Forwarder(count, link)
        yield forwarder
    finally:
        if forwarder:
            forwarder.stop()
        clean()
        signal.signal(signal.SIGTERM, before)


def bridge(count: int, link: Link) -> None:
    """Joins all namespaces by a bridge; netem delays the packets that leave each of them."""
    ip("netns", "add", HUB)
    ip("-n", HUB, "link", "add", "hub", "type", "bridge")
    ip("-n", HUB, "link", "set", "hub", "mtu", MTU, "up")
    for index in range(count):
        port = f"port{index}"
        ip("-n", HUB, "link", "add", port, "mtu", MTU, "type", "veth", "peer", "name", DEVICE, "mtu", MTU, "netns", name(index))
        ip("-n", HUB, "link", "set", port, "master", "hub", "up")
        raise_device(index)
        shape = ["delay", f"{link.delay * 1e6:.0f}us"] if link.delay else []
        shape += ["rate", f"{link.rate * 8:.0f}bit"] if link.rate else []
        if shape:
            words = ["tc", "-n", name(index), "qdisc", "add", "dev", DEVICE, "root", "netem", *shape, "limit", "100000"]
            subprocess.run(words, check=True)


def raise_device(index: int) -> None:
    """Sets address and MTU of a namespace's device."""
    ip("-n", name(index), "addr", "add", f"{address(index)}/24", "dev", DEVICE)
    ip("-n", name(index), "link", "set", DEVICE, "mtu", MTU, "up")


# linux/if_tun.h and linux/virtio_net.h
TUNSETIFF, TUNSETVNETHDRSZ, TUNSETOFFLOAD = 0x400454CA, 0x400454D8, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR, TUN_F_CSUM = 0x1, 0x1000, 0x4000, 0x1
VNET_HEADER = 10
"""Bytes of the header before each packet. It says that the checksum is not computed, which saves two passes over every byte."""


class Forwarder:
    """One TUN device per namespace, and a process that passes packets between them."""

    def __init__(self, count: int, link: Link) -> None:
        devices = [self.device(index) for index in range(count)]
        self.process = multiprocessing.get_context("fork").Process(target=forward, args=(devices, link), daemon=True)
        self.process.start()
        for device in devices:
            os.close(device)

    @staticmethod
    def device(index: int) -> int:
        """Creates a device and moves it into a namespace. The descriptor stays valid; closing its last copy removes the device."""
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        made = f"dyadtun{index}"
        flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", made.encode(), flags))
        fcntl.ioctl(descriptor, TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER))
        fcntl.ioctl(descriptor, TUNSETOFFLOAD, TUN_F_CSUM)
        ip("link", "set", made, "netns", name(index))
        ip("-n", name(index), "link", "set", made, "name", DEVICE, "txqueuelen", 10_000)
        raise_device(index)
        return descriptor

    def cpu_seconds(self) -> float:
        """Processor seconds so far, user and system."""
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """Ends the process."""
        self.process.terminate()
        self.process.join()


def forward(devices: list[int], link: Link) -> None:
    """Delays every packet, after earlier packets have left at the link's rate. Runs until it is terminated."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and terminates this process
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    targets = {socket.inet_aton(address(index)): device for index, device in enumerate(devices)}
    # One queue per sender. Its packets leave in order, so the head is always due next.
    queues = {device: collections.deque() for device in devices}
    wire_free = dict.fromkeys(devices, 0.0)
    while True:
        due = min((queue[0][0] for queue in queues.values() if queue), default=None)
        timeout = None if due is None else max(0.0, due - time.monotonic())
        for device in select.select(devices, [], [], timeout)[0]:
            take(device, queues[device], wire_free, targets, link)
        now = time.monotonic()
        for queue in queues.values():
            while queue and queue[0][0] <= now:
                _, target, packet = queue.popleft()
                # A full receive queue drops packets, as a network may.
                with contextlib.suppress(OSError):
                    os.write(target, packet)


def take(device: int, queue: collections.deque, wire_free: dict, targets: dict, link: Link) -> None:
    """Reads a few packets of a namespace; not more, so that packets that are due do not wait long."""
    for _ in range(16):
        try:
            packet = os.read(device, VNET_HEADER + MTU)
        except BlockingIOError:
            return
        now = time.monotonic()
        leaves = max(now, wire_free[device]) + (len(packet) / link.rate if link.rate else 0.0)
        wire_free[device] = leaves
        target = targets.get(packet[VNET_HEADER + 16 : VNET_HEADER + 20])
        # Multicast and IPv6 packets have no target here.
        if target is not None:
            queue.append((leaves + link.delay, target, packet))


ROUNDS = 50
CHUNK = 1 << 20


def echo_and_sink(connection: socket.socket) -> None:
    """Far end of a measurement: answers each of the first bytes with a byte, then discards the rest."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(ROUNDS):
        connection.sendall(connection.recv(1))
    buffer = bytearray(CHUNK)
    while connection.recv_into(buffer):
        pass
    connection.sendall(b".")


def serve(host: str) -> None:
    """Far end of a measurement; runs in one namespace."""
    with socket.create_server((host, 29_500)) as server:
        echo_and_sink(server.accept()[0])


def send(host: str, megabytes: int) -> tuple[float, float]:
    """Runs in the other namespace. Returns the median round trip in seconds, and bytes per second one way."""
    with retrying(host) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(ROUNDS):
            start = time.monotonic()
            connection.sendall(b".")
            connection.recv(1)
            trips.append(time.monotonic() - start)
        chunk = bytes(CHUNK)
        start = time.monotonic()
        for _ in range(megabytes):
            connection.sendall(chunk)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
        return sorted(trips)[ROUNDS // 2], megabytes * CHUNK / (time.monotonic() - start)


def retrying(host: str) -> socket.socket:
    """Connects to a server that may still be starting."""
    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((host, 29_500))
        time.sleep(0.05)
    raise TimeoutError(f"nobody listens on {host}")


def measure(link: Link, how: str, megabytes: int) -> str:
    """Measures a stream between two namespaces; returns one line."""
    with joined(2, link, how) as forwarder:
        me = [sys.executable, __file__]
        server = subprocess.Popen(inside(1, [*me, "--serve", address(1)]))
        cpu = forwarder.cpu_seconds() if forwarder else 0.0
        start = time.monotonic()
        try:
            words = inside(0, [*me, "--send", address(1), "--megabytes", str(megabytes)])
            trip, rate = map(float, subprocess.run(words, check=True, capture_output=True, text=True).stdout.split())
        finally:
            server.terminate()
            server.wait()
        line = f"round trip {trip * 1e3:.2f} ms, {rate / 1e6:.0f} MB/s one way"
        if not forwarder:
            return f"kernel: {line}"
        used, passed = forwarder.cpu_seconds() - cpu, time.monotonic() - start
        cost = f"{used:.2f} s of processor time in {passed:.1f} s, {used / megabytes * 1e3:.2f} ms per MiB"
        return f"TUN and forwarder: {line}; forwarder {cost}"


def need_root() -> None:
    """Prints what is missing and exits with status 2 if namespaces cannot be created."""
    missing = None
    if os.geteuid() != 0:
        missing = "network namespaces need root: run this as root"
    elif not (shutil.which("ip") and shutil.which("tc")):
        missing = "ip and tc are missing: install iproute2"
    if missing:
        print(missing, file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay-ms", type=float, default=1.0, help="one way")
    parser.add_argument("--mbit", type=float, default=0.0, help="rate each way, 0 for no limit")
    parser.add_argument("--how", choices=["auto", "netem", "tun"], default="auto")
    parser.add_argument("--megabytes", type=int, default=1000, help="length of the measured stream")
    parser.add_argument("--clean", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--send", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    if args.send:
        return print(*send(args.send, args.megabytes))
    need_root()
    if args.clean:
        return clean()
    print(measure(Link(args.delay_ms / 1e3, args.mbit * 125e3), args.how, args.megabytes))


def guarded(entry: Callable[[], None]) -> None:
    """Runs `entry`; Ctrl-C and errors of ip(8) end the program without a traceback."""
    try:
        entry()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    guarded(main)
