from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimray.serving.api.keys import Key, KeyRing, Quota, add_key, hash_key, read_keys, revoke_key
from mimray.serving.wire.errors import QuotaExceededError, UnauthorizedError
from mimray.trainers.errors import ServingError


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_keys__added_shown_once_and_kept_as_hashes(tmp_path: Path) -> None:
    file = tmp_path / "new" / "keys.json"
    key = add_key(file, "detectors", pictures_per_minute=60)
    assert key.startswith("mim_")
    assert len(key) == 47
    assert file.stat().st_mode & 0o777 == 0o600
    assert key not in file.read_text()
    (kept,) = read_keys(file)
    assert (kept.name, kept.sha256, kept.pictures_per_minute) == ("detectors", hash_key(key), 60)
    with pytest.raises(ServingError, match="revoke it first"):
        add_key(file, "detectors")
    with pytest.raises(ServingError, match="keys: detectors"):
        revoke_key(file, "others")
    with pytest.raises(ServingError, match="letters"):
        add_key(file, "a b")
    assert [p.name for p in file.parent.iterdir() if "-" in p.name] == []  # nothing half-written


def test_key_ring__learns_of_changes_while_it_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, clock = tmp_path / "keys.json", Clock()
    first = add_key(file, "first")
    ring = KeyRing(file, [hash_key("fixed")], clock=clock)
    assert ring.admit(first).name == "first"
    assert ring.admit("fixed").name == "environment"
    for wrong in (None, "", "mim_", first + "x"):
        with pytest.raises(UnauthorizedError):
            ring.admit(wrong)
    second = add_key(file, "second")
    revoke_key(file, "first")
    clock.now += 0.5
    assert ring.admit(first).name == "first"  # looks once a second
    clock.now += 0.6
    assert ring.admit(second).name == "second"
    with pytest.raises(UnauthorizedError):
        ring.admit(first)
    file.write_text("{")
    for _ in range(3):
        clock.now += 2
        assert ring.admit(second).name == "second"
    assert caplog.text.count("stay as they were") == 1


def test_key_ring__a_cure_is_noticed_and_what_is_gone_admits_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, clock = tmp_path / "keys.json", Clock()
    first = add_key(file, "first")
    ring = KeyRing(file, clock=clock)
    second = add_key(file, "second")
    file.chmod(0o666)
    clock.now += 2
    with pytest.raises(UnauthorizedError):
        ring.admit(second)
    assert "chmod 600" in caplog.text
    file.chmod(0o600)  # as it says
    clock.now += 2
    assert ring.admit(second).name == "second"
    file.unlink()
    clock.now += 2
    with pytest.raises(UnauthorizedError):
        ring.admit(first)
    assert "is gone" in caplog.text
    with pytest.raises(ServingError, match="keys add"):
        KeyRing(file)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "damaged"),
        ('{"keys": [{"name": "a"}]}', "sha256"),
        ('{"x": 1}', "damaged: x"),
        (json.dumps({"keys": [{"name": "a", "sha256": "é" + "0" * 64}]}), "sha256"),
    ],
)
def test_key_ring__refuses_a_damaged_file_at_the_start(
    tmp_path: Path, text: str, match: str
) -> None:
    file = tmp_path / "keys.json"
    file.write_text(text)
    with pytest.raises(ServingError, match=match):
        KeyRing(file)
    file.write_text('{"keys": []}')
    file.chmod(0o666)
    with pytest.raises(ServingError, match="chmod 600"):
        KeyRing(file)


def test_quota__a_minute_brings_back_what_was_taken() -> None:
    now_ns = 0
    quota = Quota(clock_ns=lambda: now_ns)
    key = Key(name="a", sha256="0" * 64, pictures_per_minute=30)
    quota.admit(key)
    quota.charge(key, 40)  # a minute's worth, and ten more
    with pytest.raises(QuotaExceededError, match="30 pictures a minute") as refused:
        quota.admit(key)
    assert refused.value.retry_after_s == 22  # 11 pictures at one in two seconds
    now_ns += refused.value.retry_after_s * 10**9
    quota.admit(key)
    other = Key(name="b", sha256="1" * 64, pictures_per_minute=30)
    quota.admit(other)
    free = Key(name="c", sha256="2" * 64)
    quota.charge(free, 10**9)
    quota.admit(free)


@given(st.integers(1, 2000), st.integers(1, 5000), st.integers(0, 10**11))
def test_quota__to_wait_as_told_is_enough_and_a_second_less_is_not(
    rate: int, pictures: int, passed_ns: int
) -> None:
    now_ns = 0
    quota = Quota(clock_ns=lambda: now_ns)
    key = Key(name="a", sha256="0" * 64, pictures_per_minute=rate)
    quota.charge(key, pictures)
    now_ns = passed_ns
    try:
        quota.admit(key)
        return
    except QuotaExceededError as error:
        told_s = error.retry_after_s
    now_ns = passed_ns + (told_s - 1) * 10**9
    with pytest.raises(QuotaExceededError):
        quota.admit(key)
    now_ns = passed_ns + told_s * 10**9
    quota.admit(key)
