"""What the server bears: many clients at a time against `intra serve` on this machine, with a model as it is used.

    .venv/bin/python benchmarks/serve_load.py runs/bottle photos/bottle --requests 10000 --out load.json

Prints, and with --out writes, JSON: photos per second, seconds until the verdict (median, 95th percentile, longest),
how many were told to come back (503) and did, and the server's memory after a warm-up and ever again until the end.
Each client keeps its connection and sends one photo after the other, each as it lies on the disk. On a machine with
other work the seconds say more about that work (see load_average); the server's own CPU seconds per photo do not.
"""

import argparse
import http.client
import itertools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from intra.data.layout import list_images
from intra.provenance import commit_of_the_code, processor

QUERY = "/inspect?pictures=repaired,map,mask"  # the default, spelt out


class Client(threading.Thread):
    """Sends photos until none is left; comes back when it is told to."""

    def __init__(self, port: int, photos: list[bytes], turns: "itertools.count[int]", num_requests: int) -> None:
        super().__init__(daemon=True)
        self.port, self.photos, self.turns, self.num_requests = port, photos, turns, num_requests
        self.seconds: list[float] = []
        self.num_busy = 0
        self.failures: list[str] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        while (turn := next(self.turns)) < self.num_requests:
            try:
                self._send(connection, self.photos[turn % len(self.photos)])
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(repr(error))
                connection.close()  # the next request opens it again
        connection.close()

    def _send(self, connection: http.client.HTTPConnection, photo: bytes) -> None:
        while True:
            start = time.perf_counter()
            connection.request("POST", QUERY, photo)
            answer = connection.getresponse()
            said = answer.read()
            if answer.status != http.HTTPStatus.SERVICE_UNAVAILABLE or "Retry-After" not in answer.headers:
                break
            self.num_busy += 1
            time.sleep(float(answer.headers["Retry-After"]))
        self.seconds.append(time.perf_counter() - start)
        if answer.status != http.HTTPStatus.OK:
            self.failures.append(f"{answer.status} {said[:200]!r}")


def memory_mib(port: int) -> float:
    """The server's memory in RAM, by its own metrics."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    found = re.search(r"^process_resident_memory_bytes (\S+)", text, re.M)
    assert found is not None
    return float(found[1]) / 2**20


def run_clients(port: int, photos: list[bytes], num_requests: int, num_clients: int) -> tuple[list[Client], float]:
    """All clients, when they are done, and the seconds that it took."""
    turns = itertools.count()  # next() of it is atomic
    clients = [Client(port, photos, turns, num_requests) for _ in range(num_clients)]
    start = time.perf_counter()
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return clients, time.perf_counter() - start


def cpu_seconds(pid: int) -> float | None:
    """What a process has used of all cores; None where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(port: int, pid: int, photos: list[bytes], settings: argparse.Namespace) -> dict[str, object]:
    """The figures."""
    run_clients(port, photos, settings.warm_up, settings.clients)
    at_start, cpu_before = memory_mib(port), cpu_seconds(pid)
    memory = [at_start]
    parts = []
    share = -(-settings.requests // settings.parts)
    for _ in range(settings.parts):  # with a look at the memory between them
        parts.append(run_clients(port, photos, share, settings.clients))
        memory.append(memory_mib(port))
    cpu_after = cpu_seconds(pid)
    clients = [client for part, _ in parts for client in part]
    seconds = np.array([value for client in clients for value in client.seconds])
    failures = [failure for client in clients for failure in client.failures]
    elapsed_s = sum(spent for _, spent in parts)
    return {
        "requests": len(seconds), "clients": settings.clients, "warm_up_requests": settings.warm_up,
        "failures": len(failures), "first_failures": failures[:3],
        "busy_503": sum(client.num_busy for client in clients), "elapsed_s": round(elapsed_s, 2),
        "server_cpu_seconds_per_photo": None if cpu_before is None or cpu_after is None else round(
            (cpu_after - cpu_before) / len(seconds), 4),
        "photos_per_second": round(len(seconds) / elapsed_s, 2),
        "seconds_p50": round(float(np.percentile(seconds, 50)), 3),
        "seconds_p95": round(float(np.percentile(seconds, 95)), 3), "seconds_max": round(float(seconds.max()), 3),
        "memory_mib": [round(value, 1) for value in memory],
        "memory_growth_mib": round(memory[-1] - at_start, 1),
    }  # fmt: skip


def main() -> None:
    """Parses, starts the server, measures, ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="as for `intra serve`")
    parser.add_argument("photos", type=Path, help="a folder of photos; those below it too")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--warm-up", type=int, default=200, help="requests before anything is measured")
    parser.add_argument("--parts", type=int, default=10, help="looks at the memory")
    parser.add_argument("--queue", type=int, default=64, help="as for `intra serve`")
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    photos = [path.read_bytes() for path in list_images(settings.photos, recursive=True)]
    command = [sys.executable, "-m", "intra.cli", "serve", str(settings.run), "--port", "0", "--queue",
               str(settings.queue)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = re.match(r"http://127\.0\.0\.1:(\d+)", server.stdout.readline())
        if address is None:
            sys.exit("the server did not start")
        load_before = os.getloadavg()
        try:
            found = measure(int(address[1]), server.pid, photos, settings)
        finally:
            server.send_signal(signal.SIGTERM)
    found |= {"photo_files": len(photos), "mean_file_bytes": round(sum(map(len, photos)) / len(photos)),
              "queue": settings.queue, "commit": commit_of_the_code(), "machine": processor(), "cores": os.cpu_count(),
              "threads_of_torch": os.environ.get("OMP_NUM_THREADS", "default"),
              "load_average": [round(value, 1) for value in (*load_before, *os.getloadavg())],
              "python": platform.python_version()}  # fmt: skip
    text = json.dumps(found, indent=2)
    print(text)
    if settings.out is not None:
        settings.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
