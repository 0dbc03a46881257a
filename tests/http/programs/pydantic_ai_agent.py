"""An agent of pydantic-ai's with one tool, by chat completions, Responses and Messages."""

import sys

from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

openai = OpenAIProvider(base_url=f"{sys.argv[1]}/v1", api_key="none-at-all")
anthropic = AnthropicProvider(base_url=sys.argv[1], api_key="none-at-all")
for model in (
    OpenAIChatModel("test-model", provider=openai),
    OpenAIResponsesModel("test-model", provider=openai),
    AnthropicModel("test-model", provider=anthropic),
):
    agent = Agent(model, instructions="You tell the weather.")

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """Tells the weather in a city."""
        print("called:", city)
        return "21 degrees"

    print("said:", agent.run_sync("Paris?").output)
