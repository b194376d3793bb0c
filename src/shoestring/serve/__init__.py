"""The API in OpenAI's shapes, keys and credit, metrics, and the chat page. `serve.run.serve` starts it."""
