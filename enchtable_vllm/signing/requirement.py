"""Who must have signed: the loader's ``require_signature``, and the same on command lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from enchtable_vllm.errors import ConfigError
from enchtable_vllm.vector.safety_vector import describe_fault


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Text = Annotated[str, Field(min_length=1)]
#: One path, or several.
Paths = Annotated[list[Text], Field(min_length=1), BeforeValidator(_as_list)]


class _Requirement(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RequireKey(_Requirement):
    """A signature by the holder of a private key.

    Attributes:
        public_key: PEM file of an ECDSA key (P-256, P-384 or P-521). Of several, any one will do:
            that is how keys are rotated.
    """

    method: Literal["key"]
    public_key: Paths

    @property
    def files(self) -> list[Path]:
        """What decides who may sign: the files that it names."""
        return [Path(path).expanduser() for path in self.public_key]


class RequireCertificate(_Requirement):
    """A signature by the holder of a certificate.

    Attributes:
        certificate_chain: PEM files with the certificates that are trusted to issue: the root,
            and intermediates that signatures do not bring. There is no default: the system's
            would let in whoever has a certificate for a web site.
        identity: Which of the certificates that they vouch for: its subject's common name, or
            one of its alternative names.
    """

    method: Literal["certificate"]
    certificate_chain: Paths
    identity: Text

    @property
    def files(self) -> list[Path]:
        """As `RequireKey.files`."""
        return [Path(path).expanduser() for path in self.certificate_chain]


class RequireSigstore(_Requirement):
    """A signature by an identity that Sigstore attests.

    Attributes:
        identity: An e-mail address, or the URI of a workflow.
        identity_provider: The OpenID Connect issuer that knew it: its URL.
        trust_config: File with Sigstore's client trust configuration. Without it, the public
            instance's is fetched, which needs the network.
    """

    method: Literal["sigstore"]
    identity: Text
    identity_provider: Text
    trust_config: Text | None = None

    @property
    def files(self) -> list[Path]:
        """As `RequireKey.files`."""
        return [] if self.trust_config is None else [Path(self.trust_config).expanduser()]


Requirement = Annotated[
    RequireKey | RequireCertificate | RequireSigstore, Field(discriminator="method")
]


def parse_requirement(text: str) -> Requirement:
    """What a command line asks for: the loader's JSON object, or just a public key's path.

    Raises:
        ConfigError: It is neither.
    """
    if not text.lstrip().startswith("{"):
        text = json.dumps({"method": "key", "public_key": text})
    try:
        found: Requirement = TypeAdapter(Requirement).validate_json(text)
    except ValidationError as error:
        raise ConfigError(
            "--require-signature",
            expected="the path of a public key, or an object as in --model-loader-extra-config",
            got=describe_fault(error),
            fix="See docs/signing.md.",
        ) from error
    return found
