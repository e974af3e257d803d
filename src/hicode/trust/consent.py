"""Who says that the person in the clip agreed. Written when an avatar is trained, signed, carried in its file.

The record is a statement by whoever trains, not a proof. The signature shows that it was not changed later, and that
the same machine signed other files. The record's hash, not its words, goes into each video.
"""

import base64
import datetime
import hashlib
import json
from dataclasses import asdict, dataclass, replace

from hicode.errors import FileFormatError, InputError
from hicode.trust.machine_key import MachineKey, signed_by

NOT_STATED = "not stated"
MAX_CHARACTERS = 500


@dataclass(frozen=True)
class ConsentRecord:
    """`statement`: a name, a sentence, or "not stated". `date`: UTC. `clip_sha256`: of the recording.

    `signature` (base64) is that of `certificate` (PEM) over the three; both are empty in a record that is not signed.
    """

    statement: str
    date: str
    clip_sha256: str
    certificate: str = ""
    signature: str = ""

    @property
    def stated(self) -> bool:
        """Whether anybody said anything."""
        return self.statement != NOT_STATED

    @property
    def sha256(self) -> str:
        """The hash that goes into manifests: of statement, date and clip."""
        return hashlib.sha256(self._message()).hexdigest()

    def _message(self) -> bytes:
        fields = {"statement": self.statement, "date": self.date, "clip_sha256": self.clip_sha256}
        return json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()

    def signed(self, key: MachineKey) -> "ConsentRecord":
        """This record with the key's signature."""
        signature = base64.b64encode(key.sign(self._message())).decode()
        return replace(self, certificate=key.leaf, signature=signature)

    def is_unaltered(self) -> bool:
        """Whether the signature fits. It says nothing about who signed."""
        try:
            signature = base64.b64decode(self.signature, validate=True)
        except ValueError:
            return False
        return signed_by(self.certificate, signature, self._message())

    def to_dict(self) -> dict[str, str]:
        """Plain JSON, for an avatar's file."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict | None) -> "ConsentRecord":
        """The record of an avatar's file; "not stated" where the file has none. FileFormatError where it is damaged."""
        if not values:
            return ConsentRecord(NOT_STATED, "", "")
        try:
            record = ConsentRecord(**values)
        except TypeError as error:
            raise FileFormatError("The avatar's record of consent is damaged. Train the avatar anew.") from error
        if not all(isinstance(value, str) for value in asdict(record).values()):
            raise FileFormatError("The avatar's record of consent is damaged. Train the avatar anew.")
        return record


def consent_record(statement: str | None, clip_sha256: str, key: MachineKey | None = None) -> ConsentRecord:
    """The signed record for a new avatar; one that says "not stated", without a signature, if `statement` is None.

    InputError where the statement is empty or too long.
    """
    if statement is not None:
        statement = " ".join(statement.split())
        if not statement:
            raise InputError("--consent is empty. Say who agreed, or leave it out.")
        if len(statement) > MAX_CHARACTERS:
            raise InputError(f"--consent has {len(statement)} characters. Say it in at most {MAX_CHARACTERS}.")
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = ConsentRecord(statement or NOT_STATED, date, clip_sha256)
    return record if statement is None else record.signed(key or MachineKey.load())
