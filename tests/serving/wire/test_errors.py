"""Refusals: one table for the application, the client and HAProxy."""

from __future__ import annotations

import json

import pytest

from mimray.serving.deploy.haproxy_launcher import error_file, problem_body
from mimray.serving.wire.errors import REFUSALS, error_from_status, problem


@pytest.mark.parametrize("status", REFUSALS)
def test_error_from_status__each_has_a_class_of_its_own(status: int) -> None:
    error = error_from_status(status, "no")
    assert (type(error).status, error.code) == (status, REFUSALS[status]["code"])
    assert str(error) == "no"


def test_error_from_status__others_are_the_client_s_fault_or_the_server_s() -> None:
    assert [problem(error_from_status(s, "no"))["code"] for s in (405, 418, 502)] == [
        "invalid_request", "invalid_request", "model_failure"
    ]  # fmt: skip


@pytest.mark.parametrize("status", [400, 404, 408, 413, 500, 503])
def test_problem_body__haproxy_refuses_as_the_application_does(status: int) -> None:
    said = json.loads(problem_body(status))
    assert said == problem(error_from_status(status, said["detail"]))
    assert error_file(status).startswith(f"HTTP/1.1 {status} ")
