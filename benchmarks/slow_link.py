"""Two network namespaces with a slow line between them, for two processes of this machine; root's, with Linux' tbf."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_ADDRESSES = ("10.77.0.1", "10.77.0.2")
_INTERFACE = "slow"


class NotAllowed(Exception):
    """Why this machine does not have it, as one line."""


@dataclass(frozen=True)
class End:
    """One end of a line.

    Attributes:
        prefix: the words before a command that has it run there.
        interface: the name of the line's interface there.
        address: of this end.
    """

    prefix: tuple[str, ...] = ()
    interface: str = "lo"
    address: str = "127.0.0.1"


@contextmanager
def slow_link(megabits: int) -> Iterator[list[End]]:
    """Within the block, both ends of a line of ``megabits`` a second, each way.

    Raises:
        NotAllowed: where namespaces, a pair of interfaces, or the queue that slows them cannot be had.
    """
    holders: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(2):
            # A namespace lives as long as a process in it does.
            holders.append(subprocess.Popen(["unshare", "--net", "sleep", "3600"], stderr=subprocess.PIPE))
        for holder in holders:
            _await_namespace(holder)
        first, second = (str(holder.pid) for holder in holders)
        peer = ["peer", "name", _INTERFACE, "netns", second]
        _run(["ip", "link", "add", _INTERFACE, "netns", first, "type", "veth", *peer])
        yield [_end(holder.pid, address, megabits) for holder, address in zip(holders, _ADDRESSES, strict=True)]
    except FileNotFoundError as error:
        raise NotAllowed(f"{error.filename} is not there") from error
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def _await_namespace(holder: subprocess.Popen[bytes]) -> None:
    ours, deadline = os.readlink("/proc/self/ns/net"), time.monotonic() + 5
    while holder.poll() is None and time.monotonic() < deadline:
        if os.readlink(f"/proc/{holder.pid}/ns/net") != ours:
            return
        time.sleep(0.01)
    raise NotAllowed("no network namespace can be made (unshare --net)")


def _end(pid: int, address: str, megabits: int) -> End:
    prefix = ("nsenter", "--target", str(pid), "--net")
    _run([*prefix, "ip", "link", "set", "lo", "up"])
    _run([*prefix, "ip", "address", "add", f"{address}/24", "dev", _INTERFACE])
    _run([*prefix, "ip", "link", "set", _INTERFACE, "up"])
    # A small burst: of a payload next to nothing may go faster.
    limits = ["rate", f"{megabits}mbit", "burst", "16kb", "latency", "2s"]
    _run([*prefix, "tc", "qdisc", "add", "dev", _INTERFACE, "root", "tbf", *limits])
    return End(prefix, _INTERFACE, address)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NotAllowed(f"{' '.join(command[-12:])}: {' '.join(done.stderr.split())}")
