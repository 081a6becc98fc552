"""OpenAI-compatible HTTP over the engine: `codesign serve CONFIG`.

guard        who may come in: Host, Origin, key, content type, body size
app          routes: body -> schema -> prompts -> dispatcher -> one document or a stream of events
dispatcher   which HTTP request waits for which sequence; how many there may be
engine_thread   the one thread that builds and steps the engine
choice       one sequence: tokens -> detokenize -> stops -> pieces of text
server       uvicorn, signals, drain
"""
