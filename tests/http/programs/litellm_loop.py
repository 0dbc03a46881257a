"""Two turns with a tool through litellm, by chat completions and by Messages."""

import json
import sys

import litellm

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
for model, base in (("openai/test-model", f"{sys.argv[1]}/v1"), ("anthropic/test-model", sys.argv[1])):
    messages = [{"role": "user", "content": "Paris?"}]
    settings = {"model": model, "api_base": base, "api_key": "none-at-all", "tools": [TOOL], "max_tokens": 200}
    message = litellm.completion(messages=messages, **settings).choices[0].message
    (call,) = message.tool_calls
    print("called:", json.loads(call.function.arguments)["city"])
    result = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
    chunks = list(litellm.completion(messages=[*messages, message, result], stream=True, **settings))
    print("said:", litellm.stream_chunk_builder(chunks).choices[0].message.content)
