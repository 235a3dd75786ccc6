"""A real PostgreSQL server for tests: of its own folder and port, as a user that is not root."""

import glob
import os
import pathlib
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time

_USERS = ("postgres", "nobody")
_PATIENCE = 60.0


def binaries() -> pathlib.Path | None:
    """The folder of postgres and initdb; None = they are not installed."""
    found = shutil.which("postgres")
    places = [pathlib.Path(found).resolve().parent] if found else []
    places += map(pathlib.Path, sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True))
    return next((place for place in places if (place / "initdb").exists()), None)


def missing() -> str | None:
    """What is not there to run a server and to speak with it; None = all is."""
    if binaries() is None:
        return "no postgres and initdb here: apt install postgresql"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "no driver: pip install 'seqzoo[postgres]'"
    return None


class Postgres:
    """A server; use it in `with`. It refuses root, so root starts it as another user."""

    def __init__(self) -> None:
        place = binaries()
        assert place is not None, missing()
        self._bin = place
        self._user = None
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="seqzoo-postgres-"))
        if os.geteuid() == 0:
            known = {entry.pw_name for entry in pwd.getpwall()}
            self._user = next(name for name in _USERS if name in known)
            shutil.chown(self._folder, self._user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._server: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://seqzoo@127.0.0.1:{self.port}/postgres"

    def __enter__(self) -> "Postgres":
        command = [self._bin / "initdb", "-D", self._folder / "data", "-U", "seqzoo", "-A", "trust"]
        subprocess.run(
            [*command, "--no-sync"],
            check=True,
            stdout=subprocess.DEVNULL,
            user=self._user,
            cwd=self._folder,
        )
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        """Starts it and waits until it answers."""
        log = open(self._folder / "log", "ab")  # noqa: SIM115
        command = [self._bin / "postgres", "-D", self._folder / "data", "-p", str(self.port)]
        self._server = subprocess.Popen(
            [*command, "-c", "listen_addresses=127.0.0.1", "-k", str(self._folder)],
            stdout=log,
            stderr=log,
            user=self._user,
            cwd=self._folder,
        )
        log.close()
        self._wait()

    def stop(self, number: int = signal.SIGQUIT) -> None:
        """Ends it at once: connections break, nothing is tidied up."""
        if self._server is not None:
            self._server.send_signal(number)
            self._server.wait()
            self._server = None

    def _wait(self) -> None:
        end = time.monotonic() + _PATIENCE
        command = [self._bin / "psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "seqzoo"]
        while True:
            asked = subprocess.run(
                [*command, "-d", "postgres", "-c", "select 1"], capture_output=True, check=False
            )
            if asked.returncode == 0:
                return
            assert time.monotonic() < end, asked.stderr.decode()
            time.sleep(0.2)
