"""An OpenAI-compatible HTTP server on one exported folder: vLLM's where it runs, else transformers' handlers, here.

settings.py    what a user sets
engine.py      which engine fits this machine, and the command of vLLM
requests.py    bodies that clients send: accepted, or refused with a reason
model.py       the one model, loaded before the port opens, behind transformers' ModelManager
worker.py      one generation at a time, in order of arrival, each of which its client can give up
endpoints.py   from a body to transformers' handlers: /v1/completions and /v1/chat/completions
app.py         the routes, keys, errors, /health and /metrics
metrics.py     what /metrics says
run.py         the port, the signals, the end
"""

from .run import serve
from .settings import Settings

__all__ = ["Settings", "serve"]
