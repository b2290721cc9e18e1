"""LiteLLM beside `phiquant serve`: an answer, a stream, a tool, and an answer that fits a schema.

    pip install litellm
    phiquant serve -m phi-4-mini-Q4_K_M.gguf --alias phi
    python examples/litellm_chat.py http://127.0.0.1:8080

Its provider `openai` takes any server that speaks as OpenAI's does.
"""

import json
import sys
from typing import Literal

from litellm import completion
from pydantic import BaseModel, Field

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo", "Lima"]}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


class Person(BaseModel):
    """Somebody in a story."""

    kind: Literal["girl", "boy", "fox"]
    age: int = Field(ge=1, le=99)


def main(address: str) -> None:
    """Ask the server there for each of the four."""
    where = {"model": "openai/phi", "api_base": f"{address}/v1", "api_key": "none"}
    ask = [{"role": "user", "content": "Tell me of a little girl."}]

    print("answer:", completion(**where, messages=ask, max_tokens=32).choices[0].message.content)

    print("stream: ", end="")
    for chunk in completion(**where, messages=ask, max_tokens=32, stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    called = completion(
        **where, messages=ask, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=100
    )
    for call in called.choices[0].message.tool_calls:
        print("call:", json.dumps(json.loads(call.function.arguments)))

    shaped = completion(**where, messages=ask, response_format=Person, max_tokens=100)
    print("person:", json.dumps(Person.model_validate_json(shaped.choices[0].message.content).model_dump()))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080")
