"""Images over HTTP: an engine that draws many at once, and OpenAI's images API in front of it."""
