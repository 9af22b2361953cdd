"""Remove words from texts; a FastAPI class with a route and a start-up hook of its own.

Try it, where fastapi and uvicorn are installed:

    python3 ais_runtime_min.py serve tests/etls/word_filter.py &
    curl http://127.0.0.1:8000/words                                               # ["secret"]
    echo 'a secret plan' | curl -T - http://127.0.0.1:8000/bucket/plan.txt          # a ****** plan
"""
import os
import re
from typing import List

from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer


class WordFilter(FastAPIServer):
    """Its words come from the variable WORDS, separated by commas."""

    def __init__(self) -> None:
        super().__init__()
        self.app.add_api_route("/words", self.list_words)

    async def startup_event(self) -> None:
        """Read the words before the first request."""
        self.words = os.environ.get("WORDS", "secret").split(",")
        self.pattern = re.compile("|".join(map(re.escape, self.words)).encode())

    async def list_words(self) -> List[str]:
        """Answer `GET /words`."""
        return self.words

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        """Return the text with stars in the place of the words."""
        return self.pattern.sub(lambda found: b"*" * len(found[0]), data)
