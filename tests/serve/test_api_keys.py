"""The file of API keys: lines, or tables with names and limits."""

import hashlib

import pytest

from sdrt.errors import UsageError
from sdrt.serve.api_keys import ApiKey, KeyLimits, hash_key, read_api_keys

DIGEST = hashlib.sha256(b"one").hexdigest()


def test_lines_are_keys_or_digests(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# mine\nsha256:{DIGEST}\n\ntwo\n")
    assert read_api_keys(path) == (
        ApiKey(hash_key(b"one"), "key-1"),
        ApiKey(hash_key(b"two"), "key-2"),
    )
    path.write_text("two\nsha256:abc\n")
    with pytest.raises(UsageError, match="line 2"):
        read_api_keys(path)


def test_tables_have_names_and_limits(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(
        f'[keys.alice]\nkey = "sha256:{DIGEST}"\nrequests_per_minute = 60\nimages_in_flight = 4\n'
        'pixel_steps_per_day = 2_000_000_000\n[keys.bob]\nkey = "two"\n'
    )
    alice, bob = read_api_keys(path)
    assert alice == ApiKey(hash_key(b"one"), "alice", KeyLimits(60, 4, 2_000_000_000))
    assert bob == ApiKey(hash_key(b"two"), "bob")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "contains no API key"),
        ("[keys.a", "is not TOML"),
        ("keys = 3", r"\[keys.NAME\]"),
        ('[users.a]\nkey = "x"', r"\[keys.NAME\]"),
        ("[keys]\na = 3", "expected key ="),
        ("[keys.a]\nimages_in_flight = 3", "expected key ="),
        ('[keys.a]\nkey = ""', "expected key ="),
        ('[keys."a b"]\nkey = "x"', "expected a name"),
        ('[keys.a]\nkey = "sha256:12"', "64 hexadecimal digits"),
        ('[keys.a]\nkey = "x"\nrate = 3', "unknown rate"),
        ('[keys.a]\nkey = "x"\nimages_in_flight = 0', "images_in_flight is 0"),
        ('[keys.a]\nkey = "x"\nimages_in_flight = true', "images_in_flight is True"),
        ('[keys.a]\nkey = "x"\nrequests_per_minute = 1.5', "requests_per_minute is 1.5"),
        ('[keys.a]\nkey = "x"\nrequests_per_minute = 100_001', "expected 1 to 100000"),
        ('[keys.a]\nkey = "x"\n[keys.b]\nkey = "x"', "a and b are the same key"),
    ],
)
def test_invalid_tables_are_refused_by_name(tmp_path, text, words):
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        read_api_keys(path)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    for name in ("keys", "keys.toml"):
        (tmp_path / name).write_bytes(b"\xff")
        with pytest.raises(UsageError, match="not UTF-8"):
            read_api_keys(tmp_path / name)
        with pytest.raises(UsageError, match="cannot read"):
            read_api_keys(tmp_path / "none" / name)
