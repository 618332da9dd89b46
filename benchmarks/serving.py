"""What serving costs: the served path against a direct session, batching, the router, texts written together.

    python benchmarks/serving.py overhead ARTIFACT [--length 128] [--max-batch 8]
    python benchmarks/serving.py batching ARTIFACT
    python benchmarks/serving.py router SPARSE DENSE TEXTS
    python benchmarks/serving.py writing ARTIFACT

Each writes a repository into a temporary directory and starts a real Triton server on it (``effc serve
--install-server`` sets one up). CPU only. Run it on a quiet machine; figures that do not depend on that are process CPU
times and ratios of runs in turns.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc as grpc
from tokenizers import Tokenizer

import effc
from effc.compiler.data import read_samples
from effc.serving.load_client import Client, find_target
from effc.serving.options import ServingOptions
from effc.serving.packaged import install_packaged_server
from effc.serving.repository import write_repository
from effc.serving.server import Server

REQUESTS = ("gRPC", "HTTP", "gRPC, no model", "HTTP, no model")
_CALLS: dict[str, Callable[[], Any]] = {}


@contextmanager
def served(artifact: Path, **options: Any) -> Iterator[Server]:
    """A server on an artifact, as the model ``m``."""
    program = install_packaged_server(print)
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        write_repository(artifact, repository, ServingOptions(name="m", **options))
        with Server(repository, program) as server:
            yield server


def tensor(ids: np.ndarray) -> Any:
    made = grpc.InferInput("input_ids", ids.shape, "INT64")
    made.set_data_from_numpy(ids)
    return made


def overhead(artifact: Path, length: int, max_batch: int) -> None:
    """Wall and CPU time of one request at batch 1, by gRPC and by HTTP, less that of the same run in a direct session.

    A server that runs requests one at a time (``max_batch`` 1) hands them on without its batcher.

    The three take turns; requests come from processes of their own, one per protocol, as they do in use. Beside them,
    the time of a request that no model sees, which is the protocol's own.
    """
    model = effc.load(artifact, threads=1)
    top = next(record.maximum for record in model.manifest.inputs if record.name == "input_ids") or 1
    ids = np.random.default_rng(0).integers(0, top, (1, length))
    # The smallest output, so that it is not the transport of hidden states that is measured.
    output = min(model.manifest.outputs, key=lambda record: len(record.shape)).name
    wall: dict[str, list[float]] = {name: [] for name in ("direct", *REQUESTS)}
    spent: dict[str, list[float]] = {"direct": [], "gRPC": [], "HTTP": []}
    pool = multiprocessing.get_context("spawn").Pool
    with (
        served(artifact, threads=1, max_batch=max_batch, batch_delay_us=0) as server,
        pool(1, connect_grpc, (server.grpc, ids, output)) as by_grpc,
        pool(1, connect_http, (server.http, ids, output)) as by_http,
    ):
        for _ in range(200):
            for name in wall:
                before = cpu_seconds(server) if name in spent and name != "direct" else 0.0
                start, cpu = time.perf_counter(), time.process_time()
                if name == "direct":
                    model(input_ids=ids)
                    wall[name].append(1000 * (time.perf_counter() - start))
                else:
                    client = by_grpc if name.startswith("gRPC") else by_http
                    wall[name].append(client.apply(timed, (name,)))
                if name in spent:
                    spent[name].append(
                        1000 * (time.process_time() - cpu if name == "direct" else cpu_seconds(server) - before)
                    )
    print(f"{length} tokens, batch 1 of at most {max_batch}, output {output}")
    for name, times in wall.items():
        line = f"{name}: median {median(times):.2f} ms, least {min(times):.2f}"
        if name in ("gRPC", "HTTP"):
            more = [served - direct for served, direct in zip(times, wall["direct"], strict=True)]
            line += f"; over direct: median {median(more):.2f} ms, of the least {min(times) - min(wall['direct']):.2f}"
        if name in spent:
            # Clocks of other processes tick in hundredths of seconds, so only their mean says something.
            line += f"; CPU {mean(spent[name]):.2f} ms{'' if name == 'direct' else ' in the server'}"
        print(line)


def connect_grpc(url: str, ids: np.ndarray, output: str) -> None:
    """What a client's process that speaks gRPC can be asked to time."""
    wanted, given = [grpc.InferRequestedOutput(output)], tensor(ids)
    client = grpc.InferenceServerClient(url)
    _CALLS["gRPC"] = lambda: client.infer("m_model", [given], outputs=wanted)
    _CALLS["gRPC, no model"] = client.is_server_live


def connect_http(url: str, ids: np.ndarray, output: str) -> None:
    """What a client's process that speaks HTTP can be asked to time."""
    host, port = url.split(":")
    connection = http.client.HTTPConnection(host, int(port))
    _CALLS["HTTP"] = lambda: ask_http(connection, "m_model", ids, output)
    _CALLS["HTTP, no model"] = lambda: get_http(connection, "/v2/health/live")


def timed(name: str) -> float:
    """Milliseconds of one request on the clock."""
    start = time.perf_counter()
    _CALLS[name]()
    return 1000 * (time.perf_counter() - start)


