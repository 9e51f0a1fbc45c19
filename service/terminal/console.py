"""Standard error for people; standard output is for results."""

from __future__ import annotations

from rich.console import Console, RenderableType

console = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str, style: str | None = None) -> None:
    """Print a text as it is, without rich's markup."""
    console.print(text, style=style, markup=False)


def warn(text: str) -> None:
    """Print a warning."""
    say(f"warning: {text}", "yellow")


def as_text(view: RenderableType) -> str:
    """A view as it looks on standard output, in its width and colours."""
    output = Console(highlight=False)
    with output.capture() as captured:
        output.print(view)
    return captured.get().removesuffix("\n")
