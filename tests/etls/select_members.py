"""Select files from tar archives, such as WebDataset shards, in constant memory.

Try it:

    python3 ais_runtime_min.py serve tests/etls/select_members.py &
    curl -T shard-000.tar 'http://127.0.0.1:8000/bucket/shard-000.tar?etl_args=jpg,cls' | tar -t
"""
import tarfile
from typing import BinaryIO, Iterator

from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer


class SelectMembers(HTTPMultiThreadedServer):
    """Passes an archive on member by member, so that a shard may have any size."""

    PIECE_BYTES = 1 << 20

    def transform_stream(self, reader: BinaryIO, path: str, etl_args: str) -> Iterator[bytes]:
        """Yield the archive with the files whose extensions `etl_args` lists; all without a list."""
        wanted = set(filter(None, etl_args.split(",")))
        with tarfile.open(fileobj=reader, mode="r|*") as archive:
            for member in archive:
                # in a WebDataset the extension begins at the first dot of the file's name
                extension = member.name.rpartition("/")[2].partition(".")[2]
                content = archive.extractfile(member)
                if content is None or (wanted and extension not in wanted):
                    continue
                yield member.tobuf(tarfile.PAX_FORMAT)
                yield from iter(lambda: content.read(self.PIECE_BYTES), b"")
                yield bytes(-member.size % tarfile.BLOCKSIZE)
        yield bytes(2 * tarfile.BLOCKSIZE)
        while reader.read(self.PIECE_BYTES):  # what follows the archive's end
            pass

    def get_mime_type(self) -> str:
        """Return the content type of the results."""
        return "application/x-tar"
