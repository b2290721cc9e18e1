"""OpenAI's own client beside `phiquant serve`: an answer, a stream, a tool, and an answer that fits a schema.

phiquant serve -m phi-4-mini-Q4_K_M.gguf
python examples/openai_client.py http://127.0.0.1:8080
"""

import json
import sys
from typing import Literal

from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Rome", "Oslo", "Lima"]
    days: Literal[1, 2, 3]


class Person(BaseModel):
    """Somebody in a story."""

    kind: Literal["girl", "boy", "fox"]
    age: int = Field(ge=1, le=99)


def main(address: str) -> None:
    """Ask the server there for each of the four."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    model = client.models.list().data[0].id
    ask = [{"role": "user", "content": "Tell me of a little girl."}]

    answer = client.chat.completions.create(model=model, messages=ask, max_tokens=32)
    print("answer:", answer.choices[0].message.content)

    print("stream: ", end="")
    for chunk in client.chat.completions.create(model=model, messages=ask, max_tokens=32, stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    # strict, as pydantic_function_tool makes it: the arguments obey the schema whether or not a call is required.
    called = client.chat.completions.create(
        model=model,
        messages=ask,
        tools=[pydantic_function_tool(Weather)],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=100,
    )
    for call in called.choices[0].message.tool_calls:
        print("call:", json.dumps(Weather.model_validate_json(call.function.arguments).model_dump()))

    shaped = client.chat.completions.parse(model=model, messages=ask, response_format=Person, max_tokens=100)
    print("person:", json.dumps(shaped.choices[0].message.parsed.model_dump()))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080")
