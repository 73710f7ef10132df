"""Who is told of a run's end: the part of a job file. Light, and careful with what is a secret."""

import ipaddress
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from workflows.recipe import Strict

Told = Literal["done", "rolled back", "failed", "needs decision", "cancelled"]
NOT_KEPT = "**********"  # what records hold in place of a URL


class Notice(Strict):
    """A webhook, and what it is told. Its URL is a secret: whoever knows it can write there."""

    url_from: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$",
        description="Environment variable, on the machine that carries the run out, that holds the webhook's URL.",
    )
    url: SecretStr | None = Field(
        None,
        description="The URL itself, for a try: https, or http to this machine. Records do not keep it, "
        "so a job that is submitted names a variable instead.",
    )
    form: Literal["json", "slack"] = Field("json", description="json: every field of the message; slack: Block Kit.")
    on: tuple[Told, ...] = Field(
        ("done", "rolled back", "failed", "needs decision"), min_length=1, description="What is told; also: cancelled."
    )

    @field_validator("url")
    @classmethod
    def _may_be_called(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and value.get_secret_value() != NOT_KEPT:
            checked_url(value.get_secret_value())
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.url is None) == (self.url_from is None):
            raise ValueError("give url_from (the name of an environment variable) or url, one of them")
        return self

    @property
    def target(self) -> str:
        """What may be said of where it goes: the form, and the variable or the host."""
        return f"{self.form} {self.url_from or self._host}"

    @property
    def _host(self) -> str:
        assert self.url is not None
        return urlsplit(self.url.get_secret_value()).hostname or "(a URL that records do not keep)"


def checked_url(url: str) -> str:
    """The URL, if a message may be sent there.

    Raises:
        ValueError: it is neither https nor http to this machine, or it is none. The message never holds the URL.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or url != url.strip() or not url.isprintable():
        raise ValueError("a webhook's URL begins with https:// and names a host")
    if parts.username or parts.password:
        raise ValueError("a webhook's URL holds no user and password")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_this_machine(host)):
        raise ValueError("a webhook is called by https only (http only on this machine itself)")
    return url


def is_this_machine(host: str) -> bool:
    """Whether a host is the loopback, by name or by address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
