"""Requests to services that speak OpenAI's protocol: chat, voice, hearing. Every failure is one sentence."""

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hicode.errors import InputError, ResourceError

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Service:
    """One service. `url`: its base, as "http://localhost:11434/v1"; `what`, `option` and `key_variable` name it in
    errors. The key is read from the environment: so it is in no process list, and never in the page.
    """

    url: str
    what: str
    option: str
    key_variable: str

    def __post_init__(self):
        if not re.match(r"https?://[^/]", self.url):
            raise InputError(
                f"{self.url!r} is no address of a {self.what} service. Give one like http://localhost:11434/v1."
            )

    @contextmanager
    def ask(
        self, route: str, body: bytes | dict, content_type: str = "application/json"
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to a POST, to be read within the block. ResourceError where it fails or cannot be read."""
        headers = {"content-type": content_type}
        if key := os.environ.get(self.key_variable):
            headers["authorization"] = f"Bearer {key}"
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        request = urllib.request.Request(self.url.rstrip("/") + route, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            error.close()
            raise ResourceError(
                f"The {self.what} service refused the request ({error.code}). Check {self.option}, the model's name "
                f"and {self.key_variable}."
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise ResourceError(
                f"The {self.what} service does not answer. Check {self.option}, or start the service."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResourceError(
                f"The {self.what} service's answer cannot be read. Is {self.option} an OpenAI-like one?"
            ) from error
