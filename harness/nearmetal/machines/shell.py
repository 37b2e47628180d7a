# SPDX-License-Identifier: GPL-2.0-or-later
"""A shell on another machine over SSH (paramiko): the one way to a host and to a guest."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import shlex
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import paramiko

from ..core.errors import EnvironmentBroken, MeasurementError, UsageError
from ..core.text import first_line
from .console import Console

_POLL_S = 0.01
_WATCH_S = 2.0
_HINT = "the consoles, and what the emulator said, are in the logs of the run"
_HANDSHAKE_S = 60.0
"""For TCP and SSH's key exchange each: a guest of an emulated host took more than 15 s."""

# what goes wrong is told by our own errors; paramiko's threads would print tracebacks
logging.getLogger("paramiko").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Address:
    """Where a machine's sshd listens and who logs in.

    ``key`` is a private key file (None: the SSH agent and the user's default keys);
    ``host_key`` is the machine's public key as ``type base64`` (None: known_hosts decides).
    ``jump`` is a machine that the connection goes through, ``proxy`` a command that makes it, and
    ``alias`` the user's own name for the machine, as ssh's configuration has them.
    """

    host: str
    port: int = 22
    user: str = "root"
    key: Path | None = None
    host_key: str | None = None
    jump: Address | None = None
    proxy: str | None = None
    alias: str | None = None

    def __str__(self) -> str:
        return f"{self.user}@{self.host}:{self.port}"


@dataclass(frozen=True)
class Result:
    """What a command printed and how it ended."""

    command: str
    status: int
    stdout: str
    stderr: str


class Running:
    """A command that goes on; its standard input stays open until ``close``."""

    def __init__(self, channel: paramiko.Channel, command: str) -> None:
        self.channel = channel
        self.command = command

    def close(self) -> None:
        """Close the channel: the command sees the end of its input."""
        self.channel.close()

    @property
    def ended(self) -> bool:
        """Whether the command has ended or the connection is gone."""
        return self.channel.exit_status_ready() or self.channel.closed


