"""A local S3-compatible server that can be told to fail."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterable
from typing import Any
from urllib.request import Request, urlopen

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


class Store:
    """moto behind a switch: a share of the requests fails, or all of them."""

    _numbers = itertools.count(1)  # of all servers of a process: moto keeps their buckets together

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._rng = random.Random(0)
        self._lock = threading.Lock()
        self.failing_share = 0.0
        self.requests = self.failed = 0
        self.dies_after: int | None = None  # requests that write
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self._server.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """What clients need to find it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def new_bucket(self) -> str:
        """An empty bucket's name."""
        name = f"bucket-{next(self._numbers)}"
        urlopen(Request(f"{self.endpoint}/{name}", method="PUT")).close()
        return name

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def heal(self) -> None:
        self.failing_share, self.dies_after = 0.0, None
        self.requests = self.failed = 0

    def _answer(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        with self._lock:
            self.requests += 1
            if self.dies_after is not None and environ["REQUEST_METHOD"] in ("PUT", "POST"):
                self.dies_after -= 1
            dead = self.dies_after is not None and self.dies_after < 0
            fails = dead or self._rng.random() < self.failing_share
            self.failed += fails
        if not fails:
            return self._app(environ, start_response)
        if environ.get("wsgi.input_terminated"):
            environ["wsgi.input"].read()
        else:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        body = b"<Error><Code>ServiceUnavailable</Code><Message>planted</Message></Error>"
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        start_response("503 Service Unavailable", headers)
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]
