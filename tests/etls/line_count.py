"""Count the lines of an object.

Try it:

    python3 ais_runtime_min.py serve tests/etls/line_count.py &
    printf 'one\\ntwo\\n' | curl --data-binary @- -X PUT http://127.0.0.1:8000/bucket/list.txt    # 2
"""
from aistore.sdk.etl.webserver.flask_server import FlaskServer


class LineCount(FlaskServer):
    """Answers with a number as text."""

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        """Return how many lines there are; a last one without a line feed counts."""
        lines = data.count(b"\n") + (not data.endswith(b"\n") and data != b"")
        return b"%d" % lines

    def get_mime_type(self) -> str:
        """Return the content type of the results."""
        return "text/plain"