class Shell:
    """A logged-in connection. Every wait has a deadline; errors name the machine.

    ``watch`` is called every other second while a command runs, and raises when the machine
    died: then nobody waits for the deadline. ``console`` is where its last lines come from.
    """

    def __init__(self, name: str, client: paramiko.SSHClient, address: Address) -> None:
        self.name = name
        self.address = address
        self.watch: Callable[[], None] | None = None
        self.console: Console | None = None
        self.autopsy: Callable[[], str] | None = None
        """Tells more of a machine that does not answer any more."""
        self.jump: Shell | None = None
        """The connection that this one goes through, if it is this one's alone."""
        self._client = client

    def _last_words(self) -> str:
        console = f"the console's last lines:\n{self.console.tail()}" if self.console else ""
        return "\n".join(part for part in (console, self.autopsy and self.autopsy()) if part)

    @property
    def transport(self) -> paramiko.Transport:
        """The connection below, for channels of other kinds."""
        transport = self._client.get_transport()
        if transport is None or not transport.is_active():
            raise MeasurementError(
                f"{self.name}: the SSH connection is gone", detail=self._last_words() or None
            )
        return transport

    def run(self, command: str, *, deadline_s: float = 60.0, check: bool = True) -> Result:
        """Run a command with sh to its end; MeasurementError on failure and on the deadline."""
        channel = self._open(command)
        channel.shutdown_write()
        out, err = bytearray(), bytearray()
        end = time.monotonic() + deadline_s
        look = time.monotonic() + _WATCH_S
        while True:
            moved = False
            while channel.recv_ready():
                out += channel.recv(1 << 16)
                moved = True
            while channel.recv_stderr_ready():
                err += channel.recv_stderr(1 << 16)
                moved = True
            # the exit status may come before the last output: only the end of file ends it
            ended = channel.exit_status_ready() and channel.eof_received
            finished = ended or channel.closed
            if finished and not channel.recv_ready() and not channel.recv_stderr_ready():
                break
            if self.watch is not None and time.monotonic() > look:
                try:
                    self.watch()
                except MeasurementError:
                    channel.close()
                    raise
                look = time.monotonic() + _WATCH_S
            if time.monotonic() > end:
                channel.close()
                said = (out + err).decode(errors="replace")[-2000:]
                raise MeasurementError(
                    f"{self.name}: '{_short(command)}' did not end within {deadline_s:.0f} s",
                    detail="\n".join(part for part in (said, self._last_words()) if part),
                    hint=_HINT,
                )
            if not moved:
                time.sleep(_POLL_S)
        status = channel.recv_exit_status() if channel.exit_status_ready() else -1
        channel.close()
        result = Result(command, status, out.decode(errors="replace"), err.decode(errors="replace"))
        if status == -1:
            if self.watch is not None:
                self.watch()
            raise MeasurementError(
                f"{self.name}: the connection broke in '{_short(command)}'",
                detail=self._last_words(),
                hint=_HINT,
            )
        if check and status != 0:
            raise MeasurementError(
                f"{self.name}: '{_short(command)}' ended with status {status}",
                detail="\n".join((result.stdout + result.stderr).strip().splitlines()[-10:]),
            )
        return result

    def stream(
        self, command: str, out: BinaryIO, err: BinaryIO, feed: BinaryIO | None = None
    ) -> int:
        """Run a command to its end, however long it takes, and return its exit status.

        What it prints is handed on as it comes; ``feed`` is its standard input. MeasurementError
        when the machine dies or the connection breaks.
        """
        channel = self._open(command)
        if feed is None:
            channel.shutdown_write()
        else:
            threading.Thread(target=_feed, args=(feed, channel), daemon=True, name="feed").start()
        look = time.monotonic() + _WATCH_S
        try:
            while True:
                moved = False
                for ready, receive, sink in (
                    (channel.recv_ready, channel.recv, out),
                    (channel.recv_stderr_ready, channel.recv_stderr, err),
                ):
                    while ready():
                        sink.write(receive(1 << 16))
                        sink.flush()
                        moved = True
                ended = channel.exit_status_ready() and channel.eof_received
                if (ended or channel.closed) and not moved:
                    break
                if self.watch is not None and time.monotonic() > look:
                    self.watch()
                    look = time.monotonic() + _WATCH_S
                if not moved:
                    time.sleep(_POLL_S)
            if channel.exit_status_ready() and (status := channel.recv_exit_status()) >= 0:
                return status
        finally:
            channel.close()
        if self.watch is not None:
            self.watch()
        raise MeasurementError(
            f"{self.name}: the connection broke in '{_short(command)}'",
            detail=self._last_words(),
            hint=_HINT,
        )

    def start(self, command: str) -> Running:
        """Start a command that goes on by itself."""
        return Running(self._open(command), command)

    def _open(self, command: str) -> paramiko.Channel:
        try:
            channel = self.transport.open_session(timeout=60)
            channel.exec_command(command)
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise MeasurementError(
                f"{self.name}: cannot run '{_short(command)}': {error or type(error).__name__}",
                detail=self._last_words(),
                hint=_HINT,
            ) from None
        return channel

    def read(self, path: str) -> str:
        """The text of a file on the machine."""
        return self.run(f"cat {shlex.quote(path)}").stdout

    def put(
        self, local: Path, remote: str, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Copy a file to the machine (SFTP)."""
        try:
            with self.transport.open_sftp_client() as sftp:
                sftp.put(str(local), remote, callback=progress)
                sftp.chmod(remote, local.stat().st_mode & 0o777)
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise MeasurementError(
                f"{self.name}: cannot copy {local.name} to {remote}: {error}",
                hint="is there room on the machine, and an SFTP subsystem in its sshd?",
            ) from None

    def close(self) -> None:
        """Close the connection, and that to its jump host."""
        self._client.close()
        if self.jump is not None:
            self.jump.close()


def _feed(feed: BinaryIO, channel: paramiko.Channel) -> None:
    """Hand a stream on to a channel's command, to its end."""
    with contextlib.suppress(OSError, ValueError):
        while data := feed.read1(1 << 16) if hasattr(feed, "read1") else feed.read(1 << 16):
            channel.sendall(data)
        channel.shutdown_write()


def _short(command: str) -> str:
    text = " ".join(command.split())
    return text if len(text) <= 100 else text[:97] + "..."


def connect(
    name: str,
    address: Address,
    *,
    deadline_s: float,
    through: Shell | None = None,
    alive: Callable[[], None] | None = None,
    refused_ends: bool = False,
) -> Shell:
    """Log in, trying again until the deadline; ``through``: over a connection to its host.

    ``alive`` is asked between tries and raises when there is no use in waiting; with
    ``refused_ends`` there is none once the machine refuses the connection. Raises
    UsageError for a wrong key or user, EnvironmentBroken where nothing answers.
    """
    if through is None and address.jump is not None:
        jump = connect(
            f"{name}'s jump host",
            address.jump,
            deadline_s=deadline_s,
            alive=alive,
            refused_ends=refused_ends,
        )
        try:
            shell = connect(
                name,
                address,
                deadline_s=deadline_s,
                through=jump,
                alive=alive,
                refused_ends=refused_ends,
            )
        except BaseException:
            jump.close()
            raise
        shell.jump = jump
        return shell
    end = time.monotonic() + deadline_s
    last = "no answer"
    while True:
        if alive:
            alive()
        client = paramiko.SSHClient()
        if address.host_key:
            kind, _, data = address.host_key.partition(" ")
            name_there = address.host if address.port == 22 else f"[{address.host}]:{address.port}"
            key = paramiko.PKey.from_type_string(kind, _decoded(data))
            client.get_host_keys().add(name_there, kind, key)
        else:
            client.load_system_host_keys()
        try:
            sock: paramiko.Channel | paramiko.ProxyCommand | None = None
            if through is None and address.proxy is not None:
                sock = paramiko.ProxyCommand(address.proxy)
            elif through is not None:
                sock = through.transport.open_channel(
                    "direct-tcpip",
                    (address.host, address.port),
                    ("127.0.0.1", 0),
                    timeout=_HANDSHAKE_S,
                )
            client.connect(
                address.host,
                port=address.port,
                username=address.user,
                key_filename=str(address.key) if address.key else None,
                allow_agent=address.key is None,
                look_for_keys=address.key is None,
                sock=sock,
                timeout=_HANDSHAKE_S,
                banner_timeout=_HANDSHAKE_S,
                auth_timeout=_HANDSHAKE_S,
            )
            transport = client.get_transport()
            assert transport is not None
            transport.set_keepalive(15)
            return Shell(name, client, address)
        except paramiko.BadHostKeyException as error:
            raise UsageError(
                f"{name}: {address.host} shows another host key than the one expected",
                hint=f"is it the right machine? its key: {error.key.get_base64()[:32]}...",
            ) from None
        except paramiko.AuthenticationException:
            client.close()
            raise _refuses(name, address) from None
        except paramiko.SSHException as error:
            client.close()
            if "not found in known_hosts" in str(error):
                raise UsageError(
                    f"{name}: the host key of {address.host} is not known",
                    hint="log in once with ssh, or give host_key in the inventory",
                ) from None
            if address.key is not None and _OF_KEYS.search(str(error)):
                raise _refuses(name, address) from None
            last = str(error) or type(error).__name__
        except socket.gaierror as error:
            raise UsageError(
                f"{name}: there is no host {address.host}: {error.strerror}",
                hint="check the address in the inventory",
            ) from None
        except (OSError, EOFError) as error:
            client.close()
            last = str(error) or type(error).__name__
            if refused_ends and _refused(error):
                raise EnvironmentBroken(
                    f"{name}: {address} refuses the connection",
                    hint="does sshd run there, and at this port?",
                ) from None
        if time.monotonic() > end:
            raise EnvironmentBroken(
                f"{name}: no SSH at {address} within {deadline_s:.0f} s ({last})",
                hint="is the machine up, and does a firewall let us through?",
            )
        time.sleep(0.5)


_OF_KEYS = re.compile(r"private key file|Invalid key|key, expected")
"""What paramiko says last when no key let it in: that of the file as a key of another type."""


def _refuses(name: str, address: Address) -> UsageError:
    """The error where a machine does not let us in: the key's file may be none."""
    if address.key is not None:
        try:
            paramiko.PKey.from_path(address.key)
        except paramiko.PasswordRequiredException:
            pass
        except Exception as error:  # of several libraries
            return UsageError(
                f"{name}: {address.key} is no private key: {first_line(str(error))}",
                hint="check key in the inventory: the private key's file, not the .pub",
            )
    return UsageError(
        f"{name}: {address} refuses the login with {address.key or 'the keys at hand'}",
        hint="check user and key in the inventory, and authorized_keys on the machine",
    )


def _refused(error: Exception) -> bool:
    """Whether nobody listens at any address of a machine."""
    if isinstance(error, paramiko.ssh_exception.NoValidConnectionsError):
        return all(isinstance(one, ConnectionRefusedError) for one in error.errors.values())
    return isinstance(error, ConnectionRefusedError)


def _decoded(data: str) -> bytes:
    import base64

    return base64.b64decode(data.split()[0])


def digest_of(path: Path) -> str:
    """A short name for a file's content on a remote machine."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:20]


def free_port_on(shell: Shell, first: int, last: int) -> int:
    """A TCP port of a machine that nobody listens at, of a range; MeasurementError if none is."""
    script = (
        f"for p in $(seq {first} {last}); do "
        "cat /proc/net/tcp /proc/net/tcp6 2>/dev/null "
        '| grep -qi ":$(printf %04X $p) [0-9A-F:]* 0A" || { echo $p; break; }; done'
    )
    port = shell.run(script).stdout.strip()
    if not port:
        raise MeasurementError(
            f"{shell.name}: all ports from {first} to {last} are taken",
            hint="what listens at them? left-over VMs, or servers of tools",
        )
    return int(port)
