"""An agent of LangChain's with one tool."""

import sys

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def get_weather(city: str) -> str:
    """Tells the weather in a city."""
    print("called:", city)
    return "21 degrees"


model = ChatOpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none-at-all", model="test-model")
agent = create_agent(model, [get_weather], system_prompt="You tell the weather.")
for _, message in agent.stream({"messages": [{"role": "user", "content": "Paris?"}]}, stream_mode=["updates"]):
    for update in message.values():
        print("said:", update["messages"][-1].content)
