"""Turn lines of JSON into a Parquet file, by pyarrow.

Try it, where pyarrow is installed:

    python3 ais_runtime_min.py serve tests/etls/jsonl_to_parquet.py &
    curl -T events.jsonl http://127.0.0.1:8000/bucket/events.jsonl > events.parquet

In a cluster:

    python3 ais_runtime_min.py pack tests/etls/jsonl_to_parquet.py --packages pyarrow --spec
"""
import io

import pyarrow.json
import pyarrow.parquet
from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer


class JSONLToParquet(FastAPIServer):
    """pyarrow has threads of its own, so one object at a time keeps a worker busy."""

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        """Return the table; `etl_args` names the compression, which is zstd by default."""
        table = pyarrow.json.read_json(io.BytesIO(data))
        result = io.BytesIO()
        pyarrow.parquet.write_table(table, result, compression=etl_args or "zstd")
        return result.getvalue()

    def get_mime_type(self) -> str:
        """Return the content type of the results."""
        return "application/vnd.apache.parquet"
