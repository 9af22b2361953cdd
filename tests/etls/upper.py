"""Put every object in capital letters: the smallest ETL class.

Try it, with this file and the runtime alone:

    python3 ais_runtime_min.py serve tests/etls/upper.py &
    curl --data-binary 'hello' -X PUT http://127.0.0.1:8000/bucket/greeting    # HELLO
"""
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer


class Upper(HTTPMultiThreadedServer):
    """Transforms whole objects; may be called by many threads at once."""

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        """Return the object in capital letters."""
        return data.upper()
