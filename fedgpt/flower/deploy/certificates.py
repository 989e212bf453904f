"""A server's CA and its certificate (X.509), and the hosts that a certificate may be for."""

from __future__ import annotations

import ipaddress
import re
import secrets
import warnings
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedgpt.core.errors import FedGPTError
from fedgpt.core.options.option import short

CA_DAYS, SERVER_DAYS = 3650, 397
# days by which a certificate begins before it is made, as a site's clock may be slow
EARLIER = 1
LOCAL = ("localhost", "127.0.0.1")  # the operator's own commands on the server's machine
LAST_PORT = 65535
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
UNREADABLE = (
    *(ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature),
    *(x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType),
    UserWarning,  # of the library, see _parsed
)


def host_of(typed: str) -> str:
    """A host name or an IP address as certificates have it; raises ValueError with the reason.

    >>> host_of("Fed.Example.org"), host_of("2001:DB8:0::1")
    ('fed.example.org', '2001:db8::1')
    """
    try:
        address = ipaddress.ip_address(typed)
    except ValueError:
        return _name_of(typed)
    if address.is_unspecified or address.is_multicast or "%" in typed:
        raise ValueError("is not an address that clients can connect to; type the machine's own")
    return str(address)


def _name_of(typed: str) -> str:
    *_, last = labels = typed.lower().split(".")
    if not typed.isascii():
        raise ValueError("has other letters than a to z; type it in the form that begins with xn--")
    if ":" in typed or "/" in typed:
        raise ValueError("must be a name or an IP address alone; the port is typed as --port")
    if len(typed) > 253 or last.isdigit() or not all(map(LABEL.fullmatch, labels)):
        raise ValueError("must be a host name such as fed.example.org, or an IP address")
    return ".".join(labels)


def check_address(hosts: Sequence[Any], port: int, where: str) -> tuple[str, ...]:
    """The hosts of a server, as they are in a file; raises FedGPTError for a wrong host or port."""
    if not hosts or not all(isinstance(host, str) for host in hosts):
        raise FedGPTError(f"{where} is damaged: hosts must be a list of at least one host")
    for host in hosts:
        try:
            host_of(host)
        except ValueError as reason:
            raise FedGPTError(f"{where}: hosts: {short(repr(host))} {reason}") from None
    if not 1 <= port <= LAST_PORT:
        raise FedGPTError(f"{where}: port: {short(port)} must be from 1 to {LAST_PORT}")
    return tuple(map(host_of, hosts))


def new_ca(now: datetime) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """A new CA, valid for ten years: its key and its certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    # a site may have the CAs of several servers, and OpenSSL looks for them by name
    name = _common_name(f"fedgpt CA {secrets.token_hex(8)}")
    builder = _builder(name, name, key.public_key(), now, now + timedelta(days=CA_DAYS))
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        # digital_signature: it signs the approvals of sites, too
        .add_extension(_usage("digital_signature", "key_cert_sign", "crl_sign"), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return key, builder.sign(key, hashes.SHA256())


def new_certificate(
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePublicKey,
    hosts: Sequence[str],
    now: datetime,
) -> x509.Certificate:
    """A server's certificate for `hosts` and this machine, of at most 397 days.

    It ends with the CA at the latest; raises FedGPTError if that has ended.
    """
    end = min(now + timedelta(days=SERVER_DAYS - EARLIER), ca.not_valid_after_utc)
    if end <= now:
        raise FedGPTError(
            f"the CA ended on {end:%Y-%m-%d}: make another folder with `fedgpt keys init`, and"
            " approve a new request of each site in it"
        )
    names = [_general_name(host) for host in dict.fromkeys([*hosts, *LOCAL])]
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    return (
        _builder(_common_name("fedgpt server"), ca.subject, key, now, end)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(authority, critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def read_ca(content: bytes, where: str) -> tuple[x509.Certificate, ec.EllipticCurvePublicKey]:
    """A CA and its public key, from PEM; raises FedGPTError unless it is one, and undamaged."""
    try:
        ca = _parsed(content)
        # before anything of it is used: the signature covers every byte
        ca.verify_directly_issued_by(ca)
        is_ca = ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        key = ca.public_key()
    except UNREADABLE:
        raise FedGPTError(f"{where} is damaged: it is not the certificate of a CA") from None
    if not is_ca or not isinstance(key, ec.EllipticCurvePublicKey):
        raise FedGPTError(f"{where} is not the certificate of a CA with an EC key")
    return ca, key


def _parsed(content: bytes) -> x509.Certificate:
    with warnings.catch_warnings():
        # such as of a serial number below 1, which no CA gives: the library would only warn
        warnings.simplefilter("error")
        return x509.load_pem_x509_certificate(content)


def read_certificate(
    content: bytes, ca: x509.Certificate, where: str
) -> tuple[x509.Certificate, ec.EllipticCurvePublicKey, tuple[str, ...]]:
    """A server's certificate, its public key and its hosts; raises FedGPTError unless it is an
    undamaged one that `ca` has issued. It may have ended.
    """
    try:
        found = _parsed(content)
        found.verify_directly_issued_by(ca)
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        key = found.public_key()
    except UNREADABLE:
        raise FedGPTError(f"{where} is damaged, or not a certificate of this folder's CA") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise FedGPTError(f"{where} is not a certificate for an EC key")
    hosts = [*names.get_values_for_type(x509.DNSName), *names.get_values_for_type(x509.IPAddress)]
    return found, key, tuple(map(str, hosts))


def pem(certificate: x509.Certificate) -> str:
    """A certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=EARLIER))
        .not_valid_after(end)
    )


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*allowed: str) -> x509.KeyUsage:
    every = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
        *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{use: use in allowed for use in every})


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
