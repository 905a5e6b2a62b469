"""The answer in a model's reply (`extract`) and votes over answers (`vote`). Needs pydantic and RE2 alone."""
