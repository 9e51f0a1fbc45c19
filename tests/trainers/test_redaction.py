"""Secrets in addresses: masked in what is shown and recorded, refused in what a plan would keep."""

from __future__ import annotations

import pytest

from mimray.trainers.data.files import locate, refuse_secrets
from mimray.trainers.errors import ConfigError, StorageError
from mimray.trainers.redaction import masked
from mimray.trainers.storage import RunDir
from mimray.trainers.tracking import check_reachable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA:s3cr3t@bucket/runs", "s3://AKIA:***@bucket/runs"),
        ("s3://AKIA:s3/cr+3t@bucket/runs", "s3://AKIA:***@bucket/runs"),
        ("abfs://:s3cr3t@account/runs", "abfs://:***@account/runs"),
        ("at postgresql://me:s3cr3t@db:5432/x it", "at postgresql://me:***@db:5432/x it"),
        ("abfs://a/b?client_secret=s3cr3t&x=1", "abfs://a/b?client_secret=***&x=1"),
        ("https://a/b?X-Amz-Signature=s3cr3t", "https://a/b?X-Amz-Signature=***"),
    ],
)
def test_masked__secrets(text: str, shown: str) -> None:
    assert masked(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a:b@c?endpoint_override=127.0.0.1:8333&scheme=http",
        "abfs://container@account.dfs.core.windows.net/runs",
        "http://127.0.0.1:8500/v2/models/photos@2",
        "http://[::1]:8500/photos",
        "photos@champion",
        "mimray pretrain mae --data C:/photos",
    ],
)
def test_masked__leaves_the_rest(text: str) -> None:
    assert masked(text) == text


@pytest.mark.parametrize("take", [refuse_secrets, locate, RunDir])
def test_uri__with_a_password_is_refused_and_not_told(take: object) -> None:
    assert callable(take)
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY") as refused:
        take("s3://AKIA:s3cr3t@bucket/runs?region=eu-west-1")
    assert "s3cr3t" not in str(refused.value)
    assert "s3://AKIA:***@bucket/runs" in str(refused.value)


def test_mlflow__of_an_account_is_asked_without_it_and_told_without_its_password() -> None:
    with pytest.raises(StorageError, match=r"http://me:\*\*\*@127.0.0.1:1: .*refused") as error:
        check_reachable("http://me:s3cr3t@127.0.0.1:1")
    assert "s3cr3t" not in str(error.value)


def test_error__masks_message_and_hint() -> None:
    error = StorageError("s3://a:b@c fails", hint="see s3://a:b@c")
    assert str(error) == "s3://a:***@c fails (see s3://a:***@c)"
