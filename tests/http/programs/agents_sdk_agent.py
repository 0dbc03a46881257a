"""An agent of OpenAI's Agents SDK with one tool, by Responses and by chat completions."""

import asyncio
import sys

from agents import Agent, Runner, function_tool, set_default_openai_api, set_default_openai_client, set_tracing_disabled
from openai import AsyncOpenAI


@function_tool
def get_weather(city: str) -> str:
    """Tells the weather in a city."""
    print("called:", city)
    return "21 degrees"


async def main() -> None:
    set_tracing_disabled(True)
    set_default_openai_client(AsyncOpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none-at-all"), use_for_tracing=False)
    agent = Agent(name="weather", instructions="You tell the weather.", tools=[get_weather], model="test-model")
    for api in ("responses", "chat_completions"):
        set_default_openai_api(api)
        done = await Runner.run(agent, "Paris?")
        print("said:", done.final_output)
        streamed = Runner.run_streamed(agent, "Paris?")
        async for _ in streamed.stream_events():
            pass
        print("said:", streamed.final_output)


asyncio.run(main())
