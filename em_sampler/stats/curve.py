"""Who may connect by TCP: ends that hold the operator's key. CURVE of libzmq refuses others before they can send.

Both ends derive their key pairs from that one secret, so there is nothing else to hand out.
"""

import hashlib
import hmac
import os
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

KEY_ENV = "EM_INF_STATISTICS_KEY"  # the same on every machine
MIN_KEY_CHARACTERS = 32
ZAP_DOMAIN = b"em-inf-statistics"
HANDSHAKE_TIMEOUT_MS = 10_000  # a stranger that says nothing holds a file descriptor for so long


def read_key() -> str:
    """Read the operator's key from the environment.

    Raises:
        RuntimeError: if it is missing or too short to be a secret.
    """
    key = os.environ.get(KEY_ENV, "").strip()
    if len(key) < MIN_KEY_CHARACTERS:
        raise RuntimeError(
            f"statistics by TCP need a key: set {KEY_ENV} to the same {MIN_KEY_CHARACTERS} or more random characters "
            f"on every machine (got {len(key)}); `openssl rand -hex 32` makes some"
        )
    return key


def key_pair(role: str) -> tuple[bytes, bytes]:
    """Derive (public key, secret key) of the "server" or the "worker" from the operator's key."""
    secret = z85.encode(hmac.digest(read_key().encode(), f"em-inf statistics {role}".encode(), hashlib.sha256))
    return zmq.curve_public(secret), secret


def secure_worker(end: "zmq.Socket[bytes]") -> None:
    """Let a worker's end prove its key, and connect to nobody but an API server that has the key too."""
    end.curve_publickey, end.curve_secretkey = key_pair("worker")
    end.curve_serverkey, _ = key_pair("server")


def secure_server(context: "zmq.Context[zmq.Socket[bytes]]", end: "zmq.Socket[bytes]") -> None:
    """Let an API server's end refuse all but workers with the key. One end per `context`, which asks one thread."""
    _, end.curve_secretkey = key_pair("server")
    end.curve_server = True
    end.zap_domain = ZAP_DOMAIN
    end.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # if the thread below is gone, nobody connects
    end.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(ZAP_DOMAIN.decode(), _Workers())


class _Workers:
    """What ThreadAuthenticator asks."""

    def __init__(self) -> None:
        self.public_key, _ = key_pair("worker")

    def callback(self, domain: str, public_key: Any) -> bool:
        """Return whether a connection is a worker's. CURVE has proved that it holds the secret key."""
        return hmac.compare_digest(public_key, self.public_key)
