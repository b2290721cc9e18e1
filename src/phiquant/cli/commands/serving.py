"""`serve`."""

from pathlib import Path
from typing import Annotated

from typer import Option

from .options import GivenCacheType, HfRepos, Quiet

__all__ = ["serve"]


def serve(
    model: Annotated[
        list[Path] | None,
        Option(
            "--model",
            "-m",
            metavar="FILE",
            help="A GGUF file; may be given several times, the first is meant by default.",
        ),
    ] = None,
    hf_repo: HfRepos = None,
    alias: Annotated[
        list[str] | None,
        Option(
            "--alias",
            "-a",
            metavar="NAME",
            help="The name of a model, in the order of --model, then of --hf-repo; by default its file's.",
        ),
    ] = None,
    host: Annotated[
        str | None, Option("--host", metavar="ADDRESS", help="Where to listen; 127.0.0.1: this machine alone.")
    ] = None,
    port: Annotated[int | None, Option("--port", metavar="N", help="8080 by default; 0: any that is free.")] = None,
    api_key: Annotated[
        list[str] | None, Option("--api-key", metavar="KEY", help="Let in who has it; may be given several times.")
    ] = None,
    api_key_file: Annotated[
        list[Path] | None, Option("--api-key-file", metavar="FILE", help="Keys, one a line: not seen by other users.")
    ] = None,
    ctx_size: Annotated[
        int | None,
        Option("--ctx-size", "-c", metavar="N", help="Tokens of a conversation; 0: all that the model can. 4096."),
    ] = None,
    parallel: Annotated[
        int | None, Option("--parallel", "-np", metavar="N", help="Conversations computed at once; 4 by default.")
    ] = None,
    threads: Annotated[
        int | None, Option("--threads", "-t", metavar="N", help="Processor threads; by default all it may use.")
    ] = None,
    batch_size: Annotated[
        int | None, Option("--batch-size", "-b", metavar="N", help="Most tokens of a step; 512 by default.")
    ] = None,
    cache_type: GivenCacheType = None,
    cache_tokens: Annotated[
        int | None,
        Option(
            "--cache-tokens",
            metavar="N",
            help="Tokens that the cache holds for all; by default a context each, if half of what is free suffices.",
        ),
    ] = None,
    predict: Annotated[
        int | None,
        Option(
            "--predict",
            "-n",
            metavar="N",
            help="Most tokens of an answer, whatever a request asks for; 0: as many as the context holds.",
        ),
    ] = None,
    queue: Annotated[
        int | None, Option("--queue", metavar="N", help="Most requests that wait; more are told to come again. 64.")
    ] = None,
    embeddings: Annotated[bool, Option("--embeddings", "--embedding", help="Offer embeddings as well.")] = False,
    cors: Annotated[
        list[str] | None,
        Option("--cors", metavar="ORIGIN", help="Pages of this origin may ask, https://example.org; *: of all."),
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        Option("--allowed-hosts", metavar="NAME", help="A further name that the server is called by; *: any."),
    ] = None,
    tls_cert: Annotated[
        Path | None, Option("--tls-cert", "--ssl-cert-file", metavar="FILE", help="Speak HTTPS with this certificate.")
    ] = None,
    tls_key: Annotated[
        Path | None, Option("--tls-key", "--ssl-key-file", metavar="FILE", help="The certificate's key.")
    ] = None,
    metrics: Annotated[bool, Option("--metrics", help="Offer /metrics, for Prometheus.")] = False,
    slots: Annotated[bool, Option("--slots", help="Offer /slots: what is being computed.")] = False,
    idle_timeout: Annotated[
        float | None,
        Option("--idle-timeout", metavar="SECONDS", help="Unload a model that nobody uses for so long; 0: never."),
    ] = None,
    max_body: Annotated[
        str | None, Option("--max-body", metavar="SIZE", help="Largest request, such as 500K or 4M; 16M by default.")
    ] = None,
    client_timeout: Annotated[
        float | None,
        Option("--client-timeout", metavar="SECONDS", help="How long a client may take to send or to read. 30."),
    ] = None,
    shutdown_timeout: Annotated[
        float | None,
        Option("--shutdown-timeout", metavar="SECONDS", help="How long requests may finish when it ends; 10."),
    ] = None,
    log_format: Annotated[
        str | None, Option("--log-format", metavar="FORM", help="text, or json: an object a line, one a request.")
    ] = None,
    config: Annotated[
        Path | None,
        Option(
            "--config",
            metavar="FILE",
            help="Options as TOML: [[models]] with path and name; those given here count more.",
        ),
    ] = None,
    quiet: Quiet = False,
) -> int:
    """Serve models over HTTP to clients of OpenAI, Anthropic, llama.cpp and Ollama."""
    from .. import serve as body

    return body.serve(
        config,
        quiet=quiet,
        max_body=max_body,
        api_key_file=api_key_file or (),
        models=model or (),
        repositories=hf_repo or (),
        alias=alias,
        host=host,
        port=port,
        api_keys=api_key,
        ctx_size=ctx_size,
        parallel=parallel,
        threads=threads,
        batch_size=batch_size,
        cache_type=cache_type,
        cache_tokens=cache_tokens,
        predict=predict,
        queue=queue,
        embeddings=embeddings or None,
        cors=cors,
        allowed_hosts=allowed_hosts,
        tls_cert=tls_cert,
        tls_key=tls_key,
        metrics=metrics or None,
        slots=slots or None,
        idle_timeout=idle_timeout,
        client_timeout=client_timeout,
        shutdown_timeout=shutdown_timeout,
        log_format=log_format,
    )
