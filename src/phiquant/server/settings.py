"""What `phiquant serve` is told: models, address, who may ask, and bounds; checked before anything is opened."""

import difflib
import ipaddress
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Self

from phiquant.errors import RequestError

__all__ = ["LOCAL", "Model", "Settings", "is_loopback", "read_keys"]

LOCAL: Final = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Model:
    """A model that is served.

    Attributes:
        path: of the GGUF file.
        name: by which clients ask for it; by default that of the file, without `.gguf`.
        ctx_size: most tokens of a sequence; 0 for all that the model can.
        parallel: most sequences of a step.
        threads: native threads; 0 for as many as the process may use.
        batch_size: most tokens of a step.
        cache_type: of the key-value cache.
        cache_tokens: tokens that the cache of all sequences holds; 0 for a context each, or what memory suffices for.
        predict: most tokens of an answer, whatever a request asks for; 0 for as many as the context holds.
        queue: most requests that wait.
        embeddings: whether it also gives embeddings.
    """

    path: Path
    name: str = ""
    ctx_size: int = 4096
    parallel: int = 4
    threads: int = 0
    batch_size: int = 512
    cache_type: str = "f16"
    cache_tokens: int = 0
    predict: int = 0
    queue: int = 64
    embeddings: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        for name, least in (
            ("ctx_size", 0),
            ("parallel", 1),
            ("threads", 0),
            ("batch_size", 1),
            ("cache_tokens", 0),
            ("predict", 0),
            ("queue", 0),
        ):
            if getattr(self, name) < least:
                raise RequestError(f"{_option(name)} is {getattr(self, name)} and must be at least {least}")
        if not self.name:
            object.__setattr__(self, "name", self.path.name.removesuffix(".gguf"))
        if len(self.name) > 200 or not self.name.isprintable():
            raise RequestError(f"a model cannot be called {self.name[:50]!r}: names are short and printable")


