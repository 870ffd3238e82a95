"""A Sigstore on 127.0.0.1: the certificate authority and the logs of sigstore-js's own `@sigstore/mock`, served over HTTP.

Its handlers answer what sigstore-js sends; what sigstore-python sends in another form is put into that form first, and an entry
of the log is written down as Rekor does (rekor, `pkg/types/dsse/v0.0.1`), which the mock leaves out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import need_program
from tests.support.environments import environment, node_packages

PACKAGES = ("sigstore==4.5.1", "model-signing==1.1.1", "pyOpenSSL==26.4.0")
ADA, ISSUER = "https://example.com/ada", "https://accounts.example.com"
_START = "2020-01-01T00:00:00Z"
_SERVER = r"""
const http = require("http"), crypto = require("crypto"), mock = require("@sigstore/mock");
const pair = () => crypto.generateKeyPairSync("ec", { namedCurve: "prime256v1" });
const der = (key) => key.export({ format: "der", type: "spki" }).toString("base64");
const base64 = (raw) => Buffer.from(raw).toString("base64");
const sha256 = (raw) => ({ algorithm: "sha256", value: crypto.createHash("sha256").update(raw).digest("hex") });

// A token in the header, and PEM in base64.
const certificate = (body, token) => ({
  certificateSigningRequest: base64Text(body.certificateSigningRequest), credentials: { oidcIdentityToken: token },
});
const base64Text = (text) => Buffer.from(text, "base64").toString();

// What is proposed, an envelope and its verifiers, is recorded as digests and signatures.
const entry = (body) => {
  const { envelope, verifiers } = body.spec.proposedContent, parsed = JSON.parse(envelope);
  return { apiVersion: body.apiVersion, kind: body.kind, spec: {
    envelopeHash: sha256(envelope), payloadHash: sha256(Buffer.from(parsed.payload, "base64")),
    signatures: parsed.signatures.map(({ sig }) => ({ signature: sig, verifier: verifiers[0] })) } };
};

async function main() {
  const [authority, log] = [pair(), pair()], day = 86400000, urls = {};
  const ca = await mock.initializeCA(authority, await mock.initializeCTLog(authority));
  const rekor = (clock) => async (url) => mock.rekorHandler(await mock.initializeTLog(url, log, clock));
  const services = { fulcio: () => mock.fulcioHandler(ca), rekor: rekor(), late: rekor(new Date(Date.now() + day)) };
  for (const [name, make] of Object.entries(services)) {
    let handler;
    const server = http.createServer((request, response) => {
      const parts = [];
      request.on("data", (part) => parts.push(part));
      request.on("end", async () => {
        if (request.url === "/.well-known/openid-configuration")  // which model_signing asks for, and has no use for
          return response.end(JSON.stringify({ authorization_endpoint: urls[name], token_endpoint: urls[name] }));
        if (request.url !== handler.path) return response.writeHead(404).end();
        const body = JSON.parse(Buffer.concat(parts)), token = (request.headers.authorization || "").slice("Bearer ".length);
        const made = await handler.fn(JSON.stringify(name === "fulcio" ? certificate(body, token) : entry(body)));
        response.writeHead(made.statusCode, { "Content-Type": "application/json" }).end(made.response);
      });
    });
    await new Promise((done) => server.listen(0, "127.0.0.1", done));
    urls[name] = `http://127.0.0.1:${server.address().port}`;
    handler = await make(urls[name]);
  }
  console.log(JSON.stringify({ urls, ca: base64(ca.rootCertificate), ct: der(authority.publicKey), log: der(log.publicKey) }));
}
main();
"""


@dataclass(frozen=True)
class Sigstore:
    """A running one.

    Attributes:
        config: The file of its client trust config.
        late: That of one whose log records everything a day later, when the certificate has expired.
        root: That of its trusted root alone.
    """

    config: Path
    late: Path
    root: Path

    def token(self, name: str = ADA, issuer: str = ISSUER, seconds: int = 600) -> str:
        """An identity token, which its authority believes."""
        now = int(time.time())
        claims = {"aud": "sigstore", "sub": name, "iss": issuer, "iat": now + min(seconds, 0), "exp": now + seconds}
        parts = [json.dumps(part).encode() for part in ({"alg": "HS256", "typ": "JWT"}, claims)]
        return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (*parts, b"signature"))


@contextmanager
def running(folder: Path) -> Iterator[Sigstore]:
    """Serve until the block ends; the trust configs are in the folder."""
    environ = {**os.environ, "NODE_PATH": str(node_packages("@sigstore/mock@0.13.0") / "node_modules")}
    words = [need_program("node"), "-e", _SERVER]
    with subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            addresses = json.loads(process.stdout.readline())
            sigstore = Sigstore(folder / "sigstore.json", folder / "late.json", folder / "root.json")
            for path, log in ((sigstore.config, "rekor"), (sigstore.late, "late")):
                path.write_text(json.dumps(_config(addresses, log)))
            sigstore.root.write_text(json.dumps(_config(addresses, "rekor")["trustedRoot"]))
            yield sigstore
        finally:
            process.kill()


def _config(instance: Any, log: str) -> dict[str, Any]:
    urls = instance["urls"]

    def key_of(url: str, key: str) -> dict[str, Any]:
        public = {"rawBytes": key, "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": {"start": _START}}
        ident = base64.b64encode(hashlib.sha256(base64.b64decode(key)).digest()).decode()
        return {"baseUrl": url, "hashAlgorithm": "SHA2_256", "publicKey": public, "logId": {"keyId": ident}}

    def service(url: str) -> dict[str, Any]:
        return {"url": url, "majorApiVersion": 1, "validFor": {"start": _START}, "operator": "example.com"}

    authority = {
        "subject": {"organization": "sigstore.mock", "commonName": "sigstore"},
        "certChain": {"certificates": [{"rawBytes": instance["ca"]}]},
        "validFor": {"start": _START},
    }
    return {
        "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
        "trustedRoot": {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [key_of(urls["rekor"], instance["log"])],
            "certificateAuthorities": [authority],
            "ctlogs": [key_of(urls["fulcio"], instance["ct"])],
            "timestampAuthorities": [],
        },
        "signingConfig": {
            "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
            "caUrls": [service(urls["fulcio"])],
            "oidcUrls": [service(urls["fulcio"])],
            "rekorTlogUrls": [service(urls[log])],
            "rekorTlogConfig": {"selector": "ANY"},
            "tsaUrls": [],
            "tsaConfig": {"selector": "ANY"},
        },
    }


@contextmanager
def installed() -> Iterator[Path]:
    """Have the package `sigstore` importable here, from an environment of its own; yields the folder of its programs."""
    before = [*sys.path]
    exec(first())
    try:
        yield _python().parent
    finally:
        sys.path[:] = before


def first() -> str:
    """Python that has the package importable; what both environments have is ours."""
    (site,) = (_python().parent.parent / "lib").glob("python*/site-packages")
    return f"import importlib, sys; sys.path.append({str(site)!r}); importlib.invalidate_caches()"


def _python() -> Path:
    return environment(*PACKAGES)
