"""Network namespaces joined by links with a delay and a rate, for communication benchmarks on one machine. Needs root.

    links.py [--delay-ms 1] [--mbit 0] [--how auto|netem|tun]     what such a link reaches, and what it costs
    links.py --clean                                                          removes what a killed run has left

Where the kernel has netem, namespaces hang on a bridge and netem delays what leaves each of them. Where it has not, each
namespace has a TUN device and one process here reads every packet, holds it for the delay and hands it on. That process
stands for hardware, so it runs at real-time priority; what it costs is measured, because it takes cores from what is measured.
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
"""As long as a packet may be: the forwarder pays by the packet. A network card that segments gets the same from the kernel."""


class Link(NamedTuple):
    """Every direction of every link."""

    delay: float
    """Seconds one way."""
    rate: float = 0.0
    """Bytes per second, 0 for no limit."""


def ip(*words: object) -> None:
    """Runs ip(8); its own words on failure."""
    done = subprocess.run(["ip", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(map(str, words))}: {done.stderr.strip()}")


def name(index: int) -> str:
    """Of a namespace."""
    return f"dyad{index}"


def address(index: int) -> str:
    """Of a namespace's end of its link."""
    return f"10.77.0.{index + 1}"


def inside(index: int, command: list[str]) -> list[str]:
    """The command, run in a namespace. `ip` becomes the command, so the process started is the one to signal."""
    return ["ip", "netns", "exec", name(index), *command]


def existing() -> list[str]:
    """Our namespaces that are there."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    names = [line.split()[0] for line in listed.splitlines() if line.strip()]
    return [found for found in names if found == HUB or (found.startswith("dyad") and found[4:].isdigit())]


def clean() -> None:
    """Removes our namespaces, and with them their devices."""
    for found in existing():
        ip("netns", "del", found)


def has_netem() -> bool:
    """Whether the kernel can delay packets itself: asked on a loopback device of a namespace of its own."""
    ip("netns", "add", HUB)
    try:
        words = ["tc", "-n", HUB, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
        return subprocess.run(words, capture_output=True).returncode == 0
    finally:
        ip("netns", "del", HUB)


@contextlib.contextmanager
def joined(count: int, link: Link, how: str = "auto") -> Iterator[Forwarder | None]:
    """Namespaces dyad0 .. joined pairwise; gives the forwarder where there is one. Leaves nothing, however it ends."""
    if existing():
        sys.exit(f"{', '.join(existing())} exist: another run is going on, or was killed (then: links.py --clean)")
    # A kill must pass through the clean-up below as Ctrl-C does.
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
    """Every namespace on one bridge; netem holds what leaves it."""
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
    """Gives a namespace's end its address."""
    ip("-n", name(index), "addr", "add", f"{address(index)}/24", "dev", DEVICE)
    ip("-n", name(index), "link", "set", DEVICE, "mtu", MTU, "up")


# linux/if_tun.h and linux/virtio_net.h
TUNSETIFF, TUNSETVNETHDRSZ, TUNSETOFFLOAD = 0x400454CA, 0x400454D8, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR, TUN_F_CSUM = 0x1, 0x1000, 0x4000, 0x1
VNET_HEADER = 10
"""Before each packet: tells the receiving kernel that nobody has summed it up. Saves two passes over every byte."""


class Forwarder:
    """One TUN device per namespace and a process that hands packets on between them."""

    def __init__(self, count: int, link: Link) -> None:
        devices = [self.device(index) for index in range(count)]
        self.process = multiprocessing.get_context("fork").Process(target=forward, args=(devices, link), daemon=True)
        self.process.start()
        for device in devices:
            os.close(device)

    @staticmethod
    def device(index: int) -> int:
        """Made here, then moved: its descriptor stays good, and the device goes with the last copy of it."""
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
        """Processor time so far, user and system."""
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """Ends the process."""
        self.process.terminate()
        self.process.join()


def forward(devices: list[int], link: Link) -> None:
    """Holds every packet for the delay, after those before it have left at the link's rate; until it is terminated."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and terminates this
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    targets = {socket.inet_aton(address(index)): device for index, device in enumerate(devices)}
    # One queue per sender: what it sends leaves in order, so the head is always the next one due.
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
    """Reads what a namespace has sent; a few packets at a time, so that none that is due waits long."""
    for _ in range(16):
        try:
            packet = os.read(device, VNET_HEADER + MTU)
        except BlockingIOError:
            return
        now = time.monotonic()
        leaves = max(now, wire_free[device]) + (len(packet) / link.rate if link.rate else 0.0)
        wire_free[device] = leaves
        target = targets.get(packet[VNET_HEADER + 16 : VNET_HEADER + 20])
        # Multicast and IPv6 chatter has no target here.
        if target is not None:
            queue.append((leaves + link.delay, target, packet))


ROUNDS = 50
CHUNK = 1 << 20


def echo_and_sink(connection: socket.socket) -> None:
    """The far end of a measurement: answers one byte by one byte, then swallows the rest."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(ROUNDS):
        connection.sendall(connection.recv(1))
    buffer = bytearray(CHUNK)
    while connection.recv_into(buffer):
        pass
    connection.sendall(b".")


def serve(host: str) -> None:
    """Runs in one namespace."""
    with socket.create_server((host, 29_500)) as server:
        echo_and_sink(server.accept()[0])


def send(host: str, megabytes: int) -> tuple[float, float]:
    """Runs in another: seconds of a round trip (median), bytes per second one way."""
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
    """A connection to a server that may still be starting."""
    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((host, 29_500))
        time.sleep(0.05)
    raise TimeoutError(f"nobody listens on {host}")


def measure(link: Link, how: str, megabytes: int) -> str:
    """One line: what a stream between two namespaces reaches."""
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
    """Says what is missing and ends with status 2 where namespaces cannot be made."""
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
    """Runs a command line: Ctrl-C and what ip(8) refuses end it in one line."""
    try:
        entry()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    guarded(main)
