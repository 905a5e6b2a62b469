"""The answer in a model's reply (`extract`) and votes over answers (`vote`). Text alone: pydantic and RE2 are all it needs."""
