"""The format prompt: the Jinja template that wraps a problem for the judge.

It comes from a checkpoint (`reward_config.json`) or a file, which may be untrusted. So it is rendered in Jinja's
sandbox: a template can neither run code nor reach beyond its variable `content`.
"""

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What the expressions of a template can raise."""


class FormatPrompt:
    """A template that renders. `text`: the template. `source`: its file or setting, for messages.

    Raises ValueError when `text` is not a template, or reaches for what the sandbox forbids.
    """

    def __init__(self, text: str, *, source: str = "format_prompt") -> None:
        self.text, self.source = text, source
        if not isinstance(text, str):
            raise ValueError(f"{source}: the format prompt is {text!r}, not text. Write a Jinja template.")
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
        try:
            self._template = environment.from_string(text)
        except FAILURES as error:
            raise self._explain(error) from error
        self.render("")

    def render(self, content: str) -> str:
        """The template around a problem."""
        try:
            return self._template.render(content=content)
        except FAILURES as error:
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> ValueError:
        reason = f"{type(error).__name__}: {error}"
        return ValueError(
            f"{self.source}: the format prompt does not render: {reason}. Use the variable `content` and Jinja's own "
            "filters only."
        )
