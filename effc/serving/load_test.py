"""What a served model does under load: latency percentiles, throughput, errors.

Closed loop: each of some clients sends its next request when the last one is answered. Open loop: requests come at
random times of a given rate (a Poisson process), whatever the server does, and a latency counts from when the request
was due, not from when a client was free to send it.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from effc.errors import UsageError
from effc.serving.load_client import Answer, Client, RequestFailed, Target, find_target, takes_tensors
from effc.serving.load_endpoint import Endpoint
from effc.serving.load_result import Latencies, LoadResult

# An open loop needs as many clients as requests are under way at once.
_OPEN_CLIENTS = 64
_FILLER = (
    "the",
    "film",
    "was",
    "long",
    "and",
    "people",
    "spoke",
    "of",
    "nothing",
    "that",
    "I",
    "would",
    "hear",
    "again",
)
_FILLER_WORDS = (8, 32, 128, 256)


@dataclass
class _Measured:
    """What all clients have met so far."""

    lock: threading.Lock
    samples: list[tuple[int, float]]
    firsts: list[float]
    errors: Counter[str]
    tokens: int = 0


def load_test(
    url: str,
    *,
    model: str | None = None,
    data: str | None = None,
    requests: int = 200,
    concurrency: int = 4,
    rate: float | None = None,
    max_tokens: int = 32,
    timeout_s: float = 60,
    seed: int = 0,
    perf_analyzer: bool | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> LoadResult:
    """Send texts to a model and measure.

    Args:
        url: ``http://host:port`` or ``grpc://host:port`` of a Triton server.
        model: the only one there that takes text when None.
        data: text, .jsonl or .csv file whose texts are sent, in random order; made-up texts of 8 to 256 words when
            None.
        requests: how many.
        concurrency: clients of a closed loop.
        rate: requests per second of an open loop; a closed one when None.
        max_tokens: that a model which writes text is asked for.
        perf_analyzer: let NVIDIA's tool send the requests; when None, for models that take tensors only.

    Raises:
        UsageError: if a value is out of range, or the model takes no text and ``perf_analyzer`` is False.
        MissingDependencyError: if perf_analyzer is needed and not there.
        DataError: if the file cannot be read.
        EffcError: if no server answers.
    """
    for name, value in (("requests", requests), ("concurrency", concurrency), ("max-tokens", max_tokens)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}.", "Correct it.")
    if rate is not None and rate <= 0:
        raise UsageError(f"rate must be above 0, not {rate:g}.", "Give requests per second.")
    generator = random.Random(seed)
    texts = list(_texts(data, requests, generator))
    if perf_analyzer is not False and model is not None:
        endpoint = Endpoint.of(url)
        if perf_analyzer or takes_tensors(endpoint.config(model)):
            from effc.serving.load_perf import perf_test

            return perf_test(
                endpoint, model, texts, requests=requests, concurrency=concurrency, rate=rate, timeout_s=timeout_s
            )
    elif perf_analyzer:
        raise UsageError("perf_analyzer measures the model that it is told.", "Name one with --model.")
    target = find_target(url, model, max_tokens)
    due = list(_arrivals(rate, requests, generator))
    measured = _Measured(threading.Lock(), [], [], Counter())
    waiting = enumerate(zip(texts, due, strict=True))
    start = time.perf_counter()

    def work() -> None:
        client = _connect(target, timeout_s)
        while True:
            with measured.lock:
                entry = next(waiting, None)
            if entry is None:
                client.close()
                return
            number, (text, moment) = entry
            _one(client, text, None if moment is None else start + moment, measured)
            if progress is not None:
                progress("requests", number + 1, requests)

    count = min(requests, concurrency if rate is None else _OPEN_CLIENTS)
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _result(target, rate, requests, time.perf_counter() - start, measured)


class TextClient(Protocol):
    """What sends texts, one after the other."""

    def ask(self, text: str) -> Answer: ...
    def close(self) -> None: ...


def _connect(target: Target, timeout_s: float) -> TextClient:
    if target.scheme == "http":
        return Client(target, timeout_s)
    from effc.serving.load_grpc import GrpcClient

    return GrpcClient(target, timeout_s)


def _one(client: TextClient, text: str, due: float | None, measured: _Measured) -> None:
    if due is not None:
        time.sleep(max(0.0, due - time.perf_counter()))
    sent = time.perf_counter()
    since = sent if due is None else due
    try:
        answer = client.ask(text)
    except RequestFailed as error:
        with measured.lock:
            measured.errors[str(error)[:200]] += 1
        return
    taken = time.perf_counter() - since
    with measured.lock:
        measured.samples.append((len(text.split()), taken))
        measured.firsts.append(answer.first_s + sent - since)
        measured.tokens += answer.tokens


def _result(target: Target, rate: float | None, requests: int, seconds: float, measured: _Measured) -> LoadResult:
    times = [taken for _, taken in measured.samples]
    return LoadResult(
        model=target.model,
        mode="closed" if rate is None else "open",
        requests=requests,
        failed=sum(measured.errors.values()),
        seconds=seconds,
        throughput=len(times) / seconds,
        latency=Latencies.of(times) if times else None,
        first_token=Latencies.of(measured.firsts) if times and target.writes else None,
        tokens_per_s=measured.tokens / seconds,
        errors=dict(measured.errors),
        samples=tuple(measured.samples),
    )


def _texts(data: str | None, count: int, generator: random.Random) -> Iterator[str]:
    if data is None:
        for _ in range(count):
            length = generator.choice(_FILLER_WORDS)
            yield " ".join(generator.choice(_FILLER) for _ in range(length))
        return
    # Imported here because that imports torch.
    from effc.compiler.data import read_samples

    texts = [sample.text for sample in read_samples(data, max(count, 1000))]
    for _ in range(count):
        yield generator.choice(texts)


def _arrivals(rate: float | None, count: int, generator: random.Random) -> Iterator[float | None]:
    moment = 0.0
    for _ in range(count):
        yield None if rate is None else moment
        if rate is not None:
            moment += generator.expovariate(rate)
