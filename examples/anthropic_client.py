"""Anthropic's own client beside `phiquant serve`: an answer, a stream, a tool, and an answer that fits a schema.

phiquant serve -m phi-4-mini-Q4_K_M.gguf
python examples/anthropic_client.py http://127.0.0.1:8080
"""

import json
import sys

from anthropic import Anthropic

WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "strict": True,
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo", "Lima"]}, "days": {"enum": [1, 2, 3]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
# A tool that must be called is how an answer gets a form here.
PERSON = {
    "name": "person",
    "description": "Somebody in a story.",
    "input_schema": {
        "type": "object",
        "properties": {
            "kind": {"enum": ["girl", "boy", "fox"]},
            "age": {"type": "integer", "minimum": 1, "maximum": 99},
        },
        "required": ["kind", "age"],
        "additionalProperties": False,
    },
}


def main(address: str) -> None:
    """Ask the server there for each of the four."""
    client = Anthropic(base_url=address, api_key="none")
    model = client.models.list().data[0].id
    ask = [{"role": "user", "content": "Tell me of a little girl."}]

    answer = client.messages.create(model=model, messages=ask, max_tokens=32)
    print("answer:", answer.content[0].text)

    print("stream: ", end="")
    with client.messages.stream(model=model, messages=ask, max_tokens=32) as stream:
        for text in stream.text_stream:
            print(text, end="", flush=True)
    print()

    for tool, label in ((WEATHER, "call"), (PERSON, "person")):
        called = client.messages.create(
            model=model,
            messages=ask,
            tools=[tool],
            tool_choice={"type": "tool", "name": tool["name"]},
            max_tokens=100,
        )
        print(f"{label}:", json.dumps(called.content[-1].input))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080")
