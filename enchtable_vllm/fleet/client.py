"""One server over HTTP: a method for each route, and every failure an `EnchTableError`."""

from __future__ import annotations

import ssl
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx
from pydantic import ValidationError

from enchtable_vllm.errors import ConfigError, EnchTableError
from enchtable_vllm.fleet.credentials import Credentials, is_loopback
from enchtable_vllm.fleet.documents import Document, Faulty, Pause, Status, Swapped, Vectors
from enchtable_vllm.fleet.targets import Target

_CONNECT_SECONDS = 5.0
_READ_SECONDS = 30.0
#: Beyond the time for staging, for pausing, committing, and the way.
_SWAP_MARGIN_SECONDS = 120.0

_Known = TypeVar("_Known", bound=Document)


class Unreachable(EnchTableError):
    """No answer came; what was asked for may have been done all the same."""


class ServerRefused(EnchTableError):
    """The server answered that it did not do it.

    Attributes:
        status: Of HTTP.
        code: As `docs/http-api.md` lists them; ``http_NNN`` where the answer is none of its
            documents: something between here and the server spoke, or another server.
    """

    def __init__(
        self,
        subject: str,
        *,
        expected: object,
        got: object,
        fix: str,
        status: int = 0,
        code: str = "",
    ) -> None:
        super().__init__(subject, expected=expected, got=got, fix=fix)
        self.status = status
        self.code = code

    @property
    def settles_it(self) -> bool:
        """Whether the server itself spoke, so that a swap is not still on its way."""
        return not self.code.startswith("http_") or 300 <= self.status < 500


