"""Who calls: Flower's signed timestamp against the keys of the approved sites.

Flower checks the same headers after it has read and parsed the whole request, and accepts every
key that was ever registered. This check reads no byte of the body.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache

from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

from fedgpt.flower.deploy.limits import Refused

_NAMES = (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER)
_parsed = lru_cache(maxsize=1024)(bytes_to_public_key)


def authenticate(headers: Mapping[str, str], sites: Mapping[str, bytes]) -> tuple[str, bytes]:
    """The name and the public key (PEM) of the site that signed a request a short time ago.

    Raises Refused (401). A body is not signed, so only TLS protects it from change.
    """
    if any(name not in headers for name in _NAMES):
        raise Refused(401, "no_credentials", "the request has no signature of a node")
    try:
        key, signature = (b64decode(headers[name], validate=True) for name in _NAMES[:2])
        signed = headers[TIMESTAMP_HEADER].encode("ascii")
        age = (now() - datetime.fromisoformat(headers[TIMESTAMP_HEADER])).total_seconds()
    except (ValueError, TypeError) as damage:
        raise Refused(401, "no_credentials", "the signature of the node is damaged") from damage
    name = next((name for name, known in sites.items() if known == key), None)
    if name is None:
        raise Refused(401, "unknown_key", "the node's key is not approved, or revoked")
    if not verify_signature(_parsed(key), signed, signature):
        raise Refused(401, "bad_signature", f"not signed with the key of {name}")
    if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
        detail = f"the node's clock differs from the server's by {-age:.0f} s; set its time"
        raise Refused(401, "clock", detail)
    return name, key
