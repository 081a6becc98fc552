"""The OpenAPI document: what FastAPI sees, with the bodies and answers that our routes read and write themselves."""

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

import codesign
from codesign.serve.schema import ChatRequest, CompletionRequest

_BODIES = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REFUSALS = {
    "400": "The request is wrong.",
    "401": "No valid API key.",
    "403": "Foreign Host or Origin.",
    "404": "No such model.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "Too many requests wait.",
    "503": "The server goes down.",
}


def document(app: FastAPI, model: str, max_model_len: int) -> dict[str, Any]:
    """Args:
    model: the one name that requests may give.
    max_model_len: most tokens of prompt and output.
    """
    app.openapi_schema = None
    app.title, app.version = "codesign serve", codesign.__version__
    found = app.openapi()
    _, definitions = models_json_schema(
        [(CompletionRequest, "validation"), (ChatRequest, "validation")], ref_template="#/components/schemas/{model}"
    )
    schemas = {**definitions["$defs"], "Refusal": _ERROR}
    for kind in _BODIES.values():
        fields = schemas[kind.__name__]["properties"]
        fields["model"] = {"type": "string", "enum": [model]}
        for name in ("max_tokens", "max_completion_tokens"):
            if name in fields:
                fields[name] = {
                    "anyOf": [{"type": "integer", "minimum": 1, "maximum": max_model_len - 1}, {"type": "null"}]
                }
    found["components"] = {
        "schemas": schemas,
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    for path, methods in found["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            operation["responses"] |= {status: _refusal(text) for status, text in _REFUSALS.items()}
            operation["security"] = [] if path == "/health" else [{"key": []}, {}]
            if path in _BODIES:
                schema = {"$ref": f"#/components/schemas/{_BODIES[path].__name__}"}
                operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return found


def _refusal(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Refusal"}}}}