class Client:
    """Use as a context manager: connections are kept inside.

    Redirects are not followed: they would carry a token to wherever they point.

    Args:
        target: The server.
        credentials: Its tokens.
        ca_file: Certificates to trust in place of the system's.

    Raises:
        ConfigError: The certificates cannot be read.
    """

    def __init__(
        self, target: Target, credentials: Credentials, *, ca_file: Path | None = None
    ) -> None:
        self.target = target
        self._credentials = credentials
        self._extensions = {"sni_hostname": target.server_name} if target.server_name else {}
        host = httpx.URL(target.url).host
        self._http = httpx.AsyncClient(
            base_url=target.url,
            verify=trust(ca_file),
            timeout=httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS),
            headers={"Host": target.server_name} if target.server_name else None,
            follow_redirects=False,
            trust_env=not is_loopback(host),  # no proxy stands between this machine and itself
        )

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def status(self) -> Status:
        """What is served."""
        return self._read(Status, await self._ask("GET", "/v1/enchtable/status"))

    async def vectors(self) -> Vectors:
        """What may be swapped in."""
        return self._read(Vectors, await self._ask("GET", "/v1/enchtable/vectors"))

    async def ready(self) -> bool:
        """Whether every rank serves the vector it should."""
        try:
            await self._ask("GET", "/enchtable/ready")
        except ServerRefused as refused:
            if refused.status == 503:
                return False
            raise
        return True

    async def metrics(self) -> str:
        """The metrics of vLLM, in Prometheus' text format."""
        return (await self._ask("GET", "/metrics")).text

    async def swap(
        self,
        safety_vector: str,
        *,
        beta: float | None = None,
        pause: Pause = "keep",
        dry_run: bool = False,
        persist: bool = False,
        expected_epoch: int | None = None,
        timeout_seconds: float = 600.0,
    ) -> Swapped:
        """Exchange the safety vector; arguments as in `docs/http-api.md`."""
        body: dict[str, object] = {
            "safety_vector": safety_vector,
            "beta": beta,
            "pause": pause,
            "dry_run": dry_run,
            "persist": persist,
            "expected_epoch": expected_epoch,
        }
        return await self._change("/v1/enchtable/swap", body, timeout_seconds)

    async def rollback(
        self,
        *,
        pause: Pause = "keep",
        expected_epoch: int | None = None,
        timeout_seconds: float = 600.0,
    ) -> Swapped:
        """Go back to what was served before the last swap."""
        body: dict[str, object] = {"pause": pause, "expected_epoch": expected_epoch}
        return await self._change("/v1/enchtable/rollback", body, timeout_seconds)

    async def model(self) -> str:
        """The name that completions are asked for by: the first that is served."""
        answer = await self._ask("GET", "/v1/models")
        try:
            return str(answer.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise self._unknown(answer, error) from error

    async def complete(self, path: str, body: dict[str, object]) -> httpx.Response:
        """One of vLLM's own routes; the answer as it came, if it is a 200."""
        return await self._ask("POST", path, json=body)

    async def _change(self, path: str, body: dict[str, object], timeout_seconds: float) -> Swapped:
        given = {k: v for k, v in body.items() if v is not None}
        timeout = httpx.Timeout(timeout_seconds + _SWAP_MARGIN_SECONDS, connect=_CONNECT_SECONDS)
        answer = await self._ask(
            "POST",
            path,
            json={**given, "timeout_seconds": timeout_seconds},
            admin=True,
            timeout=timeout,
        )
        return self._read(Swapped, answer)

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        json: dict[str, object] | None = None,
        admin: bool = False,
        timeout: httpx.Timeout | None = None,
    ) -> httpx.Response:
        request = self._http.build_request(
            method,
            path.removeprefix("/"),
            json=json,
            headers=self._credentials.headers(path, admin=admin),
            timeout=timeout or self._http.timeout,
            extensions=self._extensions,
        )
        try:
            answer = await self._http.send(request)
        except httpx.RequestError as error:
            raise Unreachable(
                f"server {self.target.url}, {method} {path}",
                expected="an answer",
                got=f"{type(error).__name__}: {error}".rstrip(". "),
                fix="Is it up, and is the URL right?",
            ) from error
        if answer.status_code != 200:
            raise self._refused(answer)
        return answer

    def _refused(self, answer: httpx.Response) -> ServerRefused:
        status = answer.status_code
        subject = f"server {self.target.url}, {answer.request.method} {answer.request.url.path}"
        try:
            fault = Faulty.model_validate_json(answer.content).error
        except ValidationError:
            return ServerRefused(
                subject,
                expected="HTTP 200, or an error as documented",
                got=f"HTTP {status}: {answer.text[:200]}",
                fix=_advice(status),
                status=status,
                code=f"http_{status}",
            )
        return ServerRefused(
            subject,
            expected="HTTP 200",
            got=f"HTTP {status}, {fault.code}: {fault.message.rstrip('.')}",
            fix=fault.fix,
            status=status,
            code=fault.code,
        )

    def _read(self, kind: type[_Known], answer: httpx.Response) -> _Known:
        try:
            return kind.model_validate_json(answer.content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise self._unknown(answer, f"{where}: {first['msg']}") from error

    def _unknown(self, answer: httpx.Response, got: object) -> ServerRefused:
        return ServerRefused(
            f"server {self.target.url}, {answer.request.method} {answer.request.url.path}",
            expected="the documented answer",
            got=got,
            fix="Do the server and this client run versions that belong together?",
            status=answer.status_code,
            code="http_unknown",
        )


def _advice(status: int) -> str:
    if 300 <= status < 400:
        return "Redirects are not followed, for the sake of tokens: give the final URL."
    if status in (401, 403):
        return "Set VLLM_API_KEY, or give --api-key-file."
    if status == 404:
        return (
            "The server needs --load-format enchtable, VLLM_PLUGINS=enchtable, and for what "
            "changes something an admin token."
        )
    return "See the server's log."


def trust(ca_file: Path | None) -> ssl.SSLContext | bool:
    """For httpx: the certificates in a file, or the system's.

    Raises:
        ConfigError: They cannot be read.
    """
    if ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"--ca-file '{ca_file}'",
            expected="a readable file of certificates in PEM",
            got=error,
            fix="Check the path; it is the authority's certificate that is needed.",
        ) from error
