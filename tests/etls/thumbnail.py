"""Shrink pictures to JPEG thumbnails, with a package from PyPI.

Try it:

    PACKAGES=pillow python3 ais_runtime_min.py serve tests/etls/thumbnail.py &
    curl --data-binary @photo.png -X PUT 'http://127.0.0.1:8000/bucket/photo.png?etl_args=64' > thumbnail.jpg
"""
import io

from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer


class Thumbnail(HTTPMultiThreadedServer):
    """Imports Pillow where it is used, so that whoever pickles the class does not need it."""

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        """Return a thumbnail whose longer side has `etl_args` pixels, or 128."""
        from PIL import Image

        pixels = int(etl_args or 128)
        with Image.open(io.BytesIO(data)) as picture:
            thumbnail = picture.convert("RGB")
        thumbnail.thumbnail((pixels, pixels))
        result = io.BytesIO()
        thumbnail.save(result, "JPEG")
        return result.getvalue()

    def get_mime_type(self) -> str:
        """Return the content type of the results."""
        return "image/jpeg"
