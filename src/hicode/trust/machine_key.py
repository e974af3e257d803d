"""The signing key of this machine, made at first use.

It lies in `$HICODE_CONFIG`, else `$XDG_CONFIG_HOME/hicode`, else `~/.config/hicode`: the private key (ECDSA, P-256),
mode 600, and the certificates of the key and of a root that signed only it. The root's own private key is thrown away.
The certificates name no person. A stranger cannot tell who owns the key: that needs a public authority's certificate.
"""

import datetime
import os
from dataclasses import dataclass
from pathlib import Path

from hicode.assets import user_folder
from hicode.errors import FileFormatError, OutputError
from hicode.files import atomic_path, remove_leftovers

_VALID_DAYS = 3650
_NAMES = ("signing-key.pem", "signing-certificate.pem")


@dataclass(frozen=True)
class MachineKey:
    """The private key and the certificate chain (key, root), as PEM. `root` is the chain's last certificate."""

    private: bytes
    chain: str

    @property
    def root(self) -> str:
        """The certificate that a reader has to trust."""
        return self.chain[self.chain.rindex("-----BEGIN CERTIFICATE-----") :]

    @property
    def leaf(self) -> str:
        """The certificate of the key itself."""
        end = "-----END CERTIFICATE-----\n"
        return self.chain[: self.chain.index(end) + len(end)]

    @staticmethod
    def load() -> "MachineKey":
        """This machine's key, made where there is none.

        FileFormatError where it is damaged, OutputError where none can be written.
        """
        private, chain = (config_folder() / name for name in _NAMES)
        remove_leftovers(private.parent)
        try:
            if private.exists() and chain.exists():
                return _checked(MachineKey(private.read_bytes(), chain.read_text()), private)
        except OSError as error:
            raise OutputError(
                f"The signing key {private} cannot be read ({error.strerror}). Set HICODE_CONFIG to your own folder."
            ) from error
        key = _make()
        _make_folder(private.parent)
        with atomic_path(chain) as temporary:
            temporary.write_text(key.chain)
        with atomic_path(private) as temporary:
            temporary.touch(0o600)  # before the first byte
            temporary.write_bytes(key.private)
        return key

    def sign(self, data: bytes) -> bytes:
        """ECDSA with SHA-256."""
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = serialization.load_pem_private_key(self.private, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey), type(key)
        return key.sign(data, ec.ECDSA(hashes.SHA256()))


def config_folder() -> Path:
    """Where the user's own settings lie."""
    if folder := os.environ.get("HICODE_CONFIG"):
        return Path(folder)
    return user_folder("XDG_CONFIG_HOME", ".config", "HICODE_CONFIG")


def signed_by(certificate: str, signature: bytes, data: bytes) -> bool:
    """Whether the key of a certificate (PEM) signed the data."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = x509.load_pem_x509_certificate(certificate.encode()).public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature):
        return False
    return True


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise OutputError(
            f"The signing key needs the folder {folder}, which cannot be made ({error.strerror}). Set HICODE_CONFIG to "
            "a folder of your own, or use --mark none with a reason."
        ) from error


def _checked(key: MachineKey, path: Path) -> MachineKey:
    try:
        if signed_by(key.leaf, key.sign(b"check"), b"check"):
            return key
    except (ValueError, AssertionError):
        pass
    raise FileFormatError(
        f"The signing key {path} is damaged or not its certificate's. Delete both: new ones are made."
    )


def _make() -> MachineKey:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = _certificate("hicode root of one machine", root_key, None, root_key)
    leaf = _certificate("hicode on one machine", key, root, root_key)
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return MachineKey(private, (leaf.public_bytes(pem) + root.public_bytes(pem)).decode())


def _certificate(name: str, key, issuer, issuer_key):
    """X.509 as C2PA asks: digitalSignature, emailProtection, an organisation in the subject. `issuer` None: a root."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    root, now = issuer is None, datetime.datetime.now(datetime.UTC)
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "hicode")]
    )
    usage = {name: False for name in ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")}
    usage |= {"encipher_only": False, "decipher_only": False, "digital_signature": not root}
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if root else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=_VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=root, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage, key_cert_sign=root, crl_sign=root), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if not root:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())
