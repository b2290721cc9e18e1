"""LangChain beside `phiquant serve`: an answer, a stream, a tool, and an answer that fits a schema.

pip install langchain-openai
phiquant serve -m phi-4-mini-Q4_K_M.gguf --alias phi
python examples/langchain_openai_chat.py http://127.0.0.1:8080
"""

import json
import sys
from typing import Literal

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


@tool
def weather(city: Literal["Rome", "Oslo", "Lima"], days: Literal[1, 2, 3]) -> str:
    """The weather of a city."""
    return f"sunny in {city} for {days} days"


class Person(BaseModel):
    """Somebody in a story."""

    kind: Literal["girl", "boy", "fox"]
    age: int = Field(ge=1, le=99)


def main(address: str) -> None:
    """Ask the server there for each of the four."""
    chat = ChatOpenAI(base_url=f"{address}/v1", api_key="none", model="phi", max_tokens=100)
    ask = "Tell me of a little girl."

    print("answer:", chat.invoke(ask, max_tokens=32).text)

    print("stream: ", end="")
    for chunk in chat.stream(ask, max_tokens=32):
        print(chunk.text, end="", flush=True)
    print()

    called = chat.bind_tools([weather], tool_choice="required", strict=True, parallel_tool_calls=False).invoke(ask)
    for call in called.tool_calls:
        print("call:", json.dumps(call["args"]))
        print("result:", weather.invoke(call["args"]))

    person = chat.with_structured_output(Person, method="json_schema").invoke(ask)
    print("person:", json.dumps(person.model_dump()))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080")
