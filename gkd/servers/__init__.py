"""Models over HTTP: vLLM servers, and chat addresses.

answers: what vLLM servers answer, one function per kind of answer: what is needed of it, checked, or a
    ServerError
bounded_http: HTTP answers within a deadline and a size, whatever the other end does
chat: an OpenAI-compatible chat address: messages in, text out
checks: what is asked of a vLLM server before the first step: which model, which tokenizer, how long a
    sequence
client: HTTP to one or several `vllm serve` processes: what the rollout backend and the server teacher
    share
engine: what a vLLM server is started with: the flags and variables that a run needs of it, as one order
keeper: keeps one server process of a run: starts it, starts it again when it dies, ends it with the run
own: a vLLM server that the run starts itself: found, started, waited for, and gone when the run is
"""
