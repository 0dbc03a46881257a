"""An answer of a form, as LangChain asks for one."""

import sys
from typing import Annotated

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


class City(BaseModel):
    name: Annotated[str, Field(max_length=12)]
    degrees: Annotated[int, Field(ge=-50, le=60)]


model = ChatOpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none-at-all", model="demo")
for method in ("json_schema", "function_calling"):
    found = model.with_structured_output(City, method=method).invoke("Describe Paris.")
    assert isinstance(found, City), found
    print("form:", found.model_dump_json())
