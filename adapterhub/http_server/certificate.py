"""A server's certificate, read again when its files change: new connections get a renewed one without a restart."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path
from typing import Any

from .watched_files import WatchedFiles

LOOK_SECONDS = 5.0
"""Seconds between two looks at the files."""


class Certificate:
    """The certificate of a server's TLS context, and the files that it was read from.

    Args:
        context: The context of the listening socket, with the certificate.
        paths: The PEM files of the certificate and of its private key.
        log: Where changes are logged.
    """

    def __init__(self, context: ssl.SSLContext, paths: tuple[Path, Path], log: logging.Logger) -> None:
        self._paths, self._log, self._current = paths, log, context
        self._files = WatchedFiles(lambda: paths)
        # Called at the start of each connection, with or without a name of the server. Another context is taken as a whole, so
        # that a certificate never meets the key of another.
        context.sni_callback = self._use_current

    async def follow(self) -> None:
        """Look at the files until canceled, and read them again once they have changed."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if self._files.have_changed():
                self._files.mark_read()
                self._read_again()

    def _read_again(self) -> None:
        """Read the files; broken ones change nothing."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(*self._paths)
        except OSError as error:  # includes ssl.SSLError
            self._log.error("the certificate stays as it was: %s: %s", self._paths[0], error.strerror or error)
        else:
            self._current = context
            self._log.info("%s has changed; new connections get it", self._paths[0])

    def _use_current(self, connection: Any, _server_name: str | None, _context: ssl.SSLContext) -> None:
        """Give a connection the certificate that was read last."""
        connection.context = self._current
