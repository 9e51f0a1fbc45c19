from __future__ import annotations

from mimray.trainers.data.account import REASONS, Account


def test_account__a_line_a_reason_with_counts_kinds_and_cure() -> None:
    account = Account()
    assert account.lines() == account.to_json() == []
    account.add("unreadable_format", ".heic", 3)
    account.add("not_a_picture", ".txt")
    account.add("entered_before", "current")
    lines = account.lines()
    assert lines[0] == "1 file passed over (.txt 1): no pictures by their names"
    assert lines[1].startswith("1 folder or link passed over (current)")
    assert lines[2].startswith("warning: 3 files passed over (.heic 3)")
    assert REASONS["unreadable_format"].cure in lines[2]
    assert account.short_lines() == [
        "1 file passed over (.txt 1); 1 folder or link passed over (current)",
        lines[2],
    ]


def test_account__json_has_the_same_and_bounds_the_names() -> None:
    account, other = Account(), Account()
    for number in range(200):
        other.add("name_not_utf8", f"name {number}")
    account.add("name_not_utf8", "name 0")
    account.merge(other)
    (entry,) = account.to_json()
    assert (entry["reason"], entry["action"]) == ("name_not_utf8", "passed_over")
    assert entry["count"] == account.total("name_not_utf8") == 201
    assert entry["kinds"]["name 0"] == 2
    assert len(entry["kinds"]) == 50
    assert entry["warning"]
    assert len(entry["message"]) < 250