def ask_http(connection: http.client.HTTPConnection, model: str, ids: np.ndarray, output: str) -> None:
    """KServe's protocol with the tensors as bytes."""
    raw = ids.astype(np.int64).tobytes()
    entry = {"name": "input_ids", "shape": ids.shape, "datatype": "INT64", "parameters": {"binary_data_size": len(raw)}}
    outputs = [{"name": output, "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [entry], "outputs": outputs}).encode()
    connection.request(
        "POST", f"/v2/models/{model}/infer", head + raw, {"Inference-Header-Content-Length": str(len(head))}
    )
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise RuntimeError(content)


def get_http(connection: http.client.HTTPConnection, path: str) -> None:
    connection.request("GET", path)
    connection.getresponse().read()


def batching(artifact: Path) -> None:
    """CPU time of the server per request, alone and with 8 clients, at lengths of 16 to 48 tokens."""
    random = np.random.default_rng(0)
    requests = [tensor(random.integers(5, 1000, (1, length))) for length in random.integers(16, 48, 200)]
    for batch in (1, 8):
        with served(artifact, threads=1, max_batch=batch) as server:
            clients = [grpc.InferenceServerClient(server.grpc) for _ in range(8)]
            before, start = cpu_seconds(server), time.perf_counter()
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(ask, [clients[number % 8] for number in range(len(requests))], requests))
            wall, used = time.perf_counter() - start, cpu_seconds(server) - before
            for client in clients:
                client.close()
            print(f"max-batch {batch}: {1000 * used / 200:.2f} ms CPU per request, {200 / wall:.1f} requests/s")


def ask(client: Any, request: Any) -> None:
    client.infer("m_model", [request])


def router(sparse: Path, dense: Path, texts: Path) -> None:
    """CPU time of the router's choices on real lengths, against each variant alone and the better one each time."""
    from effc.serving.backend.route import Router
    from effc.serving.plan import open_artifact
    from effc.serving.plan_router import _times

    times = {
        name: {int(key): value for key, value in _times(name, open_artifact(path)).items()}
        for name, path in (("sparse", sparse), ("dense", dense))
    }
    limits = {name: max(curve) for name, curve in times.items()}
    chooser = Router(times, limits)
    tokenizer = Tokenizer.from_file(str(sparse / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    lengths = [min(len(tokenizer.encode(s.text).ids), *limits.values()) for s in read_samples(texts, 40)]
    models = {"sparse": effc.load(sparse, threads=1), "dense": effc.load(dense, threads=1)}
    spent: dict[str, list[float]] = {name: [] for name in models}
    chosen = []
    for length in lengths:
        ids = np.random.default_rng(length).integers(1000, 2000, (1, length))
        for name, model in models.items():
            # The least of a few: what the request costs, not what else the machine does.
            spent[name].append(min(cpu_of(model, ids) for _ in range(3)))
        chosen.append(chooser.choose(length))
    best = sum(min(pair) for pair in zip(*spent.values(), strict=True))
    routed = sum(spent[name][number] for number, name in enumerate(chosen))
    print(f"{len(lengths)} texts of {min(lengths)} to {max(lengths)} tokens, {chosen.count('sparse')} to sparse")
    for name, values in spent.items():
        print(f"always {name}: {1000 * sum(values):.0f} ms CPU")
    print(
        f"the better one each time: {1000 * best:.0f} ms; the router: {1000 * routed:.0f} ms, {routed / best - 1:+.1%}"
    )


def cpu_of(model: Any, ids: np.ndarray) -> float:
    start = time.process_time()
    model(input_ids=ids)
    return time.process_time() - start


def writing(artifact: Path) -> None:
    """Tokens per second of CPU of 1 and 4 texts that are written at once."""
    prompts = ["The capital of France is", "Once upon a time there was", "Water boils at", "In the year 1900 a man"]
    for batch in (1, 4):
        with served(artifact, max_batch=batch, threads=1) as server:
            target = find_target(f"http://{server.http}", None, 32)
            clients = [Client(target, 300) for _ in prompts]
            clients[0].ask(prompts[0])
            before, start = cpu_seconds(server), time.perf_counter()
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda pair: pair[0].ask(pair[1]), zip(clients, prompts, strict=True)))
            wall, used = time.perf_counter() - start, cpu_seconds(server) - before
            tokens = sum(answer.tokens for answer in answers)
            print(f"max-batch {batch}: {tokens / used:.1f} tokens per CPU second, {tokens / wall:.1f} tokens/s")


def cpu_seconds(server: Server) -> float:
    """Of the server and the processes of its models."""
    root = psutil.Process(server.pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(entry.user + entry.system for entry in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "batching", "router", "writing"))
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--max-batch", type=int, default=1, help="rows that the server of overhead may merge")
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if given.what == "overhead":
        overhead(*given.paths, given.length, given.max_batch)
    else:
        {"batching": batching, "router": router, "writing": writing}[given.what](*given.paths)


if __name__ == "__main__":
    main()
