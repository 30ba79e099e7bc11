"""Two hosts on one machine: network namespaces with an address each, joined by a pair of virtual cards.

Where namespaces are not permitted the two are addresses of the loopback device, and say so: they then share one network.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

CLONE_NEWNET = 0x40000000


@dataclass
class Process:
    """A forked process and what it prints.

    Attributes:
        pid: Its number.
        output: File of its stdout and stderr.
        code: Its exit code once it has ended, negative if by a signal.
    """

    pid: int
    output: Path
    code: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code


@dataclass
class Host:
    """One of the two.

    Attributes:
        address: Its own.
        device: Network device that has the address.
        namespace: Name of its network namespace; None where it is an address of the loopback device.
    """

    address: str
    device: str
    namespace: str | None
    processes: list[Process] = field(default_factory=list)

    def fork(self, function: Callable[[], object], output: Path, environment: Mapping[str, str]) -> Process:
        """Call a function in a forked process on this host: imports cost 20 CPU-seconds each. Its result is the exit code."""
        pid = os.fork()
        if not pid:
            self._serve(function, output, {"GLOO_SOCKET_IFNAME": self.device, **environment})
        self.processes.append(Process(pid, output))
        return self.processes[-1]

    def command(self, words: Sequence[str]) -> list[str]:
        """The command that runs ``words`` on this host."""
        return [*(["ip", "netns", "exec", self.namespace] if self.namespace else []), *words]

    def cut(self) -> None:
        """Nothing comes from this host or reaches it any more: its card is down, or its processes stand still."""
        if self.namespace:
            _ip("-n", self.namespace, "link", "set", self.device, "down")
            return
        for process in self.processes:
            os.kill(process.pid, signal.SIGSTOP)

    def _serve(self, function: Callable[[], object], output: Path, environment: Mapping[str, str]) -> None:
        code = 1
        try:
            with output.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - pytest's own is no file
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            os.environ.update(environment)
            if self.namespace:
                _enter(self.namespace)
            code = int(function() or 0)  # type: ignore[call-overload]
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


@contextmanager
def two_hosts(namespaces: bool | None = None) -> Iterator[tuple[Host, Host]]:
    """Two hosts; their processes are killed at the end.

    Args:
        namespaces: Whether they are network namespaces; where None, if they can be had.
    """
    names = (f"mmrep{os.getpid()}a", f"mmrep{os.getpid()}b")
    if namespaces or (namespaces is None and can_make_namespaces()):
        hosts = (Host("10.77.0.1", "eth0", names[0]), Host("10.77.0.2", "eth0", names[1]))
        _make(hosts)
    else:
        print("network namespaces are not permitted here: two loopback addresses stand for two hosts", file=sys.stderr)
        hosts = (Host("127.0.0.2", "lo", None), Host("127.0.0.3", "lo", None))
    try:
        yield hosts
    finally:
        for process in (process for host in hosts for process in host.processes):
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                os.waitpid(process.pid, 0)
        for host in hosts:
            if host.namespace:
                _ip("netns", "del", host.namespace)


def can_make_namespaces() -> bool:
    """Whether this user may make them: root with `ip`, and not every container."""
    name = f"mmrep{os.getpid()}probe"
    try:
        _ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        return False
    _ip("netns", "del", name)
    return True


def wait(processes: Sequence[Process], seconds: float) -> list[int]:
    """The exit codes of processes, which must end within a time."""
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in processes):
        if time.monotonic() > end:
            said = "\n".join(process.output.read_text()[-2000:] for process in processes)
            raise TimeoutError(f"exit codes after {seconds} s: {[process.code for process in processes]}\n{said}")
        time.sleep(0.05)
    return [process.code or 0 for process in processes]


def _make(hosts: tuple[Host, Host]) -> None:
    first, second = (str(host.namespace) for host in hosts)
    for name in (first, second):
        _ip("netns", "add", name)
    _ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
    for host, name in zip(hosts, (first, second), strict=True):
        _ip("-n", name, "addr", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", name, "link", "set", device, "up")


def _enter(namespace: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", namespace).open() as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
