"""Hosts that behave like machines of their own: a network as in `wan`, and own processes, /tmp, /root and an sshd."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from experiments.benchmarks import wan

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {  # command -> what to install for it
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "rsync": "rsync",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
PATHS = os.pathsep.join(
    [str(Path(sys.executable).parent), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
)
ENVIRONMENT = {"PATH": PATHS, "HOME": "/root", "LANG": "C.UTF-8", "RAY_AUTH_MODE": "token"}
ENVIRONMENT |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
FOLDERS, PREFIX = Path("/var/tmp"), "diloco-hosts-"  # hosts have /tmp and /root of their own
SHM_BYTES = 1 << 30
START_S = 30.0
# A host's first process, which becomes its sshd. $1: the host's name, $2: its own folder; then what stays visible.
BOOT = """
set -e
name=$1 own=$2
shift 2
hostname "$name"
for kept; do mkdir -p "$own$kept"; mount --bind -o ro "$kept" "$own$kept"; done
mount --bind "$own/../hosts" /etc/hosts
mount --rbind "$own/root" /root
mount --rbind "$own/tmp" /tmp
mount -t tmpfs -o size="$SHM_BYTES" tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
exec "$SSHD" -D -e -f "$own/../sshd_config"
"""
SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
PrintMotd no
"""


def check() -> None:
    """Raise ValueError where a program is missing: how to get it."""
    wan.check("the tests on hosts")
    lacking = [command for command in PACKAGES if shutil.which(command, path=PATHS) is None]
    if lacking:
        packages = " ".join(sorted({PACKAGES[command] for command in lacking}))
        raise ValueError(f"hosts need {' and '.join(lacking)}, not found here: apt-get install {packages}")


def lacking() -> str:
    """What hosts want and is not here; empty where they can be made."""
    try:
        with machines(1, rate_bit_s=10**9):
            return ""
    except ValueError as error:
        return str(error)


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The hosts that stand, all with the same token of Ray in their homes. Made by `machines`."""

    network: wan.Hosts
    folder: Path  # seen by all under this name
    key: Path  # opens all of them by ssh
    pids: tuple[int, ...]  # of each one's first process

    @property
    def addresses(self) -> tuple[str, ...]:
        """One a host."""
        return self.network.addresses

    def home(self, host: int) -> Path:
        """Where a host's /root is, seen from here."""
        return self.folder.parent / f"h{host}" / "root"

    def command(
        self, host: int, *command: str, limit_s: float, environment: Mapping[str, str] | None = None
    ) -> list[str]:
        """What runs `command` in a host, in the folder that all see, and ends it there after a time.

        It gets none of this environment.
        """
        values = [f"{name}={value}" for name, value in {**ENVIRONMENT, **(environment or {})}.items()]
        enter = ["nsenter", f"--target={self.pids[host]}", "--mount", "--net", "--pid", "--uts"]
        clean = ["env", "-i", f"--chdir={self.folder}", *values]
        return [*enter, *clean, "timeout", "--kill-after=5", str(limit_s), *command]

    def run(
        self, host: int, *command: str, limit_s: float = 60.0, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end. Status 124 where it took too long."""
        inside = self.command(host, *command, limit_s=limit_s, environment=environment)
        return subprocess.run(inside, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """End what `command` began: the process itself waits outside of the host for the one inside."""
        inside = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        with suppress(OSError):  # it has ended
            for child in inside.read_text().split() if process.poll() is None else ():
                os.kill(int(child), signal.SIGTERM)
        process.wait()


@contextmanager
def machines(count: int, *, rate_bit_s: int) -> Iterator[Machines]:
    """Make so many; end all that runs in them and remove them afterwards, in any case. Raises ValueError as `wan`."""
    check()
    for left in FOLDERS.glob(f"{PREFIX}*"):  # by a process that was killed, and its hosts with it
        if not Path("/proc", left.name.removeprefix(PREFIX).partition("-")[0]).exists():
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-", dir=FOLDERS) as name:
        folder = Path(name)
        with wan.hosts(count, rate_bit_s=rate_bit_s) as network:
            firsts: list[subprocess.Popen[bytes]] = []
            try:
                _furnish(folder, network)
                for host in range(count):
                    firsts.append(_boot(folder, network, host))
                pids = tuple(_first_inside(first, folder / f"{host}.log") for host, first in enumerate(firsts))
                made = Machines(network=network, folder=folder / "shared", key=folder / "key", pids=pids)
                _wait_for_sshd(made, firsts)
                yield made
            finally:
                for first in firsts:  # unshare takes the host's first process along, and that one all others
                    first.send_signal(signal.SIGKILL)
                for first in firsts:
                    first.wait()


def _furnish(folder: Path, network: wan.Hosts) -> None:
    folder.chmod(0o755)
    (folder / "shared").mkdir()
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    names = [f"{address} h{host}\n" for host, address in enumerate(network.addresses)]
    (folder / "hosts").write_text("".join(["127.0.0.1 localhost\n", *names]))
    token = secrets.token_hex(32)
    for host in range(len(network.names)):
        home = folder / f"h{host}" / "root"
        (home / ".ray").mkdir(parents=True)
        home.chmod(0o700)
        (home / ".ray" / "auth_token").write_text(token)
        (home / ".ray" / "auth_token").chmod(0o600)
        (folder / f"h{host}" / "tmp").mkdir(mode=0o1777)


def _boot(folder: Path, network: wan.Hosts, host: int) -> subprocess.Popen[bytes]:
    kept = sorted({path for path in (str(ROOT), sys.prefix, sys.base_prefix) if path.startswith(("/root/", "/tmp/"))})
    own = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts"]
    inside = network.command(host, [*own, "bash", "-c", BOOT, "boot", f"h{host}", str(folder / f"h{host}"), *kept])
    sshd = shutil.which("sshd", path=PATHS)
    assert sshd is not None  # by `check`
    with (folder / f"{host}.log").open("wb") as log:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *inside],  # it does not outlive this process, however that ends
            env={"PATH": PATHS, "HOME": "/root", "LANG": "C.UTF-8", "SHM_BYTES": str(SHM_BYTES), "SSHD": sshd},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the hosts
        )


def _first_inside(first: subprocess.Popen[bytes], log: Path) -> int:
    """The process id of a host's first process, seen from here."""
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children")
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s and first.poll() is None:
        if found := children.read_text().split():
            return int(found[0])
        time.sleep(0.02)
    raise ValueError(f"a host does not start: {log.read_text()[-500:].strip() or 'it says nothing'}")


def _wait_for_sshd(made: Machines, firsts: Sequence[subprocess.Popen[bytes]]) -> None:
    for host, address in enumerate(made.addresses):
        end_s = time.monotonic() + START_S
        probe = ["bash", "-c", f"exec 3<>/dev/tcp/{address}/22"]
        while made.run(host, *probe, limit_s=5.0).returncode != 0:
            if firsts[host].poll() is not None or time.monotonic() > end_s:
                raise ValueError(f"no sshd in host {host}: {(made.key.parent / f'{host}.log').read_text()[-500:]}")
            time.sleep(0.1)
