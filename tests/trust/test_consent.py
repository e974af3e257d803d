"""The record of consent and the key that signs it."""

import json
import os
import stat
from dataclasses import replace

import pytest

from hicode.errors import FileFormatError, InputError
from hicode.trust.consent import NOT_STATED, ConsentRecord, consent_record
from hicode.trust.machine_key import MachineKey

CLIP = "ab" * 32


def test_a_record_survives_json_and_its_signature_fits():
    record = consent_record("  Jane Doe,\n in writing ", CLIP)
    read = ConsentRecord.from_dict(json.loads(json.dumps(record.to_dict())))
    assert read == record and read.is_unaltered() and read.stated
    assert read.statement == "Jane Doe, in writing"


@pytest.mark.parametrize("change", [{"statement": "John Doe"}, {"date": ""}, {"clip_sha256": "0"}, {"signature": "%"}])
def test_any_change_is_noticed(change):
    assert not replace(consent_record("Jane Doe", CLIP), **change).is_unaltered()


def test_nothing_said_is_recorded_as_not_stated():
    record = consent_record(None, CLIP)
    assert record.statement == NOT_STATED and not record.stated and not record.signature
    assert not ConsentRecord.from_dict(None).stated


@pytest.mark.parametrize("statement", ["", "  ", "x" * 501])
def test_empty_and_endless_statements_are_refused(statement):
    with pytest.raises(InputError, match="--consent"):
        consent_record(statement, CLIP)


@pytest.mark.parametrize("values", [{"statement": "x"}, {"statement": 1, "date": "", "clip_sha256": ""}, {"a": "b"}])
def test_a_damaged_record_is_refused(values):
    with pytest.raises(FileFormatError, match="consent"):
        ConsentRecord.from_dict(values)


def test_the_key_is_made_once_and_private(own_config):
    assert MachineKey.load() == MachineKey.load()
    mode = (own_config / "signing-key.pem").stat().st_mode
    assert os.name == "nt" or stat.S_IMODE(mode) == 0o600


def test_a_damaged_key_is_refused_in_one_line(own_config):
    MachineKey.load()
    (own_config / "signing-key.pem").write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match="Delete both"):
        MachineKey.load()