@dataclass(frozen=True)
class Settings:
    """Everything about a server but the models' own settings.

    Attributes:
        models: what is served; the first is meant where a request names none.
        host, port: where to listen.
        api_keys: any of them lets a request in; none: everybody may ask.
        cors: origins of other pages that may ask, such as https://example.org; * for all.
        allowed_hosts: further names by which the server may be called; * for all.
        tls_cert, tls_key: PEM files.
        metrics, slots: whether to serve /metrics and /slots.
        idle_timeout: seconds after which an unused model is unloaded; 0 for never.
        max_body: most bytes of a request's body.
        client_timeout: most seconds that a client may take to send a request, or to take a piece of an answer.
        shutdown_timeout: seconds that running requests get when the server is to end.
        log_format: "text" or "json".
    """

    models: tuple[Model, ...]
    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    metrics: bool = False
    slots: bool = False
    idle_timeout: float = 0.0
    max_body: int = 16 << 20
    client_timeout: float = 30.0
    shutdown_timeout: float = 10.0
    log_format: str = "text"

    def __post_init__(self) -> None:
        _check_types(self)
        if not self.models:
            raise RequestError("no model is named: phiquant serve -m MODEL.gguf")
        names = [model.name for model in self.models]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise RequestError(f"two models are called {twice!r}; tell them apart with --alias")
        if not 0 <= self.port < 1 << 16:
            raise RequestError(f"port is {self.port} and must be from 0 to 65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise RequestError("TLS needs a certificate and its key: --tls-cert and --tls-key")
        if self.log_format not in ("text", "json"):
            raise RequestError(f"log-format is {self.log_format!r} and must be text or json")
        for name in ("idle_timeout", "shutdown_timeout"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RequestError(f"{_option(name)} must be 0 or more seconds")
        if not 0 < self.client_timeout < math.inf or self.max_body < 1:
            raise RequestError("client-timeout and max-body must be above 0")
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise RequestError("an API key must be of printable ASCII characters, without spaces")
        for origin in self.cors:
            if origin != "*" and ("://" not in origin or origin.rstrip("/").count("/") > 2):
                raise RequestError(f"{origin!r:.100} is no origin; give one such as https://example.org, or *")

    @classmethod
    def gather(cls, config: Path | None = None, **given: Any) -> Self:
        """Settings from a file, and what was given besides, which counts more; None is as good as not given.

        The file is TOML with the fields of both classes as keys, hyphens or underscores, those of a model as defaults
        of every `[[models]]`. `given` may have `models` as a sequence of paths, `alias` as a sequence of their names,
        and all fields. Raises RequestError for what is unknown or of the wrong type, OSError if there is no such file.
        """
        found = {} if config is None else _read(config)
        given = {name: value for name, value in given.items() if value not in (None, (), [])}
        paths, names = given.pop("models", ()), list(given.pop("alias", ()))
        if len(names) > len(paths):
            raise RequestError(f"--alias names {len(names)} models, and {len(paths)} are given")
        of_models = {field.name for field in fields(Model)} - {"path", "name"}
        of_all = {field.name for field in fields(cls)} - {"models"}
        listed = found.pop("models", [])
        _refuse_unknown(found, of_all | of_models, str(config))
        defaults = {name: found.pop(name) for name in list(found) if name in of_models}
        asked = {name: given.pop(name) for name in list(given) if name in of_models}
        models = []
        for entry in listed if not paths else ():
            _refuse_unknown(entry, of_models | {"path", "name"}, f"a model of {config}")
            if "path" not in entry:
                raise RequestError(f"a model of {config} has no path")
            assert config is not None
            path = config.parent / Path(_text(entry.pop("path"), "path")).expanduser()
            models.append(Model(path, **{**defaults, **entry, **asked}))
        for path, name in zip(paths, [*names, *[""] * (len(paths) - len(names))], strict=True):
            models.append(Model(Path(path), name, **{**defaults, **asked}))
        for name, value in list(found.items()):
            if isinstance(value, list):
                found[name] = tuple(value)
            elif name in ("tls_cert", "tls_key"):
                assert config is not None
                found[name] = config.parent / Path(_text(value, name)).expanduser()
        return cls(tuple(models), **{**found, **given})

    @property
    def warnings(self) -> list[str]:
        """What whoever starts this should know, one sentence each."""
        found = []
        if not is_loopback(self.host) and not self.api_keys:
            found.append(f"{self.host} is reached from other machines, and no --api-key is asked of them")
        if self.api_keys and self.tls_cert is None and not is_loopback(self.host):
            found.append("without --tls-cert keys and conversations cross the network readable to all")
        if "*" in self.cors and not self.api_keys:
            found.append("--cors '*' without --api-key lets every page in a browser use this server")
        return found


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _read(config: Path) -> dict[str, Any]:
    try:
        read = tomllib.loads(config.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{config} is not valid TOML: {error}") from None
    read = _underscored(read)
    listed = read.get("models", [])
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise RequestError(f"models of {config} must be tables: [[models]]")
    read["models"] = [_underscored(entry) for entry in listed]
    return read


def _underscored(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in table.items()}


def _refuse_unknown(table: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {_option(near[0])}?" if near else ""
            raise RequestError(f"{where} has an unknown key {_option(name)!r:.80}{hint}")


def _check_types(settings: Model | Settings) -> None:
    """Numbers, texts, switches and lists are what they should be: a file may say anything."""
    for field in fields(settings):
        value, default = getattr(settings, field.name), field.default
        if isinstance(default, bool):
            good = isinstance(value, bool)
        elif isinstance(default, int):
            good = isinstance(value, int) and not isinstance(value, bool)
        elif isinstance(default, float):
            good = isinstance(value, int | float) and not isinstance(value, bool)
        elif isinstance(default, str):
            good = isinstance(value, str)
        elif isinstance(default, tuple):
            good = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
        else:
            continue
        if not good:
            raise RequestError(f"{_option(field.name)} is {value!r:.80} and must be like {default!r}")


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{_option(name)} is {value!r:.80} and must be a text")
    return value


def _option(name: str) -> str:
    return name.replace("_", "-")


def read_keys(paths: Sequence[Path]) -> tuple[str, ...]:
    """The keys of files: one a line; empty lines and those that begin with # are left out."""
    lines = [line.strip() for path in paths for line in path.read_text("utf-8").splitlines()]
    return tuple(line for line in lines if line and not line.startswith("#"))
