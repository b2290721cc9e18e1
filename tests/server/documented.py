"""Holds answers against the document at /openapi.json: status, headers, type, and every field of what is said."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema_rs

ALIASES = {"/completions": "/completion", "/models": "/v1/models", "/v1/health": "/health"}


class Documented:
    """A document, in which objects hold no other fields than those that it names."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._paths = {
            re.compile(re.sub(r"\\{\w+\\}", ".+", re.escape(path))): operations
            for path, operations in document["paths"].items()
        }
        self._components = _closed(document["components"])
        self._validators: dict[str, Any] = {}

    def operation(self, method: str, path: str) -> dict[str, Any] | None:
        """What the document says of an address; None if nothing."""
        path = ALIASES.get(path, path)
        for pattern, operations in self._paths.items():
            if pattern.fullmatch(path):
                return operations.get(method.lower())
        return None

    def check(self, method: str, path: str, answer: httpx.Response) -> None:
        """AssertionError if the answer is not as the document has it."""
        operation = self.operation(method, path)
        if operation is None:
            return
        where = f"{method} {path}: {answer.status_code} {answer.text[:500]}"
        told = operation["responses"].get(str(answer.status_code))
        assert told is not None, f"no such status in the document: {where}"
        for name in told.get("headers", ()):
            assert name in answer.headers, where
        media = answer.headers["content-type"].partition(";")[0]
        assert media in told["content"], f"no such type in the document: {where}"
        content = told["content"][media]
        if media == "application/json":
            self._validate(content["schema"], answer.json(), where)
        for item in _items(media, answer.text) if "itemSchema" in content else ():
            self._validate(content["itemSchema"], item, where)
            if media == "text/event-stream" and item["data"] != "[DONE]":
                data = content["itemSchema"]["properties"]["data"]
                data = data["anyOf"][0] if "anyOf" in data else data
                self._validate(data["contentSchema"], json.loads(item["data"]), where)

    def _validate(self, schema: dict[str, Any], value: Any, where: str) -> None:
        key = json.dumps(schema)
        if key not in self._validators:
            whole = {**_closed(schema), "components": self._components}
            self._validators[key] = jsonschema_rs.Draft202012Validator(whole)
        problem = next(self._validators[key].iter_errors(value), None)
        assert problem is None, f"{where}\nis not as documented: {problem}"


def _items(media: str, text: str) -> Iterator[Any]:
    """What a stream brings: values, or the fields of events."""
    if media == "application/x-ndjson":
        yield from map(json.loads, text.splitlines())
        return
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if fields:
            yield fields


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _closed(value) for key, value in schema.items()}
    if isinstance(found.get("properties"), dict) and found.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found
