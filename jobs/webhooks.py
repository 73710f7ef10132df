"""Sends a message to a webhook: within seconds, some times over, signed, and never by a detour.

Redirects are not followed, since they could lead a message to where it was never meant to go; the answer's body is
not read; the URL never appears in an error.
"""

import hashlib
import hmac
import time
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

import requests
import stamina

from jobs.notice import checked_url, is_this_machine

TRY_AGAIN = {408, 425, 429}  # and 500 to 599


@dataclass(frozen=True)
class Patience:
    """How long is waited: for one answer, between tries (doubled each time), and how often is tried. Seconds."""

    answer: float = 5.0
    first_wait: float = 0.5
    longest_wait: float = 4.0
    tries: int = 4

    @property
    def in_all(self) -> float:
        """The longest that sending can take when every try runs out: 27.5 s by default."""
        waits = sum(min(self.first_wait * 2**number, self.longest_wait) for number in range(self.tries - 1))
        return self.tries * self.answer + waits + self.first_wait * self.tries + 2.0


class NotDelivered(Exception):
    """The receiver refused the message; trying again changes nothing. Its text holds no secret."""


class NotYetDelivered(NotDelivered):
    """No answer, or one that may be better next time."""


def send(url: str, body: bytes, headers: dict[str, str], patience: Patience) -> str:
    """Posts a body of JSON until it is taken.

    Args:
        url: https, or http to this machine.
        body: the message.
        headers: beside the content type.
        patience: how long, how often.

    Returns:
        The answer, such as "200".

    Raises:
        NotDelivered: it was refused (redirects too), or not taken after the last try.
        ValueError: no URL that may be called.
    """
    checked_url(url)
    for attempt in stamina.retry_context(
        on=NotYetDelivered,
        attempts=patience.tries,
        timeout=timedelta(seconds=patience.in_all),
        wait_initial=patience.first_wait,
        wait_max=patience.longest_wait,
        wait_jitter=patience.first_wait,
    ):
        with attempt:
            return _post(url, body, headers, patience.answer)
    raise AssertionError("unreachable")


def _post(url: str, body: bytes, headers: dict[str, str], seconds: float) -> str:
    with requests.Session() as session:
        # A proxy of the environment is right for the way out, and wrong for this machine itself.
        session.trust_env = not is_this_machine(urlsplit(url).hostname or "")
        problem = ""
        try:
            # stream: the body of the answer is left unread.
            with session.post(
                url,
                data=body,
                headers={"Content-Type": "application/json", "User-Agent": "karikomi"} | headers,
                timeout=seconds,
                allow_redirects=False,
                stream=True,
            ) as answer:
                status = answer.status_code
        except requests.Timeout:
            problem = f"no answer within {seconds:g} s"
        except (requests.RequestException, OSError) as error:
            problem = f"not reached ({type(error).__name__})"
    if problem:  # raised out here, so that no error with the URL in it hangs on as its context
        raise NotYetDelivered(problem)
    if 200 <= status < 300:
        return str(status)
    if status in TRY_AGAIN or status >= 500:
        raise NotYetDelivered(f"answered {status}")
    raise NotDelivered(f"answered {status}{', and redirects are not followed' if 300 <= status < 400 else ''}")


def signed(secret: str, body: bytes, at: float | None = None) -> dict[str, str]:
    """Headers by which a receiver who knows the secret can tell that a message is ours, and not an old one.

    The signature is the HMAC-SHA256 (RFC 2104) of "<timestamp>.<body>", in hexadecimal.

    Args:
        secret: shared with the receiver.
        body: as it is sent.
        at: seconds since 1970; now if not given.
    """
    moment = str(int(time.time() if at is None else at))
    mark = hmac.new(secret.encode(), moment.encode() + b"." + body, hashlib.sha256).hexdigest()
    return {"X-Karikomi-Timestamp": moment, "X-Karikomi-Signature": f"sha256={mark}"}
