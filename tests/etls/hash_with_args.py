"""Answer with the digest of an object, by the algorithm that the request's `etl_args` names.

Try it:

    python3 ais_runtime_min.py serve tests/etls/hash_with_args.py &
    curl --data-binary 'hello' -X PUT 'http://127.0.0.1:8000/bucket/greeting?etl_args=md5'
    # {"algorithm": "md5", "digest": "5d41402abc4b2a76b9719d911017c592"}
"""
import hashlib
import json

from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer


class HashWithArgs(FastAPIServer):
    """Takes an argument per request, and says what type its results are."""

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        """Return the digest as JSON; without an argument it is SHA-256."""
        algorithm = etl_args or "sha256"
        if algorithm not in hashlib.algorithms_guaranteed or algorithm.startswith("shake"):
            raise ValueError("etl_args names no hash algorithm: %r" % algorithm)
        digest = hashlib.new(algorithm, data).hexdigest()
        return json.dumps({"algorithm": algorithm, "digest": digest}).encode()

    def get_mime_type(self) -> str:
        """Return the content type of the results."""
        return "application/json"
