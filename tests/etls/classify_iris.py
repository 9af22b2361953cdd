"""Classify flowers by a model of scikit-learn that each worker loads once.

Try it, where scikit-learn is installed:

    python3 ais_runtime_min.py serve tests/etls/classify_iris.py &
    echo '5.1,3.5,1.4,0.2' | curl -T - http://127.0.0.1:8000/bucket/flowers.csv    # setosa

In a cluster:

    python3 ais_runtime_min.py pack tests/etls/classify_iris.py --packages scikit-learn --spec
"""
import csv

from aistore.sdk.etl.webserver.flask_server import FlaskServer
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression


class ClassifyIris(FlaskServer):
    """Trains a small model when it is constructed; yours would be read from a file of the image."""

    def __init__(self) -> None:
        super().__init__()
        iris = load_iris()
        self.names = [str(name) for name in iris.target_names]
        self.model = LogisticRegression(max_iter=1000).fit(iris.data, iris.target)

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        """Return a line with the name of the kind for each line of four numbers."""
        rows = [[float(text) for text in row] for row in csv.reader(data.decode().splitlines())]
        kinds = self.model.predict(rows) if rows else []
        return "".join("%s\n" % self.names[kind] for kind in kinds).encode()

    def get_mime_type(self) -> str:
        """Return the content type of the results."""
        return "text/plain"
